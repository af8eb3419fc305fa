"""Checks at the door of an operation: one sentence with what was expected and what was given.

A shape is written as a string of named sizes, "B T H K"; a name met twice must have the same size both times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Arguments:
    """Checks the tensors of one call of `operation` against named sizes, one dtype rule and one device."""

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.sizes: dict[str, int] = {}
        self._first: tuple[str, Tensor] | None = None

    def shape(self, name: str, tensor: Tensor, names: str) -> None:
        """Raise ValueError unless `tensor` is floating, lies beside the others and has the shape `names`."""
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{self.operation}: {name} must be a floating-point tensor, got {kind}")
        self._beside(name, tensor)
        expected, sizes, known_sizes = names.split(), tensor.shape, self.sizes
        fits = len(sizes) == len(expected)
        for letter, size in zip(expected, sizes, strict=False):  # A generator in all() takes twice as long.
            fits = fits and known_sizes.setdefault(letter, size) == size
        if not fits:
            known = ", ".join(f"{letter}={self.sizes[letter]}" for letter in expected if letter in self.sizes)
            raise ValueError(
                f"{self.operation}: {name} must have shape [{', '.join(expected)}] with {known or 'any sizes'}, "
                f"got {list(sizes)}"
            )

    def optional(self, name: str, tensor: Tensor | None, names: str) -> None:
        """As `shape`, when the tensor is given at all."""
        if tensor is not None:
            self.shape(name, tensor, names)

    def divides(self, part: str, whole: str, why: str) -> None:
        """Raise ValueError unless size `part` divides size `whole`."""
        if self.sizes[part] < 1 or self.sizes[whole] % self.sizes[part]:
            raise ValueError(
                f"{self.operation}: {why}: {part} must divide {whole}, got {part}={self.sizes[part]} and "
                f"{whole}={self.sizes[whole]}"
            )

    def positive(self, letters: str) -> None:
        """Raise ValueError unless every named size is at least 1."""
        for letter in letters.split():
            if self.sizes[letter] < 1:
                raise ValueError(f"{self.operation}: {letter} must be at least 1, got {letter}={self.sizes[letter]}")

    def one_of(self, name: str, value: str, known: Sequence[str]) -> None:
        """Raise ValueError unless `value` is one of the `known` names."""
        if value not in known:
            raise ValueError(f"{self.operation}: {name} must be one of {', '.join(known)}, got {value!r}")

    def _beside(self, name: str, tensor: Tensor) -> None:
        """Every tensor on one device; float64 together with nothing else (it would be rounded silently)."""
        first_name, first = self._first = self._first or (name, tensor)
        if tensor.device != first.device:
            raise ValueError(f"{self.operation}: {name} is on {tensor.device} but {first_name} is on {first.device}")
        if (tensor.dtype == torch.float64) != (first.dtype == torch.float64):
            raise ValueError(
                f"{self.operation}: {name} is {tensor.dtype} but {first_name} is {first.dtype}; "
                "float64 does not mix with other types"
            )


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype an operation computes in and keeps its states in: float64 for float64, float32 for all else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
