"""Dense connections on the recurrent state: against formulas written out here, and what they cost and refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dense_lab.counting import count
from dense_lab.dense import DenseConnection
from dense_lab.errors import InputError
from dense_lab.model import LanguageModel, ModelSpec
from dense_lab.testing import ROUNDING, relative_difference, seeded, tensors
from dense_lab_kernels import rotate

WIDTH, VOCABULARY, TOKENS = 16, 13, 9
FORMS = [
    ("mamba", "state_readout"),
    ("mamba", "state_carried"),
    ("retnet", "state_readout"),
    ("gau_retnet", "state_readout"),
]


def spec(core: Any = "mamba", sites: tuple[str, ...] = ("state_readout",), **dense: Any) -> ModelSpec:
    tree = {"width": WIDTH, "depth": 3, "core": core, "dense": {"span": 2, "sites": sites, **dense}}
    return ModelSpec.model_validate(tree)


def build(spec: ModelSpec) -> LanguageModel:
    return seeded(spec.build(VOCABULARY).initialise(0))


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(seed))


class Layer:
    """What went through one layer: input, streams as they were mixed, and what came out of the mixing."""

    def __init__(self, core: Any, connection: Any) -> None:
        self.core, self.connection = core, connection
        mix = core.mix

        def watch(streams: Any, state: Any, *reads: Any) -> Any:
            self.streams, self.x = streams, next(iter(reads[0].values())).x if reads else None
            self.y, after = mix(streams, state, *reads)
            return self.y, after

        core.mix = watch

    def gate(self) -> Tensor:
        return torch.nn.functional.silu(self.connection.transition.gate(self.x)[0])


def watched(model: LanguageModel, site: str) -> list[Layer]:
    layers = [Layer(block.core, dict(block.dense.items()).get(site)) for block in model.blocks]
    model(tokens())
    return layers


@pytest.mark.parametrize("site", ["state_readout", "state_carried"])
@torch.no_grad()
def test_mamba_is_the_formula(site: str) -> None:
    layers = watched(build(spec(sites=(site,))), site)
    raw: list[Tensor] = [torch.zeros(2, 2 * WIDTH, 16, dtype=torch.float64) for _ in layers]
    own = list(raw)
    outputs: list[list[Tensor]] = [[] for _ in layers]
    for t in range(TOKENS):
        for i, layer in enumerate(layers):
            u, dt, b, c, z = (layer.streams[name][:, t] for name in ("u", "dt", "B", "C", "z"))
            step = torch.nn.functional.softplus(dt + layer.core.dt_proj.bias)[..., None]
            decay, inflow = torch.exp(-step * layer.core.A_log.exp()), step * u[..., None] * b[:, None]
            raw[i] = decay * raw[i] + inflow
            own[i] = decay * own[i] + inflow
            read = own[i]
            if i > 0:
                read = read + layer.gate()[:, t, :, None] * sum(raw[max(i - 2, 0) : i])
            if site == "state_carried":
                own[i] = read
            y = (read @ c[..., None])[..., 0] + layer.core.D * u
            outputs[i].append(layer.core.out_proj(y * torch.nn.functional.silu(z)))
    for layer, expected in zip(layers, outputs, strict=True):
        assert relative_difference(layer.y, torch.stack(expected, 1)) < ROUNDING


@pytest.mark.parametrize("core", ["retnet", "gau_retnet"])
@torch.no_grad()
def test_retention_is_the_formula(core: str) -> None:
    layers = watched(build(spec(core)), "state_readout")
    matrices: list[Any] = [0.0 for _ in layers]
    outputs: list[list[Tensor]] = [[] for _ in layers]
    cut = [
        {name: layer.streams[name].unflatten(-1, (layer.core.heads, -1)) for name in ("q", "k", "v", "g")}
        for layer in layers
    ]
    fade = 1 - 2.0 ** (-5 - torch.arange(layers[0].core.heads, dtype=torch.float64))
    for t in range(TOKENS):
        for i, layer in enumerate(layers):
            q = rotate(cut[i]["q"], normaliser="retention", activation=layer.core.query_activation)[:, t]
            k, v = rotate(cut[i]["k"])[:, t], cut[i]["v"][:, t]
            matrices[i] = fade[:, None, None] * matrices[i] + k[..., None] * v[..., None, :]
            o = (q[..., None] * matrices[i]).sum(-2)
            if i > 0:
                gate = layer.gate()[:, t].unflatten(-1, o.shape[1:])
                o = o + gate * (q[..., None] * sum(matrices[max(i - 2, 0) : i])).sum(-2)
            outputs[i].append(layer.core.out_proj(layer.core.head_norm(o, cut[i]["g"][:, t]).flatten(-2)))
    for layer, expected in zip(layers, outputs, strict=True):
        assert relative_difference(layer.y, torch.stack(expected, 1)) < ROUNDING


@pytest.mark.parametrize("sharing", ["shared", "per_source"])
def test_one_scan_and_readouts_of_their_own_agree(sharing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that joins gated states, and the general way that any projection or fusion takes."""
    model = build(spec(transition={"gate": {"kind": "mlp", "sharing": sharing}}))
    fast = model(tokens())
    expected = torch.autograd.grad(fast.square().mean(), list(model.parameters()))
    monkeypatch.setattr(DenseConnection, "gates", lambda *_: None)
    general = model(tokens())
    got = torch.autograd.grad(general.square().mean(), list(model.parameters()))
    assert relative_difference(general, fast) < ROUNDING
    assert all(relative_difference(a, b) < ROUNDING for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("core", "site"), FORMS)
def test_gradients_through_pieces_are_those_of_one_pass(core: str, site: str) -> None:
    model, ids = build(spec(core, (site,))), tokens()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(ids).square().sum(), parameters)
    state, total = None, torch.zeros((), dtype=torch.float64)
    for piece in ids.split([4, 1, 4], 1):
        out = model.run(piece, state)
        state, total = out.state, total + out.logits.square().sum()
    for got, wanted in zip(torch.autograd.grad(total, parameters), expected, strict=True):
        assert relative_difference(got, wanted) < 100 * ROUNDING


@pytest.mark.parametrize(("core", "site"), FORMS)
def test_gradients_are_right(core: str, site: str) -> None:
    model = build(spec(core, (site,)))
    names = [name for name, _ in model.named_parameters()]

    def logits(*parameters: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (tokens()[:, :4],))
        return found

    inputs = tuple(p.detach().clone().requires_grad_() for p in model.parameters())
    torch.autograd.gradcheck(logits, inputs, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize(("core", "site"), FORMS)
def test_decodes(core: str, site: str) -> None:
    """`generate` gives the tokens that whole passes would."""
    model, ids = build(spec(core, (site,))), tokens()
    expected = ids
    for _ in range(5):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, 5), expected[:, TOKENS:])


def test_state_is_kept_once() -> None:
    """`readout` adds none; `carried` adds the unfused state of layers that are fused and read: the second of three."""
    plain, readout = (count(s, VOCABULARY) for s in (ModelSpec(width=WIDTH, depth=3, core="mamba"), spec()))
    carried = count(spec(sites=("state_carried",), span=2), VOCABULARY)
    one = 2 * WIDTH * 16 * 4
    assert readout.state_bytes == plain.state_bytes
    assert carried.state_bytes == plain.state_bytes + one
    state = build(spec(sites=("state_carried",))).run(tokens()).state
    assert [len(tensors(own)) for own in state] == [2, 3, 2]
    # m recurrences more, here 1 + 2, each 7 N + 1 per channel, and the gates' linear maps.
    gates = 2 * 2 * (WIDTH * 1 + 1 * 2 * WIDTH)
    assert readout.flops_per_token == plain.flops_per_token + 3 * 2 * WIDTH * (7 * 16 + 1) + gates
    assert carried.flops_per_token == readout.flops_per_token


@pytest.mark.parametrize(("core", "site"), [form for form in FORMS if form[1] == "state_readout"])
def test_is_the_identity_where_the_fusion_starts_as_one(core: str, site: str) -> None:
    dense = spec(core, (site,), fusion="concat").build(VOCABULARY).initialise(0).double()
    plain = ModelSpec(width=WIDTH, depth=3, core=core).build(VOCABULARY).initialise(0).double()
    assert relative_difference(dense(tokens()), plain(tokens())) < ROUNDING


def test_all_sites_leaves_states_alone() -> None:
    assert set(build(spec("retnet", "all")).blocks[1].reads) == {"k", "v"}


def hybrid(*cores: Any, **dense: Any) -> LanguageModel:
    tree = {"width": WIDTH, "blocks": [{"core": c} for c in cores], "dense": {"span": 2, **dense}}
    return build(ModelSpec.model_validate(tree))


def test_layers_of_another_family_are_passed_over() -> None:
    cores = ("mamba", "retnet", "gau_retnet", "mamba")
    model = hybrid(*cores[:2], {"kind": "gau_retnet", "heads": 4, "key_factor": 1.0}, cores[3], sites=["state_readout"])
    assert [block.reads.get("state_readout") for block in model.blocks] == [None, None, (1,), None]
    state, ids, logits = None, tokens(), []
    for piece in ids.split([1, 4, 4], 1):
        out = model.run(piece, state)
        state = out.state
        logits.append(out.logits)
    assert relative_difference(torch.cat(logits, 1), model(ids)) < ROUNDING


def test_a_projection_may_change_the_width_of_what_is_read() -> None:
    projected = {"state_readout": {"projection": "linear"}}
    cores = ("mamba", {"kind": "mamba", "expand": 1.0})
    model = hybrid(*cores, sites=["u", "state_readout"], site_transitions={**projected, "u": {"projection": "linear"}})
    assert model.blocks[1].dense["state_readout"].transition.projections[0].weight.shape == (WIDTH, 2 * WIDTH)
    ids = tokens()
    first = model.run(ids[:, :4])
    assert relative_difference(model.run(ids[:, 4:], first.state).logits, model(ids)[:, 4:]) < ROUNDING
    with pytest.raises(InputError, match="cannot map a source of width 32 to 16"):
        hybrid(*cores, sites=["state_readout"])


def test_an_unfused_layer_is_read_without_extra_state() -> None:
    """Only the middle layer is `carried`; the last reads both by `readout`."""
    blocks = [
        {"core": "mamba"},
        {"core": "mamba", "dense": {"sites": ["state_carried"]}},
        {"core": "mamba", "dense": {"sites": ["u", "state_readout"], "span": 2}},
    ]
    model = build(ModelSpec.model_validate({"width": WIDTH, "blocks": blocks}))
    state, ids, logits = None, tokens(), []
    for piece in ids.split([3, 1, 5], 1):
        out = model.run(piece, state)
        state = out.state
        logits.append(out.logits)
    assert relative_difference(torch.cat(logits, 1), model(ids)) < ROUNDING
    assert [len(tensors(own)) for own in state] == [2, 3, 2]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: spec(sites=("state_carried",), fusion="concat"), "needs projection identity and fusion add"),
        (lambda: spec(sites=("state_carried",), transition={"projection": "linear"}), "a readout site takes any"),
        (lambda: spec("retnet", ("state_carried",)), "Did you mean 'state_readout'?"),
    ],
)
def test_what_cannot_be_is_said(make: Any, words: str) -> None:
    with pytest.raises(InputError, match=words.replace("?", r"\?")):
        make().build(VOCABULARY)


def test_states_of_unlike_sizes_are_refused() -> None:
    with pytest.raises(InputError, match=r"layer 1 .* layer 0, which has state=16 where it has state=8"):
        hybrid("mamba", {"kind": "mamba", "state": 8}, sites=["state_readout"])


@pytest.mark.parametrize(("core", "site"), FORMS)
def test_low_precision_follows(core: str, site: str) -> None:
    """Under bf16 autocast, as trained on a GPU, states stay float32 and the loss is float32's to bf16's rounding."""
    model, ids = spec(core, (site,)).build(VOCABULARY).initialise(0), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        out = model.run(ids)
        loss = model.loss(ids, ids)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(t.dtype == torch.float32 for own in out.state for t in tensors(own)[-1:] if t.is_floating_point())
    assert abs(float(loss.detach()) - float(model.loss(ids, ids).detach())) < 4 * 2**-8
