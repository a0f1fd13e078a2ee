// WKV-6 forward and backward. Each head has a state S of (key j, value i). With vectors as columns, products of two
// vectors element by element, and d = exp(-exp(w)), a step does, in this order:
//     S = 0 if seq_start;  y = S^T r + (r . (u k)) v;  S = diag(d) S + k v^T
// The inputs r, k, v, w and y are (B, T, H, N), u is (H, N), states are (B, H, N_key, N_value) fp32, seq_start is uint8
// (B, T) or null where no document begins. Options and launch: wkv.cuh. Alignment: common.cuh.
//     wkv6_forward          computes y and the last state, and saves the states for a backward (null: saves nothing);
//     wkv6_backward_values  computes the gradients of v and of the first state;
//     wkv6_backward_keys    computes those of r, k and w, and du (B, H, N) fp32, the gradient of u for each sequence of
//                           the batch, which the caller sums.
// grad_state is the gradient of the last state, or null for zeros.
//
// With G the gradient of the state after a step, the gradients are
//     dv = G^T k + (r . (u k)) dy;  G_before = diag(d) G + r dy^T                                sums over keys
//     dr = S_before dy + u k (v . dy);  dk = G v + u r (v . dy);  du = r k (v . dy)              sums over values
//     dd = sum over values of G * S_before;  dw = -exp(w) d dd
// The first line is the forward with the time reversed, r and k exchanged, and dy in the place of v: `scan` is both.
//
// For the other lines S and G are needed only in products with v and dy of the chunk's steps. For a chunk and a key,
// with S0 the state before the chunk (saved) and G1 the gradient of the state after it, these are
//     p[t] = G1 v_t;  q[t] = S0 dy_t;  e = G1 S0;  A[s][t] = v_s . dy_t, the same for all keys
// From them the recurrences of S and G, multiplied by the dy and v of other steps, go on as recurrences of numbers.
// A decay may be 0: nothing is divided by one, and nothing is the difference of two sums (docs/kernels.md).
#include "wkv.cuh"

constexpr int SCAN_BLOCKS = blocks_of(AHEAD ? 128 : N <= 64 ? 80 : 168);
constexpr int KEYS_BLOCKS = blocks_of(N <= 64 ? 168 : 255);

struct Exp {
    __device__ float operator()(float w) const { return expf(w); }
};
struct Decay {
    __device__ float operator()(float w) const { return expf(-expf(w)); }
};

// The forward (read = r, write = k, x = v), and backwards in time the gradients of v and of the state (read = k,
// write = r, x = dy). state_in may be null for zeros. Values are the kept index.
template <bool BACKWARD>
__device__ __forceinline__ void scan(const io* __restrict__ read, const io* __restrict__ write,
                                     const io* __restrict__ x, const io* __restrict__ w, const io* __restrict__ u,
                                     const float* __restrict__ state_in, const unsigned char* __restrict__ seq_start,
                                     io* __restrict__ y, float* __restrict__ state_out,
                                     float* __restrict__ saved_states, long long steps, long long heads) {
    check_launch();
    SHARED(float, reads, CHUNK * N);
    SHARED(float, writes, CHUNK * N);
    SHARED(float, ds, CHUNK * N);
    SHARED(float, xs, CHUNK * KEPT);
    SHARED(float, us, N);
    SHARED(float, bonus, CHUNK);  // r . (u k)
    const Place at;
    const Head head(steps, heads);
    const long long chunks = count_chunks(steps);
    Tile s;
    clear(s);
    if (state_in) load_columns(s, state_in + head.index * N * N, at);
    stage<N>(us, u + head.index % heads * N, 0, 1);
    Staged<N, io> staged_read, staged_write, staged_w;
    Staged<KEPT, io> staged_x;
    Starts staged_starts;
    const auto read_chunk = [&](long long t0) {
        const int rows = chunk_rows(steps, t0);
        const long long from = head.row(t0);
        staged_read.read(read + from, head.stride, rows);
        staged_write.read(write + from, head.stride, rows);
        staged_w.read(w + from, head.stride, rows);
        staged_x.read(x + from + blockIdx.y * KEPT, head.stride, rows);
        staged_starts.read(seq_start, head, t0, rows);
    };

    const long long first = BACKWARD ? (chunks - 1) * CHUNK : 0, next = BACKWARD ? -CHUNK : CHUNK;
    read_chunk(first);
    for (long long t0 = first; t0 >= 0 && t0 < steps; t0 += next) {
        const long long from = head.row(t0);
        const int rows = chunk_rows(steps, t0);
        const unsigned starts = staged_starts.mask(seq_start, head, t0, rows, at);
        __syncthreads();
        staged_read.write(reads, read + from, head.stride, rows);
        staged_write.write(writes, write + from, head.stride, rows);
        staged_w.write(ds, w + from, head.stride, rows, Decay());
        staged_x.write(xs, x + from + blockIdx.y * KEPT, head.stride, rows);
        if (saved_states) store_columns(s, saved_states + (head.index * chunks + t0 / CHUNK) * N * N, at);
        __syncthreads();
        read_chunk(t0 + next);
        for (int t = threadIdx.x / LANES; t < CHUNK; t += THREADS / LANES) {
            float a[SUM], b[SUM], sum[1] = {};
            if (t < rows) {
                load_summed(reads + t * N, at, a);
                load_summed(writes + t * N, at, b);
#pragma unroll
                for (int e = 0; e < SUM; e++) a[e] *= b[e];
                load_summed(us, at, b);
#pragma unroll
                for (int e = 0; e < SUM; e++) sum[0] += a[e] * b[e];
            }
            sum_to_all<LANES>(sum, at.warp);
            if (at.lane == 0) store(bonus + t, sum);
        }
        __syncthreads();
        for (int j = 0; j < rows; j++) {
            const int t = BACKWARD ? rows - 1 - j : j;
            float a[SUM], d[SUM], xt[KEEP], ys[KEEP];
            clear_if(!BACKWARD && starts >> t & 1, s);
            const float own = at.lane == 0 ? READ_AS(float, bonus + t) : 0.0f;  // added by one lane alone
            load(xs + (t * KEPT + at.in_block), xt);
#pragma unroll
            for (int q = 0; q < KEEP; q++) ys[q] = own * xt[q];
            load_summed(reads + t * N, at, a);
            add_sums(s, a, ys, 0);
            load_summed(ds + t * N, at, d);
            load_summed(writes + t * N, at, a);
            decay_and_add(s, d, xt, a);
            clear_if(BACKWARD && starts >> t & 1, s);
            const float mine[1] = {sum_shared_out<LANES>(ys, at.lane, at.warp)};
            if (at.lane % 2 == 0) store(y + head.row(t0 + t) + at.kept + at.lane / 2, mine);
        }
    }
    store_columns(s, state_out + head.index * N * N, at);
}

extern "C" __global__ void __launch_bounds__(THREADS, SCAN_BLOCKS)
    wkv6_forward(const io* __restrict__ r, const io* __restrict__ k, const io* __restrict__ v,
                 const io* __restrict__ w, const io* __restrict__ u, const float* __restrict__ state_in,
                 const unsigned char* __restrict__ seq_start, io* __restrict__ y, float* __restrict__ state_out,
                 float* __restrict__ saved_states, long long steps, long long heads) {
    scan<false>(r, k, v, w, u, state_in, seq_start, y, state_out, saved_states, steps, heads);
}

extern "C" __global__ void __launch_bounds__(THREADS, SCAN_BLOCKS)
    wkv6_backward_values(const io* __restrict__ r, const io* __restrict__ k, const io* __restrict__ w,
                         const io* __restrict__ u, const unsigned char* __restrict__ seq_start,
                         const io* __restrict__ dy, const float* __restrict__ grad_state, io* __restrict__ dv,
                         float* __restrict__ dstate, long long steps, long long heads) {
    scan<true>(k, r, dy, w, u, grad_state, seq_start, dv, dstate, nullptr, steps, heads);
}

// Computes A[s][t] = v_s . dy_t, and behind it the same in reversed time: v_(15 - t) . dy_(15 - s) at [s][t].
__device__ __forceinline__ void multiply_steps(Shared<float> products, Shared<float> vs, Shared<float> dys,
                                               const Place& at) {
    for (int s = threadIdx.x / LANES; s < CHUNK; s += THREADS / LANES) {
        float v[SUM], dy[SUM];
        load_summed(vs + s * N, at, v);
#pragma unroll 1
        for (int t0 = 0; t0 < CHUNK; t0 += LANES) {
            float sums[LANES] = {};
#pragma unroll
            for (int t = 0; t < LANES; t++) {
                load_summed(dys + (t0 + t) * N, at, dy);
#pragma unroll
                for (int e = 0; e < SUM; e++) sums[t] += v[e] * dy[e];
            }
            const float mine[1] = {sum_shared_out<LANES>(sums, at.lane, at.warp)};
            const int t = t0 + at.lane;
            store(products + (s * CHUNK + t), mine);
            store(products + (CHUNK * CHUNK + (CHUNK - 1 - t) * CHUNK + CHUNK - 1 - s), mine);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, KEYS_BLOCKS)
    wkv6_backward_keys(const io* __restrict__ r, const io* __restrict__ k, const io* __restrict__ v,
                       const io* __restrict__ w, const io* __restrict__ u,
                       const unsigned char* __restrict__ seq_start, const float* __restrict__ saved_states,
                       const io* __restrict__ dy, const float* __restrict__ grad_state, io* __restrict__ dr,
                       io* __restrict__ dk, io* __restrict__ dw, float* __restrict__ du, long long steps,
                       long long heads) {
    check_launch();
    SHARED(float, v_c, CHUNK * N);  // v until its last use in the chunk, then each dy's factor in G before the chunk
    SHARED(float, dys, CHUNK * N);
    SHARED(float, rs, CHUNK * KEPT);
    SHARED(float, ks, CHUNK * KEPT);
    SHARED(float, exps, CHUNK * KEPT);  // exp(w)
    SHARED(float, ps, CHUNK * KEPT);
    SHARED(float, qs, CHUNK * KEPT);
    SHARED(float, products, 2 * CHUNK * CHUNK);
    SHARED(float, ends, KEPT);    // e
    SHARED(float, decays, KEPT);  // the product of all decays of the chunk
    const Place at;
    const Head head(steps, heads);
    const long long chunks = count_chunks(steps);
    // Each key has two threads: one goes through the chunk's steps forwards, the other backwards.
    const int key = threadIdx.x % KEPT;
    const bool back = threadIdx.x >= KEPT;
    const Shared<float> enters = back ? rs : ks, leaves = back ? ks : rs;
    const float u_key = to_float(READ_AS(io, u + head.index % heads * N + blockIdx.y * KEPT + key));
    float du_key[1] = {};
    Tile s, g;
    clear(g);
    if (grad_state) load_rows(g, grad_state + head.index * N * N, at);

    // The last chunk comes first, and may be short. With r = k = v = dy = 0 and d = 1 the steps that it lacks change
    // nothing.
    fill_zeros(v_c, CHUNK * N);
    fill_zeros(dys, CHUNK * N);
    fill_zeros(rs, CHUNK * KEPT);
    fill_zeros(ks, CHUNK * KEPT);
    fill_zeros(exps, CHUNK * KEPT);
    Staged<N, io> staged_v, staged_dy;
    Staged<KEPT, io> staged_r, staged_k, staged_w;
    Starts staged_starts;
    const auto read_chunk = [&](long long t0) {
        const int rows = chunk_rows(steps, t0);
        const long long from = head.row(t0), from_kept = from + blockIdx.y * KEPT;
        staged_v.read(v + from, head.stride, rows);
        staged_dy.read(dy + from, head.stride, rows);
        staged_r.read(r + from_kept, head.stride, rows);
        staged_k.read(k + from_kept, head.stride, rows);
        staged_w.read(w + from_kept, head.stride, rows);
        staged_starts.read(seq_start, head, t0, rows);
    };

    read_chunk((chunks - 1) * CHUNK);
    for (long long chunk = chunks - 1; chunk >= 0; chunk--) {
        const long long t0 = chunk * CHUNK, from = head.row(t0), from_kept = from + blockIdx.y * KEPT;
        const int rows = chunk_rows(steps, t0);
        const unsigned starts = staged_starts.mask(seq_start, head, t0, rows, at);
        load_rows(s, saved_states + (head.index * chunks + chunk) * N * N, at);
        if (starts & 1) clear(s);
        __syncthreads();
        staged_v.write(v_c, v + from, head.stride, rows);
        staged_dy.write(dys, dy + from, head.stride, rows);
        staged_r.write(rs, r + from_kept, head.stride, rows);
        staged_k.write(ks, k + from_kept, head.stride, rows);
        staged_w.write(exps, w + from_kept, head.stride, rows, Exp());
        __syncthreads();
        read_chunk(t0 - CHUNK);

        multiply_steps(products, v_c, dys, at);
#pragma unroll 1
        for (int t = 0; t < CHUNK; t++) {
            float x[SUM], sums[2 * KEEP] = {};
            load_summed(v_c + t * N, at, x);
            add_sums(g, x, sums, 0);
            load_summed(dys + t * N, at, x);
            add_sums(s, x, sums, KEEP);
            const float mine[1] = {sum_shared_out<LANES>(sums, at.lane, at.warp)};
            store((at.lane < KEEP ? ps : qs) + (t * KEPT + at.in_block + at.lane % KEEP), mine);
        }
        {
            float sums[KEEP] = {};
            add_sums(g, s, sums);
            const float mine[1] = {sum_shared_out<LANES>(sums, at.lane, at.warp)};
            if (at.lane % 2 == 0) store(ends + (at.in_block + at.lane / 2), mine);
        }
        __syncthreads();

        // S goes through the chunk forwards, in products with dy. Before step i
        //     x[t] = S dy_t for t >= i, where x[i] is the part of dr that comes from S;  end = G1 S
        // dd of step i is G S. It is made of end by going from G1 back to G, one step behind i at a time, by
        //     G_before S = d (G S) + r (S dy)
        // The backward threads take G through the chunk in the same way, with r, S, G1, v in the place of k, G, S0, dy,
        // and count the steps from the end. The fewer steps a direction has left, the cheaper is dd, so that each
        // computes it for the second half of its steps.
        {
            const Shared<float> dots = back ? ps : qs, others = back ? qs : ps;
            const unsigned clears = back ? __brev(starts) >> (31 - CHUNK) : starts;  // bit i: clear before step i
            const long long next = back ? -head.stride : head.stride;
            long long out = from_kept + key + (back ? (CHUNK - 1) * head.stride : 0);
            float x[CHUNK], d[CHUNK], leaving[CHUNK], end = READ_AS(float, ends + key), decay = 1.0f;
#pragma unroll
            for (int i = 0; i < CHUNK; i++) {
                const int row = (back ? CHUNK - 1 - i : i) * KEPT + key;
                x[i] = READ_AS(float, dots + row);
                d[i] = expf(-READ_AS(float, exps + row));
                if (i > CHUNK / 2) leaving[i] = READ_AS(float, leaves + row);
            }
#pragma unroll
            for (int i = 0; i < CHUNK; i++) {
                const int step = back ? CHUNK - 1 - i : i, row = step * KEPT + key;
                const float entering = READ_AS(float, enters + row);
                float a[CHUNK], grad[1];
#pragma unroll
                for (int c = i / 4; c < CHUNK / 4; c++)
                    load(products + ((back ? CHUNK + i : i) * CHUNK + c * 4), reinterpret_cast<float(&)[4]>(a[c * 4]));
                if (clears >> i & 1) {
                    end = 0.0f;
#pragma unroll
                    for (int t = i; t < CHUNK; t++) x[t] = 0.0f;
                }
                grad[0] = x[i] + u_key * entering * a[i];
                if (step < rows) store((back ? dk : dr) + out, grad);
                if (i >= CHUNK / 2) {
                    float dd = end;
#pragma unroll
                    for (int t = CHUNK - 1; t > i; t--) {
                        dd = dd * d[t] + leaving[t] * x[t];
                        if (clears >> t & 1) dd = 0.0f;
                    }
                    grad[0] = d[i] == 0.0f ? 0.0f : -READ_AS(float, exps + row) * d[i] * dd;  // not infinity * 0
                    if (step < rows) store(dw + out, grad);
                }
#pragma unroll
                for (int t = i + 1; t < CHUNK; t++) x[t] = x[t] * d[i] + entering * a[t];
                end = end * d[i] + entering * READ_AS(float, others + row);
                out += next;
                if (!back) {
                    const float other = READ_AS(float, leaves + row);
                    WRITE_AS(float, v_c + row) = other * decay;
                    decay *= d[i];
                    du_key[0] += entering * other * a[i];
                }
            }
            if (!back) WRITE_AS(float, decays + key) = decay;
        }
        __syncthreads();

        float decay[KEEP];
        load(decays + at.in_block, decay);
#pragma unroll
        for (int q = 0; q < KEEP; q++)
#pragma unroll
            for (int e = 0; e < SUM; e++) g[q][e] = starts ? 0.0f : g[q][e] * decay[q];
        for (int t = 0; t < rows && !(starts >> t & 1); t++) {
            float c[KEEP], x[SUM];
            load(v_c + (t * KEPT + at.in_block), c);
            load_summed(dys + t * N, at, x);
            add_outer(g, c, x);
        }
    }
    if (!back) store(du + head.index * N + blockIdx.y * KEPT + key, du_key);
}
