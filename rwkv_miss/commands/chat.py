from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from rwkv_miss.commands.generate import print_pieces
from rwkv_miss.commands.model import RunDtype
from rwkv_miss.config import DataOptions
from rwkv_miss.errors import UserError

if TYPE_CHECKING:
    from rwkv_miss.generation.conversation import Conversation

_HELP = """\
/reset      begin anew
/undo       take back the last question and its answer
/save FILE  write the conversation and the model's state
/load FILE  go on with what /save wrote
/help       this
Ctrl-C stops an answer, Ctrl-D ends. A question that begins with a slash is given with a space before it."""
_COMMANDS = ("/reset", "/undo", "/save", "/load", "/help")
_WITH_FILE = ("/save", "/load")


def run(
    model: str,
    tokenizer: str,
    adapter: str | None = None,
    state: str | None = None,
    template: str | None = None,
    system: str | None = None,
    max_tokens: int = 1024,
    temperature: float = 1.0,
    top_p: float = 0.5,
    seed: int = 0,
    dtype: RunDtype | None = None,
) -> int:
    """Talk with a model in a terminal, or line by line through a pipe.

    Args:
        model: A checkpoint (.pth or .st).
        tokenizer: world, bytes, or the path of a Hugging Face tokenizer.json.
        adapter: The folder of an adapter, or of a run, to load onto the model.
        state: A .pth with a learned state (blocks.0.att.time_state, ...) to begin from.
        template: world, g1, g1-think and others, or a .yaml or .jinja file of yours; when not given the one that the
            adapter was trained with, or world.
        system: What the system says before the first question.
        max_tokens: The most tokens that an answer may have, with its thought.
        temperature: 0 takes the likeliest token each time; above 0, tokens are drawn at random.
        top_p: Draw among the likeliest tokens whose probabilities sum to this.
        seed: Seed of the random sampling.
        dtype: Number format that the model runs in; that of the file when not given.
    """
    from rwkv_miss.adapters.files import adapters_template
    from rwkv_miss.commands.model import load
    from rwkv_miss.data.records import Turn
    from rwkv_miss.data.rendering import begun_answer, chat_spans
    from rwkv_miss.data.templates import find_template, settled
    from rwkv_miss.data.tokenizers import load_tokenizer
    from rwkv_miss.generation.conversation import Conversation
    from rwkv_miss.generation.sampling import Sampling
    from rwkv_miss.model.initial_state import load_initial_state

    options = settled(DataOptions(template=template), adapters_template(adapter))
    opening = [Turn("system", system)] if system else []
    chat_spans([*opening, Turn("user", "...")], options)  # which the template may refuse: before a model is loaded
    words, sampling = load_tokenizer(tokenizer), Sampling(temperature, top_p, max_tokens, seed=seed)
    loaded = load(model, adapter, dtype)
    if state:
        load_initial_state(loaded, state)
    talk = Conversation(loaded, words, options, sampling, opening)
    begun = begun_answer(find_template(options.template))
    if sys.stdin.isatty() and sys.stdout.isatty():
        _in_terminal(talk, begun)
    else:
        _in_pipe(talk, begun)
    return 0


def _in_pipe(talk: Conversation, begun: str) -> None:
    """An answer to each line of the input. Whatever is no answer goes to stderr."""
    from rwkv_miss.generation.generate import strip_pieces

    for number, raw in enumerate(sys.stdin.buffer, start=1):
        try:
            line = raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as e:
            raise UserError(f"line {number} of the input is not UTF-8 ({e.reason}); convert it") from None
        if line.startswith("/"):
            print(_obey(line, talk), file=sys.stderr, flush=True)
        elif line.strip():
            before = talk.turns
            print_pieces(strip_pieces(_texts(talk, line, begun)))
            if note := _note(talk, before):
                print(note, file=sys.stderr, flush=True)


def _in_terminal(talk: Conversation, begun: str) -> None:
    import readline  # noqa: F401  (it gives input() its editing and history)

    from rwkv_miss.training.progress import printable

    console = Console(markup=False, highlight=False)

    def say(text: str) -> None:
        console.print(Text(printable(text), "italic"), soft_wrap=True)

    say("/help says what can be given; Ctrl-D ends")
    while True:
        try:
            line = input("> ").encode(errors="replace").decode()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()
            continue
        before = talk.turns
        try:
            if line.startswith("/"):
                say(_obey(line, talk))
            elif line.strip():
                _print_answer(talk, line, begun, console)
                if note := _note(talk, before):
                    say(note)
        except UserError as e:
            say(str(e))


def _print_answer(talk: Conversation, question: str, begun: str, console: Console) -> None:
    """Prints an answer as it comes, its thought dimmed, until Ctrl-C."""
    from rwkv_miss.generation.generate import strip_pieces
    from rwkv_miss.generation.text_stream import thoughts_apart
    from rwkv_miss.training.progress import printable

    try:
        with closing(_texts(talk, question, begun)) as texts:
            for text, is_thought in thoughts_apart(strip_pieces(texts)):
                console.print(Text(printable(text), "dim" if is_thought else ""), end="", soft_wrap=True)
    except KeyboardInterrupt:
        pass
    finally:
        console.print()


def _texts(talk: Conversation, question: str, begun: str) -> Generator[str, None, None]:
    """The answer in pieces, with what its prompt has of it."""
    yield begun
    with closing(talk.ask(question)) as pieces:
        for piece in pieces:
            yield piece.text


def _note(talk: Conversation, before: tuple) -> str | None:
    """What is to be said after an answer."""
    if talk.turns == before:
        return "nothing was answered; the question is taken back"
    return "the answer is cut at max_tokens" if talk.finish == "max_tokens" else None


def _obey(line: str, talk: Conversation) -> str:
    """Does what a line that begins with a slash says. Returns what is to be said of it.

    Raises:
        UserError: there is no such command, or it cannot be done.
    """
    name, _, given = line.strip().partition(" ")
    path = Path(given.strip()).expanduser()
    if name not in _COMMANDS:
        raise UserError(f"there is no command {name}; there are {', '.join(_COMMANDS)}")
    if bool(given.strip()) != (name in _WITH_FILE):
        raise UserError(
            f"{name} needs the name of a file" if name in _WITH_FILE else f"{name} stands alone on its line"
        )
    if name == "/help":
        return _HELP
    if name == "/undo":
        return "the last question is taken back" if talk.undo() else "there is no question to take back"
    if name == "/reset":
        talk.reset()
        return "the conversation begins anew"
    if name == "/save":
        talk.save(path)
        return f"saved to {path}"
    talk.load(path)
    n = sum(turn.role == "user" for turn in talk.turns)
    return f"{n} questions and their answers from {path}" if n > 1 else f"1 question and its answer from {path}"
