"""GGUF files: what stands in them, and what is refused. What llama.cpp computes of them: test_llama_cpp.py."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rwkv_miss import AdapterConfig, merge
from rwkv_miss.cli import main
from rwkv_miss.errors import RunError, UserError
from rwkv_miss.export.table import ADAPTER_TARGETS, TARGETS
from rwkv_miss.export.target import Text
from rwkv_miss.merging.alone import write_alone
from tests.helpers import save_random_adapter

gguf = pytest.importorskip("gguf")
# Without a runtime: what is looked at here is the file.
MODEL = replace(TARGETS["gguf"], runtime=None)
ADAPTER = replace(ADAPTER_TARGETS["gguf-lora"], runtime=None)
# llama.cpp's src/models/rwkv7.cpp and rwkv6.cpp: the shapes in GGUF's order of a block of C channels, F hidden ones.
C7, F7, C6, F6 = 64, 256, 32, 96
BLOCK = {
    7: {
        **{f"attn_norm{i}.{kind}": [C7] for i in ("", "_2") for kind in ("weight", "bias")},
        **{f"time_mix_ln.{kind}": [C7] for kind in ("weight", "bias")},
        "time_mix_lerp_fused.weight": [C7, 1, 1, 6],
        **{f"time_mix_{name}.weight": [C7] for name in ("w0", "a0", "v0", "k_k", "k_a", "r_k")},
        **{f"time_mix_{x}1.weight": [C7, rank] for x, rank in {"w": 5, "a": 6, "v": 3, "g": 9}.items()},
        **{f"time_mix_{x}2.weight": [rank, C7] for x, rank in {"w": 5, "a": 6, "v": 3, "g": 9}.items()},
        **{f"time_mix_{name}.weight": [C7, C7] for name in ("receptance", "key", "value", "output")},
        "channel_mix_lerp_k.weight": [C7],
        "channel_mix_key.weight": [C7, F7],
        "channel_mix_value.weight": [F7, C7],
    },
    6: {
        **{f"attn_norm{i}.{kind}": [C6] for i in ("", "_2") for kind in ("weight", "bias")},
        **{f"time_mix_ln.{kind}": [C6] for kind in ("weight", "bias")},
        "time_mix_lerp_x.weight": [C6],
        "time_mix_lerp_fused.weight": [C6, 1, 1, 5],
        "time_mix_w1.weight": [C6, 5 * 4],
        "time_mix_w2.weight": [4, C6, 5],
        "time_mix_first.weight": [16, 2],
        "time_mix_decay.weight": [C6],
        "time_mix_decay_w1.weight": [C6, 6],
        "time_mix_decay_w2.weight": [6, C6],
        **{f"time_mix_{name}.weight": [C6, C6] for name in ("receptance", "key", "value", "output", "gate")},
        **{f"channel_mix_lerp_{x}.weight": [C6] for x in "kr"},
        "channel_mix_receptance.weight": [C6, C6],
        "channel_mix_key.weight": [C6, F6],
        "channel_mix_value.weight": [F6, C6],
    },
}
LARGE = re.compile(r"token_embd\.weight|output\.weight|.*(receptance|key|value|time_mix_output|gate)\.weight")
SMALL = re.compile(r".*time_mix_[avg][12]\.weight")


@pytest.fixture(params=[6, 7])
def base(request, tmp_path, make_base, random_weights6) -> Path:
    """A random base of each version in turn, of 3 layers and 64 tokens, in sizes that llama.cpp computes."""
    if request.param == 7:
        return make_base(n_embd=C7, head_size=32, layer0_v=True)
    torch.save(random_weights6, tmp_path / "base.pth")
    return tmp_path / "base.pth"


def adapter_of(base: Path, folder: Path, **settings) -> Path:
    return save_random_adapter(base, folder, AdapterConfig(**{"r": 4, **settings}), tokenizer="bytes")


def read(path: Path) -> tuple[dict, dict]:
    """A file's metadata, and the (shape in GGUF's order, type) of its tensors."""
    reader = gguf.GGUFReader(path)
    said = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return said, {t.name: (t.shape.tolist(), t.tensor_type.name) for t in reader.tensors}


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_names_shapes_and_types_are_those_that_llama_cpp_loads(base, tmp_path, dtype):
    merge(base, [], tmp_path / "model.gguf", dtype, target=MODEL)
    said, tensors = read(tmp_path / "model.gguf")
    version = int(said["general.architecture"].removeprefix("rwkv"))
    C = said[f"rwkv{version}.embedding_length"]
    top = {f"{name}.{kind}": [C] for name in ("token_embd_norm", "output_norm") for kind in ("weight", "bias")}
    top |= {"token_embd.weight": [C, 64], "output.weight": [C, 64]}
    blocks = {f"blk.{i}.{name}": shape for i in range(3) for name, shape in BLOCK[version].items()}
    if version == 7:  # what layer 0 never reads has the sizes of the in-context learning rate's
        blocks |= {"blk.0.time_mix_v1.weight": [C, 6], "blk.0.time_mix_v2.weight": [6, C]}
    assert {name: shape for name, (shape, _) in tensors.items()} == top | blocks
    for name, (_, kind) in tensors.items():
        is_stored = LARGE.fullmatch(name) or (version == 7 and SMALL.fullmatch(name))
        small = "F16" if dtype == "q8_0" else dtype.upper()
        assert kind == (dtype.upper() if LARGE.fullmatch(name) else small if is_stored else "F32"), name
    assert said["general.file_type"] == {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}[dtype]


def test_ranks_are_the_tensors_and_nothing_is_rescaled(base, tmp_path):
    merge(base, [], tmp_path / "model.gguf", "f32", target=MODEL)
    said, _ = read(tmp_path / "model.gguf")
    if said["general.architecture"] == "rwkv7":
        ranks = [said[f"rwkv7.attention.{x}_lora_rank"] for x in ("decay", "iclr", "value_residual_mix", "gate")]
        assert ranks == [5, 6, 3, 9]
    else:
        assert [said[f"rwkv6.{x}"] for x in ("time_mix_extra_dim", "time_decay_extra_dim")] == [4, 6]
        assert said["rwkv6.rescale_every_n_layers"] == 0


def test_the_vocabulary_and_the_chat_template_are_inside(base, tmp_path):
    text = Text("mine", [b"", b"a", b"\n\n", b"'", b"\xff\\"], "{{ messages }}")
    merge(base, [], tmp_path / "model.gguf", "f32", target=MODEL, text=text)
    said, _ = read(tmp_path / "model.gguf")
    tokens = said["tokenizer.ggml.tokens"]
    assert tokens[:6] == ["<s>", "a", r"\n\n", "'", r"\xff\\", "[PAD5]"] and len(tokens) == 64
    assert said["tokenizer.ggml.token_type"] == [3, 1, 1, 1, 1] + [5] * 59
    ids = [said[f"tokenizer.ggml.{x}_token_id"] for x in ("bos", "eos", "eot")]
    assert (ids, said["tokenizer.ggml.add_bos_token"]) == ([0, 0, 2], False)
    assert (said["general.name"], said["tokenizer.chat_template"]) == ("mine", "{{ messages }}")


def test_an_adapters_scale_is_one_for_every_rank(base, tmp_path):
    """llama.cpp multiplies by alpha / rank, or by nothing without alpha."""
    for ranks, alpha in ((None, 4.0), ({"ffn.key": 2}, 0.0)):
        adapter = adapter_of(base, tmp_path / f"adapter{alpha}", rank_pattern=ranks)
        write_alone(base, adapter, tmp_path / "adapter.gguf", ADAPTER, overwrite=True)
        said, tensors = read(tmp_path / "adapter.gguf")
        assert (said["general.type"], said["adapter.type"]) == ("adapter", "lora")
        assert said["adapter.lora.alpha"] == alpha
        C = tensors["blk.0.time_mix_key.weight.lora_a"][0][0]
        assert tensors["blk.0.time_mix_key.weight.lora_b"] == ([4, C], "F32")


@pytest.mark.parametrize(("method", "what"), [("dora", "no product B A"), ("bat", "no product B A")])
def test_what_is_no_product_is_refused_as_an_adapter(base, tmp_path, method, what):
    adapter = adapter_of(base, tmp_path / "adapter", method=method)
    with pytest.raises(UserError, match=f"{what}; export the merged model instead"):
        write_alone(base, adapter, tmp_path / "adapter.gguf", ADAPTER)
    assert not list(tmp_path.glob("*gguf*"))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"method": "miss+state"}, r"trained blocks.0.att.time_state, a learned state"),
        ({"modules_to_save": ["ln"]}, r"trained blocks.0.att.ln_x.bias, a part of the base"),
    ],
)
def test_what_is_not_beside_linears_is_refused_as_an_adapter(base, tmp_path, settings, what):
    adapter = adapter_of(base, tmp_path / "adapter", **settings)
    with pytest.raises(UserError, match=f"{what}.*; export the merged model instead"):
        write_alone(base, adapter, tmp_path / "adapter.gguf", ADAPTER)
    assert not list(tmp_path.glob("*gguf*"))


def test_a_learned_state_is_refused(base, tmp_path):
    adapter = adapter_of(base, tmp_path / "adapter", method="state")
    with pytest.raises(UserError, match=r"no place for a learned state .*; write the model for other"):
        merge(base, adapter, tmp_path / "model.gguf", target=MODEL)
    assert not list(tmp_path.glob("*gguf*"))


def test_what_is_too_large_for_f16_is_refused(base, tmp_path):
    weights = torch.load(base)
    weights["head.weight"][0, 0] = 1e6
    torch.save(weights, tmp_path / "large.pth")
    with pytest.raises(UserError, match=r"head.weight: not finite in fp16, .* give --dtype bf16"):
        merge(tmp_path / "large.pth", [], tmp_path / "model.gguf", "f16", target=MODEL)
    assert not list(tmp_path.glob("*gguf*"))


def test_heads_that_llama_cpp_does_not_compute_are_refused(make_base, tmp_path):
    with pytest.raises(UserError, match=r"heads of 16, but llama.cpp computes RWKV-7 rightly with multiples of 32"):
        merge(make_base(), [], tmp_path / "model.gguf", target=MODEL)


def test_a_file_of_other_numbers_gets_no_name(base, tmp_path):
    """Of a model, quantised or not, and of an adapter."""
    for dtype in ("f32", "q8_0"):
        wrong = replace(MODEL, read=lambda path: {key: t.roll(1) for key, t in MODEL.read(path).items()})
        with pytest.raises(RunError, match="was read back changed"):
            merge(base, [], tmp_path / "model.gguf", dtype, target=wrong)
    adapter = adapter_of(base, tmp_path / "adapter")
    scaled = replace(
        ADAPTER, read=lambda path: {key: f._replace(B=f.B * 1.001) for key, f in ADAPTER.read(path).items()}
    )
    with pytest.raises(RunError, match="was read back changed"):
        write_alone(base, adapter, tmp_path / "adapter.gguf", scaled)
    assert not list(tmp_path.glob("*gguf*"))


def test_a_runtime_that_computes_something_else_is_an_error(base, tmp_path):
    def even(model, adapter, prompts):
        return [dict.fromkeys(range(64), -4.16) for _ in prompts]

    adapter = adapter_of(base, tmp_path / "adapter")
    runtime = replace(TARGETS["gguf"].runtime, package="gguf", module="gguf", log_probs=even)
    with pytest.raises(RunError, match=r"gguf [\d.]+ computes something else of the written file"):
        merge(base, [], tmp_path / "model.gguf", target=replace(MODEL, runtime=runtime))
    with pytest.raises(RunError, match="computes something else"):
        write_alone(base, adapter, tmp_path / "adapter.gguf", replace(ADAPTER, runtime=runtime))
    assert not list(tmp_path.glob("*gguf*"))


def test_a_full_disk_leaves_nothing(base, tmp_path, full_disk):
    with full_disk(100_000), pytest.raises(UserError, match="cannot be written"):
        merge(base, [], tmp_path / "model.gguf", "f32", target=MODEL)
    assert not list(tmp_path.glob("*gguf*"))


def refused(capsys, *arguments: object) -> str:
    assert main(["export", *map(str, arguments)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("rwkv-miss")
    return message


def test_wrong_commands(base, tmp_path, capsys, monkeypatch, make_base):
    out = tmp_path / "out.gguf"
    given = ["--model", base, "--out", out, "--tokenizer", "bytes"]
    assert "no format 'onnx' to export to; there are gguf" in refused(capsys, "--to", "onnx", *given)
    assert "rwkv-miss merge writes a .pth" in refused(capsys, "--to", "pth", *given)
    assert "gguf-lora is an adapter alone; give --adapter" in refused(capsys, "--to", "gguf-lora", *given)
    adapter = adapter_of(base, tmp_path / "adapter")
    beside = ["--to", "gguf-lora", "--model", base, "--out", out, "--adapter", adapter]
    assert "it has f32, f16" in refused(capsys, *beside, "--dtype", "q8_0")
    assert "leave --tokenizer and --template out" in refused(capsys, *beside, "--tokenizer", "world")
    other = make_base("other.pth", seed=1, n_embd=C7, head_size=32)
    beside[3] = other
    assert "trained on another base" in refused(capsys, *beside)
    assert "has 256 tokens, but the model 64; give --tokenizer" in refused(capsys, "--to", "gguf", *given)
    own = tmp_path / "tokenizer.json"
    own.write_text(json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}))
    given[-1] = own
    assert "give world or bytes" in refused(capsys, "--to", "gguf", *given)
    out.write_text("old")
    assert "exists already" in refused(capsys, "--to", "gguf", *given[:-1], "bytes")
    assert out.read_text() == "old"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    said = refused(capsys, "--to", "gguf", *given)
    assert "needs the package gguf, which is not installed: pip install 'rwkv-miss[gguf]'" in said


@pytest.mark.slow
def test_the_command_says_what_was_written_and_checked(tmp_path, make_base, capsys, monkeypatch):
    base = make_base(n_embd=C7, head_size=32, vocab_size=256)
    adapter = adapter_of(base, tmp_path / "adapter")
    find = importlib.util.find_spec
    lost = {"xllamacpp"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in lost else find(name, *rest))
    given = ["--model", str(base), "--adapter", str(adapter)]
    assert main(["export", *given, "--to", "gguf", "--out", str(tmp_path / "a.gguf"), "--template", "fim"]) == 0
    said = capsys.readouterr().out
    size = f"{(tmp_path / 'a.gguf').stat().st_size:,}"
    assert f"a.gguf: f32, {size} bytes; read back as it was written" in said
    assert "the template fim has no form in Jinja: the file has no chat template" in said
    assert re.search(r"differ from base \+ adapter by \S+e-0[678] of their size on 2 prompts; the adapter", said)
    assert "no runtime was found, so that it was not run: pip install 'rwkv-miss[llama]' brings xllamacpp" in said
    lost.clear()
    pytest.importorskip("xllamacpp")
    assert main(["export", *given, "--to", "gguf-lora", "--out", str(tmp_path / "b.gguf"), "--dtype", "f16"]) == 0
    said = capsys.readouterr().out
    assert "b.gguf: f16, " in said and "beside 18 linears; read back as it was written" in said
    assert re.search(
        r"run in xllamacpp \S+: log-probabilities differ by \S+ of the logits' size, and the likeliest", said
    )
    assert sorted(path.name for path in tmp_path.glob("*.gguf*")) == ["a.gguf", "a.gguf.md", "b.gguf", "b.gguf.md"]
