"""The algorithm of cuda/wkv7_chunk.cu in PyTorch operations, with a rounding wherever the kernel rounds to bfloat16.

docs/kernels.md has the formulas. With `exact` for the rounding and float64 inputs it is the op itself; with `to_bf16`
and float32 it shows what the kernel's roundings cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from rwkv_miss.ops.wkv7_reference import DECAY_SCALE

CHUNK = 16
Rounding = Callable[[Tensor], Tensor]


def exact(x: Tensor) -> Tensor:
    return x


def to_bf16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def to_two_bf16(x: Tensor) -> Tensor:
    """The sum of two bfloat16."""
    return to_bf16(x) + to_bf16(x - to_bf16(x))


@dataclass
class _Chunk:
    """What forward and backward compute alike from a chunk's inputs; rows are steps. ends: the product of all decays;
    passes: 1 where the state before the chunk is seen after it; first and last: (.., 16, 1), 1 for the steps that see
    the state before the chunk, and for those that the state after it sees."""

    a: Tensor
    r: Tensor
    k: Tensor
    b: Tensor
    to_a: Tensor
    to_r: Tensor
    undo: Tensor
    ends: Tensor
    passes: Tensor
    first: Tensor
    last: Tensor
    before: Tensor
    until: Tensor
    inverse: Tensor
    ak: Tensor
    rb: Tensor
    rk: Tensor


def _prepare(
    r: Tensor, g: Tensor, k: Tensor, a: Tensor, b: Tensor, starts: Tensor, rnd: Rounding, split: Rounding
) -> _Chunk:
    document = starts.long().cumsum(-1)[..., None, :]  # (.., B, 1, 16)
    same = document[..., :, None] == document[..., None, :]
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril(-1)
    before, until = lower & same, (lower | torch.eye(CHUNK, dtype=torch.bool)) & same
    c = until.to(g.dtype) @ g
    to_a, to_r, undo = (c - g).exp(), c.exp(), (-c).exp()
    first = (document == 0)[..., None].to(g.dtype)
    last = (document == document[..., -1:])[..., None].to(g.dtype)
    a, r, k, b = rnd(a * to_a), rnd(r * to_r), split(k * undo), split(b * undo)
    zero = torch.zeros((), dtype=g.dtype)
    ab, ak = (torch.where(before, a @ x.mT, zero) for x in (b, k))
    rb, rk = (torch.where(until, r @ x.mT, zero) for x in (b, k))
    eye = torch.eye(CHUNK, dtype=g.dtype).expand(ab.shape)
    inverse = split(torch.linalg.solve_triangular(-ab, eye, upper=False, unitriangular=True))
    passes = (document[..., -1:] == 0)[..., None].to(g.dtype)
    return _Chunk(a, r, k, b, to_a, to_r, undo, to_r[..., -1:, :], passes, first, last, before, until, inverse,
                  split(ak), split(rb), split(rk))  # fmt: skip


def wkv7_chunk_model(
    inputs: list[Tensor],
    state: Tensor,
    seq_start: Tensor | None,
    dy: Tensor | None,
    dlast: Tensor | None,
    rnd: Rounding = exact,
    split: Rounding = exact,
    checkpoint: Rounding = exact,
    every: int = 1,
) -> list[Tensor]:
    """y, the last state, the gradients of r, z, k, v, a, b and of the first state, as `tests.ops.cases.run`.

    Args:
        inputs: r, z, k, v, a, b, each (B, T, H, N).
        dy, dlast: the gradients of y and of the last state; None computes no gradients.
        rnd: of the operands of products. split: of those that the kernel has as the sum of two bfloat16.
        checkpoint: of the states that the forward keeps for the backward, one each `every` chunks.
    """
    batch, n_steps = inputs[0].shape[:2]
    dtype = state.dtype
    tail = -n_steps % CHUNK

    def chunks(x: Tensor) -> Tensor:  # (chunks, B, H, 16, N)
        return pad(x.to(dtype), (0, 0, 0, 0, 0, tail)).unflatten(1, (-1, CHUNK)).permute(1, 0, 3, 2, 4)

    z = inputs[1].to(dtype)
    sigmoid = torch.sigmoid(z)
    g = chunks(-DECAY_SCALE * sigmoid)
    r, _, k, v, a, b = map(chunks, inputs)
    starts = torch.zeros(batch, n_steps, dtype=torch.bool) if seq_start is None else seq_start
    starts = pad(starts, (0, tail)).view(batch, -1, CHUNK).transpose(0, 1)
    of_all = vars(_prepare(r, g, k, a, b, starts, rnd, split)).values()
    prepared = [_Chunk(*x) for x in zip(*(x.unbind() for x in of_all), strict=True)]

    def steps(x: list[Tensor]) -> Tensor:
        return torch.stack(x).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :n_steps]

    def values(x: _Chunk, v: Tensor, s0: Tensor) -> Tensor:
        rhs = (x.a * x.first) @ rnd(s0).mT + x.ak @ v
        return rnd(x.inverse @ split(rhs))

    def after(x: _Chunk, v: Tensor, u: Tensor, s0: Tensor) -> Tensor:
        return (s0 * x.passes + (v * x.last).mT @ x.k + (u * x.last).mT @ x.b) * x.ends

    y, kept = [], []
    for i in range(len(r)):
        if i % every == 0:
            kept.append(checkpoint(state))
        x = prepared[i]
        u = values(x, v[i], state)
        y.append((x.r * x.first) @ rnd(state).mT + x.rk @ v[i] + x.rb @ u)
        state = after(x, v[i], u, state)
    if dy is None or dlast is None:
        return [steps(y), state]
    dy = chunks(dy)
    last, grad = state, dlast.to(dtype)

    grads: list[list[Tensor]] = []
    for segment in reversed(range(len(kept))):
        states, s0 = [], kept[segment]
        of = range(segment * every, min((segment + 1) * every, len(r)))
        for i in of:
            states.append(rnd(s0))
            x = prepared[i]
            s0 = after(x, v[i], values(x, v[i], s0), s0)
        for i in reversed(of):
            s0 = states.pop()
            x = prepared[i]
            u = values(x, v[i], s0)
            grad = grad * x.ends
            g1 = rnd(grad)
            du = x.rb.mT @ dy[i] + (x.b * x.last) @ split(grad).mT
            dzeta = x.inverse.mT @ split(du)
            dz_ = rnd(dzeta)
            dv = x.rk.mT @ dy[i] + (x.k * x.last) @ split(grad).mT + x.ak.mT @ split(dzeta)
            zero = torch.zeros((), dtype=dtype)
            dab, dak = (split(torch.where(x.before, dz_ @ w.mT, zero)) for w in (u, v[i]))
            drb, drk = (split(torch.where(x.until, dy[i] @ w.mT, zero)) for w in (u, v[i]))
            da = (dz_ * x.first) @ s0 + dab @ x.b + dak @ x.k
            dr = (dy[i] * x.first) @ s0 + drb @ x.b + drk @ x.k
            to_b, to_k = (u * x.last) @ g1, (v[i] * x.last) @ g1
            in_b, in_k = dab.mT @ x.a + drb.mT @ x.r, dak.mT @ x.a + drk.mT @ x.r
            own = x.until.to(dtype)
            through = x.k * to_k + x.b * to_b
            inside = x.r * dr - x.k * in_k - x.b * in_b
            decay = (x.before.to(dtype) @ through) + own.mT @ inside + x.before.to(dtype).mT @ (x.a * da)
            decay = decay + x.passes * x.first * (s0 * g1).sum(-2, keepdim=True)
            grads.append([x.to_r * dr, decay, x.undo * (in_k + to_k), dv, x.to_a * da, x.undo * (in_b + to_b)])
            grad = grad * x.passes + (dy[i] * x.first).mT @ x.r + (dz_ * x.first).mT @ x.a

    dr, dg, dk, dv, da, db = (steps(list(x)) for x in zip(*reversed(grads), strict=True))
    dz = dg * -DECAY_SCALE * sigmoid * (1 - sigmoid)
    return [steps(y), last, dr, dz, dk, dv, da, db, grad]
