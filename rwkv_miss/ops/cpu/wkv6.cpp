// WKV-6 forward and backward for CPUs. Each head has a state S of (key j, value i). With d = exp(-exp(w)), a step does,
// in this order:
//     S = 0 if start;  y = (S + diag(u) k v^T)^T r;  S = diag(d) S + k v^T
// Tensors are contiguous: r, k, v, w and y are (B, T, H, N), u is (H, N), states are (B, H, N_key, N_value) fp32.
//
// The forward lays the state out as [key][value], so that y needs no sum across a vector's lanes. The backward lays it
// out as [value][key], where three of its four sums need none. The forward keeps the state before every `chunk` steps
// alone (`saved`, laid out as [value][key]); the backward computes the states of a chunk again, for a few value rows at
// a time. Nothing is divided by a decay, which may be 0.
#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "common.h"
#include "tensors.h"

namespace {

constexpr int FORWARD_VECS = W == 16 ? 4 : 2;   // value vectors in a pass of the forward: so many sums fit in registers
constexpr int BACKWARD_VECS = W == 16 ? 2 : 1;  // key vectors in a pass of the backward, likewise
constexpr int64_t ROWS = 16;                    // for so many value rows the backward holds the states of a chunk

// exp(-e). exp_lanes goes no further than exp(-87), but beyond that the decay must be 0, not a tiny number, which
// exp(w) in the gradient would make large again.
inline float decay(float e) {
    const float d = exp_lanes(-e);
    return e > 87.0f ? 0.0f : d;
}

// The sum of the products of two rows of whole vectors.
float dot(const float* x, const float* y, int64_t lanes) {
    alignas(64) float sums[W];
    Vec total = {};
    for (int64_t i = 0; i < lanes; i += W) total += load(x + i) * load(y + i);
    store(sums, total);
    return sum(sums);
}

template <class T>
struct Inputs {
    const T *r, *k, *v, *w, *u;
    const uint8_t* start;  // (B, T) or null

    bool starts(const Sizes& s, int64_t bh, int64_t t) const {
        return start && start[bh / s.heads * s.steps + t];
    }
};

// The inputs of one head for one chunk in fp32, each row padded with zeros to whole vectors. uk has u k for each step.
struct Chunk {
    int64_t lanes;
    Buffer memory;
    float *r, *k, *v, *d, *uk, *u;

    template <class T>
    Chunk(const Sizes& s, const Inputs<T>& in, int64_t bh)
        : lanes(s.lanes()), memory(zeros(lanes * (5 * std::min(s.chunk, s.steps) + 1))) {
        const int64_t part = lanes * std::min(s.chunk, s.steps);
        r = memory.get();
        k = r + part;
        v = k + part;
        d = v + part;
        uk = d + part;
        u = uk + part;
        read_row(in.u + bh % s.heads * s.n, u, s.n);
    }

    template <class T>
    void read(const Sizes& s, const Inputs<T>& in, int64_t bh, int64_t t0, int64_t steps) {
        for (int64_t t = 0; t < steps; t++) {
            const int64_t from = s.row(bh, t0 + t), to = t * lanes;
            read_row(in.r + from, r + to, s.n);
            read_row(in.k + from, k + to, s.n);
            read_row(in.v + from, v + to, s.n);
            for (int64_t j = 0; j < s.n; j++) {
                d[to + j] = decay(exp_lanes(to_float(in.w[from + j])));
                uk[to + j] = u[j] * k[to + j];
            }
        }
    }
};

// A step of the forward for VECS * W value lanes. state: [key][lanes]; bonus: r^T diag(u) k.
template <int VECS>
void forward_step(float* state, int64_t lanes, int64_t n, const float* r, const float* k, const float* d,
                  const float* v, float bonus, float* y) {
    Vec vs[VECS], ys[VECS];
    for (int q = 0; q < VECS; q++) vs[q] = load(v + q * W), ys[q] = vs[q] * bonus;
    for (int64_t j = 0; j < n; j++) {
        const float rj = r[j], kj = k[j], dj = d[j];
        for (int q = 0; q < VECS; q++) {
            float* p = state + j * lanes + q * W;
            Vec x = load(p);
            ys[q] += x * rj;
            store(p, x * dj + vs[q] * kj);
        }
    }
    for (int q = 0; q < VECS; q++) store(y + q * W, ys[q]);
}

// One head over all steps, for the value lanes from `first` to `end` - 1.
template <class T>
void forward_head(const Sizes& s, const Inputs<T>& in, const float* state_in, T* y, float* state_out, float* saved,
                  int64_t bh, int64_t first, int64_t end) {
    const int64_t n = s.n, lanes = s.lanes(), last = end < n ? end : n;
    Chunk c(s, in, bh);
    Buffer state = zeros(n * lanes), ys = zeros(lanes);
    for (int64_t j = 0; j < n; j++)
        read_row(state_in + (bh * n + j) * n + first, &state[j * lanes + first], last - first);

    for (int64_t t0 = 0, index = 0; t0 < s.steps; t0 += s.chunk, index++) {
        const int64_t steps = s.steps - t0 < s.chunk ? s.steps - t0 : s.chunk;
        c.read(s, in, bh, t0, steps);
        if (saved) {
            float* to = saved + (bh * s.chunks() + index) * n * n;
            for (int64_t i = first; i < last; i++)
                for (int64_t j = 0; j < n; j++) to[i * n + j] = state[j * lanes + i];
        }
        for (int64_t t = 0; t < steps; t++) {
            const int64_t at = t * lanes;
            if (in.starts(s, bh, t0 + t))
                for (int64_t j = 0; j < n; j++) std::memset(&state[j * lanes + first], 0, (end - first) * sizeof(float));
            if (t0 + t + 1 < s.steps) fetch_to_write(y + s.row(bh, t0 + t + 1) + first, last - first);
            const float bonus = dot(c.r + at, c.uk + at, lanes);
            int64_t i = first;
            auto step = [&](auto vecs) {
                forward_step<decltype(vecs)::value>(&state[i], lanes, n, c.r + at, c.k + at, c.d + at, c.v + at + i,
                                                    bonus, &ys[i]);
            };
            for (; i + FORWARD_VECS * W <= end; i += FORWARD_VECS * W) step(std::integral_constant<int, FORWARD_VECS>());
            for (; i < end; i += W) step(std::integral_constant<int, 1>());
            write_row(&ys[first], y + s.row(bh, t0 + t) + first, last - first);
        }
    }
    for (int64_t j = 0; j < n; j++)
        write_row(&state[j * lanes + first], state_out + (bh * n + j) * n + first, last - first);
}

// Computes the state after a step from the state before it, for `rows` value rows and VECS * W keys; adds to dr.
template <int VECS>
void replay_step(const float* before, float* after, int64_t lanes, int64_t rows, const float* d, const float* k,
                 const float* v, const float* dy, float* dr) {
    Vec ds[VECS], ks[VECS], drs[VECS] = {};
    for (int q = 0; q < VECS; q++) ds[q] = load(d + q * W), ks[q] = load(k + q * W);
    for (int64_t i = 0; i < rows; i++) {
        const float vi = v[i], dyi = dy[i];
        for (int q = 0; q < VECS; q++) {
            Vec x = load(before + i * lanes + q * W);
            drs[q] += x * dyi;
            store(after + i * lanes + q * W, x * ds[q] + vi * ks[q]);
        }
    }
    for (int q = 0; q < VECS; q++) store(dr + q * W, load(dr + q * W) + drs[q]);
}

// Replaces g, the gradient of the state after a step, by that of the state before it; adds to dd and dk.
template <int VECS>
void backward_step(float* g, const float* before, int64_t lanes, int64_t rows, const float* d, const float* r,
                   const float* v, const float* dy, float* dd, float* dk) {
    Vec ds[VECS], rs[VECS], dds[VECS] = {}, dks[VECS] = {};
    for (int q = 0; q < VECS; q++) ds[q] = load(d + q * W), rs[q] = load(r + q * W);
    for (int64_t i = 0; i < rows; i++) {
        const float vi = v[i], dyi = dy[i];
        for (int q = 0; q < VECS; q++) {
            float* p = g + i * lanes + q * W;
            Vec x = load(p);
            dds[q] += x * load(before + i * lanes + q * W);
            dks[q] += x * vi;
            store(p, x * ds[q] + dyi * rs[q]);
        }
    }
    for (int q = 0; q < VECS; q++) {
        store(dd + q * W, load(dd + q * W) + dds[q]);
        store(dk + q * W, load(dk + q * W) + dks[q]);
    }
}

template <class T>
struct Gradients {
    T *r, *k, *v, *w;
    float *u, *state;  // u: (B, H, N), for each sequence of the batch
};

template <class T>
void backward_head(const Sizes& s, const Inputs<T>& in, const float* saved, const T* grad_y, const float* grad_state,
                   const Gradients<T>& grad, int64_t bh) {
    const int64_t n = s.n, lanes = s.lanes(), part = s.chunk * lanes;
    Chunk c(s, in, bh);
    Buffer memory = zeros(5 * part + lanes), states = zeros((s.chunk + 1) * ROWS * lanes), g = zeros(n * lanes);
    float *dy = memory.get(), *dr = dy + part, *dk = dr + part, *dv = dk + part, *dd = dv + part, *du = dd + part;
    alignas(64) float lanes_v[ROWS * W];
    if (grad_state)
        for (int64_t j = 0; j < n; j++)
            for (int64_t i = 0; i < n; i++) g[i * lanes + j] = grad_state[(bh * n + j) * n + i];

    for (int64_t index = s.chunks() - 1; index >= 0; index--) {
        const int64_t t0 = index * s.chunk, steps = s.steps - t0 < s.chunk ? s.steps - t0 : s.chunk;
        c.read(s, in, bh, t0, steps);
        if (grad_y)
            for (int64_t t = 0; t < steps; t++) read_row(grad_y + s.row(bh, t0 + t), dy + t * lanes, n);
        std::memset(dr, 0, 4 * part * sizeof(float));
        for (int64_t i0 = 0; i0 < n; i0 += ROWS) {
            const int64_t rows = n - i0 < ROWS ? n - i0 : ROWS;
            auto state = [&](int64_t t) { return &states[t * ROWS * lanes]; };  // the one before step t of the chunk
            for (int64_t i = 0; i < rows; i++)
                read_row(saved + ((bh * s.chunks() + index) * n + i0 + i) * n, state(0) + i * lanes, n);
            for (int64_t t = 0; t < steps; t++) {
                const int64_t at = t * lanes;
                if (in.starts(s, bh, t0 + t)) std::memset(state(t), 0, rows * lanes * sizeof(float));
                int64_t j = 0;
                auto step = [&](auto vecs) {
                    replay_step<decltype(vecs)::value>(state(t) + j, state(t + 1) + j, lanes, rows, c.d + at + j,
                                                       c.k + at + j, c.v + at + i0, dy + at + i0, dr + at + j);
                };
                for (; j + BACKWARD_VECS * W <= lanes; j += BACKWARD_VECS * W)
                    step(std::integral_constant<int, BACKWARD_VECS>());
                for (; j < lanes; j += W) step(std::integral_constant<int, 1>());
            }
            float* gs = &g[i0 * lanes];
            for (int64_t t = steps - 1; t >= 0; t--) {
                const int64_t at = t * lanes;
                if (i0 + rows == n)  // the last pass before they are written
                    for (const T* x : {grad.r, grad.k, grad.v, grad.w}) fetch_to_write(x + s.row(bh, t0 + t), n);
                for (int64_t i = 0; i < rows; i++) {
                    Vec dvs = {};
                    for (int64_t j = 0; j < lanes; j += W) dvs += load(gs + i * lanes + j) * load(c.k + at + j);
                    store(lanes_v + i * W, dvs);
                }
                for (int64_t i = 0; i < rows; i++) dv[at + i0 + i] = sum(lanes_v + i * W);
                int64_t j = 0;
                auto step = [&](auto vecs) {
                    backward_step<decltype(vecs)::value>(gs + j, state(t) + j, lanes, rows, c.d + at + j,
                                                         c.r + at + j, c.v + at + i0, dy + at + i0, dd + at + j,
                                                         dk + at + j);
                };
                for (; j + BACKWARD_VECS * W <= lanes; j += BACKWARD_VECS * W)
                    step(std::integral_constant<int, BACKWARD_VECS>());
                for (; j < lanes; j += W) step(std::integral_constant<int, 1>());
                if (in.starts(s, bh, t0 + t)) std::memset(gs, 0, rows * lanes * sizeof(float));
            }
        }
        for (int64_t t = 0; t < steps; t++) {  // adds what comes from the step's own key and value; turns dd into dw
            const int64_t row = s.row(bh, t0 + t), at = t * lanes;
            const float bonus = dot(c.r + at, c.uk + at, lanes), vdy = dot(c.v + at, dy + at, lanes);
            for (int64_t j = 0; j < n; j++) {
                const float rj = c.r[at + j], kj = c.k[at + j];
                dr[at + j] += c.uk[at + j] * vdy;
                dk[at + j] += c.u[j] * rj * vdy;
                dv[at + j] += bonus * dy[at + j];
                du[j] += rj * kj * vdy;
                dd[at + j] *= -(c.d[at + j] * exp_lanes(to_float(in.w[row + j])));
            }
            write_row(dr + at, grad.r + row, n);
            write_row(dk + at, grad.k + row, n);
            write_row(dv + at, grad.v + row, n);
            write_row(dd + at, grad.w + row, n);
        }
    }
    write_row(du, grad.u + bh * n, n);
    for (int64_t j = 0; j < n; j++)
        for (int64_t i = 0; i < n; i++) grad.state[(bh * n + j) * n + i] = g[i * lanes + j];
}

template <class T>
void forward(const Sizes& s, const Inputs<T>& in, const float* state_in, T* y, float* state_out, float* saved,
             int threads) {
    // With fewer heads than threads, several threads share the value lanes of a head.
    const int64_t heads = s.batch * s.heads, vecs = s.lanes() / W;
    if (heads == 0) return;
    const int64_t wanted = (threads + heads - 1) / heads, parts = wanted < vecs ? wanted : vecs;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < heads * parts; task++) {
        const int64_t part = task % parts;
        forward_head(s, in, state_in, y, state_out, saved, task / parts, part * vecs / parts * W,
                     (part + 1) * vecs / parts * W);
    }
}

template <class T>
void backward(const Sizes& s, const Inputs<T>& in, const float* saved, const T* grad_y, const float* grad_state,
              const Gradients<T>& grad, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t bh = 0; bh < s.batch * s.heads; bh++) backward_head(s, in, saved, grad_y, grad_state, grad, bh);
}

// The operator of rwkv_miss/ops/wkv_operators.py.
std::tuple<Tensor, Tensor, Tensor> wkv6_cpu(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w,
                                            const Tensor& u, const Tensor& state, const MaybeTensor& seq_start,
                                            bool save) {
    const Sizes s{v.size(0), v.size(1), v.size(2), v.size(3), SAVE_EVERY};
    const Made y(v), last(state);
    const Saved states(save, {s.batch, s.heads, s.chunks(), s.n, s.n}, state);
    with_type(v, [&](auto type) {
        forward<decltype(type)>(s, {Given(r), Given(k), Given(v), Given(w), Given(u), Given(seq_start)}, Given(state),
                                y, last, states, at::get_num_threads());
    });
    return {y.tensor, last.tensor, states.tensor};
}

}  // namespace

// To be called once.
extern "C" void register_operators() {
    static torch::Library library(torch::Library::IMPL, "rwkv_miss", c10::DispatchKey::CPU, __FILE__, __LINE__);
    library.impl("wkv6_cpu", wkv6_cpu);
}

// start: uint8 (B, T), or null where no document begins. saved: (B, H, chunks, N_value, N_key) fp32, what the forward
// saved.
// grad_y and grad_state, the gradients of y and of the last state, are null for zeros. du: (B, H, N) fp32, for each
// sequence of the batch.
#define BACKWARD(name, T)                                                                                           \
    extern "C" void name(const T* r, const T* k, const T* v, const T* w, const T* u, const uint8_t* start,          \
                         const float* saved, const T* grad_y, const float* grad_state, T* dr, T* dk, T* dv, T* dw,  \
                         float* du, float* dstate, int64_t batch, int64_t steps, int64_t heads, int64_t n,          \
                         int64_t chunk, int64_t threads) {                                                          \
        backward<T>({batch, steps, heads, n, chunk}, {r, k, v, w, u, start}, saved, grad_y, grad_state,             \
                    {dr, dk, dv, dw, du, dstate}, int(threads));                                                    \
    }
BACKWARD(wkv6_backward_float32, float)
BACKWARD(wkv6_backward_bfloat16, bf16)
