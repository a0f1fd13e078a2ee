"""Several adapters in one model: switched, weighed, merged into copies of the weights, and taken out again."""

from __future__ import annotations

import pytest
import torch

from rwkv_miss import AdapterConfig, inject, load_adapter, load_model, merge, save_adapter, set_adapter
from rwkv_miss.adapters.inject import installed, trained_parameters
from rwkv_miss.cli import main
from rwkv_miss.errors import UserError

TOKENS = torch.randint(64, (2, 13), generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "one": AdapterConfig(r=5),
    "two": AdapterConfig("bat", r=4, target_modules=["att.key", "ffn.value"]),
    "three": AdapterConfig("miss+state", r=8, target_modules=["att.value"], modules_to_save=["ln_out"]),
}


@pytest.fixture
def folders(either_base, tmp_path):
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = inject(load_model(either_base), config)
        rng = torch.Generator().manual_seed(seed)
        for p in trained_parameters(model).values():
            p.data += 0.05 * torch.randn(p.shape, generator=rng)
        save_adapter(model, tmp_path / name)
    return {name: tmp_path / name for name in CONFIGS}


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def model(request, either_base, folders):
    model = load_model(either_base, request.param).eval()
    for name, folder in folders.items():
        load_adapter(model, folder, name)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS)[0]


@pytest.mark.slow
def test_switching_gives_what_each_alone_gives_to_the_bit(either_base, model, folders):
    dtype = model.emb.weight.dtype
    alone = {name: logits(load_adapter(load_model(either_base, dtype).eval(), f)) for name, f in folders.items()}
    assert torch.equal(logits(model), alone["three"])  # the last one that was loaded
    for name in ("one", "three", "two", "three", "one"):
        assert torch.equal(logits(set_adapter(model, name)), alone[name])
        assert list(trained_parameters(model)) == list(
            trained_parameters(load_adapter(load_model(either_base, dtype), folders[name]))
        )
    base = load_model(either_base, dtype)
    assert torch.equal(logits(set_adapter(model, None)), logits(base))
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in base.named_parameters()}
    assert all(torch.equal(p, dict(base.named_parameters())[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("use", ["one", "three", {"one": 0.7, "two": 0.5}, {"one": -1.0, "two": 2.0, "three": 0.25}])
def test_merged_and_weighed_and_unmerged(either_base, model, use):
    alone = logits(set_adapter(model, use))
    merged = logits(set_adapter(model, use, merged=True))
    assert not any(p.requires_grad for p in model.parameters())
    assert (merged - alone).norm() <= (1e-5 if alone.dtype == torch.float32 else 0.1) * alone.norm()
    assert torch.equal(logits(set_adapter(model, use)), alone)  # unmerged
    for name, config in CONFIGS.items():  # and each is trained as it was
        trained = trained_parameters(set_adapter(model, name))
        assert len([key for key in trained if "miss_block" in key]) == len(installed(model).plan.linears) > 0
        assert ("blocks.0.att.time_state" in trained) == ("state" in config.method)
    with pytest.raises(UserError, match="no adapter"):
        save_adapter(set_adapter(model, use, merged=True), "never")
    assert torch.equal(logits(set_adapter(model, None)), logits(load_model(either_base, alone.dtype)))


def test_weights_of_a_sum(either_base, folders):
    """W + sum of w_i dW_i, entry by entry, from what each alone merges to."""
    model = load_model(either_base)
    parts = {}
    for name, folder in folders.items():
        load_adapter(model, folder, name)
        parts[name] = dict(set_adapter(model, name, merged=True).named_parameters())
    base = dict(load_model(either_base).named_parameters())
    weights = {"one": 0.7, "two": -0.5, "three": 2.0}
    set_adapter(model, weights, merged=True)
    for key, found in model.named_parameters():
        before = base.get(key, torch.zeros_like(found))
        exact = before + sum(w * (parts[n].get(key, before) - before) for n, w in weights.items())
        assert torch.allclose(found, exact, rtol=0, atol=2e-6), key


def test_training_goes_on_where_it_was(either_base, folders):
    model = load_model(either_base)
    load_adapter(model, folders["three"], "three")
    for p in trained_parameters(model).values():
        p.data += 0.01
    trained = logits(model)
    load_adapter(model, folders["one"], "one")
    model.train()
    set_adapter(model, "three").eval()
    assert torch.equal(logits(model), trained)


def test_names(either_base, folders, tmp_path):
    model = load_adapter(load_model(either_base), folders["one"])
    with pytest.raises(UserError, match="adapter already whose name is default"):
        load_adapter(model, folders["two"])
    with pytest.raises(UserError, match="no adapter whose name is 'tow'; it has default"):
        set_adapter(model, {"tow": 1.0})
    before = logits(model)
    with pytest.raises(UserError, match="no such folder"):
        load_adapter(model, tmp_path / "nothing", "other")
    weights = torch.load(either_base)
    weights["emb.weight"] += 1
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(UserError, match="trained on another base"):
        load_adapter(load_adapter(load_model(tmp_path / "other.pth"), folders["one"]), folders["one"], "again")
    with pytest.raises(UserError, match="adapter already"):
        inject(model, AdapterConfig(r=4))
    assert torch.equal(logits(model), before)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, [0.7, -0.5, 2.0]])
def test_several_are_merged_into_one_file(either_base, folders, tmp_path, weights):
    """W + sum of w_i dW_i, entry by entry, from what each alone is merged to."""
    for name, folder in folders.items():
        merge(either_base, folder, tmp_path / f"{name}.pth")
    report = merge(either_base, list(folders.values()), tmp_path / "all.pth", weights=weights)
    assert report.logits_error < 1e-4 < report.logits_effect
    base, found = torch.load(either_base), torch.load(tmp_path / "all.pth")
    parts = [torch.load(tmp_path / f"{name}.pth") for name in folders]
    for key, tensor in found.items():
        before = base.get(key, torch.zeros_like(tensor))
        changes = [part.get(key, before) - before for part in parts]
        exact = before + sum(w * change for w, change in zip(weights or [1] * 3, changes, strict=True))
        assert torch.allclose(tensor, exact, rtol=0, atol=3e-6), key
    assert list(found)[: len(base)] == list(base)


def test_the_weights_of_a_merge(either_base, folders, tmp_path, capsys):
    merged = tmp_path / "merged.pth"
    both = f"--adapter=[{folders['one']},{folders['two']}]"
    command = ["merge", f"--base={either_base}", f"--out={merged}", both]
    assert main([*command, "--weights=[0.5]"]) == 2
    assert "weights are [0.5] for 2 adapters" in capsys.readouterr().err and not merged.exists()
    assert main([*command, "--weights", "[0.5,0]"]) == 0
    half = set_adapter(load_adapter(load_model(either_base), folders["one"]), {"default": 0.5}, merged=True)
    for key, tensor in torch.load(merged).items():
        assert torch.allclose(tensor, dict(half.named_parameters())[key], rtol=0, atol=1e-7), key


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_a_quantised_base(either_base, folders, format):
    """Merged, it has the dequantised weights plus dW in place of the quantised ones; unmerged, the quantised ones."""
    pytest.importorskip("bitsandbytes")
    model = load_model(either_base, quant=format, quant_skip=[]).eval()
    before = logits(model)
    for name in ("one", "two"):
        load_adapter(model, folders[name], name)
    weighed = logits(set_adapter(model, {"one": 0.5, "two": 2.0}))
    merged = logits(set_adapter(model, {"one": 0.5, "two": 2.0}, merged=True))
    assert (merged - weighed).norm() < 1e-5 * merged.norm() < 1e-3 * (merged - before).norm()
    assert torch.equal(logits(set_adapter(model, None)), before)
