"""Packed rows as Lightning takes them."""

from __future__ import annotations

import lightning as L

from rwkv_miss.config import TrainConfig
from rwkv_miss.data.batches import BatchStream
from rwkv_miss.data.rows import Rows


class PackedData(L.LightningDataModule):
    """Each rank's share of the rows. The order and the position are the stream's own (see `BatchStream`), so
    a run goes on from a checkpoint with the batch after the last one it saw."""

    def __init__(self, train: Rows, val: Rows | None, config: TrainConfig) -> None:
        super().__init__()
        self.train, self.val, self.config = train, val, config

    def train_dataloader(self) -> BatchStream:
        return self._stream(self.train, self.config.accumulate, shuffle=True)

    def val_dataloader(self) -> BatchStream:
        assert self.val is not None, "the trainer was told that nothing validates"
        return self._stream(self.val, 1, shuffle=False)

    def _stream(self, rows: Rows, accumulate: int, shuffle: bool) -> BatchStream:
        assert self.trainer is not None
        return BatchStream(
            rows,
            batch_size=self.config.batch_size,
            accumulate=accumulate,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            seed=self.config.seed,
            shuffle=shuffle,
            trim=not self.config.packing,
            window_len=self.config.window_len,
        )
