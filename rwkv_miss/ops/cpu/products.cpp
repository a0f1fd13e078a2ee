// Products of single rows, each with a matrix of its own, in fp32 (rwkv_miss/ops/products.py). The matrices are read once
// from end to end: what takes the time is memory.
#include <algorithm>

#include "common.h"

namespace {

// sums[j] += the sum over i < k of x[i] M[i, j] for j < n, where the rows of M lie `width` apart.
template <class T>
void add_product(const T* x, const T* M, float* __restrict__ sums, int64_t k, int64_t n, int64_t width) {
    int64_t i = 0;
    for (; i + 4 <= k; i += 4) {  // the sums are loaded and stored for 4 rows at a time
        const T* m = M + i * width;
        const float a = to_float(x[i]), b = to_float(x[i + 1]), c = to_float(x[i + 2]), d = to_float(x[i + 3]);
        for (int64_t j = 0; j < n; j++)
            sums[j] += a * to_float(m[j]) + b * to_float(m[width + j]) + c * to_float(m[2 * width + j]) +
                       d * to_float(m[3 * width + j]);
    }
    for (; i < k; i++)
        for (int64_t j = 0; j < n; j++) sums[j] += to_float(x[i]) * to_float(M[i * width + j]);
}

template <class T>
void add_products(const T* x, const T* stack, const int64_t* rows, const int64_t* slots, T* y, int64_t count, int64_t k,
                  int64_t n, int64_t threads) {
    const int64_t parts = count < threads ? threads : 1;  // of a row: few rows are shared between threads
    const int64_t width = ((n + parts - 1) / parts + 31) / 32 * 32;
#pragma omp parallel num_threads(threads)
    {
        Buffer sums = zeros(width);
#pragma omp for collapse(2) schedule(static)
        for (int64_t m = 0; m < count; m++)
            for (int64_t part = 0; part < parts; part++) {
                const int64_t at = std::min(part * width, n), size = std::min(width, n - at);
                T* out = y + rows[m] * n + at;
                read_row(out, sums.get(), size);
                add_product(x + rows[m] * k, stack + slots[m] * k * n + at, sums.get(), k, size, n);
                write_row(sums.get(), out, size);
            }
    }
}

}  // namespace

// y[rows[m]] += x[rows[m]] stack[slots[m]] for m < count: x (.., k), stack (.., k, n), y (.., n); no row occurs twice.
extern "C" void add_products_f32(const float* x, const float* stack, const int64_t* rows, const int64_t* slots,
                                 float* y, int64_t count, int64_t k, int64_t n, int64_t threads) {
    add_products(x, stack, rows, slots, y, count, k, n, threads);
}
extern "C" void add_products_bf16(const bf16* x, const bf16* stack, const int64_t* rows, const int64_t* slots, bf16* y,
                                  int64_t count, int64_t k, int64_t n, int64_t threads) {
    add_products(x, stack, rows, slots, y, count, k, n, threads);
}
