// Kernels for test_simt.py. Most have one fault each, which the emulator must report; the last ones call functions of
// common.cuh.
#include "common.cuh"

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
