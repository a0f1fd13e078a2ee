"""Linears that are stored in 8 or 4 bits, against bitsandbytes' own functions and against plain linears."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from torch import Tensor

from rwkv_miss import AdapterConfig, inject, load_model
from rwkv_miss.adapters.inject import trained_parameters
from rwkv_miss.adapters.method import METHODS
from rwkv_miss.benchmarks.common import threads
from rwkv_miss.errors import UserError
from rwkv_miss.model import quantised
from rwkv_miss.model.linear import Linear
from rwkv_miss.model.quantised import FORMATS, QuantLinear, quantise
from rwkv_miss.model.versions import MODELS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def dequantised(W: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """What a whole weight becomes: the numbers that bitsandbytes packs, by the definition of the formats."""
    if format == "nf4":
        packed, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
        values = state.code[torch.stack((packed >> 4, packed & 15), -1).long()].view(-1)[: W.numel()]
        return (values * state.absmax.repeat_interleave(64)[: W.numel()]).view(W.shape).to(dtype)
    packed, scales, _ = functional.int8_vectorwise_quant(W)
    return functional.int8_vectorwise_dequant(packed, scales).to(dtype)


def weight(dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (200, 96)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("shape", [(200, 96), (64, 64), (3, 128), (130, 36)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_the_dequantised_ones(monkeypatch, format, dtype, shape):
    """Also where the weight is handled in several pieces, and where rows begin inside a block."""
    monkeypatch.setattr(quantised, "_PIECE_ON_CPU", 1)
    W = weight(dtype, shape)
    expected = dequantised(W, format, dtype)
    linear = quantise(W, format, dtype, lambda rows: rows)
    assert (expected - W).float().norm() < 0.12 * W.float().norm()
    for start, stop in ((0, shape[0]), (1, shape[0]), (2, 3), (shape[0] - 1, shape[0]), (0, 0)):
        assert torch.equal(linear.rows(start, stop), expected[start:stop])
        assert linear.rows(start, stop).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_several_threads_pack_what_bitsandbytes_does_of_the_whole(monkeypatch, format, dtype):
    monkeypatch.setattr(quantised, "_PIECE_ON_CPU", 1)
    W = weight(dtype, (1000, 128))
    if format == "nf4":
        packed, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
        scales = state.absmax
    else:
        packed, scales, _ = functional.int8_vectorwise_quant(W)
    with threads(4):
        ours = quantise(W, format, dtype, lambda rows: rows)
        assert torch.get_num_threads() == 4
    assert torch.equal(ours.packed.view(-1), packed.view(-1)) and torch.equal(ours.scales, scales)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_nf4_is_the_linear_of_bitsandbytes(dtype):
    W, x = weight(shape=(200, 128)), weight(dtype, (5, 128))
    theirs = bitsandbytes.nn.Linear4bit(
        128, 200, bias=False, compute_dtype=dtype, compress_statistics=False, quant_type="nf4"
    )
    theirs.load_state_dict({"weight": W})
    ours = quantise(W, "nf4", dtype, lambda rows: rows)
    torch.testing.assert_close(ours(x), theirs.to("cpu")(x))


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zeros(format):
    """Initial weights of BlinkDL's are zero in part. Their scales are zero too."""
    W = weight()
    W[70:140] = 0
    rows = quantise(W, format, torch.float32, lambda rows: rows).rows(0, 200)
    assert torch.equal(rows[70:140], W[70:140]) and torch.isfinite(rows).all()


@pytest.mark.parametrize("format", FORMATS)
def test_float64_gradient_of_the_product(format):
    """Against the definition: y = x W^T, dx = dy W with the dequantised W."""
    W, x, dy = weight(), weight(shape=(2, 3 * 96)).view(2, 3, 96), weight(shape=(2, 3 * 200)).view(2, 3, 200)
    linear = quantise(W, format, torch.float32, lambda rows: rows)
    exact = linear.rows(0, 200).double()
    x.requires_grad_()
    y = linear(x)
    y.backward(dy)
    torch.testing.assert_close(y.double(), x.detach().double() @ exact.T, rtol=0, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), dy.double() @ exact, rtol=0, atol=1e-4)
    assert not list(linear.parameters()) and not linear.state_dict()


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_models_compute_with_the_dequantised_weights(either_base, format, dtype, method):
    """Outputs and the gradients of what is trained, against a plain model that holds the dequantised weights."""
    model = load_model(either_base, dtype, quant=format, quant_skip=["att.key"])
    plain = load_model(either_base, dtype)
    found = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    linears = {name for name, m in plain.named_modules() if isinstance(m, Linear)}
    assert found.keys() == {name for name in linears if not name.endswith("att.key")}
    as_stored = load_model(either_base)
    for name, linear in found.items():
        W = plain.get_submodule(name).weight
        expected = dequantised(as_stored.get_submodule(name).weight.detach(), format, W.dtype)
        assert torch.equal(linear.rows(0, len(W)), expected) and not torch.equal(W, expected)
        W.data = expected
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    results = []
    for m in (model, plain):
        torch.manual_seed(0)  # some methods begin with random matrices
        trained = trained_parameters(inject(m, AdapterConfig(method, r=4)))
        rng = torch.Generator().manual_seed(2)
        for p in trained.values():
            p.data += 0.02 * torch.randn(p.shape, generator=rng)
        logits, _ = m(tokens)
        logits.float().square().mean().backward()
        results.append([logits, *(p.grad for p in trained.values())])
    for ours, expected in zip(*results, strict=True):
        scale = expected.abs().max().item()
        assert scale > 0 and (ours - expected).abs().max() < (1e-6 if dtype == "fp32" else 0.01) * scale


def test_what_is_left_out(either_base):
    with pytest.raises(UserError, match=r"quant_skip: head is no linear that is quantised; there are: att\.receptance"):
        load_model(either_base, quant="nf4", quant_skip=["att.key", "head"])


@pytest.mark.parametrize(
    "config", [AdapterConfig("full"), AdapterConfig(modules_to_save=["ffn.key"], r=4, target_modules=["att.value"])]
)
def test_what_is_quantised_cannot_be_trained(either_base, config):
    model = load_model(either_base, quant="int8", quant_skip=["att.value"])
    with pytest.raises(UserError, match=r"blocks\.0\.\w+\.\w+\.weight would be trained, but it is quantised"):
        inject(model, config)
    left = load_model(either_base, quant="int8", quant_skip=["ffn.key"])
    inject(left, AdapterConfig(r=4, modules_to_save=["ffn.key"], target_modules=["att.value"]))
    assert left.get_submodule("blocks.0.ffn.key").weight.requires_grad


def test_without_bitsandbytes(either_base, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    quantised._bitsandbytes.cache_clear()
    with pytest.raises(UserError, match=r"bitsandbytes cannot be imported .*pip install 'rwkv-miss\[quant\]'"):
        load_model(either_base, quant="nf4")


KEPT = {
    "none": [],
    "att.value": ["att.value"],
    "att.key, att.value": ["att.key", "att.value"],
    "att.value, att.output": ["att.value", "att.output"],
    "att.receptance, att.output": ["att.receptance", "att.output"],
    "att.*": ["att.receptance", "att.key", "att.value", "att.gate", "att.output"],
}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("version", [6, 7])
def test_errors_of_trained_models(version, request):
    """How far the probabilities of the next token are from those of the full-precision model, by the linears that are
    kept in full precision. Prints a table (pytest -rP)."""
    if version == 7:
        folder = Path(__file__).parents[2] / "scripts" / "demo"
        records = (json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines())
        model, text = folder / "base.pth", "".join(f"User: {r['question']}\n" for r in records).encode()
    else:
        folder = request.getfixturevalue("reference")
        model = folder / "models" / "tiny-rwkv6-3m.pth"
        text = (folder / "data" / "tinyshakespeare.txt").read_text().encode("utf-16le")
    tokens = torch.tensor(list(text[: 4 * 512])).view(4, 512)
    expected = load_model(model, "fp32")(tokens)[0].log_softmax(-1)

    def divergence(**how) -> float:
        found = load_model(model, **how)(tokens)[0].float().log_softmax(-1)
        return (expected.exp() * (expected - found)).sum(-1).mean().item()

    rounding = divergence(dtype="bf16")
    print(f"RWKV-{version}: run in bf16 {rounding:.1e}")
    kl = {}
    for format in FORMATS:
        for name, kept in KEPT.items() if format == "nf4" else [("none", [])]:
            skip = [name for name in kept if name in MODELS[version].linears]
            kl[format, name] = divergence(dtype="fp32", quant=format, quant_skip=skip)
            print(f"RWKV-{version}: {format}, kept {name}: {kl[format, name]:.1e}")
    # What the defaults rest on.
    assert kl["int8", "none"] < 1.5 * rounding
    pairs = [kl["nf4", name] for name in KEPT if name.count(",") == 1]
    assert kl["nf4", "att.value, att.output"] < 1.1 * min(pairs) and min(pairs) < 0.6 * kl["nf4", "none"]
