"""The slots: what a component of each kind must be. A component is what the YAML says *and* what builds the module.

Letters: B batch, T tokens, W width of a stream, m number of sources. Components never see the name of a core.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, SerializeAsAny
from pydantic_core import PydanticCustomError, core_schema

from dense_lab import registry as registries
from dense_lab.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from dense_lab.corpus import Corpus, Encoder
    from dense_lab.modules import CoreModule, FusionModule, GateModule, TransitionModule


class Spec(BaseModel):
    """Base of everything that a study may say: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class Component(Spec):
    """A spec that fills a slot; subclasses add `kind: Literal["name"] = "name"` and a docstring with the paper."""

    slot: ClassVar[str] = ""

    @classmethod
    def kind_name(cls) -> str:
        """The one value of `kind`; raises InputError when the class does not declare it as a Literal."""
        declared = cls.model_fields.get("kind")
        values = get_args(declared.annotation) if declared else ()
        if not cls.slot or len(values) != 1:
            raise InputError(f"{cls.__name__} is no component: subclass a slot and declare `kind: Literal['name']`")
        return str(values[0])

    @classmethod
    def summary(cls) -> str:
        """First paragraph of the docstring, on one line."""
        return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())

    @classmethod
    def origin(cls) -> str:
        """`file:line` of the class, or its module where there is no source, for messages."""
        try:
            return f"{inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]}"
        except (OSError, TypeError):
            return cls.__module__


class Core(Component):
    """A sequence mixer."""

    slot = "core"

    @abstractmethod
    def build(self, width: int) -> CoreModule:
        """The module that maps [B, T, width] to [B, T, width]; raises InputError when `width` does not fit."""


class Projection(Component):
    """What a source stream goes through before it is gated: [..., source_width] -> [..., width]."""

    slot = "projection"

    @abstractmethod
    def build(self, source_width: int, width: int) -> nn.Module:
        """One source's projection; raises InputError when it cannot change the width and must."""


class Gate(Component):
    """The input-dependent factor of a selective transition, computed from the current layer's input x_t."""

    slot = "gate"

    @abstractmethod
    def build(self, x_width: int, width: int, sources: int) -> GateModule:
        """Maps x [B, T, x_width] to one shared gate [B, T, width] or one for each of `sources`."""


class Transition(Component):
    """phi: what becomes of the sources before fusion."""

    slot = "transition"

    @abstractmethod
    def build(self, x_width: int, source_widths: Sequence[int], width: int) -> TransitionModule:
        """Maps (x, sources) to selected sources of `width`."""


class Fusion(Component):
    """How the selected sources join the layer's own stream."""

    slot = "fusion"

    @abstractmethod
    def build(self, x_width: int, width: int, sources: int) -> FusionModule:
        """Maps (own, selected sources) to a stream of the same width."""


class Pattern(Component):
    """Which earlier layers a layer reads."""

    slot = "pattern"

    @abstractmethod
    def layers(self, layer: int, span: int) -> tuple[int, ...]:
        """Indices below `layer` (counted from 0), nearest first; at most `span` unless the pattern says otherwise."""


class FFN(Component):
    """The channel mixer behind the core, [B, T, width] -> [B, T, width]; kind `none` leaves it out."""

    slot = "ffn"

    @abstractmethod
    def build(self, width: int) -> nn.Module | None:
        """The module, or None for no feed-forward layer at all."""


class Data(Component):
    """Where tokens come from."""

    slot = "data"

    @abstractmethod
    def prepare(self) -> Corpus:
        """Read, tokenise and split; deterministic. Raises InputError (bad path) or MachineError (offline)."""

    def prepare_here(self) -> Corpus | None:
        """As `prepare`, or None when data would have to be fetched for it: what `dense-lab check` looks at."""
        return self.prepare()

    def vocabulary(self) -> int:
        """Number of different tokens; prepares the data, unless a component knows a shorter way."""
        return self.prepare().vocab_size


class Tokenizer(Component):
    """How text becomes tokens."""

    slot = "tokenizer"

    @abstractmethod
    def fit(self, documents: Sequence[bytes]) -> Encoder:
        """What turns text into tokens, learned from the training split's documents (UTF-8) alone; deterministic.

        Before it takes long, it says so by `logging.getLogger("dense_lab").info`: commands print that.
        """


class Slot:
    """Annotation of a field that any installed component of a slot may fill: a bare name, or a mapping with `kind`.

    The kind is looked up when a value is validated, in `context["registry"]` if given, else in the default registry,
    so plugins loaded later are found; errors below keep their path.
    """

    def __init__(self, slot: str, default: str | None = None):
        self.slot, self.default = slot, default

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        dump = core_schema.plain_serializer_function_ser_schema(lambda value: value.model_dump(mode="json"))
        return core_schema.with_info_plain_validator_function(self._validate, serialization=dump)

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"x-slot": self.slot, "x-default-kind": self.default}

    def _validate(self, value: Any, info: core_schema.ValidationInfo) -> Component:
        registry = (info.context or {}).get("registry") or registries.default()
        if isinstance(value, Component):
            if value.slot != self.slot:
                raise PydanticCustomError(
                    "slot", "a {got} cannot fill slot {slot}", {"got": value.slot, "slot": self.slot}
                )
            return value
        kind, fields = self._split(value, registry)
        try:
            component = registry.find(self.slot, kind)
        except InputError as error:
            raise PydanticCustomError("unknown_kind", "{text}", {"text": str(error)}) from None
        # A ValidationError raised here is merged by pydantic with its path intact.
        return component.model_validate(fields, context=info.context)

    def _split(self, value: Any, registry: registries.Registry) -> tuple[str, dict[str, Any]]:
        installed = ", ".join(registry.kinds(self.slot))
        if isinstance(value, str):
            return value, {}
        if not isinstance(value, dict):
            raise PydanticCustomError(
                "slot_type",
                "expected a {slot}: a name or a mapping with 'kind', got {got}. Installed: {installed}. A mapping with "
                "'choice' lets a search choose",
                {"slot": self.slot, "got": repr(value), "installed": installed},
            )
        kind = value.get("kind", self.default)
        if not isinstance(kind, str):
            raise PydanticCustomError(
                "slot_kind",
                "a {slot} needs 'kind: name', got {got}. Installed: {installed}",
                {"slot": self.slot, "got": repr(kind), "installed": installed},
            )
        return kind, {key: item for key, item in value.items() if key != "kind"}


CoreSlot = Annotated[SerializeAsAny[Core], Slot("core")]
ProjectionSlot = Annotated[SerializeAsAny[Projection], Slot("projection")]
GateSlot = Annotated[SerializeAsAny[Gate], Slot("gate")]
TransitionSlot = Annotated[SerializeAsAny[Transition], Slot("transition", default="gated")]
FusionSlot = Annotated[SerializeAsAny[Fusion], Slot("fusion")]
PatternSlot = Annotated[SerializeAsAny[Pattern], Slot("pattern")]
FFNSlot = Annotated[SerializeAsAny[FFN], Slot("ffn")]
DataSlot = Annotated[SerializeAsAny[Data], Slot("data")]
TokenizerSlot = Annotated[SerializeAsAny[Tokenizer], Slot("tokenizer")]
