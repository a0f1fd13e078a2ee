// WKV-7 forward and backward. Each head has a state S of (value i, key j). With d = exp(-e^-0.5 sigmoid(z)), a step
// does, in this order:
//     S = 0 if seq_start;  u = S a;  S = S diag(d) + u b^T + v k^T;  y = S r
// The inputs r, z, k, v, a, b and y are (B, T, H, N), states are (B, H, N_value, N_key) fp32, seq_start is uint8 (B, T)
// or null where no document begins. Options and launch: wkv.cuh. Alignment: common.cuh.
//     wkv7_forward          computes y and the last state; for a backward it saves the state before every CHUNK steps,
//                           (B, H, ceil(T / CHUNK), N_value, N_key) fp32, and u, (B, T, H, N) fp32 (two nulls: saves
//                           nothing);
//     wkv7_backward_values  computes the gradients of v and of the first state, and du, the gradient of u, (B, T, H, N)
//                           fp32;
//     wkv7_backward_keys    is launched after it, and computes the gradients of r, z, k, a and b.
//
// With G the gradient of the state after a step, the gradients are
//     G += dy r^T;  dv = G k;  du = G b;  G_before = G diag(d) + du a^T                         sums over keys
//     dr = S^T dy;  dk = G^T v;  db = G^T u;  da = S_before^T du;  dd = sums of G * S_before    sums over values
// The rows of G do not depend on each other, so that the first line is a kernel over value rows. With u and du known,
// the columns of S and G do not depend on each other either, so that the second line is a kernel over key columns.
// There S and G are known together only at the ends of chunks. Between these, d dd comes from running sums: for each
// key, with
//     E = sum over values of G * S, where G lacks the part that y of this step adds,
// the recurrences give
//     d dd = E + r dr - k dk - b db;  E_before = d dd + a da
// Nothing is divided by a decay: docs/kernels.md has the errors of this way and of two others.
// Values are the kept index in the first two kernels, keys in the third.
#include "wkv.cuh"

// How many blocks an SM shall have room for; 1 leaves the number of registers to ptxas.
constexpr int FORWARD_BLOCKS = AHEAD ? blocks_of(160) : 1, VALUES_BLOCKS = AHEAD ? blocks_of(128) : 1;
constexpr int KEYS_BLOCKS = AHEAD ? blocks_of(255) : 1;
constexpr float DECAY_SCALE = 0.6065306597126334f;  // e^-0.5

struct Decay {
    __device__ float operator()(float z) const {
        const float e = __expf(-fabsf(z));
        return __expf(-DECAY_SCALE * __fdividef(z < 0 ? e : 1.0f, 1.0f + e));
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
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
    load_rows(s, state_in + head.index * N * N, at);
    float* saved = saved_states ? saved_states + head.index * count_chunks(steps) * N * N : nullptr;
    Staged<N, io> staged_r, staged_z, staged_k, staged_a, staged_b;
    Staged<KEPT, io> staged_v;
    Starts staged_starts;
    const auto read_chunk = [&](long long t0) {
        const int rows = chunk_rows(steps, t0);
        const long long from = head.row(t0);
        staged_a.read(a + from, head.stride, rows);
        staged_z.read(z + from, head.stride, rows);
        staged_k.read(k + from, head.stride, rows);
        staged_b.read(b + from, head.stride, rows);
        staged_r.read(r + from, head.stride, rows);
        staged_v.read(v + from + blockIdx.y * KEPT, head.stride, rows);
        staged_starts.read(seq_start, head, t0, rows);
    };

    read_chunk(0);
    for (long long t0 = 0; t0 < steps; t0 += CHUNK) {
        const int rows = chunk_rows(steps, t0);
        const long long from = head.row(t0);
        const unsigned starts = staged_starts.mask(seq_start, head, t0, rows, at);
        __syncthreads();
        staged_a.write(as, a + from, head.stride, rows);
        staged_z.write(ds, z + from, head.stride, rows, Decay());
        staged_k.write(ks, k + from, head.stride, rows);
        staged_b.write(bs, b + from, head.stride, rows);
        staged_r.write(rs, r + from, head.stride, rows);
        staged_v.write(vs, v + from + blockIdx.y * KEPT, head.stride, rows);
        if (saved) store_rows(s, saved + t0 / CHUNK * N * N, at);
        __syncthreads();
        read_chunk(t0 + CHUNK);
        for (int t = 0; t < rows; t++) {
            const long long out = head.row(t0 + t) + at.kept;
            float x[SUM], d[SUM], u[KEEP] = {}, ys[KEEP] = {}, vt[KEEP];
            clear_if(starts >> t & 1, s);
            load_summed(as + t * N, at, x);
            add_sums(s, x, u, 0);
            sum_to_all<LANES>(u, at.warp);
            if (saved_u && at.lane == 0) store(saved_u + out, u);
            load(vs + (t * KEPT + at.in_block), vt);
            load_summed(ds + t * N, at, d);
            load_summed(ks + t * N, at, x);
            decay_and_add(s, d, vt, x);
            load_summed(bs + t * N, at, x);
            add_outer(s, u, x);
            load_summed(rs + t * N, at, x);
            add_sums(s, x, ys, 0);
            const float mine[1] = {sum_shared_out<LANES>(ys, at.lane, at.warp)};
            if (at.lane % 2 == 0) store(y + out + at.lane / 2, mine);
        }
    }
    store_rows(s, state_out + head.index * N * N, at);
}

// grad_state is the gradient of the last state, or null for zeros.
extern "C" __global__ void __launch_bounds__(THREADS, VALUES_BLOCKS)
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
    if (grad_state) load_rows(g, grad_state + head.index * N * N, at);
    Staged<N, io> staged_r, staged_z, staged_k, staged_a, staged_b;
    Staged<KEPT, io> staged_dy;
    Starts staged_starts;
    const auto read_chunk = [&](long long t0) {
        const int rows = chunk_rows(steps, t0);
        const long long from = head.row(t0);
        staged_r.read(r + from, head.stride, rows);
        staged_b.read(b + from, head.stride, rows);
        staged_k.read(k + from, head.stride, rows);
        staged_z.read(z + from, head.stride, rows);
        staged_a.read(a + from, head.stride, rows);
        staged_dy.read(dy + from + blockIdx.y * KEPT, head.stride, rows);
        staged_starts.read(seq_start, head, t0, rows);
    };

    const long long last = (count_chunks(steps) - 1) * CHUNK;  // where the last chunk begins
    read_chunk(last);
    for (long long t0 = last; t0 >= 0; t0 -= CHUNK) {
        const int rows = chunk_rows(steps, t0);
        const long long from = head.row(t0);
        const unsigned starts = staged_starts.mask(seq_start, head, t0, rows, at);
        __syncthreads();
        staged_r.write(rs, r + from, head.stride, rows);
        staged_b.write(bs, b + from, head.stride, rows);
        staged_k.write(ks, k + from, head.stride, rows);
        staged_z.write(ds, z + from, head.stride, rows, Decay());
        staged_a.write(as, a + from, head.stride, rows);
        staged_dy.write(dys, dy + from + blockIdx.y * KEPT, head.stride, rows);
        __syncthreads();
        read_chunk(t0 - CHUNK);
        for (int t = rows - 1; t >= 0; t--) {
            const long long out = head.row(t0 + t) + at.kept;
            float x[SUM], d[SUM], dut[KEEP] = {}, dvs[KEEP] = {}, dyt[KEEP];
            load(dys + (t * KEPT + at.in_block), dyt);
            load_summed(rs + t * N, at, x);
            add_outer(g, dyt, x);
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
            decay_and_add(g, d, dut, x);
            clear_if(starts >> t & 1, g);
        }
    }
    store_rows(g, dstate + head.index * N * N, at);
}

extern "C" __global__ void __launch_bounds__(THREADS, KEYS_BLOCKS)
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
    // Each of these holds an input until its last use in the chunk, then a gradient: k_dr first k and then dr.
    SHARED(float, k_dr, CHUNK * KEPT);
    SHARED(float, b_da, CHUNK * KEPT);
    SHARED(float, r_dk, CHUNK * KEPT);
    SHARED(float, a_db, CHUNK * KEPT);
    SHARED(float, ends, KEPT);
    const Place at;
    const Head head(steps, heads);
    Tile s, g;
    clear(g);
    if (grad_state) load_columns(g, grad_state + head.index * N * N, at);
    const float* saved = saved_states + head.index * count_chunks(steps) * N * N;
    Staged<N, io> staged_v, staged_dy;
    Staged<N, float> staged_u, staged_du;
    typedef Staged<KEPT, io> Kept;
    Kept staged_z, staged_k, staged_b, staged_r, staged_a;
    Starts staged_starts;
    const auto read_kept = [&](long long t0) {
        const int rows = chunk_rows(steps, t0);
        const long long from_kept = head.row(t0) + blockIdx.y * KEPT;
        staged_z.read(z + from_kept, head.stride, rows);
        staged_k.read(k + from_kept, head.stride, rows);
        staged_b.read(b + from_kept, head.stride, rows);
        staged_r.read(r + from_kept, head.stride, rows);
        staged_a.read(a + from_kept, head.stride, rows);
    };
    const auto read_summed = [&](long long t0) {
        const int rows = chunk_rows(steps, t0);
        const long long from = head.row(t0);
        staged_du.read(du + from, head.stride, rows);
        staged_u.read(saved_u + from, head.stride, rows);
        staged_v.read(v + from, head.stride, rows);
        staged_dy.read(dy + from, head.stride, rows);
        staged_starts.read(seq_start, head, t0, rows);
    };

    const long long last = (count_chunks(steps) - 1) * CHUNK;  // where the last chunk begins
    read_summed(last);
    read_kept(last);
    if (AHEAD && steps > 0) load_columns(s, saved + last / CHUNK * N * N, at);
    for (long long t0 = last; t0 >= 0; t0 -= CHUNK) {
        const int rows = chunk_rows(steps, t0);
        const long long from = head.row(t0), from_kept = from + blockIdx.y * KEPT;
        const unsigned starts = staged_starts.mask(seq_start, head, t0, rows, at);
        if (!AHEAD) load_columns(s, saved + t0 / CHUNK * N * N, at);
        __syncthreads();
        staged_v.write(vs, v + from, head.stride, rows);
        staged_u.write(us, saved_u + from, head.stride, rows);
        staged_dy.write(dys, dy + from, head.stride, rows);
        staged_du.write(dus, du + from, head.stride, rows);
        staged_z.write(ds, z + from_kept, head.stride, rows, Decay());
        staged_k.write(k_dr, k + from_kept, head.stride, rows);
        staged_b.write(b_da, b + from_kept, head.stride, rows);
        staged_r.write(r_dk, r + from_kept, head.stride, rows);
        staged_a.write(a_db, a + from_kept, head.stride, rows);
        __syncthreads();
        read_summed(t0 - CHUNK);

        for (int t = 0; t < rows; t++) {  // S goes through the chunk forwards
            const int row = t * KEPT + at.in_block;
            float x[SUM], w[SUM], sums[2 * KEEP] = {}, d[KEEP], kt[KEEP], bt[KEEP];
            clear_if(starts >> t & 1, s);
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
            add_sums(g, s, sums);
            const float mine[1] = {sum_shared_out<LANES>(sums, at.lane, at.warp)};
            if (at.lane % 2 == 0) store(ends + (at.in_block + at.lane / 2), mine);
        }
        if (AHEAD && t0 > 0) load_columns(s, saved + (t0 / CHUNK - 1) * N * N, at);
        for (int t = rows - 1; t >= 0; t--) {  // G goes through the chunk backwards
            const int row = t * KEPT + at.in_block;
            float x[SUM], sums[2 * KEEP] = {}, rt[KEEP], d[KEEP], as[KEEP];
            load(r_dk + row, rt);
            load(ds + row, d);
            load(a_db + row, as);
            load_summed(dys + t * N, at, x);
            add_outer(g, rt, x);
            load_summed(vs + t * N, at, x);
            add_sums(g, x, sums, 0);
            load_summed(us + t * N, at, x);
            add_sums(g, x, sums, KEEP);
            load_summed(dus + t * N, at, x);
#pragma unroll
            for (int q = 0; q < KEEP; q++)
#pragma unroll
                for (int e = 0; e < SUM; e++) g[q][e] = g[q][e] * d[q] + x[e] * as[q];
            clear_if(starts >> t & 1, g);
            const float mine[1] = {sum_shared_out<LANES>(sums, at.lane, at.warp)};
            __syncwarp(at.warp);  // all have read r and a
            store((at.lane < KEEP ? r_dk : a_db) + (row + at.lane % KEEP), mine);
        }
        __syncthreads();

        // The gradients are written out. r dr - k dk - b db takes the place of dr, and a da that of da.
#pragma unroll
        for (int n = 0; n < Kept::COUNT; n++) {
            const int t = Kept::row(n), column = Kept::column(n), row = t * KEPT + column;
            if (t >= rows) break;
            const long long out = from_kept + t * head.stride + column;
            float input[4], grad[4], change[4];
            load(k_dr + row, grad);
            staged_r.get(n, r + from_kept, head.stride, input);
            store(dr + out, grad);
#pragma unroll
            for (int q = 0; q < 4; q++) change[q] = input[q] * grad[q];
            load(r_dk + row, grad);
            staged_k.get(n, k + from_kept, head.stride, input);
            store(dk + out, grad);
#pragma unroll
            for (int q = 0; q < 4; q++) change[q] -= input[q] * grad[q];
            load(a_db + row, grad);
            staged_b.get(n, b + from_kept, head.stride, input);
            store(db + out, grad);
#pragma unroll
            for (int q = 0; q < 4; q++) change[q] -= input[q] * grad[q];
            store(k_dr + row, change);
            load(b_da + row, grad);
            staged_a.get(n, a + from_kept, head.stride, input);
            store(da + out, grad);
#pragma unroll
            for (int q = 0; q < 4; q++) change[q] = input[q] * grad[q];
            store(b_da + row, change);
        }
        __syncthreads();
        if (threadIdx.x < KEPT) {  // d dd takes the place of r dr - k dk - b db
            float end[1], change[CHUNK], a_da[CHUNK];
            load(ends + threadIdx.x, end);
#pragma unroll
            for (int t = 0; t < CHUNK; t++) {
                change[t] = t < rows ? READ_AS(float, k_dr + t * KEPT + threadIdx.x) : 0.0f;
                a_da[t] = t < rows ? READ_AS(float, b_da + t * KEPT + threadIdx.x) : 0.0f;
            }
#pragma unroll
            for (int t = CHUNK - 1; t >= 0; t--) {
                end[0] += change[t];
                if (starts >> t & 1) end[0] = 0.0f;
                if (t < rows) store(k_dr + (t * KEPT + threadIdx.x), end);
                end[0] += starts >> t & 1 ? 0.0f : a_da[t];  // where a document begins, a da may be 0 * infinity
            }
        }
        __syncthreads();
#pragma unroll
        for (int n = 0; n < Kept::COUNT; n++) {
            const int t = Kept::row(n), column = Kept::column(n);
            if (t >= rows) break;
            float x[4], grad[4];
            staged_z.get(n, z + from_kept, head.stride, x);
            load(k_dr + (t * KEPT + column), grad);
#pragma unroll
            for (int q = 0; q < 4; q++) {  // dz = d dd * the derivative of log(d) = -e^-0.5 sigmoid(z)
                const float e = __expf(-fabsf(x[q])), part = __fdividef(1.0f, 1.0f + e);
                grad[q] *= -DECAY_SCALE * e * part * part;
            }
            store(dz + (from_kept + t * head.stride + column), grad);
        }
        read_kept(t0 - CHUNK);
    }
}
