"""What a core promises."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dense_lab.components import Core
from dense_lab.modules import CoreModule
from dense_lab.probing import ROUNDING, leaks, random, relative_difference, seeded, tensors
from dense_lab.testing.component import ComponentTests


class CoreTests(ComponentTests):
    """A core's promises: three equal forms, causality, explicit state, gradients, a cost."""

    tokens: int = 23

    @pytest.fixture
    def core(self, component: Core) -> CoreModule:
        """The built module in fp64."""
        core: CoreModule = seeded(component.build(self.width))
        return core

    @pytest.fixture
    def x(self) -> Tensor:
        """[2, tokens, width]."""
        return random(2, self.tokens, self.width)

    def test_declares_the_streams_it_gives(self, core: CoreModule, x: Tensor) -> None:
        """Names, widths and order; at least one may be densely connected."""
        streams, _ = core.project(x, None)
        assert list(streams) == [stream.name for stream in core.streams]
        for stream in core.streams:
            assert streams[stream.name].shape == (2, self.tokens, stream.width), stream
        assert any(stream.dense for stream in core.streams), "no stream is dense-able"

    @pytest.mark.parametrize("pieces", [[1] * 23, [10, 13], [1, 15, 7]], ids=["token by token", "two", "three"])
    def test_pieces_equal_one_pass(self, core: CoreModule, x: Tensor, pieces: Sequence[int]) -> None:
        """Outputs and the last state agree, whatever the cut."""
        whole, end = core(x)
        state, outputs = None, []
        for piece in x.split(list(pieces), 1):
            y, state = core(piece, state)
            outputs.append(y)
        assert relative_difference(torch.cat(outputs, 1), whole) < ROUNDING
        for got, expected in zip(tensors(state), tensors(end), strict=True):
            assert relative_difference(got, expected) < ROUNDING

    def test_is_causal(self, core: CoreModule, x: Tensor) -> None:
        """Changing tokens after t leaves outputs up to t unchanged."""
        assert leaks(lambda part: core(part(x))[0])["later tokens"] < ROUNDING
        changed = torch.cat([x[:, :12], random(2, self.tokens - 12, self.width, seed=1)], 1)
        assert relative_difference(core(changed)[0], core(x)[0]) > 1e-3, "later outputs ignore their inputs"

    def test_rows_are_independent(self, core: CoreModule, x: Tensor) -> None:
        """A sequence's output does not depend on the others in the batch."""
        assert leaks(lambda part: core(part(x))[0])["other rows of the batch"] < ROUNDING
        assert relative_difference(core(x[:1])[0], core(x)[0][:1]) < ROUNDING

    def test_state_does_not_grow(self, core: CoreModule, x: Tensor) -> None:
        """The state after 5 tokens is as large as after all."""
        sizes = [[t.shape for t in tensors(core(x[:, :n])[1])] for n in (5, self.tokens)]
        assert sizes[0] == sizes[1]

    def test_gradients_are_right(self, core: CoreModule) -> None:
        """Against central differences in fp64, for inputs and every parameter."""
        x = random(1, 5, self.width).requires_grad_()
        names = [name for name, _ in core.named_parameters()]

        def outputs(x: Tensor, *parameters: Tensor) -> Tensor:
            y: Tensor = torch.func.functional_call(core, dict(zip(names, parameters, strict=True)), (x,))[0]
            return y

        inputs = (x, *(p.detach().clone().requires_grad_() for p in core.parameters()))
        torch.autograd.gradcheck(outputs, inputs, fast_mode=True, atol=1e-6)

    def test_gradients_flow_through_the_state(self, core: CoreModule, x: Tensor) -> None:
        """Training on pieces with the state handed on gives the gradient of one pass."""
        x = x.requires_grad_()
        expected = torch.autograd.grad(core(x)[0].square().sum(), x)[0]
        first, state = core(x[:, :9])
        second, _ = core(x[:, 9:], state)
        got = torch.autograd.grad(first.square().sum() + second.square().sum(), x)[0]
        assert relative_difference(got, expected) < 100 * ROUNDING

    def test_states_join_alike_in_every_form(self, component: Core) -> None:
        """At each state site: pieces and single tokens give what one pass gives; causal; every gate gets a gradient."""
        from dense_lab.model import ModelSpec

        for site in component.build(self.width).state_sites:
            dense = {"span": 2, "sites": (site.name,)}
            tree = {"width": self.width, "depth": 3, "core": component.model_dump(), "dense": dense}
            model, ids = seeded(ModelSpec.model_validate(tree).build(7)), torch.arange(2 * 9).view(2, 9) % 7
            assert model.blocks[2].reads == {site.name: (1, 0)}
            logits = model(ids)
            for pieces in ([1] * 9, [4, 5], [3, 1, 5]):
                state, found = None, []
                for piece in ids.split(pieces, 1):
                    out = model.run(piece, state)
                    state = out.state
                    found.append(out.logits)
                assert relative_difference(torch.cat(found, 1), logits) < ROUNDING, (site.name, pieces)
            assert relative_difference(model(torch.cat([ids[:, :5], ids[:, :4]], 1))[:, :5], logits[:, :5]) < ROUNDING
            logits.square().mean().backward()
            assert all(p.grad is not None and bool(p.grad.any()) for p in model.blocks[2].dense.parameters()), site.name

    def test_builds_without_memory(self, component: Core) -> None:
        """`dense-lab show` counts on the meta device."""
        with torch.device("meta"):
            core = component.build(self.width)
            y, state = core(torch.zeros(1, 3, self.width))
        assert y.is_meta
        assert all(t.is_meta for t in tensors(state))

    def test_has_a_cost(self, core: CoreModule) -> None:
        """FLOPs of the recurrence, a positive number."""
        assert core.mixing_flops() > 0
        assert type(core).mixing_flops.__doc__, "mixing_flops: name the source of the formula"

    def test_undecayed_names_parameters(self, core: CoreModule) -> None:
        """Weight decay is kept from parameters that exist."""
        assert core.undecayed() <= {name for name, _ in core.named_parameters()}

    def test_runs_in_single_precision(self, component: Core, x: Tensor) -> None:
        """fp32 in, fp32 out, finite gradients."""
        core = component.build(self.width)
        y, _ = core(x.float())
        assert y.dtype == torch.float32
        y.square().mean().backward()
        for name, parameter in core.named_parameters():
            assert parameter.grad is not None, f"no gradient reaches {name}"
            assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
