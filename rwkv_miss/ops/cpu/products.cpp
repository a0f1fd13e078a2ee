// Products of single rows in fp32 (rwkv_miss/ops/products.py, low_rank.py). The matrices are read once from end to end:
// what takes the time is memory.
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "common.h"
#include "tensors.h"

namespace {

// sums[j] += the sum over i < k of x[i] M[i, j] for j < n, where the rows of M lie `width` apart.
template <class S, class T>
void add_product(const S* x, const T* M, float* __restrict__ sums, int64_t k, int64_t n, int64_t width) {
    int64_t i = 0;
    for (; i + 4 <= k; i += 4) {  // the sums are loaded and stored for 4 rows at a time
        const T* m = M + i * width;
        for (int64_t row = 8; row < 12; row++)  // those of the pass after the next: beyond the end nothing happens
            for (int64_t j = 0; j < n; j += 64 / sizeof(T)) __builtin_prefetch(m + row * width + j);
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

// Bytes of a row that are asked for before they are needed.
constexpr int64_t AHEAD = 2048;

// y[r apart] = the sum over i < k of x[i] M[r apart, i] for r < R.
template <int R, class T>
void multiply(const float* x, const T* M, T* y, int64_t k, int64_t apart) {
    Vec sums[R] = {};
    int64_t i = 0;
    for (; i + W <= k; i += W) {
        const Vec a = load(x + i);
        Vec b;
        for (int64_t r = 0; r < R; r++) {
            const T* m = M + r * apart * k + i;
            __builtin_prefetch(reinterpret_cast<const char*>(m) + AHEAD);
            for (int64_t j = 0; j < W; j++) b[j] = to_float(m[j]);
            sums[r] += a * b;
        }
    }
    for (int64_t r = 0; r < R; r++) {
        alignas(64) float lanes[W];
        store(lanes, sums[r]);
        float total = sum(lanes);
        for (int64_t j = i; j < k; j++) total += x[j] * to_float(M[r * apart * k + j]);
        from_float(total, y[r * apart]);
    }
}

// x (.., k) of a single row, weight (n, k) -> (.., n)
Tensor multiply_row(const Tensor& x, const Tensor& weight) {
    const int64_t k = weight.size(1), n = weight.size(0);
    TORCH_CHECK(x.numel() == k && x.scalar_type() == weight.scalar_type());
    auto shape = x.sizes().vec();
    shape.back() = n;
    const Tensor y = at::empty(shape, x.options());
    with_type(x, [&](auto type) {
        using T = decltype(type);
        const Given from(x), matrix(weight);
        const T *row = from, *M = matrix;
        T* to = static_cast<T*>(y.mutable_data_ptr());
        Buffer wide = zeros(k);
        read_row(row, wide.get(), k);
        // Each thread reads R places of the weight at once, each of them from end to end: memory then has the most to
        // do. Rows beside each other, whose ends come at the same time, would take a quarter longer.
        constexpr int64_t R = 4;
        const int64_t threads = at::get_num_threads(), rows = n / (R * threads);  // of a place
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static) nowait
            for (int64_t thread = 0; thread < threads; thread++)
                for (int64_t r = thread * R * rows; r < thread * R * rows + rows; r++)
                    multiply<R>(wide.get(), M + r * k, to + r, k, rows);
#pragma omp for schedule(static)
            for (int64_t r = threads * R * rows; r < n; r++) multiply<1>(wide.get(), M + r * k, to + r, k, 0);
        }
    });
    return y;
}

// y (n) = activation(x (k) first (k, rank)) second (rank, n) + bias, which may be null. 0: no activation, 1: tanh, 2:
// sigmoid. What activation takes and returns is rounded to T, as where these are operations of their own.
template <class T>
struct LowRank {
    const T *x, *first, *second, *bias;
    T* y;
    int64_t k, rank, n, activation;

    float activate(float sum) const {
        T h;
        from_float(sum, h);
        const float x = to_float(h);
        from_float(activation == 1 ? std::tanh(x) : activation == 2 ? 1.0f / (1.0f + std::exp(-x)) : x, h);
        return to_float(h);
    }
};

template <class T>
void low_ranks(const std::vector<LowRank<T>>& parts, int64_t threads) {
    int64_t lanes = 0;  // of all products with `first`
    for (const auto& part : parts) lanes += part.rank;
    Buffer products = zeros(threads * lanes);
#pragma omp parallel num_threads(threads)
    {
        const int64_t number = omp_get_thread_num(), count = omp_get_num_threads();
        float* own = products.get() + number * lanes;
        for (const auto& part : parts) {  // each thread takes some rows of `first`
            const int64_t begin = part.k * number / count, end = part.k * (number + 1) / count;
            add_product(part.x + begin, part.first + begin * part.rank, own, end - begin, part.rank, part.rank);
            own += part.rank;
        }
#pragma omp barrier
        int64_t at = 0;
        for (const auto& part : parts) {  // and some columns of `second`
            const int64_t width = ((part.n + count - 1) / count + 31) / 32 * 32;
            const int64_t begin = std::min(number * width, part.n), n = std::min(width, part.n - begin);
            Buffer h = zeros(part.rank), sums = zeros(n);
            for (int64_t i = 0; i < part.rank; i++) {
                for (int64_t j = 0; j < count; j++) h[i] += products[j * lanes + at + i];
                h[i] = part.activate(h[i]);
            }
            if (part.bias) read_row(part.bias + begin, sums.get(), n);
            add_product(h.get(), part.second + begin, sums.get(), part.rank, n, part.n);
            write_row(sums.get(), part.y + begin, n);
            at += part.rank;
        }
    }
}

std::vector<Tensor> low_rank(at::TensorList x, at::TensorList first, at::TensorList second,
                             const c10::List<MaybeTensor>& bias, at::IntArrayRef activation) {
    std::vector<Tensor> made;
    with_type(x[0], [&](auto type) {
        using T = decltype(type);
        std::vector<LowRank<T>> parts;
        std::vector<Given> given;  // copies live until the products are done
        for (size_t i = 0; i < x.size(); i++) {
            for (const Tensor& y : {x[i], first[i], second[i]}) given.emplace_back(y);
            given.emplace_back(MaybeTensor(bias[i]));
            const Given* at = &given.back() - 3;
            const int64_t k = first[i].size(0), rank = first[i].size(1), n = second[i].size(1);
            made.push_back(at::empty({1, 1, n}, x[i].options()));
            T* y = static_cast<T*>(made.back().mutable_data_ptr());
            parts.push_back({at[0], at[1], at[2], at[3], y, k, rank, n, activation[i]});
        }
        low_ranks(parts, at::get_num_threads());
    });
    return made;
}

}  // namespace

// To be called once.
extern "C" void register_operators() {
    static torch::Library library(torch::Library::IMPL, "rwkv_miss", c10::DispatchKey::CPU, __FILE__, __LINE__);
    library.impl("multiply_row", multiply_row);
    library.impl("low_rank", low_rank);
}

// y[rows[m]] += x[rows[m]] stack[slots[m]] for m < count: x (.., k), stack (.., k, n), y (.., n); no row occurs twice.
extern "C" void add_products_f32(const float* x, const float* stack, const int64_t* rows, const int64_t* slots,
                                 float* y, int64_t count, int64_t k, int64_t n, int64_t threads) {
    add_products(x, stack, rows, slots, y, count, k, n, threads);
}
extern "C" void add_products_bf16(const bf16* x, const bf16* stack, const int64_t* rows, const int64_t* slots, bf16* y,
                                  int64_t count, int64_t k, int64_t n, int64_t threads) {
    add_products(x, stack, rows, slots, y, count, k, n, threads);
}
