"""Shared fixtures. One thread, as in a pool: the bits of a result depend on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "configs"
ORACLES = REPOSITORY.parent / "shared" / "oracles"


@pytest.fixture(scope="session")
def scalefl_oracles() -> dict[str, Any]:
    file = ORACLES / "scalefl_oracles.json"
    if not file.exists():
        pytest.skip(
            "needs the oracle files beside the checkout (shared/oracles): ScaleFL's published numbers"
        )
    content: dict[str, Any] = json.loads(file.read_text())
    return content
