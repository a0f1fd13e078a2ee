"""Tests of WKV-7 alone: the reference equals another form of its definition, and extreme decays are right."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from rwkv_miss.ops import wkv7
from tests.ops.cases import WKV7, odd_starts


def test_the_reference_is_the_product_of_dense_transition_matrices():
    inputs, state = WKV7.make_inputs(9, 6, torch.float64, batch=1, n_head=1)
    start = torch.zeros(1, 9, dtype=torch.bool)
    start[0, 4] = True
    y, last = wkv7(*inputs, state, start, backend="reference")
    r, z, k, v, a, b = (x[0, :, 0].numpy() for x in inputs)
    # Row by row of the state: s_t = s_{t-1} M_t + v_t k_t^T with M_t = diag(d_t) + a_t b_t^T.
    matrices = [np.diag(np.exp(-np.exp(-0.5) / (1 + np.exp(-z[t])))) + np.outer(a[t], b[t]) for t in range(9)]
    for t in range(9):
        first = 4 if t >= 4 else 0
        total = np.zeros((6, 6)) if t >= 4 else state[0, 0].numpy()
        if t < 4:
            total = total @ np.linalg.multi_dot([*matrices[: t + 1], np.eye(6)])
        for s in range(first, t + 1):
            term = np.outer(v[s], k[s])
            total = total + functools.reduce(np.matmul, matrices[s + 1 : t + 1], term)
        np.testing.assert_allclose(y[0, t, 0].numpy(), total @ r[t], rtol=1e-12)
    np.testing.assert_allclose(last[0, 0].numpy(), total, rtol=1e-12)


# At z = 6 the gradient of z is small but not lost; at 100 the sigmoid is exactly 1, at -100 almost 0.
@pytest.mark.parametrize("z_shift", [100.0, 6.0, -6.0, -100.0])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_strongest_and_weakest_decay(backend, z_shift, poisoned):
    inputs, state = WKV7.make_inputs(100, 32)
    inputs[1] += z_shift
    WKV7.assert_matches_reference(WKV7.with_backend(backend), inputs, state, odd_starts(100))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_one_key_that_is_written_again_and_again(backend, poisoned):
    """Equal keys, a rate of 1 and next to no decay: what a step writes, the next replaces, so that sums over a piece of
    steps have terms much larger than themselves."""
    inputs, state = WKV7.make_inputs(100, 64)
    _, z, _, _, a, b = inputs
    z[:] = -8
    a[:] = a[:, :1, :1]
    b[:] = -a
    WKV7.assert_matches_reference(WKV7.with_backend(backend), inputs, state, odd_starts(100))
