"""The WKV-7 op: checks its arguments and hands them to a backend."""

from __future__ import annotations

from torch import Tensor

from rwkv_miss.ops.arguments import check
from rwkv_miss.ops.dispatch import dispatch


def wkv7(
    r: Tensor,
    z: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    seq_start: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The RWKV-7 recurrence (arXiv 2503.14456), per head, with a state S of shape (N_value, N_key):

        S = 0 where seq_start;  S = S diag(d) + (S a) b^T + v k^T;  y = S r,   d = exp(-e^-0.5 sigmoid(z))

    Args:
        r, z, k, v, a, b: (B, T, H, N), one dtype: float32, bfloat16 or (reference and torch only) float64. T may
            be 0. In RWKV-7, a = -kk and b = kk * in-context rate.
        state: (B, H, N_value, N_key), float32 (float64 with float64 inputs); None is zeros.
        seq_start: bool (B, T), True where a document begins: the state starts afresh there. None: nowhere.
        backend: one of `BACKENDS`. "auto" takes the first that works: "cuda" and "fla" on NVIDIA's GPUs, "fla" on
            others, "cpu" on a CPU, and then "torch"; it logs once which. "cuda" takes head sizes N of 8, 16, 24, 32,
            64, 96 and 128, "fla" from 16 to 256.

    Returns:
        y (B, T, H, N) in v's dtype, contiguous, and the state after the last step, a new tensor. Both are differentiable
        with respect to r, z, k, v, a, b and state.

    Raises:
        UserError: an argument of the wrong shape, dtype or device, or a backend that cannot be used here.
    """
    check("wkv7", v, {"r": r, "z": z, "k": k, "a": a, "b": b}, None, state, seq_start)
    return dispatch("wkv7", backend, (r, z, k, v, a, b), v, state, seq_start)
