"""Records that the tests of evaluation make up."""

from __future__ import annotations

from rwkv_miss.data.records import Record, Turn


def record(question: str, answer: str) -> Record:
    return Record("here", (Turn("user", question), Turn("assistant", answer)))
