"""The table of programs agrees with the .cu files, and code that serves any kernel names no particular one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import rwkv_miss
from rwkv_miss.ops.cuda.nvrtc import SOURCES
from rwkv_miss.ops.cuda.programs import PROGRAMS
from tests.ops.cuda.emulated import EMULATED
from tests.ops.cuda.toy import TOY
from tests.simt.harness import parameters

ROOT = Path(__file__).parents[3]
OPS = Path(rwkv_miss.__file__).parent / "ops"
GENERIC = [
    *(OPS / "cuda" / name for name in ("driver.py", "kernel.py", "nvrtc.py")),
    *(OPS / "cpu" / name for name in ("build.py", "kernel.py")),
    *(ROOT / "tests" / "ops" / "cuda" / name for name in ("stub.cpp", "stub.py", "stub_fixtures.py")),
    *(ROOT / "tests" / "simt" / name for name in ("harness.py", "simt.h")),
    SOURCES / "common.cuh",
]


def test_every_file_of_device_code_is_in_the_table():
    assert {x.source for x in PROGRAMS.values()} == set(SOURCES.glob("*.cu"))


@pytest.mark.parametrize("program", [*PROGRAMS.values(), TOY], ids=lambda x: x.source.stem)
def test_the_table_names_the_parameters_of_every_kernel(program):
    declaration = r'extern "C" __global__ void(?:\s+__launch_bounds__\([^)]*\))?\s+(\w+)\('
    assert list(program.kernels) == re.findall(declaration, program.source.read_text())
    for kernel, names in program.kernels.items():
        types = parameters(program.source, kernel)
        assert list(types) == names.split()
        assert all(x.endswith("*") or x == "long long" for x in types.values())


def test_the_stub_runs_every_program():
    assert {x.program for x in EMULATED.values()} == {*PROGRAMS.values(), TOY}


@pytest.mark.parametrize("path", GENERIC, ids=lambda x: x.name)
def test_what_serves_any_kernel_knows_no_kernel(path):
    names = "|".join(("(?<!r)wkv", "HEAD_SIZE", "head size", *TOY.kernels))  # rwkv: the project's own name
    assert re.findall(names, path.read_text(), re.I) == []
