"""Times our World tokenizer against the `rwkv` package's, after checking that tokens agree."""

from __future__ import annotations

import sysconfig
import time
from pathlib import Path
from typing import Any

from rwkv_miss.benchmarks.common import Table, installed_file, load_file

TEXT_BYTES = 2_000_000


def bench_tokenizer(thread_count: int) -> Table:
    """MB/s of the World tokenizer: `pyrwkv_tokenizer`, ours, and the Python trie of the `rwkv` package.

    The text is source code of Python's standard library. Both must give the same tokens. Each runs in one thread,
    whatever `thread_count` is.

    Returns:
        A table with a row for each: name; mb_per_s, the best of 3; ratio, our speed over its; note, why there are no
        figures.
    """
    from pyrwkv_tokenizer import RWKVTokenizer

    ours = RWKVTokenizer()
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(p.read_text(encoding="utf-8", errors="replace") for p in sources)[:TEXT_BYTES]
    encoders = {"pyrwkv_tokenizer": ours.encode}
    trie = installed_file("rwkv", "rwkv/rwkv_tokenizer.py")
    if trie:
        encoders["rwkv (Python trie)"] = load_file(trie).TRIE_TOKENIZER(ours.vocab_filepath).encode
    rows: list[dict[str, Any]] = []
    tokens: dict[str, list[int]] = {}
    for name, encode in encoders.items():
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            tokens[name] = list(encode(text))
            seconds.append(time.perf_counter() - start)
        assert tokens[name] == tokens["pyrwkv_tokenizer"], f"{name} gives other tokens than ours"
        speed = len(text.encode()) / min(seconds) / 1e6
        rows.append(
            {"name": name, "mb_per_s": speed, "ratio": (rows[0]["mb_per_s"] if rows else speed) / speed, "note": ""}
        )
    if not trie:
        rows.append({"name": "rwkv (Python trie)", "note": "not installed: pip install rwkv"})
    return Table(f"World tokenizer, encode of {TEXT_BYTES / 1e6:g} MB of text, one thread", rows)
