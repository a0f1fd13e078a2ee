"""Stands in for the driver and the GPU: kernels that rwkv_miss launches are run by the emulator of tests/simt, on host
memory, and recorded. For a process in which LD_LIBRARY_PATH leads to the stub `libcuda.so.1` (see test_launch.py)."""

from __future__ import annotations

import ctypes
import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

from tests.simt.harness import CUDA

_POINTER_TYPES = {"io": None, "float": 4, "unsigned char": 1}
_HEAD = 4096  # the first bytes of an image, that tell which it is
_LOAD = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
)


@dataclass
class Launch:
    kernel: str
    function: int
    device: int
    thread: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    n_bytes: int
    arguments: dict[str, int]


@dataclass(frozen=True)
class Variant:
    """A cubin in the cache, and the same source with the same options for the emulator."""

    image: str
    library: str
    op: str
    n: int
    io_bytes: int
    architecture: int


@dataclass
class Stub:
    launches: list[Launch] = field(default_factory=list)
    loaded: list[tuple[int, Variant]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    callbacks: tuple = ()  # held here: ctypes does not hold them


def parameters(source: str, kernel: str) -> dict[str, str]:
    """Name -> type of a kernel's parameters, from its source; pointers end with *."""
    declared = re.search(rf"\b{kernel}\((.*?)\)\s*{{", source, re.S)[1].replace("__restrict__", "").replace("const", "")
    pairs = (re.fullmatch(r"(.*?)\s*(\*?)\s*(\w+)", " ".join(x.split())) for x in declared.split(","))
    return {m[3]: m[1].strip() + m[2] for m in pairs}


def connect(library: ctypes.CDLL, variants: list[Variant]) -> Stub:
    """Makes the stub driver of this process run launches; what it saw is in the result."""
    sources = {op: (CUDA / f"{op}.cu").read_text() for op in {v.op for v in variants}}
    images = {Path(v.image).read_bytes()[32:]: v for v in variants}  # behind the checksum
    heads = {image[:_HEAD]: image for image in images}
    assert len(heads) == len(images) == len(variants)
    emulated = {v: ctypes.CDLL(v.library) for v in variants}
    by_handle = {emulated[v]._handle: v for v in variants}
    stub = Stub()

    def load(device: int, address: int) -> int | None:
        head = ctypes.string_at(address, _HEAD)
        image = heads.get(head)
        if image is None or ctypes.string_at(address, len(image)) != image:
            stub.failures.append("the image is none of the cubins")
            return None
        stub.loaded.append((device, images[image]))
        return emulated[images[image]]._handle

    def launch(device, function, name, code, handle, sizes, stream, buffer, n_bytes) -> int:
        try:
            variant, kernel = by_handle[handle], name.decode()
            types = parameters(sources[variant.op], kernel)
            if n_bytes != 8 * len(types):
                stub.failures.append(f"{kernel}: {n_bytes} bytes of parameters, {len(types)} parameters of 8 bytes")
                return 1
            values = (ctypes.c_uint64 * len(types)).from_address(buffer)
            arguments = dict(zip(types, values, strict=True))
            grid, block, shared = tuple(sizes[:3]), tuple(sizes[3:6]), sizes[6]
            stub.launches.append(
                Launch(
                    kernel,
                    function,
                    device,
                    threading.get_ident(),
                    grid,
                    block,
                    shared,
                    stream or 0,
                    n_bytes,
                    arguments,
                )
            )
            report = _emulate(emulated[variant], code, grid, block, types, arguments, variant)
        except Exception as error:  # would be lost in the C code between here and the test
            report = repr(error)
        if report:
            stub.failures.append(f"{name.decode()}: {report}")
            return 719  # CUDA_ERROR_LAUNCH_FAILED
        return 0

    stub.callbacks = _LOAD(load), _LAUNCH(launch)
    library.stub_connect(*stub.callbacks)
    return stub


def _emulate(library, code, grid, block, types, arguments, variant) -> str | None:
    """Runs the kernel on exactly the memory that its arguments are said to have."""
    steps, heads = arguments["steps"], arguments["heads"]
    batch, n = grid[0] // heads, variant.n
    elements = {name: batch * heads * n * n for name in ("state_in", "state_out", "grad_state", "dstate")}
    elements |= {"saved_states": batch * heads * -(-steps // 16) * n * n, "seq_start": batch * steps}
    if variant.op == "wkv6":
        elements |= {"u": heads * n, "du": batch * heads * n}
    ranges = []
    for name, kind in types.items():
        if not kind.endswith("*") or not arguments[name]:
            continue
        count = elements.get(name, batch * steps * heads * n)
        ranges += [arguments[name], count * (_POINTER_TYPES[kind[:-1]] or variant.io_bytes)]
    library.simt_launch.restype = ctypes.c_char_p
    values = list(arguments.values())
    report = library.simt_launch(
        ctypes.c_void_p(code),
        (ctypes.c_uint * 3)(*grid),
        (ctypes.c_uint * 3)(*block),
        (ctypes.c_uint64 * len(values))(*values),
        len(values),
        (ctypes.c_uint64 * len(ranges))(*ranges),
        len(ranges) // 2,
        ctypes.c_uint64(len(values) + steps),
    )
    return report.decode() if report else None


def read_manifest(path: Path) -> list[Variant]:
    return [Variant(**x) for x in json.loads(path.read_text())]


def write_manifest(path: Path, variants: list[Variant]) -> None:
    path.write_text(json.dumps([vars(v) for v in variants]))
