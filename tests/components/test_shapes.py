"""A fusion that gives a tensor of another shape is named, with what it gave and what was expected."""

from __future__ import annotations

import re
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from dense_lab.components import Fusion
from dense_lab.dense import DenseSpec
from dense_lab.errors import InputError
from dense_lab.model import ModelSpec
from dense_lab.modules import FusionModule, RawFusionModule, RawGate, RawStreams, Selected


class _Module(FusionModule):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, own: Tensor, selected: Selected, norm: nn.RMSNorm | None) -> Tensor:
        return own[:, :1] if self.how == "one token" else own[..., :-1] if self.how == "narrow" else own[:1]


class _RawModule(_Module, RawFusionModule):
    def fuse_raw(self, raw: RawStreams, gate: RawGate, norm: nn.RMSNorm | None) -> tuple[Tensor, Tensor]:
        return self(raw.own, Selected(raw.sources, (), "none"), norm), raw.own


class Misshapen(Fusion):
    """A fusion that drops some of the stream."""

    kind: Literal["misshapen"] = "misshapen"
    how: str
    takes: Literal["finished", "raw"] = "finished"

    def build(self, x_width: int, width: int, sources: int) -> FusionModule:
        """The module."""
        return (_RawModule if self.takes == "raw" else _Module)(self.how)


@pytest.mark.parametrize("takes", ["finished", "raw"])
@pytest.mark.parametrize(("how", "got"), [("narrow", [2, 5, 15]), ("one token", [2, 1, 16]), ("one row", [1, 5, 16])])
def test_a_fused_stream_of_another_shape_is_refused(how: str, got: list[int], takes: str) -> None:
    fusion = Misshapen.model_construct(kind="misshapen", how=how, takes=takes)
    spec = ModelSpec(width=16, depth=2, core="retnet", dense={"sites": ("v",)})  # type: ignore[arg-type]
    dense = DenseSpec.model_construct(**{**dict(spec.dense), "fusion": fusion})
    model = spec.model_copy(update={"dense": dense}).build(7)
    width = model.blocks[1].dense["v"].width
    shown, own = [n if n < 15 else width - 16 + n for n in got], [2, 5, width]
    said = rf"fusion 'misshapen' \(defined at .*test_shapes\.py:\d+\) .* shape {re.escape(str(shown))} of stream v"
    with pytest.raises(InputError, match=rf"{said}, expected {re.escape(str(own))}"):
        model(torch.zeros(2, 5, dtype=torch.long))
