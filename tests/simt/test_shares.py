"""The table of docs/kernels.md of documents shared out over blocks is what `blocks_for_a_head` makes of such rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.simt.shares import SIZES, row

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


@pytest.mark.parametrize("sizes", SIZES[:4])
def test_a_row_of_the_table(sizes):
    assert row(*sizes) in PAGE.read_text(encoding="utf-8").splitlines()
