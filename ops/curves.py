"""``python -m ops.curves FOLDER...``: accuracy against simulated time, a Markdown row for every run below the folders.

    python -m ops.curves runs/study_wait runs/study_deadline runs/study_fedbuff --hours 1 2 4 8

An entry is the last accuracy that had been measured by then, on held-out samples; a dash: none yet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster_fl.records import RunFolder
from ops.accuracy import NAMES, last_exit

HOUR = 3600.0


def curve(records: Iterable[Mapping[str, Any]], of: str) -> list[tuple[float, float]]:
    """(simulated hours, accuracy) of each round that was evaluated."""
    found = []
    for record in records:
        accuracy = last_exit(record.get("accuracy", {}), of)
        if accuracy is not None:
            found.append((record["sim_time_s"] / HOUR, accuracy))
    return found


def at(points: Sequence[tuple[float, float]], hours: float) -> float | None:
    """The last accuracy known after so many hours."""
    known = [accuracy for time, accuracy in points if time <= hours]
    return known[-1] if known else None


def table(folders: Sequence[Path], hours: Sequence[float], of: str) -> str:
    """One row a run, in the order of the folders and then of their names."""
    runs = [(file.parent, root) for root in folders for file in sorted(root.rglob("rounds.jsonl"))]
    heads = ["run", *(f"{hour:g} h" for hour in hours), "hours in all", "rounds", "MB sent"]
    lines = [_row(heads), _row(["---"] + ["---:"] * (len(heads) - 1))]
    for path, root in runs:
        records = list(RunFolder(path).rounds())
        points = curve(records, of)
        sent = sum(record["bytes_down"] + record["bytes_up"] for record in records) / 1e6
        total = f"{records[-1]['sim_time_s'] / HOUR:.2f}" if records else "-"
        name = f"{root.name}/{path.relative_to(root)}".removesuffix("/.")
        cells = [_percent(at(points, hour)) for hour in hours]
        lines.append(_row([name, *cells, total, str(len(records)), f"{sent:.0f}"]))
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{100 * accuracy:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ops.curves", description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders of them")
    parser.add_argument("--hours", nargs="+", type=float, required=True, help="simulated hours to look at")
    parser.add_argument("--of", choices=NAMES, default="global", help="which accuracy")
    args = parser.parse_args(arguments)
    missing = [folder for folder in args.folders if not folder.is_dir()]
    if missing:
        print(f"FOLDER={missing[0]}: there is no such folder.", file=sys.stderr)
        return 2
    print(table(args.folders, args.hours, args.of), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
