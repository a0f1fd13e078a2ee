"""What identifies a base. What version 0.1.0 recorded is in tests/training/version_0_1_0, whose run goes on and merges
(tests/training/test_version_0_1_0.py)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from rwkv_miss import fingerprints
from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.fingerprints import fingerprint, is_of_base


def test_a_fingerprint_is_of_the_content(random_weights):
    weights = random_weights()
    mark = fingerprint(weights)
    assert mark == fingerprint(dict(reversed(weights.items())))
    key = "blocks.1.att.w1"
    changed = [
        {**weights, key: weights[key].bfloat16().float()},
        {**weights, key: weights[key].bfloat16()},
        {**weights, key: weights[key].reshape(5, 32)},
        {k: t for k, t in weights.items() if k != key},
        {k.replace(key, key + "_"): t for k, t in weights.items()},
    ]
    marks = [fingerprint(c) for c in changed]
    assert len({mark, *marks}) == 1 + len(changed)
    assert not any(is_of_base(other, mark) for other in marks)


def test_every_value_of_a_large_tensor_counts():
    large = torch.zeros(1_000_000)
    marks = {fingerprint({"w": large})}
    for i in (0, 999_999, *range(1000, 999_999, 49_999)):
        changed = large.clone()
        changed[i] = 1
        marks.add(fingerprint({"w": changed}))
    assert len(marks) == 3 + len(range(1000, 999_999, 49_999))
    transposed = torch.arange(6.0).view(2, 3).T
    assert fingerprint({"w": transposed}) == fingerprint({"w": transposed.contiguous()})


@pytest.fixture
def hashed(monkeypatch, tmp_path) -> list:
    """Grows by an element each time that a file is hashed whole; every file's hash is kept, in a folder of the test."""
    found: list = []
    whole = fingerprints._whole
    monkeypatch.setattr(fingerprints, "_whole", lambda *x: (found.append(1), whole(*x))[1])
    monkeypatch.setattr(fingerprints, "_LARGE", 0)
    monkeypatch.setattr(fingerprints, "cache_folder", lambda: tmp_path / "cache")
    return found


def mark_of(path: Path) -> str:
    return fingerprint(read_checkpoint(path), path)


def test_a_file_is_hashed_once(make_base, hashed, tmp_path):
    path = make_base()
    mark = mark_of(path)
    assert mark_of(path) == mark == fingerprint(read_checkpoint(path)) and len(hashed) == 2
    os.utime(path, ns=(0, 0))
    assert mark_of(path) == mark and len(hashed) == 3
    copy = tmp_path / "copy.pth"
    copy.write_bytes(path.read_bytes())
    assert mark_of(copy) == mark and len(hashed) == 4


def test_another_file_of_the_same_name_size_and_time(make_base, hashed):
    path = make_base()
    mark, stat = mark_of(path), path.stat()
    make_base(seed=1)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size and path.stat().st_ino == stat.st_ino
    assert mark_of(path) != mark


def test_a_cache_that_cannot_be_written_to(make_base, hashed, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    path = make_base()
    assert mark_of(path) == mark_of(path) and len(hashed) == 2
