"""A fake model that generates given texts."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv_miss.model.state import State


class Scripted(torch.nn.Module):
    """Generates the given texts whatever the prompt: the first text for the sequence that begins first, and so on. Each
    step's logits favour the text's next byte, and `~` after its end."""

    def __init__(self, *texts: bytes) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(256, 1)
        self.config = type("Config", (), {"vocab_size": 256})
        self.head = torch.nn.Identity()
        self.texts = texts
        self.n_begun = 0

    def hidden(self, tokens: Tensor, state: State | None = None, seq_start: Tensor | None = None):
        rows = len(tokens)
        begins = torch.ones(rows, dtype=torch.bool) if state is None else torch.zeros(rows, dtype=torch.bool)
        if seq_start is not None:
            begins = begins | seq_start.any(dim=1)
        # Of each sequence: the number of its text, and how many bytes of it were said before.
        place = torch.zeros(rows, 2) if state is None else state.att_shift[0] + torch.tensor([0.0, 1.0])
        for row in begins.nonzero().flatten().tolist():
            place[row] = torch.tensor([self.n_begun, 0])
            self.n_begun += 1
        logits = torch.zeros(*tokens.shape, 256)
        for row, (number, at) in enumerate(place.long().tolist()):
            text = self.texts[number]
            logits[row, -1, text[at] if at < len(text) else ord("~")] = 1
        return logits, State(place[None], torch.zeros(1, rows, 1, 1, 1), torch.zeros(1, rows, 1), 7)
