"""Fixtures for the tests of the recurrences."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import WKV6, WKV7, WkvCase


@pytest.fixture(params=[WKV6, WKV7], ids=lambda x: x.name)
def wkv(request) -> WkvCase:
    return request.param


@pytest.fixture
def poisoned():
    """torch.empty and its kin return NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
