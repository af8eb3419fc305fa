"""One optimiser step, and how long steps take."""

from __future__ import annotations

import statistics
import time
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

    def __call__(self, batch: Batch, lr: float) -> StepOutput:
        """Train on `batch`, which is on the CPU, at learning rate `lr`."""
        ...


class EagerStep:
    """A step as torch runs it, operation by operation.

    The batch may be computed in pieces of `micro_size` sequences; each counts by its scored positions, so the
    gradient is that of the mean over the whole batch.
    """

    def __init__(
        self, model: LanguageModel, optimizer: torch.optim.Optimizer, place: Place, micro_size: int, clip: float | None
    ) -> None:
        self.model, self.optimizer, self.place = model, optimizer, place
        self.micro_size, self.clip = micro_size, clip if clip is not None else float("inf")

    def __call__(self, batch: Batch, lr: float) -> StepOutput:
        """See `StepFunction`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        scored = int((batch.targets != IGNORED).sum())
        losses = []
        for piece in map(Batch, batch.inputs.split(self.micro_size), batch.targets.split(self.micro_size)):
            share = int((piece.targets != IGNORED).sum()) / scored
            if share == 0:
                continue
            piece = self.place.send(piece)
            with self.place.autocast():
                loss = self.model.loss(piece.inputs, piece.targets) * share
            loss.backward()
            losses.append(loss.detach())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepOutput(torch.stack(losses).sum(), norm)


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
