// What RWKV computes between its matrix products, forward and backward: each op is one pass over memory, where a chain
// of small operations has one for each of them. dx is the gradient of x. The formulas are those of
// rwkv_miss/ops/fused_torch.py. B batch, T steps, C channels, H heads of N, C = H N, N a multiple of 8 up to 256.
//     token_mix        out_i = x + (prev - x) (mixes_i + extra_i) for i < n_mixes; prev is x of the step before,
//                      `last` at a sequence's first step, and 0 where a document begins
//     wkv7_arguments   k_out = k (1 + (s - 1) k_a), minus_kk = -kk, kk_rate = kk s, with s = sigmoid(a), kk = k k_k over
//                      its norm in the head; v_out = v + (v_first - v) sigmoid(nu), if there is a v_first
//     wkv7_output      out = (norm(y) weight + bias + (sum over the head of r k r_k) v) g
//     wkv6_output      out = (norm(y) weight + bias) g sigmoid(g); norm: less the head's mean, over its deviation
//     relu_squared     out = relu(x)^2
//     gated            out = sigmoid(gate) x
// Tensors are (B, T, C), parameters of the model (C); but last is (B, C), mixes (n_mixes, C), extra (n_mixes, B, T, C),
// and seq_start uint8 (B, T), or null where no document begins. All is computed in fp32 and rounded once. A tensor that
// is not there is null, and so is a gradient that is not wanted.
//
// Launch: blocks of THREADS threads. The last two ops: one thread for each WIDTH of `count` elements. The others: grid
// (any number of blocks, which share the B T rows; as many as the heads need, see Place). A thread has WIDTH channels,
// and goes through the rows of its block. So it sums the gradient of a parameter over them: of each parameter the block
// writes its sums into (blocks in x, shape of the parameter) fp32, and the caller adds these.
#include "common.cuh"

constexpr int THREADS = 128, WIDTH = 8, MAX_MIXES = 6;
// How many blocks an SM shall have room for: without it ptxas spills registers to make room for more.
constexpr int FORWARD_BLOCKS = 6, BACKWARD_BLOCKS = 3;
constexpr float NORM_AT_LEAST = 1e-12f;  // of F.normalize
typedef float Values[WIDTH];

// WIDTH neighbours, in accesses of 16 bytes.
constexpr int AT_ONCE = 16 / sizeof(io);
__device__ __forceinline__ void load_values(const io* from, Values& x) {
#pragma unroll
    for (int i = 0; i < WIDTH; i += AT_ONCE) load(from + i, reinterpret_cast<float(&)[AT_ONCE]>(x[i]));
}
__device__ __forceinline__ void store_values(io* to, const Values& x) {
#pragma unroll
    for (int i = 0; i < WIDTH; i += AT_ONCE) store(to + i, reinterpret_cast<const float(&)[AT_ONCE]>(x[i]));
}
__device__ __forceinline__ void clear(Values& x) {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) x[i] = 0.0f;
}

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

// Where a thread stands. A head belongs to `lanes` neighbouring threads, a power of two, so that sums over it are
// exchanges within a warp; those behind its last channel are not `inside`, read zeros and write nothing.
struct Place {
    long long width, channel, first, end;  // rows from first to end - 1
    int lanes;
    bool inside;

    __device__ Place(long long rows, long long heads, long long n) : width(heads * n), lanes(1) {
        while (lanes * WIDTH < n) lanes *= 2;
        const long long in_block = THREADS / lanes;
        if (blockDim.x != THREADS || gridDim.y != (heads + in_block - 1) / in_block || lanes > 32) __trap();
        const long long head = blockIdx.y * in_block + threadIdx.x / lanes, in_head = threadIdx.x % lanes * WIDTH;
        channel = head * n + in_head;
        inside = head < heads && in_head < n;
        const long long share = (rows + gridDim.x - 1) / gridDim.x;
        first = blockIdx.x * share < rows ? blockIdx.x * share : rows;
        end = rows - first < share ? rows : first + share;
    }
    __device__ __forceinline__ void load(const io* from, long long row, Values& x) const {
        clear(x);
        if (inside && from) load_values(from + row * width + channel, x);
    }
    __device__ __forceinline__ void store(io* to, long long row, const Values& x) const {
        if (inside && to) store_values(to + row * width + channel, x);
    }
    __device__ __forceinline__ void store_part(float* to, long long row, const Values& x) const {
        if (!inside || !to) return;
        ::store(to + row * width + channel, reinterpret_cast<const float(&)[4]>(x[0]));
        ::store(to + row * width + channel + 4, reinterpret_cast<const float(&)[4]>(x[4]));
    }
    // Replaces each x[q] by its sum over the head.
    template <int COUNT>
    __device__ __forceinline__ void sum_head(float (&x)[COUNT]) const {
        for (int step = lanes / 2; step > 0; step /= 2)
#pragma unroll
            for (int q = 0; q < COUNT; q++) x[q] += __shfl_xor_sync(0xffffffffu, x[q], step);
    }
};

// ---- token_mix: a head size of WIDTH, since nothing is summed over heads

__device__ __forceinline__ bool begins(const unsigned char* seq_start, long long row) {
    return seq_start && READ_AS(unsigned char, seq_start + row) != 0;
}
// What step t of a sequence, a row, is mixed with. The row before is in the L1 cache: the thread has just read it, or
// will.
__device__ __forceinline__ void load_previous(const io* x, const io* last, const unsigned char* seq_start,
                                              long long row, long long sequence, long long t, const Place& at,
                                              Values& previous) {
    if (begins(seq_start, row)) clear(previous);
    else at.load(t ? x : last, t ? row - 1 : sequence, previous);
}
__device__ __forceinline__ void load_share(const io* mixes, const io* extra, int i, long long row, long long rows,
                                           const Place& at, Values& share) {
    Values added;
    at.load(mixes, i, share);
    at.load(extra, i * rows + row, added);
#pragma unroll
    for (int c = 0; c < WIDTH; c++) share[c] += added[c];
}

extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    token_mix_forward(const io* __restrict__ x, const io* __restrict__ last,
                      const unsigned char* __restrict__ seq_start, const io* __restrict__ mixes,
                      const io* __restrict__ extra, io* __restrict__ out0, io* __restrict__ out1,
                      io* __restrict__ out2, io* __restrict__ out3, io* __restrict__ out4, io* __restrict__ out5,
                      long long batch, long long steps, long long channels, long long n_mixes) {
    const long long rows = batch * steps;
    const Place at(rows, channels / WIDTH, WIDTH);
    io* const outs[MAX_MIXES] = {out0, out1, out2, out3, out4, out5};
    long long sequence = at.first / steps, t = at.first % steps;
    for (long long row = at.first; row < at.end; row++) {
        Values now, previous;
        at.load(x, row, now);
        load_previous(x, last, seq_start, row, sequence, t, at, previous);
        if (++t == steps) sequence++, t = 0;
#pragma unroll
        for (int i = 0; i < MAX_MIXES; i++) {
            if (i == n_mixes) break;
            Values share, out;
            load_share(mixes, extra, i, row, rows, at, share);
#pragma unroll
            for (int c = 0; c < WIDTH; c++) out[c] = now[c] + (previous[c] - now[c]) * share[c];
            at.store(outs[i], row, out);
        }
    }
}

// With m_i = mixes_i + extra_i, dx of step t is the sum of dout_i (1 - m_i) at t and, unless a document or a sequence
// begins at t + 1, of dout_i m_i at t + 1. The gradients of mixes and extra are dout_i (prev - x). The rows are taken
// backwards, so that what a step hands on to the one before it is at hand.
extern "C" __global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS)
    token_mix_backward(const io* __restrict__ x, const io* __restrict__ last,
                       const unsigned char* __restrict__ seq_start, const io* __restrict__ mixes,
                       const io* __restrict__ extra, const io* __restrict__ dout0, const io* __restrict__ dout1,
                       const io* __restrict__ dout2, const io* __restrict__ dout3, const io* __restrict__ dout4,
                       const io* __restrict__ dout5, io* __restrict__ dx, io* __restrict__ dlast,
                       float* __restrict__ dmixes, io* __restrict__ dextra, long long batch, long long steps,
                       long long channels, long long n_mixes) {
    const long long rows = batch * steps;
    const Place at(rows, channels / WIDTH, WIDTH);
    const io* const douts[MAX_MIXES] = {dout0, dout1, dout2, dout3, dout4, dout5};
    Values sums[MAX_MIXES] = {}, from_next = {};
    // The step behind the block's last, of the same sequence, is another block's: what it hands on is computed here
    // too.
    long long row = at.end % steps ? at.end : at.end - 1, sequence = row / steps, t = row % steps;
    for (; row >= at.first; row--) {
        const bool mine = row < at.end, differences = mine && (dmixes || dextra);
        Values difference, now, own = {}, to_previous = {};
        if (differences) {
            load_previous(x, last, seq_start, row, sequence, t, at, difference);
            at.load(x, row, now);
#pragma unroll
            for (int c = 0; c < WIDTH; c++) difference[c] -= now[c];
        }
#pragma unroll
        for (int i = 0; i < MAX_MIXES; i++) {
            if (i == n_mixes) break;
            Values share, d;
            at.load(douts[i], row, d);
            load_share(mixes, extra, i, row, rows, at, share);
#pragma unroll
            for (int c = 0; c < WIDTH; c++) {
                own[c] += d[c] * (1.0f - share[c]);
                to_previous[c] += d[c] * share[c];
            }
            if (differences) {
#pragma unroll
                for (int c = 0; c < WIDTH; c++) {
                    d[c] *= difference[c];
                    sums[i][c] += d[c];
                }
                at.store(dextra, i * rows + row, d);
            }
        }
#pragma unroll
        for (int c = 0; c < WIDTH; c++) own[c] += from_next[c];
        if (begins(seq_start, row)) clear(to_previous);
        if (mine) at.store(dx, row, own);
        if (mine && t == 0) at.store(dlast, sequence, to_previous);
#pragma unroll
        for (int c = 0; c < WIDTH; c++) from_next[c] = t == 0 ? 0.0f : to_previous[c];
        if (t-- == 0) sequence--, t = steps - 1;
    }
#pragma unroll
    for (int i = 0; i < MAX_MIXES; i++)
        if (i < n_mixes) at.store_part(dmixes, blockIdx.x * n_mixes + i, sums[i]);
}

// ---- wkv7_arguments

// 1 / max(norm of the head, NORM_AT_LEAST), of the sum of its squares; a NaN stays a NaN.
__device__ __forceinline__ float inverse_norm(float squares) {
    return squares < NORM_AT_LEAST * NORM_AT_LEAST ? 1.0f / NORM_AT_LEAST : rsqrtf(squares);
}

extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    wkv7_arguments_forward(const io* __restrict__ k, const io* __restrict__ v, const io* __restrict__ v_first,
                           const io* __restrict__ a, const io* __restrict__ nu, const io* __restrict__ k_k,
                           const io* __restrict__ k_a, io* __restrict__ k_out, io* __restrict__ v_out,
                           io* __restrict__ minus_kk, io* __restrict__ kk_rate, long long rows, long long heads,
                           long long n) {
    const Place at(rows, heads, n);
    Values scale, rate;
    at.load(k_k, 0, scale);
    at.load(k_a, 0, rate);
    for (long long row = at.first; row < at.end; row++) {
        Values x, y, removed, written;
        float squares[1] = {};
        at.load(k, row, x);
        at.load(a, row, y);
#pragma unroll
        for (int c = 0; c < WIDTH; c++) {
            const float s = sigmoid(y[c]), u = x[c] * scale[c];
            removed[c] = -u, written[c] = u * s;
            squares[0] += u * u;
            y[c] = x[c] * (1.0f + (s - 1.0f) * rate[c]);
        }
        at.store(k_out, row, y);
        at.sum_head(squares);
        const float inverse = inverse_norm(squares[0]);
#pragma unroll
        for (int c = 0; c < WIDTH; c++) removed[c] *= inverse, written[c] *= inverse;
        at.store(minus_kk, row, removed);
        at.store(kk_rate, row, written);
        if (!v_first) continue;
        Values first, gate;
        at.load(v, row, x);
        at.load(v_first, row, first);
        at.load(nu, row, gate);
#pragma unroll
        for (int c = 0; c < WIDTH; c++) x[c] += (first[c] - x[c]) * sigmoid(gate[c]);
        at.store(v_out, row, x);
    }
}

// With u = k k_k and g the gradient of kk, that of u is (g - kk (kk . g)) / norm, and g / NORM_AT_LEAST where the norm
// is less than that.
extern "C" __global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS)
    wkv7_arguments_backward(const io* __restrict__ k, const io* __restrict__ v, const io* __restrict__ v_first,
                            const io* __restrict__ a, const io* __restrict__ nu, const io* __restrict__ k_k,
                            const io* __restrict__ k_a, const io* __restrict__ dk_out, const io* __restrict__ dv_out,
                            const io* __restrict__ dminus_kk, const io* __restrict__ dkk_rate, io* __restrict__ dk,
                            io* __restrict__ dv, io* __restrict__ dv_first, io* __restrict__ da,
                            io* __restrict__ dnu, float* __restrict__ dk_k, float* __restrict__ dk_a,
                            long long rows, long long heads, long long n) {
    const Place at(rows, heads, n);
    Values scale, rate, dscale = {}, drate = {};
    at.load(k_k, 0, scale);
    at.load(k_a, 0, rate);
    for (long long row = at.first; row < at.end; row++) {
        Values x, s, dkey, dremoved, dwritten, g;
        float sums[2] = {};  // of u^2 and of u g
        at.load(k, row, x);
        at.load(a, row, s);
        at.load(dk_out, row, dkey);
        at.load(dminus_kk, row, dremoved);
        at.load(dkk_rate, row, dwritten);
#pragma unroll
        for (int c = 0; c < WIDTH; c++) {
            const float u = x[c] * scale[c];
            s[c] = sigmoid(s[c]);
            g[c] = dwritten[c] * s[c] - dremoved[c];
            sums[0] += u * u;
            sums[1] += u * g[c];
        }
        at.sum_head(sums);
        const float inverse = inverse_norm(sums[0]);
        const float along = inverse == 1.0f / NORM_AT_LEAST ? 0.0f : sums[1] * inverse * inverse;
#pragma unroll
        for (int c = 0; c < WIDTH; c++) {
            const float u = x[c] * scale[c], du = inverse * (g[c] - u * along);
            dscale[c] += du * x[c];
            drate[c] += dkey[c] * x[c] * (s[c] - 1.0f);
            const float ds = dwritten[c] * u * inverse + dkey[c] * x[c] * rate[c];
            x[c] = dkey[c] * (1.0f + (s[c] - 1.0f) * rate[c]) + du * scale[c];
            s[c] = ds * s[c] * (1.0f - s[c]);
        }
        at.store(dk, row, x);
        at.store(da, row, s);
        if (!v_first) continue;
        Values first, gate, d;
        at.load(v, row, x);
        at.load(v_first, row, first);
        at.load(nu, row, gate);
        at.load(dv_out, row, d);
#pragma unroll
        for (int c = 0; c < WIDTH; c++) {
            const float open = sigmoid(gate[c]);
            gate[c] = d[c] * (first[c] - x[c]) * open * (1.0f - open);
            first[c] = d[c] * open;
            x[c] = d[c] * (1.0f - open);
        }
        at.store(dv, row, x);
        at.store(dv_first, row, first);
        at.store(dnu, row, gate);
    }
    at.store_part(dk_k, blockIdx.x, dscale);
    at.store_part(dk_a, blockIdx.x, drate);
}

// ---- wkv7_output and wkv6_output. eps: the bits of a float.

// What the normed y is multiplied by, as a function of g, and its derivative.
template <bool IS_7>
struct Gate {
    static __device__ float value(float g) { return IS_7 ? g : g * sigmoid(g); }
    static __device__ float derivative(float g) {
        return IS_7 ? 1.0f : sigmoid(g) * (1.0f + g * (1.0f - sigmoid(g)));
    }
};

template <bool IS_7>
__device__ __forceinline__ void output_forward(const io* y, const io* r, const io* k, const io* v, const io* g,
                                               const io* weight, const io* bias, const io* r_k, long long eps, io* out,
                                               long long rows, long long heads, long long n) {
    const Place at(rows, heads, n);
    const float part = 1.0f / static_cast<float>(n), added = __uint_as_float(static_cast<unsigned>(eps));
    Values weights, biases, bonus;
    at.load(weight, 0, weights);
    at.load(bias, 0, biases);
    at.load(r_k, 0, bonus);
    for (long long row = at.first; row < at.end; row++) {
        Values ys, rs, ks, vs, gs;
        float sums[2] = {}, squares[1] = {};  // of y and of r k r_k
        at.load(y, row, ys);
        at.load(r, row, rs);
        at.load(k, row, ks);
        at.load(v, row, vs);
        at.load(g, row, gs);
#pragma unroll
        for (int c = 0; c < WIDTH; c++) {
            sums[0] += ys[c];
            sums[1] += rs[c] * ks[c] * bonus[c];
        }
        at.sum_head(sums);
#pragma unroll
        for (int c = 0; c < WIDTH; c++) {
            ys[c] = at.inside ? ys[c] - sums[0] * part : 0.0f;
            squares[0] += ys[c] * ys[c];
        }
        at.sum_head(squares);
        const float scale = rsqrtf(squares[0] * part + added);
#pragma unroll
        for (int c = 0; c < WIDTH; c++) {
            ys[c] = ys[c] * scale * weights[c] + biases[c];
            if (IS_7) ys[c] += sums[1] * vs[c];
            ys[c] *= Gate<IS_7>::value(gs[c]);
        }
        at.store(out, row, ys);
    }
}

// With m = dout gate and p = m weight, dy = (p - mean of p - norm(y) (mean of p norm(y))) / deviation. With d the sum
// of m v over the head, the gradients of r, k, v are d k r_k, d r r_k, m (sum of r k r_k).
template <bool IS_7>
__device__ __forceinline__ void output_backward(const io* y, const io* r, const io* k, const io* v, const io* g,
                                                const io* weight, const io* bias, const io* r_k, long long eps,
                                                const io* dout, io* dy, io* dr, io* dk, io* dv, io* dg,
                                                float* dweight, float* dbias, float* dr_k, long long rows,
                                                long long heads, long long n) {
    const Place at(rows, heads, n);
    const float part = 1.0f / static_cast<float>(n), added = __uint_as_float(static_cast<unsigned>(eps));
    Values weights, biases, bonus, dweights = {}, dbiases = {}, dbonus = {};
    at.load(weight, 0, weights);
    at.load(bias, 0, biases);
    at.load(r_k, 0, bonus);
    for (long long row = at.first; row < at.end; row++) {
        Values ys, rs, ks, vs, gs, ds;
        float sums[2] = {}, more[4] = {};  // of y and of r k r_k; then of (y - mean)^2, p, p (y - mean) and m v
        at.load(y, row, ys);
        at.load(r, row, rs);
        at.load(k, row, ks);
        at.load(v, row, vs);
        at.load(g, row, gs);
        at.load(dout, row, ds);
#pragma unroll
        for (int c = 0; c < WIDTH; c++) {
            sums[0] += ys[c];
            sums[1] += rs[c] * ks[c] * bonus[c];
        }
        at.sum_head(sums);
#pragma unroll
        for (int c = 0; c < WIDTH; c++) {
            ys[c] = at.inside ? ys[c] - sums[0] * part : 0.0f;
            const float m = ds[c] * Gate<IS_7>::value(gs[c]), p = m * weights[c];
            more[0] += ys[c] * ys[c];
            more[1] += p;
            more[2] += p * ys[c];
            more[3] += m * vs[c];
        }
        at.sum_head(more);
        const float scale = rsqrtf(more[0] * part + added);
        const float mean = more[1] * part, along = more[2] * scale * part;  // of p and of p norm(y)
#pragma unroll
        for (int c = 0; c < WIDTH; c++) {
            const float normed = ys[c] * scale, m = ds[c] * Gate<IS_7>::value(gs[c]), key = ks[c];
            dweights[c] += m * normed;
            dbiases[c] += m;
            dbonus[c] += more[3] * rs[c] * key;
            ys[c] = scale * (m * weights[c] - mean - normed * along);
            gs[c] = ds[c] * (normed * weights[c] + biases[c] + sums[1] * vs[c]) * Gate<IS_7>::derivative(gs[c]);
            ks[c] = more[3] * rs[c] * bonus[c];
            rs[c] = more[3] * key * bonus[c];
            vs[c] = m * sums[1];
        }
        at.store(dy, row, ys);
        at.store(dr, row, rs);
        at.store(dk, row, ks);
        at.store(dv, row, vs);
        at.store(dg, row, gs);
    }
    at.store_part(dweight, blockIdx.x, dweights);
    at.store_part(dbias, blockIdx.x, dbiases);
    at.store_part(dr_k, blockIdx.x, dbonus);
}

extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    wkv7_output_forward(const io* __restrict__ y, const io* __restrict__ r, const io* __restrict__ k,
                        const io* __restrict__ v, const io* __restrict__ g, const io* __restrict__ weight,
                        const io* __restrict__ bias, const io* __restrict__ r_k, long long eps, io* __restrict__ out,
                        long long rows, long long heads, long long n) {
    output_forward<true>(y, r, k, v, g, weight, bias, r_k, eps, out, rows, heads, n);
}

extern "C" __global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS)
    wkv7_output_backward(const io* __restrict__ y, const io* __restrict__ r, const io* __restrict__ k,
                         const io* __restrict__ v, const io* __restrict__ g, const io* __restrict__ weight,
                         const io* __restrict__ bias, const io* __restrict__ r_k, long long eps,
                         const io* __restrict__ dout, io* __restrict__ dy, io* __restrict__ dr, io* __restrict__ dk,
                         io* __restrict__ dv, io* __restrict__ dg, float* __restrict__ dweight,
                         float* __restrict__ dbias, float* __restrict__ dr_k, long long rows, long long heads,
                         long long n) {
    output_backward<true>(y, r, k, v, g, weight, bias, r_k, eps, dout, dy, dr, dk, dv, dg, dweight, dbias, dr_k, rows,
                          heads, n);
}

extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    wkv6_output_forward(const io* __restrict__ y, const io* __restrict__ g, const io* __restrict__ weight,
                        const io* __restrict__ bias, long long eps, io* __restrict__ out, long long rows,
                        long long heads, long long n) {
    output_forward<false>(y, nullptr, nullptr, nullptr, g, weight, bias, nullptr, eps, out, rows, heads, n);
}

extern "C" __global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS)
    wkv6_output_backward(const io* __restrict__ y, const io* __restrict__ g, const io* __restrict__ weight,
                         const io* __restrict__ bias, long long eps, const io* __restrict__ dout,
                         io* __restrict__ dy, io* __restrict__ dg, float* __restrict__ dweight,
                         float* __restrict__ dbias, long long rows, long long heads, long long n) {
    output_backward<false>(y, nullptr, nullptr, nullptr, g, weight, bias, nullptr, eps, dout, dy, nullptr, nullptr,
                           nullptr, dg, dweight, dbias, nullptr, rows, heads, n);
}

// ---- relu_squared and gated, element by element

// The thread's elements, of which the last may be fewer than WIDTH.
struct Elements {
    long long first, count;
    __device__ explicit Elements(long long count)
        : first((blockIdx.x * static_cast<long long>(THREADS) + threadIdx.x) * WIDTH), count(count) {
        if (blockDim.x != THREADS || gridDim.y != 1) __trap();
    }
    __device__ __forceinline__ void load(const io* from, Values& x) const {
        if (first + WIDTH <= count) return load_values(from + first, x);
        for (int c = 0; c < WIDTH; c++) x[c] = first + c < count ? to_float(READ_AS(io, from + first + c)) : 0.0f;
    }
    __device__ __forceinline__ void store(io* to, const Values& x) const {
        if (!to) return;
        if (first + WIDTH <= count) return store_values(to + first, x);
        for (int c = 0; c < WIDTH && first + c < count; c++) WRITE_AS(io, to + first + c) = from_float<io>(x[c]);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    relu_squared_forward(const io* __restrict__ x, io* __restrict__ out, long long count) {
    const Elements at(count);
    Values xs;
    at.load(x, xs);
#pragma unroll
    for (int c = 0; c < WIDTH; c++) xs[c] = xs[c] <= 0.0f ? 0.0f : xs[c] * xs[c];  // a NaN stays a NaN
    at.store(out, xs);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    relu_squared_backward(const io* __restrict__ x, const io* __restrict__ dout, io* __restrict__ dx,
                          long long count) {
    const Elements at(count);
    Values xs, ds;
    at.load(x, xs);
    at.load(dout, ds);
#pragma unroll
    for (int c = 0; c < WIDTH; c++) xs[c] = xs[c] <= 0.0f ? 0.0f : 2.0f * xs[c] * ds[c];
    at.store(dx, xs);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gated_forward(const io* __restrict__ gate, const io* __restrict__ x, io* __restrict__ out, long long count) {
    const Elements at(count);
    Values gates, xs;
    at.load(gate, gates);
    at.load(x, xs);
#pragma unroll
    for (int c = 0; c < WIDTH; c++) xs[c] *= sigmoid(gates[c]);
    at.store(out, xs);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gated_backward(const io* __restrict__ gate, const io* __restrict__ x, const io* __restrict__ dout,
                   io* __restrict__ dgate, io* __restrict__ dx, long long count) {
    const Elements at(count);
    Values gates, xs, ds;
    at.load(gate, gates);
    at.load(x, xs);
    at.load(dout, ds);
#pragma unroll
    for (int c = 0; c < WIDTH; c++) {
        const float open = sigmoid(gates[c]);
        gates[c] = ds[c] * xs[c] * open * (1.0f - open);
        xs[c] = ds[c] * open;
    }
    at.store(dgate, gates);
    at.store(dx, xs);
}
