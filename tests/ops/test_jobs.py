"""Submitting, watching and stopping jobs, against a job client that only notes what it is asked for."""

from __future__ import annotations

import io
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus

from cluster_fl.compose import compose
from ops import environment, place
from ops.cli import main
from ops.commands import absolute
from tests.tiny import write_tiny

URL = "http://127.0.0.1:1"
SECRET = "nobody-is-to-see-this"


@dataclass
class Details:
    """A job as Ray's client describes it."""

    submission_id: str | None
    status: str
    driver_exit_code: int | None = None
    message: str = ""
    entrypoint: str = "python -m ops.cli run tiny.yaml"
    start_time: int | None = 1_700_000_000_000
    end_time: int | None = 1_700_000_061_000
    runtime_env: dict[str, Any] = field(default_factory=lambda: {"env_vars": {"WANDB_API_KEY": SECRET}})


class Cluster:
    """What a fake job client sees and does; ``Cluster.connect`` stands in for Ray's class."""

    def __init__(self) -> None:
        self.jobs: dict[str, Details] = {}
        self.sent: dict[str, bytes] = {}  # the package's files
        self.submitted: dict[str, Any] = {}
        self.stopped: list[str] = []
        self.addresses: list[tuple[str, str | None]] = []
        self.ends = Details(None, JobStatus.SUCCEEDED, 0)
        # Each is one connection to the log: its parts, and what then breaks it.
        self.logs: list[tuple[list[str], BaseException | None]] = [(["one\n", "two\n"], None)]

    def connect(self, address: str) -> Cluster:
        self.addresses.append((address, os.environ.get("RAY_ADDRESS")))
        return self

    def submit_job(self, *, submission_id: str, entrypoint: str, runtime_env: dict[str, Any]) -> None:
        folder = Path(runtime_env["working_dir"])
        self.sent = {
            str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()
        }
        self.submitted = {"id": submission_id, "command": entrypoint, "variables": runtime_env["env_vars"]}
        self.jobs[submission_id] = Details(submission_id, JobStatus.RUNNING)

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        parts, broken = self.logs.pop(0)
        for part in parts:
            yield part
        if broken is not None:
            raise broken
        ends = self.ends
        self.jobs[name] = Details(name, ends.status, ends.driver_exit_code, ends.message)

    def get_job_info(self, name: str) -> Details:
        return self.jobs[name]

    def list_jobs(self) -> list[Details]:
        return [Details(None, JobStatus.RUNNING), *self.jobs.values()]  # the first is somebody's own driver

    def stop_job(self, name: str) -> None:
        self.stopped.append(name)
        self.jobs[name] = Details(name, JobStatus.STOPPED)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    monkeypatch.setattr("ops.jobs.JobSubmissionClient", cluster.connect)
    for name in (*environment.FORWARDED, "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return cluster


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with tiny.yaml."""
    here = tmp_path / "here"
    here.mkdir()
    write_tiny(here)
    monkeypatch.chdir(here)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    return here


Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], cluster: Cluster, folder: Path) -> Shell:
    def call(*words: str) -> tuple[int, str, str]:
        code = main([*words, "--address", URL])
        return code, *capsys.readouterr()

    return call


def refused(result: tuple[int, str, str], code: int = 2) -> str:
    """The one line of a mistake or a failure."""
    assert (result[0], result[1], result[2].count("\n")) == (code, "", 1), result
    return result[2]


# What is sent.


def test_what_is_submitted(shell: Shell, cluster: Cluster) -> None:
    code, out, err = shell("submit", "tiny.yaml", "rounds=2", "run.name=my run", "tracking.tags=[a,b]")
    name = cluster.submitted["id"]
    assert (code, out) == (0, "one\ntwo\n")
    assert err == f"job {name} at {URL} (1 files, 0.3 kB)\n"
    assert name.startswith("my-run-")
    assert cluster.submitted["command"] == (
        "python -m ops.cli run tiny.yaml rounds=2 'run.name=my run' 'tracking.tags=[a,b]'"
    )
    assert cluster.submitted["variables"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    assert list(cluster.sent) == ["tiny.yaml"]


def test_a_run_without_a_name_is_called_as_its_job(shell: Shell, cluster: Cluster) -> None:
    code, out, err = shell("submit", "tiny.yaml", "--detach", "--quiet")
    name = cluster.submitted["id"]
    assert (code, out, err) == (0, f"{name}\n", "")
    assert name.startswith("tiny-")
    assert cluster.submitted["command"].endswith(f"tiny.yaml run.name={name}")


def test_no_two_jobs_have_one_name(shell: Shell, cluster: Cluster) -> None:
    for _ in range(3):
        shell("submit", "tiny.yaml", "run.name=same", "--detach")
    assert len(cluster.jobs) == 3


def test_the_package_is_an_allow_list(shell: Shell, cluster: Cluster, folder: Path) -> None:
    sent = ["mine.py", "models/__init__.py", "models/net.py", "models/data/table.npz", "models/data/read.py"]
    left = [
        "key.json", ".env", "notes.txt", "other.yaml", "data/cifar.py", "runs/a/config.py", "tests/test_x.py",
        "wandb/x.py", ".venv/lib/x.py", "env/pyvenv.cfg", "env/x.py", "models/__pycache__/net.py", ".git/x.py",
    ]  # fmt: skip
    for path in (*sent, *left):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)
    shell("submit", "tiny.yaml", "--detach")
    assert set(cluster.sent) == {"tiny.yaml", *sent}
    shell("submit", "tiny.yaml", "--detach", "--include", "data", "--include", "notes.txt")
    assert set(cluster.sent) == {"tiny.yaml", *sent, "data/cifar.py", "notes.txt"}


def test_files_from_elsewhere(shell: Shell, cluster: Cluster, folder: Path) -> None:
    for name in ("a", "b"):
        (folder.parent / name).mkdir()
        (folder.parent / name / "more.yaml").write_text(f"seed: {len(cluster.sent)}\n")
    shell("submit", "tiny.yaml", "../a/more.yaml", str(folder.parent / "b" / "more.yaml"), "--detach")
    places = ["tiny.yaml", "submitted/1/more.yaml", "submitted/2/more.yaml"]
    assert set(cluster.sent) == set(places)
    assert f"run {' '.join(places)} run.name=" in cluster.submitted["command"]


def test_the_files_that_a_configuration_names(shell: Shell, cluster: Cluster, folder: Path) -> None:
    (folder / "phones.csv").write_text("")
    named = ["time.availability.source=csv", "time.availability.file=phones.csv"]
    assert shell("submit", "tiny.yaml", *named, "--detach")[0] == 0
    assert set(cluster.sent) == {"tiny.yaml", "phones.csv"}
    line = refused(shell("submit", "tiny.yaml", named[0], "time.availability.file=../phones.csv"))
    assert "time.availability.file=../phones.csv" in line


def test_too_much_to_send(shell: Shell, cluster: Cluster, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("ops.submitting.MOST_BYTES", 3000)
    for name, size in (("big", 2000), ("bigger", 2500), ("small", 1)):
        (folder / f"{name}.py").write_text("#" * size)
    line = refused(shell("submit", "tiny.yaml"))
    assert "would send 4.8 kB, and Ray takes 3.0 kB" in line
    assert "bigger.py (2.5 kB), big.py (2.0 kB)" in line
    assert not cluster.submitted


def test_no_end_of_modules(shell: Shell, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("ops.package.MOST_FILES", 2)
    for number in range(3):
        (folder / f"m{number}.py").write_text("")
    assert "more than 2 modules" in refused(shell("submit", "tiny.yaml"))


# The environment.


def test_secrets_are_not_among_what_ray_shows(shell: Shell, cluster: Cluster, monkeypatch: Any) -> None:
    for name, value in {"WANDB_API_KEY": SECRET, "WANDB_MODE": "offline", "MY_TOKEN": SECRET}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NOT_ASKED_FOR", SECRET)
    _, out, err = shell("submit", "tiny.yaml", "--env", "MY_TOKEN", "--env", "HOME")
    assert "of the environment: WANDB_API_KEY, WANDB_MODE, MY_TOKEN, HOME" in err
    shown = cluster.submitted["variables"]
    assert shown["WANDB_MODE"] == "offline"
    assert shown.keys() == {"RAY_JOB_STOP_WAIT_TIME_S", "WANDB_MODE", "HOME"}
    assert SECRET not in out + err + json.dumps(cluster.submitted)
    handed = json.loads(cluster.sent[str(environment.FILE)])
    assert handed == {
        "job": cluster.submitted["id"],
        "secrets": {"WANDB_API_KEY": SECRET, "MY_TOKEN": SECRET},
    }


def test_a_job_takes_its_secrets_over_and_leaves_none(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MY_TOKEN", "before")
    content = {"MY_TOKEN": SECRET, "PLAIN": "x"}
    assert environment.hand_over(content, "job", folder) == {"PLAIN": "x"}
    environment.take_over()  # not in a job: such a file is none of ours
    assert os.environ["MY_TOKEN"] == "before"
    monkeypatch.setenv(place.JOB_MARK, "{}")
    environment.take_over()
    assert os.environ["MY_TOKEN"] == SECRET
    assert not environment.FILE.exists()
    environment.take_over()


def test_in_a_job_relative_folders_are_below_the_home_folder(folder: Path, monkeypatch: Any) -> None:
    words = ["run.root=mine", f"data.root={folder / 'there'}"]
    config = compose(["tiny.yaml"], words)
    assert absolute(config).run.root == str(folder / "mine")
    monkeypatch.setenv(place.JOB_MARK, "{}")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert absolute(config).run.root == str(folder.parent / "mine")
    assert absolute(config).data.root == str(folder / "there")
    assert main(["run", "tiny.yaml", "rounds=1", "run.name=a", "--debug", "--quiet"]) == 0
    assert (folder.parent / "runs" / "a" / "summary.json").exists()


# Mistakes cost nothing.


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tiny.yaml", "train.lr=-1"], ["train.lr=-1"]),
        (["tiny.yaml", "levels.shares=[1,0]"], ["levels.shares", "3 shares"]),
        (["tiny.yaml", "levels.pairs=[{width: 0.5, depth: 9}]"], ["levels.pairs"]),
        (["nosuch.yaml"], ["nosuch.yaml"]),
        (["tiny.yaml", "--env", "NO_SUCH_VARIABLE"], ["--env=NO_SUCH_VARIABLE", "is set"]),
        (["tiny.yaml", "--include", "nosuch"], ["--include=nosuch"]),
        (["tiny.yaml", "--include", ".."], ["--include=..", "below"]),
    ],
)
def test_a_mistake_is_told_before_anything_is_sent(
    shell: Shell, cluster: Cluster, words: list[str], told: list[str]
) -> None:
    line = refused(shell("submit", *words))
    assert all(part in line for part in told), line
    assert not cluster.addresses


@pytest.mark.parametrize("command", [["submit", "tiny.yaml"], ["status"], ["stop", "x"]])
def test_a_cluster_that_does_not_answer(shell: Shell, command: list[str], monkeypatch: Any) -> None:
    def fail(error: Exception) -> tuple[int, str, str]:
        def connect(_: str) -> None:
            raise error

        monkeypatch.setattr("ops.jobs.JobSubmissionClient", connect)
        return shell(*command)

    assert f"no Ray dashboard answers at {URL}" in refused(fail(ConnectionError("refused")), 1)
    line = refused(fail(AuthenticationError("401")))
    assert f"--address={URL}" in line
    assert "RAY_AUTH_MODE=token" in line
    assert "too old" in refused(fail(RuntimeError("500: Traceback\n  x\nValueError: too old")), 1)


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "auto", "ray://127.0.0.1:10001"])
def test_an_address_that_is_none(cluster: Cluster, capsys: Any, address: str) -> None:
    assert main(["status", "--address", address]) == 2
    assert f"--address={address}" in capsys.readouterr().err


def test_which_cluster(shell: Shell, cluster: Cluster, monkeypatch: Any) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # Ray's own client would go there
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://there:8265/")
    shell("status")
    main(["status"])
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    main(["status"])
    assert cluster.addresses == [(URL, None), ("http://there:8265", None), ("http://127.0.0.1:8265", None)]
    assert os.environ["RAY_ADDRESS"] == "10.0.0.1:6379"


# Following.


@pytest.mark.parametrize(
    ("ends", "code", "told"),
    [
        (Details(None, JobStatus.SUCCEEDED, 0), 0, ""),
        (Details(None, JobStatus.FAILED, 2), 2, "failed, exit code 2"),
        (Details(None, JobStatus.FAILED, 1), 1, "failed, exit code 1"),
        (Details(None, JobStatus.FAILED, -9), 137, "failed, exit code 137"),
        (Details(None, JobStatus.STOPPED), 130, "stopped, exit code 130"),
        (Details(None, JobStatus.FAILED, None, "no room\nTraceback"), 1, "failed: no room\n"),
    ],
)
def test_the_exit_code_is_the_runs(
    shell: Shell, cluster: Cluster, ends: Details, code: int, told: str
) -> None:
    cluster.ends = ends
    result, out, err = shell("submit", "tiny.yaml")
    assert (result, out) == (code, "one\ntwo\n")
    assert told in err
    assert len(err.splitlines()) == 1 + bool(told)


def test_quiet_tells_how_it_failed_and_nothing_else(shell: Shell, cluster: Cluster) -> None:
    assert shell("submit", "tiny.yaml", "--quiet") == (0, "", "")
    cluster.logs = [(["Ray says this\n", "cluster-fl: rounds=0: must be\n"], None)]
    cluster.ends = Details(None, JobStatus.FAILED, 2)
    assert shell("submit", "tiny.yaml", "--quiet") == (2, "", "cluster-fl: rounds=0: must be\n")


def test_a_lost_connection_is_no_lost_job(shell: Shell, cluster: Cluster, monkeypatch: Any) -> None:
    monkeypatch.setattr("ops.jobs.POLL_S", 0)
    lost = RuntimeError("WebSocket connection closed unexpectedly")
    cluster.logs = [(["one\n", "tw"], lost), (["o"], lost), (["one\ntwo\n", "three\n"], None)]
    code, out, _ = shell("submit", "tiny.yaml")
    assert (code, out) == (0, "one\ntwo\nthree\n")


class Terminal(io.StringIO):
    """Somebody who types this; a Ctrl-C where it is None."""

    def __init__(self, typed: str | None) -> None:
        super().__init__(typed)
        self._interrupts = typed is None

    def isatty(self) -> bool:
        return True

    def readline(self, *size: int) -> str:  # type: ignore[override]
        if self._interrupts:
            raise KeyboardInterrupt
        return super().readline(*size)


def interrupted(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, typed: str | None, asks: bool) -> None:
    cluster.logs = [(["one\n"], KeyboardInterrupt()), (["one\n", "checkpoint\n"], None)]
    cluster.ends = Details(None, JobStatus.STOPPED)
    monkeypatch.setattr("sys.stdin", Terminal(typed))
    monkeypatch.setattr("ops.submitting._asks", lambda: asks)


@pytest.mark.parametrize(("typed", "asks"), [("y\n", False), ("\n", True), ("n\n", True), (None, True)])
def test_ctrl_c_leaves_the_job_running(
    shell: Shell, cluster: Cluster, monkeypatch: Any, typed: str | None, asks: bool
) -> None:
    interrupted(cluster, monkeypatch, typed, asks)
    code, out, err = shell("submit", "tiny.yaml")
    name = cluster.submitted["id"]
    assert (code, out, cluster.stopped) == (130, "one\n", [])
    assert ("[y/N]" in err) == asks
    assert f"{name} goes on; `cluster-fl stop {name} --address {URL}` stops it" in err


def test_ctrl_c_and_a_yes_stop_the_job(shell: Shell, cluster: Cluster, monkeypatch: Any) -> None:
    interrupted(cluster, monkeypatch, "y\n", asks=True)
    code, out, err = shell("submit", "tiny.yaml")
    name = cluster.submitted["id"]
    assert (code, out, cluster.stopped) == (130, "one\ncheckpoint\n", [name])
    assert f"stop {name}? [y/N]" in err


# Status and stop.


@pytest.fixture
def several(cluster: Cluster) -> None:
    later = 1_800_000_000_000
    cluster.jobs = {
        "b": Details("b", JobStatus.RUNNING, start_time=later, end_time=None),
        "a": Details("a", JobStatus.FAILED, 2, message=f"the log has {SECRET}"),
    }


@pytest.mark.usefixtures("several")
def test_status(shell: Shell) -> None:
    code, out, err = shell("status")
    rows = [line.split() for line in out.splitlines() if line.split()[:1] in (["a"], ["b"])]
    assert (code, err) == (0, "")
    assert [row[:3] for row in rows] == [["a", "failed", "2"], ["b", "running", rows[1][2]]]
    assert "0:01:01" in rows[0]
    assert SECRET not in out
    _, one, _ = shell("status", "b")
    assert "running" in one
    assert "failed" not in one


@pytest.mark.usefixtures("several")
def test_status_for_machines(shell: Shell) -> None:
    _, out, _ = shell("status", "--json")
    assert [job["id"] for job in json.loads(out)] == ["a", "b"]
    (job,) = json.loads(shell("status", "a", "--json")[1])
    assert (job["state"], job["exit_code"], job["ended"]) == ("FAILED", 2, 1_700_000_061.0)
    assert "message" not in job
    assert SECRET not in out


@pytest.mark.usefixtures("several")
def test_stop(shell: Shell, cluster: Cluster) -> None:
    code, out, err = shell("stop", "a", "b")
    assert (code, err, cluster.stopped) == (0, "", ["b"])
    assert out.splitlines() == ["a: had ended before, failed", "b: stopped"]
    assert shell("stop", "b", "--quiet") == (0, "", "")


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("command", ["status", "stop"])
def test_a_job_that_nobody_knows(shell: Shell, cluster: Cluster, command: str) -> None:
    line = refused(shell(command, "b", "c"))
    assert "JOB=c" in line
    assert f"cluster-fl status --address {URL}" in line
    assert cluster.stopped == []
