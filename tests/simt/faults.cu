// Kernels for test_simt.py. Most have one fault each, which the emulator must report; the last ones call functions of
// common.cuh and mma.cuh.
#include "mma.cuh"

#define KERNEL extern "C" __global__ void

__device__ void put(Shared<float> p, float x) {
    const float one[1] = {x};
    store(p, one);
}
__device__ float get(Shared<float> p) {
    float one[1];
    load(p, one);
    return one[0];
}
__device__ void write_out(float* out, float x) {
    const float one[1] = {x};
    store(out + blockIdx.x * blockDim.x + threadIdx.x, one);
}

// Without a fault: reverses the order of each block's part of x, through shared memory.
KERNEL turn_round(const float* x, float* out) {
    SHARED(float, tile, 128);
    float one[1];
    load(x + blockIdx.x * blockDim.x + threadIdx.x, one);
    put(tile + threadIdx.x, one[0]);
    __syncthreads();
    write_out(out, get(tile + (blockDim.x - 1 - threadIdx.x)));
}
KERNEL read_after_write(float* out) {
    SHARED(float, tile, 128);
    put(tile + threadIdx.x, 0);
    __syncthreads();
    put(tile + threadIdx.x, threadIdx.x);
    write_out(out, get(tile + (threadIdx.x ^ 32)));  // the race
}
KERNEL write_after_read(float* out) {
    SHARED(float, tile, 128);
    put(tile + threadIdx.x, threadIdx.x);
    __syncthreads();
    write_out(out, get(tile + (threadIdx.x ^ 1)));
    put(tile + threadIdx.x, 0);
}
KERNEL write_write(float* out) {
    SHARED(float, tile, 128);
    put(tile + threadIdx.x / 2, threadIdx.x);
    write_out(out, 0);
}
KERNEL within_warp(float* out, long long synchronise, long long distance) {
    SHARED(float, tile, 128);
    put(tile + threadIdx.x, 0);
    __syncthreads();
    put(tile + threadIdx.x, threadIdx.x);
    if (synchronise) __syncwarp(warp_lanes());
    write_out(out, get(tile + (threadIdx.x ^ distance)));
}
// Blocks write what the block before has written, or read it if `reads`.
KERNEL between_blocks(float* x, long long reads) {
    float one[1] = {};
    if (reads && blockIdx.x > 0)
        load(x + threadIdx.x, one);
    else
        store(x + threadIdx.x, one);
}
// Two warps read an element, then one of the readers writes it.
KERNEL read_by_two_warps(float* out) {
    SHARED(float, tile, 128);
    if (threadIdx.x == 0) put(tile + 0, 1);
    __syncthreads();
    write_out(out, get(tile + 0));
    __syncwarp(warp_lanes());
    if (threadIdx.x == 0) put(tile + 0, 2);
}
// The shuffle makes the write come later than the read, but CUDA promises no order of memory for it.
KERNEL write_after_read_in_warp(float* out) {
    SHARED(float, tile, 128);
    put(tile + threadIdx.x, 0);
    __syncthreads();
    float x = threadIdx.x == 0 ? get(tile + 0) : 0;
    x = __shfl_xor_sync(warp_lanes(), x, 1);
    if (threadIdx.x == 1) put(tile + 0, x);
    write_out(out, x);
}
KERNEL barrier_of_some(float* out) {
    if (threadIdx.x < 40) __syncthreads();
    write_out(out, 0);
}
KERNEL two_barriers(float* out) {
    if (threadIdx.x < 40)
        __syncthreads();
    else
        __syncthreads();
    write_out(out, 0);
}
KERNEL shuffle_of_some(float* out) {
    float x = threadIdx.x;
    if (threadIdx.x % 2) x = __shfl_xor_sync(warp_lanes(), x, 2);
    write_out(out, x);
}
KERNEL shuffle_mask(float* out) { write_out(out, __shfl_xor_sync(1u, float(threadIdx.x), 1)); }
KERNEL shuffle_from_nobody(float* out) { write_out(out, __shfl_xor_sync(warp_lanes(), float(threadIdx.x), 16)); }
KERNEL shuffles(float* out, long long down) {
    const float x = threadIdx.x;
    write_out(out, down ? __shfl_down_sync(warp_lanes(), x, 5) : __shfl_xor_sync(warp_lanes(), x, 5));
}
KERNEL ballot(float* out) { write_out(out, __ballot_sync(warp_lanes(), threadIdx.x % 3 == 0) & 0xffffffu); }
KERNEL never_written(float* out) {
    SHARED(float, tile, 128);
    write_out(out, get(tile + threadIdx.x));
}
KERNEL shared_overrun(float* out) {
    SHARED(float, tile, 64);
    put(tile + (threadIdx.x + 1), 0);
    write_out(out, 0);
}
KERNEL global_overrun(float* out) { write_out(out + 1, 0); }
KERNEL global_underrun(float* out) { write_out(out - 1, 0); }
KERNEL global_overrun_unchecked(float* out) { out[blockIdx.x * blockDim.x + threadIdx.x + 1] = 0; }
KERNEL not_aligned(float* out) {
    const float four[4] = {};
    if (threadIdx.x == 0) store(out + 2, four);
}
KERNEL shared_not_aligned(float* out) {
    SHARED(float, tile, 128);
    const float four[4] = {};
    if (threadIdx.x == 0) store(tile + 2, four);
    write_out(out, 0);
}
KERNEL trap(float* out) {
    write_out(out, 0);
    if (threadIdx.x == 7) __trap();
}

KERNEL to_bf16(const float* x, bf16* out, long long n) {
    for (long long i = threadIdx.x; i < n; i += blockDim.x) {
        float one[1];
        load(x + i, one);
        store(out + i, one);
    }
}
KERNEL from_bf16(const bf16* x, float* out, long long n) {
    for (long long i = threadIdx.x; i < n; i += blockDim.x) {
        float one[1];
        load(x + i, one);
        store(out + i, one);
    }
}
// The values of a thread are threadIdx.x * 8 + q for q = 0 to 7. out has 6 numbers for each thread: what sum_shared_out
// gives it of the sums of 8 values and of the first 4 values over 8 lanes, then the 4 sums of sum_to_all.
KERNEL lane_sums(float* out) {
    float x[8], y[4];
    for (int q = 0; q < 8; q++) x[q] = threadIdx.x * 8 + q;
    for (int q = 0; q < 4; q++) y[q] = x[q];
    const float mine[1] = {sum_shared_out<8>(x, threadIdx.x % 8, warp_lanes())};
    store(out + threadIdx.x * 6, mine);
    const float half[1] = {sum_shared_out<8>(y, threadIdx.x % 8, warp_lanes())};
    store(out + threadIdx.x * 6 + 1, half);
    sum_to_all<8>(y, warp_lanes());
    for (int q = 0; q < 4; q++) {
        const float all[1] = {y[q]};
        store(out + threadIdx.x * 6 + 2 + q, all);
    }
}

// Each lane's registers of A (4), B (2) and C (4 floats), as they lie in memory.
KERNEL multiply(const float* a, const float* b, float* c) {
    unsigned in_a[4], in_b[2];
    float in_c[4];
    for (int i = 0; i < 4; i++) in_a[i] = READ_AS(unsigned, a + threadIdx.x * 4 + i);
    for (int i = 0; i < 2; i++) in_b[i] = READ_AS(unsigned, b + threadIdx.x * 2 + i);
    load(c + threadIdx.x * 4, in_c);
    mma(in_c, in_a, in_b[0], in_b[1]);
    store(c + threadIdx.x * 4, in_c);
}
// The registers that lanes get of four matrices, row behind row: as they are, transposed, and the first turned round.
KERNEL matrices(const float* from, float* out) {
    SHARED(bf16, rows, 4 * 64);
    for (int i = threadIdx.x; i < 4 * 64 / 2; i += 32) WRITE_AS(unsigned, rows + 2 * i) = READ_AS(unsigned, from + i);
    __syncthreads();
    unsigned x[4], y[4];
    load_matrices<false>(x, rows + threadIdx.x * 8);
    load_matrices<true>(y, rows + threadIdx.x * 8);
    for (int i = 0; i < 4; i++) {
        WRITE_AS(unsigned, out + threadIdx.x * 9 + i) = x[i];
        WRITE_AS(unsigned, out + threadIdx.x * 9 + 4 + i) = y[i];
    }
    WRITE_AS(unsigned, out + threadIdx.x * 9 + 8) = transposed(x[0]);
}
// One group of 16 bytes a thread, of 64. wait: whether it waits before the barrier; source: whose part it then reads;
// early: whether it begins the next copy into its own part before the barrier that follows the reads.
KERNEL copies(const io* from, float* out, long long wait, long long source, long long early) {
    SHARED(io, tile, 64 * 16 / sizeof(io));
    constexpr int EACH = 16 / sizeof(io);
    copy(tile + threadIdx.x * EACH, from + threadIdx.x * EACH, threadIdx.x == 63);
    if (wait) wait_for_copies();
    __syncthreads();
    float x[EACH];
    load_vec<EACH, io>(tile + (threadIdx.x ^ source) * EACH, x);
    if (!early) __syncthreads();
    copy(tile + threadIdx.x * EACH, from, false);
    wait_for_copies();
    write_out(out, x[0]);
}
KERNEL copy_not_aligned(const io* from, float* out) {
    SHARED(io, tile, 64 * 16);
    copy(tile + threadIdx.x * (16 / sizeof(io)) + 1, from, true);
}
KERNEL mma_of_some(float* out) {
    float c[4] = {};
    const unsigned a[4] = {};
    if (threadIdx.x % 32 < 16) mma(c, a, 0, 0);
    write_out(out, c[0]);
}
KERNEL dynamic(float* out) {
    DYNAMIC(float, low, 0, 64);
    DYNAMIC(float, high, 256, 64);
    put(low + threadIdx.x, 1);
    put(high + threadIdx.x, 2);
    write_out(out, get(low + threadIdx.x) + get(high + threadIdx.x));
}
KERNEL dynamic_not_aligned(float* out) {
    DYNAMIC(float, low, 8, 64);
    put(low + threadIdx.x, 1);
    write_out(out, get(low + threadIdx.x));
}
