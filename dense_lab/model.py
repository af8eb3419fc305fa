"""The language model: the only place where core, transition, fusion and pattern meet.

Letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor, nn

from dense_lab import registry as registries
from dense_lab.block import Block, Past, connect, leave_raw
from dense_lab.components import CoreSlot, FFNSlot, Spec
from dense_lab.corpus import IGNORED
from dense_lab.dense import DenseSpec
from dense_lab.maps import rounding_once
from dense_lab.modules import State
from dense_lab.norms import Dropout, RMSNorm
from dense_lab.units import Count, Fraction, Positive


class BlockSpec(Spec):
    """One kind of block within `blocks:`, for models whose layers are not alike."""

    core: CoreSlot
    """The sequence mixer."""
    dense: DenseSpec | None = None
    """Overrides the model's dense connection."""
    ffn: FFNSlot | None = None
    """Overrides the model's feed-forward layer."""
    repeat: Count = 1
    """How many such blocks follow each other."""


class ModelSpec(Spec):
    """A language model: token embedding, `depth` pre-norm residual blocks, final norm, head."""

    width: Count = 128
    """Width of the residual stream."""
    depth: Count = 4
    """Number of blocks."""
    core: CoreSlot = "retnet"  # type: ignore[assignment]
    """Sequence mixer of every block."""
    dense: DenseSpec = "none"  # type: ignore[assignment]
    """Dense hidden connections between the blocks."""
    ffn: FFNSlot = "none"  # type: ignore[assignment]
    """Feed-forward layer behind every core."""
    blocks: tuple[BlockSpec, ...] | None = None
    """Instead of `core` and `depth`: a list of blocks, for hybrids."""
    head: Literal["tied", "untied"] = "tied"
    """Whether the output layer shares the embedding's weights."""
    norm_eps: Positive = 1e-6
    """Epsilon of every RMSNorm on the residual stream and behind fusions."""
    dropout: Fraction = 0.0
    """On the output of every core and feed-forward layer, in training."""
    init: Literal["fan_in", "normal"] = "fan_in"
    """Linear weights: N(0, 1/fan_in), those that write to the residual stream divided by sqrt(number of writers)
    (GPT-2, section 2.3); or N(0, 0.02) for all, as in the official DenseSSM code. Embeddings are N(0, 0.02)."""

    @model_validator(mode="after")
    def _blocks_or_core(self) -> ModelSpec:
        if self.blocks is not None and self.model_fields_set & {"core", "depth"}:
            raise ValueError("`blocks` lists cores and their number: leave out `core` and `depth`")
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        unused = {"core", "depth"} if self.blocks is not None else set()
        return {key: value for key, value in dumped.items() if key not in unused}

    def layers(self) -> list[BlockSpec]:
        """One spec for each block, repeats written out."""
        blocks = self.blocks or (BlockSpec(core=self.core, repeat=self.depth),)
        return [block for block in blocks for _ in range(block.repeat)]

    def without_dense(self) -> ModelSpec:
        """The plain model of the same widths."""
        blocks = self.blocks and tuple(block.model_copy(update={"dense": None}) for block in self.blocks)
        return self.model_copy(update={"dense": DenseSpec(span=0), "blocks": blocks})

    def build(self, vocab_size: int) -> LanguageModel:
        """The module, with uninitialised weights under `torch.device("meta")`; raises InputError when sizes clash."""
        return LanguageModel(self, vocab_size)


class LanguageModelOutput(NamedTuple):
    """What a pass gives."""

    logits: Tensor
    """[B, T, V]."""
    state: tuple[State, ...]
    """One state for each block, to be handed to the next piece."""


class LanguageModel(nn.Module):
    """Token embedding, blocks, norm, head. `model(ids) -> logits [B, T, V]`; `model.step` decodes."""

    blocks: Sequence[Block]

    def __init__(self, spec: ModelSpec, vocab_size: int):
        super().__init__()
        self.spec, self.vocab_size = spec, vocab_size
        self.kernels: Mapping[str, str] = {}
        """Implementations asked for by operation; empty means "auto" everywhere."""
        # Drawn here because nn.Embedding draws a normal, which on the meta device imports torch._dynamo: 5 s.
        weight = torch.empty(vocab_size, spec.width).uniform_(-0.03, 0.03)
        self.embedding = nn.Embedding(vocab_size, spec.width, _weight=weight)
        layers = spec.layers()
        self.blocks = nn.ModuleList(Block(layer, spec) for layer in layers)  # type: ignore[assignment]
        for index, layer in enumerate(layers):
            connect(self.blocks, index, layer.dense or spec.dense, spec)
        leave_raw(self.blocks)
        self.norm = RMSNorm(spec.width, spec.norm_eps)
        self.head = nn.Linear(spec.width, vocab_size, bias=False)
        if spec.head == "tied":
            self.head.weight = self.embedding.weight
        self._writers = sum(2 if block.ffn is not None else 1 for block in self.blocks)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [B, T, V] of input_ids [B, T], from the zero state."""
        return self.run(input_ids).logits

    def run(self, input_ids: Tensor, state: tuple[State, ...] | None = None) -> LanguageModelOutput:
        """A pass over a piece [B, T] that follows `state`; the first piece has none."""
        x, state = self.features(input_ids, state)
        return LanguageModelOutput(self.head(x), state)

    def step(self, token: Tensor, state: tuple[State, ...] | None = None) -> LanguageModelOutput:
        """One token [B] -> logits [B, V] and the next state: decoding."""
        logits, state = self.run(token[:, None], state)
        return LanguageModelOutput(logits[:, 0], state)

    def generate(self, input_ids: Tensor, max_new_tokens: int, **sampling: Any) -> Tensor:
        """New tokens [B, max_new_tokens] behind prompts [B, T]; see `dense_lab.generation.generate`."""
        from dense_lab.generation import generate

        return generate(self, input_ids, max_new_tokens, **sampling)

    def features(self, input_ids: Tensor, state: tuple[State, ...] | None = None) -> tuple[Tensor, tuple[State, ...]]:
        """Normalised hidden states [B, T, width] that the head reads, and the state."""
        x, y = self.embedding(input_ids), None
        drop = Dropout(self.spec.dropout if self.training else 0.0, self._writers, x.device)
        history: list[Past] = []
        after = []
        session = registries.default().kernel_session(self.kernels)
        with session as self.ran, rounding_once(_maps(self.blocks), x.device):
            for index, block in enumerate(self.blocks):
                x, y, own, past = block(x, y, drop, state[index] if state else None, history)
                history.append(past)
                after.append(own)
            _, x = drop.add(x, y, self.norm)
        return x, tuple(block.state(*pair) for block, *pair in zip(self.blocks, after, history, strict=True))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per scored position, 0 if there is none; targets [B, T], or IGNORED."""
        x, targets = self.features(inputs)[0].flatten(0, 1), targets.flatten()
        fused = registries.default().operation("linear_cross_entropy")
        if fused is not None:
            with registries.default().kernel_session(self.kernels) as ran:
                loss: Tensor = fused(x, self.head.weight, targets, ignored=IGNORED)
            self.ran |= ran
            return loss
        logits = self.head(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        return total / (targets != IGNORED).sum().clamp(min=1)

    def initialise(self, seed: int) -> LanguageModel:
        """Draw every weight from a generator of its own, seeded by (seed, name of the module).

        Two models that share a module by name and shape so start from the same weights there, whatever else differs:
        embeddings, heads and plain parts of paired arms are identical.
        """
        with torch.random.fork_rng(devices=[]):
            for name, module in _children_first(self):
                # Not torch.manual_seed, which also seeds every kind of device: 1 ms, for thousands of modules.
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
                _initialise(module, self.spec.init, self._writers)
        return self


def _maps(blocks: Sequence[nn.Module]) -> Iterator[Tensor]:
    """Weights of the linear maps without bias."""
    for block in blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear) and getattr(module, "bias", None) is None:
                yield module.weight


def _children_first(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        yield from _children_first(child, f"{prefix}{name}.")
    yield prefix, module


def _initialise(module: nn.Module, scheme: str, writers: int) -> None:
    if isinstance(module, nn.Linear):
        std = module.in_features**-0.5 if scheme == "fan_in" else 0.02
        if scheme == "fan_in" and getattr(module, "writes_residual", False):
            std /= writers**0.5
        nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        # After its children, so that a core may set a linear map of its own (Mamba's dt projection).
        reset()
