"""Micro-batches: the order of the rows, each rank's share of them, and going on where a run stopped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from rwkv_miss.data.rows import NO_LOSS, NO_RECORD, Rows, epoch_rows
from rwkv_miss.errors import UserError

# What the arrays of a micro-batch hold where there is no document.
_PADDING = {"tokens": 0, "targets": NO_LOSS, "seq_start": False, "records": NO_RECORD}


def count_windows(rows: Rows, window_len: int | None) -> int:
    """The number of windows, of at most `window_len` columns each, that `BatchStream` cuts every row into; 1 if
    window_len is None. Windows are those of truncated back-propagation through time."""
    return -(-rows.width // window_len) if window_len else 1


class BatchStream:
    """One rank's micro-batches of `rows`. A full iteration is one epoch: each of its rows (`epoch_rows`) comes to one
    of the ranks.

    The rows' order is a function of (seed, epoch). An optimizer step takes the next batch_size * accumulate *
    world_size rows and divides them as evenly as possible into accumulate * world_size shares. The last step of an
    epoch may have fewer rows; a share that is left without any is one row of padding. Each share becomes
    `count_windows` micro-batches, one for each window of its columns, so that every rank has the same number of them.

    A micro-batch of b rows and T columns is a dict:

    - `tokens`, `targets` int64 (b, T) and `seq_start` bool (b, T), as in `LaidOut`;
    - `step_tokens` int: the loss tokens in the whole optimizer step, over all its micro-batches and ranks. The sum of
      the loss over `step_tokens` adds up to the step's exact mean over tokens;
    - `positions` int: the positions of all ranks' rows in these columns; the padding rows of empty shares do not count;
    - `filled` int: the part of `positions` that holds a document's tokens and no padding;
    - `has_loss` bool: whether any rank has a target in these columns;
    - `last` bool: whether these columns are the last of their rows. If not, the next micro-batch goes on with the same
      rows;
    - if the rows have groups, `records` int64 (b, T), as in `LaidOut`, and `step_groups` int: the groups in the whole
      optimizer step, over all its micro-batches and ranks.

    All ranks have the same T. With `trim` (for rows that are not packed) the columns after the last target of all
    ranks' rows, on which no loss depends, are cut off; a window that this leaves empty is one column of padding.

    `state_dict` and `load_state_dict` are the protocol by which Lightning saves and restores a loader: the first
    iterator after loading goes on with the micro-batch after the last one that was yielded. Every other new iterator
    begins the first epoch that no iterator has begun yet. Only the newest iterator may be used.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        batch_size: int,
        accumulate: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool,
        trim: bool,
        window_len: int | None = None,
    ) -> None:
        assert min(batch_size, accumulate, len(rows)) >= 1 and 0 <= rank < world_size
        self._rows = rows
        self._loss_tokens = rows.loss_tokens
        self._filled = rows.filled
        self._groups = rows.groups
        self._width = rows.width
        self._used = rows.used if trim else None
        self._window_len = window_len or self._width
        self._windows = count_windows(rows, window_len)
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
        """The number of micro-batches in an epoch, the same for every rank."""
        return -(-self._rows.epoch_size // self._step_rows) * self._accumulate * self._windows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A generator: its body does not run before the first batch is asked for, so an unused iterator is harmless.
        if self._begun or self._batch == len(self):
            self._epoch, self._batch = self._epoch + 1, 0
        self._begun = True
        order = epoch_rows(self._rows, self._seed, self._epoch)
        if self._shuffle:
            np.random.Generator(np.random.PCG64([self._seed, self._epoch])).shuffle(order)
        while self._batch < len(self):
            self._batch += (
                1  # before the yield, so that a state that is saved while this batch is in use goes on after it
            )
            yield self._micro_batch(order, self._batch - 1)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "batch": self._batch, "batches": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores a position. Raises UserError if it is that of a stream with another number of micro-batches in an
        epoch."""
        if state["batches"] != len(self):
            raise UserError(
                f"the checkpoint was saved in a run of {state['batches']} micro-batches an epoch, this run has "
                f"{len(self)}; resume with the same data, ctx_len, chunk_len, batch_size, accumulate and number of "
                "devices"
            )
        self._epoch, self._batch = state["epoch"], state["batch"]
        self._begun = False

    def _micro_batch(self, order: np.ndarray, number: int) -> dict[str, Any]:
        number, window = divmod(number, self._windows)
        step, turn = divmod(number, self._accumulate)
        step_rows = order[step * self._step_rows : (step + 1) * self._step_rows]

        def shares(first: int, count: int) -> np.ndarray:
            total = self._accumulate * self._world_size
            return step_rows[len(step_rows) * first // total : len(step_rows) * (first + count) // total]

        of_all_ranks = shares(turn * self._world_size, self._world_size)
        mine = shares(turn * self._world_size + self._rank, 1)
        if self._world_size > 1 and window == 0:
            self._rows.check(of_all_ranks)  # on every rank, so that all raise: otherwise the others would wait
        width = self._width if self._used is None else self._used[of_all_ranks].max(initial=0)
        start, stop = window * self._window_len, min((window + 1) * self._window_len, width)
        columns = slice(start, max(start, stop))
        n_columns = columns.stop - columns.start
        rows = self._rows.take(mine)
        arrays = {"tokens": rows.tokens, "targets": rows.targets, "seq_start": rows.seq_start}
        if rows.records is not None:
            arrays["records"] = rows.records
        arrays = {name: array[:, columns] for name, array in arrays.items()}
        if not len(mine) or not n_columns:
            shape = max(len(mine), 1), max(n_columns, 1)
            arrays = {name: np.full(shape, _PADDING[name], array.dtype) for name, array in arrays.items()}
            arrays["seq_start"][:, 0] = True
        batch: dict[str, Any] = {
            name: torch.from_numpy(array.astype(bool if name == "seq_start" else np.int64))
            for name, array in arrays.items()
        }
        filled = np.clip(self._filled[of_all_ranks], columns.start, columns.stop) - columns.start
        batch |= {
            "step_tokens": int(self._loss_tokens[step_rows].sum()),
            "positions": int(len(of_all_ranks) * n_columns),
            "filled": int(filled.sum()),
            "has_loss": self._rows.has_loss(of_all_ranks, columns),
            "last": window + 1 == self._windows,
        }
        if self._groups is not None:
            batch["step_groups"] = int(self._groups[step_rows].sum())
        return batch
