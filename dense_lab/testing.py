"""The conformance kit: one test class per slot. Inherit, give the `component` fixture, and pytest says what is wrong.

    class TestMyCore(CoreTests):
        @pytest.fixture
        def component(self):
            return MyCore(heads=2)

Built-in components pass the same tests. All run on a CPU in fp64; tolerances are a few hundred roundings of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from dense_lab.components import FFN, Component, Core, Data, Fusion, Gate, Pattern, Projection, Tokenizer, Transition
from dense_lab.modules import Activation, CoreModule, Selected
from dense_lab.probing import ROUNDING, Part, called, leaks, random, relative_difference, seeded, tensors

__all__ = ["ROUNDING", "leaks", "random", "relative_difference", "seeded", "tensors"]

WIDTH = 32
"""Width of the layer in these tests; override the class attribute `width` for a component that needs another."""


class ComponentTests:
    """What every component promises as a spec."""

    width: int = WIDTH

    @pytest.fixture
    def component(self) -> Component:
        """The component under test: override."""
        raise pytest.UsageError(f"{type(self).__name__} must override the fixture `component`")

    def test_says_what_it_is(self, component: Component) -> None:
        """A docstring, and a kind that equals its default."""
        assert component.summary(), f"{type(component).__name__} has no docstring: say what it is and cite the paper"
        assert component.kind_name() == component.model_dump()["kind"]

    def test_every_field_is_documented(self, component: Component) -> None:
        """`dense-lab components KIND` shows a sentence for each field."""
        silent = [
            name for name, field in type(component).model_fields.items() if name != "kind" and not field.description
        ]
        assert not silent, f"put a string under these fields: {silent}"

    def test_round_trips_through_json(self, component: Component) -> None:
        """What is stored with a run rebuilds the component."""
        assert type(component).model_validate_json(component.model_dump_json()) == component

    def test_is_frozen_and_refuses_unknown_fields(self, component: Component) -> None:
        """A misspelt key must not run the default for a whole study."""
        with pytest.raises(ValueError, match="no_such_field"):
            type(component).model_validate({**component.model_dump(), "no_such_field": 1})
        with pytest.raises(ValueError, match="frozen"):
            component.kind = "other"  # type: ignore[attr-defined]


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


class DataTests(ComponentTests):
    """Batches depend on the seed alone; splits are fixed."""

    def test_batches_repeat(self, component: Data) -> None:
        """The same seed gives the same batches, another one others; `skip` passes over batches."""
        corpus = component.prepare()
        torch.manual_seed(1)
        first = [next(b) for b in [corpus.train_batches(3, seed=7)] for _ in range(3)]
        torch.manual_seed(2)
        again = [next(b) for b in [component.prepare().train_batches(3, seed=7)] for _ in range(3)]
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a.inputs, b.inputs)
            assert torch.equal(a.targets, b.targets)
        assert not torch.equal(first[0].inputs, next(corpus.train_batches(3, seed=8)).inputs)
        assert torch.equal(next(corpus.train_batches(3, seed=7, skip=2)).inputs, first[2].inputs)

    def test_batches_fit(self, component: Data) -> None:
        """Shapes, types, and tokens within the vocabulary."""
        corpus = component.prepare()
        batches = [next(corpus.train_batches(3, seed=0)), *corpus.eval_batches("valid", 3, 3 * corpus.seq_len)]
        for inputs, targets in batches:
            assert inputs.shape == targets.shape
            assert inputs.shape[1] == corpus.seq_len
            assert inputs.dtype == targets.dtype == torch.int64
            assert int(inputs.min()) >= 0
            assert int(max(inputs.max(), targets.max())) < corpus.vocab_size

    def test_evaluation_is_fixed(self, component: Data) -> None:
        """Validation and test give the same batches every time, and differ from each other."""
        corpus = component.prepare()
        drawn = {
            split: torch.cat([b.inputs for b in corpus.eval_batches(split, 2, 4 * corpus.seq_len)])
            for split in ("valid", "test")
        }
        again = torch.cat([b.inputs for b in corpus.eval_batches("valid", 2, 4 * corpus.seq_len)])
        assert torch.equal(drawn["valid"], again)
        assert not torch.equal(drawn["valid"], drawn["test"])

    def test_has_a_fingerprint(self, component: Data) -> None:
        """Equal for equal data."""
        corpus = component.prepare()
        assert corpus.fingerprint
        assert corpus.fingerprint == component.prepare().fingerprint


class TokenizerTests(ComponentTests):
    """Tokens depend on the text alone."""

    def test_tokens_repeat_and_fit(self, component: Tokenizer) -> None:
        """The same text gives the same tokens, within the vocabulary; text that was never seen can be encoded too."""
        documents = ["the first document\n" * 20, "é, the second one\n" * 20]
        texts = [document.encode() for document in documents]
        encoder, again = component.fit(texts), component.fit(texts)
        assert encoder.unit
        assert encoder.vocab_size == again.vocab_size
        for seen in (texts, ["Ω ≠ \U0001f600".encode()]):
            tokens = encoder.encode(seen)
            assert tokens.ndim == 1
            assert tokens.dtype.kind == "u"
            assert len(tokens) > 0
            assert int(tokens.max()) < encoder.vocab_size
            assert (tokens == again.encode(seen)).all()


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
