"""How the next token is chosen from the logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_miss.errors import UserError

MOST_LOGPROBS = 20
"""As in OpenAI's API."""


@dataclass(frozen=True)
class Sampling:
    """How one sequence goes on, and when it ends.

    temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
    top_p: tokens are drawn among the likeliest ones whose probabilities sum to top_p.
    max_tokens: the number of tokens after which the text ends.
    stop: strings that end the text and are not a part of it.
    seed: seed of the random sampling.
    logprobs: how many of the likeliest tokens are told at each place, with their log-probabilities and that of the
        chosen one (`TokenLogprob`); at most `MOST_LOGPROBS`. None: nothing is told.
    presence_penalty, frequency_penalty: what is taken from the logit of every token that the text has already, once,
        and for each time that it has it: from -2 to 2, as in OpenAI's API.
    logit_bias: token id -> what is added to its logit: from -100 to 100, as there.

    Raises UserError where one of them is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

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
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise UserError(f"logprobs is {self.logprobs}; it must be from 0 to {MOST_LOGPROBS}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise UserError(f"{name} is {getattr(self, name)}; it must be from -2 to 2")
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise UserError(f"logit_bias of token {token} is {bias}; it must be from -100 to 100")

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The random numbers of one sequence; None where none are needed."""
        return torch.Generator(device).manual_seed(self.seed) if self.temperature > 0 else None


def mixed_seed(seed: int, *place: int) -> int:
    """A seed, from 0 to 2^63 - 1, made of another and of one place among those that must not share random numbers."""
    return int(np.random.SeedSequence((seed, *place)).generate_state(1, np.uint64)[0] >> 1)


class TokenLogprob(NamedTuple):
    """The log-probability that the model gives to a chosen token, and the likeliest tokens with theirs, by the logits
    as they are: before temperature, top_p, penalties and biases."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def adjust(logits: Tensor, samplings: Sequence[Sampling], written: Sequence[Mapping[int, int]]) -> Tensor:
    """The logits with each sequence's penalties and biases.

    Args:
        logits: fp32 (B, V); not changed.
        samplings: B of them.
        written: of each sequence, how often its text has each token.
    """
    found = logits
    for row, (sampling, counts) in enumerate(zip(samplings, written, strict=True)):
        presence, frequency = sampling.presence_penalty, sampling.frequency_penalty
        changes = Counter(sampling.logit_bias)
        if presence or frequency:
            changes.subtract({token: presence + frequency * count for token, count in counts.items()})
        if changes:
            found = logits.clone() if found is logits else found
            found[row, list(changes)] += found.new_tensor(list(changes.values()))
    return found


def log_probabilities(
    logits: Tensor, tokens: Sequence[int], samplings: Sequence[Sampling]
) -> list[tuple[TokenLogprob, ...]]:
    """Of each sequence, what its `Sampling.logprobs` asks for at one place: one `TokenLogprob` or none.

    Args:
        logits: fp32 (B, V).
        tokens: the chosen ones.
    """
    asked = [row for row, sampling in enumerate(samplings) if sampling.logprobs is not None]
    found: list[tuple[TokenLogprob, ...]] = [()] * len(samplings)
    if not asked:
        return found
    log_p = logits[asked].log_softmax(dim=-1)
    top = log_p.topk(min(MOST_LOGPROBS, log_p.shape[-1]))
    for row, log_ps, values, ids in zip(asked, log_p, top.values.tolist(), top.indices.tolist(), strict=True):
        likeliest = tuple(zip(ids, values, strict=True))[: samplings[row].logprobs]
        found[row] = (TokenLogprob(tokens[row], log_ps[tokens[row]].item(), likeliest),)
    return found


def choose(logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator | None]) -> list[int]:
    """One token id for each sequence. What a sequence gets depends on its own row, settings and generator alone.

    Args:
        logits: fp32 (B, V), finite.
        samplings: B of them.
        generators: those of `Sampling.generator`, B of them.
    """
    chosen = logits.max(dim=-1).indices  # argmax takes twice as long on a CPU
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
