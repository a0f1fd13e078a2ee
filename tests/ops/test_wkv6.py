"""Tests of WKV-6 alone: the reference equals another form of its definition, and extreme decays are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rwkv_miss.ops import wkv6
from tests.ops.cases import WKV6, odd_starts, run

FAST = ("torch", "cpu")


def test_the_reference_is_attention_with_decay():
    inputs, state = WKV6.make_inputs(9, 6, torch.float64, batch=1, n_head=1)
    start = torch.zeros(1, 9, dtype=torch.bool)
    start[0, 4] = True
    y, last = wkv6(*inputs, state, start, backend="reference")
    r, k, v, w = (x[0, :, 0].numpy() for x in inputs[:4])
    u, d = inputs[4][0].numpy(), np.exp(-np.exp(w))
    for t in range(9):
        first = 4 if t >= 4 else 0
        total = (r[t] * u * k[t]).sum() * v[t]
        for s in range(first, t):
            total = total + (r[t] * d[s + 1 : t].prod(0) * k[s]).sum() * v[s]
        if t < 4:
            total = total + (r[t] * d[:t].prod(0)) @ state[0, 0].numpy()
        np.testing.assert_allclose(y[0, t, 0].numpy(), total, rtol=1e-12)
    end = sum(np.outer(d[s + 1 :].prod(0) * k[s], v[s]) for s in range(4, 9))
    np.testing.assert_allclose(last[0, 0].numpy(), end, rtol=1e-12)


# Decays of 0.9997, 1e-4, 2e-24 and, in float32, 0. The rounding of exp(w) alone puts a decay exp(-exp(w)) off by
# 6e-8 exp(w): hence the tolerance.
@pytest.mark.parametrize("w", [-8.0, 2.22, 4.0, 5.0, 6.0])
@pytest.mark.parametrize("backend", FAST)
def test_weakest_and_strongest_decay(backend, w, poisoned):
    inputs, state = WKV6.make_inputs(100, 32)
    inputs[3] = w + 0.1 * torch.rand_like(inputs[3])
    WKV6.assert_matches_reference(WKV6.with_backend(backend), inputs, state, odd_starts(100), tolerance=2e-5)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_decay_of_zero_has_a_gradient_of_zero(backend):
    inputs, state = WKV6.make_inputs(40, 8)
    inputs[3][:, ::3] = torch.tensor([5.0, 60.0, 90.0, 1e4] * 2)  # exp(90) is infinite in float32
    results = run(WKV6.with_backend(backend), inputs, state, None, WKV6.make_weights(inputs, state))
    dw = results[WKV6.results.index("dw")]
    assert all(x.isfinite().all() for x in results)
    assert (dw[:, ::3] == 0).all() and (dw[:, 1::3] != 0).any()


@pytest.mark.parametrize("name", ["r", "k", "v", "w", "u"])
@pytest.mark.parametrize("backend", FAST)
def test_what_is_not_a_number_is_not_hidden(backend, name):
    inputs, state = WKV6.make_inputs(3, 8)
    inputs[WKV6.inputs.index(name)].fill_(float("nan"))
    assert wkv6(*inputs, state, backend=backend)[0][:, -1].isnan().all()
