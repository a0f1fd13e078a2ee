"""Arrow's formats: .parquet, and .arrow as the package `datasets` writes it. They are read by pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from rwkv_miss.config import DataOptions
from rwkv_miss.data.readers.block import Block, refuse_bomb
from rwkv_miss.data.readers.fields import record_of
from rwkv_miss.data.records import Record
from rwkv_miss.errors import UserError

# Rows that are in memory at once: few, since a text that all of them share is there for each.
_ROWS = 8


def parquet_blocks(path: Path, file: BinaryIO, options: DataOptions) -> Iterator[Block]:
    """The number of each row group."""
    from pyarrow.parquet import ParquetFile

    with _arrow_errors(path, 1):
        metadata = ParquetFile(file).metadata
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        refuse_bomb(path, path.stat().st_size, sum(group.total_byte_size for group in groups))
    first = 1
    for i, group in enumerate(groups):
        yield Block(path, first, i)
        first += group.num_rows


def parquet_records(block: Block, options: DataOptions) -> Iterator[Record]:
    """A record for each row; see `record_of` for the fields."""
    from pyarrow.parquet import ParquetFile

    with block.path.open("rb") as file:
        with _arrow_errors(block.path, block.first):
            batches = ParquetFile(file, buffer_size=1 << 20).iter_batches(_ROWS, row_groups=[block.content])
        yield from _records(block, batches, options)


def arrow_blocks(path: Path, file: BinaryIO, options: DataOptions) -> Iterator[Block]:
    """The batches of rows as they stand in the file."""
    import pyarrow.ipc

    first, size = 1, 0
    batches: Iterator[Any] = iter(())
    with _arrow_errors(path, first):
        mapped = pyarrow.memory_map(str(path))  # not read: a damaged length would be allocated
        if file.read(6) == b"ARROW1":
            found = pyarrow.ipc.open_file(mapped)
            batches = map(found.get_batch, range(found.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(mapped))
    while True:
        with _arrow_errors(path, first):
            batch = next(batches, None)
        if batch is None:
            return
        size += batch.nbytes
        refuse_bomb(path, path.stat().st_size, size)
        yield Block(path, first, batch)
        first += len(batch)


def arrow_records(block: Block, options: DataOptions) -> Iterator[Record]:
    """A record for each row; see `record_of` for the fields."""
    batch = block.content
    return _records(block, (batch.slice(i, _ROWS) for i in range(0, len(batch), _ROWS)), options)


def _records(block: Block, batches: Iterator[Any], options: DataOptions) -> Iterator[Record]:
    number, size, packed = block.first, 0, block.path.stat().st_size
    while True:
        with _arrow_errors(block.path, number):
            if (batch := next(batches, None)) is None:
                return
            batch.validate(full=True)
            rows = batch.to_pylist()
            size += sum(len(value) for row in rows for value in row.values() if isinstance(value, str))
            refuse_bomb(block.path, packed, size)
        for row in rows:
            yield record_of(f"{block.path}:{number}", row, options)
            number += 1


@contextmanager
def _arrow_errors(path: Path, number: int) -> Iterator[None]:
    """UserError for what pyarrow raises while it reads rows from this number on."""
    import pyarrow

    try:
        yield
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError, MemoryError) as error:
        raise UserError(f"{path}: cannot be read from row {number} on ({error}); is the file whole?") from error
