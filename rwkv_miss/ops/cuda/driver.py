"""Loads compiled kernels and launches them through CUDA's driver API, on the device and stream that torch uses.

https://docs.nvidia.com/cuda/cuda-driver-api/
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch

from rwkv_miss.errors import UserError
from rwkv_miss.ops.cuda.nvrtc import CUDA_12, INSTALL, version

# The first driver for CUDA 13 on Linux (release notes of the CUDA toolkit 13.0).
_CUDA_13_DRIVER = "580.65"
# The bytes of shared memory that a block can be given without asking (CUDA C++ Programming Guide, compute
# capabilities).
_SHARED_UNASKED = 48 * 1024
# What a user can do about an error of the driver.
_ADVICE = {
    "CUDA_ERROR_OUT_OF_MEMORY": "the GPU's memory is full: use a smaller batch or context, or end other programs on it",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the driver is older than NVRTC: update it",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "the driver is older than NVRTC: update it",
    "CUDA_ERROR_INVALID_IMAGE": "the compiled kernel is damaged: delete the *.cubin files of the cache folder",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "a kernel before this one failed: CUDA_LAUNCH_BLOCKING=1 shows which",
    "CUDA_ERROR_LAUNCH_FAILED": "a kernel before this one failed: CUDA_LAUNCH_BLOCKING=1 shows which",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the driver's library and its kernel module differ: reboot",
}


class DriverError(RuntimeError):
    """A call of the driver failed; the message has the function's name, the error and, where known, what to do."""


def refused(device: torch.device) -> str | None:
    """Why kernels cannot be given tensors of that device, or None if they can."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if torch.version.hip:  # with ROCm, torch calls AMD's devices cuda too
        return "this torch is built for AMD's ROCm"
    return None


def location(device: torch.device) -> tuple[int, int]:
    """The index of a CUDA device, and the handle of torch's current stream on it."""
    return device.index, torch.cuda.current_stream(device).cuda_stream


@cache
def capability(index: int) -> tuple[int, int]:
    """The compute capability of the device of that index, such as (9, 0).

    Raises:
        DriverError: the driver cannot be used, or is older than NVRTC; the message says which is needed.
    """
    device = _device(index)
    (number,) = _call("cuDriverGetVersion")
    has, needs = (number // 1000, number % 1000 // 10), version()
    if has[0] < needs[0]:  # a driver loads what any toolkit of the same major version compiled for its GPU
        raise DriverError(
            f"the driver is for CUDA {has[0]}.{has[1]}, NVRTC is of CUDA {needs[0]}.{needs[1]}: update the driver"
            f" (CUDA 13: {_CUDA_13_DRIVER} or later), or {CUDA_12}"
        )
    attributes = _driver().CUdevice_attribute
    names = ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR", "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR")
    major, minor = (_call("cuDeviceGetAttribute", getattr(attributes, name), device)[0] for name in names)
    return major, minor


def shared_memory(index: int) -> int:
    """How many bytes of shared memory a block may ask for on the device of that index.

    Raises:
        DriverError: the driver cannot say.
    """
    attribute = _driver().CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return _call("cuDeviceGetAttribute", attribute, _device(index))[0]


def load(image: bytes, shared: Mapping[str, int], index: int) -> dict[str, object]:
    """Loads a compiled source onto a device, for as long as the process lives.

    Args:
        image: what `compile_source` returned.
        shared: the kernels in it, each with the bytes of dynamic shared memory that its blocks are given.
        index: that of the device.

    Returns:
        The kernels' handles by their names.

    Raises:
        DriverError: the driver cannot load it.
        UserError: torch is recording a CUDA graph. Loading may allocate memory, which would make the recording fail.
    """
    stream = location(torch.device("cuda", index))[1]
    with _current(index):
        if _call("cuStreamIsCapturing", stream)[0]:
            raise UserError(
                "a CUDA kernel is loaded at its first call, which cannot be recorded into a CUDA graph: run the same"
                " once before the recording begins"
            )
        (module,) = _call("cuModuleLoadData", image)
        functions = {name: _call("cuModuleGetFunction", module, name.encode())[0] for name in shared}
        attribute = _driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        for name, size in shared.items():
            if size > _SHARED_UNASKED:
                _call("cuFuncSetAttribute", functions[name], attribute, size)
        return functions


def room(function: object, index: int, block: int, shared: int) -> int:
    """How many blocks of a kernel the device of that index runs at once. The other arguments are those of `launch`.

    Raises:
        DriverError: the driver cannot say.
    """
    attribute = _driver().CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    (n_multiprocessors,) = _call("cuDeviceGetAttribute", attribute, _device(index))
    with _current(index):
        (n_blocks,) = _call("cuOccupancyMaxActiveBlocksPerMultiprocessor", function, block, shared)
    return n_multiprocessors * n_blocks


def launch(
    function: object,
    device: torch.device,
    grid: tuple[int, int],
    block: int,
    shared: int,
    arguments: list[torch.Tensor | int | None],
) -> None:
    """Puts a kernel on torch's current stream of the device, and returns before it has run.

    The driver is asked for nothing but the launch: no memory, no wait, no stream or event. So launches can be recorded
    into a CUDA graph.

    Args:
        function: the kernel's handle, from `load` for the same device.
        grid: the number of blocks in x and in y.
        block: the number of threads in a block.
        shared: the bytes of dynamic shared memory of a block, those that `load` was told.
        arguments: in the order of the kernel's parameters, each of which has 8 bytes. A tensor is passed as a pointer
            to its data, None as a null pointer, an int as a 64-bit integer.

    Raises:
        DriverError: the launch failed, or a kernel that was launched before it did.
    """
    index, stream = location(device)
    values = [x.data_ptr() if isinstance(x, torch.Tensor) else x or 0 for x in arguments]
    buffer = (ctypes.c_int64 * len(values))(*values)
    size = ctypes.c_size_t(ctypes.sizeof(buffer))
    # CU_LAUNCH_PARAM_BUFFER_POINTER, _BUFFER_SIZE and _END: all parameters in one buffer, copied by the call.
    extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(buffer), 2, ctypes.addressof(size), 0)
    with _current(index):
        _call("cuLaunchKernel", function, *grid, 1, block, 1, 1, shared, stream, 0, ctypes.addressof(extra))


def _call(name: str, *arguments: Any) -> tuple:
    """Calls a function of the driver, and returns its results without the error code that comes first."""
    driver = _driver()
    try:
        error, *values = getattr(driver, name)(*arguments)
    except RuntimeError as found:  # cuda-bindings raises it where there is no driver, or one without this function
        raise DriverError(f"{name}: {found}") from None
    if error != driver.CUresult.CUDA_SUCCESS:
        advice = _ADVICE.get(error.name)
        raise DriverError(f"{name}: {error.name}{f'; {advice}' if advice else ''}")
    return tuple(values)


def _driver() -> ModuleType:
    """The module cuda.bindings.driver."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DriverError(f"cuda-bindings is not installed ({error}); {INSTALL}") from None
    return driver


def _device(index: int) -> object:
    """The driver's handle of a device."""
    _call("cuInit", 0)
    return _call("cuDeviceGet", index)[0]


@cache
def _context(index: int) -> object:
    """The device's primary context, which torch uses too; kept for as long as the process lives."""
    return _call("cuDevicePrimaryCtxRetain", _device(index))[0]


@contextmanager
def _current(index: int) -> Iterator[None]:
    """Makes the device's context the current one of this thread: the threads of autograd have none, or that of another
    device. Afterwards the context is current again that was so before, because torch relies on it."""
    _call("cuCtxPushCurrent", _context(index))
    try:
        yield
    finally:
        _call("cuCtxPopCurrent")
