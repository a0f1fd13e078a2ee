"""The WKV-6 op: checks its arguments and hands them to a backend."""

from __future__ import annotations

from torch import Tensor

from rwkv_miss.ops.arguments import check
from rwkv_miss.ops.dispatch import dispatch


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    seq_start: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The RWKV-6 recurrence (arXiv 2404.05892). Each head has a state S of shape (N_key, N_value). A step does, in this
    order, with d = exp(-exp(w)):

        S = 0 if seq_start;  y = (S + diag(u) k v^T)^T r;  S = diag(d) S + k v^T

    Args:
        r, k, v, w: (B, T, H, N), all of one dtype: float32, bfloat16 or, with the backends "reference" and "torch",
            float64. T may be 0.
        u: (H, N) in that dtype: the weight of a step's own key and value in its y.
        state: the first state, (B, H, N_key, N_value) in float32 (in float64 for float64 inputs); None is zeros. (In
            `wkv7` the value comes before the key.)
        seq_start: bool (B, T), True at each step that begins a document: the state is set to zeros before it. None: no
            step does.
        backend: as in `wkv7`.

    Returns:
        y (B, T, H, N) in v's dtype, contiguous; and the state after the last step, shape and dtype as `state`, in
        memory of its own. Both are differentiable with respect to r, k, v, w, u and state.

    Raises:
        UserError: an argument has the wrong shape, dtype or device, or the backend cannot be used here.
    """
    check("wkv6", v, {"r": r, "k": k, "w": w}, u, state, seq_start)
    return dispatch("wkv6", backend, (r, k, v, w, u), v, state, seq_start)
