"""Checkpoints on disk: dicts of named tensors, read without copying and without running code, and written one tensor at
a time."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rwkv_miss.errors import UserError
from rwkv_miss.files import check_is_file

# The storage classes that PyTorch's pickles name, for the dtypes that an RWKV checkpoint may have.
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
}
# What safetensors calls them, in the order in which it puts them into a file: each number then begins at a multiple of
# its size.
_SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Bytes that are written at a time.
_PIECE = 2**20
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """`bf16`, `fp16`, `fp32` or a torch dtype -> the torch dtype."""
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise UserError(f"dtype is {name!r}; it must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def read_checkpoint(path: str | os.PathLike) -> dict[str, Tensor]:
    """Reads a flat state dict from a .pth (PyTorch) or .st / .safetensors file.

    Tensors are memory-mapped where the format allows it (zip .pth, safetensors): a tensor costs memory only
    when it is used. Nothing in the file is executed.

    Raises:
        UserError: no such file, a folder, a damaged file, a pickle that holds code, not a flat state dict, or a tensor
            that is none of plain numbers in one of `DTYPES`.
    """
    path = Path(path)
    check_is_file(path, "checkpoint")
    loaded = read_safetensors(path) if path.suffix in (".st", ".safetensors") else unpickle(path)
    if (
        not isinstance(loaded, dict)
        or not loaded
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items())
    ):
        holds = f"keys {', '.join(map(str, list(loaded)[:5]))}" if isinstance(loaded, dict) else type(loaded)
        raise UserError(f"{path}: holds {holds}; expected a flat state dict of tensors (emb.weight, ...)")
    check_plain(loaded, path)
    return {name: tensor.detach() for name, tensor in loaded.items()}  # some are saved as parameters


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a .safetensors file, memory-mapped; UserError if it is damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError) as e:  # KeyError: a dtype that this PyTorch does not have
        raise UserError(f"{path}: not a readable safetensors file ({e}); is it truncated?") from None


def check_plain(tensors: Mapping[str, Tensor], path: Path) -> None:
    """UserError unless all of a file's tensors are plain numbers in one of `DTYPES`."""
    for name, tensor in tensors.items():
        if oddity := _oddity(tensor):
            raise UserError(f"{path}: {name} {oddity}; convert it to plain numbers in {', '.join(DTYPES)}")


def _oddity(tensor: Tensor) -> str | None:
    """What there is about a tensor that a weight cannot have: numbers that are not there, not in order, or of a dtype
    that no RWKV has. PyTorch saves and loads them all."""
    if tensor.is_nested or tensor.layout != torch.strided:
        return "is not dense (a sparse, nested or otherwise packed tensor)"
    if tensor.dtype not in DTYPES.values():
        return f"has dtype {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.device.type != "cpu":
        return "has a shape and no numbers (a tensor of PyTorch's meta device)"
    if tensor.is_neg():
        return "is a negated view of other numbers"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"has shape {tuple(tensor.shape)} but fewer numbers than that (an expanded tensor)"
    return None


def unpickle(path: Path, allowed: Sequence[type] = ()) -> Any:
    """What `torch.save` wrote to a file, memory-mapped where the format allows it. Nothing in the file is executed: it
    may hold tensors, Python's own containers and values, and objects of the classes `allowed`.

    Raises:
        UserError: the file is damaged, or holds anything else.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_mappable(path))
    except pickle.UnpicklingError as e:
        if code := re.search(r"GLOBAL (\S+)|unrecognized function (.+)", str(e)):
            raise UserError(
                f"{path}: the pickle inside asks to run code ({code.group(1) or code.group(2)}); refused, nothing was "
                "executed. Use a checkpoint that holds tensors alone, or convert it where you trust its origin"
            ) from None
        raise UserError(f"{path}: not a PyTorch checkpoint; expected a .pth or .st file of weights") from None
    except Exception as e:  # damaged bytes ask the unpickler for anything
        reason = str(e).strip().splitlines()[0][:160] if str(e).strip() else type(e).__name__
        raise UserError(f"{path}: cannot be read as a PyTorch checkpoint, is it truncated? ({reason})") from None


def unpickle_checkpoint(path: Path, allowed: Sequence[type] = ()) -> Any:
    """`unpickle`, of a file of a run's checkpoint, after a look at its sums if it has them: older versions of DeepSpeed
    wrote none."""
    if zipfile.is_zipfile(path):
        _check_sums(path)
    return unpickle(path, allowed)


def _check_sums(path: Path) -> None:
    """UserError unless every byte that PyTorch wrote to a zip is as it was: the zip has a sum of each of its parts, at
    which PyTorch does not look. The whole file is read."""
    try:
        with zipfile.ZipFile(path) as z:
            damaged = z.testzip()
    except Exception as e:  # damaged bytes make anything of the archive
        damaged = str(e) or type(e).__name__
    if damaged:
        raise UserError(f"{path}: is damaged ({damaged}); start anew, or from a copy of it")


def _is_mappable(path: Path) -> bool:
    """Whether the bytes of tensors stand in the file as they are in memory. They do in PyTorch's zip format (1.6 and
    later), unless another program has compressed it; older files are pickles."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as z:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in z.infolist())


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes contiguous CPU tensors to a .safetensors file.

    Raises:
        OSError: the file cannot be written (not safetensors' own error: `atomic_write` expects OSError).
    """
    path.touch()
    mode = path.stat().st_mode  # that of a new file; save_file would let only the owner read it
    try:
        save_file(tensors, path, metadata)
        path.chmod(mode)
    except SafetensorError as e:
        raise OSError(str(e)) from None


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that is yet to be computed."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def write_safetensors_in_pieces(
    path: Path, specs: Mapping[str, TensorSpec], pieces: Callable[[str], Iterable[Tensor]], metadata: dict[str, str]
) -> None:
    """Writes, byte for byte, what `write_safetensors` would write of all tensors, with some rows of a tensor after the
    others from `pieces`, of which one is held at a time. The package has no way to do so: its functions take the
    numbers of all tensors at once. (The format: https://github.com/huggingface/safetensors#format.)

    Raises:
        OSError: the file cannot be written, such as on a full disk.
    """
    order = list(_SAFETENSORS)
    header: dict[str, Any] = {"__metadata__": metadata}
    starts, at = {}, 0
    for name in sorted(specs, key=lambda name: (order.index(specs[name].dtype), name)):
        spec, starts[name] = specs[name], at
        at += spec.nbytes
        offsets = [starts[name], at]
        header[name] = {"dtype": _SAFETENSORS[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, spec in specs.items():
            start = file.seek(8 + len(text) + starts[name])
            for piece in pieces(name):
                write_plain(file, content_of(piece))
            assert file.tell() == start + spec.nbytes, name


def content_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's numbers in their order."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def write_plain(file: IO[bytes], content: bytes | memoryview) -> None:
    """Writes in pieces, which is quicker: 3.2 s for 1.3 GB in one call, 0.5 s so (Linux 6)."""
    for start in range(0, len(content), _PIECE):
        file.write(memoryview(content)[start : start + _PIECE])


@dataclass(frozen=True)
class _Storage:
    key: str
    spec: TensorSpec


class _SpecPickler(pickle.Pickler):
    """Pickles a `TensorSpec` as `torch.save` pickles a contiguous CPU tensor, so that the bytes can follow one
    tensor at a time (PyTorch's zip format: torch/serialization.py, `_save`)."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.n_storages = 0

    def reducer_override(self, obj):
        if not isinstance(obj, TensorSpec):
            return NotImplemented
        storage = _Storage(str(self.n_storages), obj)
        self.n_storages += 1
        stride = torch.empty(obj.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (storage, 0, tuple(obj.shape), stride, False, OrderedDict())

    def persistent_id(self, obj):
        if isinstance(obj, _Storage):
            return "storage", _STORAGES[obj.spec.dtype], obj.key, "cpu", obj.spec.shape.numel()
        return None


def write_pth(path: Path, specs: Mapping[str, TensorSpec], compute: Callable[[str], Tensor]) -> None:
    """Writes a .pth as `torch.save` would write the dict of all tensors, holding one tensor at a time.

    Args:
        compute: called once for each name in the order of `specs`; returns the tensor that its spec describes.

    Raises:
        OSError: the file cannot be written, such as on a full disk.
    """

    def whole(name: str) -> list[Tensor]:
        tensor = compute(name)
        assert (tensor.shape, tensor.dtype) == (specs[name].shape, specs[name].dtype), name
        return [tensor]

    write_pth_in_pieces(path, specs, whole)


def write_pth_in_pieces(path: Path, specs: Mapping[str, TensorSpec], pieces: Callable[[str], Iterable[Tensor]]) -> None:
    """As `write_pth`, with some rows of a tensor after the others from `pieces`, of which one is held at a time."""
    pickled = io.BytesIO()
    _SpecPickler(pickled).dump(dict(specs))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z:
        _write_record(z, "data.pkl", len(pickled.getvalue()), [pickled.getvalue()])
        _write_record(z, "byteorder", len(sys.byteorder), [sys.byteorder.encode()])
        for i, (name, spec) in enumerate(specs.items()):
            _write_record(z, f"data/{i}", spec.nbytes, map(content_of, pieces(name)))
        _write_record(z, "version", 2, [b"3\n"])


def _write_record(z: zipfile.ZipFile, name: str, size: int, parts: Iterable[bytes | memoryview]) -> None:
    """Writes a part of PyTorch's zip format, whose bytes begin at a multiple of 64 in the file, as PyTorch's own do
    (caffe2/serialize/inline_container.cc): they are used as numbers where they lie."""
    info = zipfile.ZipInfo(f"archive/{name}")
    info.file_size = size
    zip64 = size >= 2**30  # more than the header of a small part can say, with room to spare
    header = 30 + len(info.filename) + (20 if zip64 else 0) + 4  # APPNOTE.TXT 4.3.7 and 4.5.3, then our own field
    assert z.fp is not None
    padding = -(z.fp.tell() + header) % 64
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with z.open(info, "w", force_zip64=zip64) as file:
        for content in parts:
            write_plain(file, content)
    assert info.file_size == size, name


def write_pickle(path: Path, content: Any) -> None:
    """Writes what `unpickle` reads, straight to the file (`torch.save` would end the process if the disk is full).

    Raises:
        OSError: the file cannot be written.
    """
    with open(path, "wb") as file:
        sink = _Sink(file)
        torch.save(content, cast(BinaryIO, sink))
        sink.check()


class _Sink:
    """Passes writes on to a file. `write` never raises, even after the file is closed: `check` raises the first error.
    PyTorch's writer, which writes in its destructor too, ends the whole process if a write raises (torch 2.13,
    inline_container.cc)."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                write_plain(self.file, data)
            except BaseException as e:  # also a Ctrl-C that comes here
                self.error = e
        return len(data)

    def flush(self) -> None:
        """`torch.save` calls it; closing the file flushes it."""

    def check(self) -> None:
        if self.error is not None:
            raise self.error
