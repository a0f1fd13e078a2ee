"""An export target is one file and one line of a table: the toy is written and verified, or refuses the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rwkv_miss import AdapterConfig, merge
from rwkv_miss.cli import main
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.export.table import ADAPTER_TARGETS, TARGETS
from rwkv_miss.export.target import Target
from tests.doors.toy_export import ADAPTER, TARGET
from tests.helpers import save_random_adapter


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(TARGETS, "npz", TARGET)
    monkeypatch.setitem(ADAPTER_TARGETS, "npz-lora", ADAPTER)


@pytest.fixture
def adapter(either_base, tmp_path):
    return save_random_adapter(either_base, tmp_path / "adapter", AdapterConfig(r=4))


def test_it_holds_what_the_pth_holds(either_base, adapter, tmp_path):
    merge(either_base, adapter, tmp_path / "merged.pth")
    report = merge(either_base, adapter, tmp_path / "merged.npz")
    expected = torch.load(tmp_path / "merged.pth")
    with np.load(tmp_path / "merged.npz") as file:
        assert list(file.files) == list(expected)
        assert all(np.array_equal(file[key], t.numpy()) for key, t in expected.items())
    assert report.logits_error < 1e-5 < report.logits_effect


def test_what_it_cannot_hold_is_refused(either_base, adapter, tmp_path):
    with pytest.raises(UserError, match=r"\.npz holds fp32 alone; give --dtype fp32"):
        merge(either_base, adapter, tmp_path / "merged.npz", "bf16")
    with pytest.raises(UserError, match=r"a model is written as \.pth or \.npz"):
        merge(either_base, adapter, tmp_path / "merged.gguf")
    assert not list(tmp_path.glob("*merged*"))


def test_what_is_read_back_wrong_gets_no_name(either_base, adapter, tmp_path, monkeypatch):
    def read(path):
        return {key: t.roll(1) for key, t in TARGET.read(path).items()}

    monkeypatch.setitem(TARGETS, "npz", Target(".npz", TARGET.write, read))
    with pytest.raises(RunError, match="was read back changed"):
        merge(either_base, adapter, tmp_path / "merged.npz")
    assert not list(tmp_path.glob("*merged*"))


def test_an_adapter_alone_is_what_merging_adds(either_base, adapter, tmp_path, capsys):
    out = tmp_path / "adapter.npz"
    arguments = ["--model", str(either_base), "--adapter", str(adapter), "--out", str(out)]
    assert main(["export", "--to", "npz-lora", *arguments]) == 0
    assert "read back as it was written" in capsys.readouterr().out
    merge(either_base, adapter, tmp_path / "merged.pth")
    base, merged = torch.load(either_base), torch.load(tmp_path / "merged.pth")
    with np.load(out) as file:
        for path in {name.split(" ")[0] for name in file.files}:
            added = torch.from_numpy(file[f"{path} B"] @ file[f"{path} A"])
            assert torch.equal(base[f"{path}.weight"] + added, merged[f"{path}.weight"])
