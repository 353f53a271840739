"""``python -m ops.bench clock``: what the simulated clock takes for a large population, each size in a new process."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster_fl import experiment, simulation
from cluster_fl.compose import compose
from cluster_fl.experiment import Experiment
from cluster_fl.timing import intervals
from cluster_fl.timing.totals import Totals

# Small, since the plan costs the same whatever the population is. Its three levels are as uneven as ScaleFL's.
CONFIG = """
method: scalefl
levels: {pairs: [{width: 0.5, depth: 1}, {width: 0.5, depth: 2}, {width: 1.0, depth: 3}]}
model: {name: resnet8}
data: {name: cifar10}
time: {stragglers: {name: lognormal}}
"""
LADDER = (10_000, 100_000, 1_000_000, 10_000_000)
# One core, whatever the machine has: NumPy's own threads would only hide the cost.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def add(commands: Any) -> None:
    """The benchmark's arguments."""
    parser = commands.add_parser("clock")
    parser.add_argument("words", nargs="*", metavar="key=value", help="e.g. time.policy.name=over_select")
    parser.add_argument(
        "--clients", type=int, help="population; 10^4 to 10^7, one after the other, when not given"
    )
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--per-round", type=int, default=10_000)
    parser.add_argument("--availability", default="always", help="always, phones, markov")
    parser.add_argument("--here", action="store_true", help="in this process; prints JSON")
    parser.set_defaults(command=clock)


def clock(args: argparse.Namespace) -> None:
    if args.here:
        print(json.dumps(measure(args.clients, args.rounds, args.per_round, args.availability, args.words)))
        return
    print(
        f"{args.rounds:,} rounds of {args.per_round:,}, log-normal stragglers, availability {args.availability}"
        + "".join(f", {word}" for word in args.words)
    )
    print(
        "   clients  population: wall    CPU  rounds: wall    CPU   memory beyond imports and plan (at all)"
    )
    for clients in [args.clients] if args.clients else LADDER:
        found = _in_new_process(clients, args)
        print(
            f"{clients:10,d} {found['population_s']:15.2f} s {found['population_cpu_s']:6.2f} s "
            f"{found['rounds_s']:9.2f} s {found['rounds_cpu_s']:6.2f} s "
            f"{found['memory_mib']:12.0f} MiB ({found['whole_mib']:.0f})"
        )


def _in_new_process(clients: int, args: argparse.Namespace) -> dict[str, float]:
    words = [f"--clients={clients}", f"--rounds={args.rounds}", f"--per-round={args.per_round}"]
    words += [f"--availability={args.availability}", "--here", *args.words]
    command = [sys.executable, "-m", "ops.bench", "clock", *words]
    environment = os.environ | dict.fromkeys(THREADS, "1")
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)  # noqa: S603 (this program)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(
    clients: int, rounds: int, per_round: int, availability: str, words: list[str]
) -> dict[str, float]:
    """Wall and CPU seconds, and the peak of resident memory beyond what there was before, MiB.

    Before the population is made everything is imported, the plan is there, and a few rounds of a few clients have
    been gone through.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clock.yaml"
        file.write_text(CONFIG)
        settings = [
            f"rounds={rounds}",
            "clients.samples=100",
            f"time.availability.source={availability}",
            *words,
        ]
        few = ("clients.count=100", "clients.per_round=10", "rounds=2", "time.policy.name=wait")
        small = compose([file], [*settings, *few])
        large = compose([file], [*settings, f"clients.count={clients}", f"clients.per_round={per_round}"])
    first, _ = simulation.prepare(small)
    _run(first)
    before = _resident()
    start = _clocks()
    made, _ = simulation.populated(large, replace(first.plan, level_of=experiment.tiers(large)))
    ready = _clocks()
    _run(made)
    done = _clocks()
    whole = _peak()
    return {
        "clients": clients,
        "population_s": ready[0] - start[0],
        "population_cpu_s": ready[1] - start[1],
        "rounds_s": done[0] - ready[0],
        "rounds_cpu_s": done[1] - ready[1],
        "memory_mib": whole - before,
        "whole_mib": whole,
    }


def _run(made: Experiment) -> None:
    totals = Totals(made.plan, made.config.clients.count)
    for step in simulation.steps(made):
        totals.add(step, intervals.pauses(step.ended, made.population.availability))
    totals.as_json(made.config.time.policy.asynchronous)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _resident() -> float:
    """Present memory, MiB; from here on :func:`_peak` counts, where the system allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS") or _peak()


def _peak() -> float:
    """MiB. On Linux not ``ru_maxrss``, which a process inherits from the one that started it."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _status(name: str) -> float | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 2**10
    return None
