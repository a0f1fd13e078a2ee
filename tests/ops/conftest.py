"""Fixtures for the tests of the WKV ops."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import WKV6, WKV7, WkvCase


@pytest.fixture(params=[WKV6, WKV7], ids=lambda x: x.name)
def wkv(request) -> WkvCase:
    """Each op in turn."""
    return request.param


@pytest.fixture
def poisoned():
    """New memory (torch.empty and the like) is filled with NaN, so that an element that nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
