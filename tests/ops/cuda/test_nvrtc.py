"""Compiling with NVRTC, which needs no GPU, and the cache of what was compiled."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Hashable
from contextlib import nullcontext
from pathlib import Path

import pytest

from rwkv_miss.ops.cpu import build
from rwkv_miss.ops.cuda import nvrtc
from rwkv_miss.ops.cuda.kernel import Program
from rwkv_miss.ops.cuda.programs import PROGRAMS
from tests.ops.cuda.toy import TOY
from tests.processes import finish

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
TINY = '#include "tiny.cuh"\nextern "C" __global__ void answer(long long* x) { *x = ANSWER; }\n'
ROOT = Path(__file__).parents[3]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "tiny.cuh").write_text("#define ANSWER 42\n")
    (folder / "tiny.cu").write_text(TINY)
    return folder / "tiny.cu"


@pytest.fixture
def compile_tiny(tiny: Path, tmp_path: Path):
    """`compile_tiny(options, capability)` compiles tiny.cu, with a cache in `tmp_path`."""
    return lambda options=(), capability=(9, 0): nvrtc.compile_source(tiny, options, capability, tmp_path / "cache")


@pytest.fixture
def compilations(monkeypatch) -> list[str]:
    """For each compilation so far, its option that names the architecture."""
    seen = []
    real = nvrtc._compile
    monkeypatch.setattr(nvrtc, "_compile", lambda *x: (seen.append(x[-1][-1]), real(*x))[1])
    return seen


def str_of(x: Program | Hashable) -> str:
    """A part of a test's id: program, variant or architecture."""
    return x.source.stem if isinstance(x, Program) else str(x)


def every_variant() -> list[tuple]:
    """(program, variant, architecture): each variant of a program once, for the architectures in turn.
    tests/simt/test_resources.py compiles every combination."""
    cases = []
    for program in (*PROGRAMS.values(), TOY):
        architectures = itertools.cycle(x for x in ARCHITECTURES if divmod(x, 10) >= program.oldest)
        cases += [(program, variant, next(architectures)) for variant in program.variants]
    return cases


@pytest.mark.slow
@pytest.mark.parametrize(("program", "variant", "architecture"), every_variant(), ids=str_of)
def test_every_program_compiles_to_a_cubin(program, variant, architecture, tmp_path):
    image = nvrtc.compile_source(program.source, program.variants[variant], divmod(architecture, 10), tmp_path)
    assert image.startswith(b"\x7fELF")
    assert elf_architecture(image) == architecture
    for kernel in program.kernels:
        assert f".text.{kernel}\0".encode() in image


def elf_architecture(image: bytes) -> int:
    """The architecture of a cubin, such as 90, from the flags of its ELF header; their layout changed with ABI 8."""
    flags, abi = int.from_bytes(image[48:52], "little"), image[8]
    return flags >> 8 & 0xFFFF if abi >= 8 else flags & 0xFF


def test_the_second_time_nothing_is_compiled(compile_tiny, compilations):
    assert compile_tiny() == compile_tiny()
    assert compilations == ["--gpu-architecture=sm_90"]


def test_all_that_goes_into_it_is_compiled_again_when_it_changes(compile_tiny, compilations, tiny, monkeypatch):
    images = [compile_tiny(), compile_tiny(("-DX",)), compile_tiny(capability=(8, 0))]
    tiny.write_text(TINY.replace("= ANSWER", "= ANSWER + 1"))
    images.append(compile_tiny())
    tiny.with_name("tiny.cuh").write_text("#define ANSWER 43\n")
    images.append(compile_tiny())
    monkeypatch.setattr(nvrtc, "version", lambda: (99, 0))
    images.append(compile_tiny())
    assert len(compilations) == len(images) == 6
    assert images[0] != images[3] != images[4]


@pytest.mark.parametrize("damage", [lambda x: x[:100], lambda x: b"", lambda x: x[:-1] + bytes([x[-1] ^ 1])])
def test_a_damaged_file_is_compiled_again(damage, compile_tiny, compilations, tmp_path):
    image = compile_tiny()
    (path,) = (tmp_path / "cache").glob("*.cubin")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert compile_tiny() == image
    assert path.read_bytes() == whole
    assert len(compilations) == 2


def test_a_cache_that_cannot_be_made_is_done_without(tiny, tmp_path, caplog):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with caplog.at_level(logging.WARNING, logger="rwkv_miss"):
        assert nvrtc.compile_source(tiny, (), (9, 0), in_the_way / "cache").startswith(b"\x7fELF")
    assert "tiny.cu is compiled again in every process: cannot write to the cache" in caplog.text


@pytest.mark.parametrize("fails", ["write", "rename", "read-only"])
def test_a_cache_that_is_full_or_read_only_is_done_without(
    compile_tiny, compilations, tmp_path, full_disk, caplog, monkeypatch, fails
):
    """There is one compilation and one warning, and nothing but the lock is left in the cache."""

    def fail(*_):
        raise OSError(number, os.strerror(number))

    number = errno.EROFS if fails == "read-only" else errno.ENOSPC
    if fails != "write":
        monkeypatch.setattr(build.os, "replace", fail)
    with full_disk(1000) if fails == "write" else nullcontext(), caplog.at_level(logging.WARNING, logger="rwkv_miss"):
        image = compile_tiny()
    assert image.startswith(b"\x7fELF") and len(image) > 1000
    assert len(compilations) == len(caplog.records) == 1
    assert "cannot write to the cache" in caplog.text
    assert [x.name for x in (tmp_path / "cache").iterdir()] == ["nvrtc.lock"]


@pytest.mark.slow
def test_processes_that_compile_at_once_compile_once(tiny, tmp_path, start_process):
    code = f"""
from pathlib import Path
from rwkv_miss.ops.cuda import nvrtc
real = nvrtc._compile
nvrtc._compile = lambda *x: (print("compiled"), real(*x))[1]
print(hash(nvrtc.compile_source(Path({str(tiny)!r}), (), (9, 0), Path({str(tmp_path)!r}))))"""
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    started = [start_process([sys.executable, "-c", code], env=environment) for _ in range(3)]
    lines = "".join(finish(*started)).split()
    assert lines.count("compiled") == 1 and len(lines) == 4 and len(set(lines)) == 2


def test_an_architecture_that_is_newer_gets_ptx_of_the_newest_known(compile_tiny, compilations):
    newest = max(nvrtc._call("nvrtcGetSupportedArchs")[0])
    image = compile_tiny(capability=(99, 0))
    assert compilations == [f"--gpu-architecture=compute_{newest}"]
    assert f".target sm_{newest}\n".encode() in image and b".entry answer(" in image
    assert image[-1] == 0


def test_an_architecture_that_is_too_old_is_an_error_that_says_what_to_do(compile_tiny):
    with pytest.raises(nvrtc.CompileError, match=r"this GPU is sm_52, NVRTC .* pip uninstall .*cuda12"):
        compile_tiny(capability=(5, 2))


def test_the_compilers_last_lines_are_told(compile_tiny, tiny, tmp_path):
    tiny.write_text("this is not CUDA\n")
    with pytest.raises(nvrtc.CompileError, match=r"compiling tiny.cu failed: .*(.|\n)*tiny.cu\(1\): error"):
        compile_tiny()
    assert [x.name for x in (tmp_path / "cache").iterdir()] == ["nvrtc.lock"]


def test_without_cuda_bindings_the_error_says_what_to_install(compile_tiny, monkeypatch):
    nvrtc._nvrtc.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(nvrtc.CompileError, match=r"cuda-bindings is not installed .*pip install 'rwkv-miss\[cuda13\]'"):
        compile_tiny()


def files(folder: Path) -> set[str]:
    """The paths of all files in a folder, relative to it."""
    return {x.relative_to(folder).as_posix() for x in folder.rglob("*") if x.is_file()}


@pytest.mark.slow
def test_a_wheel_has_every_module_and_source_and_compiles_them(tmp_path):
    """The wheel is built from a copy, because setuptools leaves files beside what it builds."""
    copy = tmp_path / "copy"
    for name in ("rwkv_miss", "cuda"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    package = installed / "rwkv_miss"
    expected = {path for path in files(copy / "rwkv_miss") if path != "cuda_src"}
    expected |= {f"cuda_src/{name}" for name in files(copy / "cuda")}
    assert files(package) == expected
    code = f"""
import sys
sys.path.insert(0, {str(installed)!r})
import torch
from rwkv_miss.ops.cuda import nvrtc
from rwkv_miss.ops.cuda.programs import PROGRAMS
from pathlib import Path
program = PROGRAMS["wkv7"]
assert program.source == Path({str(package)!r}) / "cuda_src" / "wkv7.cu", program.source
nvrtc.compile_source(program.source, program.variants[torch.bfloat16, 64], (9, 0), Path({str(tmp_path)!r}))"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)
