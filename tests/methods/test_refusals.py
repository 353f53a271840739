"""What a method cannot be combined with is told in one line before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster_fl.errors import UserError
from cluster_fl.experiment import prepare
from tests.methods.common import small

FEDDYN, SCAFFOLD = "train.correction.name=feddyn", "train.correction.name=scaffold"
UNIFORM = "aggregation.weights=uniform"


@pytest.mark.parametrize(
    ("method", "overrides", "key"),
    [
        ("hermes", (FEDDYN, UNIFORM), "train.correction.name"),
        ("nestfl", (FEDDYN, UNIFORM), "train.correction.name"),
        ("fiarse", (FEDDYN,), "train.correction.name"),
        ("fiarse", (SCAFFOLD,), "train.correction.name"),
        ("fjord", (SCAFFOLD,), "train.correction.name"),
        ("fedavg", (FEDDYN,), "aggregation.weights"),
        ("scalefl", (FEDDYN, "server.lr=0.5"), "server.lr"),
        ("scalefl", (FEDDYN, "server.optimizer=adam"), "server.optimizer"),
        ("scaffold", ("train.momentum=0.9",), "train.momentum"),
        ("hermes", ("model.norm=group",), "model.norm"),
        ("fedrolex", ("model.norm=per_level",), "model.norm"),
        ("nestfl", ("model.norm=static",), "model.norm"),
        ("feddf", ("data.public=0",), "data.public"),
        ("nestfl", ("levels.draw=window",), "levels.draw"),
        ("feddrop", ("levels.draw=dynamic",), "levels.draw"),
        ("nefl", ("levels.pairs=[{depth: 99}, {}]", "levels.ratios=null"), "levels.pairs"),
        ("nefl", ("levels.pairs=[{}, {width: 0.5}]", "levels.ratios=null"), "levels.pairs"),
        ("nefl", ("levels.pairs=[{depth: 1, keep: [0]}, {}]", "levels.ratios=null"), "levels.pairs"),
    ],
)
def test_refused(method: str, overrides: tuple[str, ...], key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        prepare(small(tmp_path, method, *overrides))
    assert caught.value.key == key


def test_momentum_distillation_refuses_feddyn_unless_it_is_off(tmp_path: Path) -> None:
    config = small(tmp_path, "inclusivefl", FEDDYN, UNIFORM)
    with pytest.raises(UserError, match="beta=0"):
        prepare(config)
    prepare(small(tmp_path, "inclusivefl", FEDDYN, UNIFORM, "options.beta=0"))


def test_shares_of_a_dynamic_draw_need_not_sum_to_one_exactly(tmp_path: Path) -> None:
    from cluster_fl.assignment import dynamic
    from tests.tiny import round_of, select

    shares = "levels.shares=[0.3333333,0.3333333,0.3333333]"
    experiment = prepare(small(tmp_path, "heterofl", "levels.draw=dynamic", shares))
    levels = dynamic(select(round_of(experiment)))
    assert set(levels.tolist()) <= {1, 2, 3}
    assert len(levels) == 5
