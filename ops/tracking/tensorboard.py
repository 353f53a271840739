"""A run's event files for TensorBoard, in ``tensorboard/`` of the run folder.

A round's number is the step. Accuracies are there a second time, against simulated seconds. Every start of the run
writes all its rounds into a new file, whose first entry tells TensorBoard to forget the ones before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL.Image import Image
from tensorboardX import SummaryWriter

from ops.tracking.feed import Table
from ops.tracking.history import SIM_TIME, Row

FOLDER = "tensorboard"
# The group of the metrics that are shown against simulated time too -> what it is called there.
BY_SECOND = {"accuracy": "accuracy_by_simulated_second"}


class TensorBoard:
    """A sink."""

    def __init__(self, path: Path) -> None:
        self._writer = SummaryWriter(logdir=str(path / FOLDER), purge_step=0)

    def log(self, step: int, row: Row, pictures: Mapping[str, Image], tables: Mapping[str, Table]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
            group, _, leaf = name.partition("/")
            if group in BY_SECOND:
                self._writer.add_scalar(f"{BY_SECOND[group]}/{leaf}", value, round(row[SIM_TIME]))
        for name, picture in pictures.items():
            self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        for name, rows in tables.items():
            self._writer.add_text(name, _markdown(rows), step)
        self._writer.flush()

    def keep(self, rounds: int, root: Path, files: Iterable[Path]) -> None:
        """TensorBoard shows no files."""

    def close(self, finished: bool) -> None:
        self._writer.close()


def _markdown(rows: Table) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
