"""The conformance kit tells a wrong component from a right one, and says what is wrong with it."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from dense_lab.components import Fusion
from dense_lab.modules import FusionModule, Selected
from dense_lab.testing import FusionTests

WRONG = {
    "keeps": "",
    "narrow": r"must be \[2, 5, 48\] for inputs \[2, 5, ...\], got \[2, 5, 47\]",
    "next": "depends on later tokens",
    "previous": "depends on earlier tokens",
    "batch": "depends on other rows of the batch",
    "drops": "source 0 has no part in the output",
    "unnormed": "the weight of the norm it was given has no part",
    "idle": "idle has no part in the output",
}


class _Module(FusionModule):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "idle":
            self.idle = nn.Parameter(torch.ones(48, dtype=torch.float64))

    def forward(self, own: Tensor, selected: Selected, norm: nn.RMSNorm | None) -> Tensor:
        total = sum(selected.gated(), own)
        gated = selected.gated()
        match self.how:
            case "next":
                total = total + nn.functional.pad(gated[0], (0, 0, 0, 1))[:, 1:]
            case "previous":
                total = total + nn.functional.pad(gated[0], (0, 0, 1, 0))[:, :-1]
            case "batch":
                total = total + gated[0].mean(0)
            case "drops":
                total = own + 0 * sum(g.detach() for g in gated)
        fused = total if norm is None or self.how == "unnormed" else norm(total)
        return fused[..., :-1] if self.how == "narrow" else fused


class Odd(Fusion):
    """A fusion that is wrong in a way of its own."""

    kind: Literal["odd"] = "odd"
    how: str = "keeps"

    def build(self, x_width: int, width: int, sources: int) -> FusionModule:
        """The module."""
        return _Module(self.how)


@pytest.mark.parametrize(("how", "said"), WRONG.items())
def test_what_is_wrong_with_a_fusion_is_said(how: str, said: str) -> None:
    def fuses() -> Any:
        return FusionTests().test_fuses(Odd(how=how), 2, "none", "rmsnorm")

    if not said:
        fuses()
        return
    with pytest.raises(AssertionError, match=said):
        fuses()
