"""Stands in for the driver and the GPU: kernels that are launched run in the emulator of tests/simt, on host memory,
and the launches are recorded. For a process in which LD_LIBRARY_PATH leads to the stub `libcuda.so.1`, as in
test_launch.py."""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.ops.cuda.emulated import Emulated, Integers
from tests.simt.harness import emulate, macros, parameters

_LAUNCH_FAILED = 719  # CUDA_ERROR_LAUNCH_FAILED
_HEAD = 4096  # the first bytes of an image, by which it is looked up: its size is not given
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
    """What one call of cuLaunchKernel was given. function: its handle; thread: the host's, which called; n_bytes: the
    size of all arguments; arguments: by the names of the kernel's parameters, pointers as numbers."""

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
    """One compilation of a program: `image` is its cubin in the cache, `library` the same source with the same options
    for the emulator. program: a key of EMULATED; architecture: such as 90."""

    image: str
    library: str
    program: str
    options: tuple[str, ...]
    architecture: int


@dataclass
class Stub:
    """What the stub saw: launches in their order, (device, variant) of each module that was loaded, and what was
    wrong. `tensors`: address and bytes of each tensor that the launch to come is given. `callbacks` are held here
    because ctypes does not hold them."""

    tensors: dict[int, int] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)
    loaded: list[tuple[int, Variant]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    callbacks: tuple = ()


def connect(library: ctypes.CDLL, variants: list[Variant], table: Mapping[str, Emulated]) -> Stub:
    """Makes the stub driver of this process load these variants and run launches of their kernels.

    Args:
        library: the stub `libcuda.so.1`.
        table: the programs by name.

    Returns:
        What the stub sees, filled as it goes on.
    """
    images = {Path(v.image).read_bytes()[32:]: v for v in variants}  # after the checksum
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
            types = parameters(table[variant.program].program.source, kernel)
            if n_bytes != 8 * len(types):
                stub.failures.append(f"{kernel}: {n_bytes} bytes of parameters, {len(types)} parameters of 8 bytes")
                return 1
            values = (ctypes.c_uint64 * len(types)).from_address(buffer)
            arguments = dict(zip(types, values, strict=True))
            grid, block, shared = tuple(sizes[:3]), tuple(sizes[3:6]), sizes[6]
            thread = threading.get_ident()
            stub.launches.append(
                Launch(kernel, function, device, thread, grid, block, shared, stream or 0, n_bytes, arguments)
            )
            ranges = memory(variant, table[variant.program], types, grid, arguments)
            for address, size in ranges:
                there = stub.tensors[address]
                assert size <= there, f"out of bounds: {size} bytes by the sizes given, the tensor has {there}"
            order = len(stub.launches)
            report = emulate(emulated[variant], code, grid, block, [*arguments.values()], ranges, order)
        except Exception as error:  # would be lost in the C code between here and the test
            report = repr(error)
        if report:
            stub.failures.append(f"{name.decode()}: {report}")
            return _LAUNCH_FAILED
        return 0

    stub.callbacks = _LOAD(load), _LAUNCH(launch)
    library.stub_connect(*stub.callbacks)
    return stub


def memory(
    variant: Variant, emulated: Emulated, types: Mapping[str, str], grid: tuple[int, ...], arguments: Integers
) -> list[tuple[int, int]]:
    """(address, bytes) of all that the kernel may touch: what its pointers lead to, by the sizes in its arguments."""
    defined = macros(variant.options)
    sizes = {"io*": 2 if defined.get("IO_BF16") else 4, "float*": 4, "unsigned char*": 1}
    elements = emulated.elements(defined, grid, arguments)
    pointers = [name for name, kind in types.items() if kind.endswith("*") and arguments[name]]
    return [(arguments[name], elements[name] * sizes[types[name]]) for name in pointers]


def read_manifest(path: Path) -> list[Variant]:
    return [Variant(**{**x, "options": tuple(x["options"])}) for x in json.loads(path.read_text())]


def write_manifest(path: Path, variants: list[Variant]) -> None:
    path.write_text(json.dumps([vars(v) for v in variants]))
