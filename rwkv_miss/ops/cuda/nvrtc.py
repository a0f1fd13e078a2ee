"""Compiles a CUDA source for one architecture with NVRTC, and keeps the result in the cache folder.

NVRTC needs no CUDA toolkit, no host compiler and no GPU: https://docs.nvidia.com/cuda/nvrtc/
"""

from __future__ import annotations

import hashlib
from functools import cache as once
from pathlib import Path
from types import ModuleType
from typing import Any

from rwkv_miss.files import cache_folder, locked, replacing
from rwkv_miss.ops.compiling import say_compiling, warn_without_cache

SOURCES = Path(__file__).parents[2] / "cuda_src"  # a link to the repository's cuda/; a wheel holds a copy
INSTALL = "pip install 'rwkv-miss[cuda13]'"
# Of several NVRTCs that are installed cuda-bindings loads the newest, so that the newer one has to go.
CUDA_12 = "pip uninstall nvidia-cuda-nvrtc and pip install 'rwkv-miss[cuda12]', which has the NVRTC of CUDA 12"
_CHECKSUM = hashlib.sha256


class CompileError(RuntimeError):
    """A source cannot be compiled on this machine or for this GPU; the message says why and what to do."""


def compile_source(
    source: Path, options: tuple[str, ...], capability: tuple[int, int], cache: Path | None = None
) -> bytes:
    """Compiles a CUDA source for GPUs of one compute capability, or reads what was compiled before from the cache.

    The file in the cache is named by a hash of all that goes into it: the source, the headers that it can include
    (those of SOURCES and those beside it), the options, the architecture and NVRTC's version. A damaged file is
    compiled again. Where nothing can be written to the cache, the image is used without it, with a warning.

    Args:
        source: a .cu file.
        options: NVRTC's options, such as -DIO_BF16=1.
        capability: the compute capability, such as (9, 0).
        cache: the cache's folder; None is `cache_folder()`.

    Returns:
        An image for `cuModuleLoadData`: a cubin (ELF), or, for a capability that is newer than this NVRTC, PTX text for
        the newest one below that it knows, ending with a zero byte. The driver compiles the PTX when it is loaded.

    Raises:
        CompileError: there is no NVRTC, it has no code for such a GPU, or the source has an error; then the message
            ends with the compiler's last lines.
    """
    options = (*options, "--std=c++17", f"--gpu-architecture={_architecture(capability)}")
    folders = dict.fromkeys((SOURCES, source.parent))
    headers = {path.name: path.read_text() for folder in folders for path in sorted(folder.glob("*.cuh"))}
    parts = [source.read_text(), *(x for item in headers.items() for x in item), *options, str(version())]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = cache or cache_folder()
    path = cache / f"{source.stem}-{digest}.cubin"
    if (image := _read(path)) is not None:
        return image
    try:
        with locked(cache / "nvrtc.lock"):
            if (image := _read(path)) is None:  # otherwise another process made it while this one waited
                image = _compile(source, headers, options)
                with replacing(path) as part:
                    part.write_bytes(_CHECKSUM(image).digest() + image)
    except OSError as error:
        warn_without_cache(source, error)
        image = image or _compile(source, headers, options)
    return image


def version() -> tuple[int, int]:
    """NVRTC's version, which is that of its CUDA toolkit, such as (13, 0).

    Raises:
        CompileError: there is no NVRTC.
    """
    return _call("nvrtcVersion")


@once
def _nvrtc() -> ModuleType:
    """The module cuda.bindings.nvrtc, with NVRTC's library loaded."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads the library
    except ImportError as error:
        raise CompileError(f"cuda-bindings is not installed ({error}); {INSTALL}") from None
    except RuntimeError as error:
        raise CompileError(f"NVRTC cannot be loaded ({error}); {INSTALL}") from None
    return nvrtc


def _call(name: str, *arguments: Any) -> tuple:
    """Calls a function of NVRTC, and returns its results without the error code that comes first."""
    nvrtc = _nvrtc()
    error, *values = getattr(nvrtc, name)(*arguments)
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"{name}: {error.name}")
    return tuple(values)


def _architecture(capability: tuple[int, int]) -> str:
    """NVRTC's name of what to compile for: sm_90 means machine code, compute_90 means PTX."""
    (known,) = _call("nvrtcGetSupportedArchs")
    wanted = 10 * capability[0] + capability[1]
    best = max((x for x in known if x <= wanted), default=None)
    if best is None:
        raise CompileError(
            f"this GPU is sm_{wanted}, NVRTC {version()} compiles for sm_{min(known)} and later; {CUDA_12}"
        )
    return f"sm_{best}" if best == wanted else f"compute_{best}"


def _compile(source: Path, headers: dict[str, str], options: tuple[str, ...]) -> bytes:
    """Compiles a source without the cache.

    Args:
        headers: the texts of the files that it can include, by name.
        options: the last of them names the architecture.
    """
    say_compiling(source, options[-1].partition("=")[2])
    texts, names = ([x.encode() for x in part] for part in (headers.values(), headers))
    (program,) = _call("nvrtcCreateProgram", source.read_bytes(), source.name.encode(), len(names), texts, names)
    try:
        try:
            _call("nvrtcCompileProgram", program, len(options), [x.encode() for x in options])
        except CompileError as error:
            last_lines = "\n".join(_text(program, "ProgramLog").rstrip(b"\0").decode().strip().splitlines()[-15:])
            raise CompileError(f"compiling {source.name} failed: {error}\n{last_lines}") from None
        return _text(program, "CUBIN" if "=sm_" in options[-1] else "PTX")
    finally:
        _call("nvrtcDestroyProgram", program)


def _text(program: Any, what: str) -> bytes:
    """What NVRTC has of a program: its "ProgramLog", "CUBIN" or "PTX"."""
    (size,) = _call(f"nvrtcGet{what}Size", program)
    # NVRTC writes into this object in place. It must have 2 bytes at least: Python shares the objects of single bytes.
    text = bytes(size + 1)
    _call(f"nvrtcGet{what}", program, text)
    return text[:size]


def _read(path: Path) -> bytes | None:
    """The image in a file of the cache, where it stands behind its checksum; None if it is not there or not whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    size = _CHECKSUM().digest_size
    checksum, image = content[:size], content[size:]
    return image if _CHECKSUM(image).digest() == checksum else None
