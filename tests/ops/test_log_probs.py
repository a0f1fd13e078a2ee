"""The loss computed in pieces equals the loss computed at once, and the head sees no position without loss."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from rwkv_miss.ops import log_probs
from rwkv_miss.ops.log_probs import target_log_probs


@pytest.mark.parametrize("max_logits", [11 * 4, 11, 1, 2**20])
def test_pieces(monkeypatch, max_logits):
    monkeypatch.setattr(log_probs, "_MAX_LOGITS", max_logits)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 5, generator=g, requires_grad=True)
    weight = torch.randn(11, 5, generator=g, requires_grad=True)
    targets = torch.randint(11, (2, 9), generator=g)
    targets[:, ::3] = -100
    seen = []

    def head(h):
        seen.append(len(h))
        return h @ weight.T

    found = -target_log_probs(hidden, head, targets, 11)
    assert sum(seen) == 12 and max(seen) == min(12, max(1, max_logits // 11))
    exact = cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
    torch.testing.assert_close(found, exact)
    for mine, theirs in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (found, exact)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_no_loss_at_all_is_zero_with_a_gradient_of_zeros():
    hidden = torch.randn(1, 3, 5, requires_grad=True)
    found = target_log_probs(hidden, lambda h: h @ torch.ones(5, 7), torch.full((1, 3), -100), 7)
    assert found == 0
    assert not torch.autograd.grad(found, hidden)[0].any()
