"""docs/kernels_resources.md is what NVRTC says: it was written of the sources as they are, and a sample of it, measured
again, is the same. No kernel spills registers."""

from __future__ import annotations

import sys
from itertools import zip_longest

import pytest

from tests.processes import run_process

pytest.importorskip("cuda.bindings")

from rwkv_miss.ops.cuda.programs import PROGRAMS
from tests.simt import resources
from tests.simt.resources import TABLE, Resources, blocks_per_sm, parse, text

ROOT = TABLE.parents[1]
MAKE = "python -m tests.simt.resources"
# Where chunked kernels do not run, by their names' first ten letters and the head size: sm_75 has no bf16 on tensor
# cores, and at N = 128 a block needs more than the 99 KB of shared memory that it may have on the others.
LACKING = {("wkv7_chunk", "32"): [75], ("wkv7_chunk", "64"): [75], ("wkv7_chunk", "128"): [75, 86, 89, 120]}
Table = tuple[str, dict[tuple[str, ...], list[str]]]


def differences(committed: Table, measured: Table) -> list[str]:
    """A line for each row that is not the same in both, where it was measured; one line alone if they were not made
    with the same NVRTC and of the same sources."""
    if committed[0] != measured[0]:
        return [f"made with {committed[0]}; here it is {measured[0]}, whose numbers may differ"]
    return [
        f"{' '.join(row)}: {committed[1].get(row)} in the table, {measured[1].get(row)} measured"
        for row in sorted(committed[1].keys() | measured[1].keys())
        if any(x != y != "-" for x, y in zip_longest(committed[1].get(row, ()), measured[1].get(row, ())))
    ]


@pytest.mark.slow
def test_the_table_is_what_nvrtc_says():
    """In a process of its own, whose children compile."""
    command = [sys.executable, *MAKE.split()[1:], "--sample"]
    result = run_process(command, timeout=1200, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    found = differences(parse(TABLE.read_text()), parse(result.stdout))
    assert not found, f"{TABLE.name}: `{MAKE}` writes it again\n" + "\n".join(found)


def test_every_kernel_head_size_type_and_architecture_compiles_without_spills():
    of, table = parse(TABLE.read_text())
    assert of == f"NVRTC {resources.version()}, of sources {resources.fingerprint()}", f"`{MAKE}` writes it again"
    assert len(table) == sum(len(x.kernels) * len(x.variants) for x in PROGRAMS.values())
    for row, (shared, *cells) in table.items():
        assert int(shared) <= 227 * 1024, row  # one number: the same for all architectures
        assert len(cells) == 7
        lacking = [x for x, cell in zip(resources.ARCHITECTURES, cells, strict=True) if cell == "-"]
        assert lacking == LACKING.get((row[0][:10], row[1]), []), row
        for cell in cells:
            if cell == "-":
                continue
            assert "spilled" not in cell, (row, cell)
            registers, blocks = cell.rstrip(")").split(" (")
            assert 0 < int(registers) <= 255 and int(blocks) > 0, (row, cell)


def test_a_changed_row_is_named_and_another_version_said():
    key = [("k", 8, "fp32", x) for x in resources.ARCHITECTURES]
    one, other = (dict.fromkeys(key, Resources(32, 0, 1024, 16)) for _ in range(2))
    other[key[-1]] = Resources(33, 8, 1024, 16)
    tables = [parse(text(x)) for x in (one, other)]
    assert differences(tables[0], tables[0]) == []
    (line,) = differences(*tables)
    assert line.startswith("k 8 fp32: [") and "'33 + 8 spilled (" in line
    (line,) = differences(("NVRTC 13.4, of sources 1", tables[0][1]), tables[1])
    assert line.startswith("made with NVRTC 13.4, of sources 1; here it is NVRTC 13.")


def test_what_was_not_measured_is_not_compared():
    whole = {("k", 8, "fp32", x): Resources(32, 0, 1024, 16) for x in resources.ARCHITECTURES}
    tables = [parse(text(x)) for x in (whole, dict([next(iter(whole.items()))]))]
    assert differences(*tables) == []
    other = {next(iter(whole)): Resources(33, 0, 1024, 16)}
    assert len(differences(tables[0], parse(text(other)))) == 1
    assert len(differences(tables[1], tables[0])) == 1  # a table that lacks an architecture


def test_architectures_and_head_sizes_that_a_kernel_does_not_have_are_left_out():
    found = {("k", 0, "bf16", x): Resources(32, 0, 1024, 128) for x in resources.ARCHITECTURES if x >= 80}
    (row,) = resources.rows(found)
    assert row == ["k", "-", "bf16", "1024", "-", *["32 (16)", "32 (12)", "32 (12)", "32 (16)", "32 (16)", "32 (12)"]]


def test_a_kernel_that_spills_is_found(tmp_path):
    """The kernel has more live values than there are registers for its 1,024 threads."""
    source = tmp_path / "spill.cu"
    source.write_text("""
extern "C" __global__ void __launch_bounds__(1024) spill(float* x) {
    __shared__ float last[1];
    float y[128];
#pragma unroll
    for (int i = 0; i < 128; i++) y[i] = x[i * 1024];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 128; i++) x[i * 1024] = y[i] * y[127 - i];
    last[0] = y[0];
    __syncthreads();
    x[0] = last[0];
}""")
    (found,) = resources.measure(source, (), 90, 1024).values()
    assert found.registers == 64 and found.local > 0 and found.shared == 4


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "architecture", "blocks"),
    [
        (128, 1024, 128, 75, 4),  # by registers
        (121, 1024, 128, 75, 4),
        (96, 1024, 128, 75, 5),
        (180, 1024, 64, 90, 4),  # there are registers for 11 warps, of which only whole fours are used
        (32, 37120, 128, 75, 1),  # by shared memory
        (32, 24576, 128, 86, 4),
        (32, 24577, 128, 86, 3),
        (32, 1024, 128, 75, 8),  # by threads
        (32, 1024, 16, 75, 16),  # by blocks
    ],
)
def test_blocks_per_sm(registers, shared, threads, architecture, blocks):
    assert blocks_per_sm(Resources(registers, 0, shared, threads), architecture) == blocks
