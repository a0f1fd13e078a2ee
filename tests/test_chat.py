"""The command chat: in a pipe, and in a terminal."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

from rwkv_miss import load_model
from rwkv_miss.cli import main
from rwkv_miss.config import DataOptions
from rwkv_miss.data.tokenizers import END, load_tokenizer
from rwkv_miss.generation.conversation import Conversation
from rwkv_miss.generation.sampling import Sampling
from tests.processes import run_process


@pytest.fixture
def base(make_base) -> Path:
    """A model that writes letters and never ends greedily."""
    path = make_base(vocab_size=256)
    weights = torch.load(path)
    weights["head.weight"][: ord("a")] = 0
    weights["head.weight"][ord("z") :] = 0
    torch.save(weights, path)
    return path


@pytest.fixture
def chat(base, monkeypatch, capsys):
    """`chat(text, *options)`: the exit status, the output and the errors of a chat whose input is `text`."""

    def run(text: str | bytes, *options: str) -> tuple[int, str, str]:
        given = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        status = main(["chat", f"--model={base}", "--tokenizer=bytes", "--max_tokens=12", *options])
        return status, *capsys.readouterr()

    return run


def answers(base: Path, *questions: str, **sampling) -> list[str]:
    """What a conversation answers, as a line each."""
    options = {"max_tokens": 12, "temperature": 1.0, "top_p": 0.5} | sampling
    talk = Conversation(load_model(base), load_tokenizer("bytes"), DataOptions(template="world"), Sampling(**options))
    return ["".join(piece.text for piece in talk.ask(q)).strip() + "\n" for q in questions]


@pytest.mark.slow
def test_lines_in_and_answers_out(base, tmp_path):
    command = [sys.executable, "-m", "rwkv_miss", "chat", "--model", str(base), "--tokenizer=bytes"]
    path = tmp_path / "talk.st"
    (tmp_path / "input").write_bytes(f"a\n\n/save {path}\nb\r\n/undo\nb\n/load {path}\nb".encode())
    with (tmp_path / "input").open("rb") as lines:
        result = run_process([*command, "--max_tokens=12", "--temperature=0"], 120, stdin=lines)
    a, b = answers(base, "a", "b", temperature=0.0)
    assert (result.returncode, result.stdout) == (0, a + b + b + b)
    said = [line for line in result.stderr.splitlines() if "wkv" not in line and "max_tokens" not in line]
    assert said == [f"saved to {path}", "the last question is taken back", f"1 question and its answer from {path}"]


def test_answers_are_sampled_as_generate_samples(base, chat, capsys):
    status, out, _ = chat("a\nb", "--temperature=1.5", "--top_p=0.9", "--seed=5")
    assert (status, out) == (0, "".join(answers(base, "a", "b", temperature=1.5, top_p=0.9, seed=5)))
    argv = ["generate", f"--model={base}", "--tokenizer=bytes", "--max_tokens=12", "--prompt=a", "--seed=5"]
    assert main([*argv, "--temperature=1.5", "--top_p=0.9"]) == 0
    assert capsys.readouterr().out == out.splitlines(keepends=True)[0]


@pytest.mark.parametrize(
    ("text", "options", "status", "said"),
    [
        ("/nope", [], 2, "there is no command /nope; there are /reset, /undo, /save, /load, /help"),
        ("/save", [], 2, "/save needs the name of a file"),
        ("/undo it", [], 2, "/undo stands alone on its line"),
        ("/load none.st", [], 2, "none.st: no such file"),
        (b"a\n\xff", [], 2, "line 2 of the input is not UTF-8"),
        ("a", ["--template=nope"], 2, "there is no template 'nope'"),
        ("a", ["--template=instruction", "--system=s"], 2, "no form for a turn of role system"),
        ("a", ["--top_p=2"], 2, "top_p 2"),
        ("a", ["--state=nope.pth"], 2, "nope.pth: no such file"),
        ("a", ["--model=nope.pth"], 2, "nope.pth: no such file"),
        ("/undo", [], 0, "there is no question to take back"),
        ("/help", [], 0, "Ctrl-C stops an answer"),
        (" /nope", [], 0, "cut at max_tokens"),
        ("a\n/reset\n/undo", [], 0, "there is no question to take back"),
    ],
)
def test_what_is_no_answer_is_said_on_stderr(chat, text, options, status, said):
    found, out, err = chat(text, *options)
    assert found == status and said in err and said not in out and "Traceback" not in err


def test_an_answer_without_text(chat, monkeypatch):
    monkeypatch.setattr("rwkv_miss.generation.engine.choose", lambda *_: [END])
    status, out, err = chat("a")
    assert (status, out) == (0, "\n") and "nothing was answered; the question is taken back" in err


def test_logits_that_are_not_finite(base, chat):
    weights = torch.load(base)
    weights["ln_out.weight"][0] = float("nan")
    torch.save(weights, base)
    status, _, err = chat("a")
    assert status == 1 and err.splitlines()[-1].startswith("rwkv-miss chat: the model's logits are not finite")


class Terminal:
    """A command in a terminal of its own, 80 columns wide."""

    def __init__(self, start_process, *command: str) -> None:
        self.ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 80))
        environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        self.process = start_process(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment | {"TERM": "xterm"},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C comes from a terminal that is its own
        )
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def until(self, pattern: str, type_again: str = "") -> str:
        """Waits until what is shown has the pattern; returns what was shown up to its end. `type_again` is typed
        whenever nothing is shown for a while."""
        give_up = time.monotonic() + 120
        while not (found := re.search(pattern, self.shown)):
            ready, _, _ = select.select([self.ours], [], [], 3)
            assert ready or time.monotonic() < give_up, f"{pattern!r} is not in {self.shown!r}"
            if ready:
                self.shown += os.read(self.ours, 2**16).decode(errors="replace")
            else:
                self.type(type_again)
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before


@pytest.mark.slow
def test_a_terminal(base, start_process):
    options = ["--tokenizer=bytes", "--max_tokens=1000000000", "--temperature=0", "--template=g1-think"]
    terminal = Terminal(start_process, sys.executable, "-m", "rwkv_miss", "chat", f"--model={base}", *options)
    terminal.until("Ctrl-D ends")
    terminal.until("> ")
    terminal.type("/nope\n")
    terminal.until("there is no command /nope")
    terminal.until("> ")
    terminal.type("hello")
    terminal.until("hello")
    # Ctrl-C at the prompt takes back the line. One that comes between two of readline's waits for keys is seen only
    # with the next key, hence another.
    terminal.type("\x03")
    terminal.until("> ", type_again="\x03")
    terminal.type("hello\n")
    terminal.until(r"\x1b\[2m<think")  # a thought is dimmed
    terminal.until(r"(\x1b\[2m[a-z].*){3}")
    terminal.type("\x03")  # in an answer it ends that, here in its thought
    terminal.until("nothing was answered; the question is taken back")
    terminal.until("> ")
    terminal.type("/undo\n")
    terminal.until("there is no question to take back")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.process.wait(60) == 0
    os.close(terminal.ours)
