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
    """The RWKV-6 recurrence (arXiv 2404.05892), per head, with a state S of shape (N_key, N_value):

        S = 0 where seq_start;  y = (S + diag(u) k v^T)^T r;  S = diag(d) S + k v^T,   d = exp(-exp(w))

    Args:
        r, k, v, w: (B, T, H, N), one dtype: float32, bfloat16 or (reference and torch only) float64. T may be 0.
        u: (H, N) of that dtype: the weight of the step's own key.
        state: (B, H, N_key, N_value), float32 (float64 with float64 inputs); None is zeros. (In `wkv7` the
            value comes first.)
        seq_start: bool (B, T), True where a document begins: the state starts afresh there. None: nowhere.
        backend: as in `wkv7`.

    Returns:
        y (B, T, H, N) in v's dtype, contiguous, and the state after the last step, a new tensor. Both are differentiable
        with respect to r, k, v, w, u and state.

    Raises:
        UserError: an argument of the wrong shape, dtype or device, or a backend that cannot be used here.
    """
    check("wkv6", v, {"r": r, "k": k, "w": w}, u, state, seq_start)
    return dispatch("wkv6", backend, (r, k, v, w, u), v, state, seq_start)
