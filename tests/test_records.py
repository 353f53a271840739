"""What a run leaves on disk: whole or not at all, newest first, and never trusted without its checksum."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster_fl import records
from cluster_fl.config import Config
from cluster_fl.errors import RunError, UserError
from cluster_fl.records import Progress, RunFolder, weights_sha256
from cluster_fl.rounds import Start
from cluster_fl.timing.attempts import Attempts
from tests.tiny import tiny

STATE = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array([-0.0, 1.5], dtype=np.float32)}


def progress(rounds: int, clients: dict[int, int] | None = None) -> Progress:
    state = {name: array + np.float32(rounds) for name, array in STATE.items()}
    memory = {"second/a": np.array([rounds / 3]), "control/b": state["b"]}
    return Progress(
        rounds,
        state,
        memory,
        clients or {},
        sim_time_s=1.5 * rounds,
        wall_time_s=2.5 * rounds,
        bytes_down=3 * rounds,
        bytes_up=4 * rounds,
    )


def same(one: Progress | None, other: Progress) -> bool:
    return one is not None and comparable(one) == comparable(other)


def comparable(progress: Progress) -> dict[str, Any]:
    """With arrays by their bits."""
    arrays = {kind: bits(getattr(progress, kind)) for kind in ("state", "memory")}
    starts = {version: (bits(start.state), bits(start.memory)) for version, start in progress.starts.items()}
    return {**vars(progress), **arrays, "flight": bits(progress.flight.columns()), "starts": starts}


def bits(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny(tmp_path)


@pytest.fixture
def folder(tmp_path: Path, config: Config) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.create(config)
    return made


def content(path: Path) -> list[str]:
    """Every file below a folder."""
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def checkpoints(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in (folder.path / "checkpoints").iterdir())


def test_hash_is_of_all_bytes_in_name_order() -> None:
    digest = hashlib.sha256(STATE["a"].tobytes() + STATE["b"].tobytes())
    assert weights_sha256(STATE) == digest.hexdigest()
    assert weights_sha256(dict(sorted(STATE.items()))) == digest.hexdigest()


def test_hash_reads_elements_in_c_order() -> None:
    assert weights_sha256(STATE | {"b": np.asfortranarray(STATE["b"])}) == weights_sha256(STATE)
    assert weights_sha256(STATE | {"b": STATE["b"][:, ::-1][:, ::-1]}) == weights_sha256(STATE)


def test_hash_sees_a_single_bit() -> None:
    assert weights_sha256(STATE | {"a": np.array([0.0, 1.5], dtype=np.float32)}) != weights_sha256(STATE)


def test_a_checkpoint_comes_back_bit_for_bit(folder: RunFolder, config: Config) -> None:
    folder.save(config, progress(1))
    assert same(folder.load(config), progress(1))


def test_a_transposed_view_comes_back_as_it_was(folder: RunFolder, config: Config) -> None:
    state = {"w": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    folder.save(config, Progress(1, state))
    assert same(folder.load(config), Progress(1, {"w": np.ascontiguousarray(state["w"])}))


def test_without_a_checkpoint_there_is_nothing_to_load(folder: RunFolder, config: Config) -> None:
    assert folder.load(config) is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(folder: RunFolder, config: Config, keep: int) -> None:
    config.checkpoint.keep = keep
    for rounds in (1, 2, 9, 10, 11):
        folder.save(config, progress(rounds))
        assert same(folder.load(config), progress(rounds))
    assert checkpoints(folder) == ["round-00009", "round-00010", "round-00011"][-keep:]


def test_the_newest_is_the_one_of_the_most_rounds(folder: RunFolder, config: Config) -> None:
    """Also where the number has outgrown its five digits."""
    config.checkpoint.keep = 2
    for rounds in (99_998, 99_999, 100_000):
        folder.save(config, progress(rounds))
    assert same(folder.load(config), progress(100_000))
    assert checkpoints(folder) == ["round-100000", "round-99999"]


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("broken", ["os.replace", "save_file", "write_text"])
def test_an_interrupted_save_leaves_the_one_before(
    folder: RunFolder, config: Config, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    folder.save(config, progress(1))
    with monkeypatch.context() as patch:
        target: Any = os if broken == "os.replace" else records
        patch.setattr(target, broken.rpartition(".")[2], interrupted)
        with pytest.raises(KeyboardInterrupt):
            folder.save(config, progress(2))
    assert same(folder.load(config), progress(1))
    folder.save(config, progress(2))
    assert same(folder.load(config), progress(2))


def test_drafts_of_dead_processes_do_not_pile_up(
    folder: RunFolder, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is as large as the model; a run killed now and then must not fill the disk."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 2**22 + 1)  # above what Linux gives to any process
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            folder.save(config, progress(1))
    folder.save(config, progress(1))
    folder.save(config, progress(2))
    assert checkpoints(folder) == ["round-00001", "round-00002"]


def test_an_interrupted_file_leaves_the_one_before(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_summary({"rounds": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            folder.write_summary({"rounds": 2})
    assert folder.summary() == {"rounds": 1}


def test_a_checkpoint_that_exists_is_not_written_again(folder: RunFolder, config: Config) -> None:
    folder.save(config, progress(1))
    before = {p: p.stat().st_mtime_ns for p in folder.path.rglob("*")}
    folder.save(config, progress(1))
    assert {p: p.stat().st_mtime_ns for p in folder.path.rglob("*")} == before


def cut(content: bytes) -> bytes:
    return content[:-1]


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [cut, flipped, lambda _: b""], ids=["cut", "flipped", "empty"])
@pytest.mark.parametrize("name", ["state", "memory"])
def test_damaged_weights(
    folder: RunFolder, config: Config, name: str, damage: Callable[[bytes], bytes]
) -> None:
    folder.save(config, progress(1))
    file = folder.path / "checkpoints" / "round-00001" / f"{name}.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(RunError, match=r"round-00001.*remove it to go on from the one before"):
        folder.load(config)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"rounds": 1}', '{"fingerprint": "F", "weights_sha256": "W", "more": 1}'],
)
def test_damaged_meta(folder: RunFolder, config: Config, text: str) -> None:
    folder.save(config, progress(1))
    file = folder.path / "checkpoints" / "round-00001" / "meta.json"
    meta = json.loads(file.read_text())
    file.write_text(text.replace("F", meta["fingerprint"]).replace("W", meta["weights_sha256"]))
    with pytest.raises(RunError, match=r"round-00001.*damaged"):
        folder.load(config)


@pytest.mark.parametrize("name", ["state.safetensors", "memory.safetensors", "meta.json"])
def test_a_missing_file(folder: RunFolder, config: Config, name: str) -> None:
    folder.save(config, progress(1))
    (folder.path / "checkpoints" / "round-00001" / name).unlink()
    with pytest.raises(RunError, match=r"round-00001.*remove it to go on from the one before"):
        folder.load(config)


def test_a_server_without_memory_writes_none(folder: RunFolder, config: Config) -> None:
    folder.save(config, Progress(1, STATE))
    assert content(folder.path / "checkpoints") == ["round-00001/meta.json", "round-00001/state.safetensors"]
    assert same(folder.load(config), Progress(1, STATE))


def test_the_one_before_is_good_once_a_damaged_one_is_removed(folder: RunFolder, config: Config) -> None:
    folder.save(config, progress(1))
    folder.save(config, progress(2))
    newest = folder.path / "checkpoints" / "round-00002"
    (newest / "state.safetensors").write_bytes(b"")
    with pytest.raises(RunError):
        folder.load(config)
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert same(folder.load(config), progress(1))


def test_another_configuration_is_refused(tmp_path: Path, folder: RunFolder, config: Config) -> None:
    folder.save(config, progress(1))
    with pytest.raises(UserError, match="another configuration"):
        folder.load(tiny(tmp_path, "train.lr=0.05"))
    elsewhere = tiny(tmp_path, "cluster.pools=2", "checkpoint.every=3", "run.root=elsewhere")
    assert same(folder.load(elsewhere), progress(1))


def test_create_writes_the_configuration_once(folder: RunFolder, config: Config) -> None:
    assert folder.config() == config
    assert [path.name for path in folder.path.iterdir()] == ["config.yaml"]
    with pytest.raises(UserError, match="resume"):
        folder.create(config)


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        RunFolder(tmp_path / "nothing").config()


def test_a_root_that_cannot_be_written(tmp_path: Path, config: Config) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^run\.root="):
        RunFolder(tmp_path / "file" / "run").create(config)


@settings(max_examples=60, deadline=None)
@given(
    rounds=st.integers(0, 6),
    keep=st.integers(0, 8),
    cut=st.integers(0, 32),
    nulls=st.integers(0, 3),
)
def test_rewind_cuts_back_whatever_the_last_line_is(
    tmp_path_factory: pytest.TempPathFactory, rounds: int, keep: int, cut: int, nulls: int
) -> None:
    """A crash leaves the beginning of a line; a power failure may leave zeros behind it."""
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    written: list[dict[str, Any]] = [{"round": number, "x": [0.1, "ä"]} for number in range(rounds)]
    for record in written:
        folder.append_round(record)
    with folder.rounds_file.open("ab") as file:
        file.write(json.dumps({"round": rounds, "x": [0.1, "ä"]})[:cut].encode() + b"\0" * nulls)
    folder.rewind(keep)
    assert list(folder.rounds()) == written[:keep]
    folder.append_round({"round": keep})
    assert list(folder.rounds()) == [*written[:keep], {"round": keep}]


def test_rewind_without_records(folder: RunFolder) -> None:
    folder.rewind(0)
    assert list(folder.rounds()) == []


def test_rewind_is_whole_or_not_at_all(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        folder.append_round({"round": number})
    before = folder.rounds_file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            folder.rewind(1)
    assert folder.rounds_file.read_bytes() == before


# What clients keep.


def kept(client: int, round: int) -> dict[str, np.ndarray]:
    return {"own": np.full((2, 3), 100 * client + round, np.float32), "count": np.array([round])}


def keep(folder: RunFolder, clients: dict[int, int]) -> None:
    for client, round in clients.items():
        folder.clients.save(client, round, kept(client, round))


@pytest.fixture
def everything_kept(folder: RunFolder, config: Config) -> dict[int, int]:
    """Three clients over three rounds; the second round is in no checkpoint that is left."""
    config.checkpoint.keep = 2
    newest: dict[int, int] = {}
    for round, clients in enumerate([(0, 1), (1, 2), (1,)]):
        keep(folder, dict.fromkeys(clients, round))
        newest |= dict.fromkeys(clients, round)
        if round != 1:
            folder.save(config, progress(round + 1, dict(newest)))
    return newest


def test_what_a_client_keeps_comes_back_bit_for_bit(folder: RunFolder) -> None:
    keep(folder, {7: 3})
    found = folder.clients.load(7, 3)
    assert {n: (a.dtype, a.tolist()) for n, a in found.items()} == {
        n: (a.dtype, a.tolist()) for n, a in kept(7, 3).items()
    }
    assert content(folder.path / "clients") == ["000007/round-00003.safetensors"]


def test_keeping_again_replaces(folder: RunFolder) -> None:
    """A round that is done once more after a crash."""
    keep(folder, {7: 3})
    folder.clients.save(7, 3, {"own": np.zeros(1, np.float32)})
    assert list(folder.clients.load(7, 3)) == ["own"]


@pytest.mark.parametrize("damage", [cut, lambda _: b"", None], ids=["cut", "empty", "missing"])
def test_a_lost_client_state_is_an_error(folder: RunFolder, damage: Callable[[bytes], bytes] | None) -> None:
    keep(folder, {7: 3})
    (file,) = (folder.path / "clients").glob("*/*")
    if damage:
        file.write_bytes(damage(file.read_bytes()))
    else:
        file.unlink()
    with pytest.raises(RunError, match=r"round-00003\.safetensors is missing or damaged"):
        folder.clients.load(7, 3)


def test_an_interrupted_keeping_leaves_the_one_before(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(folder, {7: 3})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            folder.clients.save(7, 3, {"own": np.zeros(1, np.float32)})
    assert sorted(folder.clients.load(7, 3)) == ["count", "own"]


def test_a_checkpoint_knows_in_which_round_each_client_kept(
    folder: RunFolder, config: Config, everything_kept: dict[int, int]
) -> None:
    """Client numbers, not their names in JSON."""
    found = folder.load(config)
    assert found is not None
    assert found.clients == everything_kept == {0: 0, 1: 2, 2: 1}


def test_exactly_what_no_checkpoint_names_is_removed(
    folder: RunFolder, config: Config, everything_kept: dict[int, int]
) -> None:
    """Client 1 kept in rounds 0, 1 and 2; no checkpoint stands for the second."""
    assert content(folder.path / "clients") == [
        "000000/round-00000.safetensors",
        "000001/round-00000.safetensors",
        "000001/round-00002.safetensors",
        "000002/round-00001.safetensors",
    ]
    (folder.path / "clients" / "000002" / ".round-00001.safetensors.99").write_bytes(b"a dead process's")
    keep(folder, {0: 3})
    folder.save(config, progress(4, everything_kept | {0: 3}))
    assert content(folder.path / "clients") == [
        "000000/round-00000.safetensors",
        "000000/round-00003.safetensors",
        "000001/round-00002.safetensors",
        "000002/round-00001.safetensors",
    ]


def test_the_hash_of_client_states(folder: RunFolder) -> None:
    """Of every client's newest, in client order; the round in which it was kept is no part of it."""
    keep(folder, {1: 0, 11: 0, 2: 0})
    each = [weights_sha256(kept(client, 0)) for client in (1, 2, 11)]
    expected = hashlib.sha256("".join(each).encode()).hexdigest()
    assert folder.clients.sha256({11: 0, 2: 0, 1: 0}) == expected
    folder.clients.save(2, 5, kept(2, 0))
    assert folder.clients.sha256({1: 0, 2: 5, 11: 0}) == expected
    folder.clients.save(2, 5, kept(2, 5))
    assert folder.clients.sha256({1: 0, 2: 5, 11: 0}) != expected
    assert folder.clients.sha256({}) is None


# Clients at work, and the weights that they started from.


def at_work(*versions: int) -> Attempts:
    """A client for each version: lost never or before it is done, and times that have no end in binary."""
    count = len(versions)
    whole = np.arange(count, dtype=np.int64)
    times = {
        name: (whole + 1) / 3 + at for at, name in enumerate(("start", "downloaded", "computed", "finish"))
    }
    lost = np.where(whole % 2, np.inf, 0.1)
    numbers = {"client": 7 * whole, "level": whole + 1, "epochs": whole, "first": whole + 2}
    sizes = {"down": whole + 2**40, "up": whole}
    return Attempts(version=np.array(versions, dtype=np.int64), lost=lost, **numbers, **times, **sizes)


def in_flight(rounds: int, *versions: int) -> Progress:
    starts = {
        version: Start(
            {name: array - np.float32(version) for name, array in STATE.items()},
            {"control/b": STATE["b"] * np.float32(version), "angles/count": np.array([version / 7])},
        )
        for version in set(versions)
    }
    return replace(progress(rounds), flight=at_work(*versions), starts=starts)


@pytest.mark.parametrize("versions", [(3,), (0, 4, 4), (4, 2, 0), (99_999, 100_000, 3)])
def test_clients_at_work_come_back_bit_for_bit(
    folder: RunFolder, config: Config, versions: tuple[int, ...]
) -> None:
    """In the order in which they were, and with what each version started from."""
    folder.save(config, in_flight(5, *versions))
    found = folder.load(config)
    assert same(found, in_flight(5, *versions))
    assert found is not None
    assert found.flight.version.tolist() == list(versions)
    assert found.standing.flight is found.flight
    assert (found.standing.round, found.standing.time) == (5, 7.5)
    names = {f"start-{version:05d}.safetensors" for version in versions}
    kept = {Path(name).name for name in content(folder.path / "checkpoints")}
    assert kept == names | {"state.safetensors", "memory.safetensors", "flight.safetensors", "meta.json"}


@settings(max_examples=30, deadline=None)
@given(
    moments=st.lists(st.floats(min_value=0, allow_nan=False), min_size=1, max_size=5),
    client=st.integers(0, 2**62),
)
def test_any_moments_survive(
    tmp_path_factory: pytest.TempPathFactory, moments: list[float], client: int
) -> None:
    """Also the infinite, and the smallest above zero."""
    path = tmp_path_factory.mktemp("moments")
    folder, config = RunFolder(path / "run"), tiny(path)
    flight = replace(
        at_work(*range(len(moments))), lost=np.array(moments), client=np.full(len(moments), client)
    )
    folder.save(config, replace(in_flight(1, *range(len(moments))), flight=flight))
    found = folder.load(config)
    assert found is not None
    assert bits(found.flight.columns()) == bits(flight.columns())


def test_a_start_without_memory(folder: RunFolder, config: Config) -> None:
    kept = replace(in_flight(5, 4), starts={4: Start(STATE, {})})
    folder.save(config, kept)
    assert same(folder.load(config), kept)


def test_keys_of_weights_and_memory_do_not_mix(folder: RunFolder, config: Config) -> None:
    """Whatever they are called."""
    odd = {"memory/b": STATE["b"], "state/a": STATE["a"], "level.2/memory/a": STATE["a"], "b": STATE["b"]}
    kept = replace(in_flight(5, 4), starts={4: Start(odd, dict(reversed(odd.items())))})
    folder.save(config, kept)
    assert same(folder.load(config), kept)


def test_each_checkpoint_has_its_own_starts(folder: RunFolder, config: Config) -> None:
    """So that a damaged one can be removed."""
    config.checkpoint.keep = 2
    folder.save(config, in_flight(5, 3, 4))
    folder.save(config, in_flight(6, 4, 5))
    (folder.path / "checkpoints/round-00006/start-00005.safetensors").unlink()
    with pytest.raises(RunError, match=r"round-00006.*remove it to go on from the one before"):
        folder.load(config)
    shutil.rmtree(folder.path / "checkpoints/round-00006")
    assert same(folder.load(config), in_flight(5, 3, 4))


DAMAGES = {"cut": cut, "flipped": flipped, "empty": lambda _: b"", "missing": None}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["flight", "start-00002", "start-00004"])
def test_damaged_clients_at_work(
    folder: RunFolder, config: Config, name: str, damage: Callable[[bytes], bytes] | None
) -> None:
    folder.save(config, in_flight(5, 2, 4))
    file = folder.path / "checkpoints" / "round-00005" / f"{name}.safetensors"
    if damage:
        file.write_bytes(damage(file.read_bytes()))
    else:
        file.unlink()
    with pytest.raises(RunError, match=r"round-00005.*remove it to go on from the one before") as caught:
        folder.load(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"starts_sha256": {}},
        {"starts_sha256": []},
        {"starts_sha256": {"two": "x"}},
        {"starts_sha256": {"2": "x", "4": "y"}},
        {"starts_sha256": {"3": "x"}},
        {"flight_sha256": None},
        {"flight_sha256": ""},
    ],
)
def test_a_damaged_list_of_starts(folder: RunFolder, config: Config, change: dict[str, Any]) -> None:
    folder.save(config, in_flight(5, 2, 4))
    file = folder.path / "checkpoints" / "round-00005" / "meta.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(RunError, match=r"round-00005.*remove it to go on from the one before"):
        folder.load(config)


def test_another_checkpoints_clients_at_work(folder: RunFolder, config: Config) -> None:
    """Files that are whole and do not belong here."""
    config.checkpoint.keep = 2
    folder.save(config, in_flight(5, 2, 4))
    folder.save(config, in_flight(6, 4, 2))
    first, second = (folder.path / f"checkpoints/round-0000{rounds}" for rounds in (5, 6))
    (second / "flight.safetensors").write_bytes((first / "flight.safetensors").read_bytes())
    with pytest.raises(RunError, match="checksum"):
        folder.load(config)


def test_columns_that_are_no_attempts(folder: RunFolder, config: Config) -> None:
    kept = in_flight(5, 2)
    folder.save(config, kept)
    file = folder.path / "checkpoints" / "round-00005" / "flight.safetensors"
    records.save_arrays(file, kept.flight.columns() | {"more": kept.flight.start})
    with pytest.raises(RunError, match=r"round-00005.*damaged"):
        folder.load(config)
