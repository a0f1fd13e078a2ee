"""The benchmark of packing: its records are as long as GSM8K's, and it has a row for each way."""

from __future__ import annotations

import numpy as np
import pytest

from rwkv_miss.benchmarks import packing
from rwkv_miss.data.tokenizers import load_tokenizer


def test_records_have_the_lengths_of_gsm8k():
    encode = load_tokenizer("world").encode
    lengths = np.array(
        [[len(encode(record[name])) for name in ("question", "answer")] for record in packing._records()]
    )
    # GSM8K's own: the means and the tenth, fiftieth and ninetieth percentile, counted in its file.
    assert lengths.mean(axis=0) == pytest.approx([56.1, 100.3], rel=0.02)
    assert np.percentile(lengths.sum(axis=1), [10, 50, 90]) == pytest.approx([92, 145, 236], rel=0.04)


def test_a_row_for_each_way(monkeypatch):
    monkeypatch.setattr(packing, "SIZES", packing.Sizes(1, 64, 65536, 512, 8))
    monkeypatch.setattr(packing, "RECORDS", 80)
    monkeypatch.setattr(packing, "ROUNDS", 1)
    packed, padded, trimmed = packing.bench_packing(1).rows
    assert packed["width"] == 512 >= padded["width"] > trimmed["width"]
    assert packed["loss_share"] > trimmed["loss_share"] > padded["loss_share"]
    assert "ratio" not in packed and padded["ratio"] > 0 < trimmed["ratio"]
    assert padded["goal"] == 2.5 and "goal" not in trimmed
