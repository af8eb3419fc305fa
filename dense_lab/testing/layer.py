"""What the parts of a dense connection and a feed-forward layer promise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dense_lab.components import FFN, Fusion, Gate, Pattern, Projection, Transition
from dense_lab.modules import Activation, Selected
from dense_lab.probing import ROUNDING, Part, called, random, relative_difference, seeded
from dense_lab.testing.component import ComponentTests


class ProjectionTests(ComponentTests):
    """A projection maps a source to the width asked for, token by token."""

    def test_maps_a_source(self, component: Projection) -> None:
        """Shape, and no mixing of tokens."""
        assert_per_token(called(component, self.width, self.width, 1, 5), self.width)

    def test_changes_the_width_or_says_that_it_cannot(self, component: Projection) -> None:
        """Streams of unlike width connect only through a projection that changes the width."""
        from dense_lab.errors import InputError

        try:
            projection = seeded(component.build(self.width, 2 * self.width))
        except InputError as error:
            assert str(2 * self.width) in str(error), "name the widths in the error"
        else:
            assert projection(random(2, 5, self.width)).shape == (2, 5, 2 * self.width)


class GateTests(ComponentTests):
    """A gate gives none, one, or one per source."""

    @pytest.mark.parametrize("sources", [1, 3])
    def test_gives_gates(self, component: Gate, sources: int) -> None:
        """Number, shape, and no mixing of tokens."""
        gate = seeded(component.build(self.width, 48, sources))
        gates = gate(random(2, 5, self.width))
        assert len(gates) in {0, 1, sources}
        assert gate.activation in {"none", "silu", "sigmoid"}
        for index in range(len(gates)):

            def pick(part: Part, i: int = index) -> Tensor:
                gated: Tensor = gate(part(random(2, 5, self.width)))[i]
                return gated

            assert_per_token(pick, 48)


class TransitionTests(ComponentTests):
    """A transition gives one selected source for each source, at the width asked for."""

    @pytest.mark.parametrize("sources", [1, 3])
    def test_selects(self, component: Transition, sources: int) -> None:
        """Number, shape, causality within the token."""
        assert_per_token(called(component, self.width, 48, sources, 5), 48 * sources)


class FusionTests(ComponentTests):
    """A fusion joins sources with the own stream, whatever the gates."""

    @pytest.mark.parametrize("sources", [1, 3])
    @pytest.mark.parametrize("gates", ["none", "shared", "per source"])
    @pytest.mark.parametrize("norm", ["none", "rmsnorm"])
    def test_fuses(self, component: Fusion, sources: int, gates: str, norm: str) -> None:
        """Shape, no mixing of tokens or rows, a finite gradient for everything it reads and every weight."""
        fusion = seeded(component.build(self.width, 48, sources))
        rms = seeded(torch.nn.RMSNorm(48, eps=1e-6)) if norm == "rmsnorm" else None
        own = random(2, 5, 48, seed=9).requires_grad_()
        values = [random(2, 5, 48, seed=i).requires_grad_() for i in range(sources)]
        drawn = [random(2, 5, 48, seed=20 + i).requires_grad_() for i in range(sources)]
        gate = tuple(drawn[: {"none": 0, "shared": 1, "per source": sources}[gates]])
        activation: Activation = "silu" if gate else "none"

        def fuse(part: Part) -> Tensor:
            fused: Tensor = fusion(
                part(own), Selected(tuple(map(part, values)), tuple(map(part, gate)), activation), rms
            )
            return fused

        assert_per_token(fuse, 48)
        fuse(lambda tensor: tensor).square().sum().backward()
        reads = {"the own stream": own} | {f"source {i}": value for i, value in enumerate(values)}
        reads |= {f"gate {i}": value for i, value in enumerate(gate)} | dict(fusion.named_parameters())
        reads |= {"the weight of the norm it was given": rms.weight} if rms is not None else {}
        for name, tensor in reads.items():
            assert tensor.grad is not None, f"{name} has no part in the output: it gets no gradient"
            assert tensor.grad.isfinite().all(), f"the gradient of {name} is not finite"


class PatternTests(ComponentTests):
    """A pattern names earlier layers only."""

    def test_names_earlier_layers(self, component: Pattern) -> None:
        """Nearest first, none twice; nothing to read for the first layer; nothing at span 0 is ever asked."""
        for layer in range(12):
            for span in (1, 2, 4, 12):
                layers = component.layers(layer, span)
                assert all(0 <= i < layer for i in layers), (layer, span, layers)
                assert list(layers) == sorted(set(layers), reverse=True), (layer, span, layers)
        assert component.layers(11, 2), "no source at all for layer 11 and span 2"


class FFNTests(ComponentTests):
    """A feed-forward layer keeps the width and mixes no tokens."""

    def test_maps_tokens(self, component: FFN) -> None:
        """[B, T, width] -> [B, T, width], or no module at all."""
        assert_per_token(called(component, self.width, self.width, 0, 5), self.width)


def assert_per_token(function: Callable[[Part], Tensor] | None, width: int) -> None:
    """The output of `function(part)`, which cuts all it reads ([2, 5, ...]) by `part`, depends at a token on that token
    of that row alone, and has the width asked for; None is no module at all."""
    if function is None:
        return
    whole = function(lambda tensor: tensor)
    assert whole.shape == (2, 5, width), (
        f"the output must be {[2, 5, width]} for inputs [2, 5, ...], got {[*whole.shape]}"
    )
    cuts: dict[str, Part] = {
        "later tokens": lambda tensor: tensor[:, :2],
        "earlier tokens": lambda tensor: tensor[:, 3:],
        "other rows of the batch": lambda tensor: tensor[1:],
    }
    for others, part in cuts.items():
        far = relative_difference(function(part), part(whole))
        assert far < ROUNDING, f"the output of a token depends on {others}: without them it differs by {far:.2g}"
