// The log-probability of each row's target from the row's logits, and its gradient, written over the logits
// (rwkv_miss/ops/log_probs.py). One pass over memory: a row stays in the cache, in fp32, and is rounded once.
#include <algorithm>
#include <cmath>

#include "common.h"

namespace {

constexpr int64_t STEP = 4 * W;      // numbers in a step of a loop: four sums, so that none waits for the one before
constexpr int64_t PART = 16 * STEP;  // numbers that are read again at once

// The largest of n numbers, n a multiple of STEP; NaNs are passed over.
float largest(const float* x, int64_t n) {
    Vec found[4];
    for (int q = 0; q < 4; q++) found[q] = load(x + q * W);
    for (int64_t i = STEP; i < n; i += STEP)
        for (int q = 0; q < 4; q++) {
            const Vec y = load(x + i + q * W);
            found[q] = y > found[q] ? y : found[q];
        }
    float most = found[0][0];
    for (int q = 0; q < 4; q++)
        for (int i = 0; i < W; i++) most = std::max(most, found[q][i]);
    return most;
}

// Replaces x by exp(x - most), 0 below exp(-87), and returns the sum; n as above.
float exp_and_sum(float* x, float most, int64_t n) {
    Vec sums[4] = {};
    for (int64_t start = 0; start < n; start += PART) {
        float* part = x + start;
        const int64_t count = std::min(PART, n - start);
        for (int64_t i = 0; i < count; i++) {
            const float y = part[i] - most;
            part[i] = y < -87.0f ? 0.0f : exp_lanes(y);
        }
        for (int64_t i = 0; i < count; i += STEP)
            for (int q = 0; q < 4; q++) sums[q] += load(part + i + q * W);
    }
    alignas(64) float lanes[W];
    store(lanes, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    return sum(lanes);
}

// logits (rows, n), targets (rows) below n; factors (rows), or null for ones. Where there is an infinity or a NaN among
// a row's logits, but for -infinity, which is a probability of 0, all of the row's results are NaN.
template <class T>
void log_probs(T* logits, const int64_t* targets, const float* factors, float* values, int64_t rows, int64_t n,
               bool needs_gradient, int threads) {
    const int64_t padded = (n + STEP - 1) / STEP * STEP;
#pragma omp parallel num_threads(threads)
    {
        Buffer x = zeros(padded);
#pragma omp for schedule(static)
        for (int64_t m = 0; m < rows; m++) {
            T* row = logits + m * n;
            const int64_t target = targets[m];
            read_row(row, x.get(), n);
            std::fill(x.get() + n, x.get() + padded, -INFINITY);
            const float most = largest(x.get(), padded), at_target = x[target] - most;
            const float total = exp_and_sum(x.get(), most, padded);
            values[m] = at_target - std::log(total);
            if (!needs_gradient) continue;
            const float factor = factors ? factors[m] : 1.0f, scale = -factor / total;
            const float gradient = factor * (1.0f - x[target] / total);
            for (int64_t i = 0; i < n; i++) from_float(x[i] * scale, row[i]);
            from_float(gradient, row[target]);
        }
    }
}

}  // namespace

// Fills values (rows), and replaces the logits by the gradient of the sum of factors * values if there is one to make.
#define LOG_PROBS(name, T)                                                                                       \
    extern "C" void name(T* logits, const int64_t* targets, const float* factors, float* values, int64_t rows,   \
                         int64_t n, int64_t needs_gradient, int64_t threads) {                                   \
        log_probs(logits, targets, factors, values, rows, n, needs_gradient, int(threads));                      \
    }
LOG_PROBS(log_probs_f32, float)
LOG_PROBS(log_probs_bf16, bf16)
