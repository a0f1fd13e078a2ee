"""Counts the tokens that carry loss in a second of training: records packed into rows, beside rows of one record."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_miss.benchmarks.common import Table, ratios, threads
from rwkv_miss.benchmarks.step import Sizes, make_model, train_on
from rwkv_miss.config import DataOptions
from rwkv_miss.data.batches import BatchStream
from rwkv_miss.data.corpus import Corpus, id_dtype, read_tokens
from rwkv_miss.data.documents import Documents, all_documents
from rwkv_miss.data.packing import make_rows
from rwkv_miss.data.store import open_store, write_store
from rwkv_miss.data.tokenizers import load_tokenizer

SIZES = Sizes(12, 768, 65536, 512, 32)
"""Those of 0.1B, rows of 512 tokens, and r = 32."""
BATCH_SIZE = 4
RECORDS = 7473
ROUNDS = 7
WAYS = {"packed": (True, False), "as wide as the longest record": (False, False), "as its batch's": (False, True)}
"""Whether rows are packed, and whether columns without a target are cut off each batch."""
_GOAL = 2.5
# Of GSM8K's training file (github.com/openai/grade-school-math, 7,473 records): means, standard deviations and
# correlation of the logarithms of the World tokens of a question and of its answer.
_MEANS, _DEVIATIONS, _CORRELATION = (3.963, 4.516), (0.356, 0.429), 0.535
_LONGEST = 378
_WORDS = ("apples", "money", "hours", "school", "dollars", "each", "total", "many", "week", "more", "there", "number")


def bench_packing(thread_count: int) -> Table:
    """Training steps of MiSS in bf16 on a CPU, forward and backward, on an RWKV-7 of random weights, with `BATCH_SIZE`
    rows each. The records are questions and answers whose lengths are drawn from the log-normal distribution that those
    of GSM8K have, by a seed; only answers carry loss. All ways take turns, each with its own next batch.

    Returns:
        A table with a row for each of `WAYS`: name; width, the columns of a batch, the mean of `ROUNDS`; loss_share,
        the part of its positions that carries loss; loss_tokens_per_s, of all rounds; for those that are not packed,
        ratio, how many times as many the packed ones have, in the median of the rounds, ratio_min, ratio_max and, where
        there is one, its goal.
    """
    with threads(thread_count), tempfile.TemporaryDirectory() as folder:
        documents = _documents(Path(folder))
        model = make_model(7, "bf16", SIZES)
        streams = {name: iter(_stream(documents, *way)) for name, way in WAYS.items()}
        found: dict[str, list[tuple[int, int, int, float]]] = {name: [] for name in WAYS}
        for i in range(ROUNDS + 1):
            for name, stream in streams.items():
                batch = next(stream)
                start = time.perf_counter()
                train_on(model, batch)
                seconds = time.perf_counter() - start
                if i > 0:  # the first round warms up
                    rows, width = batch["tokens"].shape
                    found[name].append((width, rows * width, batch["step_tokens"], seconds))
    n_layer, n_embd, _, ctx_len, rank = SIZES
    title = f"Packing: RWKV-7, {n_layer} layers of {n_embd}, bf16, r = {rank}, {BATCH_SIZE} rows of at most {ctx_len}"
    return Table(f"{title}, {ROUNDS} rounds, {thread_count} thread(s)", _rows(found))


def _rows(found: dict[str, list[tuple[int, int, int, float]]]) -> list[dict[str, Any]]:
    rates = {name: [tokens / seconds for _, _, tokens, seconds in rounds] for name, rounds in found.items()}
    rows = []
    for name, rounds in found.items():
        widths, positions, tokens, seconds = zip(*rounds, strict=True)
        row = {"name": name, "width": statistics.mean(widths), "loss_share": sum(tokens) / sum(positions)}
        row |= {"loss_tokens_per_s": sum(tokens) / sum(seconds)}
        if name != "packed":
            row |= ratios("ratio", rates["packed"], rates[name])
        rows.append(row)
    rows[1]["goal"] = _GOAL
    return rows


def _documents(folder: Path) -> Documents:
    path, tokenizer = folder / "records.jsonl", load_tokenizer("world")
    path.write_text("".join(json.dumps(record) + "\n" for record in _records()))
    corpus = Corpus((str(path),), "world", tokenizer.vocab_size, DataOptions())
    written = write_store(folder, read_tokens(corpus, 1), id_dtype(tokenizer))
    return all_documents(open_store(folder, "records", written))


def _records() -> list[dict[str, str]]:
    rng = np.random.default_rng(0)
    spread = np.diag(_DEVIATIONS) @ np.array([[1, _CORRELATION], [_CORRELATION, 1]]) @ np.diag(_DEVIATIONS)
    lengths = np.exp(rng.multivariate_normal(_MEANS, spread, RECORDS)).clip(1, _LONGEST).round().astype(int)

    def text(n_tokens: int) -> str:  # each word is a token, with the space before it
        return " ".join(rng.choice(_WORDS, n_tokens))

    return [{"question": text(question), "answer": text(answer)} for question, answer in lengths]


def _stream(documents: Documents, packing: bool, trim: bool) -> BatchStream:
    rows, _ = make_rows(documents, SIZES.tokens, packing)
    plain: dict[str, Any] = {"accumulate": 1, "rank": 0, "world_size": 1, "seed": 0, "shuffle": True}
    return BatchStream(rows, batch_size=BATCH_SIZE, trim=trim, **plain)
