"""Another synchronous round policy over a recorded run's draws, without training.

Each round asks the clients that it asked when it was recorded, and each of them takes what it took then, counted from
the round's new beginning. So the clock is known, and who would have counted. What they would have made of the model
is not: from the first round on the weights would have been others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cluster_fl import experiment, simulation
from cluster_fl.compose import compose
from cluster_fl.config import Config
from cluster_fl.errors import UserError
from cluster_fl.records import RunFolder
from cluster_fl.timing import policies, timeline
from cluster_fl.timing.attempts import Attempts
from cluster_fl.timing.policies import NOBODY, Dispatch, Standing, Step, Synchronous
from cluster_fl.timing.schema import ASYNCHRONOUS, PolicyConfig

SECTION = "time.policy"
SYNCHRONOUS = "must be a synchronous one: with it other clients would have started, and from other weights."
UNKNOWN = (
    "A replay cannot tell accuracy or weights, since other updates would have counted and every later one would have "
    "started from another model; nor can it ask clients who were not asked when the run was recorded."
)


@dataclass(frozen=True)
class Replay:
    """A recorded run and how its rounds are to end instead.

    Attributes:
        recorded: the configuration of the run.
        config: the same with the other ``time.policy``.
        steps: the recorded rounds.
        notes: what is assumed, a line each.
    """

    recorded: Config
    config: Config
    steps: list[Step]
    notes: list[str]
    _policy: Synchronous
    _again: Callable[[int], Dispatch] | None

    def replayed(self) -> Iterator[Step]:
        """The rounds under the other policy."""
        time = 0.0
        for step in self.steps:
            anew = None if self._again is None else self._again(step.round)
            made = self._policy.step(Standing(step.round, time), Recorded.of(step, time, anew))
            yield made
            time = made.end


def prepare(folder: RunFolder, overrides: Sequence[str]) -> Replay:
    """Reads a run; writes nothing.

    Raises:
        UserError: an override is not of ``time.policy``, a policy is asynchronous or asks other clients, what clients
            take cannot be computed anew, or the folder has no run or no timeline.
        RunError: the timeline is damaged.
    """
    for override in overrides:
        key, _, value = override.partition("=")
        if key != SECTION and not key.startswith(f"{SECTION}."):
            raise UserError(key, value, f"cannot change: a replay takes {SECTION}.* alone.")
        if key in (SECTION, f"{SECTION}.name") and value in ASYNCHRONOUS:
            raise UserError(key, value, SYNCHRONOUS)
    recorded = folder.config()
    config = compose([folder.config_file], overrides)
    before, after = recorded.time.policy, config.time.policy
    if after.asynchronous and not before.asynchronous:
        raise UserError(f"{SECTION}.name", after.name, SYNCHRONOUS)
    _check(folder.path, before, after)
    policy, notes = _policy(recorded, after)
    again = None
    if _shortens(before) or _shortens(after) or before.switch != after.switch:
        again = _clock(config)
        notes.append("what each client takes is computed anew from the configuration")
    elif config.time.availability.source != "always":
        notes.append("a client pauses or leaves as long after its start as when the run was recorded")
    steps = [step for step, _ in timeline.steps(timeline.read(folder.path))]
    return Replay(recorded, config, steps, notes, policy, again)


def _check(path: Path, before: PolicyConfig, after: PolicyConfig) -> None:
    if before.asynchronous:
        right = f"was run with {before.name}: its rounds have no participants who start together."
        raise UserError("RUN_DIR", path, right)
    same = before.name == "tiers" and (before.tiers, before.tier_shares) == (after.tiers, after.tier_shares)
    if after.name == "tiers" and not same:
        right = "would have asked other clients than those that were recorded."
        raise UserError(f"{SECTION}.name", after.name, right)


def _policy(recorded: Config, after: PolicyConfig) -> tuple[Synchronous, list[str]]:
    """The policy for rounds of as many clients as were asked, and what is assumed."""
    before, per_round = recorded.time.policy, recorded.clients.per_round
    asked = wanted = before.asked(per_round) if before.name == "over_select" else per_round
    notes = []
    if after.name == "over_select":
        # As many as this policy would have asked so many for.
        wanted = next(count for count in range(asked, 0, -1) if after.asked(count) <= asked)
        notes.append(f"of the {asked} clients that a round asked, the first {wanted} count")
    made = policies.make(after, per_round)
    assert isinstance(made, Synchronous)
    return replace(made, count=asked, wanted=wanted), notes


def _shortens(policy: PolicyConfig) -> bool:
    """What a client does depends on the policy, not only whether it counts."""
    return policy.name == "deadline" and policy.late != "drop"


def _clock(config: Config) -> Callable[[int], Dispatch]:
    made = experiment.prepare(config)
    if made.rule.resizes:
        right = f"cannot be replayed: how large submodels of {config.method} are follows from the weights."
        raise UserError(f"{SECTION}.name", config.time.policy.name, right)
    return lambda number: made.clock.dispatch(simulation.view(made, number))


@dataclass(frozen=True)
class Recorded:
    """A :class:`~cluster_fl.timing.policies.Dispatch` of one recorded round.

    Attributes:
        asked: what its clients did.
        start: when they start now.
        anew: says what they take instead; None: what they took.
    """

    asked: Attempts
    start: float
    anew: Dispatch | None

    @staticmethod
    def of(step: Step, now: float, anew: Dispatch | None) -> Recorded:
        """``now``: when the round begins. Its clients start as long after that as they did."""
        asked = step.ended.attempts
        start = float(asked.start[0])
        return Recorded(asked, start if now == step.begin else now + (start - step.begin), anew)

    def draw(
        self,
        round: int,
        turn: int,
        count: int,
        time: float,
        busy: np.ndarray,
        among: np.ndarray | None = None,
    ) -> np.ndarray:
        return self.asked.client if time >= self.start else NOBODY

    def next_available(self, time: float, busy: np.ndarray, among: np.ndarray | None = None) -> float:
        return self.start

    def attempts(self, round: int, clients: np.ndarray, start: float, deadline: float) -> Attempts:
        if self.anew is not None:
            return self.anew.attempts(round, clients, start, deadline)
        later = start - float(self.asked.start[0])  # 0 where nothing has changed: the same bits then
        moved = {name: getattr(self.asked, name) + later for name in timeline.TIMES}
        return replace(self.asked, **moved)

    def tier(self, round: int, shares: Sequence[float]) -> np.ndarray:
        return self.asked.client  # the tier of a recorded round is known by whom it asked
