"""The errors in float32 of three ways to compute the gradient of WKV-7's decay, against float64.

`python tests/simt/decay_gradient.py` prints the table of docs/kernels.md. The ways are:

replay: the states of a chunk are computed again from its first one, and kept.
division: they are stepped backwards from the chunk's last one, S_before = (S - u b^T - v k^T) / d.
sums: as in cuda/wkv7.cu, products of the state and its gradient are formed at the chunk's last step alone; running sums
give them at the steps before.
"""

from __future__ import annotations

import numpy as np

STEPS, N = 257, 64
DECAY_SCALE = np.exp(-0.5)
# By the name in the table: mean and standard deviation of z, and a factor of every 7th k and every 5th v.
CASES = {
    "usual, z = N(0, 2)": (0, 2, 1),
    "strongest, z = 8": (8, 0.1, 1),
    "weakest, z = -8": (-8, 0.1, 1),
    "outliers": (0, 2, 50),
}


def make_inputs(mean: float, deviation: float, outlier: float) -> list[np.ndarray]:
    """r, z, k, v, a, b and the gradient of y, (STEPS, N); the first state and the gradient of the last, (N, N)."""
    rng = np.random.default_rng(0)
    r, z, k, v, kk, rate, dy = rng.standard_normal((7, STEPS, N))
    kk /= np.linalg.norm(kk, axis=-1, keepdims=True)
    k[::7] *= outlier
    v[::5] *= outlier
    first, last_gradient = rng.standard_normal((2, N, N))
    inputs = [r, deviation * z + mean, k, v, -kk, kk / (1 + np.exp(-rate)), dy, first, last_gradient]
    return [x.astype(np.float32) for x in inputs]


def gradients(inputs: list[np.ndarray], way: str, chunk: int, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of z and a, (STEPS, N).

    Args:
        inputs: what `make_inputs` returns.
        way: "replay", "division" or "sums".
        chunk: the number of steps after each of which a state is known.
        dtype: what everything is computed in.
    """
    r, z, k, v, a, b, dy, s, g = (x.astype(dtype) for x in inputs)
    scale = dtype(DECAY_SCALE)
    sigmoid = 1 / (1 + np.exp(-z))
    d = np.exp(-scale * sigmoid)
    slope = -scale * np.exp(-np.abs(z)) / (1 + np.exp(-np.abs(z))) ** 2
    states, us = [s], []
    for t in range(STEPS):
        us.append(s @ a[t])
        s = s * d[t] + np.outer(us[t], b[t]) + np.outer(v[t], k[t])
        states.append(s)
    dz, da = np.empty_like(z), np.empty_like(z)
    for t in reversed(range(STEPS)):
        if (t + 1) % chunk == 0 or t == STEPS - 1:
            s = states[t + 1]
            end = (g * s).sum(0)
        if way == "division":
            before = (s - np.outer(us[t], b[t]) - np.outer(v[t], k[t])) / d[t]
        else:
            s, before = states[t + 1], states[t]
        g = g + np.outer(dy[t], r[t])
        du = g @ b[t]
        da[t] = du @ before
        if way == "sums":
            change = end + r[t] * (dy[t] @ s) - k[t] * (v[t] @ g) - b[t] * (us[t] @ g)
            end = change + a[t] * da[t]
        else:
            change = (g * before).sum(0) * d[t]
        dz[t] = change * slope[t]
        g = g * d[t] + np.outer(du, a[t])
        s = before
    return dz, da


def table() -> str:
    """A row for each case, with the relative errors in norm of the gradients of z and a for each way and chunk."""
    ways = [("replay", 16), ("division", 16), ("division", 32), ("sums", 16), ("sums", 64), ("sums", 257)]
    lines = [f"| inputs | {' | '.join(f'{way}, {chunk}' for way, chunk in ways)} |", "|" + " --- |" * (len(ways) + 1)]
    for name, case in CASES.items():
        inputs = make_inputs(*case)
        exact = gradients(inputs, "replay", 16, np.float64)
        cells = []
        for way, chunk in ways:
            found = gradients(inputs, way, chunk, np.float32)
            errors = [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(found, exact, strict=True)]
            cells.append(", ".join(f"{x:.0e}" for x in errors))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
