"""Where a run computes, in which precision, and how much memory it took."""

from __future__ import annotations

import contextlib
import platform
import re
from pathlib import Path
from typing import NamedTuple

import torch

from dense_lab.corpus import Batch
from dense_lab.errors import InputError, MachineError


class Place(NamedTuple):
    """A device and the precision of the forward and backward pass on it."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """The context of every forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def send(self, batch: Batch) -> Batch:
        """The batch on the device; the copy to a GPU does not wait for it."""
        if self.device.type != "cuda":
            return batch
        return Batch(*(part.pin_memory().to(self.device, non_blocking=True) for part in batch))

    def describe(self) -> str:
        """`cpu (2 threads)`, or the GPU's name."""
        if self.device.type == "cuda":
            return f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        return f"{self.device} ({torch.get_num_threads()} threads)"


def choose_place(device: str, precision: str) -> Place:
    """`auto` is the GPU if there is one. Raises InputError for an unknown device, MachineError for one that is not here
    or cannot do the precision asked for."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"no device named {device!r}: use auto, cpu, cuda or cuda:0, cuda:1, ...")
    place = torch.device(name)
    if place.type == "cuda":
        if (place.index or 0) >= torch.cuda.device_count():
            raise MachineError(
                f"device {device!r} was asked for, but torch sees {torch.cuda.device_count()} GPUs: use `--device cpu`"
            )
        place = torch.device("cuda", place.index if place.index is not None else torch.cuda.current_device())
        torch.cuda.set_device(place)  # Events, streams and random states are those of the current device.
    elif precision == "bf16":
        raise MachineError("train.precision bf16 needs a GPU: use auto or fp32 on a CPU")
    low = precision == "bf16" or (precision == "auto" and place.type == "cuda")
    return Place(place, torch.bfloat16 if low else torch.float32)


def use_threads(threads: int | None) -> None:
    """Let torch use so many CPU threads; None leaves what OMP_NUM_THREADS or the machine say."""
    if threads is not None:
        torch.set_num_threads(threads)


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement of the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif platform.system() == "Linux":
        with contextlib.suppress(OSError):  # Some containers forbid it; the peak is then that of the whole process.
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use at once: what torch allocated on a GPU; on a CPU all that the process holds."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if platform.system() == "Linux":
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if peak:
            return int(peak[1]) * 1024
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if platform.system() == "Darwin" else used * 1024


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out; torch on a CPU has no class for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
