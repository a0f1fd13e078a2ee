"""Compiles a C++ source at its first use, and loads it from the cache afterwards."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from rwkv_miss.files import cache_folder, locked, replacing
from rwkv_miss.ops.compiling import say_compiling, warn_without_cache

# The compiler's options by what torch.backends.cpu.get_cpu_capability() returns; for any other answer there are none.
INSTRUCTION_SETS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
    "DEFAULT": (),
}
_FLAGS = ("-O3", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")


class BuildError(RuntimeError):
    """A source cannot be compiled on this machine; the message says why."""


def load_library(source: Path, capability: str | None = None, cache: Path | None = None) -> ctypes.CDLL:
    """Loads the library of a C++ source, after compiling it if it is not in the cache.

    The library in the cache is named by a hash of all that goes into it (the source, the headers beside it, the
    options, the compiler, PyTorch and the machine), so that it is never out of date, and compiled again if it is
    damaged. Of several processes that need it at once one compiles and the others wait; if that one is killed, the next
    compiles. Where nothing can be written to the cache, the library is used without it, with a warning.

    Args:
        source: a .cpp file.
        capability: a key of INSTRUCTION_SETS; None is that of this processor.
        cache: the cache's folder; None is `cache_folder()`.

    Raises:
        BuildError: there is no compiler, or it fails; then the message ends with the compiler's last lines.
    """
    capability = capability or torch.backends.cpu.get_cpu_capability()
    flags = [*_FLAGS, *INSTRUCTION_SETS.get(capability, ())]
    headers = sorted(source.parent.glob("*.h"))
    programs = _compiler_version(), torch.__version__, platform.machine()
    parts = [*(path.read_text() for path in (source, *headers)), *flags, *programs]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = cache or cache_folder()
    library = cache / f"{source.stem}-{digest}.so"
    if _is_whole(library):
        return ctypes.CDLL(str(library))
    made = None
    with tempfile.TemporaryDirectory(prefix="rwkv_miss-") as folder:
        try:
            with locked(cache / "build.lock"):
                if not _is_whole(library):
                    made = _compile(source, flags, Path(folder))
                    content = made.read_bytes()
                    with replacing(library) as part:
                        part.write_bytes(content + hashlib.sha256(content).digest())
        except OSError as error:
            warn_without_cache(source, error)
            return ctypes.CDLL(str(made or _compile(source, flags, Path(folder))))
    return ctypes.CDLL(str(library))


def _is_whole(library: Path) -> bool:
    """Whether a library of the cache is there as it was written: ended by its checksum, which the loader does not see.
    A damaged one would end the process."""
    if not library.exists():
        return False
    content = library.read_bytes()
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def _compiler_version() -> str:
    """What the compiler says of itself: part of a library's hash."""
    # The same as torch.utils.cpp_extension.get_cxx_compiler, without its import, which would slow down every start.
    command = shlex.split(os.environ.get("CXX", "c++"))
    try:
        return subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"no working C++ compiler ({error}); install g++, or name one in CXX") from None


def _compile(source: Path, flags: list[str], folder: Path) -> Path:
    """Compiles a source without the cache to a library in `folder`, which has a name that no other library has."""
    from torch.utils import cpp_extension

    say_compiling(source, "this processor")
    path = os.environ["PATH"]
    if shutil.which("ninja") is None:  # it is installed with this package, but the environment is not activated
        import ninja

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, path])
    try:
        # -fopenmp is given to the compiler but not to the linker: the process then has one OpenMP library, torch's.
        cpp_extension.load(
            name=folder.name,
            sources=[str(source)],
            extra_cflags=flags,
            build_directory=str(folder),
            with_cuda=False,
            is_python_module=False,
        )
    except (RuntimeError, OSError) as error:
        last_lines = "\n".join(str(error).strip().splitlines()[-15:])
        raise BuildError(f"compiling {source.name} failed:\n{last_lines}") from error
    finally:
        os.environ["PATH"] = path
    return folder / f"{folder.name}.so"
