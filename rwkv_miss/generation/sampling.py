"""How the next token is chosen from the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rwkv_miss.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How one sequence goes on, and when it ends.

    temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
    top_p: tokens are drawn among the likeliest ones whose probabilities sum to top_p.
    max_tokens: the number of tokens after which the text ends.
    stop: strings that end the text and are not a part of it.
    seed: seed of the random sampling.

    Raises UserError where one of them is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.max_tokens < 1:
            raise UserError(
                f"temperature {self.temperature} must be at least 0, top_p {self.top_p} above 0 and at most 1, "
                f"max_tokens {self.max_tokens} at least 1"
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}; it must be from 0 to 2^63 - 1")
        if "" in self.stop:
            raise UserError("a stop string is empty; leave it out, or give it at least one character")

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The random numbers of one sequence; None where none are needed."""
        return torch.Generator(device).manual_seed(self.seed) if self.temperature > 0 else None


def mixed_seed(seed: int, *place: int) -> int:
    """A seed, from 0 to 2^63 - 1, made of another and of one place among those that must not share random numbers."""
    return int(np.random.SeedSequence((seed, *place)).generate_state(1, np.uint64)[0] >> 1)


def choose(logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator | None]) -> list[int]:
    """One token id for each sequence. What a sequence gets depends on its own row, settings and generator alone.

    Args:
        logits: fp32 (B, V), finite.
        samplings: B of them.
        generators: those of `Sampling.generator`, B of them.
    """
    chosen = logits.argmax(dim=-1)
    drawn = [i for i, sampling in enumerate(samplings) if sampling.temperature > 0]
    if drawn:
        # The floors keep the tiniest temperature and top_p from 0 / 0: in fp32 they are 0.
        temperature = logits.new_tensor([[max(samplings[i].temperature, 1e-30)] for i in drawn])
        top_p = logits.new_tensor([[max(samplings[i].top_p, 1e-30)] for i in drawn])
        rows = logits[drawn]
        below_best = rows - rows.amax(dim=-1, keepdim=True)
        probs, order = torch.softmax(below_best / temperature, dim=-1).sort(dim=-1, descending=True)
        # A token stays while those before it have not filled top_p: the likeliest always does.
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0)
        picks = [
            torch.multinomial(row, 1, generator=generators[i]) for i, row in zip(drawn, probs.split(1), strict=True)
        ]
        chosen[drawn] = order.gather(1, torch.cat(picks)).squeeze(1)
    return chosen.tolist()
