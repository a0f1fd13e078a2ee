"""RWKV-6 on a real model: against the `rwkv` package, against itself in pieces, and the whole way to a merged file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rwkv_miss import AdapterConfig, inject, load_adapter, load_model, merge, save_adapter
from rwkv_miss.config import TrainConfig
from tests.helpers import loss_sum
from tests.processes import run_process
from tests.training.runs import quiet_train


@pytest.fixture
def model_file(reference) -> Path:
    """A trained RWKV-6 of 3.3M parameters: 12 layers, n_embd 128, 16 heads of 8, vocabulary of 256 bytes, fp32."""
    return reference / "models" / "tiny-rwkv6-3m.pth"


def package_logits(path: Path, ids: list[int], folder: Path) -> Tensor:
    """The `rwkv` package's logits (T, V), from a process where it expects RWKV-6."""
    pytest.importorskip("rwkv")
    code = (
        "import json, sys, numpy, rwkv.model\n"
        "model = rwkv.model.RWKV(model=sys.argv[1], strategy='cpu fp32')\n"
        "logits, _ = model.forward(json.loads(sys.argv[2]), None, full_output=True)\n"
        "numpy.save(sys.argv[3], logits.numpy())\n"
    )
    out = folder / "logits.npy"
    command = [sys.executable, "-c", code, str(path).removesuffix(".pth"), json.dumps(ids), str(out)]
    done = run_process(command, timeout=120)
    assert done.returncode == 0, done.stderr
    return torch.from_numpy(np.load(out))


def tokens(n: int, batch: int = 1) -> Tensor:
    return torch.randint(256, (batch, n), generator=torch.Generator().manual_seed(3))


@pytest.mark.slow
@torch.no_grad()
def test_the_rwkv_package(model_file, tmp_path):
    model, ids = load_model(model_file), tokens(257)
    assert (model.config.version, model.config.n_head, model.config.head_size) == (6, 16, 8)
    expected = package_logits(model_file, ids[0].tolist(), tmp_path)
    assert (model(ids)[0][0] - expected).abs().max() < 1e-4


def test_pieces_with_the_state_carried_on_are_one_pass(model_file):
    model, ids = load_model(model_file, torch.float64, wkv_backend="torch"), tokens(41, batch=2)
    weights = [model.blocks[0].att.time_faaaa, model.blocks[3].att.time_decay, model.blocks[5].ffn.key.weight]
    whole, last = model(ids)
    state, parts = None, []
    for piece in ids.split([1, 16, 7, 17], dim=1):
        logits, state = model(piece, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)
    torch.testing.assert_close(state.wkv, last.wkv, rtol=0, atol=1e-9)
    for found, expected in zip(
        torch.autograd.grad(torch.cat(parts, 1).square().mean(), weights),
        torch.autograd.grad(whole.square().mean(), weights),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)


def test_seq_start_makes_separate_documents(model_file):
    model, ids = load_model(model_file), tokens(30)
    starts = torch.zeros(1, 30, dtype=torch.bool)
    starts[0, [0, 13]] = True
    with torch.no_grad():
        packed, _ = model(ids, seq_start=starts)
        alone = torch.cat([model(ids[:, :13])[0], model(ids[:, 13:])[0]], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-5)


def test_gradients_of_the_backends_agree_with_float64(model_file):
    """d loss / d D of every adapter, by the kernels in fp32 against PyTorch operations in float64."""
    batch = {
        "tokens": tokens(65, 2),
        "targets": tokens(66, 2)[:, 1:],
        "seq_start": torch.zeros(2, 65, dtype=torch.bool),
    }
    batch["seq_start"][1, 40] = True
    found = {}
    for backend, dtype in (("torch", torch.float64), ("torch", torch.float32), ("auto", torch.float32)):
        model = inject(load_model(model_file, dtype, wkv_backend=backend), AdapterConfig(r=16))
        if dtype == torch.float64:  # the loss itself is in fp32 otherwise
            logits, _ = model(batch["tokens"], seq_start=batch["seq_start"])
            loss = cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
        else:
            loss = loss_sum(model, batch)[0]
        loss.backward()
        found[backend, dtype] = {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad}
    exact = found.pop(("torch", torch.float64))
    assert len(exact) == 12 * 8
    for gradients in found.values():
        for name, gradient in gradients.items():
            assert (gradient - exact[name]).norm() <= 2e-4 * exact[name].norm(), name


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("method", ["miss+state", "full"])
def test_what_is_trained_merges_and_runs_in_the_rwkv_package(model_file, tmp_path, method):
    """The package reads the state from the merged file, and transposes it."""
    model = inject(load_model(model_file), AdapterConfig(method, r=16))
    rng = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data += (0.5 if "time_state" in name else 0.01) * torch.randn(p.shape, generator=rng)
    save_adapter(model, tmp_path / "adapter")
    merge(model_file, tmp_path / "adapter", tmp_path / "merged.pth")
    ids = tokens(100)
    expected = package_logits(tmp_path / "merged.pth", ids[0].tolist(), tmp_path)
    assert (model(ids)[0][0] - expected).abs().max() < 1e-4
    assert (load_model(tmp_path / "merged.pth")(ids)[0][0] - expected).abs().max() < 1e-4
    assert (load_model(model_file)(ids)[0][0] - expected).abs().max() > 0.1


@pytest.mark.slow
def test_a_fine_tune_merges_and_runs_in_the_rwkv_package(model_file, tmp_path):
    data, merged = tmp_path / "text.txt", tmp_path / "merged.pth"
    data.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    config = TrainConfig(
        base=str(model_file),
        data=str(data),
        tokenizer="bytes",
        out=str(tmp_path / "run"),
        adapter=AdapterConfig(r=16),
        val_split=0.1,
        ctx_len=128,
        batch_size=4,
        max_steps=10,
        lr=5e-3,
    )
    result = quiet_train(config)
    assert result.best_val_loss < result.base_val_loss - 0.5

    adapter = Path(config.out) / "adapter"
    assert len(merge(model_file, adapter, merged).layers) == 12 * 8
    ids = tokens(200)
    with torch.no_grad():
        ours = load_adapter(load_model(model_file), adapter)(ids)[0][0]
    assert (package_logits(merged, ids[0].tolist(), tmp_path) - ours).abs().max() < 1e-4
