"""The order of the rows, each rank's share of them, and going on where a run stopped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from rwkv_miss.data.mapped import MappedRows
from rwkv_miss.data.packing import NO_LOSS, Rows
from rwkv_miss.errors import UserError


def count_segments(rows: Rows | MappedRows, segment_len: int | None) -> int:
    """The segments of at most `segment_len` columns that `BatchStream` cuts every row into; None does not cut."""
    return -(-rows.width // segment_len) if segment_len else 1


class BatchStream:
    """One rank's micro-batches of `rows`. Each full iteration is one epoch; every row comes once over all ranks.

    The rows' order is a function of (seed, epoch). An optimizer step takes the next batch_size * accumulate *
    world_size of them, dealt as evenly as can be over accumulate * world_size shares, though the last step of an
    epoch may have fewer rows: a share left without any is one row of padding. Each share is `count_segments`
    micro-batches, its columns in turn, so that every rank has the same number of micro-batches.

    A micro-batch is a dict: `tokens` and `targets` int64 (b, T), `seq_start` bool (b, T), as in `Rows`;
    `step_tokens` int, the loss tokens in the whole optimizer step over all its micro-batches and ranks: the sum
    of the loss over `step_tokens` adds up to the step's exact mean over tokens; `positions` int, those of all
    ranks' rows in these columns, without the padding of empty shares; `has_loss` bool, whether any rank has a
    target in these columns; `last` bool, whether they are the last of their rows: otherwise the next
    micro-batch goes on with the same rows.

    All ranks have the same T. With `trim` (for rows of one document each) the columns after the last target of
    all ranks' rows, which bear on no loss, are cut off; a segment that this leaves empty is a column of padding.

    `state_dict` and `load_state_dict` are the protocol by which Lightning saves and restores a loader: the first
    iterator after loading goes on with the micro-batch after the last one yielded. Every other new iterator
    begins an epoch that no iterator has begun. Only the newest iterator may be used.
    """

    def __init__(
        self,
        rows: Rows | MappedRows,
        *,
        batch_size: int,
        accumulate: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool,
        trim: bool,
        segment_len: int | None = None,
    ) -> None:
        assert min(batch_size, accumulate, len(rows)) >= 1 and 0 <= rank < world_size
        self._rows = rows
        self._loss_tokens = rows.loss_tokens
        self._width = rows.width
        self._used = rows.used if trim else None
        self._segment_len = segment_len or self._width
        self._segments = count_segments(rows, segment_len)
        self._accumulate = accumulate
        self._rank = rank
        self._world_size = world_size
        self._step_rows = batch_size * accumulate * world_size
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._batch = 0  # micro-batches of the epoch that have been yielded
        self._begun = False  # whether an iterator is in this epoch

    def __len__(self) -> int:
        """Micro-batches an epoch: the same for every rank."""
        return -(-len(self._rows) // self._step_rows) * self._accumulate * self._segments

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A generator: nothing of this runs before the first batch is asked for, so an unused iterator is harmless.
        if self._begun or self._batch == len(self):
            self._epoch, self._batch = self._epoch + 1, 0
        self._begun = True
        order = np.arange(len(self._rows))
        if self._shuffle:
            np.random.Generator(np.random.PCG64([self._seed, self._epoch])).shuffle(order)
        while self._batch < len(self):
            self._batch += 1  # before the yield: a state saved while this batch is in use is past it
            yield self._micro_batch(order, self._batch - 1)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "batch": self._batch, "batches": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises UserError if the state is of a stream with another number of micro-batches an epoch."""
        if state["batches"] != len(self):
            raise UserError(
                f"the checkpoint was saved in a run of {state['batches']} micro-batches an epoch, this run has "
                f"{len(self)}; resume with the same data, ctx_len, chunk_len, batch_size, accumulate and number of "
                "devices"
            )
        self._epoch, self._batch = state["epoch"], state["batch"]
        self._begun = False

    def _micro_batch(self, order: np.ndarray, number: int) -> dict[str, Any]:
        number, segment = divmod(number, self._segments)
        step, turn = divmod(number, self._accumulate)
        step_rows = order[step * self._step_rows : (step + 1) * self._step_rows]

        def shares(first: int, count: int) -> np.ndarray:
            total = self._accumulate * self._world_size
            return step_rows[len(step_rows) * first // total : len(step_rows) * (first + count) // total]

        of_all_ranks = shares(turn * self._world_size, self._world_size)
        mine = shares(turn * self._world_size + self._rank, 1)
        if self._world_size > 1 and segment == 0 and isinstance(self._rows, MappedRows):
            self._rows.check(of_all_ranks)  # a bad token ends all ranks alike; else they wait for the one that met it
        width = self._width if self._used is None else self._used[of_all_ranks].max(initial=0)
        columns = slice(segment * self._segment_len, min((segment + 1) * self._segment_len, width))
        rows = self._rows.take(mine)
        tokens, targets, seq_start = (x[:, columns] for x in (rows.tokens, rows.targets, rows.seq_start))
        if tokens.size == 0:
            shape = max(len(mine), 1), max(columns.stop - columns.start, 1)
            tokens = np.zeros(shape, dtype=np.int32)
            targets = np.full(shape, NO_LOSS, dtype=np.int32)
            seq_start = np.zeros(shape, dtype=bool)
            seq_start[:, 0] = True
        return {
            "tokens": torch.from_numpy(tokens.astype(np.int64)),
            "targets": torch.from_numpy(targets.astype(np.int64)),
            "seq_start": torch.from_numpy(seq_start.copy()),
            "step_tokens": int(self._loss_tokens[step_rows].sum()),
            "positions": len(of_all_ranks) * max(columns.stop - columns.start, 0),
            "has_loss": self._rows.has_loss(of_all_ranks, columns),
            "last": segment + 1 == self._segments,
        }
