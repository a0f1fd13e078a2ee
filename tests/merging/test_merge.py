"""Merging: the merged file is base + adapter, in every runtime, or it is not there."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rwkv_miss import AdapterConfig, inject, load_adapter, load_model, merge, save_adapter
from rwkv_miss.adapters import miss
from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.cli import main
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.export import pth
from rwkv_miss.merging import sums
from tests.helpers import adapters
from tests.processes import run_process

WEIGHTS = "adapter_model.safetensors"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def make_adapter(base: Path, folder: Path, r: int = 5, targets: list[str] | None = None, std: float = 0.05) -> Path:
    model = inject(load_model(base), AdapterConfig(r=r, target_modules=targets))
    rng = torch.Generator().manual_seed(3)
    for layer in adapters(model).values():
        layer.miss_block.data.normal_(0, std, generator=rng)
    save_adapter(model, folder)
    return folder


def make_trained(base: Path, folder: Path, config: AdapterConfig) -> Path:
    """An adapter folder in which everything that `config` trains is random."""
    model = inject(load_model(base), config)
    rng = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data += (0.5 if name.endswith("time_state") else 0.02) * torch.randn(p.shape, generator=rng)
    save_adapter(model, folder)
    return folder


def expected_weights(base: Path, folder: Path, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """W + dW in float64, entry (o, c) of dW being D[c mod r, o], cast once."""
    expected = {}
    blocks = load_file(folder / WEIGHTS)
    for name, W in read_checkpoint(base).items():
        D = blocks.get(f"base_model.model.{name.removesuffix('.weight')}.miss_block")
        exact = W.double()
        if D is not None:
            exact = exact + D.double()[torch.arange(W.shape[1]) % D.shape[0]].T
        expected[name] = exact.to(dtype or W.dtype)
    return expected


def assert_same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    """The same keys in the same order, shapes, dtypes and bits; a file that PyTorch maps, with right checksums."""
    with zipfile.ZipFile(path) as z:
        assert z.testzip() is None
    merged = torch.load(path, weights_only=True, mmap=True)
    assert list(merged) == list(expected)
    for name, tensor in merged.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
        assert tensor.is_contiguous()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch) -> None:
    """A small base is merged in as many pieces as a large one."""
    monkeypatch.setattr(sys.modules[merge.__module__], "_CHUNK", 2000)
    monkeypatch.setattr(sums, "_PIECE", 100)


@pytest.fixture
def base(make_base) -> Path:
    return make_base()


@pytest.fixture
def folder(base, tmp_path) -> Path:
    return make_adapter(base, tmp_path / "adapter")


@pytest.mark.parametrize("stored", [BF16, FP16, FP32])
@pytest.mark.parametrize("wanted", [None, "bf16", "fp16", "fp32", torch.float32])
def test_every_weight_is_the_exact_sum_cast_once(make_base, tmp_path, stored, wanted):
    base = make_base(dtype=stored)
    folder = make_adapter(base, tmp_path / "adapter", r=7)
    report = merge(base, folder, tmp_path / "out.pth", wanted)
    dtype = {"bf16": BF16, "fp16": FP16, "fp32": FP32}.get(wanted, wanted)
    assert_same(tmp_path / "out.pth", expected_weights(base, folder, dtype))
    assert report.dtype == str(dtype or stored).removeprefix("torch.")
    assert report.out == tmp_path / "out.pth"
    assert 0 <= report.logits_error < report.logits_effect


def test_some_targets(base, tmp_path):
    folder = make_adapter(base, tmp_path / "adapter", targets=["att.output", "blocks.1.ffn.key"])
    report = merge(base, folder, tmp_path / "out.pth")
    assert_same(tmp_path / "out.pth", expected_weights(base, folder, None))
    changed = {f"blocks.{i}.att.output" for i in range(3)} | {"blocks.1.ffn.key"}
    assert {layer.name for layer in report.layers} == changed
    before, after = read_checkpoint(base), read_checkpoint(tmp_path / "out.pth")
    assert {n for n in before if not torch.equal(before[n], after[n])} == {f"{n}.weight" for n in changed}


def test_a_safetensors_base_and_layer_0_v_are_kept(make_base, tmp_path):
    base = make_base("base.st", layer0_v=True)
    folder = make_adapter(base, tmp_path / "adapter")
    merge(base, folder, tmp_path / "out.pth")
    expected = expected_weights(base, folder, None)
    assert {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"} < expected.keys()
    assert_same(tmp_path / "out.pth", expected)


def test_dtypes_are_kept_one_by_one(tmp_path, random_weights):
    base = tmp_path / "base.pth"
    weights = {n: t.half() if "ffn" in n else t.bfloat16() if "emb" in n else t for n, t in random_weights().items()}
    torch.save(weights, base)
    folder = make_adapter(base, tmp_path / "adapter")
    report = merge(base, folder, tmp_path / "out.pth")
    assert_same(tmp_path / "out.pth", expected_weights(base, folder, None))
    assert report.dtype == "bfloat16, float16, float32"


def test_zeros_change_nothing(base, tmp_path):
    save_adapter(inject(load_model(base), AdapterConfig(r=5)), tmp_path / "adapter")
    report = merge(base, tmp_path / "adapter", tmp_path / "out.pth")
    assert_same(tmp_path / "out.pth", read_checkpoint(base))
    assert {(layer.delta_norm, layer.cast_loss) for layer in report.layers} == {(0.0, 0.0)}
    assert report.logits_effect == 0


@pytest.mark.slow
@torch.no_grad()
def test_the_merged_file_in_the_rwkv_package(tiny_model, tmp_path, rwkv_logits):
    folder = make_adapter(tiny_model, tmp_path / "adapter", r=12, std=0.02)
    merge(tiny_model, folder, tmp_path / "out.pth")
    tokens = torch.randint(256, (200,), generator=torch.Generator().manual_seed(0))
    adapted, _ = load_adapter(load_model(tiny_model), folder)(tokens.unsqueeze(0))
    theirs = rwkv_logits(tmp_path / "out.pth", tokens.tolist())
    assert (theirs - adapted[0]).abs().max() < 1e-4
    assert (theirs - rwkv_logits(tiny_model, tokens.tolist())).abs().max() > 0.1


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("method", ["state", "miss+state"])
def test_a_state_file_in_the_rwkv_package(tiny_model, tmp_path, rwkv_logits, method):
    """Users of RWKV-7 pass the file's tensors to the package as its state, unchanged."""
    folder = make_trained(tiny_model, tmp_path / "adapter", AdapterConfig(method, r=12))
    state, merged = tmp_path / "state.pth", tmp_path / "merged.pth"
    merge(tiny_model, folder, state, state_only=True)
    merge(tiny_model, folder, merged)
    tokens = torch.randint(256, (100,), generator=torch.Generator().manual_seed(0))
    adapted, _ = load_adapter(load_model(tiny_model), folder)(tokens.unsqueeze(0))
    assert list(torch.load(state)) == [f"blocks.{i}.att.time_state" for i in range(12)]
    wkv = list(torch.load(state).values())
    theirs = rwkv_logits(merged, tokens.tolist(), wkv)
    assert (theirs - adapted[0]).abs().max() < 1e-4
    assert (theirs - rwkv_logits(merged, tokens.tolist())).abs().max() > 0.02
    if method == "state":
        assert torch.equal(rwkv_logits(tiny_model, tokens.tolist(), wkv), theirs)


@pytest.mark.parametrize("stored", [BF16, FP16, FP32])
@pytest.mark.parametrize("wanted", [None, "bf16", "fp32"])
def test_every_trained_tensor_is_written_and_the_rest_is_the_bases(make_base, tmp_path, stored, wanted):
    base = make_base(dtype=stored, layer0_v=True)
    config = AdapterConfig("miss+state", r=7, modules_to_save=["time", "ln_out"])
    folder = make_trained(base, tmp_path / "adapter", config)
    report = merge(base, folder, tmp_path / "out.pth", wanted)
    dtype = {"bf16": BF16, "fp32": FP32}.get(wanted)
    expected = expected_weights(base, folder, dtype)
    saved = {k.removeprefix("base_model.model."): t for k, t in load_file(folder / WEIGHTS).items()}
    trained = {k: t for k, t in saved.items() if not k.endswith("miss_block")}
    assert len(trained) == 3 + 2 + 3 * 21 - 3
    expected |= {k: t.to(expected[k].dtype) if k in expected else t for k, t in trained.items()}
    assert_same(tmp_path / "out.pth", expected)
    assert list(expected)[-3:] == [f"blocks.{i}.att.time_state" for i in range(3)]

    layers = {layer.name: layer for layer in report.layers}
    assert len(layers) == 18 + len(trained)
    before = read_checkpoint(base)["ln_out.weight"].double()
    exact, cast = trained["ln_out.weight"].double(), expected["ln_out.weight"].double()
    assert layers["ln_out.weight"].delta_norm == pytest.approx((exact - before).norm().item(), rel=1e-5)
    assert layers["ln_out.weight"].cast_loss == pytest.approx(((cast - exact).norm() / (exact - before).norm()).item())
    assert layers["blocks.1.att.time_state"].cast_loss == 0


def test_full(either_base, tmp_path):
    folder = make_trained(either_base, tmp_path / "adapter", AdapterConfig("full"))
    report = merge(either_base, folder, tmp_path / "out.pth")
    saved = load_file(folder / WEIGHTS)
    assert_same(tmp_path / "out.pth", {k: saved[f"base_model.model.{k}"] for k in read_checkpoint(either_base)})
    assert report.logits_error < 1e-6 < report.logits_effect


@pytest.mark.slow
@torch.no_grad()
def test_a_state_is_stored_in_one_layout_whatever_the_version(either_base, tmp_path):
    """In the merged file and in a file of its own, and on a base that has a state already."""
    folder = make_trained(either_base, tmp_path / "adapter", AdapterConfig("state"))
    state, merged, again = (tmp_path / f"{name}.pth" for name in ("state", "merged", "again"))
    report = merge(either_base, folder, state, state_only=True)
    assert report.dtype == "float32" and report.logits_error == 0 < report.logits_effect
    merge(either_base, folder, merged)
    alone, beside = torch.load(state), torch.load(merged)
    assert list(alone) == [f"blocks.{i}.att.time_state" for i in range(3)]
    assert all(torch.equal(beside[key], t) for key, t in alone.items())
    saved = load_file(folder / WEIGHTS)
    for key, tensor in alone.items():
        ours = saved[f"base_model.model.{key}"]
        is_ours = torch.equal(tensor, ours), torch.equal(tensor, ours.transpose(1, 2))
        assert is_ours == ((True, False) if load_model(either_base).config.version == 7 else (False, True))

    more = make_trained(merged, tmp_path / "more", AdapterConfig("state"))
    merge(merged, more, again)
    tokens = torch.randint(64, (1, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_model(again)(tokens)[0], load_adapter(load_model(merged), more)(tokens)[0])
    assert list(torch.load(again)) == list(beside)
    # A base's own state is kept by a merge of something else.
    other = make_trained(merged, tmp_path / "other", AdapterConfig(r=4))
    merge(merged, other, again, "bf16", overwrite=True)
    assert all(torch.equal(torch.load(again)[key], t) for key, t in alone.items())


def test_state_only_that_makes_no_sense(either_base, tmp_path):
    folder = make_trained(either_base, tmp_path / "adapter", AdapterConfig(r=4))
    with pytest.raises(UserError, match="has no learned state; leave state_only out"):
        merge(either_base, folder, tmp_path / "out.pth", state_only=True)
    folder = make_trained(either_base, tmp_path / "state", AdapterConfig("state"))
    with pytest.raises(UserError, match="a state is written in fp32; leave dtype out"):
        merge(either_base, folder, tmp_path / "out.pth", "bf16", state_only=True)
    assert not (tmp_path / "out.pth").exists()


def test_only_rwkv7_is_told_to_load_the_state_apart(either_base, tmp_path, caplog):
    folder = make_trained(either_base, tmp_path / "adapter", AdapterConfig("state"))
    merge(either_base, folder, tmp_path / "out.pth")
    assert ("--state_only" in caplog.text) == (load_model(either_base).config.version == 7)


@pytest.mark.parametrize("state_only", [False, True])
def test_a_state_in_the_wrong_layout_is_found(random_weights6, tmp_path, monkeypatch, state_only):
    base = tmp_path / "base.pth"
    torch.save(random_weights6, base)
    folder = make_trained(base, tmp_path / "adapter", AdapterConfig("state"))
    monkeypatch.setattr(sums, "file_layout", lambda state, kind: state)
    with pytest.raises(RunError, match="nothing was written"):
        merge(base, folder, tmp_path / "out.pth", state_only=state_only)
    assert not (tmp_path / "out.pth").exists()


def test_the_report(make_base, tmp_path):
    base = make_base(dtype=BF16)
    folder = make_adapter(base, tmp_path / "adapter", std=0.001)
    report = merge(base, folder, tmp_path / "out.pth")
    exact, cast = expected_weights(base, folder, torch.float64), read_checkpoint(tmp_path / "out.pth")
    before = read_checkpoint(base)
    assert len(report.layers) == 18
    for layer in report.layers:
        key = f"{layer.name}.weight"
        norm = (exact[key] - before[key].double()).norm().item()
        loss = (cast[key].double() - exact[key]).norm().item() / norm
        assert layer.delta_norm == pytest.approx(norm, rel=1e-5)
        assert layer.cast_loss == pytest.approx(loss, rel=1e-4)
        assert 0.1 < layer.cast_loss < 1  # a small dW is not far above the step of bf16

    tokens = torch.randint(64, (1, 300), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        model = load_model(base)
        plain = model(tokens)[0].double()
        adapted = load_adapter(model, folder)(tokens)[0].double()
        merged = load_model(tmp_path / "out.pth")(tokens)[0].double()
    scale = adapted.square().mean().sqrt()
    for value, a, b in ((report.logits_error, merged, adapted), (report.logits_effect, adapted, plain)):
        assert value == pytest.approx(((a - b).square().mean().sqrt() / scale).item(), rel=0.5)


def test_the_divergence_on_a_text(make_base, tmp_path):
    base = make_base(dtype=BF16)
    folder = make_adapter(base, tmp_path / "adapter", std=0.1)
    tokens = list(range(1, 60, 2))
    report = merge(base, folder, tmp_path / "out.pth", tokens=[*tokens, 64])  # 64 is beyond the vocabulary
    with torch.no_grad():
        model = load_model(base)
        plain = model(torch.tensor([tokens]))[0].double().log_softmax(-1)
        adapted = load_adapter(model, folder)(torch.tensor([tokens]))[0].double().log_softmax(-1)
        merged = load_model(tmp_path / "out.pth")(torch.tensor([tokens]))[0].double().log_softmax(-1)
    for found, q in ((report.divergence, merged), (report.divergence_effect, plain)):
        assert found == pytest.approx((adapted.exp() * (adapted - q)).sum(-1).mean().item(), rel=1e-3)
    assert 0 < report.divergence < report.divergence_effect


def test_stochastic_rounding_keeps_small_updates_in_the_mean(make_base, tmp_path):
    base = make_base(dtype=BF16)
    folder = make_adapter(base, tmp_path / "adapter", std=1e-5)
    exact, before = expected_weights(base, folder, torch.float64), read_checkpoint(base)
    kept = {}
    for rounding in ("nearest", "stochastic"):
        merge(base, folder, tmp_path / f"{rounding}.pth", rounding=rounding)
        cast = read_checkpoint(tmp_path / f"{rounding}.pth")
        dot = sum(((cast[k].double() - W.double()) * (exact[k] - W)).sum() for k, W in before.items() if k in exact)
        kept[rounding] = (dot / sum((exact[k] - W).square().sum() for k, W in before.items() if k in exact)).item()
    assert kept["nearest"] < 0.5  # most updates are far below a step of bf16
    assert kept["stochastic"] == pytest.approx(1, abs=0.1)
    merge(base, folder, tmp_path / "again.pth", rounding="stochastic")
    again = read_checkpoint(tmp_path / "again.pth")
    assert all(torch.equal(again[key], tensor) for key, tensor in cast.items())


def test_stochastic_rounding_is_for_bf16(base, folder, tmp_path):
    with pytest.raises(UserError, match="nothing is merged into bf16"):
        merge(base, folder, tmp_path / "out.pth", rounding="stochastic")


def test_a_loss_of_more_than_a_tenth_is_a_warning(make_base, tmp_path, capsys):
    base = make_base(dtype=BF16)
    for std, is_warned in ((0.001, True), (1.0, False)):
        folder = make_adapter(base, tmp_path / f"{std}", std=std)
        assert (
            main(["merge", "--base", str(base), "--adapter", str(folder), "--out", str(tmp_path / f"{std}.pth")]) == 0
        )
        said = capsys.readouterr().out
        assert ("more than 10% of the update of 18 layers" in said) == is_warned
        assert "nats a token on random tokens (no tokenizer is recorded)" in said


# Refused, or failed: nothing is written, and what was there stays


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_refused(tmp_path: Path, base: Path, folder: Path, out: Path, *words: str, error=UserError) -> None:
    before = listing(tmp_path)
    with pytest.raises(error) as raised:
        merge(base, folder, out, overwrite=True)
    for word in words:
        assert word in str(raised.value)
    assert listing(tmp_path) == before


@pytest.fixture(params=[False, True], ids=["new", "over an old file"])
def out(request, tmp_path) -> Path:
    path = tmp_path / "out.pth"
    if request.param:
        path.write_bytes(b"the old file")
    return path


def test_another_base(make_base, folder, tmp_path, out):
    assert_refused(tmp_path, make_base("other.pth", seed=1), folder, out, "another base")


def test_a_key_that_nothing_would_use(base, folder, tmp_path, out):
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "base_model.model.blocks.3.att.key.miss_block": torch.ones(5, 32)}, folder / WEIGHTS)
    assert_refused(tmp_path, base, folder, out, "blocks.3.att.key", "which this base does not have")


def test_a_missing_key(base, folder, tmp_path, out):
    tensors = load_file(folder / WEIGHTS)
    del tensors["base_model.model.blocks.2.ffn.value.miss_block"]
    save_file(tensors, folder / WEIGHTS)
    assert_refused(tmp_path, base, folder, out, "blocks.2.ffn.value", "has no miss_block")


def test_a_base_that_is_no_model(folder, tmp_path, out):
    assert_refused(tmp_path, folder / WEIGHTS, folder, out, "not a")
    assert_refused(tmp_path, tmp_path / "none.pth", folder, out, "no such file")
    torch.save({"w": torch.ones(1)}, tmp_path / "other.pth")
    assert_refused(tmp_path, tmp_path / "other.pth", folder, out, "not an RWKV checkpoint")


def test_a_base_that_does_not_fit_together(tmp_path, random_weights, out):
    base = tmp_path / "base.pth"
    torch.save(random_weights(), base)
    folder = make_adapter(base, tmp_path / "adapter")
    content = json.loads((folder / "rwkv_miss.json").read_text())
    del content["base_fingerprint"]
    (folder / "rwkv_miss.json").write_text(json.dumps(content))
    torch.save({n: t for n, t in random_weights().items() if n != "ln_out.bias"}, base)
    assert_refused(tmp_path, base, folder, out, "ln_out.bias is missing")


def test_no_adapter(base, tmp_path, out):
    assert_refused(tmp_path, base, tmp_path / "none", out, "no such folder")
    (tmp_path / "old.disha.pth").write_bytes(b"")
    assert_refused(tmp_path, base, tmp_path / "old.disha.pth", out, "is a file; an adapter is a folder")


def test_a_file_is_replaced_only_where_that_is_asked_for(base, folder, tmp_path):
    out = tmp_path / "out.pth"
    out.write_bytes(b"the old file")
    before = listing(tmp_path)
    with pytest.raises(UserError, match=r"out\.pth: exists already; give another name, or --overwrite true"):
        merge(base, folder, out)
    assert listing(tmp_path) == before
    merge(base, folder, out, overwrite=True)
    assert out.read_bytes() != b"the old file"


@pytest.mark.parametrize("key", ["emb.weight", "blocks.1.ffn.value.weight"])
def test_a_value_that_fp16_cannot_hold_is_named(make_base, tmp_path, key):
    """Also where no logits of the check tell: in the embedding of one token."""
    base = make_base()
    weights = {k: t.clone() for k, t in read_checkpoint(base).items()}
    weights[key][1, 2] = 1e5
    torch.save(weights, base)
    folder = make_adapter(base, tmp_path / "adapter")
    before = listing(tmp_path)
    with pytest.raises(UserError, match=f"{re.escape(key)}: not finite in fp16, whose largest value is 65,504; give"):
        merge(base, folder, tmp_path / "out.pth", "fp16")
    assert listing(tmp_path) == before
    merge(base, folder, tmp_path / "out.pth", "bf16")


def test_a_runs_folder_means_its_adapter(base, folder, tmp_path):
    folder.rename(tmp_path / "run-adapter")
    (tmp_path / "run").mkdir()
    (tmp_path / "run-adapter").rename(tmp_path / "run" / "adapter")
    merge(base, tmp_path / "run", tmp_path / "out.pth")
    merge(base, tmp_path / "run" / "adapter", tmp_path / "same.pth")
    assert (tmp_path / "out.pth").read_bytes() == (tmp_path / "same.pth").read_bytes()


def test_how_far_it_is_is_told(base, folder, tmp_path):
    told = []
    merge(base, folder, tmp_path / "out.pth", on_tensor=lambda done, total: told.append((done, total)))
    n = len(read_checkpoint(base))
    assert told == [(i, 2 * n) for i in range(1, 2 * n + 1)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["emb.weight", "head.weight", "blocks.1.ffn.key.weight", "blocks.2.att.w0"])
def test_a_base_with_values_that_are_not_finite(base, tmp_path, out, key, value):
    """Also in the embedding of one token, which the check's logits do not meet."""
    weights = torch.load(base)
    tokens = torch.randint(64, (1, 128), generator=torch.Generator().manual_seed(0))
    unseen = next(i for i in range(64) if i not in tokens)
    weights[key][unseen if len(weights[key]) == 64 else 0] = value
    broken = tmp_path / "broken.pth"
    torch.save(weights, broken)
    folder = make_adapter(broken, tmp_path / "adapter")
    assert_refused(tmp_path, broken, folder, out, f"{broken}: {key} has values that are not finite")


def test_a_value_that_bf16_cannot_hold(make_base, tmp_path):
    base = make_base()
    weights = {k: t.clone() for k, t in read_checkpoint(base).items()}
    weights["emb.weight"][1, 2] = 3.4e38
    torch.save(weights, base)
    folder = make_adapter(base, tmp_path / "adapter")
    with pytest.raises(
        UserError, match=r"emb.weight: not finite in bf16, whose largest value is 3\.38953e\+38; give --d"
    ):
        merge(base, folder, tmp_path / "out.pth", "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("when", ["written", "checked"])
def test_a_base_that_is_cut_while_it_is_merged(base, tmp_path, when):
    """In a process of its own, which reading through the map would end. A check of a state alone reads the base again
    after the file was read back."""
    folder = make_trained(base, tmp_path / "adapter", AdapterConfig("miss+state", r=4))
    code = f"""
import os
from rwkv_miss import merge
from rwkv_miss.errors import UserError

def cut(done, total):
    if done == {{"written": 1, "checked": total}}[{when!r}]:
        os.truncate({str(base)!r}, 5000)

try:
    merge({str(base)!r}, {str(folder)!r}, {str(tmp_path / "out.pth")!r}, on_tensor=cut, state_only={when == "checked"})
except UserError as e:
    print(e)
"""
    result = run_process([sys.executable, "-c", code], timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{base}: has become shorter while it was read")
    assert not (tmp_path / "out.pth").exists()


def test_dropout_does_not_act_in_the_check(base, tmp_path):
    model = inject(load_model(base), AdapterConfig(r=5, dropout=0.5))
    for layer in adapters(model).values():
        layer.miss_block.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    save_adapter(model, tmp_path / "adapter")
    assert merge(base, tmp_path / "adapter", tmp_path / "out.pth").logits_error < 1e-5


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_out_is_the_base(base, folder, tmp_path, link):
    out = base
    if link:
        out = tmp_path / "link.pth"
        link(base, out)
    assert_refused(tmp_path, base, folder, out, "is the base itself")


def test_out_names(base, folder, tmp_path):
    (tmp_path / "folder.pth").mkdir()
    assert_refused(tmp_path, base, folder, tmp_path / "folder.pth", "is a folder")
    for name in ("out", "out.safetensors", "out.pth.tmp"):
        assert_refused(tmp_path, base, folder, tmp_path / name, ".pth")


@pytest.mark.parametrize("dtype", ["float32", "int8", torch.float64, torch.int8])
def test_dtypes_that_no_checkpoint_has(base, folder, tmp_path, dtype):
    before = listing(tmp_path)
    with pytest.raises(UserError, match="dtype"):
        merge(base, folder, tmp_path / "out.pth", dtype)
    assert listing(tmp_path) == before


def test_a_wrong_sum_is_found(base, folder, tmp_path, out, monkeypatch):
    right = miss.delta_weight

    def wrong(D: torch.Tensor, n_in: int) -> torch.Tensor:
        return right(D, n_in).roll(1, 1)

    monkeypatch.setattr(miss, "delta_weight", wrong)
    assert_refused(tmp_path, base, folder, out, "differ", "nothing was written", error=RunError)


@pytest.mark.parametrize("stored", [FP32, BF16])
@pytest.mark.parametrize("std", [0.05, 0.01])
def test_a_delta_that_was_left_out_is_found(make_base, tmp_path, monkeypatch, stored, std):
    """Also where the adapter changes the logits by little."""
    base = make_base(dtype=stored)
    folder = make_adapter(base, tmp_path / "adapter", std=std)
    monkeypatch.setattr(miss, "delta_weight", lambda D, n_in: torch.zeros(D.shape[1], n_in))
    assert_refused(tmp_path, base, folder, tmp_path / "out.pth", "nothing was written", error=RunError)


def test_a_corrupted_file_is_found(base, folder, tmp_path, out, monkeypatch):
    """The bytes of one weight are changed between writing and renaming."""
    write = pth.write_pth_in_pieces

    def corrupting(path: Path, specs, pieces) -> None:
        written = {}

        def kept(name: str) -> Iterator[torch.Tensor]:
            for piece in pieces(name):
                written[name] = piece.clone()
                yield piece

        write(path, specs, kept)
        data = bytearray(path.read_bytes())
        at = data.index(written["blocks.1.ffn.key.weight"].numpy().tobytes())
        data[at : at + 4096] = bytes(4096)
        path.write_bytes(data)

    monkeypatch.setattr(pth, "write_pth_in_pieces", corrupting)
    assert_refused(tmp_path, base, folder, out, "blocks.1.ffn.key.weight was read back changed", error=RunError)


@pytest.mark.slow
def test_a_full_disk(base, folder, tmp_path, out):
    """Full at once, in the middle, and at the very end. In a process of its own: PyTorch's writer can end the
    process where a write fails."""
    before = listing(tmp_path)
    code = f"""
import resource
from rwkv_miss import merge
from rwkv_miss.errors import UserError
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in (0, {base.stat().st_size // 2}, {base.stat().st_size - 4000}):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        merge({str(base)!r}, {str(folder)!r}, {str(out)!r}, overwrite=True)
    except UserError as e:
        print(e)
"""
    result = run_process([sys.executable, "-c", code], timeout=120)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3 and all(line.startswith(f"{out}: cannot be written") for line in lines)
    assert listing(tmp_path) == before


@pytest.mark.slow
def test_memory(make_base, tmp_path):
    """What resident memory, mapped files included, rises by in a fresh process does not depend on the base's size: it
    holds the largest tensor (8 MB), a block (25 MB) and the adapter (1 and 5 MB) a few times over."""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc, which Linux alone has")
    code = """
import sys
from pathlib import Path
import torch
import rwkv_miss.export.pth
from rwkv_miss import AdapterConfig, inject, load_model, merge

def resident(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) / 1024

torch.set_num_threads(1)
base, folder, out = sys.argv[1:]
before = resident("VmRSS")
merge(base, folder, out)
print(resident("VmHWM") - before)
"""
    for n_layer in (1, 6):
        base = make_base(n_layer=n_layer, n_embd=1024, head_size=64, vocab_size=4096, dtype=BF16)
        folder = make_adapter(base, tmp_path / "adapter", r=16)
        arguments = [str(base), str(folder), str(tmp_path / f"{n_layer}.pth")]
        result = run_process([sys.executable, "-c", code, *arguments], timeout=120)
        assert result.returncode == 0, result.stderr
        assert base.stat().st_size > n_layer * 25 * 2**20
        assert float(result.stdout) < 130, f"{float(result.stdout):.0f} MB"
