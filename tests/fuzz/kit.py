"""One small file of everything that a command reads, the commands that read it, and what a command may answer."""

from __future__ import annotations

import io
import json
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import tokenizers
import torch
import yaml
from safetensors.torch import save_file

from rwkv_miss import cli
from rwkv_miss.config import ModelConfig
from rwkv_miss.model.init import init_weights

SIZES = ModelConfig(7, 2, 16, 2, 8, 16, 256, {"w": 4, "a": 4, "g": 4, "v": 4})
TRAIN = {
    "base": "base.pth",
    "data": "data.jsonl",
    "tokenizer": "bytes",
    "out": "new",
    "adapter.r": 4,
    "ctx_len": 32,
    "max_steps": 1,
    "loggers": "[csv]",
}
ASK = {"model": "base.pth", "tokenizer": "bytes"}
COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "train": ("train", TRAIN),
    "resume": ("train", TRAIN | {"out": "run", "max_steps": 2, "resume": "auto"}),
    "merge": ("merge", {"base": "base.pth", "adapter": "adapter", "out": "merged.pth"}),
    "eval": ("eval", ASK | {"data": "data.jsonl", "json": "true"}),
    "generate": ("generate", ASK | {"prompt": "a", "max_tokens": 2}),
    "binidx": ("data binidx", {"data": "data.jsonl", "tokenizer": "bytes", "out": "written"}),
    "init": ("init", {"n_layer": 1, "n_embd": 16, "head_size": 8, "vocab_size": 16, "out": "made.pth"}),
    "info": ("info", {}),
}
# The files of the kit, with the commands that read each and the options that make them do so.
READ_BY: dict[str, dict[str, dict[str, str]]] = {
    **{
        name: {
            "train": {"base": name},
            "merge": {"base": name},
            "eval": {"model": name},
            "generate": {"model": name},
            "info": {"file": name},
        }
        for name in ("base.pth", "base.st", "old.pth")
    },
    **{
        f"adapter/{name}": {
            "merge": {},
            "eval": {"adapter": "adapter"},
            "generate": {"adapter": "adapter"},
            "info": {"file": "adapter"},
        }
        for name in ("adapter_config.json", "adapter_model.safetensors", "rwkv_miss.json")
    },
    "run/adapter/rwkv_miss.json": {"resume": {}, "eval": {"adapter": "run"}},
    "run/checkpoints/step-00000001": {"resume": {}},
    "run/config.yaml": {"resume": {}, "train": {"config": "run/config.yaml"}},
    "run.yaml": {"train": {"config": "run.yaml"}},
    "data.jsonl": {"train": {}, "eval": {}, "binidx": {}},
    "data.txt": {name: {"data": "data.txt"} for name in ("train", "eval", "binidx")},
    "corpus.idx": {name: {"data": "corpus"} for name in ("train", "eval")},
    "corpus.bin": {name: {"data": "corpus"} for name in ("train", "eval")},
    "tokenizer.json": {name: {"tokenizer": "tokenizer.json"} for name in ("train", "eval", "generate", "binidx")},
    "state.pth": {"generate": {"state": "state.pth"}, "info": {"file": "state.pth"}},
}


def arguments(command: str, changes: Mapping[str, Any]) -> list[str]:
    """The command line of one of `COMMANDS` with other options."""
    name, options = COMMANDS[command]
    options = options | changes
    if "config" in options:
        options = {name: options[name] for name in ("config", "out") if name in options}
    file = [options.pop("file")] if "file" in options else []
    return [*name.split(), *file, *(f"--{name}={value}" for name, value in options.items())]


def make_kit() -> None:
    """Writes all of the files into the current folder."""
    weights = {k: w + 0.1 for k, w in init_weights(SIZES, seed=0).items()}
    torch.save(weights, "base.pth")
    torch.save(weights, "old.pth", _use_new_zipfile_serialization=False)
    save_file(weights, "base.st")
    torch.save({f"blocks.{i}.att.time_state": torch.zeros(2, 8, 8) for i in range(2)}, "state.pth")
    records = [{"question": "a", "answer": "b " * n} for n in range(1, 5)]
    Path("data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    Path("data.txt").write_text("Some text.\n")
    vocabulary = {chr(i): i for i in range(256)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a")).save("tokenizer.json")
    made = [cli.main(arguments("binidx", {"out": "corpus"})), cli.main(arguments("train", {"out": "run"}))]
    assert made == [0, 0]
    shutil.copytree("run/adapter", "adapter")
    settings = {k: v for k, v in TRAIN.items() if "." not in k} | {"adapter": {"r": 4}, "loggers": ["csv"]}
    Path("run.yaml").write_text(yaml.safe_dump(settings))


class TooLong(BaseException):
    """A command has run for longer than any of these may."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """TooLong within, also in the middle of a system call, after so many seconds."""

    def stop(signum: int, frame: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def answer(argv: list[str], seconds: int = 20) -> tuple[int, str]:
    """The status of a command and its message. It must end in time with status 0, or with one line that says what is
    wrong."""
    out, err = io.StringIO(), io.StringIO()
    with limited(seconds), redirect_stdout(out), redirect_stderr(err):
        status = cli.main(argv)
    said = err.getvalue()
    messages = [line for line in said.splitlines() if line.startswith("rwkv-miss")]
    assert "Traceback" not in said, said
    assert status in (0, 1, 2), status
    if status:
        assert len(messages) == 1 and said.rstrip().endswith(messages[0]), said
        assert len(messages[0].partition(": ")[2]) > 10, said
        assert len(messages[0]) < 2000, said
    return status, "".join(messages)
