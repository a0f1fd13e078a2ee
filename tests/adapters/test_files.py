"""Adapter folders: to HF PEFT and back, and everything that can be wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rwkv_miss import AdapterConfig, inject, load_adapter, load_model, save_adapter
from rwkv_miss.adapters.files import read_adapter
from rwkv_miss.adapters.inject import installed
from rwkv_miss.errors import UserError
from tests.helpers import adapters

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "rwkv_miss.json"
TOKENS = torch.randint(64, (2, 13), generator=torch.Generator().manual_seed(0))
KEY = "base_model.model.blocks.0.att.key.miss_block"


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    rng = torch.Generator().manual_seed(5)
    for layer in adapters(model).values():
        layer.miss_block.data.normal_(0, 0.1, generator=rng)
    return model.eval()


@pytest.fixture
def base(make_base) -> Path:
    return make_base()


@pytest.fixture
def folder(base, tmp_path) -> Path:
    """A good adapter folder for `base`, r = 5, on att.key and ffn.value."""
    model = inject(load_model(base), AdapterConfig(r=5, dropout=0.25, target_modules=["att.key", "ffn.value"]))
    save_adapter(randomise(model), tmp_path / "adapter", extra={"tokenizer": "bytes"})
    return tmp_path / "adapter"


def edit_config(folder: Path, **changes) -> None:
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **changes}))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def assert_refused(base: Path, folder: Path, *words: str) -> None:
    """`load_adapter` raises a UserError with all of `words` and leaves the model as it was."""
    model = load_model(base)
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    with pytest.raises(UserError) as error:
        load_adapter(model, folder)
    for word in words:
        assert word in str(error.value)
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == before
    assert all(p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_a_saved_adapter_loads_as_it_was(base, folder):
    saved = randomise(inject(load_model(base), AdapterConfig(r=5, target_modules=["att.key", "ffn.value"])))
    model = load_adapter(load_model(base), folder).eval()
    assert torch.equal(model(TOKENS)[0], saved(TOKENS)[0])
    assert not torch.equal(model(TOKENS)[0], load_model(base)(TOKENS)[0])
    assert installed(model).config == AdapterConfig(r=5, dropout=0.25, target_modules=["att.key", "ffn.value"])
    assert {layer.dropout for layer in adapters(model).values()} == {0.25}
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [f"{n}.miss_block" for n in adapters(model)]


def test_what_is_on_disk(folder):
    assert sorted(p.name for p in folder.iterdir()) == sorted([CONFIG, WEIGHTS, OURS])
    assert json.loads((folder / OURS).read_text())["tokenizer"] == "bytes"
    tensors = load_file(folder / WEIGHTS)
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {
        f"base_model.model.blocks.{i}.{name}.miss_block": (5, 32) for i in range(3) for name in ("att.key", "ffn.value")
    }
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert (folder / WEIGHTS).stat().st_mode == (folder / CONFIG).stat().st_mode  # permissions follow the umask


@torch.no_grad()
@pytest.mark.parametrize("targets", [None, ["att.key", "ffn.value"]])
def test_hf_peft_reads_ours(base, tmp_path, targets):
    peft = pytest.importorskip("peft")
    model = randomise(inject(load_model(base), AdapterConfig(r=5, target_modules=targets)))
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(load_model(base), tmp_path / "adapter")
    expected, _ = model(TOKENS)
    assert (theirs(TOKENS)[0] - expected).abs().max() < 1e-5 * expected.abs().max()
    state = peft.get_peft_model_state_dict(theirs)
    ours = load_file(tmp_path / "adapter" / WEIGHTS)
    assert state.keys() == ours.keys() and all(torch.equal(state[k], ours[k]) for k in ours)


@torch.no_grad()
@pytest.mark.parametrize(
    "chosen",
    [
        {"target_modules": ["att.key", "ffn.value"]},
        {"target_modules": r".*\.att\.(key|value)"},
        {"target_modules": ["key"], "layers_to_transform": 0, "layers_pattern": "blocks"},
        {"target_modules": ["key"], "exclude_modules": ["blocks.0.att.key"]},
    ],
)
def test_ours_reads_hf_pefts(base, tmp_path, chosen):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(load_model(base), peft.MissConfig(r=5, miss_dropout=0.1, **chosen))
    rng = torch.Generator().manual_seed(5)
    for name, p in theirs.named_parameters():
        if "miss_block" in name:
            p.data.normal_(0, 0.1, generator=rng)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_adapter(load_model(base), tmp_path / "adapter").eval()
    state = peft.get_peft_model_state_dict(theirs)
    assert {f"base_model.model.{n}.miss_block" for n in adapters(model)} == state.keys()
    assert all(torch.equal(m.miss_block, state[f"base_model.model.{n}.miss_block"]) for n, m in adapters(model).items())
    expected = theirs.eval()(TOKENS)[0]
    assert (model(TOKENS)[0] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert installed(model).config.dropout == 0.1


def test_another_base_is_refused(make_base, folder):
    assert_refused(make_base("other.pth", seed=1), folder, "trained on another base", "fingerprint")


def test_the_same_base_in_another_file_is_accepted(make_base, folder):
    load_adapter(load_model(make_base("base.st")), folder)


def test_one_changed_number_in_a_small_tensor_makes_another_base(base, folder, tmp_path):
    weights = torch.load(base)
    weights["blocks.2.att.x_k"][0, 0, 7] += 0.001
    torch.save(weights, tmp_path / "other.pth")
    assert_refused(tmp_path / "other.pth", folder, "trained on another base")


def test_a_second_adapter_is_refused(base, folder):
    model = load_adapter(load_model(base), folder)
    with pytest.raises(UserError, match="adapter already"):
        load_adapter(model, folder)


def test_there_is_nothing_to_save(base, tmp_path):
    with pytest.raises(UserError, match="no adapter"):
        save_adapter(load_model(base), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_missing_block(base, folder):
    edit_weights(folder, lambda t: t.pop(KEY))
    assert_refused(base, folder, str(folder), "blocks.0.att.key", "has no miss_block")


def test_no_blocks_at_all(base, folder):
    edit_weights(folder, lambda t: t.clear())
    assert_refused(base, folder, str(folder), "has no miss_block")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("blocks.0.att.gate", "which this base does not have; give the base that it was trained on"),
        ("blocks.7.att.key", "which this base does not have"),
        ("head", "which is beyond what can be adapted here (att.receptance, att.key, "),
        ("blocks.0.ln1", "with these as its target_modules"),
    ],
)
def test_a_block_that_nothing_would_use(base, folder, extra, words):
    edit_weights(folder, lambda t: t.update({f"base_model.model.{extra}.miss_block": torch.ones(5, 32)}))
    assert_refused(base, folder, str(folder), f"goes beside {extra}", words)


def test_weights_in_pefts_older_format_alone(base, folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert_refused(base, folder, str(folder / WEIGHTS), "there is adapter_model.bin", "save the adapter again")


@pytest.mark.parametrize("key", ["base_model.model.blocks.0.att.key.lora_A.weight", "blocks.0.att.key.miss_block"])
def test_a_key_of_something_else(base, folder, key):
    edit_weights(folder, lambda t: t.update({key: torch.ones(5, 32)}))
    assert_refused(base, folder, str(folder / WEIGHTS), key)


@pytest.mark.parametrize("shape", [(4, 32), (5, 31), (5, 32, 1), (160,)])
def test_a_block_of_the_wrong_shape(base, folder, shape):
    edit_weights(folder, lambda t: t.update({KEY: torch.ones(shape)}))
    assert_refused(base, folder, str(folder), "blocks.0.att.key", str(shape))


def test_r_larger_than_the_input(base, folder):
    edit_config(folder, r=33, target_modules=["att.key"])
    edit_weights(folder, lambda t: (t.clear(), t.update({KEY: torch.ones(33, 32)})))
    assert_refused(base, folder, "blocks.1.att.key", "has no miss_block")
    edit_config(folder, target_modules="blocks.0.att.key")
    assert_refused(base, folder, "blocks.0.att.key", "r is 33 but the linear has only 32 inputs")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(base, folder, value):
    edit_weights(folder, lambda t: t[KEY].__setitem__((2, 3), value))
    assert_refused(base, folder, str(folder), "blocks.0.att.key", "not finite")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_weights": "bat"}, ["blocks.0.att.key", "r is 5, which does not divide"]),
        ({"init_weights": "mini", "mini_r": 8}, ["blocks.0.att.key", "(5, 32)", "(5, 8)"]),
        ({"peft_type": "IA3"}, ["peft_type is 'IA3'"]),
        ({"peft_type": None}, ["peft_type is None"]),
        ({"r": 6}, ["r = 6", "(5, 32)"]),
        ({"r": None}, ["None"]),
        ({"miss_dropout": None}, ["miss_dropout is None"]),
        ({"miss_dropout": 1.0}, ["miss_dropout is 1.0"]),
        ({"target_modules": [1]}, ["target_modules is [1]"]),
        ({"modules_to_save": [None]}, ["modules_to_save is [None]"]),
    ],
)
def test_a_config_of_another_adapter(base, folder, changes, words):
    edit_config(folder, **changes)
    assert_refused(base, folder, str(folder), *words)


@pytest.mark.parametrize("name", [CONFIG, OURS])
@pytest.mark.parametrize("content", [b'{"r": 5', b"[1, 2]", b"", b"\xff\xfe\x00"])
def test_a_broken_json(base, folder, name, content):
    (folder / name).write_bytes(content)
    assert_refused(base, folder, str(folder / name))


def test_no_rank_in_the_config(base, folder):
    """With blocks in the weights file, and without."""
    content = json.loads((folder / CONFIG).read_text())
    del content["r"]
    (folder / CONFIG).write_text(json.dumps(content))
    assert_refused(base, folder, str(folder))
    edit_weights(folder, lambda t: t.clear())
    assert_refused(base, folder, str(folder))


@pytest.mark.parametrize("length", [0, 4, 100, -4])
def test_truncated_weights(base, folder, length):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:length])
    assert_refused(base, folder, str(folder / WEIGHTS), "truncated")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file(base, folder, name):
    (folder / name).unlink()
    assert_refused(base, folder, str(folder / name), "no such file")


def test_no_folder(base, folder):
    assert_refused(base, folder / "nothing", "no such folder")
    assert_refused(base, folder / CONFIG, "is a file; an adapter is a folder with adapter_config.json")


@pytest.mark.parametrize(("r", "limit"), [(5, 4096), (8, 4096), (8, 20)])
def test_a_full_disk_keeps_the_old_adapter(base, folder, full_disk, r, limit):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    model = inject(load_model(base), AdapterConfig(r=r))
    with full_disk(limit), pytest.raises(UserError, match=str(folder)):
        save_adapter(model, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    read_adapter(folder)


def test_saving_over_an_old_adapter(base, folder):
    save_adapter(inject(load_model(base), AdapterConfig(r=8)), folder)
    assert read_adapter(folder).config.r == 8
    assert sorted(p.name for p in folder.iterdir()) == sorted([CONFIG, WEIGHTS, OURS])
