"""GGUF, the format of llama.cpp and what is built on it: LM Studio, Ollama, KoboldCpp and others.

The keys are those of llama.cpp's src/llama-arch.cpp, the vocabulary that of its conversion/base.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rwkv_miss.config import ModelConfig
from rwkv_miss.errors import UserError
from rwkv_miss.export.gguf_layout import Entry, check_sizes, copies, entries, is_low_rank, is_matrix
from rwkv_miss.export.llama_cpp import RUNTIME
from rwkv_miss.export.target import Target, Text, Weights
from rwkv_miss.model.recognise import parameter_shapes

if TYPE_CHECKING:
    import gguf

# general.file_type
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
_NO_LIMIT = 2**20
_CONTROL, _NORMAL, _UNUSED = 3, 1, 5


def _stored(key: str, shape: torch.Size, dtype: str) -> torch.dtype:
    if not is_matrix(key):
        return torch.float32
    if dtype == "q8_0":
        return torch.float16 if is_low_rank(key) else torch.float32
    return {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]


def _write(path: Path, weights: Weights) -> None:
    import gguf

    writer = gguf.GGUFWriter(None, f"rwkv{weights.sizes.version}")
    _add_metadata(writer, weights)
    by_last = _by_last_key(weights)
    for entry in chain.from_iterable(by_last.values()):
        kind = _kind(entry.keys[0], weights)
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        if entry.shape[-1] % block:
            raise UserError(f"{entry.keys[0]}: rows of {entry.shape[-1]} do not divide by {block}; give --dtype f16")
        size = torch.Size(entry.shape).numel() // block * nbytes
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        [file] = writer.fout
        writer.write_padding(file, file.tell())
        waiting: dict[str, Tensor] = {}
        for key, made in by_last.items():
            if len(made) == 1 and made[0].keys == (key,) and not made[0].swapped:
                for rows in weights.pieces(key):
                    file.write(_packed(rows, _kind(key, weights)))
                writer.write_padding(file, file.tell())
                continue
            waiting[key] = weights.compute(key)  # small ones alone
            for entry in made:
                file.write(_packed(entry.make(waiting), _kind(key, weights)))
                writer.write_padding(file, file.tell())
            for entry in made:
                for used in entry.keys:
                    waiting.pop(used, None)
    finally:
        writer.close()


def _by_last_key(weights: Weights) -> dict[str, list[Entry]]:
    """For each key, in the order in which they are computed, the file's tensors that are complete with it."""
    order = {key: i for i, key in enumerate(weights.specs)}
    found: dict[str, list[Entry]] = {key: [] for key in order}
    for entry in [*entries(weights.sizes), *copies(weights.sizes)]:
        found[max(entry.keys, key=order.__getitem__)].append(entry)
    return found


def _kind(key: str, weights: Weights) -> gguf.GGMLQuantizationType:
    """How a tensor's numbers are stored."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if weights.dtype == "q8_0" and is_matrix(key) and not is_low_rank(key):
        return kinds.Q8_0
    known = {torch.float32: kinds.F32, torch.float16: kinds.F16, torch.bfloat16: kinds.BF16}
    return known[weights.specs[key].dtype]


def _packed(rows: Tensor, kind: gguf.GGMLQuantizationType) -> memoryview:
    """The bytes of some rows. Where they are rounded, the rows become what the bytes say."""
    import gguf

    rows = rows.contiguous()
    if kind != gguf.GGMLQuantizationType.Q8_0:
        return rows.view(-1).view(torch.uint8).numpy().data
    packed = gguf.quants.quantize(rows.numpy(), kind)
    rows.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind)))
    return packed.reshape(-1).data


def _add_metadata(writer: gguf.GGUFWriter, weights: Weights) -> None:
    sizes, specs = weights.sizes, weights.specs
    writer.add_type("model")
    writer.add_file_type(_FILE_TYPES[weights.dtype])
    if weights.dtype == "q8_0":
        writer.add_quantization_version(2)
    writer.add_context_length(_NO_LIMIT)
    writer.add_embedding_length(sizes.n_embd)
    writer.add_block_count(sizes.n_layer)
    writer.add_feed_forward_length(sizes.dim_ffn)
    writer.add_head_count(0)
    writer.add_layer_norm_eps(1e-5)
    writer.add_wkv_head_size(sizes.head_size)
    writer.add_token_shift_count(2)
    rank = sizes.low_rank
    if sizes.version == 7:
        writer.add_decay_lora_rank(rank["w"])
        writer.add_iclr_lora_rank(rank["a"])
        writer.add_value_residual_mix_lora_rank(rank.get("v", rank["a"]))
        writer.add_gate_lora_rank(rank["g"])
    else:
        # The hidden state is fp32 everywhere in llama.cpp, so that nothing has to be halved against overflow.
        writer.add_rescale_every_n_layers(0)
        writer.add_time_mix_extra_dim(rank["maa"])
        writer.add_time_decay_extra_dim(rank["decay"])
    _add_text(writer, weights.text, specs["emb.weight"].shape[0])


def _add_text(writer: gguf.GGUFWriter, text: Text | None, n_vocab: int) -> None:
    """The vocabulary, as llama.cpp's tokenizer of RWKV reads it: each token is a Python literal of its bytes without
    the quotes, and token 0, the end of a document, a name."""
    if text is None:  # names in their place, without which llama.cpp runs no model
        text = Text("", [b"", b"\n", *(f"<{i}>".encode() for i in range(2, n_vocab))], None)
    known = [repr(token)[2:-1] for token in text.tokens[1:]]
    padding = [f"[PAD{i}]" for i in range(len(text.tokens), n_vocab)]
    writer.add_name(text.name)
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(["<s>", *known, *padding])
    writer.add_token_types([_CONTROL, *(_NORMAL for _ in known), *(_UNUSED for _ in padding)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    if (blank_line := b"\n\n") in text.tokens:  # with which llama.cpp ends a turn
        writer.add_eot_token_id(text.tokens.index(blank_line))
    writer.add_add_bos_token(False)
    if text.chat_template is not None:
        writer.add_chat_template(text.chat_template)


class _File(Mapping[str, Tensor]):
    """The tensors of a file by their keys in BlinkDL's layout. They are mapped from it; what is quantised is computed
    when it is asked for."""

    def __init__(self, path: Path) -> None:
        import gguf

        reader = gguf.GGUFReader(path, "c")  # a map that can be written to, as torch wants it, and leaves the file
        sizes = _sizes(reader)
        self._shapes = parameter_shapes(sizes)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._entries = {key: entry for entry in entries(sizes) for key in entry.keys}

    def __getitem__(self, key: str) -> Tensor:
        import gguf

        entry = self._entries[key]
        tensor = self._tensors[entry.name]
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            data = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        else:
            data = torch.from_numpy(tensor.data)
            if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
                data = data.view(torch.bfloat16)
        return entry.parts(data, self._shapes)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _sizes(reader: gguf.GGUFReader) -> ModelConfig:
    """The sizes that a file's metadata say."""

    def value(name: str) -> int:
        field = reader.get_field(f"rwkv{version}.{name}")
        assert field is not None, name
        return int(field.contents())

    architecture = reader.get_field("general.architecture")
    assert architecture is not None
    version = int(architecture.contents().removeprefix("rwkv"))
    n_embd, head_size = value("embedding_length"), value("wkv.head_size")
    [n_vocab] = [tensor.shape[1] for tensor in reader.tensors if tensor.name == "token_embd.weight"]
    if version == 7:
        names = {"w": "decay", "a": "iclr", "v": "value_residual_mix", "g": "gate"}
        low_rank = {key: value(f"attention.{name}_lora_rank") for key, name in names.items()}
    else:
        low_rank = {"maa": value("time_mix_extra_dim"), "decay": value("time_decay_extra_dim")}
    n_layer, n_ffn = value("block_count"), value("feed_forward_length")
    return ModelConfig(version, n_layer, n_embd, n_embd // head_size, head_size, n_ffn, int(n_vocab), low_rank)


TARGET = Target(
    ".gguf",
    _write,
    _File,
    dtypes=("f16", "f32", "bf16", "q8_0"),
    stored=_stored,
    tolerance={"q8_0": 0.1},
    takes_text=True,
    check_sizes=check_sizes,
    uses={"llama.cpp and what is built on it": ("sh", "llama-cli -m {out}\nllama-server -m {out}")},
    needs=("gguf", "gguf"),
    runtime=RUNTIME,
)
"""`q8_0` has a scale for every 32 numbers of 8 bits."""
