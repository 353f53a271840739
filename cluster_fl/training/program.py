"""What a client does with its submodel: the local program, and the step loop that most of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from cluster_fl.config import TrainConfig
from cluster_fl.data.batching import batch_sizes
from cluster_fl.models.layered import Layered
from cluster_fl.nesting.plan import Holding, Level, State
from cluster_fl.nesting.submodel import Submodel
from cluster_fl.training.corrections import Correction, Uncorrected
from cluster_fl.training.objectives import Objective
from cluster_fl.training.schedule import learning_rate

if TYPE_CHECKING:
    from cluster_fl.training.worker import Worker


@dataclass(frozen=True)
class Effort:
    """What a client's round costs, in units of the plain one.

    ``compute``: forward and backward passes through the submodel per sample and epoch; ``down`` and ``up``:
    submodels sent each way.
    """

    compute: float = 1.0
    down: float = 1.0
    up: float = 1.0


@dataclass(frozen=True)
class Context:
    """One client's round, seen from its local program.

    Attributes:
        worker: the resident data, the plan and the modules of the pool that it runs in.
        received: what the client downloaded, by tensor name; read-only.
        state: all that the server published, by the state's keys; read-only.
        personal: what the client kept from its last participation; empty at the first.
        generator: the only source of randomness.
        epochs: how many it trains: ``train.epochs``, or fewer where the clock says so.
    """

    worker: Worker
    round: int
    client: int
    level: Level
    submodel: Submodel
    holding: Holding
    received: State
    state: Mapping[str, np.ndarray]
    personal: State
    generator: torch.Generator
    epochs: int

    @property
    def rows(self) -> np.ndarray:
        """The client's training samples."""
        return self.worker.shares.train[self.client]

    @property
    def has_class(self) -> Tensor:
        """Of which classes the client has training samples: bool (classes,)."""
        held = torch.zeros(self.worker.plan.model.classes, dtype=torch.bool, device=self.worker.device)
        return held.index_fill_(0, self.worker.data.labels(self.rows), True)

    @property
    def progress(self) -> float:
        """Share of the rounds that lie behind, in [0, 1)."""
        return self.round / self.worker.config.rounds

    def batches(self, smallest: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, shuffled and augmented: inputs (B, C, H, W) and labels (B,).

        None at all if the client has fewer than ``smallest`` samples.
        """
        sizes = batch_sizes(len(self.rows), self.worker.config.train.batch_size, smallest)
        if sizes:
            inputs, labels = self.worker.data.epoch(self.rows, self.generator)
            yield from zip(inputs.split(sizes), labels.split(sizes), strict=True)


@dataclass(frozen=True)
class Trained:
    """What one client's training left besides its module's weights.

    Attributes:
        loss: mean over the samples seen.
        steps: updates of the weights; 0: the client has nothing to say and is left out of the mean.
        also: trained tensors that are held but not in the module, by name (FjORD's norms of smaller widths).
        coverage: which elements of a tensor the client speaks for, by name: an array that broadcasts to the
            tensor, 1 or 0; every element of a tensor that is not named.
        extra: what it sends besides the update, summed over clients, by tensor name (control variates).
        personal: what it keeps until its next participation; None: as it was.
    """

    loss: float
    steps: int
    also: State = field(default_factory=dict)
    coverage: Mapping[str, np.ndarray] = field(default_factory=dict)
    extra: State = field(default_factory=dict)
    personal: State | None = None


# What answers a batch (B, ...) with the logits (B, classes) of every exit, the last one last.
Answer = Callable[[Tensor], list[Tensor]]

# One answer (B, classes) made of those of all exits.
Ensemble = Callable[[list[Tensor]], Tensor]

# Which elements a client speaks for, given its module after training.
Coverage = Callable[[Context, Layered], Mapping[str, np.ndarray]]


class LocalProgram(ABC):
    """Trains a client's module in place. One object serves all clients; it keeps nothing between them.

    Attributes:
        ensemble: what a model answers with all its exits together; None where only single exits answer.
    """

    ensemble: Ensemble | None = None

    @property
    def keeps_state(self) -> bool:
        """Training reads what the client kept from its last participation."""
        return False

    @property
    def personalises(self) -> bool:
        """Clients have models of their own, which :meth:`personalise` makes."""
        return False

    def effort(self, level: Level) -> Effort:
        return Effort()

    @abstractmethod
    def train(self, model: Layered, context: Context) -> Trained:
        """``model`` holds what the client received, in train mode, and afterwards what it trained."""

    def deploy(self, model: Layered, level: Level) -> None:  # noqa: B027 - most models answer as they are
        """Changes a level's freshly loaded weights into those that answer for the level, in place.

        The module is the pool's own: only its tensors' values may change.
        """

    def personal_level(self, own: int) -> int:
        """The level whose model :meth:`personalise` starts from, for a client of level ``own``."""
        return own

    def personalise(self, model: Layered, context: Context) -> Answer:
        """A client's personal model, in evaluation mode.

        ``model`` is the freshly loaded one of :meth:`personal_level`, in evaluation mode, and the pool's own: only
        its tensors' values may change.
        """
        return model


class Tally:
    """The running loss of one client's training."""

    def __init__(self, device: torch.device) -> None:
        self._total = torch.zeros((), dtype=torch.float64, device=device)
        self._seen = 0
        self.steps = 0

    def add(self, loss: Tensor, samples: int) -> None:
        self._total += loss.detach() * samples
        self._seen += samples
        self.steps += 1

    @property
    def loss(self) -> float:
        return float(self._total) / self._seen if self._seen else 0.0


class Descent:
    """The steps of one client's round, whatever made their gradients: correction, clipping, SGD and the tally.

    Args:
        model: everything that is trained.
    """

    def __init__(
        self, model: nn.Module, train: TrainConfig, rounds: int, correction: Correction, context: Context
    ) -> None:
        self._model, self._clip_norm = model, train.clip_norm
        self._rate = learning_rate(train, context.round, rounds)
        self.optimiser = optimiser(model, train, context.round, rounds)
        self._drift, self.tally = correction.begin(model, context), Tally(context.worker.device)

    def down(self, loss: Tensor, samples: int) -> None:
        """A step down the gradient of a loss."""
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.step(loss, samples)

    def step(self, loss: Tensor, samples: int) -> None:
        """A step along the gradients that are there."""
        self._drift.correct()
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
        self.optimiser.step()
        self.tally.add(loss, samples)

    def end(self, coverage: Mapping[str, np.ndarray]) -> Trained:
        """What the steps came to, for a client that speaks for ``coverage``."""
        ended = self._drift.end(self.tally.steps * self._rate, coverage)
        loss, steps = self.tally.loss, self.tally.steps
        return Trained(loss, steps, coverage=coverage, extra=ended.extra, personal=ended.personal)


def optimiser(model: nn.Module, train: TrainConfig, round: int, rounds: int) -> torch.optim.SGD:
    """SGD over the model's trainable parameters; its momentum buffer starts at zero."""
    return torch.optim.SGD(
        model.parameters(),
        lr=learning_rate(train, round, rounds),
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        fused=True,
    )


def full_coverage(context: Context, model: Layered) -> Mapping[str, np.ndarray]:
    """The client speaks for all that it holds."""
    return {}


@dataclass(frozen=True)
class SGD(LocalProgram):
    """Epochs of SGD on shuffled batches; the momentum buffer starts at zero in each round.

    Attributes:
        smallest_batch: the fewest samples a batch may have (2 where batches are normalised).
        correction: what is added to the gradients against client drift.
        coverage: which elements a client speaks for.
        frozen: parameters of these names (the last part of it) are not trained.
    """

    train_config: TrainConfig
    rounds: int
    objective: Objective
    smallest_batch: int = 1
    correction: Correction = field(default_factory=Uncorrected)
    coverage: Coverage = full_coverage
    frozen: tuple[str, ...] = ()
    ensemble: Ensemble | None = None

    @property
    def keeps_state(self) -> bool:
        return self.correction.keeps_state

    def effort(self, level: Level) -> Effort:
        copies = 1.0 + self.correction.sends
        return Effort(down=copies, up=copies)

    def train(self, model: Layered, context: Context) -> Trained:
        return self.fit(model, model, context)

    def fit(self, model: Layered, answer: Answer, context: Context) -> Trained:
        """Trains ``model``'s parameters by what ``answer``, which reads them, says (through masks, say)."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[2] not in self.frozen)
        objective, descent = self.objective.of(context), self.descent(model, context)
        for _ in range(context.epochs):
            for x, y in context.batches(self.smallest_batch):
                descent.down(objective(answer(x), y, context.progress), len(y))
        return descent.end(self.coverage(context, model))

    def descent(self, model: Layered, context: Context) -> Descent:
        """The steps of a client's round."""
        return Descent(model, self.train_config, self.rounds, self.correction, context)
