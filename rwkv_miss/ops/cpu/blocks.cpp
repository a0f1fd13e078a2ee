// Sums over blocks of columns in bf16 (rwkv_miss/ops/blocks.py): one pass each, in fp32, rounded once.
#include <algorithm>

#include "common.h"

namespace {

void add_block(const bf16* __restrict__ x, float* __restrict__ sums, int64_t n) {
    for (int64_t j = 0; j < n; j++) sums[j] += to_float(x[j]);
}

void add_both(const bf16* x, const bf16* block, bf16* out, int64_t n) {
#pragma GCC ivdep  // out is x or lies apart from it
    for (int64_t j = 0; j < n; j++) from_float(to_float(x[j]) + to_float(block[j]), out[j]);
}

}  // namespace

// S (rows, r) of x (rows, n): S[m, j] is the sum of x[m, c] over the c with c mod r = j.
extern "C" void block_sum(const bf16* x, bf16* S, int64_t rows, int64_t n, int64_t r, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        Buffer sums = zeros(r);
#pragma omp for schedule(static)
        for (int64_t m = 0; m < rows; m++) {
            std::memset(sums.get(), 0, r * sizeof(float));
            for (int64_t c = 0; c < n; c += r) add_block(x + m * n + c, sums.get(), std::min(r, n - c));
            write_row(sums.get(), S + m * r, r);
        }
    }
}

// out[m, c] = x[m, c] + block[m, c mod r], x and out (rows, n), block (rows, r). out may be x.
extern "C" void add_to_blocks(const bf16* x, const bf16* block, bf16* out, int64_t rows, int64_t n, int64_t r,
                              int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t m = 0; m < rows; m++)
        for (int64_t c = 0; c < n; c += r) add_both(x + m * n + c, block + m * r, out + m * n + c, std::min(r, n - c));
}
