// Rounding to bf16 in a merge, and how much of what was learned it changes, in one pass.
#include "common.h"

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t BLOCK = 1024;  // so many squares are summed in fp32, in LANES sums, before they are added in fp64

void round_one(const float* x, const float* delta, bf16* out, int64_t i, float& delta_square, float& lost_square) {
    from_float(x[i], out[i]);
    const float lost = to_float(out[i]) - x[i];
    delta_square += delta[i] * delta[i];
    lost_square += lost * lost;
}

}  // namespace

// out = x rounded, n elements. squares: the sum of delta^2, and that of (out - x)^2.
extern "C" void round_bfloat16(const float* x, const float* delta, bf16* out, double* squares, int64_t n) {
    squares[0] = squares[1] = 0;
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t stop = start + BLOCK < n ? start + BLOCK : n;
        float deltas[LANES] = {}, losts[LANES] = {};
        int64_t i = start;
        for (; i + LANES <= stop; i += LANES)
            for (int64_t l = 0; l < LANES; l++) round_one(x, delta, out, i + l, deltas[l], losts[l]);
        for (; i < stop; i++) round_one(x, delta, out, i, deltas[0], losts[0]);
        for (int64_t l = 0; l < LANES; l++) squares[0] += deltas[l], squares[1] += losts[l];
    }
}
