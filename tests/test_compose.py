"""Composition: what wins over what, and one line for every kind of mistake."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster_fl.compose import compose, fingerprint, to_yaml
from cluster_fl.config import Config
from cluster_fl.errors import UserError
from cluster_fl.methods.scalefl import Options
from tests.conftest import CONFIGS


def file(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(folder: Path, text: str = "", *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        compose([file(folder, text)], overrides)
    assert "\n" not in str(caught.value)
    return caught.value


def test_nothing_set_is_the_schema(tmp_path: Path) -> None:
    composed = compose([file(tmp_path, "")])
    assert composed == Config(options=Options())


def test_later_wins_over_earlier(tmp_path: Path) -> None:
    preset = "variant: released\n"  # kd_gate 0.25 instead of the schema's 0
    first = file(tmp_path, preset + "train: {lr: 0.5, epochs: 7}\noptions: {kd_weight: 0.5}\n", "1.yaml")
    second = file(tmp_path, "train: {lr: 0.25}\noptions: {kd_gate: 0.75}\n", "2.yaml")
    assert compose([file(tmp_path, "")]).options.kd_gate == 0
    assert compose([first]).options.kd_gate == 0.25
    both = compose([first, second])
    assert (both.train.lr, both.train.epochs) == (0.25, 7)
    assert (both.options.kd_gate, both.options.kd_weight, both.options.kd_detach) == (0.75, 0.5, False)
    swapped = compose([second, first])
    assert (swapped.train.lr, swapped.options.kd_gate) == (0.5, 0.75)
    overridden = compose([first, second], ["train.lr=1", "options.kd_gate=0.125", "train.lr=2"])
    assert (overridden.train.lr, overridden.options.kd_gate) == (2.0, 0.125)
    assert compose([first], ["variant=default"]).options.kd_gate == 0


def test_an_override_changes_its_own_key_only(tmp_path: Path) -> None:
    before = compose([file(tmp_path, "train: {lr: 0.5}\n")])
    after = compose([file(tmp_path, "train: {lr: 0.5}\n")], ["train.epochs=9"])
    assert after.train.epochs == 9
    after.train.epochs = before.train.epochs
    assert after == before


def test_lists_are_replaced_and_null_unsets(tmp_path: Path) -> None:
    text = "levels: {ratios: [0.5, 1.0]}\ntrain: {milestones: [1, 2, 3], clip_norm: 5}\n"
    config = compose([file(tmp_path, text)], ["train.milestones=[4]", "levels.ratios=null", "seed=3"])
    assert (config.train.milestones, config.levels.ratios) == ([4], None)
    assert (config.train.clip_norm, config.seed) == (5.0, 3)


def test_a_value_may_hold_an_equals_sign(tmp_path: Path) -> None:
    assert compose([file(tmp_path, "")], ["run.name=a=b"]).run.name == "a=b"


def test_the_options_are_the_methods_own(tmp_path: Path) -> None:
    options = compose([file(tmp_path, "options: {kd_weight: 1}\n")]).options
    assert type(options) is Options
    assert options.kd_weight == 1.0
    assert isinstance(options.kd_weight, float)


@pytest.mark.parametrize(
    ("override", "key", "near"),
    [
        ("train.epoch=2", "train.epoch", "train.epochs"),
        ("round=2", "round", "rounds"),
        ("trian.lr=1", "trian", "train"),
        ("data.partition.alfa=1", "data.partition.alfa", "data.partition.alpha"),
        ("options.kd_wieght=1", "options.kd_wieght", "options.kd_weight"),
        ("levels.grid.width_stp=0.1", "levels.grid.width_stp", "levels.grid.width_step"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, override: str, key: str, near: str) -> None:
    error = refused(tmp_path, "", override)
    assert error.key == key
    assert f"Did you mean {near}?" in str(error)


def test_an_unknown_key_like_no_other_lists_what_is_valid(tmp_path: Path) -> None:
    error = refused(tmp_path, "aggregation: {zzzzzz: 1}\n")
    assert error.key == "aggregation.zzzzzz"
    assert "Valid: weights." in str(error)


def test_an_unknown_key_of_a_file_is_as_clear(tmp_path: Path) -> None:
    error = refused(tmp_path, "train: {epoch: 2}\n")
    assert (error.key, error.value) == ("train.epoch", 2)
    assert "train.epochs" in str(error)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("rounds=abc", "rounds", "abc"),
        ("rounds=1.5", "rounds", 1.5),
        ("rounds=[1]", "rounds", [1]),
        ("seed=null", "seed", None),
        ("train.lr=fast", "train.lr", "fast"),
        ("levels.shares=0.5", "levels.shares", 0.5),
        ("data.download=perhaps", "data.download", "perhaps"),
        ("options.kd_detach=2.5", "options.kd_detach", 2.5),
        ("train=3", "train", 3),
        ("train.lr.x=3", "train.lr", {"x": 3}),
        ("levels.shares=[0.5,big]", "levels.shares", [0.5, "big"]),
    ],
)
def test_a_wrong_type_names_key_and_value(tmp_path: Path, override: str, key: str, value: object) -> None:
    error = refused(tmp_path, "", override)
    assert error.key.startswith(key)
    assert str(value) in str(error) or error.key != key  # a list's item may be named by itself


@pytest.mark.parametrize(
    ("override", "key", "right"),
    [
        ("rounds=0", "rounds", "at least 1"),
        ("seed=-1", "seed", "at least 0"),
        ("train.momentum=1.5", "train.momentum", "at most 1"),
        ("data.partition.alpha=0", "data.partition.alpha", "above 0"),
        ("levels.grid.width_step=2", "levels.grid.width_step", "at most 1"),
        ("options.kd_temperature=0", "options.kd_temperature", "above 0"),
        ("options.kd_gate=2", "options.kd_gate", "at most 1"),
        ("train.schedule=cosin", "train.schedule", "Did you mean cosine?"),
        ("method=scalfl", "method", "Did you mean scalefl?"),
        ("variant=papr", "variant", "Did you mean paper?"),
        ("data.name=cifar", "data.name", "cifar10"),
        ("levels.tie_break=[ratio,widr]", "levels.tie_break", "Did you mean wider?"),
        ("levels.pairs=[{width: 2, depth: 1}]", "levels.pairs[0].width", "at most 1"),
        ("clients.per_round=101", "clients.per_round", "only 100 clients"),
        ("evaluate.clients=101", "evaluate.clients", "only 100 clients"),
        ("cluster.pools=many", "cluster.pools", "auto"),
        ("cluster.pools=0", "cluster.pools", "at least 1"),
        ("cluster.gpus_per_pool=1.5", "cluster.gpus_per_pool", "whole number"),
        ("levels.ratios=[0.5,0.25,1]", "levels.ratios", "rise"),
        ("levels.ratios=[0.5]", "levels.ratios", "exactly 1"),
        ("levels.ratios=[]", "levels.ratios", "rise"),
        ("levels.shares=[0.5,0.5]", "levels.shares", "4 shares"),
        ("levels.shares=[0.5,0.5,0.5,-0.5]", "levels.shares", "sum to 1"),
        ("levels.budgets=[1,1]", "levels.budgets", "one value per client"),
        ("levels.pairs=[]", "levels.pairs", "at least one"),
        ("levels.draw=windows", "levels.draw", "Did you mean window?"),
        ("levels.order=fallen", "levels.order", "Did you mean falling?"),
        ("train.correction.name=scafold", "train.correction.name", "Did you mean scaffold?"),
        ("train.correction.name=scaffold", "train.momentum", "plain SGD"),
        ("train.correction.alpha=0", "train.correction.alpha", "above 0"),
        ("server.optimizer=adm", "server.optimizer", "Did you mean adam?"),
        ("server.tau=0", "server.tau", "above 0"),
        ("time.load.shares=[0,1]", "time.load.shares", "below 1"),
        ("time.load.shares=[]", "time.load.shares", "below 1"),
        ("time.load.shares=[0,-0.5]", "time.load.shares", "at least 0"),
    ],
)
def test_out_of_range_says_what_is_right(tmp_path: Path, override: str, key: str, right: str) -> None:
    error = refused(tmp_path, "", override)
    assert error.key == key
    assert right in str(error)


@pytest.mark.parametrize(
    ("override", "key"),
    [("server.optimizer=adam", "server.optimizer"), ("aggregation.weights=samples", "aggregation.weights")],
)
def test_feddyn_has_a_server_of_its_own(tmp_path: Path, override: str, key: str) -> None:
    error = refused(tmp_path, "train: {correction: {name: feddyn}}\n", override)
    assert error.key == key
    assert "train.correction.name=feddyn" in str(error)


def test_a_methods_preset_is_below_the_users_settings(tmp_path: Path) -> None:
    scaffold = compose([file(tmp_path, "method: scaffold\n")])
    assert (scaffold.train.correction.name, scaffold.train.momentum) == ("scaffold", 0.0)
    free = compose(
        [file(tmp_path, "method: scaffold\n")], ["train.correction.name=none", "train.momentum=0.5"]
    )
    assert (free.train.correction.name, free.train.momentum) == ("none", 0.5)
    assert refused(tmp_path, "method: scaffold\n", "train.momentum=0.5").key == "train.momentum"


def test_a_budget_for_each_client_is_checked(tmp_path: Path) -> None:
    three = "clients: {count: 3, per_round: 1}\nlevels: {count: 2}\n"
    assert refused(tmp_path, three, "levels.budgets=[0.5,0.5,0.75]").key == "levels.budgets"
    both = refused(tmp_path, three, "levels.budgets=[0.5,0.5,1]", "levels.ratios=[0.5,1]")
    assert "excludes" in str(both)
    assert compose([file(tmp_path, three)], ["levels.budgets=[0.5,0.5,1]"]).levels.budgets == [0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    "key", ["train.lr", "levels.tolerance", "time.devices.latency_s", "options.kd_weight"]
)
def test_not_a_number_is_in_no_range(tmp_path: Path, key: str) -> None:
    assert refused(tmp_path, "", f"{key}=.nan").key == key


@pytest.mark.parametrize("word", ["rounds", "=3", "", "train.lr"])
def test_an_override_without_key_or_equals_sign(tmp_path: Path, word: str) -> None:
    error = refused(tmp_path, "", word)
    assert error.value == word
    assert "key=value" in str(error)


def test_an_override_without_value(tmp_path: Path) -> None:
    error = refused(tmp_path, "", "rounds=")
    assert error.key == "rounds"
    assert "needs a value" in str(error)


@pytest.mark.parametrize(
    "word", ["train.milestones=[1,2", "run.name=}", "train..lr=1", "levels.shares={a: b: c}"]
)
def test_an_override_that_is_no_yaml(tmp_path: Path, word: str) -> None:
    error = refused(tmp_path, "", word)
    assert word.partition("=")[0].rstrip(".").startswith(error.key.partition(".")[0])


@pytest.mark.parametrize("name", ["nosuch.yaml", "."])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be read") as caught:
        compose([tmp_path / name])
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("rounds: 3\ntrain: {lr: [1\n", "is not valid YAML (line"),
        ("a: b: c\n", "is not valid YAML (line 1)"),
        ("- rounds\n", "must hold keys and values"),
        ("rounds\n", "must hold keys and values"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, right: str) -> None:
    error = refused(tmp_path, text)
    assert right in str(error)
    assert "a.yaml" in str(error)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00rounds")
    with pytest.raises(UserError, match="is not valid YAML"):
        compose([tmp_path / "a.yaml"])


def test_a_key_that_is_no_name(tmp_path: Path) -> None:
    assert "1" in refused(tmp_path, "1: 2\n").key


def test_an_unknown_interpolation(tmp_path: Path) -> None:
    assert "nope" in str(refused(tmp_path, "run: {name: '${nope}'}\n"))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    refused(tmp_path, f"rounds: !!python/object/apply:pathlib.Path.touch [{victim}]\n")
    assert not victim.exists()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_composes_and_survives_a_round_trip(tmp_path: Path, path: Path) -> None:
    config = compose([path])
    again = compose([file(tmp_path, to_yaml(config))])
    assert again == config
    assert fingerprint(again) == fingerprint(config)


@pytest.mark.parametrize("variant", ["default", "paper", "released"])
def test_a_written_configuration_is_complete(tmp_path: Path, variant: str) -> None:
    """What is written back names every key, so no later change of a default can change the run."""
    text = "levels: {pairs: [{width: 0.5, depth: 2}, {width: 1, depth: 3}]}\nmodel: {options: {widths: [4, 8]}}\n"
    config = compose(
        [file(tmp_path, text)], [f"variant={variant}", "run.name='a b: c'", "options.kd_gate=0.5"]
    )
    written = to_yaml(config)
    assert compose([file(tmp_path, written, "b.yaml")]) == config
    assert {key for key, _, _ in leaves(config)} == set(keys(yaml.safe_load(written)))


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(key, owner, attribute) of every value of a configuration."""
    for spec in fields(node):
        value = getattr(node, spec.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{spec.name}.")
        else:
            yield prefix + spec.name, node, spec.name


def keys(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict) and f"{prefix}{key}" != "model.options":
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_the_fingerprint_ignores_where_and_how_fast_and_nothing_else(tmp_path: Path) -> None:
    config = compose([file(tmp_path, "")])
    ignored = set()
    for key, _, _ in leaves(config):
        changed = copy.deepcopy(config)
        owner, name = next((owner, name) for k, owner, name in leaves(changed) if k == key)
        setattr(owner, name, "something else")
        if fingerprint(changed) == fingerprint(config):
            ignored.add(key)
    elsewhere = ("cluster.", "checkpoint.", "tracking.", "run.")
    incidental = {k for k, _, _ in leaves(config) if k.startswith(elsewhere)}
    assert ignored == incidental | {"data.root", "data.download"}
    assert len(incidental) == 16


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/a", "a\\b", "a\0b", "a\nb", "\x1b[2J"])
def test_no_run_name_leaves_the_run_root_or_plays_tricks(tmp_path: Path, name: str) -> None:
    entry = {"run": {"name": name}}
    with pytest.raises(UserError, match="must be a plain folder name") as caught:
        compose([file(tmp_path, "")], entry=entry)
    assert caught.value.key == "run.name"


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("time.policy=fedbuff", "time.policy.name=fedbuff"),
        ("data.partition=shards", "data.partition.name=shards"),
    ],
)
def test_a_word_for_a_section_is_its_name(tmp_path: Path, short: str, long: str) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("")
    assert compose([file], [short]) == compose([file], [long])
    key, _, word = short.partition("=")
    file.write_text(f"{key.replace('.', ': {')}: {word}{'}' * key.count('.')}\n")
    assert compose([file]) == compose([], [long])


def named(policy: str, *more: str) -> tuple[str, ...]:
    return (f"time.policy.name={policy}", *more)


@pytest.mark.parametrize(
    ("overrides", "key", "right"),
    [
        # Of 100 clients 10 take part in a round.
        (named("fedbuff", "time.policy.concurrency=101"), "time.policy.concurrency", "only 100 clients"),
        (named("fedasync", "time.policy.concurrency=101"), "time.policy.concurrency", "only 100 clients"),
        (
            named("semi_sync", "time.policy.period_s=1", "time.policy.concurrency=101"),
            "time.policy.concurrency",
            "only 100 clients",
        ),
        (named("fedbuff", "time.policy.buffer=101"), "time.policy.buffer", "only 100 clients"),
        (
            named("over_select", "time.policy.factor=10.1"),
            "time.policy.factor",
            "asks for 101 clients a round of 100",
        ),
        (named("over_select", "time.policy.factor=1e308"), "time.policy.factor", "clients a round of 100"),
        (named("tiers", "time.policy.tiers=11"), "clients.per_round", "a tier has only 9 clients"),
        (named("tiers", "time.policy.tiers=101"), "clients.per_round", "a tier has only 0 clients"),
        (
            named("tiers", "time.policy.tier_shares=[0.5,0.5]"),
            "time.policy.tier_shares",
            "5 shares that sum to 1",
        ),
        (named("tiers", "time.policy.tier_shares=[]"), "time.policy.tier_shares", "5 shares that sum to 1"),
        (
            named("tiers", "time.policy.tiers=2", "time.policy.tier_shares=[1.5,-0.5]"),
            "time.policy.tier_shares",
            "2 shares that sum to 1",
        ),
        (
            named("tiers", "time.policy.tiers=2", "time.policy.tier_shares=[0.5,0.4]"),
            "time.policy.tier_shares",
            "2 shares that sum to 1",
        ),
        (named("deadline"), "time.policy.deadline_s", "must be given for deadline"),
        (named("semi_sync"), "time.policy.period_s", "must be given for semi_sync"),
    ],
)
def test_a_policy_that_cannot_work(tmp_path: Path, overrides: tuple[str, ...], key: str, right: str) -> None:
    error = refused(tmp_path, "", *overrides)
    assert error.key == key
    assert right in str(error)


@pytest.mark.parametrize(
    "overrides",
    [
        named("fedbuff", "time.policy.concurrency=100", "time.policy.buffer=100"),
        named("over_select", "time.policy.factor=10"),
        named("over_select", "time.policy.factor=1"),
        named("tiers", "time.policy.tiers=10"),
        named("tiers", "time.policy.tiers=3", "time.policy.tier_shares=[0.3333333,0.3333333,0.3333334]"),
        named("deadline", "time.policy.deadline_s=.inf"),
        named("fedasync", "time.policy.max_staleness=0", "time.policy.mixing=1", "time.policy.hinge=0"),
        # Another policy's options do not matter.
        named("wait", "time.policy.concurrency=101", "time.policy.buffer=101", "time.policy.factor=99"),
    ],
)
def test_a_policy_at_its_limits(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = compose([file(tmp_path, "")], overrides)
    assert compose([file(tmp_path, to_yaml(config))]) == config


@pytest.mark.parametrize(
    ("override", "right"),
    [
        ("time.policy.name=fedbuf", "Did you mean fedbuff?"),
        ("time.policy.name=sync", "must be one of wait, deadline"),
        ("time.policy.late=smaler", "Did you mean smaller?"),
        ("time.policy.staleness=polynom", "Did you mean polynomial?"),
        ("time.stragglers.name=log_normal", "Did you mean lognormal?"),
        ("time.availability.source=phone", "Did you mean phones?"),
        ("time.availability.away=loose", "Did you mean lose?"),
        ("time.devices.source=level", "Did you mean levels?"),
        ("time.devices.source=csv", "must name the file"),
        ("time.devices.source=fedscale", "must name the file"),
        ("time.availability.source=csv", "must name the file"),
        ("time.policy.deadline_s=0", "above 0"),
        ("time.policy.deadline_s=-.inf", "finite"),
        ("time.policy.deadline_s=.nan", "finite"),
        ("time.policy.timeout_s=0", "above 0"),
        ("time.policy.timeout_s=.inf", "finite"),
        ("time.policy.period_s=-1", "above 0"),
        ("time.policy.min_share=1.1", "at most 1"),
        ("time.policy.min_share=-0.1", "at least 0"),
        ("time.policy.factor=0.9", "at least 1"),
        ("time.policy.factor=.inf", "finite"),
        ("time.policy.tiers=0", "at least 1"),
        ("time.policy.buffer=0", "at least 1"),
        ("time.policy.buffer=-3", "at least 1"),
        ("time.policy.concurrency=0", "at least 1"),
        ("time.policy.max_staleness=-1", "at least 0"),
        ("time.policy.exponent=0", "above 0"),
        ("time.policy.hinge=-1", "at least 0"),
        ("time.policy.mixing=0", "above 0"),
        ("time.policy.mixing=1.5", "at most 1"),
        ("time.dropout=-0.1", "at least 0"),
        ("time.dropout=1.1", "at most 1"),
        ("time.dropout=.nan", "finite"),
        ("time.stragglers.rate=0", "above 0"),
        ("time.stragglers.sigma=-1", "at least 0"),
        ("time.stragglers.shape=0", "above 0"),
        ("time.stragglers.slow_share=2", "at most 1"),
        ("time.stragglers.slow_factor=0.5", "at least 1"),
        ("time.load.stay=1.1", "at most 1"),
        ("time.load.shares=[.nan]", "finite"),
        ("time.availability.on_s=0", "at least 1"),
        ("time.availability.off_s=-1", "at least 0"),
        ("time.devices.utilisation=0", "above 0"),
        ("time.devices.utilisation=1.5", "at most 1"),
        ("time.devices.latency_s=-1", "at least 0"),
        ("time.devices.gflops=[1,.nan]", "finite"),
        ("time.devices.memory_mb=[.inf]", "finite"),
    ],
)
def test_a_value_of_the_clock_that_cannot_be(tmp_path: Path, override: str, right: str) -> None:
    key = override.partition("=")[0]
    error = refused(tmp_path, "", override)
    assert error.key in (key, f"{key.rpartition('.')[0]}.file")
    assert right in str(error)


def test_a_policy_that_has_no_such_option(tmp_path: Path) -> None:
    error = refused(tmp_path, "", "time.policy.deadline=600")
    assert error.key == "time.policy.deadline"
    assert "Did you mean time.policy.deadline_s?" in str(error)
