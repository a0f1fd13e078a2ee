"""Any C++ kernel: compiled at its first use, called with pointers to the tensors' data."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from torch import Tensor

from rwkv_miss.ops.cpu.build import BuildError, load_library


@cache
def library_or_reason(source: Path) -> tuple[ctypes.CDLL | None, str | None]:
    """The library of a C++ file, compiled where that was not done before, and None; or None and why there is none."""
    try:
        return load_library(source), None
    except (BuildError, OSError) as error:
        return None, str(error)


def operators_or_reason(source: Path) -> str | None:
    """Makes the operators of torch.library that a C++ file has (`register_operators`). Returns None, or why there is no
    library."""
    library, reason = library_or_reason(source)
    if library is not None:
        _register_once(library)
    return reason


@cache
def _register_once(library: ctypes.CDLL) -> None:
    library.register_operators()


def call(source: Path, function: str, arguments: Sequence[Tensor | int | float | None]) -> None:
    """Calls a function of a C++ file (declared `extern "C"`, without a result), and returns when it has run.

    Args:
        source: a file for which `library_or_reason` found a library.
        arguments: in the order of the function's parameters. A contiguous tensor is passed as a pointer to its data,
            None as a null pointer, an int as an int64_t, a float as a float.
    """
    library, reason = library_or_reason(source)
    assert library is not None, reason
    called = getattr(library, function)
    if called.argtypes is None:
        called.argtypes = [_TYPES.get(type(x), ctypes.c_void_p) for x in arguments]
    called(*[_address(x) if isinstance(x, Tensor) else x for x in arguments])


# Of parameters that are no pointers.
_TYPES = {int: ctypes.c_int64, float: ctypes.c_float}


def _address(x: Tensor) -> int:
    assert x.is_contiguous()
    return x.data_ptr()
