"""Tensors that are mapped from files, read from the files instead of through the map: what is read through a map counts
as the process's resident memory until the map ends, and a file that another program cuts ends the process (SIGBUS)."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_miss.errors import UserError


class _Place(NamedTuple):
    """The addresses at which a file is mapped, from its byte `offset` on, and the open file."""

    start: int
    stop: int
    offset: int
    path: str
    file: int


class Reader:
    """Copies tensors; those that lie in one of `places` from the file."""

    def __init__(self, places: list[_Place]) -> None:
        self._places = places

    def read(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """A tensor's values, in `out` (contiguous, of the same shape and dtype) if it is given. Without `out`, a tensor
        that is in memory is returned as it is; so is one that is not contiguous.

        Raises:
            UserError: the file has become shorter.
        """
        place = self._place(tensor)
        if place is None:
            return tensor if out is None else out.copy_(tensor)
        out = torch.empty(tensor.shape, dtype=tensor.dtype) if out is None else out
        data = out.view(-1).view(torch.uint8).numpy().data
        at = place.offset + tensor.data_ptr() - place.start
        while data:
            n = os.preadv(place.file, [data], at)
            if n == 0:
                raise UserError(f"{place.path}: has become shorter while it was read; leave it as it is, and try again")
            data, at = data[n:], at + n
        return out

    def is_mapped(self, tensor: Tensor) -> bool:
        """Whether `read` reads the tensor from a file."""
        return self._place(tensor) is not None

    def _place(self, tensor: Tensor) -> _Place | None:
        if not tensor.is_contiguous():
            return None
        start = tensor.data_ptr()
        stop = start + tensor.numel() * tensor.element_size()
        return next((place for place in self._places if place.start <= start < stop <= place.stop), None)


@contextmanager
def plain_reads(tensors: Iterable[Tensor]) -> Iterator[Reader]:
    """A reader of these tensors, and of parts of them. Where the system does not say which file a tensor is mapped from
    (only Linux does: proc_pid_maps(5)), it is read through the map."""
    maps = Path("/proc/self/maps")
    addresses = sorted(t.data_ptr() for t in tensors)
    with ExitStack() as files:
        places = []
        for line in maps.read_text().splitlines() if maps.exists() else ():
            addressed, _, offset, _, inode, *path = line.split(maxsplit=5)
            start, stop = (int(x, 16) for x in addressed.split("-"))
            first = bisect_left(addresses, start)
            if first == len(addresses) or addresses[first] >= stop:  # none of the tensors is in it
                continue
            if not path or not os.path.isfile(path[0]):  # memory such as [heap], a device, or a file that was removed
                continue
            file = os.open(path[0], os.O_RDONLY)
            files.callback(os.close, file)
            if os.fstat(file).st_ino == int(inode):  # not another file that has the name now
                places.append(_Place(start, stop, int(offset, 16), path[0], file))
        yield Reader(places)
