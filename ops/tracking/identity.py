"""Which W&B run a run folder is, and how much of it W&B has: tracking.json.

W&B appends what it is sent to a run, so no round may be sent twice.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

from cluster_fl.records import pretty, write_text

FILE = "tracking.json"


@dataclass
class Identity:
    """Steps are counted from the run's first.

    Attributes:
        id: of the W&B run, from the run's first tracked start on.
        sent: how many steps W&B certainly has.
        written: how many steps the last offline file reaches to.
    """

    id: str
    sent: int = 0
    written: int = 0

    @staticmethod
    def of(path: Path) -> Identity:
        """A run folder's; a new one if it has none."""
        file = path / FILE
        if file.exists():
            return Identity(**json.loads(file.read_text(encoding="utf-8")))
        new = Identity(uuid4().hex[:12])
        new.save(path)
        return new

    def save(self, path: Path) -> None:
        write_text(path / FILE, pretty(asdict(self)))

    def supersede(self, path: Path) -> None:
        """Removes offline files that were never sent, since the next one tells their rounds; counts those that were."""
        for folder in (path / "wandb").glob(f"offline-run-*-{self.id}"):
            if any(folder.glob("*.synced")):
                self.sent = max(self.sent, self.written)
            else:
                shutil.rmtree(folder)
