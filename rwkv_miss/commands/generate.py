from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from rwkv_miss.commands.model import RunDtype
from rwkv_miss.config import DataOptions


def run(
    model: str,
    prompt: str,
    tokenizer: str,
    adapter: str | None = None,
    state: str | None = None,
    template: str | None = None,
    raw: bool = False,
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 0.5,
    seed: int = 0,
    dtype: RunDtype | None = None,
) -> int:
    """Let a model answer a question, or continue a text.

    Args:
        model: A checkpoint (.pth or .st).
        prompt: The question; it is put into the template unless raw is given.
        tokenizer: world, bytes, or the path of a Hugging Face tokenizer.json.
        adapter: The folder of an adapter, or of a run, to load onto the model.
        state: A .pth with a learned state (blocks.0.att.time_state, ...) to begin from.
        template: world, g1, g1-think and others, or a .yaml or .jinja file of yours; when not given the one that the
            adapter was trained with, or world.
        raw: Take the prompt as it is.
        max_tokens: The most tokens that the answer may have.
        temperature: 0 takes the likeliest token each time; above 0, tokens are drawn at random.
        top_p: Draw among the likeliest tokens whose probabilities sum to this.
        seed: Seed of the random sampling.
        dtype: Number format that the model runs in; that of the file when not given.
    """
    from rwkv_miss.adapters.files import adapters_template
    from rwkv_miss.commands.model import load
    from rwkv_miss.data.rendering import begun_answer, chat_prompt
    from rwkv_miss.data.templates import find_template, settled
    from rwkv_miss.data.tokenizers import load_tokenizer
    from rwkv_miss.generation.generate import stream, strip_pieces
    from rwkv_miss.generation.sampling import Sampling
    from rwkv_miss.model.initial_state import load_initial_state

    form = find_template(settled(DataOptions(template=template), adapters_template(adapter)).template)
    text = prompt if raw else chat_prompt(prompt, form)
    loaded = load(model, adapter, dtype)
    if state:
        load_initial_state(loaded, state)
    sampling = Sampling(temperature, top_p, max_tokens, form.stops, seed)
    pieces = stream(loaded, load_tokenizer(tokenizer), text, sampling)
    print_pieces(pieces if raw else strip_pieces(chain((begun_answer(form),), pieces)))
    return 0


def print_pieces(pieces: Iterable[str]) -> None:
    """Prints each piece as it comes, and a newline at the end: after an error too, so that its message has a line of
    its own."""
    is_begun = False
    try:
        for piece in pieces:
            is_begun = True  # first: an interruption may come in the middle of a print
            print(piece, end="", flush=True)
    except BaseException:
        if is_begun:
            print(flush=True)
        raise
    print(flush=True)
