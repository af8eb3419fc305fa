"""Whatever `dense-lab tune` may try, the results stay right: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from dense_lab_kernels import _tuned, watching
from dense_lab_kernels._dispatch import Call
from dense_lab_kernels.tuning import _others
from dense_lab_kernels.verify import judge, repeated

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU (README.md here)"
)
DEVICE = "cpu" if INTERPRETED else "cuda"


def draw(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).to(DEVICE).requires_grad_()


def fusion() -> object:
    from dense_lab_kernels import dense_fuse

    return dense_fuse(draw(5, 33), (draw(5, 33),), draw(5, 33), draw(33), activation="silu", impl="triton")


def attention() -> object:
    from dense_lab_kernels import decay_attention

    decay = -torch.rand(2, device=DEVICE)
    return decay_attention(draw(1, 20, 2, 17), draw(1, 20, 2, 17), draw(1, 20, 2, 9), decay, impl="triton")


@pytest.mark.parametrize("operation", [fusion, attention])
def test_every_choice_gives_right_results(operation) -> None:
    with watching() as calls:
        operation()
    (call,) = calls.values()
    assert isinstance(call, Call)
    with _tuned.trying({}) as met:
        repeated(call)()
    tried = 0
    for key, rule in met.items():
        # In the interpreter warps and stages mean nothing, so one of each kind is enough.
        for name, value in list(_others(rule))[:: 5 if INTERPRETED else 1]:
            with _tuned.trying({key: {name: value}}):
                try:
                    verdict = judge(call)
                except ValueError as error:  # the rule refuses what does not fit together
                    assert "must divide" in str(error)
                    continue
            assert verdict.ok, (key, name, value, verdict)
            tried += 1
    assert tried
