"""The vectors of compiled loops: arithmetic, and an exponential that is right to the last place."""

from __future__ import annotations

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from dense_lab_kernels._vector import WIDTH, exp, load, store, total  # noqa: E402 - needs numba

# As the loops of the operations, but not kept on disk: numba would not notice a change of _vector.py.
loop = numba.njit(fastmath={"contract"}, error_model="numpy", _nrt=False)


@loop
def exponentials(x, out):
    for at in range(0, x.size, WIDTH):
        store(out, at, exp(load(x, at)))


@loop
def arithmetic(a, b, scale, out, sums):
    x, y = load(a, 0), load(b, 0)
    store(out, 0, (x + y) * scale - y / x + scale / y - (scale - x))
    sums[0] = total(x)


@pytest.mark.parametrize(("dtype", "largest"), [(np.float32, 87.0), (np.float64, 700.0)])
def test_exponential_is_within_one_unit_in_the_last_place(dtype: type, largest: float) -> None:
    around_zero = np.linspace(-2.0, 2.0, 4096)
    x = np.concatenate([np.linspace(-largest, largest, 65536), around_zero, around_zero * 1e-6]).astype(dtype)
    found = np.empty_like(x)
    exponentials(x, found)
    exact = np.exp(x.astype(np.longdouble))
    assert np.max(np.abs(found - exact) / np.spacing(exact.astype(dtype))) <= 1.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exponential_at_the_ends_of_the_range(dtype: type) -> None:
    x = np.zeros(WIDTH, dtype)
    x[:6] = 0.0, -0.0, -np.inf, np.inf, np.nan, -1e6
    found = np.empty_like(x)
    exponentials(x, found)
    assert found[0] == found[1] == 1.0
    assert 0 <= found[2] == found[5] <= 2 * np.finfo(dtype).tiny
    assert np.finfo(dtype).max / 2 <= found[3]
    assert np.isnan(found[4])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arithmetic_with_vectors_and_numbers(dtype: type) -> None:
    a, b = np.arange(1, WIDTH + 1, dtype=dtype), np.arange(2, WIDTH + 2, dtype=dtype)
    scale, out, sums = dtype(3), np.empty_like(a), np.empty(1, dtype)
    arithmetic(a, b, scale, out, sums)
    assert np.allclose(out, (a + b) * scale - b / a + scale / b - (scale - a), rtol=4 * np.finfo(dtype).eps)
    assert sums[0] == a.sum()
