// WKV-7 forward and backward for CPUs. Each head has a state S of (value i, key j). With d = exp(-e^-0.5 sigmoid(z)), a
// step does, in this order:
//     S = 0 if start;  u = S a;  S = S diag(d) + u b^T + v k^T;  y = S r
// Tensors are contiguous: r, z, k, v, a, b and y are (B, T, H, N), states are (B, H, N_value, N_key) fp32.
//
// Up to STEPS steps are a piece, which is computed by products of matrices, so that a state is loaded and stored once a
// piece, not once a step. A piece ends where a document begins: no row of one document meets a row of another. With the
// products of decays counted from the piece's first step, each step has two rows in these matrices:
//     AR: a times the decays before the step; r times these and the step's own
//     BK: b, and k, divided by the decays up to and with the step's own
//     UV: u, and v
// With S before the piece, and L the part of AR BK^T where a row of AR meets one of BK and UV that is of an earlier
// step, or for r of its own, the rows of u and y are those of AR S^T + L UV. The next state is (S + UV^T BK) diag(D),
// with D the product of all decays of the piece. docs/kernels.md has the gradients.
//
// The forward keeps u of every step (`saved_u`) and the state before every `chunk` steps (`saved`) alone; the backward
// computes the states before the pieces of a chunk again.
#include <initializer_list>

#include "matrix.h"
#include "tensors.h"

namespace {

constexpr int64_t STEPS = 8;         // more take more multiplications, fewer more loads and stores
constexpr int64_t ROWS = 2 * STEPS;  // of a piece's matrices: whole vectors for every W
constexpr int64_t GROUP = 16;        // heads that a thread takes together
constexpr float DECAY_SCALE = 0.6065306597126334f;  // e^-0.5

// The number of rows of UV that row p of AR meets.
int64_t meets(int64_t p) { return p + p % 2; }

template <class T>
struct Inputs {
    const T *r, *z, *k, *v, *a, *b;
    const uint8_t* start;  // (B, T) or null

    bool starts(const Sizes& s, int64_t bh, int64_t t) const {
        return start && start[bh / s.heads * s.steps + t];
    }
    // The step after the last of the piece that step t is in. A chunk begins a piece.
    int64_t piece_end(const Sizes& s, int64_t bh, int64_t t) const {
        const int64_t in_chunk = t % s.chunk, in_piece = in_chunk % STEPS;
        int64_t last = t + (in_chunk - in_piece + STEPS < s.chunk ? STEPS - in_piece : s.chunk - in_chunk);
        if (last > s.steps) last = s.steps;
        int64_t end = t + 1;
        while (end < last && !starts(s, bh, end)) end++;
        return end;
    }
};

// The matrices of up to `steps` steps of a head, with rows padded with zeros to whole vectors. For each step also the
// product of the piece's decays up to and with its own, the inverse of that, and the derivative of the log of its decay
// by z.
struct Rows {
    int64_t lanes;
    Buffer memory;
    float *ar, *bk, *uv, *decay, *inverse, *slope, *ones;

    Rows(const Sizes& s, int64_t steps) : lanes(s.lanes()) {
        const int64_t part = steps * lanes, behind = ROWS * lanes;  // transposing a short piece reads behind its rows
        memory = zeros(9 * part + 3 * behind + lanes);
        ar = memory.get();
        bk = ar + 2 * part;
        uv = bk + 2 * part + behind;
        decay = uv + 2 * part + behind;
        inverse = decay + part;
        slope = inverse + part;
        ones = slope + part;
        for (int64_t j = 0; j < s.n; j++) ones[j] = 1.0f;
    }

    // Reads the piece of steps t0 to end - 1, to the rows of step `at` and on. u is left as it is.
    template <class T>
    void read(const Sizes& s, const Inputs<T>& in, int64_t bh, int64_t t0, int64_t end, int64_t at) {
        for (int64_t t = t0; t < end; t++, at++) {
            const int64_t from = s.row(bh, t), to = at * lanes;
            const T *r = in.r + from, *z = in.z + from, *k = in.k + from, *a = in.a + from, *b = in.b + from;
            const float* decay_before = t == t0 ? ones : decay + to - lanes;
            const float* inverse_before = t == t0 ? ones : inverse + to - lanes;
            float *a_to = ar + 2 * to, *r_to = a_to + lanes, *b_to = bk + 2 * to, *k_to = b_to + lanes;
            float *decay_to = decay + to, *inverse_to = inverse + to, *slope_to = slope + to;
            const bool starts = in.starts(s, bh, t);  // the step reads and keeps nothing of the state before it
            const float kept = starts ? 0.0f : 1.0f;
#pragma omp simd
            for (int64_t j = 0; j < s.n; j++) {
                const float sigmoid = kept / (1.0f + exp_lanes(-to_float(z[j])));
                // exp(x) and exp(-x) by the even and the odd terms of their series: |x| is at most e^-0.5
                const float x = -DECAY_SCALE * sigmoid, x2 = x * x;
                const float even = 1.0f + x2 * (0.5f + x2 * (1.0f / 24 + x2 * (1.0f / 720 + x2 * (1.0f / 40320))));
                const float odd = x * (1.0f + x2 * (1.0f / 6 + x2 * (1.0f / 120 + x2 * (1.0f / 5040))));
                const float product = decay_before[j] * (even + odd), near = inverse_before[j] * (even - odd);
                const float inverse_j = near + near * (1.0f - near * product);  // a step of Newton's method
                decay_to[j] = product;
                inverse_to[j] = inverse_j;
                slope_to[j] = x * (1.0f - sigmoid);
                a_to[j] = to_float(a[j]) * decay_before[j];
                r_to[j] = to_float(r[j]) * product;
                b_to[j] = to_float(b[j]) * inverse_j;
                k_to[j] = to_float(k[j]) * inverse_j;
            }
            if (starts) std::memset(a_to, 0, lanes * sizeof(float));
            read_row(in.v + from, uv + 2 * to + lanes, s.n);
        }
    }
};

// A piece of the forward, for `lanes` value lanes. state: [key][lanes + ROWS], where BK^T is put behind the values. v
// is in the rows of uv, where u is put; y of a step is left in row 2 step + 1 of `out`, [ROWS][lanes + ROWS].
void forward_piece(const Rows& c, int64_t steps, int64_t n, int64_t lanes, float* state, float* uv, float* out) {
    const int64_t row = lanes + ROWS;
    transpose(c.bk, c.lanes, state + lanes, row, ROWS, c.lanes);
    product(2 * steps, row, n, c.ar, c.lanes, 1, state, row, nothing, into(out, row));
    for (int64_t p = 0; p < 2 * steps; p++) {
        float *sums = out + p * row, *to = p % 2 ? sums : uv + p * c.lanes;
        band<1>(0, lanes, meets(p), sums + lanes, row, 1, uv, c.lanes, from(sums, row), into(to, row));
    }
    const float* decay = c.decay + (steps - 1) * c.lanes;
    product(n, lanes, 2 * steps, state + lanes, row, 1, uv, c.lanes, from(state, row),
            [=](int64_t j, int64_t i, Vec x) { store(state + j * row + i, x * decay[j]); });
}

// Tasks are heads, or each of `parts` parts of their value lanes. Those of a group take turns at each chunk, because
// their rows are neighbours in memory.
template <class T>
void forward_group(const Sizes& s, const Inputs<T>& in, const float* state_in, T* y, float* state_out, float* saved,
                   float* saved_u, int64_t parts, int64_t begin, int64_t end) {
    const int64_t n = s.n, all = s.lanes(), size = all * (all + ROWS);
    Rows c(s, STEPS);
    Buffer states = zeros((end - begin) * size), out = zeros(ROWS * (all + ROWS)), by_value = zeros(all * all);
    // f(head, state, its first value, its value lanes, its values)
    auto for_tasks = [&](auto f) {
        for (int64_t task = begin; task < end; task++) {
            const int64_t vecs = all / W, part = task % parts, last = (part + 1) * vecs / parts * W;
            const int64_t first = part * vecs / parts * W;
            f(task / parts, &states[(task - begin) * size], first, last - first, (last < n ? last : n) - first);
        }
    };
    auto copy_out = [&](const float* state, int64_t first, int64_t lanes, int64_t values, float* to) {
        transpose(state, lanes + ROWS, by_value.get(), all, all, lanes);
        for (int64_t i = 0; i < values; i++) write_row(&by_value[i * all], to + (first + i) * n, n);
    };
    for_tasks([&](int64_t bh, float* state, int64_t first, int64_t lanes, int64_t values) {
        for (int64_t i = 0; i < values; i++) read_row(state_in + (bh * n + first + i) * n, &by_value[i * all], n);
        transpose(by_value.get(), all, state, lanes + ROWS, lanes, all);
    });
    for (int64_t index = 0; index < s.chunks(); index++)
        for_tasks([&](int64_t bh, float* state, int64_t first, int64_t lanes, int64_t values) {
            const int64_t t0 = index * s.chunk, t1 = s.steps - t0 < s.chunk ? s.steps : t0 + s.chunk;
            if (saved) copy_out(state, first, lanes, values, saved + (bh * s.chunks() + index) * n * n);
            for (int64_t t = t0, stop; t < t1; t = stop) {
                stop = in.piece_end(s, bh, t);
                if (in.starts(s, bh, t)) std::memset(state, 0, size * sizeof(float));
                c.read(s, in, bh, t, stop, 0);
                for (int64_t step = t; step < stop; step++) {
                    fetch_to_write(y + s.row(bh, step) + first, values);
                    if (saved_u) fetch_to_write(saved_u + s.row(bh, step) + first, values);
                }
                forward_piece(c, stop - t, n, lanes, state, c.uv + first, out.get());
                for (int64_t step = 0; t + step < stop; step++) {
                    const int64_t to = s.row(bh, t + step) + first;
                    write_row(&out[(2 * step + 1) * (lanes + ROWS)], y + to, values);
                    if (saved_u) write_row(c.uv + 2 * step * all + first, saved_u + to, values);
                }
            }
        });
    for_tasks([&](int64_t bh, float* state, int64_t first, int64_t lanes, int64_t values) {
        copy_out(state, first, lanes, values, state_out + bh * n * n);
    });
}

// The same tasks where each has a single step, of which nothing is saved: the state is read and written once, in its own
// layout, which takes a third of a piece's time.
template <class T>
void step_group(const Sizes& s, const Inputs<T>& in, const float* state_in, T* y, float* state_out, int64_t parts,
                int64_t begin, int64_t end) {
    const int64_t n = s.n, lanes = s.lanes();
    Rows c(s, 1);
    Buffer row = zeros(lanes);
    const float *a = c.ar, *r = a + lanes, *b = c.bk, *k = b + lanes, *v = c.uv + lanes;
    alignas(64) float sums[W];
    for (int64_t task = begin; task < end; task++) {
        const int64_t bh = task / parts, part = task % parts;
        c.read(s, in, bh, 0, 1, 0);
        for (int64_t i = part * n / parts; i < (part + 1) * n / parts; i++) {
            const int64_t at = (bh * n + i) * n;
            if (in.starts(s, bh, 0))
                std::memset(row.get(), 0, n * sizeof(float));
            else
                read_row(state_in + at, row.get(), n);
            Vec total = {};
            for (int64_t j = 0; j < lanes; j += W) total += load(&row[j]) * load(a + j);
            store(sums, total);
            const float u = sum(sums), vi = v[i];
            total = Vec{};
            for (int64_t j = 0; j < lanes; j += W) {
                const Vec x = load(&row[j]) + u * load(b + j) + vi * load(k + j);
                total += x * load(r + j);
                store(&row[j], x * load(c.decay + j));
            }
            store(sums, total);
            from_float(sum(sums), y[bh * n + i]);
            write_row(row.get(), state_out + at, n);
        }
    }
}

// What the backward of a piece computes, in rows as those of AR and BK.
struct PieceGradients {
    int64_t lanes;
    Buffer bk_columns, duv_columns, pairs, duv, dar, dbk_later, dbk_inside, dlog;

    explicit PieceGradients(int64_t lanes)
        : lanes(lanes),
          bk_columns(zeros(lanes * ROWS)),
          duv_columns(zeros(lanes * ROWS)),
          pairs(zeros(ROWS * ROWS)),
          duv(zeros(ROWS * lanes)),                // the gradients of UV
          dar(zeros(ROWS * (lanes + ROWS))),       // of AR, each row with the gradient of a row of L behind it
          dbk_later(zeros(ROWS * lanes)),          // of BK through the state after the piece
          dbk_inside(zeros(ROWS * lanes)),         // of BK through L
          dlog(zeros((STEPS + 1) * lanes)) {}      // of the logs of the decays; in the last row they are summed

    // ar, bk, uv: the piece's rows. duy: the gradients of y in its odd rows; those of u are put in the even ones.
    // state: the one before the piece, [value][lanes + ROWS], where UV^T is put behind the keys. decay: that of the
    // piece's last step. g: the gradient of the state after the piece, [value][lanes], replaced by that of the one
    // before, or by zeros if a document begins with the piece.
    void compute(int64_t steps, int64_t n, const float* ar, const float* bk, const float* uv, float* duy, float* state,
                 const float* decay, float* g, bool starts) {
        const int64_t rows = 2 * steps, row = lanes + ROWS;
        for (int64_t j = 0; j < lanes; j += W) {
            Vec sum = {};
            for (int64_t i = 0; i < n; i++) {
                const Vec x = load(g + i * lanes + j) * load(decay + j);
                store(g + i * lanes + j, x);
                sum += x * load(state + i * row + j);
            }
            store(&dlog[STEPS * lanes + j], sum);
        }
        transpose(bk, lanes, bk_columns.get(), ROWS, ROWS, lanes);
        transpose(uv, lanes, state + lanes, row, ROWS, lanes);
        product(rows, ROWS, n, ar, lanes, 1, bk_columns.get(), ROWS, nothing, into(pairs.get(), ROWS));
        product(n, ROWS, n, g, lanes, 1, bk_columns.get(), ROWS, nothing, into(duv_columns.get(), ROWS));
        transpose(duv_columns.get(), ROWS, duv.get(), lanes, lanes, ROWS);
        for (int64_t q = rows - 2; q >= 0; q -= 2) {  // rows q and q + 1 of UV are met by those of AR from q + 1 on
            float* to = &duv[q * lanes];
            band<2>(0, lanes, rows - 1 - q, &pairs[(q + 1) * ROWS + q], 1, ROWS, duy + (q + 1) * lanes, lanes,
                    from(to, lanes), into(to, lanes));
            std::memcpy(duy + q * lanes, to, lanes * sizeof(float));
        }
        product(rows, row, n, duy, lanes, 1, state, row, nothing, into(dar.get(), row));
        for (int64_t p = 0; p < rows; p++) {
            float* to = &dar[p * row];
            band<1>(0, lanes, meets(p), to + lanes, row, 1, bk, lanes, from(to, row), into(to, row));
        }
        product(rows, lanes, n, uv, lanes, 1, g, lanes, nothing, into(dbk_later.get(), lanes));
        for (int64_t q = rows - 2; q >= 0; q -= 2)
            band<2>(0, lanes, rows - 1 - q, &dar[(q + 1) * row + lanes + q], 1, row, ar + (q + 1) * lanes, lanes,
                    nothing, into(&dbk_inside[q * lanes], lanes));
        if (starts)
            std::memset(g, 0, n * lanes * sizeof(float));
        else
            product(n, lanes, rows, duy, 1, lanes, ar, lanes, from(g, lanes), into(g, lanes));
    }
};

template <class T>
struct Gradients {
    T *r, *z, *k, *v, *a, *b;
    float* state;

    // Writes the gradients of a piece of `steps` steps, the first of which is row `at` of c and step t of the head.
    void write(const Sizes& s, const Rows& c, PieceGradients& w, int64_t bh, int64_t t, int64_t steps,
               int64_t at) const {
        const int64_t n = s.n, lanes = s.lanes();
        float* sums = &w.dlog[STEPS * lanes];
        // A decay is passed by the state before the piece, by the rows of BK of earlier steps on their way to the state
        // after it, and by what rows of AR from its step on have from before: all that they have but what they meet of
        // rows of BK from its step on.
        for (int64_t step = 0; step < steps; step++) {
            const float *b = c.bk + 2 * (at + step) * lanes, *k = b + lanes;
            const float *db = &w.dbk_later[2 * step * lanes], *dk = db + lanes;
            float* dlog = &w.dlog[step * lanes];
#pragma omp simd
            for (int64_t j = 0; j < n; j++) {
                dlog[j] = sums[j];
                sums[j] += b[j] * db[j] + k[j] * dk[j];
            }
        }
        std::memset(sums, 0, lanes * sizeof(float));
        for (int64_t step = steps - 1; step >= 0; step--) {
            const int64_t to = s.row(bh, t + step), in = (at + step) * lanes;
            const float *a_in = c.ar + 2 * in, *r_in = a_in + lanes, *b_in = c.bk + 2 * in, *k_in = b_in + lanes;
            const float *da = &w.dar[2 * step * (lanes + ROWS)], *dr = da + lanes + ROWS;
            const float *db_later = &w.dbk_later[2 * step * lanes], *dk_later = db_later + lanes;
            const float *db = &w.dbk_inside[2 * step * lanes], *dk = db + lanes, *dlog = &w.dlog[step * lanes];
            const float *decay = c.decay + in, *decay_before = step ? decay - lanes : c.ones;
            const float *inverse = c.inverse + in, *slope = c.slope + in;
            T *r_to = r + to, *z_to = z + to, *k_to = k + to, *a_to = a + to, *b_to = b + to;
#pragma omp simd
            for (int64_t j = 0; j < n; j++) {
                const float sum = sums[j] + (r_in[j] * dr[j] - b_in[j] * db[j] - k_in[j] * dk[j]);
                sums[j] = sum + a_in[j] * da[j];
                from_float((dlog[j] + sum) * slope[j], z_to[j]);
                from_float(da[j] * decay_before[j], a_to[j]);
                from_float(dr[j] * decay[j], r_to[j]);
                from_float((db_later[j] + db[j]) * inverse[j], b_to[j]);
                from_float((dk_later[j] + dk[j]) * inverse[j], k_to[j]);
            }
            write_row(&w.duv[(2 * step + 1) * lanes], v + to, n);
        }
    }
};

// The heads from `begin` to end - 1, which take turns as in the forward.
template <class T>
void backward_group(const Sizes& s, const Inputs<T>& in, const float* saved, const float* saved_u, const T* grad_y,
                    const float* grad_state, const Gradients<T>& grad, int64_t begin, int64_t end) {
    const int64_t n = s.n, lanes = s.lanes(), row = lanes + ROWS, slots = (s.chunk + STEPS - 1) / STEPS;
    Rows c(s, s.chunk);
    PieceGradients w(lanes);
    Buffer gs = zeros((end - begin) * lanes * lanes), duy = zeros(2 * s.chunk * lanes);
    Buffer states = zeros((slots + 1) * lanes * row);  // before each piece; the last is 0, where a document begins
    auto g = [&](int64_t bh, int64_t i) { return &gs[((bh - begin) * lanes + i) * lanes]; };
    for (int64_t bh = begin; grad_state && bh < end; bh++)
        for (int64_t i = 0; i < n; i++) read_row(grad_state + (bh * n + i) * n, g(bh, i), n);

    auto chunk = [&](int64_t bh, int64_t index) {
        const int64_t t0 = index * s.chunk, t1 = s.steps - t0 < s.chunk ? s.steps : t0 + s.chunk;
        auto before = [&](int64_t t) {
            return &states[(in.starts(s, bh, t) ? slots : (t - t0) / STEPS) * lanes * row];
        };
        for (int64_t t = t0; t < t1; t++) {
            read_row(saved_u + s.row(bh, t), c.uv + 2 * (t - t0) * lanes, n);
            if (grad_y) read_row(grad_y + s.row(bh, t), &duy[(2 * (t - t0) + 1) * lanes], n);
        }
        for (int64_t i = 0; !in.starts(s, bh, t0) && i < n; i++)
            read_row(saved + ((bh * s.chunks() + index) * n + i) * n, before(t0) + i * row, n);
        for (int64_t t = t0, stop; t < t1; t = stop) {
            stop = in.piece_end(s, bh, t);
            c.read(s, in, bh, t, stop, t - t0);
            if (stop == t1 || in.starts(s, bh, stop)) continue;
            const float* decay = c.decay + (stop - 1 - t0) * lanes;
            float* after = before(stop);
            product(n, lanes, 2 * (stop - t), c.uv + 2 * (t - t0) * lanes, 1, lanes, c.bk + 2 * (t - t0) * lanes, lanes,
                    from(before(t), row),
                    [=](int64_t i, int64_t j, Vec x) { store(after + i * row + j, x * load(decay + j)); });
        }
        for (int64_t stop = t1, t; stop > t0; stop = t) {
            t = stop - 1;
            while (t > t0 && in.piece_end(s, bh, t - 1) == stop) t--;
            for (int64_t step = t; step < stop; step++)
                for (const T* x : {grad.r, grad.z, grad.k, grad.v, grad.a, grad.b})
                    fetch_to_write(x + s.row(bh, step), n);
            const int64_t at = 2 * (t - t0) * lanes;
            w.compute(stop - t, n, c.ar + at, c.bk + at, c.uv + at, &duy[at], before(t),
                      c.decay + (stop - 1 - t0) * lanes, g(bh, 0), in.starts(s, bh, t));
            grad.write(s, c, w, bh, t, stop - t, t - t0);
        }
    };
    for (int64_t index = s.chunks() - 1; index >= 0; index--)
        for (int64_t bh = begin; bh < end; bh++) chunk(bh, index);
    for (int64_t bh = begin; bh < end; bh++)
        for (int64_t i = 0; i < n; i++) write_row(g(bh, i), grad.state + (bh * n + i) * n, n);
}

// Gives each thread its share of the tasks, f(begin, end) at most GROUP of them.
template <class F>
void share(int64_t tasks, int64_t threads, F f) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t thread = 0; thread < threads; thread++) {
        const int64_t last = (thread + 1) * tasks / threads;
        for (int64_t begin = thread * tasks / threads; begin < last; begin += GROUP)
            f(begin, begin + GROUP < last ? begin + GROUP : last);
    }
}

template <class T>
void forward(const Sizes& s, const Inputs<T>& in, const float* state_in, T* y, float* state_out, float* saved,
             float* saved_u, int threads) {
    // With fewer heads than threads, several threads share the value lanes of a head.
    const int64_t heads = s.batch * s.heads, vecs = s.lanes() / W;
    if (heads == 0) return;
    const int64_t wanted = (threads + heads - 1) / heads, parts = wanted < vecs ? wanted : vecs;
    share(heads * parts, threads, [&](int64_t begin, int64_t end) {
        if (s.steps == 1 && !saved)
            step_group(s, in, state_in, y, state_out, parts, begin, end);
        else
            forward_group(s, in, state_in, y, state_out, saved, saved_u, parts, begin, end);
    });
}

template <class T>
void backward(const Sizes& s, const Inputs<T>& in, const float* saved, const float* saved_u, const T* grad_y,
              const float* grad_state, const Gradients<T>& grad, int threads) {
    share(s.batch * s.heads, threads, [&](int64_t begin, int64_t end) {
        backward_group(s, in, saved, saved_u, grad_y, grad_state, grad, begin, end);
    });
}

// The operator of rwkv_miss/ops/wkv_operators.py.
std::tuple<Tensor, Tensor, Tensor, Tensor> wkv7_cpu(const Tensor& r, const Tensor& z, const Tensor& k, const Tensor& v,
                                                    const Tensor& a, const Tensor& b, const Tensor& state,
                                                    const MaybeTensor& seq_start, bool save) {
    const Sizes s{v.size(0), v.size(1), v.size(2), v.size(3), SAVE_EVERY};
    const Made y(v), last(state);
    const Saved states(save, {s.batch, s.heads, s.chunks(), s.n, s.n}, state), u(save, v.sizes(), state);
    with_type(v, [&](auto type) {
        forward<decltype(type)>(s, {Given(r), Given(z), Given(k), Given(v), Given(a), Given(b), Given(seq_start)},
                                Given(state), y, last, states, u, at::get_num_threads());
    });
    return {y.tensor, last.tensor, states.tensor, u.tensor};
}

}  // namespace

// To be called once.
extern "C" void register_operators() {
    static torch::Library library(torch::Library::IMPL, "rwkv_miss", c10::DispatchKey::CPU, __FILE__, __LINE__);
    library.impl("wkv7_cpu", wkv7_cpu);
}

// start: uint8 (B, T), or null where no document begins. saved: (B, H, chunks, N_value, N_key) and saved_u: (B, T, H,
// N), fp32, what the forward saved.
// grad_y and grad_state, the gradients of y and of the last state, are null for zeros.
#define BACKWARD(name, T)                                                                                           \
    extern "C" void name(const T* r, const T* z, const T* k, const T* v, const T* a, const T* b,                    \
                         const uint8_t* start, const float* saved, const float* saved_u, const T* grad_y,           \
                         const float* grad_state, T* dr, T* dz, T* dk, T* dv, T* da, T* db, float* dstate,          \
                         int64_t batch, int64_t steps, int64_t heads, int64_t n, int64_t chunk, int64_t threads) {  \
        backward<T>({batch, steps, heads, n, chunk}, {r, z, k, v, a, b, start}, saved, saved_u, grad_y, grad_state, \
                    {dr, dz, dk, dv, da, db, dstate}, int(threads));                                                \
    }
BACKWARD(wkv7_backward_float32, float)
BACKWARD(wkv7_backward_bfloat16, bf16)
