"""Accesses of shared memory and their bank conflicts, by the lines of the .cu and .cuh files: build with `OPTIONS`,
launch, then ask `places`. banks.h says how they are counted."""

from __future__ import annotations

import ctypes
import re
import subprocess
from dataclasses import dataclass

OPTIONS = ("-DSIMT_BANKS",)


@dataclass(frozen=True)
class Place:
    """What the accesses at one place of the source took.

    Args:
        lines: the .cu and .cuh files' lines that lead there, "wkv7_chunk.cu:12", innermost first.
        instructions: of warps. least: wavefronts that they would take without conflicts. wavefronts: that they took.
    """

    lines: tuple[str, ...]
    instructions: int
    least: int
    wavefronts: int


def places(library: ctypes.CDLL) -> list[Place]:
    """Every place that has accessed shared memory since the last call."""
    library.simt_banks.restype = ctypes.c_char_p
    rows = [line.split() for line in library.simt_banks().decode().splitlines()]
    addresses = sorted({x for row in rows for x in row[3:]})
    command = ["addr2line", "-a", "-i", "-s", "-e", library._name, *addresses]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^0x([0-9a-f]+)\n", found, flags=re.M)[1:]
    lines = {
        int(address, 16): re.findall(r"^\S+\.cuh?:\d+", text, re.M)
        for address, text in zip(parts[::2], parts[1::2], strict=True)
    }
    return [Place(tuple(line for x in row[3:] for line in lines[int(x, 16)]), *map(int, row[:3])) for row in rows]
