"""A residual block, and how its dense connections reach earlier blocks. Letters: B batch, T tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from dense_lab.dense import DenseSpec
from dense_lab.errors import InputError
from dense_lab.maps import joining
from dense_lab.modules import CoreModule, RawStreams, Recurrence, State, StateReads, StateSite, Stream, Streams
from dense_lab.norms import Dropout, RMSNorm

if TYPE_CHECKING:
    from dense_lab.model import BlockSpec, ModelSpec


class FusedState(NamedTuple):
    """State of a block whose recurrent state is fused and read by later layers, which want it unfused."""

    own: State
    """What the core hands on."""
    unfused: Tensor | None
    """Recurrent state without fusions."""


class Past(NamedTuple):
    """What later layers may read of a layer in one pass."""

    streams: Streams
    """Before fusion; some are as `project` gave them, see `Block.raw`."""
    recurrence: Recurrence | None
    """None unless a later layer reads the state."""


class Block(nn.Module):
    """x + core(norm(x)), then x + ffn(norm(x)); dense connections act between the two halves of the core.

    The last sum is left to the next norm, which does it in the same pass over memory.
    """

    def __init__(self, spec: BlockSpec, model: ModelSpec):
        super().__init__()
        self.norm = RMSNorm(model.width, model.norm_eps)
        self.core: CoreModule = spec.core.build(model.width)
        self.dense = nn.ModuleDict()
        self.reads: dict[str, tuple[int, ...]] = {}
        """Layers that each site reads, nearest first; sites that read nothing are absent."""
        self.state_sites: dict[str, StateSite] = {}
        """Those of them at which states are read."""
        self.streams_read: set[str] = set()
        """Names of the streams that later layers read."""
        self.raw: set[str] = set()
        """Names of the streams that stay as `project` gives them for all layers that read them, see `leave_raw`; on a
        CPU only those that need no activation."""
        self.state_readers = 0
        """How many later layers read the state."""
        ffn = (spec.ffn or model.ffn).build(model.width)
        self.ffn = ffn
        self.ffn_norm = RMSNorm(model.width, model.norm_eps) if ffn is not None else None

    def forward(
        self, x: Tensor, y: Tensor | None, drop: Dropout, state: State, history: Sequence[Past]
    ) -> tuple[Tensor, Tensor, State, Past]:
        """Residual stream x [B, T, width] and what the last layer adds to it -> those two, the core's state, and what
        later layers may read."""
        x, h = drop.add(x, y, self.norm)
        own, unfused = state if isinstance(state, FusedState) else (state, None)
        with joining(h, self._first_maps()) as mapped:
            raw, before = self.core.project(h, own)
        streams, past = self._connected(h, raw, history, iter(mapped))
        y, after = self._mix(h, streams, before, history)
        recurrence = self.core.recurrence(streams, before, after) if self.state_readers else None
        if recurrence is not None and self._fuses_its_state():
            recurrence.start, recurrence.end = unfused, None
        if self.ffn is not None and self.ffn_norm is not None:
            x, h = drop.add(x, y, self.ffn_norm)
            y = self.ffn(h)
        return x, y, after, Past(past, recurrence)

    def _streams_fused(self) -> dict[str, tuple[int, ...]]:
        return {site: layers for site, layers in self.reads.items() if site not in self.state_sites}

    def _first_maps(self) -> list[Tensor]:
        """Weights of what the connections map x by that fuse in one pass, in their order."""
        connections: list[Any] = [self.dense[site] for site in self._streams_fused()]
        return [weight for connection in connections if connection.takes_raw() for weight in connection.first_map()]

    def _connected(
        self, h: Tensor, raw: Streams, history: Sequence[Past], mapped: Iterator[Tensor]
    ) -> tuple[Streams, Streams]:
        """Streams with the sources fused in, and those that later layers read."""
        declared = {stream.name: stream for stream in self.core.streams}
        left = self._left_raw(h, declared)
        connected = self._streams_fused()
        streams = self.core.finished(raw, besides=left & connected.keys())
        past = {name: (raw if name in left else streams)[name] for name in self.streams_read}
        for site, layers in connected.items():
            connection: Any = self.dense[site]
            sources = tuple(history[i].streams[site] for i in layers)
            if not connection.takes_raw():
                streams[site] = connection(h, streams[site], sources)
                continue
            stream = declared[site] if site in left else Stream(site, declared[site].width)
            given = RawStreams((raw if site in left else streams)[site], sources, stream)
            streams[site], own = connection.fuse_raw(h, given, [next(mapped) for _ in connection.first_map()])
            if site in past:
                past[site] = own
        return streams, past

    def _left_raw(self, x: Tensor, declared: Mapping[str, Stream]) -> set[str]:
        # A CPU does what costs exponentials once, for all that read a stream.
        return self.raw if x.is_cuda else {name for name in self.raw if declared[name].activation == "none"}

    def _mix(self, h: Tensor, streams: Streams, state: State, history: Sequence[Past]) -> tuple[Tensor, State]:
        if not self.state_sites:
            return self.core.mix(streams, state)
        reads = {}
        for site in self.state_sites:
            sources = tuple(found for i in self.reads[site] if (found := history[i].recurrence) is not None)
            reads[site] = StateReads(h, self.dense[site], sources)  # type: ignore[arg-type]
        return self.core.mix(streams, state, reads)  # type: ignore[call-arg]

    def _fuses_its_state(self) -> bool:
        return any(site.form == "carried" for site in self.state_sites.values())

    def state(self, own: State, past: Past) -> State:
        """What this block hands to the next piece, once all layers have run."""
        if past.recurrence is None or not self._fuses_its_state():
            return own
        return FusedState(own, past.recurrence.end)

    def mixing_flops(self) -> float:
        """FLOPs per token of the core's recurrence and of those that it runs again; see `CoreModule.mixing_flops`."""
        again = sum(site.flops * len(self.reads[name]) for name, site in self.state_sites.items())
        return self.core.mixing_flops() + again


def connect(blocks: Sequence[Block], index: int, dense: DenseSpec, model: ModelSpec) -> None:
    """Give block `index` its dense connections; raises InputError for a site that the core or a source cannot serve."""
    if dense.span == 0:
        return
    block = blocks[index]
    for site in dense.chosen_sites(block.core):
        found = ((i, _counterpart(site, blocks[i].core)) for i in dense.pattern.layers(index, dense.span))
        sources = {i: place for i, place in found if place is not None}
        if sources:
            block.reads[site.name] = tuple(sources)
            if isinstance(site, StateSite):
                block.state_sites[site.name] = site
        elif dense.owners != "every":
            continue
        for i, place in sources.items():
            if isinstance(site, Stream):
                blocks[i].streams_read.add(site.name)
            else:
                blocks[i].state_readers += 1
                _check_sizes(site, index, place, i)  # type: ignore[arg-type]
        widths = [place.width for place in sources.values()] or [site.width]
        block.dense[site.name] = dense.build(site, model.width, widths, model.norm_eps)


def leave_raw(blocks: Sequence[Block]) -> None:
    """Find the streams that no layer need see finished before its own fusion: all layers do the same to them, and all
    their connections can finish what they read."""
    declared: dict[str, set[Stream]] = {}
    for block in blocks:
        for stream in block.core.streams:
            declared.setdefault(stream.name, set()).add(stream._replace(width=0, dense=True))
    connected = [(name, block.dense[name]) for block in blocks for name in block.reads if name in declared]
    refused = {name for name, connection in connected if not connection.takes_raw()}  # type: ignore[operator]
    chosen = {name for name, _ in connected if len(declared[name]) == 1} - refused
    for block in blocks:
        block.raw = chosen & {stream.name for stream in block.core.streams}


def _counterpart(site: Stream | StateSite, core: CoreModule) -> Stream | StateSite | None:
    """What `site` would read of an earlier core, if that has such a thing."""
    if isinstance(site, Stream):
        return next((stream for stream in core.streams if stream.dense and stream.name == site.name), None)
    return next((place for place in core.state_sites if place.family == site.family), None)


def _check_sizes(site: StateSite, layer: int, source: StateSite, source_layer: int) -> None:
    def told(sizes: Mapping[str, int]) -> str:
        return ", ".join(f"{name}={size}" for name, size in sizes.items())

    if site.sizes != source.sizes:
        raise InputError(
            f"site {site.name} of layer {layer} (counted from 0) reads the state of layer {source_layer}, which has "
            f"{told(source.sizes)} where it has {told(site.sizes)}: make them equal, or leave the site out there"
        )
