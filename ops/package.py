"""What travels with a job: the files that its command names, and the modules below the folder that it is called in.

A package is an allow-list: such a folder holds data sets, runs and keys as well, and none of them is to go to a
cluster because somebody forgot to exclude it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cluster_fl.errors import UserError

# Modules, and such tables as lie beside cluster-fl's own.
SUFFIXES = (".py", ".npz")
# At the top of a checkout these hold no module that a run needs; the others hold none anywhere.
SKIPPED_AT_TOP = ("build", "data", "dist", "docs", "runs", "tests", "wandb")
SKIPPED = ("__pycache__", "node_modules", "site-packages")
ENVIRONMENT_MARKS = ("pyvenv.cfg", "conda-meta")
# Where files from elsewhere lie in a package.
OUTSIDE = "submitted"
MOST_FILES = 5000
TOLD = 3


def contents(
    source: Path, named: Mapping[Path, Path], include: Sequence[Path], most: int
) -> dict[Path, Path]:
    """What a package from ``source`` holds: each file by its place in the package.

    Args:
        named: the files that the job's command names, by their place (:func:`place_of`).
        include: further files and folders, whatever they hold.
        most: bytes that may be sent.

    Raises:
        UserError: a path of ``include`` is no file or folder below ``source``, or there is too much to send.
    """
    found = dict(named)
    for path in include:
        if not path.exists() or (place := below(path, source)) is None:
            raise UserError("--include", path, f"must be a file or folder below {source}.")
        found |= {Path(os.path.relpath(file, source)): file for file in _files(source / place)}
    for file in _files(source):
        if file.suffix in SUFFIXES:
            found[file.relative_to(source)] = file
            if len(found) > MOST_FILES:
                right = f"holds more than {MOST_FILES:,} modules; submit from the folder of your experiment."
                raise UserError("working directory", source, right)
    _check_size(found, source, most)
    return found


def copy(found: Mapping[Path, Path], target: Path) -> None:
    """Makes the package in ``target``."""
    for place, file in found.items():
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / place)


def size(found: Mapping[Path, Path]) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in found.values())


def place_of(file: Path, number: int, source: Path) -> Path:
    """Where the ``number``-th of the files that a command names lies in its package."""
    # Two files from elsewhere may have one name.
    return below(file, source) or Path(OUTSIDE, str(number), file.name)


def below(path: Path, source: Path) -> Path | None:
    """The path as seen from ``source``; None if it lies elsewhere."""
    whole = Path(os.path.abspath(path))
    return whole.relative_to(source) if whole.is_relative_to(source) else None


def readable(count: int) -> str:
    """So many bytes, in words."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def _files(top: Path) -> Iterator[Path]:
    """All files from ``top`` down, in the order of their names, but for what :data:`SKIPPED` says."""
    if top.is_file():
        yield top
    for folder, inner, names in os.walk(top):
        here = Path(folder)
        inner[:] = [name for name in sorted(inner) if not _is_skipped(here / name, here == top)]
        yield from (here / name for name in sorted(names))


def _is_skipped(folder: Path, at_top: bool) -> bool:
    name = folder.name
    if name.startswith(".") or name.endswith(".egg-info") or name in SKIPPED:
        return True
    return (at_top and name in SKIPPED_AT_TOP) or any((folder / mark).exists() for mark in ENVIRONMENT_MARKS)


def _check_size(found: Mapping[Path, Path], source: Path, most: int) -> None:
    total = size(found)
    if total <= most:
        return
    largest = sorted(found, key=lambda place: -found[place].stat().st_size)[:TOLD]
    told = ", ".join(f"{place} ({readable(found[place].stat().st_size)})" for place in largest)
    right = f"would send {readable(total)}, and Ray takes {readable(most)}; the largest: {told}."
    raise UserError("working directory", source, right)
