"""How many pieces the longest block of cuda/wkv7_chunk.cu goes through, where several blocks share out the documents
of a head: on a GPU with 132 SMs, for rows packed with documents of 200 tokens in the mean, whose lengths are drawn from
a log-normal distribution.

`python -m tests.simt.shares` prints the table of docs/kernels.md.
"""

from __future__ import annotations

import random
from itertools import pairwise
from statistics import fmean

from rwkv_miss.ops.cuda.wkv import CHUNK_SAVE_EVERY, SAVE_EVERY, blocks_for_a_head

SMS, BLOCKS = 132, {"forward": 4, "backward": 2}  # blocks per SM at N = 64 on sm_90: kernels_resources.md
MEAN, DEVIATION, ROWS = 200, 0.4, 50  # the deviation is that of the lengths' logarithms
SIZES = ((1, 12, 4096), (1, 32, 1024), (1, 32, 4096), (1, 64, 4096), (4, 32, 4096), (1, 64, 32768))  # B, H, T


def begins_of_a_row(n_steps: int, generator: random.Random) -> list[int]:
    """Where the documents of a row begin."""
    begins = [0]
    while begins[-1] < n_steps:
        length = MEAN * generator.lognormvariate(-(DEVIATION**2) / 2, DEVIATION)
        begins.append(begins[-1] + max(1, round(length)))
    return begins[:-1]


def blocks(part: str, begins: list[int], n_steps: int, n_blocks: int) -> list[tuple[int, int]]:
    """The first step of each block and the one after its last, without the blocks that have none: `Range` of the
    kernel's file."""
    shares = [n_steps * p // n_blocks for p in range(1, n_blocks)]
    if part == "forward":
        borders = [min((t for t in begins if t >= share), default=n_steps) for share in shares]
    else:
        borders = [max(t for t in begins if t <= share) for share in shares]
    borders = sorted({0, n_steps, *borders})
    return list(pairwise(borders))


def pieces(begins: list[int], first: int, end: int) -> int:
    return len({t for t in (*begins, *range(0, end, SAVE_EVERY)) if first < t < end}) + (first < end)


def chain(part: str, begins: list[int], first: int, end: int) -> int:
    """The pieces of a block; in the backward with those that it computes again."""
    found = pieces(begins, first, end)
    if part == "backward":
        for segment in range(first // CHUNK_SAVE_EVERY * CHUNK_SAVE_EVERY, end, CHUNK_SAVE_EVERY):
            last_chunk = (min(segment + CHUNK_SAVE_EVERY, end) - 1) // SAVE_EVERY * SAVE_EVERY
            found += pieces(begins, segment, last_chunk)
    return found


def row(batch: int, n_head: int, n_steps: int) -> str:
    generator, cells = random.Random(0), [f"B{batch} H{n_head} T{n_steps}"]
    rows = [[begins_of_a_row(n_steps, generator) for _ in range(batch)] for _ in range(ROWS)]
    for part, per_sm in BLOCKS.items():
        n_blocks = blocks_for_a_head(SMS * per_sm, batch * n_head, n_steps)
        longest = [
            fmean(max(chain(part, x, *b) for x in of for b in blocks(part, x, n_steps, count)) for of in rows)
            for count in (1, n_blocks)
        ]
        cells += [str(n_blocks), f"{longest[0]:.0f}", f"{longest[1]:.0f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print("| | blocks, forward | pieces of one | of the longest | blocks, backward | pieces of one | of the longest |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    for sizes in SIZES:
        print(row(*sizes))
