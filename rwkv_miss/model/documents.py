"""The recurrence over rows of several documents when the initial state is learned. The kernels can only begin a
document within a row from zeros, so each document is run here as a sequence of its own that begins from the learned
state.

B batch, T tokens, H heads of N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rwkv_miss.ops.arguments import state_dtype

RunWkv = Callable[[Sequence[Tensor], Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
"""(inputs (B, T, H, N), state (B, H, N, N) or None for zeros, seq_start (B, T) or None) -> (y, last state)."""


def run_from(
    op: RunWkv,
    inputs: Sequence[Tensor],
    padding: Sequence[float],
    state: Tensor | None,
    initial: Tensor | None,
    seq_start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Runs `op` with sequences that begin from `initial` instead of zeros: if `state` is None, and at each seq_start.

    Args:
        op: the recurrence; row b of its results depends on row b of its arguments alone.
        padding: for each input, the value of a step that leaves the state as it is.
        initial: (H, N, N) in the layout of the state; None is zeros, and then this is `op` itself.

    Returns:
        y (B, T, H, N) and the last state (B, H, N, N), differentiable with respect to initial too.
    """
    if initial is None:
        return op(inputs, state, seq_start)
    initial = initial.to(state_dtype(inputs[0]))
    if state is None:
        state = initial.expand(len(inputs[0]), -1, -1, -1).contiguous()
    if seq_start is None:
        return op(inputs, state, None)

    batch, n_steps = seq_start.shape
    begins = seq_start.cpu()
    is_carried = ~begins[:, 0]
    begins = begins.clone()
    begins[:, 0] = True
    # The documents in the order of the rows laid end to end: where each begins, its length and its row.
    first = begins.flatten().nonzero().squeeze(1)
    length = torch.diff(first, append=torch.tensor([batch * n_steps]))
    row = first // n_steps
    carried = (is_carried[row] & (first % n_steps == 0)).to(state.device)

    # Documents whose lengths differ by less than a factor of 2 run as one batch: less than half of it is padding.
    flat = [x.flatten(0, 1) for x in inputs]
    size = torch.ceil(torch.log2(length.double()))
    y, last, places, order = [], [], [], []
    for chosen in (torch.nonzero(size == s).squeeze(1) for s in size.unique()):
        step = torch.arange(int(length[chosen].max()))
        place = first[chosen, None] + step
        is_inside = step < length[chosen, None]
        place, is_inside = place.clamp(max=batch * n_steps - 1).to(state.device), is_inside.to(state.device)
        pieces = [
            x[place].masked_fill(~is_inside[..., None, None], fill) for x, fill in zip(flat, padding, strict=True)
        ]
        chosen = chosen.to(state.device)
        begin = torch.where(carried[chosen, None, None, None], state[row.to(state.device)[chosen]], initial)
        piece_y, piece_last = op(pieces, begin, None)
        y.append(piece_y[is_inside])
        places.append(place[is_inside])
        last.append(piece_last)
        order.append(chosen)
    in_order = torch.cat(y)[torch.cat(places).argsort()].view_as(inputs[0])
    last_of_row = torch.searchsorted(row, torch.arange(batch), right=True) - 1
    return in_order, torch.cat(last)[torch.cat(order).argsort()[last_of_row.to(state.device)]]
