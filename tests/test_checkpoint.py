"""Reading RWKV checkpoints, refusing other files, and writing files that are complete or absent."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rwkv_miss import load_model
from rwkv_miss.checkpoint import (
    TensorSpec,
    parse_dtype,
    read_checkpoint,
    write_pth,
    write_safetensors_in_pieces,
)
from rwkv_miss.cli import main
from rwkv_miss.errors import UserError
from rwkv_miss.model.recognise import infer_config
from tests.helpers import RunsCode
from tests.processes import run_process


def assert_refused(path: Path, *words: str) -> None:
    """`load_model` raises a UserError that names the file and says all of `words`, once, on one line."""
    with pytest.raises(UserError) as error:
        load_model(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    for word in words:
        assert word in message, message


def save(path: Path, content) -> Path:
    torch.save(content, path)
    return path


# Files that cannot be read


@pytest.mark.parametrize("name", ["none.pth", "none.st"])
def test_no_such_file(tmp_path, name):
    assert_refused(tmp_path / name, "no such file")


@pytest.mark.parametrize("name", ["folder.pth", "folder.st"])
def test_a_folder(tmp_path, name):
    (tmp_path / name).mkdir()
    assert_refused(tmp_path / name, "is a folder")


@pytest.mark.parametrize("name", ["base.pth", "base.st"])
@pytest.mark.parametrize("share", [0, 1e-4, 0.01, 0.3, 0.999])
def test_truncated(make_base, name, share):
    path = make_base(name)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert_refused(path)


@pytest.mark.parametrize("name", ["text.pth", "text.st"])
@pytest.mark.parametrize("content", [b"hello, this is a text\n", b"\x80\x02", b"PK\x03\x04", bytes(1000)])
def test_something_else(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path / name)


def test_a_zip_of_something_else(tmp_path):
    path = tmp_path / "base.pth"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("notes.txt", "hello")
    assert_refused(path, "cannot be read")


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("inside", [False, True])
def test_a_pickle_that_runs_code(tmp_path, random_weights, new_format, inside):
    marker = tmp_path / "ran"
    path = tmp_path / "base.pth"
    content = {**random_weights(), "extra": RunsCode(marker)} if inside else RunsCode(marker)
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    assert_refused(path, "run code", "nothing was executed")
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the file of this test would not have run anything"


@pytest.mark.parametrize("new_format", [True, False])
def test_both_formats_of_pytorch_are_read(tmp_path, random_weights, new_format):
    path, weights = tmp_path / "base.pth", random_weights(dtype=torch.bfloat16)
    torch.save(weights, path, _use_new_zipfile_serialization=new_format)
    loaded = read_checkpoint(path)
    assert list(loaded) == list(weights)
    assert all(torch.equal(loaded[k], t) and loaded[k].dtype == t.dtype for k, t in weights.items())


def test_parameters_are_read_as_tensors(tmp_path, random_weights):
    """Some programs save a model's parameters instead of their values."""
    weights = random_weights()
    torch.save({k: torch.nn.Parameter(t) for k, t in weights.items()}, tmp_path / "base.pth")
    loaded = read_checkpoint(tmp_path / "base.pth")
    assert all(torch.equal(loaded[k], t) and not loaded[k].requires_grad for k, t in weights.items())


# Files that hold something else


@pytest.mark.parametrize("content", [{}, [], torch.ones(3), {"lr": 0.1}, {"emb.weight": [1.0]}, {0: torch.ones(1)}])
def test_not_a_state_dict(tmp_path, content):
    assert_refused(save(tmp_path / "base.pth", content), "flat state dict")


def test_a_nested_state_dict(tmp_path, random_weights):
    path = save(tmp_path / "base.pth", {"state_dict": random_weights(), "step": 3})
    assert_refused(path, "flat state dict", "state_dict, step")


OTHERS = {
    "v4": (["blocks.0.att.time_decay", "blocks.0.att.time_first"], ["RWKV-4"]),
    "v5": (["blocks.0.att.time_decay", "blocks.0.att.time_faaaa", "blocks.0.att.ln_x.weight"], ["RWKV-5"]),
    "hf": (["model.layers.0.attn.r_proj.weight", "model.embeddings.weight"], ["Hugging Face", ".pth"]),
    "old hf": (["rwkv.blocks.0.attention.key.weight", "rwkv.embeddings.weight"], ["Hugging Face", ".pth"]),
    "peft": (["base_model.model.blocks.0.att.key.miss_block"], ["an adapter, not a model"]),
    "lora": (["base_model.model.blocks.0.att.key.lora_A.weight"], ["an adapter, not a model"]),
    "disha": (["blocks.0.att.key.disha"], ["an adapter, not a model"]),
    "llama": (["layers.0.wq.weight", "tok_embeddings.weight"], ["not an RWKV checkpoint", "layers.0.wq.weight"]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_architecture(tmp_path, kind):
    keys, words = OTHERS[kind]
    assert_refused(save(tmp_path / "base.pth", {k: torch.ones(2, 2) for k in keys}), *words)


def test_rwkv_7a(tmp_path, random_weights):
    weights = {**random_weights(), "blocks.0.ffn.s_emb.weight": torch.ones(64, 4)}
    assert_refused(save(tmp_path / "base.pth", weights), "7a", "DeepEmbed")


def test_a_later_version_is_not_taken_for_rwkv_7(tmp_path, random_weights, capsys):
    """RWKV-8's research code keeps RWKV-7's keys and adds its own."""
    more = {f"blocks.{i}.att.rosa_{name}.weight": torch.ones(32, 32) for i in range(3) for name in ("qkv", "o")}
    path = save(tmp_path / "base.pth", {**random_weights(), **more})
    assert_refused(path, "blocks.0.att.rosa_qkv.weight is not a part of RWKV-7", "a later version")
    assert main(["info", str(path)]) == 2
    assert "a later version" in capsys.readouterr().err


def test_rwkv_6(reference):
    path = reference / "models" / "tiny-rwkv6-3m.pth"
    config = infer_config(read_checkpoint(path), path)
    assert (config.version, config.n_layer, config.n_embd, config.n_head, config.head_size) == (6, 12, 128, 16, 8)
    assert (config.dim_ffn, config.vocab_size, config.low_rank) == (448, 256, {"maa": 32, "decay": 64})


# RWKV-7 files that are not whole


def test_a_missing_layer(tmp_path, random_weights):
    weights = {k: t for k, t in random_weights().items() if not k.startswith("blocks.1.")}
    assert_refused(save(tmp_path / "base.pth", weights), "blocks.1.* is missing, although there is blocks.2.*")


def test_any_missing_key(tmp_path, random_weights):
    """Every key but those that identify the architecture, and layer 0's v0, v1 and v2, which are optional."""
    whole = random_weights(n_layer=2, layer0_v=True)
    for key in whole:
        if key.startswith(tuple(f"blocks.0.att.{name}" for name in ("v0", "v1", "v2", "k_k"))):
            continue
        path = save(tmp_path / "base.pth", {k: t for k, t in whole.items() if k != key})
        assert_refused(path, key)
    del whole["blocks.0.att.k_k"]
    assert_refused(save(tmp_path / "base.pth", whole), "RWKV-")


@pytest.mark.parametrize("change", ["one more row", "one dimension less", "one dimension more"])
def test_any_mismatched_shape(tmp_path, random_weights, change):
    """Every tensor. If sizes are inferred from the changed one, the message names another."""
    whole = random_weights(n_layer=2)
    for key, tensor in whole.items():
        other = {
            "one more row": torch.cat([tensor, tensor[:1]]),
            "one dimension less": tensor.flatten() if tensor.ndim > 1 else tensor[0],
            "one dimension more": tensor.unsqueeze(0),
        }[change]
        assert_refused(save(tmp_path / "base.pth", {**whole, key: other}))


def test_heads_that_do_not_make_up_the_width(tmp_path, random_weights):
    weights = {k: torch.ones(2, 8) if k.endswith("r_k") else t for k, t in random_weights().items()}
    assert_refused(save(tmp_path / "base.pth", weights), "r_k")


def test_a_key_too_many(tmp_path, random_weights):
    weights = {**random_weights(), "blocks.1.att.extra": torch.ones(2)}
    assert_refused(save(tmp_path / "base.pth", weights), "blocks.1.att.extra is not a part of RWKV-7")


def test_many_problems_are_counted(tmp_path, random_weights):
    weights = {k: t for k, t in random_weights().items() if ".ln1." not in k and ".ln2." not in k}
    assert_refused(save(tmp_path / "base.pth", weights), "(and 7 more)")


def test_parse_dtype():
    assert parse_dtype("bf16") is parse_dtype(torch.bfloat16) is torch.bfloat16
    with pytest.raises(UserError, match=r"'bfloat16'.*bf16, fp16, fp32"):
        parse_dtype("bfloat16")


# Writing


def tensors_to_write() -> dict[str, torch.Tensor]:
    shared = torch.arange(24.0).view(4, 6)
    return {
        "plain": torch.randn(3, 5),
        "bf16": torch.randn(2, 1, 7).bfloat16(),
        "fp16": torch.randn(9).half(),
        "transposed": shared.T,
        "a row of a larger storage": shared[1],
        "every second column": shared[:, ::2],
        "its first rows": shared[:2],
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
        "expanded": torch.ones(1, 3).expand(2, 3),
    }


def test_write_pth_writes_what_torch_save_writes(tmp_path):
    tensors = tensors_to_write()
    path, other = tmp_path / "ours.pth", tmp_path / "torch.pth"
    asked = []
    write_pth(
        path, {k: TensorSpec(t.shape, t.dtype) for k, t in tensors.items()}, lambda k: asked.append(k) or tensors[k]
    )
    assert asked == list(tensors)
    torch.save({k: t.clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}, other)
    expected = torch.load(other)
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert list(loaded) == list(expected) and type(loaded) is dict
        for k, t in loaded.items():
            assert torch.equal(t, expected[k]) and t.dtype == expected[k].dtype and t.stride() == expected[k].stride()
            assert t.untyped_storage().nbytes() == t.numel() * t.element_size()
    with zipfile.ZipFile(path) as z, zipfile.ZipFile(other) as z_other:
        assert z.testzip() is None
        # Below a folder named after the file: the same data records as in PyTorch's own.
        names = {n.split("/", 1)[1] for n in z.namelist()}
        assert {n for n in names if n.startswith("data")} == {
            n.split("/", 1)[1] for n in z_other.namelist() if n.split("/", 1)[1].startswith("data")
        }
    assert path.stat().st_size < other.stat().st_size + 2000


def test_safetensors_in_pieces_are_what_safetensors_writes(tmp_path):
    tensors = {k: t.clone(memory_format=torch.contiguous_format) for k, t in tensors_to_write().items()}
    tensors["Schlüssel ключ"] = torch.randn(2**19 + 3, 1)
    specs, asked = {k: TensorSpec(t.shape, t.dtype) for k, t in tensors.items()}, []
    write_safetensors_in_pieces(
        tmp_path / "ours.st", specs, lambda k: asked.append(k) or tensors[k].view(-1).split(1000), {"format": "pt"}
    )
    save_file(tensors, tmp_path / "theirs.st", {"format": "pt"})
    assert asked == list(tensors)
    assert (tmp_path / "ours.st").read_bytes() == (tmp_path / "theirs.st").read_bytes()


def test_write_pth_raises_what_compute_raises(tmp_path):
    """Also where the tensor does not match its spec. In a process of its own: PyTorch's writer aborts the process if
    it is left with a closed file."""
    code = f"""
import torch
from pathlib import Path
from rwkv_miss.checkpoint import TensorSpec, write_pth

def compute(name):
    if name == "b" and isinstance(what, type):
        raise what("no")
    return what if name == "b" else torch.ones(1000)

specs = {{name: TensorSpec(torch.Size([1000]), torch.float32) for name in "abc"}}
for what in (KeyboardInterrupt, MemoryError, OSError, torch.ones(999), torch.ones(1000).half()):
    try:
        write_pth(Path({str(tmp_path / "x.pth")!r}), specs, compute)
    except what if isinstance(what, type) else AssertionError:
        print("raised")
"""
    result = run_process([sys.executable, "-c", code], timeout=120)
    assert (result.returncode, result.stdout) == (0, "raised\n" * 5), result.stderr
