"""One optimiser step, and how long steps take."""

from __future__ import annotations

import statistics
import struct
import time
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dense_lab.corpus import IGNORED, Batch
from dense_lab.model import LanguageModel
from dense_lab.training.device import Place

_WARM_UP = 10
"""Steps that are not timed, because compilers, caches and clocks settle in them; fewer when there are few in all."""


class StepOutput(NamedTuple):
    """What a step gives; both stay on the device, so that nothing waits for it."""

    loss: Tensor
    """[] nats per scored position, before the update."""
    gradient_norm: Tensor
    """[] L2 norm over all parameters, before clipping."""


class StepFunction(Protocol):
    """Forward, backward and update. The loop asks for no more, so a captured graph may take its place."""

    @property
    def mode(self) -> str:
        """`graph`, or `eager: ` and the reason."""
        ...

    def __call__(self, batch: Batch, lr: float) -> StepOutput:
        """Train on `batch`, which is on the CPU, at learning rate `lr`."""
        ...


class Piece(NamedTuple):
    """A part of a batch that is computed at once."""

    batch: Batch
    share: float | Tensor
    """Of the batch's scored positions: a tensor [] where it may change from step to step."""


class EagerStep:
    """A step as torch runs it, operation by operation.

    The batch may be computed in pieces of `micro_size` sequences; each counts by its scored positions, so the
    gradient is that of the mean over the whole batch.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        place: Place,
        micro_size: int,
        clip: float | None,
        mode: str = "eager: as asked",
    ) -> None:
        self.model, self.optimizer, self.place, self.mode = model, optimizer, place, mode
        self.micro_size, self.clip = micro_size, clip if clip is not None else float("inf")

    def __call__(self, batch: Batch, lr: float) -> StepOutput:
        """See `StepFunction`."""
        # Rounded as a graph's learning rate is, which the GPU reads from a float32.
        self.set_rate(struct.unpack("f", struct.pack("f", lr))[0])
        return self.compute(Piece(self.place.send(part), share) for part, share in split(batch, self.micro_size))

    def set_rate(self, lr: float | Tensor) -> None:
        """Learning rate of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def compute(self, pieces: Iterable[Piece]) -> StepOutput:
        """Forward and backward of every piece (on the device), then clipping and the update."""
        losses = []
        for piece in pieces:
            with self.place.autocast():
                loss = self.model.loss(*piece.batch) * piece.share
            loss.backward()
            losses.append(loss.detach())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepOutput(torch.stack(losses).sum(), norm)


def split(batch: Batch, size: int) -> list[tuple[Batch, float]]:
    """Parts of at most `size` sequences, each with its share of the batch's scored positions."""
    scored = int((batch.targets != IGNORED).sum())
    parts = map(Batch, batch.inputs.split(size), batch.targets.split(size))
    return [(part, int((part.targets != IGNORED).sum()) / scored) for part in parts]


class StepClock:
    """Seconds of every step, without making a GPU wait: events are read when they lie in the past."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.cuda = device.type == "cuda"
        self._laps: list[float] = []
        self._open: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._skip = min(_WARM_UP, steps // 4)
        self.restart()

    def restart(self) -> None:
        """The next lap begins now."""
        self._start = self._now()

    def lap(self) -> None:
        """A step is done; the next one begins."""
        now = self._now()
        if self._skip > 0:
            self._skip -= 1
        elif isinstance(now, float) and isinstance(self._start, float):
            self._laps.append(now - self._start)
        else:
            self._open.append((self._start, now))  # type: ignore[arg-type]
        self._start = now

    def median(self) -> float | None:
        """Median seconds of a step, or None before one was timed; waits for the device."""
        if self._open:
            self._open[-1][1].synchronize()
            self._laps += [start.elapsed_time(end) / 1000 for start, end in self._open]
            self._open.clear()
        return statistics.median(self._laps) if self._laps else None

    def _now(self) -> float | torch.cuda.Event:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
