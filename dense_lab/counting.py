"""Sizes of a model: parameters by part, FLOPs, recurrent state. Counted on modules that own no memory.

A plan or a solver sizes thousands of models that are made of few different parts, so a part is built once for each
spec and width, and models that share it share the module.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dense_lab import registry as registries
from dense_lab.components import Component
from dense_lab.dense import DenseSpec
from dense_lab.errors import InputError
from dense_lab.model import BlockSpec, LanguageModel, ModelSpec

PARTS = ("embedding", "core", "dense", "ffn", "norm", "head")
"""Of a model's parameters; a tied head has none of its own."""
_KEPT = 4096
"""Parts of models that are remembered."""


class Counts(NamedTuple):
    """Sizes of a model."""

    parameters: int
    """All trainable numbers, tied ones once."""
    embedding_parameters: int
    """Embedding and untied head."""
    flops_per_token: float
    """Forward pass: 2 per weight of every linear map, plus each core's recurrence (Kaplan et al. 2020, table 1)."""
    state_bytes: int
    """Recurrent state of one sequence in fp32, measured from the state itself; the token counter is left out."""


def count(spec: ModelSpec, vocab_size: int) -> Counts:
    """Sizes of the model that `spec` describes; raises InputError when it cannot be built."""
    by_part = parameters_by_part(spec, vocab_size)
    outside = by_part["embedding"] + by_part["head"]
    return Counts(sum(by_part.values()), outside, flops_per_token(spec, vocab_size), state_bytes(spec))


def parameters_by_part(spec: ModelSpec, vocab_size: int) -> dict[str, int]:
    """Number of parameters of each of PARTS; raises InputError when the model cannot be built."""
    parts = dict.fromkeys(PARTS, 0)
    for name, parameter in _skeleton(spec, vocab_size).named_parameters(remove_duplicate=False):
        words = name.split(".")
        part = words[2] if words[0] == "blocks" else words[0]
        if part != "head" or spec.head == "untied":
            parts[part if part in parts else "norm"] += parameter.numel()
    return parts


def flops_per_token(spec: ModelSpec, vocab_size: int) -> float:
    """See `Counts`; raises InputError when the model cannot be built."""
    model = _skeleton(spec, vocab_size)
    idle = {
        id(module)
        for block in model.blocks
        for site, dense in block.dense.items()
        if site not in block.reads
        for module in dense.modules()
    }
    linear = sum(
        module.weight.numel() * getattr(module, "applications", 1)
        for _, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and id(module) not in idle
    )
    return 2.0 * linear + sum(block.mixing_flops() for block in model.blocks)


def state_bytes(spec: ModelSpec) -> int:
    """See `Counts`; raises InputError when the model cannot be built."""
    if any(_reads_states(layer.dense or spec.dense, layer.core, spec.width) for layer in spec.layers()):
        return _state_of_model(spec.model_dump_json())
    return sum(_state_of_core(_key(layer.core), spec.width) for layer in spec.layers())


def _reads_states(dense: DenseSpec, core: Component, width: int) -> bool:
    """Whether some site is no stream: streams are connected without adding state."""
    if dense.span == 0 or dense.sites == "all":
        return False
    with torch.device("meta"), _NothingDrawn():
        streams = _built(_key(core), (width,)).streams  # type: ignore[union-attr]
    return not set(dense.sites) <= {stream.name for stream in streams}  # type: ignore[union-attr]


def check_sizes(spec: ModelSpec, vocab_size: int) -> None:
    """Raise InputError, with the sentence of the component concerned, when the model cannot be built."""
    try:
        _skeleton(spec, vocab_size)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"model: {error}") from error


class _NothingDrawn(TorchFunctionMode):
    """Initialisers do nothing: on the meta device they would cost more than all the rest."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _INITIALISERS and args:
            return args[0]
        return func(*args, **(kwargs or {}))


_INITIALISERS = {getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and name[0] != "_"}
_INITIALISERS |= {Tensor.uniform_, Tensor.normal_}


def _skeleton(spec: ModelSpec, vocab_size: int) -> LanguageModel:
    """The model on the meta device; equal parts are one module."""
    layers = tuple(
        BlockSpec.model_construct(
            core=_Shared(layer.core), dense=_shared_dense(layer.dense or spec.dense), ffn=_Shared(layer.ffn or spec.ffn)
        )
        for layer in spec.layers()
    )
    with torch.device("meta"), _NothingDrawn():
        return LanguageModel(spec.model_copy(update={"blocks": layers}), vocab_size)


def _shared_dense(dense: DenseSpec) -> DenseSpec:
    parts = {"transition": _Shared(dense.transition), "fusion": _Shared(dense.fusion)}
    sites = {name: _Shared(transition) for name, transition in dense.site_transitions.items()}
    return dense.model_copy(update={**parts, "site_transitions": sites})


class _Key(NamedTuple):
    """A component as a key: specs may hold what cannot be hashed."""

    kind: type[Component]
    text: str

    def component(self) -> Component:
        return self.kind.model_validate_json(self.text)


def _key(component: Component) -> _Key:
    return _Key(type(component), component.model_dump_json())


class _Shared:
    """A component whose `build` gives the module it gave before for the same arguments."""

    def __init__(self, component: Component) -> None:
        self._component, self._key = component, _key(component)

    def build(self, *args: Any) -> Any:
        """What the component builds."""
        return _built(self._key, tuple(tuple(arg) if isinstance(arg, list) else arg for arg in args))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._component, name)


@functools.lru_cache(_KEPT)
def _built(key: _Key, args: tuple[Any, ...]) -> nn.Module | None:
    module: nn.Module | None = key.component().build(*args)  # type: ignore[attr-defined]
    return module


@functools.lru_cache(_KEPT)
def _state_of_core(core: _Key, width: int) -> int:
    with _measuring():
        module = core.component().build(width)  # type: ignore[attr-defined]
        _, state = module(torch.zeros(1, 1, width))
    return _bytes(state)


@functools.lru_cache(_KEPT)
def _state_of_model(model: str) -> int:
    with _measuring():
        return _bytes(ModelSpec.model_validate_json(model).build(1).run(torch.zeros(1, 1, dtype=torch.long)).state)


@contextlib.contextmanager
def _measuring() -> Iterator[None]:
    """For a pass over one token, on the CPU with weights that nobody wrote: they take next to no memory, and on the
    meta device torch would import its compiler for most of the arithmetic, which takes seconds."""
    library = registries.default()
    references = {name: "reference" for kernels in library.kernels for name in kernels.OPERATIONS}
    with _NothingDrawn(), torch.no_grad(), library.kernel_session(references):
        yield


def _bytes(state: Any) -> int:
    tensors = (leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return sum(leaf.numel() * leaf.element_size() for leaf in tensors)
