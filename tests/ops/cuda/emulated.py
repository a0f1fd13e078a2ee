"""The table of the programs that the stub driver can run, on host memory in the emulator of tests/simt."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch

from rwkv_miss.ops.cuda.kernel import Program
from rwkv_miss.ops.cuda.programs import PROGRAMS
from rwkv_miss.ops.cuda.wkv import CHUNK_SAVE_EVERY, SAVE_EVERY
from rwkv_miss.ops.fused_operators import MAX_MIXES
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
        counts |= {"scratch": grid[0] * grid[1] * (save_every // SAVE_EVERY - 1) * n * n}
        if "u" in inputs:  # of WKV-6, where it is a parameter of the model
            counts |= {"u": heads * n, "du": batch * heads * n}
        return counts

    return elements


def _toy_elements(macros: Integers, grid: tuple[int, ...], arguments: Integers) -> Integers:
    return dict.fromkeys(("x", "y", "dx", "dy"), arguments["count"])


def _fused_elements(macros: Integers, grid: tuple[int, ...], arguments: Integers) -> Integers:
    if "count" in arguments:
        return dict.fromkeys(("x", "gate", "out", "dx", "dgate", "dout"), arguments["count"])
    if "channels" in arguments:
        sequences, rows = (arguments["batch"] * arguments["channels"] * x for x in (1, arguments["steps"]))
        mixes, n_mixes = arguments["n_mixes"] * arguments["channels"], arguments["n_mixes"]
        counts = dict.fromkeys(("x", "dx", *(f"{d}out{i}" for d in ("", "d") for i in range(MAX_MIXES))), rows)
        counts |= {"last": sequences, "dlast": sequences, "seq_start": arguments["batch"] * arguments["steps"]}
        return counts | {"mixes": mixes, "dmixes": grid[0] * mixes, "extra": n_mixes * rows, "dextra": n_mixes * rows}
    channels = arguments["heads"] * arguments["n"]
    of_tokens = ("y", "r", "k", "v", "g", "v_first", "a", "nu", "out", "k_out", "v_out", "minus_kk", "kk_rate")
    counts = {f"{d}{x}": arguments["rows"] * channels for d in ("", "d") for x in of_tokens}
    parameters = ("k_k", "k_a", "r_k", "weight", "bias")
    return counts | {f"{d}{x}": channels * y for d, y in (("", 1), ("d", grid[0])) for x in parameters}


_WKV_VARIANTS = (((BF16, 64), 90), ((FP32, 16), 90), ((FP32, 16), 75), ((BF16, 128), 90))
EMULATED = {
    "wkv6": Emulated(PROGRAMS["wkv6"], _wkv_elements("rkvwu"), _WKV_VARIANTS),
    "wkv7": Emulated(PROGRAMS["wkv7"], _wkv_elements("rzkvab"), _WKV_VARIANTS),
    "wkv7_chunk": Emulated(
        PROGRAMS["wkv7_chunk"],
        _wkv_elements("rzkvab", CHUNK_SAVE_EVERY),
        (((BF16, 32), 90), ((BF16, 64), 90), ((BF16, 128), 90)),
    ),
    "fused": Emulated(PROGRAMS["fused"], _fused_elements, ((FP32, 90), (BF16, 90))),
    "toy": Emulated(TOY, _toy_elements, ((FP32, 90), (FP32, 75), (BF16, 90))),
}
