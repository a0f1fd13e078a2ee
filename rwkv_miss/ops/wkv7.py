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
    """The RWKV-7 recurrence (arXiv 2503.14456). Each head has a state S of shape (N_value, N_key). A step does, in this
    order, with d = exp(-e^-0.5 sigmoid(z)):

        S = 0 if seq_start;  S = S diag(d) + (S a) b^T + v k^T;  y = S r

    Args:
        r, z, k, v, a, b: (B, T, H, N), all of one dtype: float32, bfloat16 or, with the backends "reference" and
            "torch", float64. T may be 0. The model gives a = -kk and b = kk * (in-context learning rate), where kk is
            the normalised removal key.
        state: the first state, (B, H, N_value, N_key) in float32 (in float64 for float64 inputs); None is zeros.
        seq_start: bool (B, T), True at each step that begins a document: the state is set to zeros before it. None: no
            step does.
        backend: one of `BACKENDS`. "auto" takes the first that can be used, and logs once which: on NVIDIA's GPUs
            "cuda", then "fla"; on other GPUs "fla"; on a CPU "cpu"; and where none can, "torch". "cuda" takes head
            sizes N of 8, 16, 24, 32, 64, 96 and 128, "fla" those from 16 to 256. "cuda" computes on tensor cores, with
            operands rounded to bfloat16, if the inputs are bfloat16, N is 32, 64 or 128 and the GPU is sm_80 or later
            (N = 128: one whose blocks have 162 KB of shared memory); "cuda_scalar" never does.

    Returns:
        y (B, T, H, N) in v's dtype, contiguous; and the state after the last step, shape and dtype as `state`, in
        memory of its own. Both are differentiable with respect to r, z, k, v, a, b and state.

    Raises:
        UserError: an argument has the wrong shape, dtype or device, or the backend cannot be used here.
    """
    check("wkv7", v, {"r": r, "z": z, "k": k, "a": a, "b": b}, None, state, seq_start)
    return dispatch("wkv7", backend, (r, z, k, v, a, b), v, state, seq_start)
