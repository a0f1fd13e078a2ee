// What wkv7.cu and wkv6.cu share: how the state of a head is laid out over a block's threads, and how steps are read.
//
// Options: -DHEAD_SIZE=64 (8, 16, 24, 32, 64, 96 or 128) sets the head size N; -DIO_BF16 as in common.cuh. A compiled
// module thus has the kernels for one head size and type; their names are the same in every module.
//
// Launch: grid (B * H, N / KEPT), block 2 * KEPT threads, where KEPT = N up to 64 and 32 above; no dynamic shared
// memory. Steps are read in chunks of CHUNK. The forward may save the state before each chunk: (B, H, ceil(T / CHUNK),
// N, N) fp32.
//
// Each kernel sums over one index of the N x N state, the keys or the values: the summed index. The other is the kept
// index: its values need nothing of each other, so that a block can hold KEPT of them. A thread holds KEEP x SUM
// elements of the state: KEEP of the kept index and SUM of the summed index, and the LANES neighbouring threads that
// have the same kept indices hold the rest of the summed index.
#pragma once
#include "common.cuh"

constexpr int N = HEAD_SIZE;
constexpr int CHUNK = 16;
constexpr int LANES = N % 32 == 0 ? 8 : N % 16 == 0 ? 4 : 2;
constexpr int SUM = N / LANES;
constexpr int KEEP = LANES / 2;
constexpr int KEPT = N <= 64 ? N : 32;  // 32 above 64, so that shared memory stays under 48 KB
constexpr int THREADS = KEPT / KEEP * LANES;
static_assert(N == 8 || N == 16 || N == 24 || (N % 32 == 0 && N <= 128), "HEAD_SIZE: 8, 16, 24, 32, 64, 96 or 128");

// How many blocks an SM has room for, 16 at most, if a thread takes so many registers. Given to __launch_bounds__, it
// makes ptxas use about that many registers at most.
__device__ constexpr int blocks_of(int registers) {
    const int blocks = 65536 / (registers * ((THREADS + 31) / 32 * 32));
    return blocks < 16 ? blocks : 16;
}

__device__ __forceinline__ void check_launch() {
    if (blockDim.x != THREADS || gridDim.y != N / KEPT) __trap();
}

// Where a thread stands: its lane among the LANES threads that share a sum, the first of its kept indices counted from
// the block's first and from the head's first, and the mask of its warp.
struct Place {
    int lane, in_block, kept;
    unsigned warp;
    __device__ Place()
        : lane(threadIdx.x % LANES),
          in_block(threadIdx.x / LANES * KEEP),
          kept(blockIdx.y * KEPT + in_block),
          // A constant where it can be one: with a variable every step compares the lanes' masks. At N = 128 the
          // constant would make ptxas spill registers on sm_120.
          warp(THREADS % 32 == 0 && N < 128 ? 0xffffffffu : warp_lanes()) {}
    // The thread's summed indices are SUM / 4 groups of four neighbours; this is the first index of group c.
    __device__ int summed(int c) const { return (c * LANES + lane) * 4; }
};

// The block's head. index: among all heads of the batch; stride: elements from a step to the next in a (B, T, H, N)
// tensor; first: the element where the head's first step begins; flags: the element of its sequence's first step in a
// (B, T) tensor.
struct Head {
    long long index, stride, first, flags;
    __device__ Head(long long steps, long long heads)
        : index(blockIdx.x),
          stride(heads * N),
          first((index / heads * steps * heads + index % heads) * N),
          flags(index / heads * steps) {}
    // The element where step t begins in a (B, T, H, N) tensor.
    __device__ long long row(long long t) const { return first + t * stride; }
};

__device__ __forceinline__ long long count_chunks(long long steps) { return (steps + CHUNK - 1) / CHUNK; }

// The number of steps in the chunk that begins at step t0: 0 if there is no such chunk.
__device__ __forceinline__ int chunk_rows(long long steps, long long t0) {
    if (t0 < 0 || t0 >= steps) return 0;
    return static_cast<int>(steps - t0 < CHUNK ? steps - t0 : CHUNK);
}

// Whether the inputs of a chunk are read while the one before it is computed, so that nobody waits for them. It takes
// registers, which other head sizes and types lack; nearly all models are trained with these.
constexpr bool AHEAD = N == 64 && sizeof(io) == 2;

// Which steps of a chunk begin a document: lane t of each warp holds the flag of step t. seq_start: (B, T), or null
// where no step does.
struct Starts {
    bool flag;
    // Begins to read, if AHEAD.
    __device__ void read(const unsigned char* seq_start, const Head& head, long long t0, int rows) {
        if constexpr (AHEAD) flag = get(seq_start, head, t0, rows);
    }
    // A mask whose bit t says that step t begins a document.
    __device__ unsigned mask(const unsigned char* seq_start, const Head& head, long long t0, int rows,
                             const Place& at) const {
        return __ballot_sync(at.warp, AHEAD ? flag : get(seq_start, head, t0, rows));
    }
    static __device__ bool get(const unsigned char* seq_start, const Head& head, long long t0, int rows) {
        const int t = threadIdx.x % 32;
        return seq_start && t < rows && READ_AS(unsigned char, seq_start + head.flags + t0 + t) != 0;
    }
};

// A thread's part of CHUNK rows of WIDTH values, which begin `stride` elements apart in global memory at `from`, on
// their way to shared memory: COUNT groups of four. All inputs of a chunk can so be read at once, long before they are
// needed. The whole block takes part. rows: how many rows there are, 0 if none.
template <int WIDTH, typename T>
struct Staged {
    static constexpr int COUNT = (CHUNK * WIDTH / 4 + THREADS - 1) / THREADS;
    typedef typename Access<4 * sizeof(T)>::Type Bits;
    Bits bits[COUNT];

    static __device__ int row(int n) { return (threadIdx.x + n * THREADS) / (WIDTH / 4); }
    static __device__ int column(int n) { return (threadIdx.x + n * THREADS) % (WIDTH / 4) * 4; }

    // Begins to read, if AHEAD.
    __device__ __forceinline__ void read(const T* from, long long stride, int rows) {
        if constexpr (AHEAD) {
#pragma unroll
            for (int n = 0; n < COUNT; n++)
                if (row(n) < rows) bits[n] = READ_AS(Bits, from + row(n) * stride + column(n));
        }
    }
    // Group n, which has been read; or it is read now.
    __device__ __forceinline__ void get(int n, const T* from, long long stride, float (&x)[4]) const {
        if constexpr (AHEAD) {
            T values[4];
            memcpy(values, &bits[n], sizeof(values));
#pragma unroll
            for (int q = 0; q < 4; q++) x[q] = to_float(values[q]);
        } else {
            load(from + row(n) * stride + column(n), x);
        }
    }
    // As `stage`, of what has been read.
    template <typename Convert = Same>
    __device__ __forceinline__ void write(Shared<float> to, const T* from, long long stride, int rows,
                                          Convert convert = Convert()) const {
        if constexpr (AHEAD) {
#pragma unroll
            for (int n = 0; n < COUNT; n++) {
                if (row(n) >= rows) break;
                float x[4];
                get(n, from, stride, x);
#pragma unroll
                for (int q = 0; q < 4; q++) x[q] = convert(x[q]);
                store(to + (row(n) * WIDTH + column(n)), x);
            }
        } else {
            stage<WIDTH>(to, from, stride, rows, convert);
        }
    }
};

typedef float Tile[KEEP][SUM];

__device__ __forceinline__ void clear(Tile& x) {
#pragma unroll
    for (int q = 0; q < KEEP; q++)
#pragma unroll
        for (int e = 0; e < SUM; e++) x[q][e] = 0.0f;
}

// The same where a document begins. Few steps do, so this is a branch: a select for each element costs every step.
__device__ __forceinline__ void clear_if(bool begins, Tile& x) {
    if (begins) {
        asm volatile("");
        clear(x);
    }
}

// Load and store a thread's part of an N x N matrix in global memory whose rows are the kept index.
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
// The same for a matrix whose columns are the kept index.
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

// The thread's summed indices of a row of N values.
__device__ __forceinline__ void load_summed(Shared<float> row, const Place& at, float (&x)[SUM]) {
#pragma unroll
    for (int c = 0; c < SUM / 4; c++) load(row + at.summed(c), reinterpret_cast<float(&)[4]>(x[c * 4]));
}

// Adds the thread's part of sum over the summed index e of x[q][e] weights[e] to sums[first + q], for each kept q.
template <int COUNT>
__device__ __forceinline__ void add_sums(const Tile& x, const float (&weights)[SUM], float (&sums)[COUNT], int first) {
#pragma unroll
    for (int q = 0; q < KEEP; q++)
#pragma unroll
        for (int e = 0; e < SUM; e++) sums[first + q] += x[q][e] * weights[e];
}
// Adds the thread's part of sum over the summed index e of x[q][e] y[q][e] to sums[q], for each kept q.
__device__ __forceinline__ void add_sums(const Tile& x, const Tile& y, float (&sums)[KEEP]) {
#pragma unroll
    for (int q = 0; q < KEEP; q++)
#pragma unroll
        for (int e = 0; e < SUM; e++) sums[q] += x[q][e] * y[q][e];
}

// x += kept summed^T, the outer product of two vectors
__device__ __forceinline__ void add_outer(Tile& x, const float (&kept)[KEEP], const float (&summed)[SUM]) {
#pragma unroll
    for (int q = 0; q < KEEP; q++)
#pragma unroll
        for (int e = 0; e < SUM; e++) x[q][e] += kept[q] * summed[e];
}
// x = x diag(decay) + kept summed^T, where the decay goes with the summed index
__device__ __forceinline__ void decay_and_add(Tile& x, const float (&decay)[SUM], const float (&kept)[KEEP],
                                              const float (&summed)[SUM]) {
#pragma unroll
    for (int q = 0; q < KEEP; q++)
#pragma unroll
        for (int e = 0; e < SUM; e++) x[q][e] = x[q][e] * decay[e] + kept[q] * summed[e];
}
