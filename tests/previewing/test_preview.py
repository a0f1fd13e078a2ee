"""`rwkv-miss preview`: what it shows of records, in each of its forms, and what it warns of."""

from __future__ import annotations

import io
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from rwkv_miss import cli
from rwkv_miss.cli import main
from rwkv_miss.config import DataOptions, PreviewConfig
from rwkv_miss.data.binidx import write_binidx
from rwkv_miss.data.documents import encode_record
from rwkv_miss.data.records import Record, Turn
from rwkv_miss.data.rendering import render
from rwkv_miss.data.tokenizers import load_tokenizer
from rwkv_miss.errors import UserError
from rwkv_miss.previewing.preview import preview
from rwkv_miss.previewing.showing import shorten, show_record, visible
from rwkv_miss.previewing.terminal import print_preview
from tests.test_readme import commands

DOCS = Path(__file__).parents[2] / "docs" / "preview.md"
NASTY = "<script>alert('x')</script> & \"quoted\" \x1b[31m </pre>"
PAIR = {"question": "2 + 2?", "answer": "4"}
WORLD = load_tokenizer("world")


@pytest.fixture
def write(tmp_path):
    """`write(records)`: their file."""

    def write(records, name="a.jsonl") -> Path:
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return tmp_path / name

    return write


def config_of(data, **changes) -> PreviewConfig:
    return PreviewConfig(data=str(data), **{"tokenizer": "bytes", "out": str(Path(data).parent / "run")} | changes)


def printed(config, **console) -> str:
    stream = io.StringIO()
    print_preview(preview(config), config, Console(file=stream, width=100, markup=False, highlight=False, **console))
    return stream.getvalue()


def show(record, ctx_len, tokenizer=WORLD):
    options = DataOptions()
    document = encode_record(record, tokenizer, 2**31, options)
    return show_record(record.where, render(record, options), document, tokenizer, ctx_len, carry=False), document


def test_the_pieces_are_the_record_and_its_mask():
    record = Record("a:1", (Turn("user", "Warum ⏎ <b>?"), Turn("assistant", "Darum.\n\nÄöü 漢字 😀")))
    shown, document = show(record, 4096)
    assert "".join(piece.text for piece in shown.pieces) == "User: Warum ⏎ <b>?\n\nAssistant: Darum.\n\nÄöü 漢字 😀"
    assert [i for piece in shown.pieces for i in piece.ids] == document.ids.tolist()
    assert [piece.learned for piece in shown.pieces for _ in piece.ids] == document.mask.tolist()
    assert [piece.learned for piece in shown.pieces] == [False, True, True] and shown.pieces[-1].is_end
    assert (shown.kind, shown.tokens, shown.rows) == ("conversation", len(document.ids) - 1, 1)


@pytest.mark.parametrize("ctx_len", range(1, 40))
def test_what_ctx_len_cuts_is_marked(ctx_len):
    """The text that is not cut is what the tokens of a row say, wherever these end, a character's middle aside."""
    shown, document = show(Record("a:1", (Turn("user", "Why?"), Turn("assistant", "Äöü 漢字 😀 end."))), ctx_len, BYTES)
    kept = [piece for piece in shown.pieces if not piece.is_cut]
    assert [i for piece in kept for i in piece.ids] == document.ids[: ctx_len + 1].tolist()
    text = BYTES.decode(document.ids[: ctx_len + 1].tolist())
    whole = "User: Why?\n\nAssistant: Äöü 漢字 😀 end."
    assert "".join(piece.text for piece in shown.pieces) == whole
    assert "".join(piece.text for piece in kept).startswith(text.rstrip("\ufffd"))
    assert shown.rows == (ctx_len >= len("User: Why?\n\nAssistant:"))


BYTES = load_tokenizer("bytes")


def test_plain_text_goes_on_in_further_rows():
    shown, _ = show(Record("a:1", (Turn("text", "abcdefgh"),)), 3, BYTES)
    assert shown.rows == 3 and not any(piece.is_cut for piece in shown.pieces) and shown.kind == "plain text"


def test_characters_that_nobody_sees_are_shown():
    assert visible(" a b \nc\t\r\n") == "·a b·⏎\nc→␍⏎\n"
    assert visible("\x00\x1b[31m\x7f") == "␀␛[31m␡"
    assert visible("a\u00a0b\u200bc\ufeff\u2028\ud800\u202e\x85") == (
        "a<U+00A0>b<U+200B>c<U+FEFF><U+2028><U+D800><U+202E><U+0085>"
    )
    assert visible("Äöü 漢字 😀 é") == "Äöü 漢字 😀 é"


def test_long_text_is_shortened_in_its_middle():
    assert shorten("abcdef", 6) == ("abcdef", 0, "") and shorten("abcdefg", 4) == ("ab", 3, "fg")


def test_it_is_legible_in_a_file(write):
    """What is learned, given and cut off is told by the beginning of each line, without colour."""
    data = write([PAIR, {"question": "2 + 2?", "answer": "It is four,\n\nI think."}, {"text": "one\ntwo"}])
    said = printed(config_of(data, ctx_len=32, allow_dropping=True))
    assert "\x1b" not in said
    lines = [line for line in said.splitlines() if line[1:2] == "│"]
    assert lines == [
        *(" │ User: 2 + 2?⏎", " │ ⏎", " │ Assistant:", "+│ ·4∎"),
        *(" │ User: 2 + 2?⏎", " │ ⏎", " │ Assistant:", "+│ ·It is fo", "x│ ur,⏎", "x│ ⏎", "x│ I think.∎"),
        *("+│ one⏎", "+│ two∎"),
    ]
    assert f"\n2. {data}:2: conversation, 46 tokens, 23 with loss\n" in said
    tokens = printed(config_of(data, records=1, token_ids=True)).splitlines()
    assert "#│ 32 52" in tokens and "#│ 0" in tokens


def test_nothing_of_the_data_is_obeyed_by_a_terminal(write):
    said = printed(config_of(write([{"text": NASTY, NASTY: 1}], "a\x1b[31m.jsonl")))
    assert "\x1b" not in said and "␛[31m" in said and "\ufffd[31m" in said


def test_colours_add_to_the_marks(write):
    config = config_of(write([PAIR]))
    coloured = printed(config, force_terminal=True, color_system="standard")
    without = printed(config, force_terminal=True, no_color=True)
    assert "\x1b[32m+│ " in coloured and "32m" not in without
    plain = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert plain == re.sub(r"\x1b\[[\d;]*m", "", without) and "+│ ·4∎" in plain


def test_long_lines_are_wrapped_behind_their_marks(write):
    said = printed(config_of(write([{"text": "word " * 60}])), force_terminal=True, no_color=True)
    lines = [line for line in re.sub(r"\x1b\[[\d;]*m", "", said).splitlines() if "word" in line]
    assert len(lines) > 2 and all(line.startswith("+│ word") and len(line) <= 100 for line in lines)


def test_the_figures(write):
    records = [
        *[{"question": f"count {n}", "answer": "tick " * n, "id": n} for n in range(1, 101)],
        {"question": "count 1", "answer": "none"},
        *[{"text": "plain"}] * 2,
    ]
    found = preview(config_of(write(records), ctx_len=256, batch_size=2, accumulate=3, epochs=2))
    lengths = [len(f"User: count {n}\n\nAssistant: {'tick ' * n}") for n in range(1, 101)]
    lengths += [len("User: count 1\n\nAssistant: none"), 5, 5]
    assert (found.records, found.conversations, found.tokens) == (103, 101, sum(lengths))
    assert found.loss_tokens == sum(5 * n + 2 for n in range(1, 101)) + 6 + 2 * 5
    assert (found.median, found.most, found.longest) == (sorted(lengths)[51], sorted(lengths)[-2], max(lengths))
    assert sum(count for _, count in found.histogram) == 103
    assert [at.ctx_len for at in found.lengths] == [128, 256, 512, 1024]
    assert found.now.truncated == sum(length > 256 for length in lengths) and found.now.dropped == 0
    assert found.unread == {"id": 100} and found.outside == {} and found.is_all
    assert (found.copies.count, found.several_answers.count) == (1, 1)
    assert [Path(place).name for place in found.copies.examples[0]] == ["a.jsonl:103", "a.jsonl:102"]
    assert [Path(place).name for place in found.several_answers.examples[0]] == ["a.jsonl:101", "a.jsonl:1"]
    assert found.steps_an_epoch == -(-found.now.packed_rows // 6) and found.steps == 2 * found.steps_an_epoch
    assert found.speed is None and found.seconds is None
    assert found.reader[0] == "jsonl" and found.template[0] == "world" and len(found.shown) == 5


def test_a_limit(write):
    data = write([{"text": f"document {n}"} for n in range(9)])
    found = preview(config_of(data, limit=4, records=9))
    assert (found.records, len(found.shown), found.is_all) == (4, 4, False)
    assert "4 records, the first ones, 4 texts" in " ".join(printed(config_of(data, limit=4)).split())
    assert preview(config_of(data, limit=9)).is_all


def test_the_time_is_that_of_a_run_that_was_measured(write, tmp_path):
    data = write([{"text": "x" * 99}] * 10)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("step,tokens_per_s\n0,\n1,10\n2,99\n3,30\n")
    found = preview(config_of(data, epochs=3))
    assert (found.speed, found.seconds) == (30, pytest.approx(3 * 990 / 30))
    assert "about 0:01:39, at the 30 tokens/s" in printed(config_of(data, epochs=3))
    assert preview(config_of(data, max_steps=found.steps_an_epoch)).seconds == pytest.approx(33)


def test_what_train_would_refuse_is_said(write, make_base):
    data = write([PAIR, {"text": "a\0b"}, {"text": "a\0c"}, {"text": "À"}])
    base = make_base(vocab_size=128)
    found = preview(config_of(data, base=str(base)))
    assert (found.records, found.vocabulary) == (2, (128, str(base)))
    assert found.outside == {0xC3: 1, 0x80: 1} and found.refused == 2
    refused, outside, *_ = found.warnings
    assert "a.jsonl:2: the text has token 0" in refused and "; 1 more records would be refused" in refused
    assert "2 tokens are not in the vocabulary of 128 ids" in outside and "195" in outside
    with pytest.raises(UserError, match=r"a\.jsonl:1: the text has token 0"):
        preview(config_of(write([{"text": "\0"}])))


def test_what_ctx_len_loses_is_said(write):
    def said(cut, whole, **changes):
        records = [{"question": f"{n:03}?", "answer": "x" * (99 if n < cut else 9)} for n in range(cut + whole)]
        return " ".join(preview(config_of(write(records), ctx_len=64, **changes)).warnings)

    assert "lose their ends" not in said(1, 99)
    assert "of 100 records, 2 lose their ends to ctx_len 64 and 0 have nothing left" in said(2, 98)
    assert "would end before it begins" not in said(50, 50)
    assert "train would end before it begins: of 100 records, 51 lose" in said(51, 49)
    assert "would end before it begins" not in said(51, 49, allow_dropping=True)
    assert "lose their ends" not in said(51, 49, long_documents="carry")


def test_thoughts_and_calls_are_shown_as_the_template_writes_them(write):
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Rain.", "reasoning_content": "It says so."},
    ]
    data = write([{"messages": turns}])
    said = printed(config_of(data, template="g1-think"))
    lines = [line for line in said.splitlines() if line[1:2] == "│"]
    assert '+│ {"name": "look", "arguments": {"a": 1}}⏎' in lines and " │ User: Function output:⏎" in lines
    assert lines[-4:] == ["+│ >⏎", "+│ It says so.⏎", "+│ </think>⏎", "+│ Rain.∎"]
    assert re.search(r"template +g1-think: it was given", said)
    assert not preview(config_of(data, template="g1-think")).unread
    assert preview(config_of(data, template="g1")).unread == {"reasoning_content": 1}


def test_answers_to_compare_are_shown(write):
    data = write([{"prompt": "Why?", "chosen": "Because.", "rejected": "No."}] * 2)
    found = preview(config_of(data, records=2))
    assert (found.records, found.pairs, found.conversations) == (4, 2, 4)
    assert [shown.where.partition(", ")[2] for shown in found.shown] == ["chosen", "rejected"]
    assert [shown.pieces[1].text for shown in found.shown] == [" Because.", " No."]
    assert "no objective learns from yet" in found.warnings[0] and "; 1 more records would" in found.warnings[0]


def test_rows_that_are_nearly_empty_are_said(write):
    data = write([{"text": f"{n}" * (500 if n == 0 else 1)} for n in range(8)])
    assert any("packing is off" in said for said in preview(config_of(data, packing=False)).warnings)
    assert not preview(config_of(data)).warnings


def test_a_binidx(write, tmp_path):
    data = write([{"text": "one"}, {"text": "two"}, {"text": "one"}])
    assert main(["data", "binidx", f"--data={data}", "--tokenizer=bytes", f"--out={tmp_path / 'corpus'}"]) == 0
    found = preview(config_of(tmp_path / "corpus"))
    assert (found.reader[0], found.template[0], found.records, found.copies.count) == ("binidx", "none", 3, 1)
    assert found.shown[1].pieces[0].text == "two" and found.shown[1].where.endswith("corpus: document 1")
    assert not preview(config_of(tmp_path / "corpus", limit=2)).is_all


def test_documents_of_a_binidx_of_which_nothing_is_learned(tmp_path):
    write_binidx(tmp_path / "corpus", [[65, 66, 0], [], [0]])
    found = preview(config_of(tmp_path / "corpus", ctx_len=4))
    assert (found.records, found.tokens, found.without_loss, found.longest) == (3, 2, 2, 2)
    assert (found.now.dropped, found.now.packed_rows) == (2, 1) and [s.tokens for s in found.shown] == [2, 0, 0]
    assert any("2 of 3 records have no token that carries loss" in said for said in found.warnings)


def test_several_sources_come_as_often_as_they_weigh(write, tmp_path):
    """Each with its own reader and fields; the limit counts all of them."""
    first = write([{"text": f"one {n}", "id": n} for n in range(10)])
    (tmp_path / "b.csv").write_text("q,a\n1,2\n3,4\n5,6\n")
    data = [
        {"path": str(first), "weight": 2},
        {"path": str(tmp_path / "b.csv"), "prompt_field": "q", "answer_field": "a"},
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("step,tokens_per_s\n1,10\n")
    config = PreviewConfig(
        data=data, tokenizer="bytes", out=str(tmp_path / "run"), packing=False, batch_size=1, records=13, epochs=2
    )
    found = preview(config)
    assert (found.records, found.conversations, found.unread) == (13, 3, {"id": 10})
    assert (found.steps_an_epoch, found.steps) == (2 * 10 + 3, 2 * (2 * 10 + 3))
    conversations = 3 * len("User: 1\n\nAssistant: 2")
    assert found.seconds == pytest.approx(2 * (2 * 10 * len("one 1") + conversations) / 10)
    assert found.reader == ("jsonl, csv", "by the name of a.jsonl and of b.csv")
    assert found.shown[-1].pieces[1].text == " 6" and "b.csv" in found.data
    assert not preview(replace(config, limit=11)).is_all


def test_the_settings_of_a_run_are_taken(write, make_base, tmp_path, capsys):
    data, base, run = write([PAIR] * 3), make_base(vocab_size=256), tmp_path / "run"
    options = [f"--base={base}", f"--data={data}", "--tokenizer=bytes", f"--out={run}", "--ctx_len=40"]
    assert main(["train", *options, "--max_steps=1", "--adapter.r=4", "--batch_size=2"]) == 0
    capsys.readouterr()
    assert main(["preview", "--config", str(run / "config.yaml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ctx_len"], found["steps"], found["vocabulary"]) == (40, 1, [256, str(base)])
    assert found["speed"] > 0 and found["seconds"] > 0
    assert found["shown"][0]["pieces"][1] == {
        "text": " 4",
        "ids": [32, 52],
        "learned": True,
        "is_cut": False,
        "is_end": False,
    }


@pytest.mark.parametrize("command", [c for c in commands(DOCS.read_text()) if c.startswith("rwkv-miss")])
def test_a_command_of_the_docs_is_accepted_as_written(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out/mine").mkdir(parents=True)
    Path("out/mine/config.yaml").write_text("base: a.pth\ndata: a.jsonl\ntokenizer: world\nout: out/mine\n")
    cli._parse(shlex.split(command)[1:])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--records=-1"], "records is -1"),
        (["--limit=0"], "limit is 0"),
        (["--ask_base"], "ask_base is given without a base"),
        (["--ctx_len=0"], "ctx_len is 0"),
        (["--data=none.jsonl"], "none.jsonl: no such file"),
        (["--base=none.pth"], "none.pth: no such file"),
        (["--tokenizer=none"], "tokenizer 'none'"),
        (["--html=."], "is a folder"),
    ],
)
def test_wrong_options(write, capsys, options, message):
    assert main(["preview", f"--data={write([PAIR])}", "--tokenizer=bytes", *options]) == 2
    assert message in capsys.readouterr().err
