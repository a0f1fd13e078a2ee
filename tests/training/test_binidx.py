"""Training on a binidx is training on the text that it was made of."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rwkv_miss.data.binidx import write_binidx
from rwkv_miss.errors import UserError
from tests.training.runs import adapter, losses, quiet_train, run_command


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """23 documents of 11 to 187 bytes: some are longer than a row."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {n:02}: " + "tick tock " * (n % 19)}) + "\n" for n in range(23)))
    return path


@pytest.fixture(scope="module")
def pair(text):
    lines = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    write_binidx(text.with_suffix(""), [[*line.encode(), 0] for line in lines])
    return text.with_suffix("")


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True, "val_split": 0.2, "val_every": 2, "batch_size": 2, "accumulate": 2},
        {"packing": False, "max_steps": 0, "epochs": 2},
    ],
)
def test_the_same_run(make_config, tmp_path, text, pair, changes):
    runs = [make_config(data=str(data), out=str(tmp_path / data.name), **changes) for data in (text, pair)]
    results = [quiet_train(config) for config in runs]
    assert results[0].base_val_loss == results[1].base_val_loss and results[0].steps == results[1].steps > 5
    assert losses(runs[0].out) == losses(runs[1].out)
    assert losses(runs[0].out, "val_loss") == losses(runs[1].out, "val_loss")
    assert len(set(losses(runs[0].out))) > 5
    for name, block in adapter(runs[0].out).items():
        assert block.equal(adapter(runs[1].out)[name])


def test_a_validation_set_of_its_own(make_config, tmp_path, text, pair):
    runs = [make_config(val_data=str(data), out=str(tmp_path / data.name), max_steps=1) for data in (text, pair)]
    first, second = (quiet_train(config).base_val_loss for config in runs)
    assert first == second is not None


@pytest.mark.slow
def test_a_bad_id_ends_the_run_when_it_comes_up(make_config, tmp_path):
    """It is too rare for the sample at the start to find, and lies in the validation set, which is read first."""
    tokens = np.ones((20_000, 30), np.uint16)
    tokens[7, 2] = 300
    tokens[12_345, 29] = 300
    write_binidx(tmp_path / "good", tokens[:100] % 256)
    write_binidx(tmp_path / "bad", np.delete(tokens, 7, axis=0))
    config = make_config(data=str(tmp_path / "good"), val_data=str(tmp_path / "bad"), max_steps=1, batch_size=500)
    with pytest.raises(UserError, match=r"bad\.bin: document 12344 .*token 300 .* vocabulary of 256 ids"):
        quiet_train(config)


@pytest.mark.slow
def test_a_bad_id_of_one_rank_ends_all(make_config, tmp_path):
    tokens = np.ones((20_000, 4), np.uint16)
    tokens[12_345, 3] = 300
    write_binidx(tmp_path / "bad", tokens)
    config = make_config(data=str(tmp_path / "bad"), devices=2, batch_size=1000, max_steps=0)
    done = run_command(config)
    assert done.returncode == 2, done.stderr
    assert "bad.bin: document 12345 (of 0 to 19999): token 300 is not" in done.stderr and "Traceback" not in done.stderr
