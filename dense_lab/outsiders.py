"""A look at components that are not built in, before anything is trained with them.

A model that reads the next token, or other rows of its batch, trains without complaint, to a loss that is too good.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import torch

from dense_lab.components import Component
from dense_lab.dense import DenseSpec
from dense_lab.errors import InputError
from dense_lab.model import LanguageModel, ModelSpec
from dense_lab.probing import Part, called, foreseen, leaks, relative_difference, seeded
from dense_lab.registry import BUILTIN, Registry
from dense_lab.study import components_of

TOLERANCE = 1e-4
"""Largest difference, relative to the largest value, that rounding may explain; in single precision it is near 1e-6."""
_TOKENS, _VOCABULARY = 32, 16
_LONG, _CUT = 144, 130
"""Tokens of a pass in which chunkwise forms have several chunks, few of which are longer than 128, and a cut in the
last chunk."""


def look(models: Iterable[ModelSpec], registry: Registry) -> list[str]:
    """Try every combination of components of which one is not built in, once, on few tokens, on the CPU.

    Returns a sentence for each that could not be tried. Raises InputError, with every component concerned, when
    outputs depend on later tokens or on other rows of the batch, or when a fused stream has the wrong shape.
    """
    if all(plugin.name == BUILTIN.name for plugin in registry.plugins if plugin.components):
        return []
    found = []
    for model in models:
        parts = {(type(part), part.model_dump_json()): part for part in components_of(model)}
        strangers = [part for part in parts.values() if _owner(part, registry)[0] != BUILTIN.name]
        key = frozenset(parts), model.model_dump_json(exclude=_ALIKE)
        if strangers and key not in _known:
            _known[key] = _tried(model, strangers, registry)
        found.append(_known.get(key, ""))
    return list(dict.fromkeys(filter(None, found)))


_ALIKE = {"width", "depth", "head", "norm_eps", "dropout", "init"}
"""Keys of a model that change nothing of what its components read."""
_FEW = 8
"""Tokens that every training sequence has."""
_WRONG = (TypeError, AttributeError, NameError, LookupError)
"""What no other device and no longer sequence puts right."""
_SHAPES = re.compile("size of tensor|[Ss]izes of tensors|shapes? .*cannot|must match|is invalid for input")
"""What torch says of shapes that do not fit."""
_known: dict[tuple[frozenset[tuple[type, str]], str], str] = {}
"""Why a combination could not be tried; of those that this process has been through."""


def _tried(model: ModelSpec, strangers: Sequence[Component], registry: Registry) -> str:
    """Why the model could not be tried, if so."""
    try:
        found = _leaks(_shortened(model), registry)
    except InputError:
        raise
    # The isolation boundary: what a stranger's module cannot do here it may be able to on the training device.
    except Exception as error:
        names = ", ".join(_named(part, registry) for part in strangers)
        said = " ".join(str(error).split())
        if _is_wrong(error) and _fails_at_once(model, registry):
            raise InputError(
                f"{names}: {_FEW} tokens through a model with it, on the CPU, raised {type(error).__name__}: {said}. "
                f"Every trial would fail; `dense_lab.testing` has tests that a component inherits, and that show where"
            ) from error
        return f"{names}: not tried for leaks, since on the CPU it raised {type(error).__name__}: {said}"
    seen = {what: far for what, far in found.items() if not far <= TOLERANCE}
    if not seen:
        return ""
    blamed = [part for part in strangers if _leaks_alone(part, model.width, registry)]
    names = ", ".join(_named(part, registry) for part in blamed or strangers)
    which = "" if len(blamed or strangers) == 1 else "one of "
    depends = " and ".join(f"{what} (with those changed, outputs differ by {far:.2g})" for what, far in seen.items())
    raise InputError(
        f"{which}{names}: the output at a token depends on {depends}; rounding explains {TOLERANCE:g}, relative to the "
        f"largest output. What is trained so sees what it is to predict, and its loss means nothing. "
        f"`dense_lab.testing` has tests that a component inherits, and that show where"
    )


def _is_wrong(error: Exception) -> bool:
    return isinstance(error, _WRONG) or (isinstance(error, RuntimeError) and bool(_SHAPES.search(str(error))))


def _fails_at_once(model: ModelSpec, registry: Registry) -> bool:
    """Whether a few tokens are too many; what is made for a length of its own may fail on long passes alone."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            module = seeded(_shortened(model).build(_VOCABULARY), dtype=torch.float32)
            module.kernels = _references(registry)
            _logits(module, _FEW)(_all)
    # The isolation boundary: the same stranger as before.
    except Exception as error:  # noqa: BLE001
        return _is_wrong(error)
    return False


def _leaks(model: ModelSpec, registry: Registry) -> dict[str, float]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        module = seeded(model.build(_VOCABULARY), dtype=torch.float32)
        module.kernels = _references(registry)
        short, long = _logits(module, _TOKENS), _logits(module, _LONG)
        if not relative_difference(short(_all), short(_all)) <= TOLERANCE:
            raise ArithmeticError("its outputs differ from call to call on the same tokens")
        found = leaks(short)
        later = [found["later tokens"], foreseen(long, long(_all), _CUT)]
        module.eval()
        later.append(foreseen(short, short(_all), _TOKENS // 2))
    return found | {"later tokens": max(later)}


def _logits(module: LanguageModel, tokens: int) -> Callable[[Part], torch.Tensor]:
    """Logits of random tokens changed by a part, which raises ArithmeticError when they say nothing."""
    ids = torch.randint(_VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(0))

    def logits(part: Part) -> torch.Tensor:
        torch.default_generator.manual_seed(0)  # Dropout is to drop the same.
        found: torch.Tensor = module(part(ids))
        if not found.isfinite().all():
            raise ArithmeticError("its outputs with random weights are not finite")
        return found

    return logits


def _all(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _leaks_alone(part: Component, width: int, registry: Registry) -> bool:
    try:
        with torch.no_grad(), registry.kernel_session(_references(registry)):
            functions = [called(part, width, width, 2, tokens, torch.float32) for tokens in (_TOKENS, _LONG)]
            return any(f is not None and any(not far <= TOLERANCE for far in leaks(f).values()) for f in functions)
    # The isolation boundary: it may not fit these widths; the model as a whole was tried already.
    except Exception:  # noqa: BLE001
        return False


def _shortened(model: ModelSpec) -> ModelSpec:
    """As few layers as connect all that is connected; a component may depend on the width."""
    layers = model.layers()
    enough = max(_reach(layer.dense or model.dense, len(layers)) for layer in layers)
    most = max(enough, 2)
    blocks = model.blocks and tuple(b.model_copy(update={"repeat": min(b.repeat, most)}) for b in model.blocks)
    return model.model_copy(update={"blocks": blocks, "depth": min(model.depth, enough)})


def _reach(dense: DenseSpec, depth: int) -> int:
    """Layers until one reads as many as `span`, or as any does."""
    if not dense.span:
        return 1
    reads = [len(dense.pattern.layers(layer, dense.span)) for layer in range(depth)]
    return 1 + next(layer for layer, many in enumerate(reads) if many >= min(dense.span, max(reads)))


def _references(registry: Registry) -> dict[str, str]:
    """They need no compiler."""
    found = {}
    for library in registry.kernels:
        for operation in library.OPERATIONS:
            if hasattr(library, "implementations") and "reference" in library.implementations(operation):
                found[operation] = "reference"
    return found


def _owner(part: Component, registry: Registry) -> tuple[str, str]:
    plugin = registry.owner(part.slot, part.kind_name())
    return plugin.name, plugin.version


def _named(part: Component, registry: Registry) -> str:
    name, version = _owner(part, registry)
    return f"{part.slot} {part.kind_name()!r} of {name}, {version} (defined at {part.origin()})"
