"""Every method's bits follow from configuration and seed alone, whoever computes and whatever happens."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.methods.common import VARIANTS, UnrulyPools, small
from tests.tiny import outcome, run_here, stopped_after


def ids(variant: tuple[str, ...]) -> str:
    return " ".join(variant)


@pytest.mark.parametrize("variant", VARIANTS, ids=ids)
def test_bits_do_not_depend_on_who_computes(variant: tuple[str, ...], tmp_path: Path) -> None:
    """Several workers that finish in any order, get lost and do things twice; and a run that was interrupted."""
    config = small(tmp_path, *variant)
    run_here(config, tmp_path / "here")
    expected = outcome(tmp_path / "here")
    run_here(config, tmp_path / "unruly", partial(UnrulyPools, count=3))
    assert outcome(tmp_path / "unruly") == expected
    stopped_after(config, tmp_path / "halted", 2)
    run_here(config, tmp_path / "halted", resume=True)
    assert outcome(tmp_path / "halted") == expected
