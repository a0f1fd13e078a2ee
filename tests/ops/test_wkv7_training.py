"""A training with the chunked WKV-7's roundings ends where one with the scalar kernels' does. wkv7_training.py makes
the whole table, of several seeds."""

from __future__ import annotations

import pytest

from tests.ops.wkv7_training import KERNELS, train_demo


@pytest.mark.slow
def test_the_demo_learns_with_the_roundings_of_tensor_cores(tmp_path):
    """The scalar kernels' roundings give 196 to 199 of 200 and a loss of 0.0017 to 0.0023 over five seeds
    (docs/results.md), two bits of mantissa everywhere 194 and 0.0027. The margin is for other processors' sums."""
    found = train_demo(KERNELS["rounded as on tensor cores"], 42, tmp_path / "run")
    assert found.right >= 193 and found.loss < 0.0026, found
