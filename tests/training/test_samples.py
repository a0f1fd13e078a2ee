"""Sample answers in the middle of a run: what is asked, what is written, and that the training does not notice."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rwkv_miss import load_adapter, load_model
from rwkv_miss.config import AdapterConfig
from rwkv_miss.data.binidx import write_binidx
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.errors import UserError
from rwkv_miss.generation.generate import generate
from rwkv_miss.training.figures import read_samples
from rwkv_miss.training.start import train
from tests.training.runs import adapter, losses, quiet_train


def samples(config) -> list[dict]:
    return read_samples(Path(config.out) / "samples.jsonl")


def test_they_are_the_answers_of_the_model_as_it_was(make_config):
    config = make_config(max_steps=3, val_split=0.2, sample_every=2, sample_count=2, sample_tokens=20)
    config = replace(config, adapter=AdapterConfig(r=4, dropout=0.5))
    quiet_train(replace(config, max_steps=2))
    found = samples(config)
    assert [sample["step"] for sample in found] == [0, 0, 2, 2]
    model, tokenizer = load_model(config.base), load_tokenizer("bytes")
    prompts = [sample["prompt"] for sample in found[:2]]
    assert all(prompt.startswith("User: count ") and prompt.endswith("\n\nAssistant:") for prompt in prompts)
    assert [sample["answer"] for sample in found[:2]] == generate(model, tokenizer, prompts, max_tokens=20)
    model = load_adapter(model, Path(config.out) / "adapter").eval()
    assert [sample["answer"] for sample in found[2:]] == generate(model, tokenizer, prompts, max_tokens=20)
    count = int(prompts[0].split()[2])
    assert found[0]["expected"] == "".join([" tick"] * count)[:20]

    quiet_train(replace(config, resume="auto"))
    assert samples(config)[:4] == found and [sample["step"] for sample in samples(config)[4:]] == [3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"chunk_len": 16, "bptt_chunks": 1, "gradient_checkpointing": True}])
def test_the_training_does_not_notice(make_config, tmp_path, changes):
    """Nor does dropout, which draws random numbers and is not there while the model is asked."""
    config = make_config(adapter=AdapterConfig(r=4, dropout=0.5), accumulate=2, batch_size=4, max_steps=4, **changes)
    quiet_train(config)
    sampled = replace(config, out=str(tmp_path / "sampled"), sample_every=1, sample_tokens=4)
    quiet_train(sampled)
    assert len(samples(sampled)) == 15 and not (Path(config.out) / "samples.jsonl").exists()
    assert losses(sampled.out) == losses(config.out)
    assert all(torch.equal(block, adapter(sampled.out)[name]) for name, block in adapter(config.out).items())


@pytest.mark.parametrize("form", ["txt", "binidx"])
def test_plain_text_is_continued(make_config, tmp_path, form):
    text = "It was the best of times, it was the worst of times, it was the age of wisdom."
    path = tmp_path / "text.txt"
    path.write_text(text)
    if form == "binidx":
        path = tmp_path / "text"
        write_binidx(str(path), [load_tokenizer("bytes").encode(t) for t in ("x", text)], "uint16")
    config = make_config(data=str(path), ctx_len=128, max_steps=1, sample_every=5, sample_tokens=10)
    quiet_train(config)
    first = samples(config)[0]
    assert (first["prompt"], first["expected"]) == (text[:32], text[32:42])
    assert len(samples(config)) == 2  # of the base and of the last step, one each: one token is no document


def test_they_are_shown_and_given_to_tensorboard(make_config, tmp_path):
    records = [{"question": "q " * 200 + "end?", "answer": "\x1b[31m"}]
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = make_config(data=str(data), max_steps=1, sample_every=1, ctx_len=500)
    said = io.StringIO()
    train(config, Console(file=said, width=80))
    text = said.getvalue()
    assert "samples: 1 of the training data, since nothing validates" in text
    assert "step 0, sample: ...q q " in text and "q end?\n\nAssistant:" in text and "step 1, sample: ..." in text
    assert "[expected: \ufffd[31m]" in text and "\x1b" not in text
    board = EventAccumulator(str(Path(config.out) / "tensorboard")).Reload()
    events = board.Tensors("samples/text_summary")
    assert [event.step for event in events] == [0, 1]
    assert b"**expected**\n\n     \x1b[31m" in events[0].tensor_proto.string_val[0]


def test_wrong_settings(make_config):
    with pytest.raises(UserError, match=r"sample_count is 0; .*sample_every is -1; it cannot be negative"):
        quiet_train(make_config(sample_every=-1, sample_count=0))
