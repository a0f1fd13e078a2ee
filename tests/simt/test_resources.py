"""docs/kernels.md tells the truth about registers and spills, where nvcc is there to say."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.simt.resources import blocks_per_sm, cells, measure

DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")


@needs_nvcc
def test_table_is_what_ptxas_says():
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    if "V13.0.88" not in version:
        pytest.skip("docs/kernels.md was made with nvcc 13.0.88, registers differ with the version")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in DOCS.read_text().splitlines()]
    header = next(line for line in lines if line[:1] == ["kernel"] and "sm_90" in line)
    for architecture in (80, 120):
        for kernel, cell in cells("wkv7.cu", 64, 1, architecture).items():
            row = next(line for line in lines if line[:3] == [kernel, "64", "bf16"])
            assert row[header.index(f"sm_{architecture}")] == cell


@needs_nvcc
@pytest.mark.parametrize(
    ("head_size", "io_bf16", "architecture"), [(128, 0, 75), (128, 1, 90), (32, 0, 86), (8, 1, 120)]
)
def test_nothing_spills_and_shared_memory_needs_no_permission(head_size, io_bf16, architecture):
    kernels = measure("wkv7.cu", head_size, io_bf16, architecture)
    assert set(kernels) == {"wkv7_forward", "wkv7_backward_values", "wkv7_backward_keys"}
    for registers, spills, shared in kernels.values():
        assert 0 < registers <= 255
        assert spills == 0
        assert 0 < shared <= 48 * 1024


def test_blocks_per_sm():
    assert blocks_per_sm(128, 1024, 128, 75) == 4  # by registers
    assert blocks_per_sm(121, 1024, 128, 75) == 4
    assert blocks_per_sm(120, 1024, 128, 75) == 4
    assert blocks_per_sm(96, 1024, 128, 75) == 5
    assert blocks_per_sm(32, 37120, 128, 75) == 1  # by shared memory
    assert blocks_per_sm(32, 24576, 128, 86) == 4
    assert blocks_per_sm(32, 24577, 128, 86) == 3
