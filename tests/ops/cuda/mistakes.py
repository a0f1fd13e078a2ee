"""What a launch would be after a programmer's mistake: (grid, block, arguments) -> the same, wrong."""

from __future__ import annotations


def swapped_arguments(grid, block, arguments):
    return grid, block, [arguments[1], arguments[0], *arguments[2:]]


def swapped_sizes(grid, block, arguments):
    return grid, block, [*arguments[:-2], arguments[-1], arguments[-2]]


def wrong_grid(grid, block, arguments):
    return (grid[0], grid[1] + 1), block, arguments


def wrong_block(grid, block, arguments):
    return grid, block // 2, arguments
