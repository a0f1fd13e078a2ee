"""Bank conflicts are counted as GPUs have them (banks.h says how), and cuda/wkv7_chunk.cu has none."""

from __future__ import annotations

import pytest
import torch

from rwkv_miss.ops.cuda.programs import CHUNK_HEAD_SIZES, PROGRAMS
from tests.ops.cases import WKV7, odd_starts
from tests.simt import banks
from tests.simt.harness import HERE, build, build_once, guarded, guarded_copy, launch
from tests.simt.wkv import BF16, run_chunk

PROGRAM = PROGRAMS["wkv7_chunk"]
LANES = range(32)
pytestmark = pytest.mark.slow  # builds three libraries


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(HERE / "banks.cu", tmp_path_factory.mktemp("banks"), "-DIO_BF16=1", *banks.OPTIONS)


def counted(library) -> list[banks.Place]:
    """The places in banks.cu whose line says that it counts."""
    marked = {i for i, line in enumerate((HERE / "banks.cu").read_text().splitlines(), 1) if "// counted" in line}
    return [x for x in banks.places(library) if int(x.lines[0].removeprefix("banks.cu:")) in marked]


# The bytes at which the lanes' accesses begin, the wavefronts without conflicts, and those that there are.
PATTERNS = {
    2: [
        ([2 * i for i in LANES], 1, 1),  # two lanes a word
        ([64 * i for i in LANES], 1, 16),
    ],
    4: [
        ([4 * i for i in LANES], 1, 1),
        ([124 - 4 * i for i in LANES], 1, 1),
        ([8 * i for i in LANES], 1, 2),
        ([128 * i for i in LANES], 1, 32),
        ([132 * i for i in LANES], 1, 1),  # rows of 32 words, padded by one
        ([128 * i if i < 5 else -1 for i in LANES], 1, 5),
    ],
    8: [
        ([8 * i for i in LANES], 2, 2),
        ([i % 16 * 8 + i // 16 * 128 for i in LANES], 2, 2),  # the two halves do not meet
        ([16 * i for i in LANES], 2, 4),
        ([144 * (i // 4) + 8 * (i % 4) for i in LANES], 2, 4),  # 32 bytes of rows that are padded by 16
        ([160 * (i // 4) + 8 * (i % 4) for i in LANES], 2, 2),  # by 32
    ],
    16: [
        ([16 * i for i in LANES], 4, 4),
        ([i % 8 * 16 + i // 8 * 512 for i in LANES], 4, 4),  # the four quarters do not meet
        ([32 * i for i in LANES], 4, 8),
        ([128 * i for i in LANES], 4, 32),
        ([144 * i for i in LANES], 4, 4),
        ([16 * i if i < 9 else -1 for i in LANES], 2, 2),
    ],
}
CASES = [(size, *pattern) for size, patterns in PATTERNS.items() for pattern in patterns]


@pytest.mark.parametrize(("size", "at", "least", "wavefronts"), CASES)
def test_reads_and_writes(library, size, at, least, wavefronts):
    at = guarded_copy(torch.tensor(at))
    for kernel, arguments in ((f"read_{size}", [at, guarded((32,), torch.float32)]), (f"write_{size}", [at])):
        launch(library, kernel, (1, 1), 32, arguments, 0)
        (found,) = counted(library)
        assert (found.instructions, found.least, found.wavefronts) == (1, least, wavefronts), kernel


@pytest.mark.parametrize(("at", "wavefronts"), [(at, x) for at, _, x in PATTERNS[16] if min(at) >= 0])
def test_matrices_and_copies_are_accesses_of_16_bytes(library, at, wavefronts):
    at = guarded_copy(torch.tensor(at))
    for kernel, dtype in (("matrices", torch.float32), ("copies", BF16)):
        launch(library, kernel, (1, 1), 32, [at, guarded((32,), dtype)], 0)
        (found,) = counted(library)
        assert (found.instructions, found.least, found.wavefronts) == (1, 4, wavefronts), kernel


def test_lanes_that_read_the_same_word_share_it(library):
    launch(library, "read_4", (1, 1), 32, [guarded_copy(torch.full((32,), 12)), guarded((32,), torch.float32)], 0)
    (found,) = counted(library)
    assert (found.least, found.wavefronts) == (1, 1)


def test_rounds_of_a_loop_are_accesses_of_their_own(library):
    for seed in range(3):
        launch(library, "in_a_loop", (1, 1), 32, [guarded((32,), torch.float32)], seed)
        (found,) = counted(library)
        assert (found.instructions, found.least, found.wavefronts) == (32, 32, 32)


def conflicts(library, n: int) -> dict[tuple[str, ...], int]:
    """The wavefronts by place that conflicts add to a forward and backward of three chunks, documents among them."""
    inputs, state = WKV7.make_inputs(40, n, BF16, 1, 1)
    run_chunk(library, inputs, state, odd_starts(40, 1), WKV7.make_weights(inputs, state), 0)
    found = banks.places(library)
    assert len(found) > 100 and sum(x.instructions for x in found) > 1000
    return {x.lines: x.wavefronts - x.least for x in found if x.wavefronts > x.least}


@pytest.mark.parametrize("n", CHUNK_HEAD_SIZES)
def test_wkv7_on_tensor_cores_has_none(n):
    assert conflicts(build_once(PROGRAM.source, *PROGRAM.variants[BF16, n], *banks.OPTIONS), n) == {}


def test_a_conflict_is_named(tmp_path):
    """Rows that are not padded."""
    for path in PROGRAM.source.parent.glob("*.cu*"):
        text = path.read_text()
        if path == PROGRAM.source:
            assert "constexpr int ROW = N + 16;" in text
            text = text.replace("constexpr int ROW = N + 16;", "constexpr int ROW = N;")
        (tmp_path / path.name).write_text(text)
    library = build(tmp_path / PROGRAM.source.name, tmp_path, *PROGRAM.variants[BF16, 32], *banks.OPTIONS)
    found = conflicts(library, 32)
    lines = (tmp_path / PROGRAM.source.name).read_text().splitlines()
    named = {lines[int(line.split(":")[1]) - 1].strip() for place in found for line in place if "chunk" in line}
    assert "load_b_transposed<ROW>(in_a, as + tile * 16);" in named
