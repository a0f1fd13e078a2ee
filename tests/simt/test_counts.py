"""docs/kernels_counts.md is what the compiler and the emulator say."""

from __future__ import annotations

import pytest

pytest.importorskip("cuda.bindings")

from tests.simt import counts

CODE = """
        /*0000*/                   LDSM.16.M88.4 R4, [R2] ;
.L_x_1:
        /*0010*/                   LDS.64 R4, [R2] ;
.L_x_2:
        /*0020*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0030*/              @!P0 MUFU.EX2 R5, R5 ;
        /*0040*/               @P1 BRA `(.L_x_3) ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0060*/              @!P1 BRA `(.L_x_2) ;
.L_x_3:
        /*0070*/               @P2 LDSM.16.MT88.4 R4, [R2] ;
.L_x_4:
        /*0080*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0090*/               @P0 BRA `(.L_x_4) ;
        /*00a0*/               @P0 BRA P1, `(.L_x_1) ;
        /*00b0*/                   LDSM.16.M88.4 R4, [R2] ;
        /*00c0*/                   EXIT ;
.L_x_5:
        /*00d0*/                   BRA `(.L_x_5) ;
"""


def test_instructions_belong_to_the_innermost_loop_that_reads_matrices():
    outer, inner = counts.loops_over_pieces(CODE.splitlines())
    assert (inner["ldmatrix"], inner["special functions"], inner["mma"], inner["all"]) == (1, 1, 1, 5)
    assert (outer["ldmatrix"], outer["loads from shared memory"], outer["mma"], outer["all"]) == (1, 1, 0, 5)


@pytest.mark.slow
def test_the_table_is_what_the_compiler_and_the_emulator_say():
    if counts.disassembler() is None:
        pytest.skip("nvidia-cuda-nvdisasm is not installed")
    found = counts.text()
    assert counts.TABLE.read_text() == found, "`python -m tests.simt.counts` writes it again"
