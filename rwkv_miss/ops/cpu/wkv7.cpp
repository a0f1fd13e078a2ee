// WKV-7 forward and backward for CPUs. Each head has a state S of (value i, key j). With d = exp(-e^-0.5 sigmoid(z)), a
// step does, in this order:
//     S = 0 if start;  u = S a;  S = S diag(d) + u b^T + v k^T;  y = S r
// Tensors are contiguous: r, z, k, v, a, b and y are (B, T, H, N), states are (B, H, N_value, N_key) fp32. These are
// plain C functions over raw pointers, without torch's headers, so that they compile in seconds.
//
// The forward lays the state out as [key][value], so that the sums over keys (u and y) need no sum across a vector's
// lanes; the pass that writes the state of a step also sums u of the next. The backward lays it out as [value][key],
// where five of its seven sums need none. The forward keeps u of every step (`saved_u`) and the state before every
// `chunk` steps (`saved`) alone; the backward computes the states of a chunk again, for a few value rows at a time.
#include <type_traits>

#include "common.h"

namespace {

constexpr int FORWARD_VECS = W == 16 ? 4 : 2;   // value vectors in a pass of the forward: so many sums fit in registers
constexpr int BACKWARD_VECS = W == 16 ? 2 : 1;  // key vectors in a pass of the backward, likewise
constexpr int64_t ROWS = 16;                    // for so many value rows the backward holds the states of a chunk
constexpr float DECAY_SCALE = 0.6065306597126334f;  // e^-0.5

inline float sigmoid(float z) { return 1.0f / (1.0f + exp_lanes(-z)); }

template <class T>
struct Inputs {
    const T *r, *z, *k, *v, *a, *b;
    const uint8_t* start;  // (B, T) or null

    bool starts(const Sizes& s, int64_t bh, int64_t t) const {
        return start && start[bh / s.heads * s.steps + t];
    }
};

// The inputs of one head for one chunk in fp32, each row padded with zeros to whole vectors. There is a row of zeros
// before the first step of r (and of dy in the backward), and behind the last step of a.
struct Chunk {
    int64_t lanes;
    Buffer memory;
    float *r, *d, *k, *v, *a, *b;

    explicit Chunk(const Sizes& s) : lanes(s.lanes()), memory(zeros(lanes * (6 * s.chunk + 2))) {
        const int64_t part = lanes * s.chunk;
        r = memory.get() + lanes;
        d = r + part;
        k = d + part;
        v = k + part;
        b = v + part;
        a = b + part;
    }

    template <class T>
    void read(const Sizes& s, const Inputs<T>& in, int64_t bh, int64_t t0, int64_t steps) {
        for (int64_t t = 0; t < steps; t++) {
            const int64_t from = s.row(bh, t0 + t), to = t * lanes;
            read_row(in.r + from, r + to, s.n);
            read_row(in.k + from, k + to, s.n);
            read_row(in.v + from, v + to, s.n);
            read_row(in.b + from, b + to, s.n);
            if (in.starts(s, bh, t0 + t)) {  // the step reads and keeps nothing of the state before it
                std::memset(a + to, 0, s.n * sizeof(float));
                std::memset(d + to, 0, s.n * sizeof(float));
            } else {
                read_row(in.a + from, a + to, s.n);
                float* row = d + to;
                for (int64_t j = 0; j < s.n; j++)
                    row[j] = exp_lanes(-DECAY_SCALE * sigmoid(to_float(in.z[from + j])));
            }
        }
    }
};

// Asks the memory for a row that is written soon. Rows of a head lie apart, and the state's stores would wait for theirs.
template <class T>
void fetch_to_write(const T* row, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(row + i, 1);
}

// A step of the forward for VECS * W value lanes. state: [key][lanes]; u: that of this step, replaced by that of the
// next.
template <int VECS>
void forward_step(float* state, int64_t lanes, int64_t n, const float* r, const float* d, const float* k,
                  const float* a_next, const float* b, const float* v, float* u, float* y) {
    Vec us[VECS], vs[VECS], ys[VECS] = {}, nexts[VECS] = {};
    for (int q = 0; q < VECS; q++) us[q] = load(u + q * W), vs[q] = load(v + q * W);
    for (int64_t j = 0; j < n; j++) {
        const float dj = d[j], bj = b[j], kj = k[j], rj = r[j], aj = a_next[j];
        for (int q = 0; q < VECS; q++) {
            float* p = state + j * lanes + q * W;
            Vec x = load(p) * dj + us[q] * bj + vs[q] * kj;
            store(p, x);
            ys[q] += x * rj;
            nexts[q] += x * aj;
        }
    }
    for (int q = 0; q < VECS; q++) store(y + q * W, ys[q]), store(u + q * W, nexts[q]);
}

// One head over all steps, for the value lanes from `first` to `end` - 1.
template <class T>
void forward_head(const Sizes& s, const Inputs<T>& in, const float* state_in, T* y, float* state_out, float* saved,
                  float* saved_u, int64_t bh, int64_t first, int64_t end) {
    const int64_t n = s.n, lanes = s.lanes(), last = end < n ? end : n;
    Chunk c(s);
    Buffer state = zeros(n * lanes), ys = zeros(lanes), u = zeros(lanes);
    auto copy_out = [&](float* to) {
        for (int64_t i = first; i < last; i++)
            for (int64_t j = 0; j < n; j++) to[i * n + j] = state[j * lanes + i];
    };
    for (int64_t i = first; i < last; i++)
        for (int64_t j = 0; j < n; j++) state[j * lanes + i] = state_in[(bh * n + i) * n + j];

    for (int64_t t0 = 0, index = 0; t0 < s.steps; t0 += s.chunk, index++) {
        const int64_t steps = s.steps - t0 < s.chunk ? s.steps - t0 : s.chunk;
        c.read(s, in, bh, t0, steps);
        if (saved) copy_out(saved + (bh * s.chunks() + index) * n * n);
        for (int64_t i = first; i < end; i += W) {
            Vec x = {};
            for (int64_t j = 0; j < n; j++) x += load(&state[j * lanes + i]) * c.a[j];
            store(&u[i], x);
        }
        for (int64_t t = 0; t < steps; t++) {
            const int64_t at = t * lanes, row = s.row(bh, t0 + t);
            if (t0 + t + 1 < s.steps) {
                const int64_t next = s.row(bh, t0 + t + 1);
                fetch_to_write(y + next + first, last - first);
                if (saved_u) fetch_to_write(saved_u + next + first, last - first);
            }
            if (in.starts(s, bh, t0 + t)) {
                for (int64_t j = 0; j < n; j++) std::memset(&state[j * lanes + first], 0, (end - first) * sizeof(float));
                std::memset(&u[first], 0, (end - first) * sizeof(float));
            }
            if (saved_u) write_row(&u[first], saved_u + row + first, last - first);
            int64_t i = first;
            auto step = [&](auto vecs) {
                forward_step<decltype(vecs)::value>(&state[i], lanes, n, c.r + at, c.d + at, c.k + at,
                                                    c.a + at + lanes, c.b + at, c.v + at + i, &u[i], &ys[i]);
            };
            for (; i + FORWARD_VECS * W <= end; i += FORWARD_VECS * W) step(std::integral_constant<int, FORWARD_VECS>());
            for (; i < end; i += W) step(std::integral_constant<int, 1>());
            write_row(&ys[first], y + row + first, last - first);
        }
    }
    copy_out(state_out + bh * n * n);
}

// Computes the state after a step from the state before it, for `rows` value rows and VECS * W keys; adds to dr.
template <int VECS>
void replay_step(const float* before, float* after, int64_t lanes, int64_t rows, const float* d, const float* k,
                 const float* b, const float* u, const float* v, const float* dy, float* dr) {
    Vec ds[VECS], ks[VECS], bs[VECS], drs[VECS] = {};
    for (int q = 0; q < VECS; q++) ds[q] = load(d + q * W), ks[q] = load(k + q * W), bs[q] = load(b + q * W);
    for (int64_t i = 0; i < rows; i++) {
        const float ui = u[i], vi = v[i], dyi = dy[i];
        for (int q = 0; q < VECS; q++) {
            Vec x = load(before + i * lanes + q * W) * ds[q] + ui * bs[q] + vi * ks[q];
            store(after + i * lanes + q * W, x);
            drs[q] += x * dyi;
        }
    }
    for (int q = 0; q < VECS; q++) store(dr + q * W, load(dr + q * W) + drs[q]);
}

// Replaces g, the gradient of the state after a step, by that of the state before it, including what y of the step
// before (r_before, dy_before) adds; adds to dd, dk, da and db.
template <int VECS>
void backward_step(float* g, const float* before, int64_t lanes, int64_t rows, const float* d, const float* a,
                   const float* r_before, const float* u, const float* v, const float* du, const float* dy_before,
                   float* dd, float* dk, float* da, float* db) {
    Vec ds[VECS], as[VECS], rs[VECS], dds[VECS] = {}, dks[VECS] = {}, das[VECS] = {}, dbs[VECS] = {};
    for (int q = 0; q < VECS; q++) ds[q] = load(d + q * W), as[q] = load(a + q * W), rs[q] = load(r_before + q * W);
    for (int64_t i = 0; i < rows; i++) {
        const float ui = u[i], vi = v[i], dui = du[i], dyi = dy_before[i];
        for (int q = 0; q < VECS; q++) {
            float* p = g + i * lanes + q * W;
            Vec x = load(p), s = load(before + i * lanes + q * W);
            dds[q] += x * s;
            dbs[q] += x * ui;
            dks[q] += x * vi;
            das[q] += s * dui;
            store(p, x * ds[q] + dui * as[q] + dyi * rs[q]);
        }
    }
    for (int q = 0; q < VECS; q++) {
        store(dd + q * W, load(dd + q * W) + dds[q]);
        store(dk + q * W, load(dk + q * W) + dks[q]);
        store(da + q * W, load(da + q * W) + das[q]);
        store(db + q * W, load(db + q * W) + dbs[q]);
    }
}

template <class T>
struct Gradients {
    T *r, *z, *k, *v, *a, *b;
    float* state;
};

template <class T>
void backward_head(const Sizes& s, const Inputs<T>& in, const float* saved, const float* saved_u, const T* grad_y,
                   const float* grad_state, const Gradients<T>& grad, int64_t bh) {
    const int64_t n = s.n, lanes = s.lanes(), part = s.chunk * lanes;
    Chunk c(s);
    Buffer memory = zeros(8 * part + lanes), states = zeros((s.chunk + 1) * ROWS * lanes), g = zeros(n * lanes);
    float *dy = memory.get() + lanes, *u = dy + part;
    float *dr = u + part, *dd = dr + part, *dk = dd + part, *dv = dk + part, *da = dv + part, *db = da + part;
    alignas(64) float du[ROWS], lanes_u[ROWS * W], lanes_v[ROWS * W];
    if (grad_state)
        for (int64_t i = 0; i < n; i++) read_row(grad_state + (bh * n + i) * n, &g[i * lanes], n);

    for (int64_t index = s.chunks() - 1; index >= 0; index--) {
        const int64_t t0 = index * s.chunk, steps = s.steps - t0 < s.chunk ? s.steps - t0 : s.chunk;
        c.read(s, in, bh, t0, steps);
        for (int64_t t = 0; t < steps; t++) {
            read_row(saved_u + s.row(bh, t0 + t), u + t * lanes, n);
            if (grad_y) read_row(grad_y + s.row(bh, t0 + t), dy + t * lanes, n);
        }
        std::memset(dr, 0, 6 * part * sizeof(float));
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
                                                       c.k + at + j, c.b + at + j, u + at + i0, c.v + at + i0,
                                                       dy + at + i0, dr + at + j);
                };
                for (; j + BACKWARD_VECS * W <= lanes; j += BACKWARD_VECS * W)
                    step(std::integral_constant<int, BACKWARD_VECS>());
                for (; j < lanes; j += W) step(std::integral_constant<int, 1>());
            }
            float* gs = &g[i0 * lanes];
            const int64_t final = (steps - 1) * lanes;
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < n; j++) gs[i * lanes + j] += dy[final + i0 + i] * c.r[final + j];
            for (int64_t t = steps - 1; t >= 0; t--) {
                const int64_t at = t * lanes;
                for (int64_t i = 0; i < rows; i++) {
                    Vec dus = {}, dvs = {};
                    for (int64_t j = 0; j < lanes; j += W) {
                        Vec x = load(gs + i * lanes + j);
                        dus += x * load(c.b + at + j);
                        dvs += x * load(c.k + at + j);
                    }
                    store(lanes_u + i * W, dus);
                    store(lanes_v + i * W, dvs);
                }
                for (int64_t i = 0; i < rows; i++) {
                    du[i] = sum(lanes_u + i * W);
                    dv[at + i0 + i] = sum(lanes_v + i * W);
                }
                int64_t j = 0;
                auto step = [&](auto vecs) {
                    backward_step<decltype(vecs)::value>(gs + j, state(t) + j, lanes, rows, c.d + at + j,
                                                         c.a + at + j, c.r + at - lanes + j, u + at + i0,
                                                         c.v + at + i0, du, dy + at - lanes + i0, dd + at + j,
                                                         dk + at + j, da + at + j, db + at + j);
                };
                for (; j + BACKWARD_VECS * W <= lanes; j += BACKWARD_VECS * W)
                    step(std::integral_constant<int, BACKWARD_VECS>());
                for (; j < lanes; j += W) step(std::integral_constant<int, 1>());
                if (in.starts(s, bh, t0 + t))  // only what y of the step before adds, and not 0 * infinity
                    for (int64_t i = 0; i < rows; i++)
                        for (j = 0; j < lanes; j++)
                            gs[i * lanes + j] = dy[at - lanes + i0 + i] * c.r[at - lanes + j];
            }
        }
        for (int64_t t = 0; t < steps; t++) {
            const int64_t row = s.row(bh, t0 + t), at = t * lanes;
            for (int64_t j = 0; j < n; j++) {
                const float sig = sigmoid(to_float(in.z[row + j]));
                dd[at + j] *= -DECAY_SCALE * sig * (1.0f - sig) * c.d[at + j];
            }
            write_row(dr + at, grad.r + row, n);
            write_row(dd + at, grad.z + row, n);
            write_row(dk + at, grad.k + row, n);
            write_row(dv + at, grad.v + row, n);
            write_row(da + at, grad.a + row, n);
            write_row(db + at, grad.b + row, n);
        }
    }
    for (int64_t i = 0; i < n; i++) write_row(&g[i * lanes], grad.state + (bh * n + i) * n, n);
}

template <class T>
void forward(const Sizes& s, const Inputs<T>& in, const float* state_in, T* y, float* state_out, float* saved,
             float* saved_u, int threads) {
    // With fewer heads than threads, several threads share the value lanes of a head.
    const int64_t heads = s.batch * s.heads, vecs = s.lanes() / W;
    if (heads == 0) return;
    const int64_t wanted = (threads + heads - 1) / heads, parts = wanted < vecs ? wanted : vecs;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < heads * parts; task++) {
        const int64_t part = task % parts;
        forward_head(s, in, state_in, y, state_out, saved, saved_u, task / parts, part * vecs / parts * W,
                     (part + 1) * vecs / parts * W);
    }
}

template <class T>
void backward(const Sizes& s, const Inputs<T>& in, const float* saved, const float* saved_u, const T* grad_y,
              const float* grad_state, const Gradients<T>& grad, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t bh = 0; bh < s.batch * s.heads; bh++)
        backward_head(s, in, saved, saved_u, grad_y, grad_state, grad, bh);
}

}  // namespace

// start: uint8 (B, T), or null where no document begins. saved: (B, H, chunks, N_value, N_key) and saved_u: (B, T, H,
// N), fp32, are null where nothing is to be saved.
#define FORWARD(name, T)                                                                                            \
    extern "C" void name(const T* r, const T* z, const T* k, const T* v, const T* a, const T* b,                    \
                         const float* state_in, const uint8_t* start, T* y, float* state_out, float* saved,         \
                         float* saved_u, int64_t batch, int64_t steps, int64_t heads, int64_t n, int64_t chunk,     \
                         int64_t threads) {                                                                         \
        forward<T>({batch, steps, heads, n, chunk}, {r, z, k, v, a, b, start}, state_in, y, state_out, saved,       \
                   saved_u, int(threads));                                                                          \
    }
// grad_y and grad_state, the gradients of y and of the last state, are null for zeros.
#define BACKWARD(name, T)                                                                                           \
    extern "C" void name(const T* r, const T* z, const T* k, const T* v, const T* a, const T* b,                    \
                         const uint8_t* start, const float* saved, const float* saved_u, const T* grad_y,           \
                         const float* grad_state, T* dr, T* dz, T* dk, T* dv, T* da, T* db, float* dstate,          \
                         int64_t batch, int64_t steps, int64_t heads, int64_t n, int64_t chunk, int64_t threads) {  \
        backward<T>({batch, steps, heads, n, chunk}, {r, z, k, v, a, b, start}, saved, saved_u, grad_y, grad_state, \
                    {dr, dz, dk, dv, da, db, dstate}, int(threads));                                                \
    }
FORWARD(wkv7_forward_float32, float)
FORWARD(wkv7_forward_bfloat16, bf16)
BACKWARD(wkv7_backward_float32, float)
BACKWARD(wkv7_backward_bfloat16, bf16)
