"""The training step as a CUDA graph: forward, backward, clipping and AdamW recorded once, then replayed.

A replay costs one launch instead of thousands and reads what changes from buffers: the batch, the shares of its pieces
and the learning rate. It computes what `EagerStep` computes, bit for bit: the same kernels on the same numbers.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from dense_lab.corpus import Batch
from dense_lab.model import LanguageModel
from dense_lab.recording import recorded
from dense_lab.training.device import Place, out_of_memory
from dense_lab.training.step import EagerStep, Piece, StepFunction, StepOutput, split

_WARM_UP = 2
"""Eager steps before the recording, in which kernels compile and the optimiser makes its state. They train."""


class GraphNotUsed(UserWarning):
    """The training step runs operation by operation though there is a GPU; the text says why."""


def build_step(
    model: LanguageModel, optimizer: torch.optim.Optimizer, place: Place, micro_size: int, clip: float | None
) -> StepFunction:
    """A graph on a GPU, eager elsewhere."""
    if place.device.type == "cuda":
        return GraphStep(model, optimizer, place, micro_size, clip)
    return EagerStep(model, optimizer, place, micro_size, clip, mode="eager: no GPU")


class GraphStep:
    """A step recorded as a CUDA graph after two eager ones, which count as steps of the run.

    What cannot be recorded runs eagerly from then on, with a GraphNotUsed warning and the reason in `mode`.
    """

    def __init__(
        self, model: LanguageModel, optimizer: torch.optim.Optimizer, place: Place, micro_size: int, clip: float | None
    ) -> None:
        self._eager = EagerStep(model, optimizer, place, micro_size, clip)
        self.mode = "graph"
        self._stream = torch.cuda.Stream(place.device)
        self._steps = 0
        self._recorded: _Recording | None = None

    def __call__(self, batch: Batch, lr: float) -> StepOutput:
        """See `StepFunction`; the results stay valid."""
        self._steps += 1
        if self._recorded is None and self.mode == "graph" and self._steps > _WARM_UP:
            self._record(batch)
        if self._recorded is not None and self._recorded.fits(batch):
            return self._recorded.replay(batch, lr)
        return self._run_eagerly(batch, lr)

    def _run_eagerly(self, batch: Batch, lr: float) -> StepOutput:
        if self._recorded is not None:
            shape = tuple(batch.inputs.shape)
            self._give_up(f"a batch of shape {shape} after those of {tuple(self._recorded.inputs.shape)}")
        # On the stream of the recording, so that what libraries set up for a stream is there.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            output = self._eager(batch, lr)
        torch.cuda.current_stream().wait_stream(self._stream)
        return output

    def _record(self, batch: Batch) -> None:
        try:
            self._recorded = _Recording(self._eager, batch, self._stream)
        except RuntimeError as error:  # What torch and CUDA raise for an operation that cannot be recorded.
            if out_of_memory(error):
                raise
            self._give_up(" ".join(str(error).split())[:200])

    def _give_up(self, reason: str) -> None:
        self.mode, self._recorded = f"eager: {reason}", None
        self._eager.optimizer.zero_grad()
        warnings.warn(
            f"the training step cannot be a CUDA graph and runs eagerly: {reason}", GraphNotUsed, stacklevel=4
        )


class _Recording:
    """One recorded step with its buffers."""

    def __init__(self, step: EagerStep, batch: Batch, stream: torch.cuda.Stream) -> None:
        device, self._size = step.place.device, step.micro_size
        self.inputs, self.targets = (part.to(device, copy=True) for part in batch)
        parts = list(map(Batch, self.inputs.split(self._size), self.targets.split(self._size)))
        self._shares = torch.empty(len(parts), device=device)
        self._lr = torch.zeros((), device=device)
        step.set_rate(self._lr)
        self._graph = torch.cuda.CUDAGraph()
        with recorded(self._graph, stream):
            self._output = step.compute(map(Piece, parts, self._shares.unbind()))

    def fits(self, batch: Batch) -> bool:
        """Whether the batch has the recorded shape."""
        return batch.inputs.shape == self.inputs.shape

    def replay(self, batch: Batch, lr: float) -> StepOutput:
        """Run the step; nothing here waits for the device."""
        shares = torch.tensor([share for _, share in split(batch, self._size)])
        for buffer, value in ((self.inputs, batch.inputs), (self.targets, batch.targets), (self._shares, shares)):
            buffer.copy_(value.pin_memory(), non_blocking=True)
        self._lr.fill_(lr)
        self._graph.replay()
        return StepOutput(*(_kept(result) for result in self._output))


def _kept(result: Tensor) -> Tensor:
    """A copy that the next replay does not overwrite."""
    return result.clone()
