"""Adapters of random tensors, and whether a member of a batch got what its adapter gives alone."""

from __future__ import annotations

from pathlib import Path

import torch

from rwkv_miss import AdapterConfig, inject, load_adapter, load_model, save_adapter
from rwkv_miss.adapters.inject import trained_parameters
from rwkv_miss.data.tokenizers import END
from rwkv_miss.generation.engine import Piece
from tests.generation.letters import ids_of


def save(base: Path, folder: Path, config: AdapterConfig, seed: int) -> Path:
    """Writes an adapter of random tensors."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = inject(load_model(base), config)
        for p in trained_parameters(model).values():
            p.data += 0.2 * torch.randn(p.shape)
    save_adapter(model, folder)
    return folder


def load(base: Path, dtype: torch.dtype, folder: Path | None = None):
    """The model with that adapter alone, as runs and evaluations have it; greedily it never chooses the end token."""
    model = load_model(base, dtype)
    model = load_adapter(model, folder) if folder else model
    model.head.weight.data[END] = 0
    return model.eval()


def told(pieces: list[Piece], member: int) -> torch.Tensor:
    """The log-probabilities (T, 64) at the places of the member's tokens, which asked for 20, as NaN where untold."""
    found = torch.full((len(ids_of(pieces, member)), 64), torch.nan)
    for row, place in enumerate(p for piece in pieces if piece.member == member for p in piece.logprobs):
        for token, log_p in place.top:
            found[row, token] = log_p
    return found


@torch.no_grad()
def check(model, prompt: list[int], pieces: list[Piece], member: int, tolerance: float) -> None:
    """Each of the member's tokens is the likeliest one after those before it, with that log-probability."""
    ids = ids_of(pieces, member)
    log_p = model(torch.tensor([prompt + ids[:-1]]))[0][0, len(prompt) - 1 :].float().log_softmax(-1)
    found = told(pieces, member)
    assert len(ids) and log_p.argmax(-1).tolist() == ids == found.nan_to_num(-torch.inf).argmax(-1).tolist()
    assert (found.isfinite().sum(-1) == 20).all()
    assert ((found - log_p).abs().nan_to_num(0) < tolerance).all()
