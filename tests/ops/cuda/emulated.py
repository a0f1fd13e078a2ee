"""The table of the programs that the stub driver can run, on host memory in the emulator of tests/simt."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch

from rwkv_miss.ops.cuda.kernel import Program
from rwkv_miss.ops.cuda.programs import PROGRAMS
from rwkv_miss.ops.cuda.wkv import CHUNK_SAVE_EVERY, SAVE_EVERY
from tests.ops.cuda.toy import TOY

FP32, BF16 = torch.float32, torch.bfloat16
Integers = Mapping[str, int]
Elements = Callable[[Integers, tuple[int, ...], Integers], Integers]
"""(macros, grid, arguments) -> how many elements each of a kernel's pointers leads to, by the parameters' names.

macros: the options of the variant as numbers, such as {"HEAD_SIZE": 64, "IO_BF16": 1}; arguments: by the parameters'
names. Names that a kernel does not have do no harm.
"""


@dataclass(frozen=True)
class Emulated:
    """A program, the memory that its kernels may touch, and the variants that the tests use, each with the
    architecture that it is compiled for. The stub's device 0 is of sm_90 and its device 1 of sm_75."""

    program: Program
    elements: Elements
    variants: tuple[tuple[Hashable, int], ...]


def _wkv_elements(inputs: str, save_every: int = SAVE_EVERY) -> Elements:
    def elements(macros: Integers, grid: tuple[int, ...], arguments: Integers) -> Integers:
        steps, heads, n = arguments["steps"], arguments["heads"], macros["HEAD_SIZE"]
        batch = grid[0] // heads
        names = (*inputs, "y", "u", "saved_u")
        counts = dict.fromkeys((*names, *(f"d{x}" for x in names)), batch * steps * heads * n)
        states = dict.fromkeys(("state_in", "state_out", "grad_state", "dstate"), batch * heads * n * n)
        counts |= states | {"seq_start": batch * steps}
        counts |= {"saved_states": batch * heads * -(-steps // save_every) * n * n}
        counts |= {"scratch": batch * heads * (save_every // SAVE_EVERY - 1) * n * n}
        if "u" in inputs:  # of WKV-6, where it is a parameter of the model
            counts |= {"u": heads * n, "du": batch * heads * n}
        return counts

    return elements


def _toy_elements(macros: Integers, grid: tuple[int, ...], arguments: Integers) -> Integers:
    return dict.fromkeys(("x", "y", "dx", "dy"), arguments["count"])


_WKV_VARIANTS = (((BF16, 64), 90), ((FP32, 16), 90), ((FP32, 16), 75), ((BF16, 128), 90))
EMULATED = {
    "wkv6": Emulated(PROGRAMS["wkv6"], _wkv_elements("rkvwu"), _WKV_VARIANTS),
    "wkv7": Emulated(PROGRAMS["wkv7"], _wkv_elements("rzkvab"), _WKV_VARIANTS),
    "wkv7_chunk": Emulated(
        PROGRAMS["wkv7_chunk"], _wkv_elements("rzkvab", CHUNK_SAVE_EVERY), (((BF16, 32), 90), ((BF16, 64), 90))
    ),
    "toy": Emulated(TOY, _toy_elements, ((FP32, 90), (FP32, 75), (BF16, 90))),
}
