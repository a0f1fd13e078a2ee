"""web-rwkv's files: names, shapes, dtype and numbers as its converter and loader have them, written out here."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors import safe_open

from rwkv_miss import AdapterConfig, merge
from rwkv_miss.checkpoint import read_checkpoint
from rwkv_miss.cli import main
from rwkv_miss.errors import UserError
from rwkv_miss.export.table import ADAPTER_TARGETS, TARGETS
from rwkv_miss.merging.alone import write_alone
from rwkv_miss.model.recognise import infer_config
from tests.helpers import save_random_adapter


def table(sizes):
    """web-rwkv's names and shapes, of a model whose first layer has no v0, v1, v2."""
    C, F, V, heads, r = sizes.n_embd, sizes.dim_ffn, sizes.vocab_size, (sizes.n_head, sizes.head_size), sizes.low_rank
    layers = range(sizes.n_layer)
    found = {"emb.weight": (V, C), "head.weight": (V, C)}
    normed = ["ln_out", "blocks.0.ln0", *(f"blocks.{i}.{name}" for i in layers for name in ("ln1", "ln2", "att.ln_x"))]
    found |= {f"{name}.{end}": (C,) for name in normed for end in ("weight", "bias")}
    for i in layers:
        att, ffn = f"blocks.{i}.att", f"blocks.{i}.ffn"
        found |= {f"{att}.{name}.weight": (C, C) for name in ("receptance", "key", "value", "output")}
        found |= {f"{ffn}.key.weight": (F, C), f"{ffn}.value.weight": (C, F)}
        if sizes.version == 6:
            found |= {f"{att}.gate.weight": (C, C), f"{ffn}.receptance.weight": (C, C)}
            found |= {f"{att}.time_mix_{x}": (1, 1, C) for x in "xwkvrg"}
            found |= {f"{att}.time_mix_w1": (5 * r["maa"], C), f"{att}.time_mix_w2": (5, C, r["maa"])}
            found |= {f"{att}.time_decay": (1, 1, C), f"{att}.time_first": heads}
            found |= {f"{att}.time_decay_w1": (r["decay"], C), f"{att}.time_decay_w2": (C, r["decay"])}
            found |= {f"{ffn}.time_mix_k": (1, 1, C), f"{ffn}.time_mix_r": (1, 1, C)}
        else:
            found |= {f"{att}.{x}": (1, 1, C) for x in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a")}
            found |= {f"{att}.r_k": heads, f"{ffn}.x_k": (1, 1, C)}
            for x in "wagv" if i > 0 else "wag":
                found |= {f"{att}.{x}1": (r[x], C), f"{att}.{x}2": (C, r[x])}
                found |= {f"{att}.{x}0": (1, 1, C)} if x != "g" else {}
    return found


TINY = [pytest.param(name, marks=pytest.mark.slow) for name in ("tiny-rwkv6-3m", "tiny-rwkv7-834K")]


@pytest.fixture(params=["random-6", "random-7", *TINY])
def base(request, tmp_path, random_weights, random_weights6):
    if request.param.startswith("tiny"):
        return request.getfixturevalue("reference") / "models" / f"{request.param}.pth"
    torch.save(random_weights6 if request.param == "random-6" else random_weights(), tmp_path / "base.pth")
    return tmp_path / "base.pth"


def stored(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_names_shapes_and_numbers(base, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[merge.__module__], "_CHUNK", 2000)  # as many pieces as a large model has
    assert main(["export", f"--model={base}", "--to=st", f"--out={tmp_path / 'out.st'}"]) == 0
    found, metadata = stored(tmp_path / "out.st")
    weights = read_checkpoint(base)
    assert metadata == {"format": "pt"}
    assert {name: tuple(t.shape) for name, t in found.items()} == table(infer_config(weights, base))
    assert len(found) == len(weights)
    for name, tensor in found.items():
        half = weights[name.replace("time_first", "time_faaaa").replace("time_mix", "time_maa")].half()
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, half if half.shape == tensor.shape else half.transpose(-1, -2)), name


@pytest.mark.parametrize(("either_base", "method"), [(6, "miss"), (7, "mini"), (7, "lora")], indirect=["either_base"])
def test_a_lora_is_the_adapter_whatever_its_ranks(either_base, tmp_path, method):
    options = {"mini": {"mini_r": 8}, "lora": {"alpha": 4.0}}.get(method, {})
    config = AdapterConfig(method, r=6, rank_pattern={"ffn.value": 3}, options=options)
    folder = save_random_adapter(either_base, tmp_path / "adapter", config, std=0.02)
    out = tmp_path / "lora.st"
    assert main(["export", f"--model={either_base}", f"--adapter={folder}", "--to=st-lora", f"--out={out}"]) == 0
    merge(either_base, folder, tmp_path / "merged.pth")
    before, after, (found, _) = read_checkpoint(either_base), read_checkpoint(tmp_path / "merged.pth"), stored(out)
    changed = {key.removesuffix(".weight") for key in before if not torch.equal(before[key], after[key])}
    assert set(found) == {f"{path}.lora.{i}" for path in changed for i in range(2)}
    for path in changed:
        first, second = found[f"{path}.lora.0"], found[f"{path}.lora.1"]
        dW = after[f"{path}.weight"] - before[f"{path}.weight"]
        assert first.dtype == second.dtype == torch.float16
        r = 3 if path.endswith("ffn.value") else 6
        assert (first.shape, second.shape) == ((dW.shape[1], r), (dW.shape[0], r))
        alpha = 1.0  # what web-rwkv multiplies by alpha / r, with r from the first's shape
        assert torch.allclose(alpha / r * second.float() @ first.float().T, dW, rtol=2e-3, atol=1e-5)


def test_vectors_beside_a_lora_take_the_place_of_the_bases(either_base, tmp_path):
    names = ["ln", "time_maa_x"] if either_base.name == "base6.pth" else ["ln", "w0"]
    folder = save_random_adapter(either_base, tmp_path / "adapter", AdapterConfig(r=4, modules_to_save=names))
    write_alone(either_base, folder, tmp_path / "lora.st", ADAPTER_TARGETS["st-lora"])
    merge(either_base, folder, tmp_path / "merged.pth")
    merged, found = read_checkpoint(tmp_path / "merged.pth"), stored(tmp_path / "lora.st")[0]
    vectors = {name: tensor for name, tensor in found.items() if ".lora." not in name}
    assert len(vectors) == 2 * (2 + 3 * 3) + 3
    assert not any("time_maa" in name for name in vectors)
    for name, tensor in vectors.items():
        assert torch.equal(tensor, merged[name.replace("time_mix", "time_maa")].half()), name


@pytest.mark.parametrize(("version", "name"), [(6, "time_faaaa"), (7, "r_k")])
def test_matrices_beside_a_lora_would_be_added(make_base, random_weights6, tmp_path, version, name):
    """web-rwkv reads r_k as a matrix even where there is one head."""
    base = make_base(head_size=32)
    if version == 6:
        torch.save(random_weights6, base)
    folder = save_random_adapter(base, tmp_path / "adapter", AdapterConfig(r=4, modules_to_save=[name]))
    with pytest.raises(UserError, match=rf"it trained blocks\.0\.att\.{name}, a part of the base"):
        write_alone(base, folder, tmp_path / "out.st", ADAPTER_TARGETS["st-lora"])
    assert not list(tmp_path.glob("*out.st*"))


def test_what_cannot_be_held(make_base, either_base, tmp_path):
    def refused(message, base, *adapters, to="st"):
        with pytest.raises(UserError, match=message):
            if to in TARGETS:
                merge(base, list(adapters), tmp_path / "out.st", target=TARGETS[to])
            else:
                write_alone(base, adapters[0], tmp_path / "out.st", ADAPTER_TARGETS[to])
        assert not list(tmp_path.glob("*out.st*"))

    refused("sizes in the second layer of an RWKV-7", make_base("one.pth", n_layer=1))
    refused(
        "no place for a learned state",
        either_base,
        save_random_adapter(either_base, tmp_path / "s", AdapterConfig("state")),
    )
    large = save_random_adapter(either_base, tmp_path / "large", AdapterConfig(r=4), std=1e5)
    refused("numbers beyond 65,504", either_base, large, to="st-lora")
