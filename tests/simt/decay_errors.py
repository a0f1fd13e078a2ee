"""The errors of the gradients of cuda/wkv6.cu in float32 against float64, for weak to strong decays, in the emulator.

`python -m tests.simt.decay_errors` prints the table of docs/kernels.md.
"""

from __future__ import annotations

import torch

from tests.ops.cases import WKV6, odd_starts, run
from tests.simt.wkv import FP32, load_kernels, run_kernels

STEPS, N = 257, 64
# By the name in the table: w of every element, or None for the w that `make_inputs` draws.
CASES = {
    "usual, w = N(-2, 3) up to 6": None,
    "d = 0.9997, w = -8": -8.0,
    "d = 6e-4, w = 2": 2.0,
    "d = 1e-4, w = 2.22": 2.22,
    "d = 1e-30, w = 4.235": 4.235,
    "d = 0, w = 6": 6.0,
    "d = 0, w = 40": 40.0,
}


def table() -> str:
    """A row for each case, with the relative error in norm of each gradient."""
    names = WKV6.results[2:]
    lines = [f"| decays | {' | '.join(names)} |", "|" + " --- |" * (len(names) + 1)]
    kernels = load_kernels(WKV6, N, FP32)
    for name, w in CASES.items():
        inputs, state = WKV6.make_inputs(STEPS, N, n_head=1)
        if w is not None:
            inputs[3] = torch.full_like(inputs[3], w)
        start, weights = odd_starts(STEPS), WKV6.make_weights(inputs, state)
        mine = run_kernels(WKV6, kernels, inputs, state, start, weights, 0)
        exact = run(WKV6.reference, [x.double() for x in inputs], state.double(), start, weights)
        pairs = list(zip(mine, exact, strict=True))[2:]
        cells = [f"{(x - y).norm() / y.norm():.0e}" if y.float().any() else "0" for x, y in pairs]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
