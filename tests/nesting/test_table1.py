"""ScaleFL's Table 1 and the search that leads to it, to the unit."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from cluster_fl.compose import compose
from cluster_fl.config import Config
from cluster_fl.errors import UserError
from cluster_fl.experiment import make_plan
from cluster_fl.models.spec import ModelSpec
from cluster_fl.nesting.cost import cost, count, tables
from cluster_fl.nesting.extraction import extract
from cluster_fl.nesting.plan import Plan
from cluster_fl.nesting.search import Problem, plain_cost, search
from cluster_fl.nesting.splitting import width_grid
from cluster_fl.nesting.submodel import Submodel, full, kept, lengths, prefix
from cluster_fl.nesting.tracing import anatomy
from tests.conftest import CONFIGS

CIFAR = ((3, 32, 32), 10)
RATIOS = (0.125, 0.25, 0.5, 1.0)


def resnet110(*exits: int, classes: int = 10) -> ModelSpec:
    return ModelSpec("resnet110", (3, 32, 32), classes, seed=0, exits=exits)


def published(*overrides: str, classes: int = 10) -> Plan:
    config = compose([CONFIGS / "scalefl_cifar10.yaml"], overrides)
    return make_plan(config, ((3, 32, 32), classes))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return published()


def test_search_returns_the_published_pairs(plan: Plan) -> None:
    assert [(level.width, level.depth) for level in plan.levels] == [
        (0.7, 36),
        (0.7, 42),
        (0.75, 48),
        (1.0, 54),
    ]


def test_parameters_and_macs_of_every_level(plan: Plan) -> None:
    assert [level.cost.params for level in plan.levels] == [210_253, 465_727, 866_730, 1_982_136]
    assert [level.cost.macs for level in plan.levels] == [83_443_932, 99_675_796, 138_499_248, 274_385_088]
    assert [level.budgeted for level in plan.levels] == [210_253, 465_727, 866_730, 1_730_714]
    assert [level.submodel.exits for level in plan.levels] == [
        (36,),
        (36, 42),
        (36, 42, 48),
        (36, 42, 48, 54),
    ]
    assert plan.levels[-1].ratio == 1
    np.testing.assert_allclose(
        [level.ratio for level in plan.levels[:3]], [0.1215, 0.2691, 0.5008], atol=5e-5
    )


def test_feasible_sets_of_the_published_grid(plan: Plan) -> None:
    """Every candidate within the tolerance, with its ratio, best balanced first (scalefl.md, 1.4)."""
    published_sets = [
        [
            (36, 0.7, 0.972),
            (30, 0.8, 0.919),
            (30, 0.85, 1.072),
            (48, 0.4, 0.971),
            (24, 1.0, 1.017),
            (54, 0.35, 0.947),
        ],
        [(42, 0.7, 1.076), (42, 0.65, 0.915), (48, 0.55, 0.966), (54, 0.5, 1.022)],
        [(48, 0.75, 1.002), (54, 0.7, 1.024)],
    ]
    for found, expected in zip(plan.candidates, published_sets, strict=False):
        assert [(c.depth, c.width) for c in found] == [(depth, width) for depth, width, _ in expected]
        np.testing.assert_allclose([c.ratio for c in found], [ratio for *_, ratio in expected], atol=1e-3)


@pytest.mark.parametrize(
    ("overrides", "pairs"),
    [
        (["levels.grid.depth_step=1"], [(0.7, 36), (0.75, 40), (0.85, 45)]),
        (["levels.grid.depth_step=1", "levels.grid.width_step=0.01"], [(0.69, 36), (0.74, 40), (0.83, 45)]),
        (["levels.tolerance=0.075"], [(0.7, 36), (0.55, 48), (0.7, 54)]),
        (["levels.tolerance=0.05"], [(0.7, 36), (0.55, 48), (0.7, 54)]),
        (["levels.tolerance=0.15"], [(0.7, 36), (0.7, 42), (0.8, 48)]),
    ],
)
def test_search_on_other_grids_and_tolerances(overrides: list[str], pairs: list[tuple[float, int]]) -> None:
    found = published(*overrides)
    assert [(level.width, level.depth) for level in found.levels[:3]] == pairs


def test_cifar100_has_the_same_pairs_and_the_published_counts(plan: Plan) -> None:
    found = published(classes=100)
    assert [(level.width, level.depth) for level in found.levels] == [(v.width, v.depth) for v in plan.levels]
    assert [level.cost.params for level in found.levels] == [212_323, 471_847, 877_800, 2_002_656]


def test_released_exits_give_the_released_counts() -> None:
    pairs = [(0.7, 30), (0.7, 38), (0.75, 46), (1.0, 54)]
    found = published("levels.pairs=[" + ",".join(f"{{width: {w}, depth: {d}}}" for w, d in pairs) + "]")
    assert [level.cost.params for level in found.levels] == [157_453, 325_631, 783_402, 1_982_136]
    assert [level.cost.macs for level in found.levels] == [70_062_300, 90_754_708, 133_190_832, 274_385_088]


def test_plain_model() -> None:
    spec = resnet110()
    traced = anatomy(spec.skeleton(), spec.input_shape)
    whole = cost(traced, full(traced))
    assert (whole.params, whole.macs) == (1_730_714, 253_149_824)


@pytest.mark.parametrize(
    ("width", "channels"), [(0.7, [11, 22, 44]), (0.75, [12, 24, 48]), (1.0, [16, 32, 64])]
)
def test_channel_counts(width: float, channels: list[int]) -> None:
    assert [kept(size, width) for size in (16, 32, 64)] == channels
    spec = resnet110(36, 42, 48)
    traced = anatomy(spec.skeleton(), spec.input_shape)
    shapes = lengths(traced, prefix(traced, width, 54, (36, 42, 48, 54)))
    assert shapes["units.0.conv1.weight"][0] == channels[0]
    assert [shapes[f"exits.{p}.linear.weight"] for p in (36, 42, 48)] == [
        (10, channels[i]) for i in (1, 2, 2)
    ]
    assert shapes["head.linear.bias"] == (10,)


def test_groups_of_the_traced_resnet() -> None:
    """One group a residual stream, one a block's hidden channels, three a head: and nothing else."""
    spec = resnet110(36, 42, 48)
    traced = anatomy(spec.skeleton(), spec.input_shape)
    sizes = [group.size for group in traced.groups]
    assert len(sizes) == 3 + 54 + 3 * 3
    assert [sizes.count(size) for size in (16, 32, 64)] == [1 + 18, 1 + 18 + 3, 1 + 18 + 6]


def brute_force(
    spec: ModelSpec, metric: str, tolerance: float, ratios: tuple[float, ...]
) -> list[tuple[float, int]]:
    """Eq. 1 with every point counted by fvcore on a really extracted module; tiny grid only."""
    depths, widths = (2, 4, 6), (0.25, 0.5, 0.75, 1.0)
    plain = getattr(count(spec.build(), spec.input_shape), metric)
    chosen: list[tuple[float, int]] = []
    for ratio in ratios[:-1]:
        feasible = []
        for depth, width in product(depths, widths):
            if depth < 6 and any(depth <= d for _, d in chosen):
                continue
            exits = tuple(sorted({d for _, d in chosen if d < depth} | ({depth} if depth < 6 else set())))
            model = spec.with_exits(exits)
            traced = anatomy(model.skeleton(), model.input_shape)
            answers = exits if depth < 6 else (*exits, 6)
            counted = count(
                extract(model.build(), traced, prefix(traced, width, depth, answers)), spec.input_shape
            )
            share = getattr(counted, metric) / (ratio * plain)
            if abs(share - 1) <= tolerance:
                feasible.append((abs(depth / 6 - width), abs(share - 1), -width, -depth))
        _, _, width, depth = min(feasible)
        chosen.append((-width, -depth))
    return [*chosen, (1.0, 6)]


@pytest.mark.parametrize("metric", ["params", "macs"])
def test_search_equals_brute_force_over_extracted_modules(metric: str) -> None:
    spec = ModelSpec("resnet14", (1, 8, 8), 10, seed=0)
    ratios = (0.25, 0.5, 1.0)
    traced = anatomy(spec.with_exits((2, 4)).skeleton(), spec.input_shape)
    problem = Problem(
        traced, tables(traced, width_grid(0.25), "floor"), metric, 0.6, ("ratio", "wider", "deeper")
    )
    chosen, _ = search(problem, ratios)
    assert [(c.width, c.depth) for c in chosen] == brute_force(spec, metric, 0.6, ratios)


def test_both_metrics_must_hold() -> None:
    spec = resnet110(*range(6, 54, 6))
    traced = anatomy(spec.skeleton(), spec.input_shape)
    costs = tables(traced, width_grid(0.05), "floor")
    _, feasible = search(Problem(traced, costs, "both", 0.35, ("ratio",)), (0.5, 1.0))
    plain = {metric: plain_cost(traced, costs[metric]) for metric in costs}
    for candidate in feasible[0]:
        found = cost(traced, prefix(traced, candidate.width, candidate.depth, (candidate.depth,)))
        assert abs(found.params / (0.5 * plain["params"]) - 1) <= 0.35
        assert abs(found.macs / (0.5 * plain["macs"]) - 1) <= 0.35


def test_impossible_tolerance_names_level_and_nearest() -> None:
    with pytest.raises(
        UserError, match=r"levels\.tolerance=0\.001: level 1 .*Nearest.*width 0\.\d+ depth \d+: [\d,]+"
    ):
        published("levels.tolerance=0.001")


def random_submodel(plan: Plan, rng: np.random.Generator) -> Submodel:
    depth = int(rng.choice([36, 42, 48, 54]))
    exits = tuple(p for p in (36, 42, 48, 54) if p <= depth)
    width = float(rng.uniform(0.05, 1))
    return prefix(plan.anatomy, width, depth, exits, str(rng.choice(["floor", "ceil"])))


def test_derived_cost_equals_fvcore_on_random_points(plan: Plan) -> None:
    """Parameters, MACs, activations and bytes, to the unit, on extracted modules."""
    rng, model = np.random.default_rng(0), plan.model.build()
    for _ in range(5):
        submodel = random_submodel(plan, rng)
        assert cost(plan.anatomy, submodel) == count(
            extract(model, plan.anatomy, submodel), plan.model.input_shape
        )


@pytest.mark.slow
def test_derived_cost_equals_fvcore_on_fifty_random_points(plan: Plan) -> None:
    rng, model = np.random.default_rng(1), plan.model.build()
    for _ in range(50):
        submodel = random_submodel(plan, rng)
        assert cost(plan.anatomy, submodel) == count(
            extract(model, plan.anatomy, submodel), plan.model.input_shape
        )


def test_config_is_the_papers() -> None:
    config: Config = compose([CONFIGS / "scalefl_cifar10.yaml"])
    assert (config.rounds, config.clients.count, config.clients.per_round) == (400, 100, 10)
    assert (config.train.epochs, config.train.batch_size, config.data.held_out) == (5, 16, 5000)
