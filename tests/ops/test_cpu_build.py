"""Compiling and caching the C++ kernels."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkv_miss.ops import wkv7
from rwkv_miss.ops.cpu import build
from rwkv_miss.ops.cpu.wkv import source
from tests.ops.cases import WKV7
from tests.processes import Start, finish

CANNOT_WRITE = "tiny.cpp is compiled again in every process: cannot write to the cache ({})"
TINY = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    source = tmp_path / "tiny.cpp"
    source.write_text(TINY)
    return source


def load_in_another_process(start: Start, source: Path, cache: Path, then: str = "") -> subprocess.Popen:
    """Starts a Python process that loads the library and then runs the code `then`. It prints a line if it compiles."""
    code = f"""
from pathlib import Path
from rwkv_miss.ops.cpu import build
from rwkv_miss.ops.cpu.build import load_library
real = build._compile
build._compile = lambda *x: (print("compiled"), real(*x))[1]
assert load_library(Path({str(source)!r}), cache=Path({str(cache)!r})).answer() == 42
{then}"""
    return start([sys.executable, "-c", code])


def test_instruction_sets_are_different_files():
    files = set()
    for capability in build.INSTRUCTION_SETS:
        files.add(build.load_library(source("wkv7"), capability)._name)
    assert len(files) == 3


def test_a_changed_header_makes_another_library(tiny, tmp_path):
    header, cache = tiny.with_name("number.h"), tmp_path / "cache"
    tiny.write_text('#include "number.h"\n' + TINY.replace("42", "NUMBER"))
    for number in (42, 43):
        header.write_text(f"#define NUMBER {number}\n")
        assert build.load_library(tiny, cache=cache).answer() == number


@pytest.mark.slow
def test_processes_that_compile_at_once_compile_once(tiny, tmp_path, start_process):
    cache = tmp_path / "cache"
    processes = [load_in_another_process(start_process, tiny, cache) for _ in range(3)]
    assert "".join(finish(*processes)).split() == ["compiled"]
    assert sorted(p.suffix for p in cache.iterdir() if p.name != "build.lock") == [".so"]


@pytest.mark.slow
def test_a_builder_that_was_killed_leaves_no_lock(tiny, tmp_path, start_process):
    cache = tmp_path / "cache"
    compiler = tmp_path / "slow-c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *" -c "*) exec sleep 60;; *) exec c++ "$@";; esac\n')
    compiler.chmod(0o755)
    code = f"""
import os, sys
os.environ["CXX"] = {str(compiler)!r}
from pathlib import Path
from rwkv_miss.ops.cpu.build import load_library
load_library(Path({str(tiny)!r}), cache=Path({str(cache)!r}))"""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch)}
    builder = start_process([sys.executable, "-c", code], env=environment)
    deadline = time.monotonic() + 60
    while not list(scratch.glob("rwkv_miss-*/build.ninja")):
        assert time.monotonic() < deadline and builder.poll() is None
        time.sleep(0.05)
    os.killpg(builder.pid, signal.SIGKILL)
    builder.wait()
    assert build.load_library(tiny, cache=cache).answer() == 42


@pytest.mark.slow
def test_a_warm_start_neither_imports_cpp_extension_nor_waits_for_the_lock(tiny, tmp_path, start_process):
    cache = tmp_path / "cache"
    build.load_library(tiny, cache=cache)
    with open(cache / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check = """
import sys
assert "torch.utils.cpp_extension" not in sys.modules
"""
        finish(load_in_another_process(start_process, tiny, cache, check))


def test_a_change_of_the_source_compiles_again(tiny, tmp_path):
    cache = tmp_path / "cache"
    assert build.load_library(tiny, cache=cache).answer() == 42
    tiny.write_text(TINY.replace("42", "43"))
    assert build.load_library(tiny, cache=cache).answer() == 43


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_library_that_was_cut_off_is_compiled_again(tiny, tmp_path, start_process, share):
    """Loaded, it would end the process by SIGBUS or SIGSEGV."""
    cache = tmp_path / "cache"
    assert finish(load_in_another_process(start_process, tiny, cache)) == ["compiled\n"]
    [library] = cache.glob("*.so")
    content = library.read_bytes()
    library.write_bytes(content[: int(len(content) * share)])
    assert finish(load_in_another_process(start_process, tiny, cache)) == ["compiled\n"]
    assert finish(load_in_another_process(start_process, tiny, cache)) == [""]


def test_a_cache_that_cannot_be_made_is_done_without(tiny, tmp_path, caplog):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with caplog.at_level(logging.WARNING, logger="rwkv_miss"):
        assert build.load_library(tiny, cache=in_the_way / "cache").answer() == 42
    found = f"[Errno {errno.ENOTDIR}] Not a directory: '{in_the_way / 'cache'}'"
    assert [r.getMessage() for r in caplog.records] == [CANNOT_WRITE.format(found)]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("fails", ["write", "replace"])
def test_a_cache_that_is_full_or_read_only_is_done_without(tiny, tmp_path, caplog, monkeypatch, number, fails):
    """There is one compilation and one warning, and nothing but the lock is left in the cache."""
    compiled, real, cache = [], build._compile, tmp_path / "cache"
    monkeypatch.setattr(build, "_compile", lambda *x: (compiled.append(x), real(*x))[1])

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(build.os, "fsync" if fails == "write" else "replace", fail)
    with caplog.at_level(logging.WARNING, logger="rwkv_miss"):
        assert build.load_library(tiny, cache=cache).answer() == 42
    assert len(compiled) == 1
    assert [r.getMessage() for r in caplog.records] == [CANNOT_WRITE.format(f"[Errno {number}] {os.strerror(number)}")]
    assert [x.name for x in cache.iterdir()] == ["build.lock"]


def test_the_compilers_last_lines_are_told(tiny, tmp_path):
    tiny.write_text("this is not C++\n")
    with pytest.raises(build.BuildError, match=r"compiling tiny.cpp failed:(.|\n)*this is not C\+\+"):
        build.load_library(tiny, cache=tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["build.lock"]


def test_ninja_is_found_without_an_activated_environment(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "bin"  # of links to all programs but ninja
    folder.mkdir()
    for program in (p for place in ("/usr/bin", "/bin") for p in Path(place).iterdir()):
        if program.name != "ninja" and not (folder / program.name).exists():
            (folder / program.name).symlink_to(program)
    monkeypatch.setenv("PATH", str(folder))
    assert build.load_library(tiny, cache=tmp_path / "cache").answer() == 42


def test_one_openmp_library_is_loaded():
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/maps")
    inputs, state = WKV7.make_inputs(4, 8)
    wkv7(*inputs, state, backend="cpu")
    maps = Path("/proc/self/maps").read_text().split()
    runtimes = {x for x in maps if "/" in x and any(name in x for name in ("libgomp", "libiomp", "libomp"))}
    assert len(runtimes) == 1, runtimes
