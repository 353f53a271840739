"""Nobody's W&B account, and one run that was tracked with everything on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ops.tracking.following import WANDB, follow
from tests.tiny import tiny


@pytest.fixture(scope="session", autouse=True)
def nobody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """W&B finds no key and no settings, and keeps its files here."""
    home = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("API_KEY", "MODE", "BASE_URL", "PROJECT", "ENTITY", "RUN_ID", "RUN_GROUP", "RESUME"):
            patch.delenv(f"WANDB_{name}", raising=False)
        for name in ("CACHE_DIR", "DATA_DIR", "CONFIG_DIR"):
            patch.setenv(f"WANDB_{name}", str(home))
        patch.setenv("NETRC", str(home / "netrc"))
        yield


@pytest.fixture(scope="session")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder."""
    folder = tmp_path_factory.mktemp("tracked")
    words = ("tracking.group=trio", "tracking.tags=[red,blue]", "tracking.artifacts=true")
    follow(tiny(folder, *WANDB, *words), folder / "run")
    return folder / "run"
