// The example of CONTRIBUTING.md: y = relu(x)^2 of every element, and its gradient dx = 2 relu(x) dy, in one
// pass over memory each. x, y and their gradients have `count` elements of type io (cuda/common.cuh).
//
// Launch: grid (ceil(count / THREADS), 1), block THREADS. One thread computes one element.
#include "common.cuh"

constexpr int THREADS = 128;

__device__ __forceinline__ long long my_element() {
    if (blockDim.x != THREADS) __trap();
    return static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    squared_relu_forward(const io* __restrict__ x, io* __restrict__ y, long long count) {
    const long long i = my_element();
    if (i >= count) return;
    float value[1];
    load(x + i, value);
    value[0] = value[0] > 0.0f ? value[0] * value[0] : 0.0f;
    store(y + i, value);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    squared_relu_backward(const io* __restrict__ x, const io* __restrict__ dy, io* __restrict__ dx, long long count) {
    const long long i = my_element();
    if (i >= count) return;
    float value[1], grad[1];
    load(x + i, value);
    load(dy + i, grad);
    grad[0] = value[0] > 0.0f ? 2.0f * value[0] * grad[0] : 0.0f;
    store(dx + i, grad);
}
