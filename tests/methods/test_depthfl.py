"""DepthFL: its objective against numpy, what clients keep, and the answer of all exits together."""

from __future__ import annotations

import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cluster_fl.compose import compose
from cluster_fl.evaluation import Evaluate, accuracy
from cluster_fl.experiment import make_plan, prepare
from cluster_fl.methods.depthfl import mean_logits
from cluster_fl.nesting.extraction import load
from cluster_fl.records import RunFolder
from cluster_fl.training.objectives import MutualDistillation
from tests.tiny import outcome, run_here, tiny, worker_of

DEPTHFL = ("method=depthfl", "levels.pairs=[{depth: 1}, {depth: 2}, {}]", "model.norm_groups=4")
LABELS = np.array([0, 2, 1, 2])


def logits(exits: int) -> np.ndarray:
    """(exits, 4, 3)."""
    return np.random.default_rng(exits).normal(scale=2, size=(exits, 4, 3))


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def by_hand(z: np.ndarray, weight: float) -> tuple[float, np.ndarray]:
    """Loss and gradient of sum CE_i + weight/(M-1) sum KL(p_j || p_i), p_j held fixed in the KL terms."""
    p, samples, exits = softmax(z), z.shape[1], len(z)
    loss = -np.log(p[:, range(samples), LABELS]).sum() / samples
    gradient = (p - np.eye(3)[LABELS]) / samples
    for i, j in permutations(range(exits), 2):
        loss += weight / (exits - 1) * (p[j] * np.log(p[j] / p[i])).sum() / samples
        gradient[i] += weight / (exits - 1) * (p[i] - p[j]) / samples
    return float(loss), gradient


@pytest.mark.parametrize("exits", [2, 3])
@pytest.mark.parametrize(
    ("progress", "weight"), [(0.0, math.exp(-5)), (0.15, math.exp(-1.25)), (0.3, 1.0), (0.7, 1.0)]
)
def test_objective_equals_the_computation_by_hand(exits: int, progress: float, weight: float) -> None:
    given = [torch.tensor(z, requires_grad=True) for z in logits(exits)]
    objective = MutualDistillation(ramp=0.3)
    loss = objective(given, torch.from_numpy(LABELS), progress)
    loss.backward()
    expected, gradient = by_hand(logits(exits), weight)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    for own, reference in zip(given, gradient, strict=True):
        assert own.grad is not None
        np.testing.assert_allclose(own.grad.numpy(), reference, rtol=1e-10, atol=1e-14)


def test_the_ramp_is_the_released_codes(tmp_path: Path) -> None:
    """lambda of round t, from 0, of 1000: exp(-5 (1 - min(t, 300) / 300)^2)."""
    objective = prepare(tiny(tmp_path, *DEPTHFL, "rounds=1000")).program.objective  # type: ignore[attr-defined]
    for t in (0, 1, 150, 299, 300, 999):
        assert objective.weight(t / 1000) == pytest.approx(math.exp(-5 * (1 - min(t, 300) / 300) ** 2))
    assert objective.weight(0.3) == 1.0
    assert MutualDistillation(ramp=0.0).weight(0.0) == 1.0


def test_one_exit_is_cross_entropy_bit_for_bit() -> None:
    own, labels = torch.tensor(logits(1)[0], dtype=torch.float32), torch.from_numpy(LABELS)
    assert torch.equal(MutualDistillation(ramp=0.3)([own], labels, 0.5), F.cross_entropy(own, labels))


def test_without_distillation_it_is_the_sum_of_cross_entropies() -> None:
    given = [torch.tensor(z) for z in logits(3)]
    loss = MutualDistillation(ramp=0.3, distil=False)(given, torch.from_numpy(LABELS), 0.9)
    assert loss.item() == pytest.approx(by_hand(logits(3), 0.0)[0], rel=1e-12)


def test_the_preset_is_the_publications(tmp_path: Path) -> None:
    made = prepare(tiny(tmp_path, *DEPTHFL))
    config, plan = made.config, made.plan
    assert (config.train.correction.name, config.train.correction.alpha) == ("feddyn", 0.1)
    assert (config.model.norm, config.model.exit_head, config.aggregation.weights) == (
        "group",
        "sepconv",
        "uniform",
    )
    assert [level.submodel.exits for level in plan.levels] == [(1,), (1, 2), (1, 2, 3)]
    assert not any(key.startswith("level.") for key in made.initial_state())


def test_published_stages_of_resnet18() -> None:
    four = "levels.pairs=[{depth: 2}, {depth: 4}, {depth: 6}, {}]"
    given = ("method=depthfl", "model.name=resnet18", "model.options={stem: cifar}", four, "clients.count=10")
    plan = make_plan(compose([], given), ((3, 32, 32), 100))
    assert [level.submodel.exits for level in plan.levels] == [(2,), (2, 4), (2, 4, 6), (2, 4, 6, 8)]


def test_participants_keep_their_variates(tmp_path: Path) -> None:
    config = tiny(tmp_path, *DEPTHFL, "rounds=2", "clients.per_round=3")
    run_here(config, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    progress = folder.load(config)
    assert progress is not None
    records = outcome(tmp_path / "run")[0]
    last = {p["client"]: (record["round"], p["level"]) for record in records for p in record["participants"]}
    assert progress.clients == {client: number for client, (number, _) in last.items()}
    plan = prepare(config).plan
    for client, (number, level) in last.items():
        kept = folder.clients.load(client, number)
        assert kept.keys() == plan.holding(level).keys.keys() & plan.anatomy.parameters
        assert any(array.any() for array in kept.values())


def test_the_ensemble_is_right_where_the_mean_of_logits_is(tmp_path: Path) -> None:
    made = prepare(tiny(tmp_path, *DEPTHFL))
    worker = worker_of(made)
    state = made.initial_state()
    rng = np.random.default_rng(0)
    state = {key: array + rng.normal(scale=0.3, size=array.shape).astype("f") for key, array in state.items()}
    counts = [
        Evaluate(level.number, level.submodel, tuple(range(8)), "test", 1.0).run(worker, state)
        for level in made.plan.levels
    ]
    block = accuracy(made.plan, counts)
    for level, found in zip(made.plan.levels, block["levels"], strict=True):
        model = worker.fresh(level.submodel).eval()
        load(model, made.plan.holding(level.number).gather(state))
        together, last = [], []
        for rows in made.population.shares.test:
            inputs, labels = worker.data.batch(rows)
            with torch.no_grad():
                answers = model(inputs)
            right = np.sum([a.double().numpy() for a in answers], axis=0).argmax(axis=1) == labels.numpy()
            together.append(right.mean())
            last.append((answers[-1].argmax(1) == labels).double().mean().item())
        assert found["ensemble"] == pytest.approx(np.mean(together), abs=2e-3)
        assert found["last_exit"] == pytest.approx(np.mean(last), abs=1e-12)
        assert found.keys() == {"last_exit", "exit_mean", "ensemble"}
    assert block["levels"][0]["ensemble"] == block["levels"][0]["last_exit"]
    assert block["global"]["ensemble"] != block["global"]["last_exit"]
    assert block["personal"] is None
    given = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])]
    assert torch.equal(mean_logits(given), torch.tensor([[0.5, 1.5]]))


@pytest.mark.parametrize("ensemble", [True, False])
def test_a_run_of_it_goes_through(tmp_path: Path, ensemble: bool) -> None:
    option = f"options.ensemble={str(ensemble).lower()}"
    run_here(tiny(tmp_path, *DEPTHFL, "rounds=1", option), tmp_path / "run")
    records, summary = outcome(tmp_path / "run")
    assert np.isfinite(records[0]["train_loss"])
    blocks = (summary["accuracy"]["global"], summary["accuracy"]["local"], *summary["accuracy"]["levels"])
    assert all(("ensemble" in block) == ensemble for block in blocks)


def test_one_depth_without_feddyn_is_fedavg(tmp_path: Path) -> None:
    common = ("levels.pairs=[{}]", "model.norm=batch", "rounds=2", "aggregation.weights=uniform")
    depthfl = ("method=depthfl", "train.momentum=0.9", "train.correction.name=none", "options.ensemble=false")
    run_here(tiny(tmp_path, *common, *depthfl), tmp_path / "depthfl")
    run_here(tiny(tmp_path, *common, "method=fedavg"), tmp_path / "fedavg")
    assert outcome(tmp_path / "depthfl") == outcome(tmp_path / "fedavg")
