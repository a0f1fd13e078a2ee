// What wkv6.cpp and wkv7.cpp share: vectors, buffers, rows of fp32 or bf16, and exp. Each source file becomes a library
// of its own, so that everything here is local to the file that includes it.
#pragma once
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

// The number of floats in a vector.
#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

namespace {

typedef float Vec __attribute__((vector_size(4 * W)));
typedef float Quad __attribute__((vector_size(16)));

// Steps between the states that the WKV forward saves: as in wkv.py.
constexpr int64_t SAVE_EVERY = 32;

// The sizes of a call. n: the head size; chunk: steps between the states that the forward saves. Heads are counted over
// the whole batch as bh = sequence * heads + head.
struct Sizes {
    int64_t batch, steps, heads, n, chunk;
    // n rounded up to whole vectors
    int64_t lanes() const { return (n + W - 1) / W * W; }
    int64_t chunks() const { return (steps + chunk - 1) / chunk; }
    // The element where step t of head bh begins in a (B, T, H, N) tensor.
    int64_t row(int64_t bh, int64_t t) const { return ((bh / heads * steps + t) * heads + bh % heads) * n; }
};

struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
typedef std::unique_ptr<float[], Free> Buffer;
// `count` zeros, 64-byte aligned.
Buffer zeros(int64_t count) {
    float* p = static_cast<float*>(::operator new[](count * sizeof(float), std::align_val_t(64)));
    std::memset(p, 0, count * sizeof(float));
    return Buffer(p);
}

Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
// The sum of the W floats at p, added 4 at a time: a loop over the lanes would compile to one addition after the other.
float sum(const float* p) {
    Quad x = {};
    for (int i = 0; i < W; i += 4) x += *reinterpret_cast<const Quad*>(p + i);
    return (x[0] + x[2]) + (x[1] + x[3]);
}

struct bf16 {
    uint16_t bits;
};
float to_float(float x) { return x; }
float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
void from_float(float x, float& out) { out = x; }
void from_float(float x, bf16& out) {  // rounds to nearest, ties to even; a NaN stays a NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out.bits = uint16_t(x == x ? rounded : 0x7fc0);
}
template <class T>
void read_row(const T* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = to_float(from[i]);
}
template <class T>
void write_row(const float* from, T* to, int64_t n) {
    for (int64_t i = 0; i < n; i++) from_float(from[i], to[i]);
}

// Asks the memory for a row that is written soon. Rows of a head lie apart, and stores would wait for each.
template <class T>
void fetch_to_write(const T* row, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(row + i, 1);
}

// exp(x) for x from -87 to 88, and beyond as at the nearer end, to about 1 ulp: 2^e exp(f) with x = e ln(2) + f and
// |f| <= ln(2) / 2, where exp(f) is a Taylor series. There is no branch, so that loops over it vectorise.
inline float exp_lanes(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer
    float e = shifted - 12582912.0f;
    float f = (x - e * 0.693359375f) + e * 2.12194440e-4f;  // ln(2) in two parts
    float p = 1.0f / 5040;
    p = p * f + 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits - 0x4B400000 + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

}  // namespace
