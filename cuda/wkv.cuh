// What wkv7.cu and wkv6.cu share: how the state of a head lies in a block, and how its steps are read.
//
// The option -DHEAD_SIZE=64 (8, 16, 24, 32, 64, 96 or 128) sets N, beside -DIO_BF16 of common.cuh. A compiled module thus
// has the kernels of one head size and type; their names are the same in every module.
//
// Launch: grid (B * H, N / KEPT), block 2 * KEPT threads, KEPT = N up to 64 and 32 above; no dynamic shared memory.
// The steps are read in chunks of CHUNK; the state before each chunk may be saved: (B, H, ceil(T / CHUNK), N, N) fp32.
//
// A thread holds KEEP x SUM of the state: KEEP of the index that is kept, and SUM of the one that is summed over, of
// which LANES neighbouring threads share the rest.
#pragma once
#include "common.cuh"

constexpr int N = HEAD_SIZE;
constexpr int CHUNK = 16;
constexpr int LANES = N % 32 == 0 ? 8 : N % 16 == 0 ? 4 : 2;
constexpr int SUM = N / LANES;
constexpr int KEEP = LANES / 2;
constexpr int KEPT = N <= 64 ? N : 32;  // kept by the block: shared memory stays under 48 KB
constexpr int THREADS = KEPT / KEEP * LANES;
static_assert(N == 8 || N == 16 || N == 24 || (N % 32 == 0 && N <= 128), "HEAD_SIZE: 8, 16, 24, 32, 64, 96 or 128");

// How many blocks an SM has room for if a thread takes so many registers; with this in __launch_bounds__ it takes
// about as many at most.
__device__ constexpr int blocks_of(int registers) {
    const int blocks = 65536 / (registers * ((THREADS + 31) / 32 * 32));
    return blocks < 16 ? blocks : 16;
}

__device__ __forceinline__ void check_launch() {
    if (blockDim.x != THREADS || gridDim.y != N / KEPT) __trap();
}

// The thread's place: its lane among those that share a sum, its first kept index in the block and in the head.
struct Place {
    int lane, in_block, kept;
    unsigned warp;
    __device__ Place()
        : lane(threadIdx.x % LANES),
          in_block(threadIdx.x / LANES * KEEP),
          kept(blockIdx.y * KEPT + in_block),
          warp(warp_lanes()) {}
    // The first of the four neighbours that are the c-th part of the thread's summed indices.
    __device__ int summed(int c) const { return (c * LANES + lane) * 4; }
};

struct Head {
    long long index, stride, first, flags;
    __device__ Head(long long steps, long long heads)
        : index(blockIdx.x),
          stride(heads * N),
          first((index / heads * steps * heads + index % heads) * N),
          flags(index / heads * steps) {}
    // Where step t begins in a (B, T, H, N) tensor.
    __device__ long long row(long long t) const { return first + t * stride; }
};

__device__ __forceinline__ long long count_chunks(long long steps) { return (steps + CHUNK - 1) / CHUNK; }

__device__ __forceinline__ int chunk_rows(long long steps, long long t0) {
    return static_cast<int>(steps - t0 < CHUNK ? steps - t0 : CHUNK);
}

// Bit t: step t of the chunk begins a document.
__device__ __forceinline__ unsigned chunk_starts(const unsigned char* seq_start, const Head& head, long long t0,
                                                 int rows) {
    unsigned mask = 0;
    if (seq_start)
        for (int t = 0; t < rows; t++)
            mask |= (READ_AS(unsigned char, seq_start + head.flags + t0 + t) != 0 ? 1u : 0u) << t;
    return mask;
}

typedef float Tile[KEEP][SUM];

__device__ __forceinline__ void clear(Tile& x) {
#pragma unroll
    for (int q = 0; q < KEEP; q++)
#pragma unroll
        for (int e = 0; e < SUM; e++) x[q][e] = 0.0f;
}

// A thread's part of an N x N matrix in global memory whose rows are the kept index.
__device__ __forceinline__ void load_rows(Tile& x, const float* from, const Place& at) {
#pragma unroll
    for (int q = 0; q < KEEP; q++)
#pragma unroll
        for (int c = 0; c < SUM / 4; c++)
            load(from + (at.kept + q) * N + at.summed(c), reinterpret_cast<float(&)[4]>(x[q][c * 4]));
}
__device__ __forceinline__ void store_rows(const Tile& x, float* to, const Place& at) {
#pragma unroll
    for (int q = 0; q < KEEP; q++)
#pragma unroll
        for (int c = 0; c < SUM / 4; c++)
            store(to + (at.kept + q) * N + at.summed(c), reinterpret_cast<const float(&)[4]>(x[q][c * 4]));
}
// The same where its columns are.
__device__ __forceinline__ void load_columns(Tile& x, const float* from, const Place& at) {
#pragma unroll
    for (int e = 0; e < SUM; e++) {
        float row[KEEP];
        load(from + (at.summed(e / 4) + e % 4) * N + at.kept, row);
#pragma unroll
        for (int q = 0; q < KEEP; q++) x[q][e] = row[q];
    }
}
__device__ __forceinline__ void store_columns(const Tile& x, float* to, const Place& at) {
#pragma unroll
    for (int e = 0; e < SUM; e++) {
        float row[KEEP];
#pragma unroll
        for (int q = 0; q < KEEP; q++) row[q] = x[q][e];
        store(to + (at.summed(e / 4) + e % 4) * N + at.kept, row);
    }
}

__device__ __forceinline__ void load_summed(Shared<float> row, const Place& at, float (&x)[SUM]) {
#pragma unroll
    for (int c = 0; c < SUM / 4; c++) load(row + at.summed(c), reinterpret_cast<float(&)[4]>(x[c * 4]));
}

// The thread's part of the sums of x * weights, added to sums[first ...].
template <int COUNT>
__device__ __forceinline__ void add_sums(const Tile& x, const float (&weights)[SUM], float (&sums)[COUNT], int first) {
#pragma unroll
    for (int q = 0; q < KEEP; q++)
#pragma unroll
        for (int e = 0; e < SUM; e++) sums[first + q] += x[q][e] * weights[e];
}
__device__ __forceinline__ void add_sums(const Tile& x, const Tile& y, float (&sums)[KEEP]) {
#pragma unroll
    for (int q = 0; q < KEEP; q++)
#pragma unroll
        for (int e = 0; e < SUM; e++) sums[q] += x[q][e] * y[q][e];
}

// x += kept summed^T
__device__ __forceinline__ void add_outer(Tile& x, const float (&kept)[KEEP], const float (&summed)[SUM]) {
#pragma unroll
    for (int q = 0; q < KEEP; q++)
#pragma unroll
        for (int e = 0; e < SUM; e++) x[q][e] += kept[q] * summed[e];
}
// x = x diag(decay) + kept summed^T, the decay one of the summed index
__device__ __forceinline__ void decay_and_add(Tile& x, const float (&decay)[SUM], const float (&kept)[KEEP],
                                              const float (&summed)[SUM]) {
#pragma unroll
    for (int q = 0; q < KEEP; q++)
#pragma unroll
        for (int e = 0; e < SUM; e++) x[q][e] = x[q][e] * decay[e] + kept[q] * summed[e];
}
