"""Adapters in other forms: RWKV-PEFT's older files, MiSS as LoRA and back."""

from __future__ import annotations

import json

import pytest
import torch

from rwkv_miss import AdapterConfig, load_adapter, load_model, merge
from rwkv_miss.adapters.converting import convert
from rwkv_miss.adapters.inject import installed, trained_parameters
from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.cli import main
from rwkv_miss.errors import UserError
from tests.helpers import save_random_adapter

TOKENS = torch.randint(64, (2, 13), generator=torch.Generator().manual_seed(0))
PATHS = [f"blocks.{i}.{name}" for i in range(3) for name in ("att.key", "ffn.value")]


@pytest.fixture
def base(make_base):
    return make_base()


def logits(base, folder):
    with torch.no_grad():
        return load_adapter(load_model(base), folder).eval()(TOKENS)[0]


def old_file(base, path, r, name, groups):
    """What RWKV-PEFT saved: two-dimensional blocks, or one for each group of inputs."""
    W, rng = read_checkpoint(base), torch.Generator().manual_seed(1)
    shapes = {p: (W[f"{p}.weight"].shape[1] // r, r, r) if groups else (r, len(W[f"{p}.weight"])) for p in PATHS}
    tensors = {f"{p}.{name}": 0.1 * torch.randn(shape, generator=rng) for p, shape in shapes.items()}
    torch.save(tensors | {"blocks.1.ln2.bias": torch.full((32,), 0.5)}, path)
    return tensors


def old_weights(W, block):
    """RWKV-PEFT's own formulas, block by block: W + W B + B for each group of inputs, or D's transpose, tiled."""
    r = block.shape[-1] if block.ndim == 3 else len(block)
    found = W.clone()
    for c in range(0, W.shape[1], r):
        for o in range(0, len(W), r if block.ndim == 3 else len(W)):
            rows = slice(o, o + r) if block.ndim == 3 else slice(None)
            piece = W[rows, c : c + r]
            if block.ndim == 3:
                found[rows, c : c + r] += piece @ block[c // r] + block[c // r]
            else:
                found[rows, c : c + r] += block.T[:, : piece.shape[1]]
    return found


@pytest.mark.parametrize(("name", "r", "groups"), [("disha", 5, False), ("bone", 8, True), ("disha", 4, True)])
def test_older_files_of_rwkv_peft(base, tmp_path, name, r, groups, capsys):
    blocks = old_file(base, tmp_path / "old.pth", r, name, groups)
    command = ["convert", f"--base={base}", f"--adapter={tmp_path / 'old.pth'}", f"--out={tmp_path / 'new'}"]
    if groups:
        assert main(command) == 2
        assert "say which program trained it" in capsys.readouterr().err
        command += ["--origin", "rwkv-peft"]
    # PEFT can hold neither that layout nor a bias alone.
    assert main(command) == 2
    assert "HF PEFT's format cannot hold it" in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert main([*command, "--ours"]) == 0
    assert f"r {r}, beside 6 linears" in capsys.readouterr().out
    merge(base, tmp_path / "new", tmp_path / "merged.pth")
    W, merged = read_checkpoint(base), read_checkpoint(tmp_path / "merged.pth")
    for path in PATHS:
        exact = old_weights(W[f"{path}.weight"].double(), blocks[f"{path}.{name}"].double())
        assert torch.allclose(merged[f"{path}.weight"].double(), exact, rtol=0, atol=1e-6)
    assert torch.equal(merged["blocks.1.ln2.bias"], torch.full((32,), 0.5))
    assert torch.equal(merged["blocks.0.att.value.weight"], W["blocks.0.att.value.weight"])


@pytest.mark.parametrize("groups", [False, True])
def test_an_older_file_in_a_form_that_peft_has(base, tmp_path, groups):
    peft = pytest.importorskip("peft")
    rng = torch.Generator().manual_seed(1)
    shape = (4, 8, 8) if groups else (8, 32)
    torch.save({"blocks.0.att.key.bone": 0.1 * torch.randn(shape, generator=rng).bfloat16()}, tmp_path / "old.pth")
    convert(base, tmp_path / "old.pth", tmp_path / "new", origin="peft")
    theirs = peft.PeftModel.from_pretrained(load_model(base), tmp_path / "new").eval()
    with torch.no_grad():
        assert torch.allclose(theirs(TOKENS)[0], logits(base, tmp_path / "new"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(r=8),
        AdapterConfig(r=5, exclude_modules=["att.value"]),
        AdapterConfig("mini", r=7, options={"mini_r": 8}),
        AdapterConfig("miss+state", r=6, target_modules=["att.key"], modules_to_save=["ln1"]),
    ],
)
def test_as_lora_and_back(base, tmp_path, config):
    peft = pytest.importorskip("peft")
    folder = save_random_adapter(base, tmp_path / "first", config)
    convert(base, folder, tmp_path / "lora", to="lora", ours=True)
    expected = logits(base, folder)
    assert torch.allclose(logits(base, tmp_path / "lora"), expected, rtol=0, atol=2e-5)
    if "+" not in config.method:
        assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["peft_type"] == "LORA"
        theirs = peft.PeftModel.from_pretrained(load_model(base), tmp_path / "lora").eval()
        with torch.no_grad():
            assert torch.allclose(theirs(TOKENS)[0], expected, rtol=0, atol=2e-5)
    convert(base, tmp_path / "lora", tmp_path / "again", to="miss", ours=True)
    model, before = (load_adapter(load_model(base), tmp_path / name) for name in ("again", "first"))
    for key, tensor in trained_parameters(model).items():
        old = trained_parameters(before)[key]
        repeats = tensor.shape[1] // old.shape[1] if tensor.ndim == 2 else 1
        assert torch.equal(tensor, old.repeat(1, repeats) if repeats > 1 else old)
    assert installed(model).config.method == config.method.replace("mini", "miss")


@pytest.mark.parametrize(
    ("config", "to", "said"),
    [
        (AdapterConfig("bat", r=8), "lora", "blocks.0.att.receptance: what bat adds is no product"),
        (AdapterConfig("lora", r=4), "miss", "blocks.0.att.receptance: miss has no exact form of what lora adds"),
        (AdapterConfig("miss", r=4), "bat", "bat has no exact form of what miss adds"),
        (AdapterConfig("miss", r=4), "state", "between methods that go beside linears"),
        (
            AdapterConfig(r=5, rank_pattern={"ffn.value": 7}),
            "lora",
            "would need {'alpha': 7.0} here",
        ),
        (AdapterConfig("state"), "lora", "between methods that go beside linears"),
        (AdapterConfig("miss", r=4), "lroa", "there is no method 'lroa' to convert to"),
    ],
)
def test_what_has_no_exact_form(base, tmp_path, config, to, said):
    with pytest.raises(UserError, match=said):
        convert(base, save_random_adapter(base, tmp_path / "first", config), tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_a_multiple_that_is_rounded_is_not_exact(base, tmp_path):
    """A as MiSS has it, but a scale of 1/3 beside it."""
    convert(base, save_random_adapter(base, tmp_path / "first", AdapterConfig(r=8)), tmp_path / "lora", to="lora")
    file = tmp_path / "lora/adapter_config.json"
    for alpha, is_exact in ((2.0, True), (8 / 3, False)):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": alpha}))
        if is_exact:
            convert(base, tmp_path / "lora", tmp_path / f"out{alpha}", to="miss")
            assert torch.allclose(logits(base, tmp_path / "lora"), logits(base, tmp_path / f"out{alpha}"), atol=1e-5)
        else:
            with pytest.raises(UserError, match="no product that fp32 can hold exactly"):
                convert(base, tmp_path / "lora", tmp_path / f"out{alpha}", to="miss")


def test_files_that_are_no_adapters(base, tmp_path):
    torch.save({"blocks.0.att.key.disha": torch.zeros(4, 31)}, tmp_path / "old.pth")
    with pytest.raises(UserError, match=r"old\.pth: blocks\.0\.att\.key\.miss_block has shape \(4, 31\)"):
        convert(base, tmp_path / "old.pth", tmp_path / "new")
    with pytest.raises(UserError, match=r"no key ends in \.disha or \.bone"):
        convert(base, base, tmp_path / "new")
    with pytest.raises(UserError, match="exists already"):
        convert(base, tmp_path / "old.pth", tmp_path)
