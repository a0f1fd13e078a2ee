"""The page of a preview: what it shows, that it needs nothing else, and that it is written whole or not at all."""

from __future__ import annotations

import json

import pytest

from rwkv_miss.cli import main
from tests.training.test_report import NASTY, Page, assert_self_contained


@pytest.fixture
def command(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"question": NASTY, "answer": "yes\n" + "x" * 50_000, NASTY: 1}) + "\n" + json.dumps({"text": "b"})
    )
    return ["preview", f"--data={tmp_path / 'a.jsonl'}", "--tokenizer=bytes", f"--html={tmp_path / 'p' / 'a.html'}"]


def test_what_it_shows(command, tmp_path):
    assert main([*command, "--ctx_len=256", "--token_ids"]) == 0
    page = Page(tmp_path / "p" / "a.html")
    assert_self_contained(page)
    visible = NASTY.replace("\x1b", "␛")
    assert f"User: {visible}⏎\n⏎\nAssistant:·yes⏎\nxxx" in page.text
    assert NASTY.replace("\x1b", "\ufffd") in page.text  # the name of the field that is not read
    tags = [tag for tag, _ in page.tags if tag in ("mark", "del")]
    assert tags == ["mark", "del", *["mark", "del", "del"], *["mark", "mark"]]  # the legend and the records
    assert "characters ...]" in page.text and "1 cut" in page.text and "token ids" in page.text
    assert "32 121 101 115 10" in page.text and "256" in page.text
    assert (tmp_path / "p" / "a.html").stat().st_size < 500_000


def test_one_that_is_there_is_not_replaced_unasked(command, tmp_path, capsys):
    assert main(command) == 0
    (tmp_path / "p" / "a.html").write_text("mine")
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err and (tmp_path / "p" / "a.html").read_text() == "mine"
    assert main([*command, "--overwrite"]) == 0
    assert "Records" in Page(tmp_path / "p" / "a.html").text


def test_a_disk_that_refuses(command, tmp_path, capsys, full_disk):
    with full_disk(1000):
        assert main(command) == 2
    assert "cannot be written" in capsys.readouterr().err and list((tmp_path / "p").iterdir()) == []
