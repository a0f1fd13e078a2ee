"""Training the base's own parameters and its initial state: selecting, saving, loading, exchange with HF PEFT."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rwkv_miss import AdapterConfig, inject, load_adapter, load_model, save_adapter
from rwkv_miss.adapters.files import read_adapter
from rwkv_miss.adapters.inject import installed, trained_parameters
from rwkv_miss.errors import UserError
from tests.helpers import adapters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = torch.randint(64, (2, 13), generator=torch.Generator().manual_seed(0))
STATES = {f"blocks.{i}.att.time_state" for i in range(3)}
CONFIGS = {
    "state": AdapterConfig("state"),
    "miss+state": AdapterConfig("miss+state", r=5),
    "full": AdapterConfig("full"),
    "parts": AdapterConfig("miss", r=5, modules_to_save=["time", "ln_out"]),
    "everything beside": AdapterConfig("miss+state", r=5, modules_to_save=["ln", "time", "emb", "head"]),
}


def whole_parameters(model) -> dict[str, nn.Parameter]:
    """The parameters that are trained themselves, without an adapter, by checkpoint key."""
    return {key: p for key, p in trained_parameters(model).items() if key in installed(model).plan.whole}


def randomise(model):
    rng = torch.Generator().manual_seed(5)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
    return model.eval()


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_computes_the_base(either_base, config, dtype):
    with torch.no_grad():
        expected, _ = load_model(either_base, dtype)(TOKENS)
    model = inject(load_model(either_base, dtype), config)
    logits, _ = model(TOKENS)
    assert torch.equal(logits, expected) and logits.dtype == dtype
    # Exactly the trained parameters get a gradient, and they are in fp32.
    logits.float().square().mean().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        assert p.dtype == (torch.float32 if p.requires_grad or "time_state" in name else dtype), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_step_is_the_models_own(either_base, dtype):
    """With method full, the gradients equal those of the plain base model."""
    base, model = load_model(either_base, dtype), inject(load_model(either_base, dtype), AdapterConfig("full"))
    for m in (base, model):
        m(TOKENS)[0].float().square().mean().backward()
    mine = whole_parameters(model)
    assert mine.keys() == dict(base.named_parameters()).keys()
    for name, p in base.named_parameters():
        assert torch.equal(mine[name].grad, p.grad.float()), name


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["ln"],
            ["blocks.0.ln0", "ln_out", *(f"blocks.{i}.{n}" for i in range(3) for n in ("ln1", "ln2", "att.ln_x"))],
        ),
        (["emb", "head"], ["emb", "head"]),
        (["ln_out", "blocks.1.ln1"], ["ln_out", "blocks.1.ln1"]),
    ],
)
def test_modules_to_save(either_base, names, expected):
    model = inject(load_model(either_base), AdapterConfig(r=4, modules_to_save=names))
    wanted = {
        f"{path}.{name}"
        for path in expected
        for name, _ in load_model(either_base).get_submodule(path).named_parameters()
    }
    assert set(whole_parameters(model)) == wanted


def test_time_is_every_parameter_of_the_mixes_that_is_no_linear_norm_or_state(either_base):
    model = load_model(either_base)
    expected = {
        name
        for name, _ in model.named_parameters()
        if name.split(".")[2:3] in (["att"], ["ffn"]) and name.count(".") == 3
    }
    inject(model, AdapterConfig("miss+state", r=4, modules_to_save=["time"]))
    assert set(whole_parameters(model)) == expected | STATES
    assert len(expected) == 3 * (14 if model.config.version == 6 else 21) - (3 if model.config.version == 7 else 0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (AdapterConfig(modules_to_save=["norm"]), "norm matches no part of the model; give ln, time, emb, head"),
        (
            AdapterConfig(r=4, modules_to_save=["ffn.key"]),
            "ffn.key means blocks.0.ffn.key.weight, which gets an adapter already",
        ),
        (AdapterConfig("full", modules_to_save=["ln"]), "modules_to_save is given, but adapter.method full"),
        (AdapterConfig(modules_to_save=[]), "modules_to_save is empty"),
        (
            AdapterConfig("state", target_modules=["att.key"]),
            "target_modules is given, but adapter.method state has no",
        ),
        (AdapterConfig("full", dropout=0.1), "dropout is given, but adapter.method full has no use for it"),
        (AdapterConfig("bone"), "adapter.method is 'bone'; this version has: miss, "),
    ],
)
def test_settings_that_are_wrong(either_base, config, words):
    model = load_model(either_base)
    with pytest.raises(UserError, match=words):
        inject(model, config)
    assert all(p.requires_grad for p in model.parameters()) and model.adapter is None


def test_a_linear_that_miss_leaves_out_can_be_trained_whole(either_base):
    config = AdapterConfig(r=4, target_modules=["att.key"], modules_to_save=["ffn.value"])
    assert set(whole_parameters(inject(load_model(either_base), config))) == {
        f"blocks.{i}.ffn.value.weight" for i in range(3)
    }


# Files


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_adapter_loads_as_it_was(either_base, tmp_path, config, dtype):
    saved = randomise(inject(load_model(either_base, dtype), config))
    save_adapter(saved, tmp_path / "adapter")
    model = load_adapter(load_model(either_base, dtype), tmp_path / "adapter").eval()
    expected, _ = saved(TOKENS)
    assert torch.equal(model(TOKENS)[0], expected)
    assert not torch.equal(load_model(either_base, dtype)(TOKENS)[0], expected)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in saved.named_parameters() if p.requires_grad
    }
    assert installed(model).config.method == config.method
    save_adapter(model, tmp_path / "again")
    first, again = (load_file(tmp_path / name / WEIGHTS) for name in ("adapter", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)


def test_what_is_on_disk(either_base, tmp_path, config):
    model = randomise(inject(load_model(either_base), config))
    save_adapter(model, tmp_path / "adapter")
    keys = {key.removeprefix("base_model.model.") for key in load_file(tmp_path / "adapter" / WEIGHTS)}
    checkpoint = set(torch.load(either_base))
    blocks = {f"{name}.miss_block" for name in adapters(model)}
    assert (keys & STATES == STATES) == ("state" in config.method)
    assert keys - STATES - checkpoint == blocks
    content = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert content["peft_type"] == "RWKV_MISS" and content["method"] == config.method
    assert read_adapter(tmp_path / "adapter").config.modules_to_save == (
        sorted(config.modules_to_save) if config.modules_to_save else None
    )


def test_hf_peft_refuses_what_it_has_no_form_for(either_base, tmp_path, config):
    peft = pytest.importorskip("peft")
    save_adapter(inject(load_model(either_base), config), tmp_path / "adapter")
    with pytest.raises(Exception, match="RWKV_MISS"):
        peft.PeftModel.from_pretrained(load_model(either_base), tmp_path / "adapter")


@torch.no_grad()
@pytest.mark.parametrize("modules", [["ln_out"], ["ln", "emb", "head"], ["blocks.1.ln2", "att.ln_x"]])
def test_hf_peft_reads_whole_modules_of_ours(either_base, tmp_path, modules):
    peft = pytest.importorskip("peft")
    model = randomise(inject(load_model(either_base), AdapterConfig(r=5, modules_to_save=modules)))
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(load_model(either_base), tmp_path / "adapter")
    expected, _ = model(TOKENS)
    assert (theirs(TOKENS)[0] - expected).abs().max() < 1e-5 * expected.abs().max()
    state, ours = peft.get_peft_model_state_dict(theirs), load_file(tmp_path / "adapter" / WEIGHTS)
    assert state.keys() == ours.keys() and all(torch.equal(state[k], ours[k]) for k in ours)


@torch.no_grad()
@pytest.mark.parametrize("modules", [["ln_out"], ["ln1", "emb", "head"]])
def test_ours_reads_whole_modules_of_hf_pefts(either_base, tmp_path, modules):
    peft = pytest.importorskip("peft")
    config = peft.MissConfig(r=5, target_modules=["att.key", "ffn.value"], modules_to_save=modules)
    theirs = peft.get_peft_model(load_model(either_base), config)
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_adapter(load_model(either_base), tmp_path / "adapter").eval()
    expected, _ = theirs(TOKENS)
    assert (model(TOKENS)[0] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert installed(model).config.modules_to_save == sorted(modules)


@pytest.fixture
def folder(either_base, tmp_path):
    save_adapter(randomise(inject(load_model(either_base), CONFIGS["everything beside"])), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, k: t.update({k("emb.weight"): torch.zeros(63, 32)}), r"emb.weight has shape \(63, 32\), expected"),
        (
            lambda t, k: t.update({k("blocks.1.att.time_state"): torch.zeros(2, 8, 8)}),
            r"blocks.1.att.time_state has shape \(2, 8, 8\), expected \(2, 16, 16\)",
        ),
        (lambda t, k: t.update({k("blocks.3.att.time_state"): torch.zeros(2, 16, 16)}), "blocks.3.att.time_state"),
        (lambda t, k: t.update({k("blocks.0.att.w9"): torch.zeros(2)}), "blocks.0.att.w9, which is no part of"),
        (lambda t, k: t[k("ln_out.bias")].fill_(float("inf")), "ln_out.bias has values that are not finite"),
        (lambda t, k: t.pop(k("blocks.2.att.time_state")), "says that blocks.2.att.time_state was trained but"),
        (lambda t, k: t.pop(k("blocks.1.ln2.bias")), "says that blocks.1.ln2.bias was trained but"),
        (
            lambda t, k: t.update({k("blocks.0.att.key.weight"): torch.zeros(32, 32)}),
            "blocks.0.att.key.weight, which is the weight of a linear that has an adapter too",
        ),
    ],
)
def test_files_that_do_not_fit(either_base, folder, change, words):
    tensors = load_file(folder / WEIGHTS)
    change(tensors, "base_model.model.{}".format)
    save_file(tensors, folder / WEIGHTS)
    model = load_model(either_base)
    with pytest.raises(UserError, match=words):
        load_adapter(model, folder)
    assert all(p.requires_grad for p in model.parameters()) and model.adapter is None


def test_a_full_adapter_without_a_tensor(either_base, tmp_path):
    save_adapter(inject(load_model(either_base), AdapterConfig("full")), tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    del tensors["base_model.model.blocks.2.ffn.value.weight"]
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(UserError, match=r"says that blocks\.2\.ffn\.value\.weight was trained but"):
        load_adapter(load_model(either_base), tmp_path / "adapter")


def test_an_adapter_of_another_version_or_method(either_base, folder, random_weights, random_weights6, tmp_path):
    other = tmp_path / "other.pth"
    torch.save(random_weights() if load_model(either_base).config.version == 6 else random_weights6, other)
    with pytest.raises(UserError, match="trained on another base"):
        load_adapter(load_model(other), folder)
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(content | {"method": "bone"}))
    with pytest.raises(UserError, match=r"adapter_config\.json: method is 'bone'; this version has: miss, "):
        load_adapter(load_model(either_base), folder)
