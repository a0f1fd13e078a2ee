"""Compiles a CUDA source for one architecture with NVRTC, and keeps the result in the cache folder.

NVRTC needs no CUDA toolkit, no host compiler and no GPU: https://docs.nvidia.com/cuda/nvrtc/
"""

from __future__ import annotations

import hashlib
from functools import cache as once
from pathlib import Path
from types import ModuleType

from rwkv_miss.files import cache_folder, locked, replacing
from rwkv_miss.ops.cpu.build import warn_without_cache

_PACKAGE = Path(__file__).parents[2]
_IN_WHEEL = _PACKAGE / "cuda_src"  # see pyproject.toml
SOURCES = _IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent / "cuda"
INSTALL = "pip install 'rwkv-miss[cuda13]'"
# cuda-bindings takes the newest NVRTC that is installed.
CUDA_12 = "pip uninstall nvidia-cuda-nvrtc and pip install 'rwkv-miss[cuda12]', which has the NVRTC of CUDA 12"
_CHECKSUM = hashlib.sha256


class CompileError(RuntimeError):
    """The source cannot be compiled here, or not for this GPU; the message says why and what to do."""


def compile_source(
    source: Path, options: tuple[str, ...], capability: tuple[int, int], cache: Path | None = None
) -> bytes:
    """Machine code of `source` for GPUs of one compute capability, for `cuModuleLoadData`.

    A capability that this NVRTC does not know gets PTX of the next lower one that it knows: the driver compiles that.
    The file in `cache` (None: `cache_folder()`) is named by a hash of all that goes into it: the source, the .cuh
    files beside it, options, architecture and NVRTC's version. A damaged file is compiled again.

    Args:
        options: NVRTC's, such as -DIO_BF16=1.
        capability: such as (9, 0).

    Returns:
        A cubin (ELF), or PTX text that ends with a zero byte.

    Raises:
        CompileError: no NVRTC, no code for such a GPU, or an error in the source, with the compiler's last lines.
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
            if (image := _read(path)) is None:  # else: of another process, while we waited
                image = _compile(source, headers, options)
                with replacing(path) as part:
                    part.write_bytes(_CHECKSUM(image).digest() + image)
    except OSError as error:
        warn_without_cache(source, error)
        image = image or _compile(source, headers, options)
    return image


def version() -> tuple[int, int]:
    """NVRTC's version, which is that of the CUDA toolkit that it belongs to, such as (13, 0)."""
    return _call("nvrtcVersion")


@once
def _nvrtc() -> ModuleType:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads the library
    except ImportError as error:
        raise CompileError(f"cuda-bindings is not installed ({error}); {INSTALL}") from None
    except RuntimeError as error:
        raise CompileError(f"NVRTC cannot be loaded ({error}); {INSTALL}") from None
    return nvrtc


def _call(name: str, *arguments) -> tuple:
    nvrtc = _nvrtc()
    error, *values = getattr(nvrtc, name)(*arguments)
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"{name}: {error.name}")
    return tuple(values)


def _architecture(capability: tuple[int, int]) -> str:
    (known,) = _call("nvrtcGetSupportedArchs")
    wanted = 10 * capability[0] + capability[1]
    best = max((x for x in known if x <= wanted), default=None)
    if best is None:
        raise CompileError(
            f"this GPU is sm_{wanted}, NVRTC {version()} compiles for sm_{min(known)} and later; {CUDA_12}"
        )
    return f"sm_{best}" if best == wanted else f"compute_{best}"


def _compile(source: Path, headers: dict[str, str], options: tuple[str, ...]) -> bytes:
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


def _text(program, what: str) -> bytes:
    (size,) = _call(f"nvrtcGet{what}Size", program)
    text = bytes(size + 1)  # written in place; Python has only one object for each single byte
    _call(f"nvrtcGet{what}", program, text)
    return text[:size]


def _read(path: Path) -> bytes | None:
    """An image that was stored behind its checksum, or None if it is not there or not whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    size = _CHECKSUM().digest_size
    checksum, image = content[:size], content[size:]
    return image if _CHECKSUM(image).digest() == checksum else None
