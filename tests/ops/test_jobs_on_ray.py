"""Jobs on a real Ray head, which listens on loopback alone and wants a token."""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.processes import CLUSTER_FL, Command, line_count, wait
from tests.tiny import outcome, run_here, tiny, write_tiny

pytestmark = pytest.mark.slow
RAY = (str(Path(sys.executable).with_name("ray")),)
# It ends because it is stopped, and that alone makes a checkpoint.
ENDLESS = ("rounds=100000", "checkpoint.every=100000", "cluster.pools=1")


class Head:
    """A head whose home is ``folder``; commands find it by their environment."""

    def __init__(self, folder: Path, temporary: str) -> None:
        port, dashboard, client, agent = _free_ports(4)
        self.folder, self.home, self.work = folder, folder / "home", folder / "work"
        self.url = f"http://127.0.0.1:{dashboard}"
        self._token = secrets.token_hex(32)
        self.environment = {
            "HOME": str(self.home),
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "RAY_API_SERVER_ADDRESS": self.url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            # Without it Ray takes this machine's address in the network, and listens on all of them.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        for made in (self.home, self.work):
            made.mkdir()
        write_tiny(self.work)
        words = [
            "start", "--head", "--block", "--num-cpus=2", f"--port={port}", f"--dashboard-port={dashboard}",
            "--dashboard-host=127.0.0.1", f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}", "--min-worker-port=0", "--max-worker-port=0",
            f"--temp-dir={temporary}", "--object-store-memory=100000000",
        ]  # fmt: skip
        self.command = self.call(words, RAY)

    def call(self, words: Sequence[str], program: Sequence[str] = CLUSTER_FL) -> Command:
        return Command(words, self.folder, program, self.work, self.environment)

    def tell(self, *words: str, program: Sequence[str] = CLUSTER_FL) -> tuple[int, str, str]:
        with self.call(words, program) as command:
            return command.wait(), command.out, command.err

    def answers(self) -> bool:
        asked = urllib.request.Request(f"{self.url}/api/jobs/")
        asked.add_header("Authorization", f"Bearer {self._token}")
        try:
            with urllib.request.urlopen(asked, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def state(self, job: str) -> str:
        (found,) = json.loads(self.tell("status", job, "--json")[1])
        return str(found["state"])

    def actors(self) -> list[str]:
        """The processes of drivers and pools."""
        titles = []
        for pid in self.command.tree():
            try:
                titles.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace"))
            except OSError:  # gone meanwhile
                continue
        return [
            title for title in titles if title.startswith("ray::") and ("Driver" in title or "Pool" in title)
        ]


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(server.getsockname()[1]) for server in held]
    for server in held:
        server.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    # Ray's sockets are below it, and their paths may not be long.
    temporary = tempfile.mkdtemp(prefix="cfl")
    try:
        head = Head(tmp_path_factory.mktemp("jobs"), temporary)
        with head.command as command:
            command.await_(head.answers)
            yield head
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def test_submit(head: Head) -> None:
    code, out, err = head.tell("submit", "tiny.yaml", "run.name=one", "cluster.pools=1")
    assert code == 0, out + err
    assert "round 3/3" in out
    run_here(tiny(head.work), head.folder / "one")
    assert outcome(head.home / "runs" / "one") == outcome(head.folder / "one")
    code, out, err = head.tell("submit", "tiny.yaml", "run.name=one", "train.lr=0.2")
    assert code == 2
    assert "of another configuration (train.lr)" in out
    assert "failed, exit code 2" in err


def test_ray_job_submit(head: Head) -> None:
    job = ["job", "submit", "--working-dir", ".", "--", "cluster-fl", "run", "tiny.yaml", "cluster.pools=1"]
    code, out, err = head.tell(*job, "run.name=plain", program=RAY)
    assert code == 0, out + err
    run_here(tiny(head.work), head.folder / "plain")
    assert outcome(head.home / "runs" / "plain") == outcome(head.folder / "plain")
    code, out, _ = head.tell(*job, "rounds=0", program=RAY)
    assert code == 1  # Ray's own command knows no other
    assert "rounds=0: must be at least 1" in out


def test_a_job_that_is_left_alone_then_stopped_then_submitted_again(head: Head) -> None:
    """Ctrl-C off a terminal leaves it running; stop keeps its rounds and no actor; the same command goes on."""
    path, words = head.home / "runs" / "long", ["submit", "tiny.yaml", "run.name=long", *ENDLESS]
    with head.call(words) as command:
        command.await_(lambda: "round 2/" in command.out)
        command.interrupt()
        assert command.wait() == 130
        (told,) = [line for line in command.err.splitlines() if "goes on" in line]
    job = told.split()[1]
    assert f"cluster-fl stop {job} --address {head.url}" in told
    assert head.state(job) == "RUNNING"
    assert head.tell("stop", job) == (0, f"{job}: stopped\n", "")
    first = line_count(path / "rounds.jsonl")
    assert [saved.name for saved in (path / "checkpoints").iterdir()] == [f"round-{first:05d}"]
    wait(lambda: not head.actors())

    with head.call(words) as command:
        command.await_(lambda: f"round {first + 2}/" in command.out)
        (job,) = [
            job["id"] for job in json.loads(head.tell("status", "--json")[1]) if job["state"] == "RUNNING"
        ]
        assert head.tell("stop", job, "--quiet") == (0, "", "")
        assert command.wait() == 130
        assert f"going on with {path}" in command.out
        assert f"from round {first}" in command.out
        assert f"job {job}: stopped, exit code 130" in command.err
    second = line_count(path / "rounds.jsonl")
    assert second >= first + 2
    run_here(tiny(head.work, f"rounds={second}", "checkpoint.every=100000"), head.folder / "long")
    assert _weights(path, second) == _weights(head.folder / "long", second)


def _weights(run: Path, rounds: int) -> str:
    meta = json.loads((run / "checkpoints" / f"round-{rounds:05d}" / "meta.json").read_text())
    return str(meta["weights_sha256"])
