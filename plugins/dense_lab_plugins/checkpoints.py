"""Readers of released checkpoints: the official DenseSSM models, and transformers' Mamba."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from dense_lab.errors import InputError
from dense_lab.interop import CheckpointPlan, Config, Shapes, number, whole

_SITES = ("k", "v")


class DenseGAUReader:
    """Official DenseSSM models (arXiv 2403.00818). Their `model_type` is that of Llama, so their own keys tell them.

    Which layers are dense, and the widths of their gates, are read from the shapes of the tensors.
    """

    def claims(self, config: Config) -> bool:
        """By the keys that only these models have."""
        return "query_key_dim" in config and "dense_block_layers" in config

    def plan(self, config: Config, shapes: Shapes) -> CheckpointPlan:
        """Raises InputError for sizes that are no numbers; dense_block_layers = 0 is one, since its norms act alone."""
        width, layers = whole(config, "hidden_size"), range(whole(config, "num_hidden_layers"))
        bottlenecks = [_bottlenecks(shapes, layer) for layer in layers]
        span = whole(config, "dense_block_layers") if any(bottlenecks) else 0
        model = {
            "width": width,
            "ffn": "none",
            "head": "tied" if config.get("tie_word_embeddings") else "untied",
            "norm_eps": number(config, "rms_norm_eps", 1e-6),
            "dropout": config.get("dropout", 0.0),
            "init": "normal",
        }
        core = {
            "kind": "gau_retnet",
            "heads": whole(config, "num_attention_heads"),
            "key_factor": whole(config, "query_key_dim") / width,
            "value_factor": number(config, "v_factor"),
            "norm_eps": model["norm_eps"],
        }
        model |= _blocks(core, [_dense(span, found) for found in bottlenecks])
        names = _model_names("model.embed_tokens", "model.norm", "lm_head" if model["head"] == "untied" else None)
        for layer in layers:
            names |= _gau_names(layer, bottlenecks[layer])
        # Tables of the rotation; ours are computed.
        buffers = {"model.retnet_rel_pos.angle", "model.retnet_rel_pos.decay"}
        ignored = buffers | ({"lm_head.weight"} if model["head"] == "tied" else set())
        return CheckpointPlan(model, whole(config, "vocab_size"), names, frozenset(ignored))


def _bottlenecks(shapes: Shapes, layer: int) -> dict[str, int]:
    """Width of the gate's bottleneck by site, for the sites that are dense in this layer."""
    found = {site: shapes.get(f"model.layers.{layer}.self_attn.{site}_select.fc1.weight") for site in _SITES}
    return {site: shape[0] for site, shape in found.items() if shape}


def _dense(span: int, bottlenecks: dict[str, int]) -> dict[str, Any]:
    if not bottlenecks:
        return {"kind": "none"}
    transitions = {
        site: {"kind": "gated", "projection": "identity", "gate": {"kind": "mlp", "bottleneck": width}}
        for site, width in bottlenecks.items()
    }
    first, *others = transitions.values()
    return {
        "kind": "densessm",
        "span": span,
        "sites": list(bottlenecks),
        "transition": first,
        "site_transitions": {} if all(other == first for other in others) else transitions,
        "owners": "every",
    }


def _blocks(core: dict[str, Any], dense: list[dict[str, Any]]) -> dict[str, Any]:
    """`core`, `depth` and `dense` when all layers are alike (a first layer reads nothing anyway), else `blocks`."""
    alike = all(layer == dense[-1] for layer in dense[1:])
    if alike and dense[0] == dense[-1]:
        return {"core": core, "depth": len(dense), "dense": dense[-1]}
    if alike and dense[0] == {"kind": "none"}:
        return {"core": core, "depth": len(dense), "dense": {**dense[-1], "owners": "reading"}}
    return {"blocks": [{"core": core, "dense": layer, "repeat": len(list(same))} for layer, same in groupby(dense)]}


def _model_names(embedding: str, norm: str, head: str | None) -> dict[str, str]:
    """Names outside the layers; `head` is None when it is tied."""
    return {
        "embedding.weight": f"{embedding}.weight",
        "norm.weight": f"{norm}.weight",
        "head.weight": f"{head or embedding}.weight",
    }


def _gau_names(layer: int, dense_sites: dict[str, int]) -> dict[str, str]:
    ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
    names = {f"{ours}.norm.weight": f"{theirs}.input_layernorm.weight"}
    maps = {"q_proj": "q_proj", "k_proj": "k_proj", "hidden_proj": "to_hidden.0", "out_proj": "to_out.0"}
    for our, their in {**maps, "head_norm": "group_norm"}.items():
        names[f"{ours}.core.{our}.weight"] = f"{theirs}.self_attn.{their}.weight"
    for site in dense_sites:
        gate = f"{ours}.dense.{site}.transition.gate.map"
        names[f"{gate}.0.weight"] = f"{theirs}.self_attn.{site}_select.fc1.weight"
        names[f"{gate}.2.weight"] = f"{theirs}.self_attn.{site}_select.fc2.weight"
        names[f"{ours}.dense.{site}.norm.weight"] = f"{theirs}.self_attn.{site}_norm.weight"
    return names


class MambaReader:
    """transformers' MambaForCausalLM (`model_type: mamba`). Keys missing in config.json have transformers' defaults."""

    def claims(self, config: Config) -> bool:
        """By `model_type`."""
        return config.get("model_type") == "mamba"

    def plan(self, config: Config, shapes: Shapes) -> CheckpointPlan:
        """Raises InputError for an activation other than silu, which Mamba's operations have built in."""
        if config.get("hidden_act", "silu") != "silu":
            raise InputError(f"config.json: hidden_act must be 'silu', got {config['hidden_act']!r}")
        width, depth = whole(config, "hidden_size", 768), whole(config, "num_hidden_layers", 32)
        rank, tied = config.get("time_step_rank", "auto"), config.get("tie_word_embeddings", True)
        core = {
            "kind": "mamba",
            "state": whole(config, "state_size", 16),
            "expand": number(config, "intermediate_size", number(config, "expand", 2) * width) / width,
            "conv_width": whole(config, "conv_kernel", 4),
            "dt_rank": None if rank == "auto" else whole(config, "time_step_rank"),
            "linear_bias": "learned" if config.get("use_bias", False) else "none",
            "conv_bias": "learned" if config.get("use_conv_bias", True) else "none",
        }
        model = {
            "width": width,
            "depth": depth,
            "core": core,
            "ffn": "none",
            "head": "tied" if tied else "untied",
            "norm_eps": number(config, "layer_norm_epsilon", 1e-5),
        }
        # Checkpoints from before the class was renamed say `embedding`.
        old = "backbone.embedding.weight" in shapes
        embedding = "backbone.embedding" if old else "backbone.embeddings"
        names = _model_names(embedding, "backbone.norm_f", None if tied else "lm_head")
        for layer in range(depth):
            names |= _mamba_names(layer)
        copies = frozenset({"lm_head.weight"} if tied else ())
        return CheckpointPlan(model, whole(config, "vocab_size", 50280), names, copies)


def _mamba_names(layer: int) -> dict[str, str]:
    ours, theirs = f"blocks.{layer}.core", f"backbone.layers.{layer}.mixer"
    same = ("x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D")
    projections = [f"{name}.{part}" for name in ("in_proj", "out_proj") for part in ("weight", "bias")]
    return {
        f"blocks.{layer}.norm.weight": f"backbone.layers.{layer}.norm.weight",
        f"{ours}.conv_weight": f"{theirs}.conv1d.weight",
        f"{ours}.conv_bias": f"{theirs}.conv1d.bias",
        **{f"{ours}.{name}": f"{theirs}.{name}" for name in (*same, *projections)},
    }
