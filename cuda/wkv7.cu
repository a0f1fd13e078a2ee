// WKV-7 forward and backward. Per head, with a state S (value i, key j):
//     u = S a;  S = S diag(d) + u b^T + v k^T;  y = S r;   d = exp(-e^-0.5 sigmoid(z));  S = 0 first at seq_start
// Inputs r, z, k, v, a, b and y are (B, T, H, N), states (B, H, N_value, N_key) fp32, seq_start uint8 (B, T) or
// null. Options and alignment: common.cuh.
//
// Launch: grid (B * H, N / KEPT), block 2 * KEPT threads, KEPT = N up to 64 and 32 above; no dynamic shared memory.
//     wkv7_forward          y and the last state; for the backward also the state before every CHUNK steps
//                           (B, H, ceil(T / CHUNK), N_value, N_key) and u (B, T, H, N), fp32, or two nulls.
//     wkv7_backward_values  then the gradients of v and of the first state, and du, that of u (B, T, H, N) fp32;
//     wkv7_backward_keys    then the gradients of r, z, k, a, b.
//
// With G the gradient of the state after a step, the gradients are
//     G += dy r^T;  dv = G k;  du = G b;  G_before = G diag(d) + du a^T                         sums over keys
//     dr = S^T dy;  dk = G^T v;  db = G^T u;  da = S_before^T du;  dd = sums of G * S_before    sums over values
// Rows of G need nothing of each other, so the first line is one kernel over value rows; given u and du, the
// columns of S and G need nothing of each other either, and the second line is one kernel over key columns.
// S and G are at hand together only at the ends of chunks. Between them, d * dd comes from sums at hand: per key,
//     E = sum of G * S before y of a step has added to G;  d dd = E + r dr - k dk - b db;  E_before = d dd + a da,
// which follows from the recurrences. No division by a decay: docs/kernels.md has the errors of the three ways.
//
// A thread holds KEEP x SUM of the state: KEEP of the index that is kept (values in the first two kernels, keys in
// the third), SUM of the one that is summed over, of which LANES neighbouring threads share the rest.
#include "common.cuh"

#if IO_BF16
typedef bf16 io;
#else
typedef float io;
#endif

constexpr int N = HEAD_SIZE;
constexpr int CHUNK = 16;
constexpr int LANES = N % 32 == 0 ? 8 : N % 16 == 0 ? 4 : 2;
constexpr int SUM = N / LANES;
constexpr int KEEP = LANES / 2;
constexpr int KEPT = N <= 64 ? N : 32;  // kept by the block: shared memory stays under 48 KB
constexpr int THREADS = KEPT / KEEP * LANES;
constexpr float DECAY_SCALE = 0.6065306597126334f;  // e^-0.5
static_assert(N == 8 || N == 16 || N == 24 || (N % 32 == 0 && N <= 128), "HEAD_SIZE: 8, 16, 24, 32, 64, 96 or 128");

struct Decay {
    __device__ float operator()(float z) const {
        const float e = __expf(-fabsf(z));
        return __expf(-DECAY_SCALE * __fdividef(z < 0 ? e : 1.0f, 1.0f + e));
    }
};

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
    long long index, step, stride, first, flags;
    __device__ Head(long long steps, long long heads)
        : index(blockIdx.x),
          stride(heads * N),
          first((index / heads * steps * heads + index % heads) * N),
          flags(index / heads * steps) {}
    // Where step t begins in a (B, T, H, N) tensor.
    __device__ long long row(long long t) const { return first + t * stride; }
};

typedef float Tile[KEEP][SUM];

__device__ __forceinline__ void clear(Tile& x) {
#pragma unroll
    for (int q = 0; q < KEEP; q++)
#pragma unroll
        for (int e = 0; e < SUM; e++) x[q][e] = 0.0f;
}

// A thread's part of one (N_value, N_key) matrix, kept index = value.
__device__ __forceinline__ void load_values(Tile& x, const float* from, const Place& at) {
#pragma unroll
    for (int q = 0; q < KEEP; q++)
#pragma unroll
        for (int c = 0; c < SUM / 4; c++)
            load(from + (at.kept + q) * N + at.summed(c), reinterpret_cast<float(&)[4]>(x[q][c * 4]));
}
__device__ __forceinline__ void store_values(const Tile& x, float* to, const Place& at) {
#pragma unroll
    for (int q = 0; q < KEEP; q++)
#pragma unroll
        for (int c = 0; c < SUM / 4; c++)
            store(to + (at.kept + q) * N + at.summed(c), reinterpret_cast<const float(&)[4]>(x[q][c * 4]));
}
// The same, kept index = key.
__device__ __forceinline__ void load_keys(Tile& x, const float* from, const Place& at) {
#pragma unroll
    for (int e = 0; e < SUM; e++) {
        float row[KEEP];
        load(from + (at.summed(e / 4) + e % 4) * N + at.kept, row);
#pragma unroll
        for (int q = 0; q < KEEP; q++) x[q][e] = row[q];
    }
}

__device__ __forceinline__ void load_summed(Shared<float> row, const Place& at, float (&x)[SUM]) {
#pragma unroll
    for (int c = 0; c < SUM / 4; c++) load(row + at.summed(c), reinterpret_cast<float(&)[4]>(x[c * 4]));
}

template <int COUNT>
__device__ __forceinline__ void add_sums(const Tile& x, const float (&weights)[SUM], float (&sums)[COUNT], int first) {
#pragma unroll
    for (int q = 0; q < KEEP; q++)
#pragma unroll
        for (int e = 0; e < SUM; e++) sums[first + q] += x[q][e] * weights[e];
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

__device__ __forceinline__ int chunk_rows(long long steps, long long t0) {
    return static_cast<int>(steps - t0 < CHUNK ? steps - t0 : CHUNK);
}

__device__ __forceinline__ void check_launch() {
    if (blockDim.x != THREADS || gridDim.y != N / KEPT) __trap();
}

extern "C" __global__ void __launch_bounds__(THREADS)
    wkv7_forward(const io* __restrict__ r, const io* __restrict__ z, const io* __restrict__ k,
                 const io* __restrict__ v, const io* __restrict__ a, const io* __restrict__ b,
                 const float* __restrict__ state_in, const unsigned char* __restrict__ seq_start, io* __restrict__ y,
                 float* __restrict__ state_out, float* __restrict__ saved_states, float* __restrict__ saved_u,
                 long long steps, long long heads) {
    check_launch();
    SHARED(float, rs, CHUNK * N);
    SHARED(float, ds, CHUNK * N);
    SHARED(float, ks, CHUNK * N);
    SHARED(float, as, CHUNK * N);
    SHARED(float, bs, CHUNK * N);
    SHARED(float, vs, CHUNK * KEPT);
    const Place at;
    const Head head(steps, heads);
    Tile s;
    load_values(s, state_in + head.index * N * N, at);
    float* saved = saved_states ? saved_states + head.index * ((steps + CHUNK - 1) / CHUNK) * N * N : nullptr;

    for (long long t0 = 0; t0 < steps; t0 += CHUNK) {
        const int rows = chunk_rows(steps, t0);
        const long long from = head.row(t0);
        const unsigned starts = chunk_starts(seq_start, head, t0, rows);
        __syncthreads();
        stage<N>(rs, r + from, head.stride, rows);
        stage<N>(ds, z + from, head.stride, rows, Decay());
        stage<N>(ks, k + from, head.stride, rows);
        stage<N>(as, a + from, head.stride, rows);
        stage<N>(bs, b + from, head.stride, rows);
        stage<KEPT>(vs, v + from + blockIdx.y * KEPT, head.stride, rows);
        if (saved) store_values(s, saved + t0 / CHUNK * N * N, at);
        __syncthreads();
        for (int t = 0; t < rows; t++) {
            const long long out = head.row(t0 + t) + at.kept;
            float x[SUM], d[SUM], u[KEEP] = {}, ys[KEEP] = {}, vt[KEEP];
            if (starts >> t & 1) clear(s);
            load_summed(as + t * N, at, x);
            add_sums(s, x, u, 0);
            sum_to_all<LANES>(u, at.warp);
            if (saved_u && at.lane == 0) store(saved_u + out, u);
            load(vs + (t * KEPT + at.in_block), vt);
            load_summed(ds + t * N, at, d);
            load_summed(ks + t * N, at, x);
#pragma unroll
            for (int q = 0; q < KEEP; q++)
#pragma unroll
                for (int e = 0; e < SUM; e++) s[q][e] = s[q][e] * d[e] + vt[q] * x[e];
            load_summed(bs + t * N, at, x);
#pragma unroll
            for (int q = 0; q < KEEP; q++)
#pragma unroll
                for (int e = 0; e < SUM; e++) s[q][e] += u[q] * x[e];
            load_summed(rs + t * N, at, x);
            add_sums(s, x, ys, 0);
            const float mine[1] = {sum_shared_out<LANES>(ys, at.lane, at.warp)};
            if (at.lane % 2 == 0) store(y + out + at.lane / 2, mine);
        }
    }
    store_values(s, state_out + head.index * N * N, at);
}

// grad_state, the gradient of the last state, is null where none arrives.
extern "C" __global__ void __launch_bounds__(THREADS)
    wkv7_backward_values(const io* __restrict__ r, const io* __restrict__ z, const io* __restrict__ k,
                         const io* __restrict__ a, const io* __restrict__ b,
                         const unsigned char* __restrict__ seq_start, const io* __restrict__ dy,
                         const float* __restrict__ grad_state, io* __restrict__ dv, float* __restrict__ du,
                         float* __restrict__ dstate, long long steps, long long heads) {
    check_launch();
    SHARED(float, rs, CHUNK * N);
    SHARED(float, ds, CHUNK * N);
    SHARED(float, ks, CHUNK * N);
    SHARED(float, as, CHUNK * N);
    SHARED(float, bs, CHUNK * N);
    SHARED(float, dys, CHUNK * KEPT);
    const Place at;
    const Head head(steps, heads);
    Tile g;
    clear(g);
    if (grad_state) load_values(g, grad_state + head.index * N * N, at);

    for (long long t0 = (steps - 1) / CHUNK * CHUNK; t0 >= 0 && steps > 0; t0 -= CHUNK) {
        const int rows = chunk_rows(steps, t0);
        const long long from = head.row(t0);
        const unsigned starts = chunk_starts(seq_start, head, t0, rows);
        __syncthreads();
        stage<N>(rs, r + from, head.stride, rows);
        stage<N>(ds, z + from, head.stride, rows, Decay());
        stage<N>(ks, k + from, head.stride, rows);
        stage<N>(as, a + from, head.stride, rows);
        stage<N>(bs, b + from, head.stride, rows);
        stage<KEPT>(dys, dy + from + blockIdx.y * KEPT, head.stride, rows);
        __syncthreads();
        for (int t = rows - 1; t >= 0; t--) {
            const long long out = head.row(t0 + t) + at.kept;
            float x[SUM], d[SUM], dut[KEEP] = {}, dvs[KEEP] = {}, dyt[KEEP];
            load(dys + (t * KEPT + at.in_block), dyt);
            load_summed(rs + t * N, at, x);
#pragma unroll
            for (int q = 0; q < KEEP; q++)
#pragma unroll
                for (int e = 0; e < SUM; e++) g[q][e] += dyt[q] * x[e];
            load_summed(bs + t * N, at, x);
            add_sums(g, x, dut, 0);
            sum_to_all<LANES>(dut, at.warp);
            if (at.lane == 0) store(du + out, dut);
            load_summed(ks + t * N, at, x);
            add_sums(g, x, dvs, 0);
            const float mine[1] = {sum_shared_out<LANES>(dvs, at.lane, at.warp)};
            if (at.lane % 2 == 0) store(dv + out + at.lane / 2, mine);
            load_summed(ds + t * N, at, d);
            load_summed(as + t * N, at, x);
#pragma unroll
            for (int q = 0; q < KEEP; q++)
#pragma unroll
                for (int e = 0; e < SUM; e++) g[q][e] = g[q][e] * d[e] + dut[q] * x[e];
            if (starts >> t & 1) clear(g);
        }
    }
    store_values(g, dstate + head.index * N * N, at);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    wkv7_backward_keys(const io* __restrict__ r, const io* __restrict__ z, const io* __restrict__ k,
                       const io* __restrict__ v, const io* __restrict__ a, const io* __restrict__ b,
                       const unsigned char* __restrict__ seq_start, const float* __restrict__ saved_states,
                       const float* __restrict__ saved_u, const io* __restrict__ dy, const float* __restrict__ du,
                       const float* __restrict__ grad_state, io* __restrict__ dr, io* __restrict__ dz,
                       io* __restrict__ dk, io* __restrict__ da, io* __restrict__ db, long long steps,
                       long long heads) {
    check_launch();
    SHARED(float, vs, CHUNK * N);
    SHARED(float, us, CHUNK * N);
    SHARED(float, dys, CHUNK * N);
    SHARED(float, dus, CHUNK * N);
    SHARED(float, ds, CHUNK * KEPT);
    // Each holds an input until its last use in the chunk, then a gradient.
    SHARED(float, k_dr, CHUNK * KEPT);
    SHARED(float, b_da, CHUNK * KEPT);
    SHARED(float, r_dk, CHUNK * KEPT);
    SHARED(float, a_db, CHUNK * KEPT);
    SHARED(float, ends, KEPT);
    const Place at;
    const Head head(steps, heads);
    Tile s, g;
    clear(g);
    if (grad_state) load_keys(g, grad_state + head.index * N * N, at);
    const float* saved = saved_states + head.index * ((steps + CHUNK - 1) / CHUNK) * N * N;

    for (long long t0 = (steps - 1) / CHUNK * CHUNK; t0 >= 0 && steps > 0; t0 -= CHUNK) {
        const int rows = chunk_rows(steps, t0);
        const long long from = head.row(t0), from_kept = from + blockIdx.y * KEPT;
        const unsigned starts = chunk_starts(seq_start, head, t0, rows);
        load_keys(s, saved + t0 / CHUNK * N * N, at);
        __syncthreads();
        stage<N>(vs, v + from, head.stride, rows);
        stage<N>(us, saved_u + from, head.stride, rows);
        stage<N>(dys, dy + from, head.stride, rows);
        stage<N>(dus, du + from, head.stride, rows);
        stage<KEPT>(ds, z + from_kept, head.stride, rows, Decay());
        stage<KEPT>(k_dr, k + from_kept, head.stride, rows);
        stage<KEPT>(b_da, b + from_kept, head.stride, rows);
        stage<KEPT>(r_dk, r + from_kept, head.stride, rows);
        stage<KEPT>(a_db, a + from_kept, head.stride, rows);
        __syncthreads();

        for (int t = 0; t < rows; t++) {  // S through the chunk
            const int row = t * KEPT + at.in_block;
            float x[SUM], w[SUM], sums[2 * KEEP] = {}, d[KEEP], kt[KEEP], bt[KEEP];
            if (starts >> t & 1) clear(s);
            load_summed(dus + t * N, at, x);
            add_sums(s, x, sums, KEEP);
            load(ds + row, d);
            load(k_dr + row, kt);
            load(b_da + row, bt);
            load_summed(us + t * N, at, x);
            load_summed(vs + t * N, at, w);
#pragma unroll
            for (int q = 0; q < KEEP; q++)
#pragma unroll
                for (int e = 0; e < SUM; e++) s[q][e] = s[q][e] * d[q] + x[e] * bt[q] + w[e] * kt[q];
            load_summed(dys + t * N, at, x);
            add_sums(s, x, sums, 0);
            const float mine[1] = {sum_shared_out<LANES>(sums, at.lane, at.warp)};
            __syncwarp(at.warp);  // all have read k and b
            store((at.lane < KEEP ? k_dr : b_da) + (row + at.lane % KEEP), mine);
        }
        {
            float sums[KEEP] = {};
#pragma unroll
            for (int q = 0; q < KEEP; q++)
#pragma unroll
                for (int e = 0; e < SUM; e++) sums[q] += g[q][e] * s[q][e];
            const float mine[1] = {sum_shared_out<LANES>(sums, at.lane, at.warp)};
            if (at.lane % 2 == 0) store(ends + (at.in_block + at.lane / 2), mine);
        }
        for (int t = rows - 1; t >= 0; t--) {  // G back through the chunk
            const int row = t * KEPT + at.in_block;
            float x[SUM], sums[2 * KEEP] = {}, rt[KEEP], d[KEEP], as[KEEP];
            load(r_dk + row, rt);
            load(ds + row, d);
            load(a_db + row, as);
            load_summed(dys + t * N, at, x);
#pragma unroll
            for (int q = 0; q < KEEP; q++)
#pragma unroll
                for (int e = 0; e < SUM; e++) g[q][e] += x[e] * rt[q];
            load_summed(vs + t * N, at, x);
            add_sums(g, x, sums, 0);
            load_summed(us + t * N, at, x);
            add_sums(g, x, sums, KEEP);
            load_summed(dus + t * N, at, x);
#pragma unroll
            for (int q = 0; q < KEEP; q++)
#pragma unroll
                for (int e = 0; e < SUM; e++) g[q][e] = g[q][e] * d[q] + x[e] * as[q];
            if (starts >> t & 1) clear(g);
            const float mine[1] = {sum_shared_out<LANES>(sums, at.lane, at.warp)};
            __syncwarp(at.warp);  // all have read r and a
            store((at.lane < KEEP ? r_dk : a_db) + (row + at.lane % KEEP), mine);
        }
        __syncthreads();

        // Out with the gradients; r dr - k dk - b db takes the place of dr, a da that of da.
        for (int i = threadIdx.x; i < rows * (KEPT / 4); i += THREADS) {
            const int t = i / (KEPT / 4), column = i % (KEPT / 4) * 4;
            const long long out = from_kept + t * head.stride + column;
            const int row = t * KEPT + column;
            float input[4], grad[4], change[4];
            load(k_dr + row, grad);
            load(r + out, input);
            store(dr + out, grad);
#pragma unroll
            for (int q = 0; q < 4; q++) change[q] = input[q] * grad[q];
            load(r_dk + row, grad);
            load(k + out, input);
            store(dk + out, grad);
#pragma unroll
            for (int q = 0; q < 4; q++) change[q] -= input[q] * grad[q];
            load(a_db + row, grad);
            load(b + out, input);
            store(db + out, grad);
#pragma unroll
            for (int q = 0; q < 4; q++) change[q] -= input[q] * grad[q];
            store(k_dr + row, change);
            load(b_da + row, grad);
            load(a + out, input);
            store(da + out, grad);
#pragma unroll
            for (int q = 0; q < 4; q++) change[q] = input[q] * grad[q];
            store(b_da + row, change);
        }
        __syncthreads();
        if (threadIdx.x < KEPT) {  // d dd, in the same place
            float end[1], change[1];
            load(ends + threadIdx.x, end);
            for (int t = rows - 1; t >= 0; t--) {
                const int row = t * KEPT + threadIdx.x;
                load(k_dr + row, change);
                end[0] = starts >> t & 1 ? 0.0f : end[0] + change[0];
                store(k_dr + row, end);
                load(b_da + row, change);
                end[0] += change[0];
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < rows * (KEPT / 4); i += THREADS) {
            const int t = i / (KEPT / 4), column = i % (KEPT / 4) * 4;
            const long long out = from_kept + t * head.stride + column;
            float x[4], grad[4];
            load(z + out, x);
            load(k_dr + (t * KEPT + column), grad);
#pragma unroll
            for (int q = 0; q < 4; q++) {  // log(d) = -e^-0.5 sigmoid(z)
                const float e = __expf(-fabsf(x[q])), part = __fdividef(1.0f, 1.0f + e);
                grad[q] *= -DECAY_SCALE * e * part * part;
            }
            store(dz + out, grad);
        }
    }
}
