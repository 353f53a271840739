"""Measures what the project promises about its own speed.

python -m ops.bench search CONFIG... [key=value ...]
    seconds of the split search on one core, from the model's name to the chosen pairs; before that,
    what torch takes to import its code for the meta device when it is used for the first time

python -m ops.bench overhead RUN_DIR [--plain]
    where a recorded run's rounds went: the share of the pools' time in tasks, idle at the tail of a
    phase, and in everything else (dispatch, transfer, aggregation, records, checkpoints). With --plain
    the last recorded round's participants train once more without Ray, cohorts or partial sums: one
    process a pool, clients dealt longest first, an ordinary loop in torch's default memory layout

python -m ops.bench clock [--clients N --rounds R --per-round K --availability phones] [key=value ...]
    seconds and memory of the simulated clock without training, on one core, each population in a process
    of its own; populations of 10^4 to 10^7 when none is named
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster_fl import experiment
from cluster_fl.compose import compose
from cluster_fl.config import Config
from cluster_fl.data import datasets
from cluster_fl.data.batching import Resident, batch_sizes
from cluster_fl.nesting.extraction import extract
from cluster_fl.nesting.levels import ratios
from cluster_fl.nesting.splitting import choose_pairs
from cluster_fl.nesting.tracing import anatomy
from cluster_fl.records import RunFolder
from cluster_fl.seeding import Purpose, torch_generator
from cluster_fl.training.program import SGD
from cluster_fl.training.schedule import learning_rate
from ops import bench_clock
from ops.commands import split_words

REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    search = commands.add_parser("search")
    search.add_argument("words", nargs="+")
    search.set_defaults(command=_search)
    overhead = commands.add_parser("overhead")
    overhead.add_argument("folder", type=Path)
    overhead.add_argument("--plain", action="store_true")
    overhead.set_defaults(command=_overhead)
    bench_clock.add(commands)
    args = parser.parse_args()
    args.command(args)


def _search(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    config = compose(*split_words(args.words))
    spec = experiment.model_spec(config, *datasets.describe(config.data))
    start = time.perf_counter()
    anatomy(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)), (1, 2, 2))
    print(f"torch's first use of the meta device: {time.perf_counter() - start:.3f} s")
    for repeat in range(REPEATS):
        start = time.perf_counter()
        chosen, feasible = choose_pairs(spec, config.levels, ratios(config.levels))
        seconds = time.perf_counter() - start
        pairs = " ".join(f"({c.width:g}, {c.depth})" for c in chosen)
        found = sum(len(level) for level in feasible)
        print(
            f"{'first' if repeat == 0 else 'again'}: {seconds:.3f} s, {found} feasible points, chosen {pairs}"
        )


def _overhead(args: argparse.Namespace) -> None:
    folder = RunFolder(args.folder)
    records = list(folder.rounds())
    print("round  seconds  tasks   tail   rest   (tasks + tail + rest = 100 % of the pools' time)")
    for record in records:
        wall = record["wall"]
        seconds = sum(wall["phases"].values())
        total = seconds * wall["pools"]
        rest = total - wall["busy_s"] - wall["tail_s"]
        shares = (f"{part / total:6.2%}" for part in (wall["busy_s"], wall["tail_s"], rest))
        print(f"{record['round']:5d} {seconds:8.2f} ", " ".join(shares))
    if args.plain:
        wall = records[-1]["wall"]
        plain = plain_seconds(folder.config(), records[-1], wall["pools"])
        ours = wall["phases"]["train"]
        print(
            f"training of round {records[-1]['round']}: {ours:.2f} s; plain PyTorch, {wall['pools']} processes: "
            f"{plain:.2f} s; ratio {ours / plain:.3f}"
        )


def plain_seconds(config: Config, record: dict[str, Any], processes: int) -> float:
    """Wall-clock seconds of the slowest process; imports, data and models are there before it starts."""
    prepared = experiment.prepare(config)

    def work(participant: dict[str, Any]) -> int:
        samples = len(prepared.population.shares.train[participant["client"]])
        return prepared.plan.level(participant["level"]).cost.macs * samples

    loads, dealt = [0.0] * processes, [[] for _ in range(processes)]  # type: list[float], list[list[int]]
    for participant in sorted(record["participants"], key=work, reverse=True):
        least = loads.index(min(loads))
        loads[least] += work(participant)
        dealt[least].append(participant["client"])
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    with context.Pool(processes, _keep, (barrier,)) as pool:
        return max(
            pool.starmap(_train, [(config, record["round"], clients) for clients in dealt], chunksize=1)
        )


def _keep(barrier: Any) -> None:
    globals()["_barrier"] = barrier


def _train(config: Config, number: int, clients: Sequence[int]) -> float:
    torch.set_num_threads(1)
    prepared = experiment.prepare(config)
    plan, population = prepared.plan, prepared.population
    data, model = Resident(prepared.dataset, torch.device("cpu")), plan.model.build()
    models = {level.number: extract(model, plan.anatomy, level.submodel) for level in plan.levels}
    program = prepared.program
    assert isinstance(program, SGD)
    globals()["_barrier"].wait()
    start = time.perf_counter()
    for client in clients:
        local = copy.deepcopy(models[int(plan.level_of[client])]).train()
        train = config.train
        optimiser = torch.optim.SGD(
            local.parameters(), learning_rate(train, number, config.rounds), train.momentum,
            weight_decay=train.weight_decay,
        )  # fmt: skip
        rows = population.shares.train[client]
        generator = torch_generator(config.seed, Purpose.TRAIN, number, client)
        for _ in range(train.epochs):
            inputs, labels = data.epoch(rows, generator)
            sizes = batch_sizes(len(rows), train.batch_size, program.smallest_batch)
            for x, y in zip(inputs.split(sizes), labels.split(sizes), strict=True):
                loss = program.objective(local(x.contiguous()), y, number / config.rounds)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
