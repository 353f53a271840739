"""Jobs on a Ray cluster: Ray's job client, with its errors as one line each and a log that survives a lost connection."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster_fl.errors import RunError, UserError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# Ray's client lets these overrule the address that it is given.
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
# Ray kills a stopped job after 3 seconds if nobody asks for more; a checkpoint may take longer.
STOP_WAIT_S = 60
# Bytes of a working directory that a dashboard takes.
MOST_BYTES = int(DASHBOARD_CLIENT_MAX_SIZE)
POLL_S = 0.5


@dataclass(frozen=True)
class Job:
    """A job as its cluster knows it. Times are seconds since 1970, None while there is none."""

    id: str
    state: str
    command: str
    began: float | None
    ended: float | None
    exit_code: int | None
    message: str

    @property
    def is_over(self) -> bool:
        """Whether it has succeeded, failed or been stopped."""
        return self.state in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)

    @property
    def code(self) -> int:
        """What a command that waited for it ends with: the exit code of its own command, as a shell tells it.

        Raises:
            RunError: Ray never got as far as its command, or lost it.
        """
        if self.state == JobStatus.STOPPED:
            return 130
        if self.exit_code is None:
            first = next(iter(self.message.strip().splitlines()), "no reason is known")
            raise RunError(f"job {self.id} failed: {first}")
        return self.exit_code if self.exit_code >= 0 else 128 - self.exit_code


class Jobs:
    """The jobs of one cluster.

    Args:
        address: the dashboard's URL; what RAY_API_SERVER_ADDRESS says, or Ray's default, if None.

    Raises:
        UserError: the address is no URL, or the cluster wants another token.
        RunError: nothing answers.
    """

    def __init__(self, address: str | None) -> None:
        self.address = (address or os.environ.get(ADDRESS_VARIABLES[0]) or DEFAULT_ADDRESS).rstrip("/")
        if not self.address.startswith(("http://", "https://")):
            right = f"must be the URL of a cluster's dashboard, e.g. {DEFAULT_ADDRESS}."
            raise UserError("--address", self.address, right)
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.ERROR)  # what Ray's client does is none of the user's business
        with self._explaining(), _without(ADDRESS_VARIABLES):
            self._client = JobSubmissionClient(self.address)

    def submit(self, name: str, command: str, folder: Path, environment: Mapping[str, str]) -> None:
        """Sends ``folder`` and has ``command`` run in it, on the head node, as the job ``name``."""
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **environment}
        runtime = {"working_dir": str(folder), "env_vars": variables}
        with self._explaining():
            self._client.submit_job(submission_id=name, entrypoint=command, runtime_env=runtime)

    def all(self) -> list[Job]:
        """Every job that was submitted, the earliest first."""
        with self._explaining():
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.began or 0)

    def named(self, names: Sequence[str]) -> list[Job]:
        """These jobs. Raises UserError for a name that is no job's."""
        known = {job.id: job for job in self.all()}
        for name in names:
            if name not in known:
                right = (
                    f"is no job of {self.address}; `cluster-fl status --address {self.address}` lists them."
                )
                raise UserError("JOB", name, right)
        return [known[name] for name in names]

    def get(self, name: str) -> Job:
        """A job of which it is known that it is there."""
        with self._explaining():
            return _job(self._client.get_job_info(name))

    def stop(self, name: str) -> None:
        """Asks Ray to stop a job; :meth:`wait` says when it has."""
        with self._explaining():
            self._client.stop_job(name)

    def wait(self, name: str) -> Job:
        """The job, as soon as it is over."""
        while not (job := self.get(name)).is_over:
            time.sleep(POLL_S)
        return job

    def tail(self, name: str) -> Any:
        """Ray's own asynchronous iterator over the log, from its beginning to the end of the job."""
        return self._client.tail_job_logs(name)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError:
            right = (
                "wants a token: set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN "
                "or ~/.ray/auth_token."
            )
            raise UserError("--address", self.address, right) from None
        except OSError:  # requests' exceptions are some, too
            raise RunError(f"no Ray dashboard answers at {self.address}.") from None
        except RuntimeError as error:
            # What went wrong on the other side comes as a traceback.
            told = str(error).strip().splitlines() or [type(error).__name__]
            raise RunError(f"{self.address} refused: {told[-1]}") from None


class Log:
    """A job's log while it grows; each part of it goes to ``tell`` once."""

    def __init__(self, jobs: Jobs, name: str, tell: Callable[[str], None]) -> None:
        self._jobs, self._name, self._tell = jobs, name, tell
        self._told = 0  # characters

    def follow(self) -> Job:
        """Tells what is new until the job is over. A second call goes on where the first was interrupted."""
        while True:
            with suppress(RuntimeError, aiohttp.ClientError):  # a lost connection is no lost job
                asyncio.run(self._follow())
            job = self._jobs.get(self._name)
            if job.is_over:
                return job
            time.sleep(POLL_S)

    async def _follow(self) -> None:
        at = 0
        async for part in self._jobs.tail(self._name):
            new = part[max(self._told - at, 0) :]
            at += len(part)
            if new:
                self._tell(new)
                self._told = at


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id,
        state=JobStatus(details.status).value,
        command=details.entrypoint,
        began=_seconds(details.start_time),
        ended=_seconds(details.end_time),
        exit_code=details.driver_exit_code,
        message=details.message or "",
    )


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """The environment without these variables for the length of a ``with``."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
