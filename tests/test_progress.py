"""The progress display: a bar on a terminal, few lines elsewhere."""

from __future__ import annotations

import io

import pytest

from rwkv_miss import progress
from rwkv_miss.progress import show_progress


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """`clock[0]` is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_where_there_is_no_terminal(clock):
    out = io.StringIO()
    with show_progress("answers", out) as report:
        for second in range(300):
            clock[0] = 100.0 + second
            report(0 if second < 15 else second, 900)
    lines = out.getvalue().splitlines()
    assert len(lines) == 29 and "\x1b" not in out.getvalue()
    assert lines[0] == "answers: 0 of 900, ETA unknown"
    assert lines[1] == "answers: 20 of 900, ETA 0:14:40"  # 20 in 20 seconds


def test_short_work_prints_nothing(clock):
    out = io.StringIO()
    with show_progress("rows", out) as report:
        clock[0] += 9.9
        report(5, 5)
    assert out.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_bar_on_a_terminal_which_is_gone_at_the_end(monkeypatch, error):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal()
    with pytest.raises(KeyboardInterrupt) if error else show_progress("none", io.StringIO()):  # noqa: SIM117
        with show_progress("answers", out) as report:
            report(3, 40)
            report(4, 40)  # too soon to be drawn
            if error:
                raise error
    text = out.getvalue()
    assert "answers" in text and "3/40" in text and "ETA" in text and "4/40" not in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is hidden and shown again
    assert text.endswith("\x1b[2K")
