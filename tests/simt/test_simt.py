"""The emulator finds the faults that simt.h lists, and none in correct kernels; and the functions of cuda/common.cuh
are correct."""

from __future__ import annotations

import pytest
import torch

from tests.simt.harness import HERE, SimtError, build, guarded, guarded_copy, launch


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(HERE / "faults.cu", tmp_path_factory.mktemp("simt"))


@pytest.mark.parametrize("threads", [7, 32, 100, 128])
def test_right_kernel(library, threads):
    x = guarded_copy(torch.randn(3, threads))
    for seed in range(3):
        out = guarded((3, threads), torch.float32)
        launch(library, "turn_round", (3, 1), threads, [x, out], seed)
        assert torch.equal(out, x.flip(1))


FAULTS = {
    "read_after_write": "race: tile",
    "write_after_read": "race: tile",
    "write_write": "race: tile",
    "read_by_two_warps": "race: tile",
    "write_after_read_in_warp": r"race: tile\[0\] is written, thread 0 read it",
    "barrier_of_some": "divergent",
    "two_barriers": "divergent",
    "shuffle_of_some": "divergent",
    "shuffle_mask": "has mask 1; the warp's lanes are ffffffff",
    "never_written": "never written: tile",
    "shared_overrun": r"out of bounds: tile\[64\]",
    "global_overrun": "out of bounds: 4 bytes of global memory",
    "global_underrun": "out of bounds: 4 bytes of global memory",
    "global_overrun_unchecked": "memory beside a tensor",
    "not_aligned": "not aligned: 16 bytes of global memory",
    "shared_not_aligned": r"not aligned: tile\[2\], 16 bytes",
    "trap": "thread 7: __trap",
    "mma_of_some": "divergent",
    "dynamic_not_aligned": "not aligned: dynamic shared memory from byte 8 on",
}


@pytest.mark.parametrize(("kernel", "message"), FAULTS.items())
def test_fault_is_reported_in_every_order(library, kernel, message):
    for seed in range(5):
        with pytest.raises(SimtError, match=message):
            launch(library, kernel, (1, 1), 64, [guarded((64,), torch.float32)], seed)


def test_report_names_the_line(library):
    lines = (HERE / "faults.cu").read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if "// the race" in line)
    for seed in range(5):  # it names the write or the read, whichever comes second in this order
        with pytest.raises(SimtError, match=rf"faults\.cu:({number}|{number - 1})\b"):
            launch(library, "read_after_write", (1, 1), 64, [guarded((64,), torch.float32)], seed)


def test_shuffle_from_a_lane_that_does_not_exist(library):
    with pytest.raises(SimtError, match="which is none"):
        launch(library, "shuffle_from_nobody", (1, 1), 16, [guarded((16,), torch.float32)], 0)


def test_syncwarp_orders_a_warp_and_no_more(library):
    for seed in range(5):
        out = guarded((64,), torch.float32)
        launch(library, "within_warp", (1, 1), 64, [out, 1, 3], seed)
        assert torch.equal(out, (torch.arange(64) ^ 3).float())
        for synchronise, distance in ((0, 3), (1, 32)):
            with pytest.raises(SimtError, match="race: tile"):
                launch(library, "within_warp", (1, 1), 64, [out, synchronise, distance], seed)


@pytest.mark.parametrize("reads", [0, 1])
def test_what_a_block_writes_no_other_touches(library, reads):
    x = guarded((32,), torch.float32)
    launch(library, "between_blocks", (1, 1), 32, [x, reads], 0)
    with pytest.raises(SimtError, match="race: global memory"):
        launch(library, "between_blocks", (2, 1), 32, [x, reads], 0)


@pytest.mark.parametrize("down", [0, 1])
def test_shuffles(library, down):
    out = guarded((64,), torch.float32)
    launch(library, "shuffles", (1, 1), 64, [out, down], 1)
    lane = torch.arange(64) % 32
    source = torch.where(lane + 5 < 32, lane + 5, lane) if down else lane ^ 5
    assert torch.equal(out, (torch.arange(64) - lane + source).float())


def test_ballot(library):
    """Its low 24 bits, which a float holds: of a whole warp, and of one of 16 lanes."""
    out = guarded((48,), torch.float32)
    launch(library, "ballot", (1, 1), 48, [out], 1)
    first = sum(1 << lane for lane in range(24) if lane % 3 == 0)
    second = sum(1 << lane for lane in range(16) if (32 + lane) % 3 == 0)
    assert out.tolist() == [first] * 32 + [second] * 16


@pytest.mark.parametrize("threads", [16, 64, 88])
def test_lane_sums(library, threads):
    out = guarded((threads, 6), torch.float32)
    launch(library, "lane_sums", (1, 1), threads, [out], 1)
    sums = torch.arange(threads * 8.0).view(-1, 8, 8).sum(1)  # group of lanes, q
    lane = torch.arange(8)
    out = out.view(-1, 8, 6)
    assert torch.equal(out[..., 0], sums[:, lane])
    assert torch.equal(out[..., 1], sums[:, lane // 2])
    assert torch.equal(out[..., 2:], sums[:, None, :4].expand(-1, 8, 4))


def test_from_bf16_every_value(library):
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    x = guarded_copy(bits.view(torch.bfloat16))
    out = guarded((1 << 16,), torch.float32)
    launch(library, "from_bf16", (1, 1), 32, [x, out, 1 << 16], 0)
    assert torch.equal(out.view(torch.int32), bits.int() << 16)


def test_to_bf16_around_every_rounding_boundary(library):
    high = torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (high + low).to(torch.int32).view(torch.float32).flatten()
    out = guarded((x.numel(),), torch.bfloat16)
    launch(library, "to_bf16", (1, 1), 32, [guarded_copy(x), out, x.numel()], 0)
    nan = x.isnan()
    assert torch.equal(out[~nan].view(torch.int16), x[~nan].bfloat16().view(torch.int16))
    assert out[nan].isnan().all()


def lane_places() -> tuple[list[int], list[int]]:
    """groupID and threadID_in_group of the PTX ISA, for each lane."""
    return [lane >> 2 for lane in range(32)], [lane % 4 for lane in range(32)]


def test_mma_has_the_fragments_of_the_ptx_isa(library):
    """PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": which element of A, B and C is in which
    register of which lane."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(x, generator=generator).bfloat16() for x in ((16, 16), (16, 8)))
    c = torch.randn(16, 8, generator=generator)
    in_a, in_b = guarded((32, 8), torch.bfloat16), guarded((32, 4), torch.bfloat16)
    in_c, expected = guarded((32, 4), torch.float32), torch.empty(32, 4, dtype=torch.float64)
    product = a.double() @ b.double() + c.double()
    for lane, (group, thread) in enumerate(zip(*lane_places(), strict=True)):
        for i in range(8):
            row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
            in_a[lane, i] = a[row, thread * 2 + (i & 1) + (0 if i < 4 else 8)]
        for i in range(4):
            in_b[lane, i] = b[thread * 2 + (i & 1) + (0 if i < 2 else 8), group]
            place = group if i < 2 else group + 8, thread * 2 + (i & 1)
            in_c[lane, i], expected[lane, i] = c[place], product[place]
    launch(library, "multiply", (1, 1), 32, [in_a, in_b, in_c], 1)
    torch.testing.assert_close(in_c.double(), expected, rtol=1e-6, atol=1e-6)


def test_matrices_are_loaded_and_turned_round_as_the_ptx_isa_says(library):
    """PTX ISA, ldmatrix and movmatrix: lanes 8i to 8i + 7 give the rows of matrix i; a lane gets row lane / 4, elements
    2 (lane % 4) and the next, or with .trans the column in the place of the row."""
    x = guarded_copy(torch.arange(256.0).bfloat16().view(4, 8, 8))
    out = guarded((32, 18), torch.bfloat16)
    launch(library, "matrices", (1, 1), 32, [x, out], 1)
    for lane, (group, thread) in enumerate(zip(*lane_places(), strict=True)):
        plain = x[:, group, 2 * thread : 2 * thread + 2]
        turned = x[:, 2 * thread : 2 * thread + 2, group]
        assert torch.equal(out[lane], torch.cat((plain.flatten(), turned.flatten(), turned[0])))


@pytest.mark.parametrize("source", [0, 1, 40])
def test_copies_arrive_where_they_are_waited_for(library, source):
    x = guarded_copy(torch.randn(64, 4))
    for seed in range(3):
        out = guarded((64,), torch.float32)
        launch(library, "copies", (1, 1), 64, [x, out, 1, source, 0], seed)
        expected = torch.cat((x[:63, 0], torch.zeros(1)))[torch.arange(64) ^ source]
        assert torch.equal(out, expected)


def vectors() -> list[torch.Tensor]:
    """What the kernels of copies read, 16 bytes a thread, and what they write."""
    return [guarded((64, 4), torch.float32), guarded((64,), torch.float32)]


def test_a_copy_that_was_not_waited_for_is_not_there(library):
    for seed in range(5):
        for source in (0, 1, 40):
            with pytest.raises(SimtError, match=r"copy: tile.* is read, thread .* has not waited for its copy"):
                launch(library, "copies", (1, 1), 64, [*vectors(), 0, source, 0], seed)


def test_a_copy_over_what_others_still_read_is_a_race(library):
    for seed in range(5):
        with pytest.raises(SimtError, match=r"race: tile|copy: tile"):
            launch(library, "copies", (1, 1), 64, [*vectors(), 1, 40, 1], seed)


def test_a_copy_that_is_not_aligned(library):
    with pytest.raises(SimtError, match=r"not aligned: tile\[\d+\], 16 bytes"):
        launch(library, "copy_not_aligned", (1, 1), 64, vectors(), 0)


def test_dynamic_shared_memory_is_counted(library):
    out = guarded((64,), torch.float32)
    launch(library, "dynamic", (1, 1), 64, [out], 0)
    assert (out == 3).all()
    assert library.simt_dynamic_bytes() == 512
