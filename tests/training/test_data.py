"""The data of a run: what ctx_len cuts off is reported or refused, and how answers are written is recorded."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rwkv_miss.data import corpus
from rwkv_miss.errors import UserError
from tests.training.runs import losses, quiet_train, run_train


def records_of(path: Path, lengths: list[int]) -> Path:
    """A file with one question and answer for each length, the number of its positions."""
    bare = len("User: q\n\nAssistant: ")
    path.write_text("".join(json.dumps({"question": "q", "answer": "a" * (n - bare)}) + "\n" for n in lengths))
    return path


def test_more_than_one_percent_lost_is_a_warning(make_config, tmp_path, caplog):
    data = records_of(tmp_path / "a.jsonl", [40] * 97 + [70, 80, 90])
    config = make_config(data=str(data), max_steps=1, allow_dropping=False, packing=True)
    quiet_train(config)
    [said] = [m for m in caplog.messages if "ctx_len" in m]
    assert re.fullmatch(
        rf"{data}: of 100 records, 3 lose their ends to ctx_len 64 and 0 have nothing left to learn, with 48 of "
        r"[\d,]+ loss tokens; ctx_len 80 would keep 99 % of the records whole and of the loss tokens",
        said,
    )
    caplog.clear()
    quiet_train(replace(config, ctx_len=80, overwrite=True))  # the length that the warning promised is enough
    quiet_train(replace(config, long_documents="carry", overwrite=True))
    assert not [m for m in caplog.messages if "ctx_len" in m]


def test_nearly_empty_rows_are_a_warning(make_config, tmp_path, caplog):
    """Without packing they are as wide as the longest row of a batch, here of 8 rows."""

    def warned(lengths, **changes):
        data = records_of(tmp_path / "a.jsonl", lengths)
        caplog.clear()
        quiet_train(make_config(data=str(data), max_steps=1, overwrite=True, **changes))
        return [m for m in caplog.messages if "padding" in m]

    [said] = warned([21] * 7 + [64])
    assert said.startswith(f"{tmp_path / 'a.jsonl'}: the documents fill 41.2% of the rows, the rest is padding")
    assert not warned([21] * 7 + [40]) and not warned([21] * 7 + [64], packing=True)
    assert not warned([21] * 7 + [64], batch_size=1)
    [said] = warned([31], packing=True)
    assert "all records together fill 48.4% of the rows" in said
    assert not warned([32], packing=True)


@pytest.mark.parametrize("where", ["data", "val_data"])
def test_more_than_half_lost_is_an_error_unless_allowed(make_config, tmp_path, where):
    data = records_of(tmp_path / "a.jsonl", [40] * 2 + [70, 80, 90])
    config = make_config(
        max_steps=1, allow_dropping=False, ctx_len=64, data=str(records_of(tmp_path / "b.jsonl", [40]))
    )
    config = replace(config, **{where: str(data)})
    with pytest.raises(UserError, match=rf"^{data}: of 5 records, 3 lose .*; raise ctx_len, or give --allow_dropping"):
        quiet_train(config)
    assert not Path(config.out).exists()
    records_of(data, [40] * 3 + [70, 80, 90])  # half is not more than half
    quiet_train(config)
    records_of(data, [40] * 2 + [70, 80, 90])
    quiet_train(replace(config, allow_dropping=True, overwrite=True))


@pytest.mark.slow
def test_warnings_come_from_one_process_alone(make_config, tmp_path):
    data = records_of(tmp_path / "a.jsonl", [40] * 9 + [70])
    data.write_text(data.read_text() + '{"text": "t", "source": "web"}\n')
    done = run_train(make_config(data=str(data), max_steps=1, devices=2, batch_size=4))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("lose their ends to ctx_len 64") == done.stderr.count("'source' (1)") == 1


def test_the_data_are_tokenised_once(make_config, data, tmp_path, monkeypatch, caplog):
    """A second run with other settings of the training has the same rows, losses and messages; one with another ctx_len
    has the same tokens."""
    encoded = []
    encode = corpus.encode_records

    def counted(records, *more):
        records = list(records)
        encoded.extend(records)
        return encode(records, *more)

    monkeypatch.setattr(corpus, "encode_records", counted)
    config = make_config(data=str(shutil.copy(data, tmp_path)), max_steps=3, val_split=0.2)
    results, said = [], []
    for changes in ({}, {"out": str(tmp_path / "again"), "max_steps": 2, "accumulate": 1}):
        caplog.clear()
        results.append(quiet_train(replace(config, **changes)).base_val_loss)
        said.append([message for message in caplog.messages if "ctx_len" in message])
    assert len(encoded) == 29
    assert results[0] == results[1] and said[0] == said[1] and len(said[0]) == 2
    assert losses(tmp_path / "again")[:2] == losses(config.out)[:2]
    quiet_train(replace(config, ctx_len=65, overwrite=True))
    assert len(encoded) == 29
    quiet_train(replace(config, answer_end="blank_line", overwrite=True))
    assert len(encoded) == 2 * 29


def test_how_answers_were_written_is_recorded_and_kept(make_config, tmp_path):
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps({"question": "q", "answer": f"a\n\nb{n}"}) + "\n" for n in range(8)))
    config = make_config(data=str(data), max_steps=1)
    quiet_train(config)
    facts = json.loads((Path(config.out) / "adapter" / "rwkv_miss.json").read_text())
    assert (facts["answer_lines"], facts["answer_end"]) == ("keep", "token")
    other = replace(config, answer_lines="join", answer_end="blank_line", out=str(tmp_path / "other"))
    quiet_train(other)
    assert losses(other.out) != losses(config.out)
    facts = json.loads((Path(other.out) / "adapter" / "rwkv_miss.json").read_text())
    assert (facts["answer_lines"], facts["answer_end"]) == ("join", "blank_line")
    with pytest.raises(UserError, match=r"other settings: answer_lines was keep, is join$"):
        quiet_train(replace(config, answer_lines="join", max_steps=2, resume="auto"))


def test_a_run_from_before_the_form_of_answers_could_be_chosen(make_config):
    """It joined lines and ended answers with a blank line: going on with other answers is refused."""
    config = make_config(max_steps=1, answer_lines="join", answer_end="blank_line")
    quiet_train(config)
    path = Path(config.out) / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    assert list(settings)[:4] == ["base", "data", "tokenizer", "out"]
    del settings["answer_lines"], settings["answer_end"], settings["allow_dropping"]
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=r"answer_lines was join, is keep; answer_end was blank_line, is token$"):
        quiet_train(replace(config, max_steps=2, resume="auto", answer_lines="keep", answer_end="token"))
    assert quiet_train(replace(config, max_steps=2, resume="auto")).steps == 2
