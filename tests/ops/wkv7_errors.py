"""The errors in bfloat16 against float64 of WKV-7's kernels: ours in the emulator of tests/simt, fla-core's in Triton's
interpreter, on the same inputs.


`TRITON_INTERPRET=1 python -m tests.ops.wkv7_errors` prints the table of docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rwkv_miss.ops import fla
from tests.ops.cases import WKV7, run
from tests.ops.triton_interpreter import prepare
from tests.simt import test_wkv7_chunk as chunk
from tests.simt.wkv import BF16, load_kernels, run_chunk, run_kernels

STEPS, N = 135, 64
# By the name in the table, what changes the inputs that the tests draw.
CASES: dict[str, Callable[[list[Tensor]], None]] = {
    "usual": lambda inputs: None,
    "equal keys, rate 1, decay 1": chunk.equal_keys,
    "near-equal keys, rate 0.95, decay 0.99": chunk.near_equal_keys,
    "strongest decays": chunk.strongest_decay,
    "weakest decays": chunk.weakest_decay,
    "outliers of 1e3": chunk.outliers,
    "zeros": chunk.zeros,
}


def on_tensor_cores(inputs: list[Tensor], state: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return run_chunk(chunk.kernels(N), inputs, state, None, weights, 0)


def scalar(inputs: list[Tensor], state: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return run_kernels(WKV7, load_kernels(WKV7, N, BF16), inputs, state, None, weights, 0)


def of_fla(inputs: list[Tensor], state: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return run(WKV7.with_backend("fla"), inputs, state, None, weights)


KERNELS = {"tensor cores": on_tensor_cores, "scalar": scalar, "fla": of_fla}


def main() -> None:
    """Prints a row for each case and kernel, with the relative error in norm of each result."""
    prepare()
    fla.DEVICES = ("cpu",)
    print(f"| inputs | kernel | {' | '.join(WKV7.results)} |")
    print("|" + " --- |" * (2 + len(WKV7.results)))
    for name, change in CASES.items():
        inputs, state, weights = chunk.make_case(STEPS, N, batch=1)
        change(inputs)
        exact = chunk.exact(inputs, state, None, weights)
        for kernel, function in KERNELS.items():
            found = function(inputs, state, weights)
            cells = [f"{(x - y).norm() / y.norm():.1e}" for x, y in zip(found, exact, strict=True)]
            print(f"| {name} | {kernel} | {' | '.join(cells)} |".replace("e-0", "e-").replace("e+0", "e+"), flush=True)


if __name__ == "__main__":
    main()
