"""The commands eval and generate: what they print, while they run and when they are stopped."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rwkv_miss import AdapterConfig, inject, load_model, merge, save_adapter
from rwkv_miss.adapters.inject import trained_parameters
from rwkv_miss.cli import main
from rwkv_miss.data.rendering import chat_prompt
from rwkv_miss.data.templates import TEMPLATES
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.generation.engine import Engine
from rwkv_miss.generation.generate import generate
from rwkv_miss.generation.sampling import Sampling
from tests.scripted import Scripted

BYTES = load_tokenizer("bytes")
# Runs a command with the signal handlers that it has in a foreground shell; progress lines are printed at once.
START = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGPIPE, signal.SIG_IGN)
import rwkv_miss.progress
rwkv_miss.progress._LINE_EVERY = 0
from rwkv_miss.cli import main
sys.exit(main())
"""


@pytest.fixture
def base(make_base) -> Path:
    """A model that never chooses the end token greedily."""
    path = make_base(vocab_size=256)
    weights = torch.load(path)
    weights["head.weight"][0] = 0
    torch.save(weights, path)
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"question": "q" * n, "answer": "a"}) + "\n" for n in range(1, 4)))
    return path


@pytest.fixture
def start(start_process) -> Callable[..., subprocess.Popen]:
    """`start(*arguments)` starts a command whose pipes are of bytes."""

    def run(*arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-c", START, *map(str, arguments)]
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        return start_process(command, text=False, env=buffered)

    return run


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"temperature": 1.5, "top_p": 0.9, "seed": 5}])
@pytest.mark.parametrize("raw", [False, True])
def test_generate_prints_what_generate_returns(base, capsys, options, raw):
    argv = [f"--{name}={value}" for name, value in options.items()]
    assert main(["generate", f"--model={base}", "--tokenizer=bytes", "--prompt=a", f"--raw={raw}", *argv]) == 0
    defaults = {"temperature": 1.0, "top_p": 0.5, "seed": 0}
    [text] = generate(
        load_model(base), BYTES, ["a" if raw else chat_prompt("a", TEMPLATES["world"])], **defaults | options
    )
    assert capsys.readouterr().out == (text if raw else text.strip()) + "\n"


def test_generate_strips_an_answer_and_nothing_else(base, capsys, monkeypatch):
    monkeypatch.setattr("rwkv_miss.commands.model.load", lambda *_: Scripted(b" \n yes,  \n\n no \n\n\0"))
    argv = ["generate", f"--model={base}", "--tokenizer=bytes", "--prompt=a", "--temperature=0"]
    assert main(argv) == 0 and main([*argv, "--raw"]) == 0
    assert capsys.readouterr().out == "yes,  \n\n no\n" + " \n yes,  \n\n no \n\n\n"


@pytest.mark.slow
def test_generate_prints_pieces_as_they_come_until_it_is_interrupted(base, start):
    process = start("generate", "--model", base, "--tokenizer=bytes", "--prompt=a", "--max_tokens", 10**9)
    first = process.stdout.read1(2**20)  # there is no end to wait for
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert 0 < len(first) < 4096 and out.endswith(b"\n")
    assert err.decode().splitlines()[-1] == "rwkv-miss generate: interrupted" and b"Traceback" not in err


@pytest.mark.slow
def test_generate_whose_reader_goes_away(base, start):
    process = start("generate", "--model", base, "--tokenizer=bytes", "--prompt=a", "--max_tokens", 10**9)
    process.stdout.read(20)
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert b"Traceback" not in process.stderr.read()


def test_generate_whose_logits_become_nan(base, capsys):
    prompt = chat_prompt("a", TEMPLATES["world"]).encode()
    engine = Engine(load_model(base), BYTES)
    engine.add(list(prompt), Sampling(max_tokens=40))
    written = [token for piece in engine for token in piece.ids]
    at = next(i for i, byte in enumerate(written) if i > 3 and byte not in prompt + bytes(written[:i]))
    weights = torch.load(base)
    weights["emb.weight"][written[at]] = math.nan  # the byte after this one cannot be chosen
    torch.save(weights, base)
    argv = ["generate", f"--model={base}", "--tokenizer=bytes", "--prompt=a", "--temperature=0"]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    text = BYTES.decode(written[: at + 1]).strip()
    assert text.rstrip("\ufffd") in out and text.startswith(out.removesuffix("\n")) and out.endswith("\n")
    assert err.splitlines()[-1].startswith("rwkv-miss generate: the model's logits are not finite")


@pytest.mark.slow
def test_eval_is_interrupted(base, data, start):
    process = start(
        "eval", "--model", base, "--tokenizer=bytes", "--data", data, "--exact_match", "--max_tokens", 10**9
    )
    lines = []
    while not lines or not lines[-1].startswith(b"answers"):
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == b""
    assert any(line.startswith(b"rows of the loss: 1 of 1, ETA 0:00:00") for line in lines), lines
    assert lines[-1] == b"answers: 0 of 3, ETA unknown\n"
    assert err.decode().splitlines()[-1] == "rwkv-miss eval: interrupted" and b"Traceback" not in err


def test_eval_of_a_loss_that_is_not_finite(base, data, capsys):
    weights = torch.load(base)
    weights["ln_out.weight"][0] = math.nan
    torch.save(weights, base)
    argv = ["eval", f"--model={base}", f"--data={data}", "--tokenizer=bytes", "--exact_match"]
    assert main([*argv, "--json"]) == 1
    out, err = capsys.readouterr()
    figures = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert figures == {"records": 3, "tokens": 9, "loss": None, "perplexity": None}
    assert err.splitlines()[-1].startswith("rwkv-miss eval: the loss is not finite (nan)")
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert out == "loss not finite (nan), 9 tokens of 3 records\n"
    assert "rwkv-miss eval: the loss is not finite" in err


def test_eval_parts_a_text_as_training_does(base, tmp_path, capsys):
    text = tmp_path / "data.txt"
    text.write_text("one\n==\ntwo\n==\nthree")
    argv = ["eval", f"--model={base}", f"--data={text}", "--tokenizer=bytes", "--json"]
    assert main([*argv, "--separator=\n==\n"]) == 0
    parted = json.loads(capsys.readouterr().out)
    assert main(argv) == 0
    whole = json.loads(capsys.readouterr().out)
    assert (parted["records"], parted["tokens"]) == (3, 3 + 3 + 5)
    assert (whole["records"], whole["tokens"]) == (1, len(text.read_text()))
    (tmp_path / "data.jsonl").write_text('{"text": "a"}')
    assert main([*argv[:2], f"--data={tmp_path / 'data.jsonl'}", "--tokenizer=bytes", "--separator=x"]) == 2
    assert "can only be given for .txt" in capsys.readouterr().err


def test_eval_compares_a_model_with_its_base_on_the_bases_text(base, data, make_base, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    model = inject(load_model(base), AdapterConfig(r=4))
    for parameter in trained_parameters(model).values():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    save_adapter(model, adapter)
    merge(base, adapter, tmp_path / "merged.pth")
    text = tmp_path / "text.txt"
    text.write_text("what the base has read")

    def figures(**options: object) -> dict:
        assert main(["eval", "--tokenizer=bytes", "--json", *(f"--{name}={x}" for name, x in options.items())]) == 0
        return json.loads(capsys.readouterr().out)

    def on_text(**model: object) -> tuple[float, int]:
        found = figures(**model, data=text)
        return found["loss"], found["tokens"]

    compared = {"data": data, "forgetting": base, "text": text}
    tuned = figures(model=base, adapter=adapter, **compared)["forgetting"]
    assert (tuned["base_loss"], tuned["tokens"]) == pytest.approx(on_text(model=base), rel=1e-6)
    assert (tuned["loss"], tuned["tokens"]) == pytest.approx(on_text(model=base, adapter=adapter), rel=1e-6)
    assert tuned["kl"] > 0.01
    assert figures(model=tmp_path / "merged.pth", **compared)["forgetting"] == pytest.approx(tuned, rel=1e-4)
    assert figures(model=base, **compared)["forgetting"]["kl"] == 0
    argv = ["eval", f"--model={base}", f"--data={data}", "--tokenizer=bytes", f"--forgetting={base}"]
    assert main([*argv, f"--text={text}"]) == 0
    assert f"KL(base || model) 0.0000 a token, {tuned['tokens']} tokens of {text}\n" in capsys.readouterr().out
    assert main(argv) == 2
    assert "forgetting and text go together" in capsys.readouterr().err
    argv[-1] = f"--forgetting={make_base('other.pth', vocab_size=300)}"
    assert main([*argv, f"--text={text}"]) == 2
    assert "other.pth: the vocabulary has 300 tokens" in capsys.readouterr().err
