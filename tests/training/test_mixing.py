"""A run on several sources: their weights, resuming in the middle, and several processes."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from rwkv_miss.errors import UserError
from rwkv_miss.training.start import train
from tests.data.samples import read_documents
from tests.training.runs import losses, quiet_train, run_train


@pytest.fixture
def config(make_config, tmp_path):
    """The rows of a second file, 7 of them, come twice in an epoch, and those of the first once."""
    second = tmp_path / "second.jsonl"
    records = [{"question": f"say {n}", "answer": "tock " * (n + 1)} for n in range(7)]
    second.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = make_config(max_steps=0, epochs=2)
    return replace(config, data=f"{config.data},{second}:2")


def tokens_an_epoch(config) -> int:
    first, second = config.data.removesuffix(":2").split(",")
    once, twice = (
        sum(min(len(document.ids) - 1, config.ctx_len) for document in read_documents(path, config))
        for path in (first, second)
    )
    return once + 2 * twice


def test_each_source_comes_as_often_as_its_weight_says(config):
    said = io.StringIO()
    train(config, Console(file=said, width=200))
    assert losses(config.out, "tokens")[-1] == 2 * tokens_an_epoch(config)
    assert "an epoch has 43 rows:" in said.getvalue() and "14 of the 7 of" in said.getvalue()


def test_it_resumes_in_the_middle_but_not_with_other_weights(config, tmp_path):
    config = replace(config, schedule="constant", max_steps=11)  # 6 steps an epoch
    quiet_train(config)
    for stop in (4, 8):
        parts = replace(config, out=str(tmp_path / f"parts{stop}"))
        quiet_train(replace(parts, max_steps=stop))
        with pytest.raises(UserError, match="trained on other data"):
            quiet_train(replace(parts, data=parts.data.removesuffix(":2"), resume="auto"))
        quiet_train(replace(parts, resume="auto"))
        assert losses(parts.out) == losses(config.out)


def test_records_are_held_out_of_all_sources(config):
    """A quarter of 36 records, which validates once whatever the weights."""
    said = io.StringIO()
    train(replace(config, val_split=0.25, max_steps=1), Console(file=said, width=200))
    assert "training: 27 records" in said.getvalue() and "validation: 9 records in 9 rows" in said.getvalue()


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(config, tmp_path):
    config = replace(config, batch_size=8, max_steps=7)
    quiet_train(config)
    two = replace(config, out=str(tmp_path / "two"), batch_size=4, devices=2)
    assert run_train(two).returncode == 0
    assert losses(two.out) == pytest.approx(losses(config.out), rel=2e-5)
