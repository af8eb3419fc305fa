"""Decay attention on a GPU: the passes made of the kernels in `triton_kernels`, and their gradient.

The forward is three launches (states, scores, output), the backward five more. States and scores are kept between the
two where they take no more memory than q, k and v, and else computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from dense_lab_kernels._triton import Launch, Sm90Case, applied, cdiv, compile_once, power_of_2, unsupported_place
from dense_lab_kernels.decay_attention import triton_kernels as kernels
from dense_lab_kernels.decay_attention import triton_step
from dense_lab_kernels.decay_attention.triton_launch import Tile, Tiles, collecting, run, tiles_for

__all__ = ["decay_attention", "sm90_cases", "unsupported"]

# Head sizes are filled up with zeros, and tensors copied, until every row starts at a multiple of this many elements:
# loads are wide then, and one set of binaries serves all sizes.
_ALIGNED = 16
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, initial_state: Tensor | None = None
) -> str | None:
    """Why these arguments cannot run here, or None."""
    if v.dtype not in _DTYPES:
        return f"it computes in float32 and takes no {v.dtype}"
    return unsupported_place(v)


def decay_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output [B, T, H, V] in v's dtype and final state [B, H, K, V] in float32; arguments as in the public function."""
    if triton_step.serves(q, k, v, log_decay, initial_state):
        return triton_step.step(q, k, v, log_decay, initial_state)
    common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    if log_decay.ndim == 1 and log_decay.requires_grad and torch.is_grad_enabled():
        # Its gradient is that of a decay per token, summed.
        log_decay = log_decay.expand(v.shape[:3])
    tensors = q.to(common), k.to(common), v.to(common), log_decay.float()
    if initial_state is not None:
        initial_state = initial_state.float()
    if q.shape[3] % _ALIGNED == 0 and v.shape[3] % _ALIGNED == 0:
        output, final_state = applied(_DecayAttention, *tensors, initial_state)
    else:
        output, final_state = _padded(*tensors, initial_state)
    return output.to(v.dtype), final_state


def _padded(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Head sizes filled up with zeros, and results cut again."""
    key_size, value_size = q.shape[3], v.shape[3]
    keys, values = (0, -key_size % _ALIGNED), (0, -value_size % _ALIGNED)
    if initial_state is not None:
        initial_state = pad(initial_state, (*values, *keys))
    output, final_state = applied(_DecayAttention, pad(q, keys), pad(k, keys), pad(v, values), log_decay, initial_state)
    return output[..., :value_size], final_state[..., :key_size, :value_size]


@dataclass(frozen=True)
class _Problem:
    """Sizes and choices of one call. `decay` is what the kernels read: [H], or the sums [B, H, T]."""

    batch: int
    tokens: int
    heads: int
    groups: int
    key_size: int
    value_size: int
    per_token: bool
    tiles: Tiles

    @staticmethod
    def of(q: Tensor, v: Tensor, log_decay: Tensor) -> _Problem:
        batch, tokens, heads, value_size = v.shape
        groups, key_size = q.shape[2:]
        tiles = tiles_for(key_size, value_size, heads // groups, tokens, v.dtype)
        return _Problem(batch, tokens, heads, groups, key_size, value_size, log_decay.ndim == 3, tiles)

    @property
    def per_group(self) -> int:
        return self.heads // self.groups

    @property
    def chunks(self) -> int:
        return cdiv(self.tokens, self.tiles.chunk)

    def kept(self, per_token: int) -> bool:
        """Whether the backward gets, rather than computes again, what takes so many elements per token.

        That is at most as many as q, k and v together: keeping states and scores at most trebles what is kept.
        """
        return per_token <= 2 * self.groups * self.key_size + self.heads * self.value_size

    @property
    def keeps_states(self) -> bool:
        return self.kept(self.heads * self.key_size * self.value_size // self.tiles.chunk)

    @property
    def keeps_scores(self) -> bool:
        return self.kept(self.groups * self.tiles.chunk)

    def options(self, tile: Tile, like: Tensor) -> dict[str, Any]:
        # float32 results must be as good as float32 arithmetic: three tf32 products come close enough, one does not.
        precision = "tf32x3" if like.dtype == torch.float32 else "tf32"
        return {
            "C": self.tiles.chunk,
            "PER_TOKEN": self.per_token,
            "PRECISION": precision,
            **tile.options(),
        }


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.stride()[:3]


def _aligned(tensor: Tensor) -> Tensor:
    fits = tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0 and not any(n % _ALIGNED for n in _strides(tensor))
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def _decay(problem: _Problem, log_decay: Tensor) -> Tensor:
    if not problem.per_token:
        return log_decay.contiguous()
    p = problem
    sums = log_decay.new_empty(p.batch, p.heads, p.tokens)
    block = min(power_of_2(p.heads), 16)
    run(
        kernels.sum_decays_kernel,
        p.batch * p.chunks * cdiv(p.heads, block),
        log_decay,
        sums,
        *log_decay.stride(),
        p.tokens,
        p.heads,
        p.chunks,
        C=p.tiles.chunk,
        BH=block,
        num_warps=4,
    )
    return sums


def _weighed(problem: _Problem, x: Tensor, decay: Tensor, direction: str) -> Tensor:
    """k (or q, "backward") as it enters the states, so that their kernel multiplies what it reads as it is."""
    p = problem
    out = x.new_empty(x.shape)
    block = min(p.tiles.chunk, 32)
    run(
        kernels.weigh_kernel,
        p.batch * p.heads * p.chunks * (p.tiles.chunk // block),
        x,
        out,
        decay,
        *_strides(x),
        p.tokens,
        p.heads,
        p.chunks,
        p.key_size,
        C=p.tiles.chunk,
        BT=block,
        BK=128,
        REVERSED=direction == "backward",
        PER_TOKEN=p.per_token,
        num_warps=4,
    )
    return out


def _states(
    problem: _Problem,
    x: Tensor,
    y: Tensor,
    decay: Tensor,
    initial: Tensor | None,
    final: Tensor | None,
    direction: str,
) -> Tensor:
    """States before each chunk of a walk over k and v ("forward"), or over q and dO ("backward")."""
    p, tile = problem, problem.tiles.states
    if p.tiles.weighed:
        x = _weighed(p, x, decay, direction)
    states = x.new_empty(p.batch, p.chunks, p.heads, p.key_size, p.value_size)
    run(
        kernels.states_kernel,
        p.batch * p.heads * cdiv(p.key_size, tile.rows) * cdiv(p.value_size, tile.cols),
        x, y, decay, decay if initial is None else initial, states, decay if final is None else final,
        int(initial is not None), int(final is not None), int(direction == "backward"), *_strides(x), *_strides(y),
        p.tokens, p.heads, p.per_group, p.chunks, p.key_size, p.value_size,
        BT=tile.depth, BK=tile.rows, BV=tile.cols, WEIGHED=p.tiles.weighed,
        EVEN_K=p.key_size % tile.rows == 0, EVEN_V=p.value_size % tile.cols == 0, **p.options(tile, x),
    )  # fmt: skip
    return states


def _scores(
    problem: _Problem, x: Tensor, y: Tensor, decay: Tensor, tile: Tile, of_decay: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """A from q and k, or dA from dO and v: one per group, so either bare (A) or summed over heads (dA) if R > 1.

    of_decay: A, and where to write the sums that the gradient of the log decay needs.
    """
    p = problem
    shared = p.per_group > 1
    side = p.tiles.chunk // tile.rows
    scores = x.new_empty(p.batch, p.chunks, p.groups, p.tiles.chunk, p.tiles.chunk)
    run(
        kernels.scores_kernel,
        p.batch * p.groups * p.chunks * (side * (side + 1) // 2),
        x,
        y,
        decay,
        scores,
        *(of_decay or (scores, decay)),
        *_strides(x),
        *_strides(y),
        p.tokens,
        p.heads,
        p.per_group,
        p.chunks,
        x.shape[3],
        BM=tile.rows,
        BD=tile.depth,
        DECAYED=not shared,
        SUM_HEADS=shared and x.shape[2] != p.groups,
        OF_DECAY=of_decay is not None,
        EVEN_M=x.shape[3] % tile.depth == 0,
        **p.options(tile, x),
    )
    return scores


def _apply(
    problem: _Problem,
    x: Tensor,
    states: Tensor,
    scores: Tensor,
    z: Tensor,
    decay: Tensor,
    of: str,
    of_decay: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """scale * (x states) + scores z; `of` names the result: "o", "dv", "dq" or "dk".

    of_decay: q (for dq) or k (for dk), and where to write the sums that the gradient of the log decay needs.
    """
    p = problem
    of_keys = of in ("dq", "dk")
    tile = p.tiles.keys if of_keys else p.tiles.values
    units, size = (p.groups, p.key_size) if of_keys else (p.heads, p.value_size)
    depth_size = p.value_size if of_keys else p.key_size
    out = x.new_empty(p.batch, p.tokens, units, size)
    own, sums = of_decay or (z, decay)
    run(
        kernels.apply_kernel,
        p.batch * units * p.chunks * (p.tiles.chunk // tile.rows) * cdiv(size, tile.cols),
        x, states, scores, z, decay, out, own, sums, *_strides(x), *_strides(z), *_strides(own),
        p.tokens, p.heads, p.per_group, p.chunks, depth_size, size,
        BM=tile.rows, BN=tile.cols, BD=tile.depth, BJ=min(tile.rows, 64 if x.element_size() == 2 else 32),
        REVERSED=of in ("dv", "dk"), OF_KEYS=of_keys, SHARED=p.per_group > 1, OF_DECAY=of_decay is not None,
        EVEN_M=depth_size % tile.depth == 0, EVEN_N=size % tile.cols == 0, **p.options(tile, x),
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class _DecaySums:
    """What the kernels of the backward leave for the gradient of the log decay."""

    scores: Tensor
    q: Tensor
    k: Tensor

    @staticmethod
    def empty(p: _Problem, like: Tensor) -> _DecaySums:
        side, key_tiles = p.tiles.chunk // p.tiles.score_grads.rows, cdiv(p.key_size, p.tiles.keys.cols)
        shapes = ((2, side), (key_tiles,), (key_tiles,))
        make = torch.empty
        return _DecaySums(*(make(*s, p.batch, p.heads, p.tokens, device=like.device) for s in shapes))


def _decay_gradient(
    problem: _Problem,
    sums: _DecaySums,
    states: tuple[Tensor, Tensor],
    ends: tuple[Tensor | None, Tensor | None],
    decay: Tensor,
) -> Tensor:
    """Gradient of the log decay [B, T, H]. states: with their gradients; ends: initial state, final gradient."""
    p = problem
    initial, final_grad = ends
    gradient = torch.empty(p.batch, p.tokens, p.heads, dtype=torch.float32, device=decay.device)
    run(
        kernels.decay_gradient_kernel,
        p.batch * p.chunks * p.heads,
        sums.scores,
        sums.q,
        sums.k,
        *states,
        decay if initial is None else initial,
        decay if final_grad is None else final_grad,
        decay,
        gradient,
        int(initial is not None),
        int(final_grad is not None),
        sums.scores.shape[1],
        sums.q.shape[0],
        p.batch,
        p.tokens,
        p.heads,
        p.chunks,
        p.key_size * p.value_size,
        C=p.tiles.chunk,
        BM=p.tiles.score_grads.rows,
        BS=2048,
        num_warps=4,
    )
    return gradient


def _forward(
    problem: _Problem, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and final state; states and scores."""
    p = problem
    final = torch.empty(p.batch, p.heads, p.key_size, p.value_size, dtype=torch.float32, device=v.device)
    states = _states(p, k, v, decay, initial, final, "forward")
    scores = _scores(p, q, k, decay, p.tiles.scores)
    return _apply(p, q, states, scores, v, decay, "o"), final, states, scores


@dataclass(frozen=True)
class _Saved:
    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    initial: Tensor | None
    states: Tensor | None  # None: not kept
    scores: Tensor | None
    of_decay: bool


def _backward(
    problem: _Problem, saved: _Saved, out_grad: Tensor, final_grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, log decay (if asked for) and initial state (if there is one)."""
    p, s = problem, saved
    initial_grad = None if s.initial is None else torch.empty_like(s.initial)
    sums = _DecaySums.empty(p, s.v) if s.of_decay else None
    states = _states(p, s.k, s.v, s.decay, s.initial, None, "forward") if s.states is None else s.states
    state_grads = _states(p, s.q, out_grad, s.decay, final_grad, initial_grad, "backward")
    scores = _scores(p, s.q, s.k, s.decay, p.tiles.scores) if s.scores is None else s.scores
    v_grad = _apply(p, s.k, state_grads, scores, out_grad, s.decay, "dv")
    score_grads = _scores(p, out_grad, s.v, s.decay, p.tiles.score_grads, sums and (scores, sums.scores))
    q_grad = _apply(p, out_grad, states, score_grads, s.k, s.decay, "dq", sums and (s.q, sums.q))
    k_grad = _apply(p, s.v, state_grads, score_grads, s.q, s.decay, "dk", sums and (s.k, sums.k))
    decay_grad = sums and _decay_gradient(p, sums, (states, state_grads), (s.initial, final_grad), s.decay)
    return q_grad, k_grad, v_grad, decay_grad, initial_grad


def _launches(
    problem: _Problem, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, gradients: tuple[bool, bool]
) -> list[Launch]:
    """The different launches of a forward and, if gradients[0], a backward; gradients[1]: that of log_decay too."""
    p = problem
    q, k, v, log_decay = (
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in (q, k, v, log_decay)
    )
    with collecting() as launches:
        decay = _decay(p, log_decay)
        output, _final, states, scores = _forward(p, q, k, v, decay, None)
        if gradients[0]:
            saved = _Saved(q, k, v, decay, None, states, scores, gradients[1])
            _backward(p, saved, torch.empty_like(output), None)
    return list(launches.values())


def _compile(
    problem: _Problem, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, gradients: tuple[bool, bool]
) -> None:
    """Compile all kernels of this class of problem at once, at its first use."""
    p = problem
    sizes = (p.key_size, p.value_size, p.per_group > 1, p.per_token, p.tiles)
    key = ("decay_attention", v.device, v.dtype, sizes, gradients)
    compile_once(key, lambda: _launches(p, q, k, v, log_decay, gradients))


class _DecayAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, initial: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (_aligned(x) for x in (q, k, v))
        initial = None if initial is None else initial.contiguous()
        problem = _Problem.of(q, v, log_decay)
        of_decay = ctx.needs_input_grad[3]
        _compile(problem, q, k, v, log_decay, (any(ctx.needs_input_grad), of_decay))
        decay = _decay(problem, log_decay)
        output, final, states, scores = _forward(problem, q, k, v, decay, initial)
        ctx.set_materialize_grads(False)
        ctx.problem, ctx.of_decay = problem, of_decay
        kept = states if problem.keeps_states else None, scores if problem.keeps_scores else None
        ctx.save_for_backward(q, k, v, decay, initial, *kept)
        return output, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor | None, final_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if out_grad is None and final_grad is None:
            return None, None, None, None, None
        saved = _Saved(*ctx.saved_tensors, ctx.of_decay)
        out_grad = torch.zeros_like(saved.v) if out_grad is None else _aligned(out_grad)
        final_grad = None if final_grad is None else final_grad.contiguous()
        return _backward(ctx.problem, saved, out_grad, final_grad)


_TYPES = {torch.float32: "*fp32:16", torch.bfloat16: "*bf16:16", torch.float16: "*fp16:16"}


def _sm90_case(name: str, launch: Launch) -> Sm90Case:
    kernel, options = launch.kernel, dict(launch.options)
    warps, stages = options.pop("num_warps"), options.pop("num_stages", 3)
    options.pop("maxnreg", None)
    kinds = (
        _TYPES[a.dtype] if isinstance(a, Tensor) else "i32:16" if a % 16 == 0 and a > 0 else "i32"
        for a in launch.arguments
    )
    signature = dict(zip(kernel.arg_names, kinds, strict=False))
    flags = "".join(str(int(value)) for value in options.values() if isinstance(value, bool))
    needs_wgmma = "PRECISION" in options
    return Sm90Case(f"{name}-{kernel.__name__}-{flags}", kernel, signature, options, warps, stages, needs_wgmma)


def sm90_cases() -> Iterator[Sm90Case]:
    """Every kernel of the shape classes of the rule: wide heads, square heads, SSD, odd sizes, float32."""
    shapes = {
        "wide": (1, 2, 2, 384, 1536, torch.bfloat16, "constant"),
        "square": (1, 2, 2, 128, 128, torch.bfloat16, "constant"),
        "ssd": (1, 4, 1, 128, 64, torch.bfloat16, "per token"),
        "odd": (1, 2, 2, 112, 80, torch.float16, "per token"),
        "float32": (1, 2, 2, 128, 128, torch.float32, "per token"),
    }
    for name, (batch, heads, groups, key_size, value_size, dtype, decay) in shapes.items():
        q = torch.empty(batch, 512, groups, key_size, dtype=dtype, device="meta")
        v = torch.empty(batch, 512, heads, value_size, dtype=dtype, device="meta")
        log_decay = torch.empty((heads,) if decay == "constant" else v.shape[:3], device="meta")
        problem = _Problem.of(q, v, log_decay)
        for launch in _launches(problem, q, q, v, log_decay, (True, decay != "constant")):
            yield _sm90_case(name, launch)
    yield from triton_step.sm90_cases()
