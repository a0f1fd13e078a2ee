// Products and transposes of small fp32 matrices, whose rows are whole vectors at 64-byte boundaries.
#pragma once
#include <type_traits>

#include "common.h"

namespace {

// So many rows and vectors of columns of a product are summed at once: their sums fit in registers.
constexpr int TILE_ROWS = W == 16 ? 8 : 4, TILE_VECS = 2;

// Calls f with each number below N as a constant: an unrolled loop, whose arrays the compiler keeps in registers.
template <int N, class F>
void each(F&& f) {
    if constexpr (N > 0) {
        each<N - 1>(f);
        f(std::integral_constant<int, N - 1>());
    }
}

// V vectors of columns from j on of the rows of a band, see below.
template <int R, int V, class First, class Last>
void tile(int64_t i, int64_t j, int64_t inner, const float* x, int64_t x_row, int64_t x_inner, const float* y,
          int64_t y_row, First first, Last last) {
    Vec sums[R * V];
    each<R * V>([&](auto e) { sums[e] = first(i + e / V, j + e % V * W); });
    for (int64_t m = 0; m < inner; m++) {
        const float *xm = x + i * x_row + m * x_inner, *ym = y + m * y_row + j;
        Vec ys[V];
        each<V>([&](auto q) { ys[q] = load(ym + q * W); });
        each<R * V>([&](auto e) { sums[e] += ys[e % V] * xm[e / V * x_row]; });
    }
    each<R * V>([&](auto e) { last(i + e / V, j + e % V * W, sums[e]); });
}

// Rows i to i + R - 1 of a product, see below.
template <int R, class First, class Last>
void band(int64_t i, int64_t columns, int64_t inner, const float* x, int64_t x_row, int64_t x_inner, const float* y,
          int64_t y_row, First first, Last last) {
    int64_t j = 0;
    for (; j + TILE_VECS * W <= columns; j += TILE_VECS * W)
        tile<R, TILE_VECS>(i, j, inner, x, x_row, x_inner, y, y_row, first, last);
    for (; j < columns; j += W) tile<R, 1>(i, j, inner, x, x_row, x_inner, y, y_row, first, last);
}

// The product of x, `rows` by `inner`, and y, `inner` by `columns`. Element (i, m) of x is x[i * x_row + m * x_inner].
// first(i, j): a vector that is added to row i from column j on; last(i, j, sum) takes the sum.
template <class First, class Last>
void product(int64_t rows, int64_t columns, int64_t inner, const float* x, int64_t x_row, int64_t x_inner,
             const float* y, int64_t y_row, First first, Last last) {
    int64_t i = 0;
    for (; i + TILE_ROWS <= rows; i += TILE_ROWS)
        band<TILE_ROWS>(i, columns, inner, x, x_row, x_inner, y, y_row, first, last);
    for (; i + 2 <= rows; i += 2) band<2>(i, columns, inner, x, x_row, x_inner, y, y_row, first, last);
    if (i < rows) band<1>(i, columns, inner, x, x_row, x_inner, y, y_row, first, last);
}

// What a product is added to, and where it goes: nothing, or a matrix with rows of `row` floats.
auto nothing = [](int64_t, int64_t) { return Vec{}; };
auto from(const float* p, int64_t row) {
    return [=](int64_t i, int64_t j) { return load(p + i * row + j); };
}
auto into(float* p, int64_t row) {
    return [=](int64_t i, int64_t j, Vec x) { store(p + i * row + j, x); };
}

#ifdef __clang__
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
typedef int32_t Lanes __attribute__((vector_size(4 * W)));
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, Lanes{__VA_ARGS__})
#endif
// The lanes of the first and of the second half of two vectors, by turns.
#if defined(__AVX512F__)
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif

// y[j][i] = x[i][j], for `rows` and `columns` that are multiples of W.
void transpose(const float* x, int64_t x_row, float* y, int64_t y_row, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i += W)
        for (int64_t j = 0; j < columns; j += W) {
            Vec block[W], next[W];
            for (int p = 0; p < W; p++) block[p] = load(x + (i + p) * x_row + j);
            for (int done = 1; done < W; done *= 2) {  // each pass moves one bit of a row's number into the lane's
                for (int p = 0; p < W / 2; p++) {
                    next[2 * p] = SHUFFLE(block[p], block[p + W / 2], LOW);
                    next[2 * p + 1] = SHUFFLE(block[p], block[p + W / 2], HIGH);
                }
                for (int p = 0; p < W; p++) block[p] = next[p];
            }
            for (int p = 0; p < W; p++) store(y + (j + p) * y_row + i, block[p]);
        }
}
#undef SHUFFLE
#undef LOW
#undef HIGH

}  // namespace
