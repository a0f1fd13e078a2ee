"""Text from a model, many prompts at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rwkv_miss.data.tokenizers import Tokenizer
from rwkv_miss.generation.engine import Engine
from rwkv_miss.generation.sampling import Sampling, mixed_seed
from rwkv_miss.model.base import RWKV


def generate(
    model: RWKV,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: tuple[str, ...] = (),
) -> list[str]:
    """What the model writes after each prompt, until the end of the document, a string of `stop` or max_tokens.

    Args:
        temperature: 0 takes the likeliest token; above, samples from softmax(logits / temperature).
        top_p: samples among the likeliest tokens whose probabilities sum to top_p.
        seed: seed of the random sampling. Each prompt has random numbers of its own: the first those of the seed
            itself, the others those of a seed made of it and of the prompt's index.
        stop: strings that end a text and are not a part of it, such as a template's `stops`.

    Raises:
        UserError: an argument out of its range, an empty prompt, or a prompt with tokens the model lacks.
        RunError: the model's logits are not finite.
    """
    Sampling(temperature, top_p, max_tokens, stop, seed)  # raises for wrong arguments without a prompt, too
    engine = Engine(model, tokenizer)
    for i, prompt in enumerate(prompts):
        engine.add(prompt, Sampling(temperature, top_p, max_tokens, stop, seed_of(seed, i)))
    texts: list[list[str]] = [[] for _ in prompts]
    for piece in engine:
        texts[piece.member].append(piece.text)
    return ["".join(pieces) for pieces in texts]


def stream(model: RWKV, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> Iterator[str]:
    """What the model writes after one prompt, in pieces, each as soon as it is known. Errors are those of `generate`;
    those of the user's input are raised before the first piece is asked for."""
    engine = Engine(model, tokenizer)
    engine.add(prompt, sampling)
    return (piece.text for piece in engine if piece.text)


def strip_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces of a text as pieces of `text.strip()`: white space is held back until more text follows it."""
    held: list[str] = []
    is_begun = False
    for piece in pieces:
        text = piece.rstrip()
        if not text:
            held.append(piece)
            continue
        whole = "".join([*held, text])
        yield whole if is_begun else whole.lstrip()
        is_begun = True
        held = [piece[len(text) :]]


def seed_of(seed: int, index: int) -> int:
    """The seed of prompt number `index`."""
    return seed if index == 0 else mixed_seed(seed, index)
