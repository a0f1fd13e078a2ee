// What the models compute between matrix products (rwkv_miss/ops/fused.py): one pass over memory each, in fp32, rounded
// once. T is float or bf16. A pointer to what is not there, or not asked for, is null.
#include <algorithm>
#include <cmath>

#include "common.h"
#include "tensors.h"

#define LANES _Pragma("GCC ivdep") for (int64_t i = 0; i < n; i++)

namespace {

// The most outputs of token_mix.
constexpr int MAX_MIXES = 6;

// Starting threads takes as long as this many elements.
int team(int64_t elements, int64_t threads) { return elements < 32768 ? 1 : int(threads); }

// `count` rows of floats, each zeros at first and padded with zeros to whole vectors: where the heads of one token are
// worked on.
struct Rows {
    int64_t lanes;
    Buffer buffer;
    Rows(int64_t count, int64_t n) : lanes((n + W - 1) / W * W), buffer(zeros(count * lanes)) {}
    float* operator[](int64_t i) const { return buffer.get() + i * lanes; }
    // The sum of a row.
    float total(const float* row) const {
        Vec sums = {};
        for (int64_t i = 0; i < lanes; i += W) sums += load(row + i);
        alignas(64) float last[W];
        store(last, sums);
        return sum(last);
    }
};

// In a loop of its own: GCC makes two of what is computed from exp's result, and that for exp's bounds, done for every
// lane and then not used, takes many times as long where it has products below 1e-38.
template <class T>
void sigmoids(const T* x, float* __restrict__ to, int64_t n) {
    LANES to[i] = 1.0f / (1.0f + exp_lanes(-to_float(x[i])));
}

void add(const float* from, float* to, int64_t n) { LANES to[i] += from[i]; }

// Tokens that are worked on together, and what of p belongs to them: the sums of the parameters' gradients.
struct Part {
    int64_t number, begin, end;
    float* of(float* p, int64_t width) const { return p + number * width; }
};
template <class Function>
void for_parts(int64_t rows, int64_t part_rows, int64_t width, int64_t threads, Function function) {
    const int64_t count = (rows + part_rows - 1) / part_rows;
#pragma omp parallel for num_threads(team(rows* width, threads)) schedule(static)
    for (int64_t i = 0; i < count; i++) function(Part{i, i * part_rows, std::min(rows, (i + 1) * part_rows)});
}

template <class T>
struct Mix {
    const T *x, *last;
    const uint8_t* seq_start;
    const T *mixes, *extra;
    int64_t batch, steps, channels, n_mixes;

    int64_t rows() const { return batch * steps; }
    bool starts(int64_t row) const { return seq_start && seq_start[row]; }
    // The token before, or null where it is zeros.
    const T* before(int64_t row) const {
        if (starts(row)) return nullptr;
        return row % steps ? x + (row - 1) * channels : last + row / steps * channels;
    }
    // change = the token before - the token
    void read_change(int64_t row, float* __restrict__ change) const {
        const int64_t n = channels;
        const T *here = x + row * n, *other = before(row);
        if (other)
            LANES change[i] = to_float(other[i]) - to_float(here[i]);
        else
            LANES change[i] = -to_float(here[i]);
    }
    // The share of mix m for each channel of a token; `share` holds the mix itself.
    const float* share(int64_t m, int64_t row, const float* mix, float* __restrict__ share) const {
        if (!extra) return mix;
        const int64_t n = channels;
        const T* more = extra + (m * rows() + row) * n;
        LANES share[i] = mix[i] + to_float(more[i]);
        return share;
    }
};

template <class T>
void mix_forward(const Mix<T>& mix, T* const* out, int64_t threads) {
    const int64_t n = mix.channels;
    Rows mixes(mix.n_mixes, n);
    for (int64_t m = 0; m < mix.n_mixes; m++) read_row(mix.mixes + m * n, mixes[m], n);
    for_parts(mix.rows(), 16, n * mix.n_mixes, threads, [&](Part part) {
        Rows own(2, n);
        for (int64_t row = part.begin; row < part.end; row++) {
            float* __restrict__ change = own[0];
            mix.read_change(row, change);
            const T* x = mix.x + row * n;
            for (int64_t m = 0; m < mix.n_mixes; m++) {
                const float* share = mix.share(m, row, mixes[m], own[1]);
                T* y = out[m] + row * n;
                LANES from_float(to_float(x[i]) + change[i] * share[i], y[i]);
            }
        }
    });
}

template <class T>
void mix_backward(const Mix<T>& mix, const T* const* dout, T* dx, T* dlast, float* dmixes, T* dextra, int64_t part_rows,
                  int64_t threads) {
    const int64_t n = mix.channels, rows = mix.rows();
    Rows mixes(mix.n_mixes, n);
    for (int64_t m = 0; m < mix.n_mixes; m++) read_row(mix.mixes + m * n, mixes[m], n);
    for_parts(rows, part_rows, n * mix.n_mixes, threads, [&](Part part) {
        Rows own(5, n);
        Rows sums(dmixes ? mix.n_mixes : 0, n);
        float *here = own[0], *before = own[1], *after = own[2], *change = own[3];
        // here, before: the gradients of x_t by itself and of the token before it, by this token's outputs.
        auto gradients = [&](int64_t row) {
            std::memset(here, 0, n * sizeof(float));
            std::memset(before, 0, n * sizeof(float));
            for (int64_t m = 0; m < mix.n_mixes; m++) {
                const float* share = mix.share(m, row, mixes[m], own[4]);
                const T* dy = dout[m] + row * n;
                float *__restrict__ a = here, *__restrict__ b = before;
                LANES {
                    const float d = to_float(dy[i]);
                    a[i] += d;
                    b[i] += d * share[i];
                }
            }
        };
        // A token's gradient is not whole without the token after it, which may lie in another part.
        const bool is_whole = part.end % mix.steps == 0 || mix.starts(part.end);
        if (!is_whole) gradients(part.end);
        if (!is_whole) std::swap(before, after);
        for (int64_t row = part.end - 1; row >= part.begin; row--) {
            const bool has_after = (row + 1) % mix.steps != 0 && !mix.starts(row + 1);
            gradients(row);
            if (dx) {
                T* d = dx + row * n;
                if (has_after)
                    LANES from_float(here[i] - before[i] + after[i], d[i]);
                else
                    LANES from_float(here[i] - before[i], d[i]);
            }
            if (dlast && row % mix.steps == 0) {
                T* d = dlast + row / mix.steps * n;
                const bool starts = mix.starts(row);
                LANES from_float(starts ? 0.0f : before[i], d[i]);
            }
            if (dmixes || dextra) {
                mix.read_change(row, change);
                for (int64_t m = 0; m < mix.n_mixes; m++) {
                    const T* dy = dout[m] + row * n;
                    if (dmixes) {
                        float* __restrict__ total = sums[m];
                        LANES total[i] += to_float(dy[i]) * change[i];
                    }
                    if (dextra) {
                        T* d = dextra + (m * rows + row) * n;
                        LANES from_float(to_float(dy[i]) * change[i], d[i]);
                    }
                }
            }
            std::swap(before, after);
        }
        if (dmixes)
            for (int64_t m = 0; m < mix.n_mixes; m++)
                std::memcpy(part.of(dmixes, mix.n_mixes * n) + m * n, sums[m], n * sizeof(float));
    });
}

// kk = k k_k / max(|k k_k|, EPS), in one head.
constexpr float EPS = 1e-12f;

template <class T>
void arguments_forward(const T* k, const T* v, const T* v_first, const T* a, const T* nu, const T* k_k, const T* k_a,
                       T* k_out, T* v_out, T* minus_kk, T* kk_rate, int64_t rows, int64_t heads, int64_t n,
                       int64_t threads) {
    for_parts(rows, 16, heads * n, threads, [&](Part part) {
        Rows own(2, n);
        float *__restrict__ kk = own[0], *__restrict__ buffer = own[1];
        for (int64_t at = part.begin * heads * n; at < part.end * heads * n; at += n) {
            const int64_t channel = at % (heads * n);
            const T *k1 = k + at, *a1 = a + at, *kk1 = k_k + channel, *ka1 = k_a + channel;
            LANES {
                kk[i] = to_float(k1[i]) * to_float(kk1[i]);
                buffer[i] = kk[i] * kk[i];
            }
            const float scale = 1.0f / std::max(std::sqrt(own.total(buffer)), EPS);
            T *k2 = k_out + at, *minus = minus_kk + at, *rated = kk_rate + at;
            sigmoids(a1, buffer, n);
            LANES {
                const float unit = kk[i] * scale;
                from_float(to_float(k1[i]) * (1.0f + (buffer[i] - 1.0f) * to_float(ka1[i])), k2[i]);
                from_float(-unit, minus[i]);
                from_float(unit * buffer[i], rated[i]);
            }
            if (v_out) {
                const T *v1 = v + at, *first = v_first + at, *nu1 = nu + at;
                T* v2 = v_out + at;
                sigmoids(nu1, buffer, n);
                LANES {
                    const float x = to_float(v1[i]);
                    from_float(x + (to_float(first[i]) - x) * buffer[i], v2[i]);
                }
            }
        }
    });
}

template <class T>
void arguments_backward(const T* k, const T* v, const T* v_first, const T* a, const T* nu, const T* k_k, const T* k_a,
                        const T* dk_out, const T* dv_out, const T* dminus_kk, const T* dkk_rate, T* dk, T* dv,
                        T* dv_first, T* da, T* dnu, float* dk_k, float* dk_a, int64_t rows, int64_t heads, int64_t n,
                        int64_t part_rows, int64_t threads) {
    const int64_t width = heads * n;
    for_parts(rows, part_rows, width, threads, [&](Part part) {
        Rows own(6, n), sums_kk(1, width), sums_ka(1, width);
        float *__restrict__ kk = own[0], *__restrict__ products = own[1], *__restrict__ rate = own[2];
        float *__restrict__ dkk = own[3], *__restrict__ by_k = own[4], *__restrict__ result = own[5];
        for (int64_t at = part.begin * width; at < part.end * width; at += n) {
            const int64_t channel = at % width;
            const T *k1 = k + at, *a1 = a + at, *kk1 = k_k + channel, *ka1 = k_a + channel;
            const T *dk2 = dk_out + at, *dminus = dminus_kk + at, *drated = dkk_rate + at;
            LANES {
                kk[i] = to_float(k1[i]) * to_float(kk1[i]);
                products[i] = kk[i] * kk[i];
            }
            const float norm = std::sqrt(own.total(products));
            const float scale = 1.0f / std::max(norm, EPS);
            sigmoids(a1, rate, n);
            LANES {
                kk[i] *= scale;
                dkk[i] = to_float(drated[i]) * rate[i] - to_float(dminus[i]);
                products[i] = kk[i] * dkk[i];
            }
            // Below EPS, kk is k k_k times a constant.
            const float along = norm < EPS ? 0.0f : own.total(products);
            LANES {
                const float x = to_float(k1[i]), d = to_float(dk2[i]), share = to_float(ka1[i]);
                const float raw = (dkk[i] - kk[i] * along) * scale;
                result[i] = d * (1.0f + (rate[i] - 1.0f) * share) + raw * to_float(kk1[i]);
                by_k[i] = raw * x;
                const float drate = to_float(drated[i]) * kk[i] + d * x * share;
                products[i] = d * x * (rate[i] - 1.0f);
                rate[i] *= (1.0f - rate[i]) * drate;
            }
            if (dk) write_row(result, dk + at, n);
            if (da) write_row(rate, da + at, n);
            if (dk_k) add(by_k, sums_kk[0] + channel, n);
            if (dk_a) add(products, sums_ka[0] + channel, n);
            if (dv_out) {
                const T *v1 = v + at, *first = v_first + at, *nu1 = nu + at, *d = dv_out + at;
                sigmoids(nu1, rate, n);
                LANES {
                    const float dy = to_float(d[i]);
                    dkk[i] = dy * rate[i];
                    kk[i] = dy - dkk[i];
                    result[i] = dkk[i] * (1.0f - rate[i]) * (to_float(first[i]) - to_float(v1[i]));
                }
                if (dv) write_row(kk, dv + at, n);
                if (dv_first) write_row(dkk, dv_first + at, n);
                if (dnu) write_row(result, dnu + at, n);
            }
        }
        if (dk_k) write_row(sums_kk[0], part.of(dk_k, width), width);
        if (dk_a) write_row(sums_ka[0], part.of(dk_a, width), width);
    });
}

// A head of the group norm.
struct Norm {
    float mean, scale;
};
// y1 -> y, and normed = (y - mean) scale
template <class T>
Norm normalise(const Rows& own, const T* y1, float* __restrict__ y, float* __restrict__ normed, float eps, int64_t n) {
    read_row(y1, y, n);
    const float mean = own.total(y) / float(n);
    LANES normed[i] = (y[i] - mean) * (y[i] - mean);
    const float scale = 1.0f / std::sqrt(own.total(normed) / float(n) + eps);
    LANES normed[i] = (y[i] - mean) * scale;
    return {mean, scale};
}
// The gradient of a head's y, given that of the normed values in `d`, which it replaces; `products` is overwritten.
void unnormalise(const Rows& own, Norm norm, const float* normed, float* __restrict__ d, float* __restrict__ products,
                 int64_t n) {
    LANES products[i] = d[i] * normed[i];
    const float along = own.total(products) / float(n), mean = own.total(d) / float(n);
    LANES d[i] = (d[i] - mean - normed[i] * along) * norm.scale;
}

template <class T>
void output7_forward(const T* y, const T* r, const T* k, const T* v, const T* g, const T* weight, const T* bias,
                     const T* r_k, float eps, T* out, int64_t rows, int64_t heads, int64_t n, int64_t threads) {
    const int64_t width = heads * n;
    for_parts(rows, 16, width, threads, [&](Part part) {
        Rows own(3, n);
        float *__restrict__ normed = own[1], *__restrict__ products = own[2];
        for (int64_t at = part.begin * width; at < part.end * width; at += n) {
            const int64_t channel = at % width;
            normalise(own, y + at, own[0], normed, eps, n);
            const T *r1 = r + at, *k1 = k + at, *v1 = v + at, *g1 = g + at;
            const T *w1 = weight + channel, *b1 = bias + channel, *rk1 = r_k + channel;
            LANES products[i] = to_float(r1[i]) * to_float(k1[i]) * to_float(rk1[i]);
            const float bonus = own.total(products);
            T* out1 = out + at;
            LANES {
                const float x = normed[i] * to_float(w1[i]) + to_float(b1[i]) + bonus * to_float(v1[i]);
                from_float(x * to_float(g1[i]), out1[i]);
            }
        }
    });
}

template <class T>
void output7_backward(const T* y, const T* r, const T* k, const T* v, const T* g, const T* weight, const T* bias,
                      const T* r_k, float eps, const T* dout, T* dy, T* dr, T* dk, T* dv, T* dg, float* dweight,
                      float* dbias, float* dr_k, int64_t rows, int64_t heads, int64_t n, int64_t part_rows,
                      int64_t threads) {
    const int64_t width = heads * n;
    for_parts(rows, part_rows, width, threads, [&](Part part) {
        Rows own(6, n), sums(3, width);
        float *__restrict__ normed = own[1], *__restrict__ products = own[2], *__restrict__ e = own[3];
        float *__restrict__ by_r = own[4], *__restrict__ by_k = own[5];
        for (int64_t at = part.begin * width; at < part.end * width; at += n) {
            const int64_t channel = at % width;
            const Norm norm = normalise(own, y + at, own[0], normed, eps, n);
            const T *r1 = r + at, *k1 = k + at, *v1 = v + at, *g1 = g + at, *d1 = dout + at;
            const T *w1 = weight + channel, *b1 = bias + channel, *rk1 = r_k + channel;
            LANES products[i] = to_float(r1[i]) * to_float(k1[i]) * to_float(rk1[i]);
            const float bonus = own.total(products);
            LANES {
                e[i] = to_float(d1[i]) * to_float(g1[i]);
                products[i] = e[i] * to_float(v1[i]);
            }
            const float dbonus = own.total(products);
            LANES {
                by_r[i] = dbonus * to_float(k1[i]) * to_float(rk1[i]);
                by_k[i] = dbonus * to_float(r1[i]) * to_float(rk1[i]);
                products[i] = e[i] * bonus;
            }
            if (dr) write_row(by_r, dr + at, n);
            if (dk) write_row(by_k, dk + at, n);
            if (dv) write_row(products, dv + at, n);
            if (dg) {
                T* dg1 = dg + at;
                LANES {
                    const float x = normed[i] * to_float(w1[i]) + to_float(b1[i]) + bonus * to_float(v1[i]);
                    from_float(x * to_float(d1[i]), dg1[i]);
                }
            }
            if (dweight) {
                float *__restrict__ total = sums[0] + channel;
                LANES total[i] += e[i] * normed[i];
            }
            if (dbias) add(e, sums[1] + channel, n);
            if (dr_k) {
                float *__restrict__ total = sums[2] + channel;
                LANES total[i] += dbonus * to_float(r1[i]) * to_float(k1[i]);
            }
            if (dy) {
                LANES e[i] *= to_float(w1[i]);
                unnormalise(own, norm, normed, e, products, n);
                write_row(e, dy + at, n);
            }
        }
        if (dweight) write_row(sums[0], part.of(dweight, width), width);
        if (dbias) write_row(sums[1], part.of(dbias, width), width);
        if (dr_k) write_row(sums[2], part.of(dr_k, width), width);
    });
}

template <class T>
void output6_forward(const T* y, const T* g, const T* weight, const T* bias, float eps, T* out, int64_t rows,
                     int64_t heads, int64_t n, int64_t threads) {
    const int64_t width = heads * n;
    for_parts(rows, 16, width, threads, [&](Part part) {
        Rows own(3, n);
        float *__restrict__ normed = own[1], *__restrict__ open = own[2];
        for (int64_t at = part.begin * width; at < part.end * width; at += n) {
            const int64_t channel = at % width;
            normalise(own, y + at, own[0], normed, eps, n);
            const T *g1 = g + at, *w1 = weight + channel, *b1 = bias + channel;
            T* out1 = out + at;
            sigmoids(g1, open, n);
            LANES {
                const float x = normed[i] * to_float(w1[i]) + to_float(b1[i]);
                from_float(x * to_float(g1[i]) * open[i], out1[i]);
            }
        }
    });
}

template <class T>
void output6_backward(const T* y, const T* g, const T* weight, const T* bias, float eps, const T* dout, T* dy, T* dg,
                      float* dweight, float* dbias, int64_t rows, int64_t heads, int64_t n, int64_t part_rows,
                      int64_t threads) {
    const int64_t width = heads * n;
    for_parts(rows, part_rows, width, threads, [&](Part part) {
        Rows own(5, n), sums(2, width);
        float *__restrict__ normed = own[1], *__restrict__ products = own[2], *__restrict__ e = own[3];
        float* __restrict__ by_g = own[4];
        for (int64_t at = part.begin * width; at < part.end * width; at += n) {
            const int64_t channel = at % width;
            const Norm norm = normalise(own, y + at, own[0], normed, eps, n);
            const T *g1 = g + at, *d1 = dout + at, *w1 = weight + channel, *b1 = bias + channel;
            sigmoids(g1, products, n);
            LANES {
                const float gate = to_float(g1[i]), d = to_float(d1[i]), open = products[i];
                const float x = normed[i] * to_float(w1[i]) + to_float(b1[i]);
                by_g[i] = d * x * open * (1.0f + gate * (1.0f - open));
                e[i] = d * gate * open;
            }
            if (dg) write_row(by_g, dg + at, n);
            if (dweight) {
                float *__restrict__ total = sums[0] + channel;
                LANES total[i] += e[i] * normed[i];
            }
            if (dbias) add(e, sums[1] + channel, n);
            if (dy) {
                LANES e[i] *= to_float(w1[i]);
                unnormalise(own, norm, normed, e, products, n);
                write_row(e, dy + at, n);
            }
        }
        if (dweight) write_row(sums[0], part.of(dweight, width), width);
        if (dbias) write_row(sums[1], part.of(dbias, width), width);
    });
}

// Calls function(begin, n) for pieces of `count` elements.
template <class Function>
void for_pieces(int64_t count, int64_t threads, Function function) {
    for_parts(count, 2048, 1, threads, [&](Part part) { function(part.begin, part.end - part.begin); });
}

template <class T>
void relu_forward(const T* x, T* out, int64_t count, int64_t threads) {
    for_pieces(count, threads, [=](int64_t begin, int64_t n) {
        const T* x1 = x + begin;
        T* out1 = out + begin;
        LANES {
            const float a = to_float(x1[i]);
            from_float(a <= 0.0f ? 0.0f : a * a, out1[i]);
        }
    });
}

template <class T>
void relu_backward(const T* x, const T* dout, T* dx, int64_t count, int64_t threads) {
    for_pieces(count, threads, [=](int64_t begin, int64_t n) {
        const T *x1 = x + begin, *d1 = dout + begin;
        T* dx1 = dx + begin;
        LANES {
            const float a = to_float(x1[i]);
            from_float(a <= 0.0f ? 0.0f : 2.0f * a * to_float(d1[i]), dx1[i]);
        }
    });
}

template <class T>
void gated_forward(const T* gate, const T* x, T* out, int64_t count, int64_t threads) {
    for_pieces(count, threads, [=](int64_t begin, int64_t n) {
        Rows own(1, n);
        float* __restrict__ open = own[0];
        sigmoids(gate + begin, open, n);
        const T* x1 = x + begin;
        T* out1 = out + begin;
        LANES from_float(open[i] * to_float(x1[i]), out1[i]);
    });
}

template <class T>
void gated_backward(const T* gate, const T* x, const T* dout, T* dgate, T* dx, int64_t count, int64_t threads) {
    for_pieces(count, threads, [=](int64_t begin, int64_t n) {
        Rows own(1, n);
        float* __restrict__ open = own[0];
        sigmoids(gate + begin, open, n);
        const T *x1 = x + begin, *d1 = dout + begin;
        if (dgate) {
            T* to = dgate + begin;
            LANES from_float(to_float(d1[i]) * to_float(x1[i]) * open[i] * (1.0f - open[i]), to[i]);
        }
        if (dx) {
            T* to = dx + begin;
            LANES from_float(to_float(d1[i]) * open[i], to[i]);
        }
    });
}

// The forward operators of rwkv_miss/ops/fused_operators.py: a step of generating calls so many that Python between the
// model and the kernels would take longer than the kernels.

std::vector<Tensor> token_mix(const Tensor& x, const Tensor& last, const MaybeTensor& seq_start, const Tensor& mixes,
                              const MaybeTensor& extra) {
    const int64_t n_mixes = mixes.size(0);
    TORCH_CHECK(n_mixes <= MAX_MIXES, "expected at most ", MAX_MIXES, " mixes, found ", n_mixes);
    std::vector<Tensor> made;
    with_type(x, [&](auto type) {
        using T = decltype(type);
        T* out[MAX_MIXES];
        for (int64_t m = 0; m < n_mixes; m++) {
            const Made y(x);
            out[m] = y;
            made.push_back(y.tensor);
        }
        mix_forward<T>({Given(x), Given(last), Given(seq_start), Given(mixes), Given(extra), x.size(0), x.size(1),
                        x.size(2), n_mixes},
                       out, at::get_num_threads());
    });
    return made;
}

std::vector<Tensor> wkv7_arguments(const Tensor& k, const MaybeTensor& v, const MaybeTensor& v_first, const Tensor& a,
                                   const MaybeTensor& nu, const Tensor& k_k, const Tensor& k_a) {
    const Made k_out(k), v_out(k), minus_kk(k), kk_rate(k);
    with_type(k, [&](auto type) {
        using T = decltype(type);
        arguments_forward<T>(Given(k), Given(v), Given(v_first), Given(a), Given(nu), Given(k_k), Given(k_a), k_out,
                             v ? static_cast<T*>(v_out) : nullptr, minus_kk, kk_rate, k.size(0) * k.size(1), k.size(2),
                             k.size(3), at::get_num_threads());
    });
    if (!v) return {k_out.tensor, minus_kk.tensor, kk_rate.tensor};
    return {k_out.tensor, v_out.tensor, minus_kk.tensor, kk_rate.tensor};
}

std::vector<Tensor> wkv7_output(const Tensor& y, const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& g,
                                const Tensor& weight, const Tensor& bias, const Tensor& r_k, double eps) {
    const Made out(g);
    with_type(y, [&](auto type) {
        output7_forward<decltype(type)>(Given(y), Given(r), Given(k), Given(v), Given(g), Given(weight), Given(bias),
                                        Given(r_k), float(eps), out, y.size(0) * y.size(1), y.size(2), y.size(3),
                                        at::get_num_threads());
    });
    return {out.tensor};
}

std::vector<Tensor> relu_squared(const Tensor& x) {
    const Made out(x);
    with_type(x, [&](auto type) {
        relu_forward<decltype(type)>(Given(x), out, x.numel(), at::get_num_threads());
    });
    return {out.tensor};
}

std::vector<Tensor> wkv6_output(const Tensor& y, const Tensor& g, const Tensor& weight, const Tensor& bias,
                                double eps) {
    const Made out(g);
    with_type(y, [&](auto type) {
        output6_forward<decltype(type)>(Given(y), Given(g), Given(weight), Given(bias), float(eps), out,
                                        y.size(0) * y.size(1), y.size(2), y.size(3), at::get_num_threads());
    });
    return {out.tensor};
}

std::vector<Tensor> gated(const Tensor& gate, const Tensor& x) {
    const Made out(x);
    with_type(x, [&](auto type) {
        gated_forward<decltype(type)>(Given(gate), Given(x), out, x.numel(), at::get_num_threads());
    });
    return {out.tensor};
}

}  // namespace

// To be called once.
extern "C" void register_operators() {
    static torch::Library library(torch::Library::IMPL, "rwkv_miss", c10::DispatchKey::CPU, __FILE__, __LINE__);
    library.impl("token_mix", token_mix);
    library.impl("wkv7_arguments", wkv7_arguments);
    library.impl("wkv7_output", wkv7_output);
    library.impl("relu_squared", relu_squared);
    library.impl("wkv6_output", wkv6_output);
    library.impl("gated", gated);
}

#define FUNCTIONS(T, NAME)                                                                                             \
    extern "C" void token_mix_backward_##NAME(                                                                         \
        const T* x, const T* last, const uint8_t* seq_start, const T* mixes, const T* extra, const T* dout0,           \
        const T* dout1, const T* dout2, const T* dout3, const T* dout4, const T* dout5, T* dx, T* dlast,               \
        float* dmixes, T* dextra, int64_t batch, int64_t steps, int64_t channels, int64_t n_mixes, int64_t part_rows,  \
        int64_t threads) {                                                                                             \
        const T* const dout[MAX_MIXES] = {dout0, dout1, dout2, dout3, dout4, dout5};                                   \
        mix_backward<T>({x, last, seq_start, mixes, extra, batch, steps, channels, n_mixes}, dout, dx, dlast, dmixes,  \
                        dextra, part_rows, threads);                                                                   \
    }                                                                                                                  \
    extern "C" void wkv7_arguments_backward_##NAME(                                                                    \
        const T* k, const T* v, const T* v_first, const T* a, const T* nu, const T* k_k, const T* k_a,                 \
        const T* dk_out, const T* dv_out, const T* dminus_kk, const T* dkk_rate, T* dk, T* dv, T* dv_first, T* da,     \
        T* dnu, float* dk_k, float* dk_a, int64_t rows, int64_t heads, int64_t n, int64_t part_rows,                   \
        int64_t threads) {                                                                                             \
        arguments_backward<T>(k, v, v_first, a, nu, k_k, k_a, dk_out, dv_out, dminus_kk, dkk_rate, dk, dv, dv_first,   \
                              da, dnu, dk_k, dk_a, rows, heads, n, part_rows, threads);                                \
    }                                                                                                                  \
    extern "C" void wkv7_output_backward_##NAME(                                                                       \
        const T* y, const T* r, const T* k, const T* v, const T* g, const T* weight, const T* bias, const T* r_k,      \
        float eps, const T* dout, T* dy, T* dr, T* dk, T* dv, T* dg, float* dweight, float* dbias, float* dr_k,        \
        int64_t rows, int64_t heads, int64_t n, int64_t part_rows, int64_t threads) {                                  \
        output7_backward<T>(y, r, k, v, g, weight, bias, r_k, eps, dout, dy, dr, dk, dv, dg, dweight, dbias, dr_k,     \
                            rows, heads, n, part_rows, threads);                                                       \
    }                                                                                                                  \
    extern "C" void relu_squared_backward_##NAME(const T* x, const T* dout, T* dx, int64_t count, int64_t part_rows,   \
                                                 int64_t threads) {                                                    \
        relu_backward<T>(x, dout, dx, count, threads);                                                                 \
    }                                                                                                                  \
    extern "C" void wkv6_output_backward_##NAME(const T* y, const T* g, const T* weight, const T* bias, float eps,     \
                                                const T* dout, T* dy, T* dg, float* dweight, float* dbias,             \
                                                int64_t rows, int64_t heads, int64_t n, int64_t part_rows,             \
                                                int64_t threads) {                                                     \
        output6_backward<T>(y, g, weight, bias, eps, dout, dy, dg, dweight, dbias, rows, heads, n, part_rows,          \
                            threads);                                                                                  \
    }                                                                                                                  \
    extern "C" void gated_backward_##NAME(const T* gate, const T* x, const T* dout, T* dgate, T* dx, int64_t count,    \
                                          int64_t part_rows, int64_t threads) {                                        \
        gated_backward<T>(gate, x, dout, dgate, dx, count, threads);                                                   \
    }

FUNCTIONS(float, float32)
FUNCTIONS(bf16, bfloat16)
