"""Launch rules of the selective scan on a GPU: everything that the shapes and options of a call decide."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton

KEPT = 64  # tokens between the states that wait for the backward; every segment is a multiple of it
WARP = 32  # channels of a program that gives the gradients
TILE = 8  # tokens that the backward replays in registers


class Plan(NamedTuple):
    """Everything that the shapes, dtypes and options of one call decide."""

    batch: int
    tokens: int
    channels: int
    states: int
    padded_states: int
    groups: int
    sources: int
    carried: bool
    softplus: bool
    gated: bool
    skip: bool
    block: int  # channels of a program that walks
    tile: int  # tokens walked or replayed at a time
    stages: int  # tiles that a walk fetches ahead, the present one included
    segment: int  # tokens of a walk
    back: int  # tokens of a walk back
    span: int  # tiles of which one program gives all gradients
    limit: int | None  # registers of one of its threads, where it works on 16 bits

    @property
    def segments(self) -> int:
        return math.ceil(self.tokens / self.segment)

    @property
    def tiles(self) -> int:
        return math.ceil(self.tokens / self.tile)

    @property
    def pieces(self) -> int:
        """Kept states per sequence."""
        return math.ceil(self.tokens / KEPT)

    @property
    def spans(self) -> int:
        return math.ceil(self.tiles / self.span)

    @property
    def walks_back(self) -> int:
        return math.ceil(self.tokens / self.back)

    @property
    def spans_back(self) -> int:
        """Spans of a segment of the walk back."""
        return self.spans if self.walks_back == 1 else self.back // self.tile // self.span

    @property
    def coupled(self) -> bool:
        """Whether gradients of states are handed from one stream to another."""
        return self.carried and self.sources > 0

    @property
    def passed(self) -> bool:
        """Whether `gradients` adds to a tile what the segments behind its own pass on."""
        return self.walks_back > 1 and not self.coupled

    def check(self) -> None:
        """Fail where pieces of time do not lie within each other as the backward relies on; numbers would be wrong.

        `make_plan` sees to it; a plan that was changed by hand may not.
        """
        assert KEPT % self.tile == 0, "kept states are restored at whole tiles"
        assert self.segments == 1 or self.segment % KEPT == 0, "states are kept at whole segments"
        whole = self.walks_back == 1 or self.back % (self.tile * self.span) == 0
        assert whole, "a program of the gradients lies within one segment of the walk back"
        same = self.walks_back == self.segments and (self.segments == 1 or self.back == self.segment)
        assert same or not self.coupled, "coupled streams are walked back over the forward's segments"

    def states_of(self, pieces: int) -> tuple[int, ...]:
        return (self.sources + 1, self.batch, pieces, self.states, self.channels)

    def flags(self) -> dict[str, Any]:
        return {"CARRIED": self.coupled, "SOFTPLUS": self.softplus, "NP": self.padded_states}


def make_plan(shape: torch.Size, states: int, groups: int, sources: int, units: int, **options: bool) -> Plan:
    """Launch rules for a chip with `units` processors.

    A program is one warp. A thread that walks holds up to 16 states of a stream; the chip wants two walking warps per
    processor or more, so shorter work is cut in segments, which costs every decay once more (on the way back only where
    streams are coupled). Programs that give the gradients are many: about 160 per processor; each span of tiles has
    sums of A of its own, and lies within one segment.
    """
    batch, tokens, channels = shape
    padded = max(4, triton.next_power_of_2(states))
    per_group = channels // groups
    tile = TILE if sources == 0 else TILE // 2
    block = max(1, min(32, (512 if sources == 0 else 256) // padded))
    wanted = 2 * units
    programs = batch * groups * math.ceil(per_group / block)
    segments = 1 if programs >= wanted else math.ceil(8 * wanted / programs)
    segment = max(1, math.ceil(tokens / segments / KEPT)) * KEPT
    tiles = math.ceil(tokens / tile)
    programs = batch * groups * math.ceil(per_group / WARP)
    spans = max(1, min(tiles, max(64, 512 // batch), math.ceil(160 * units / programs)))
    return Plan(
        batch, tokens, channels, states, padded, groups, sources, **options,
        block=block, tile=tile, stages=4 if sources == 0 and segments == 1 else 3, segment=segment, back=segment,
        span=_span(tiles, spans, segment // tile if segments > 1 else tiles), limit={0: 128, 1: 168}.get(sources),
    )  # fmt: skip


def _span(tiles: int, spans: int, segment: int) -> int:
    """Tiles of a span, of which there shall be about `spans`, and a whole number in a segment of so many tiles."""
    span = math.ceil(tiles / spans)
    if segment >= tiles:
        return span
    return max(part for part in range(1, segment + 1) if segment % part == 0 and part <= 4 * span / 3)
