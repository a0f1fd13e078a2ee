// Kernels for test_banks.py: each lane accesses shared memory from the byte `at` of it on, or not at all if that is
// negative.
#include "mma.cuh"

#define KERNEL extern "C" __global__ void

constexpr int SIZE = 4096 + 512;  // bytes

template <class V>
__device__ void read(const long long* at, float* out) {
    SHARED(bf16, bytes, SIZE / 2);
    for (int i = threadIdx.x; i < SIZE / 2; i += 32) WRITE_AS(unsigned short, bytes + i) = 0;
    __syncthreads();
    const long long mine = READ_AS(long long, at + threadIdx.x);
    if (mine < 0) return;
    const V x = READ_AS(V, bytes + mine / 2);  // counted
    WRITE_AS(float, out + threadIdx.x) = reinterpret_cast<const unsigned char&>(x);
}
KERNEL read_2(const long long* at, float* out) { read<unsigned short>(at, out); }
KERNEL read_4(const long long* at, float* out) { read<unsigned>(at, out); }
KERNEL read_8(const long long* at, float* out) { read<Word>(at, out); }
KERNEL read_16(const long long* at, float* out) { read<Access<16>::Type>(at, out); }

template <class V>
__device__ void write(const long long* at) {
    SHARED(bf16, bytes, SIZE / 2);
    const long long mine = READ_AS(long long, at + threadIdx.x);
    if (mine >= 0) WRITE_AS(V, bytes + mine / 2) = V();  // counted
}
KERNEL write_2(const long long* at) { write<unsigned short>(at); }
KERNEL write_4(const long long* at) { write<unsigned>(at); }
KERNEL write_8(const long long* at) { write<Word>(at); }
KERNEL write_16(const long long* at) { write<Access<16>::Type>(at); }

KERNEL matrices(const long long* at, float* out) {
    SHARED(bf16, bytes, SIZE / 2);
    for (int i = threadIdx.x; i < SIZE / 2; i += 32) WRITE_AS(unsigned short, bytes + i) = 0;
    __syncthreads();
    unsigned x[4];
    load_matrices<false>(x, bytes + READ_AS(long long, at + threadIdx.x) / 2);  // counted
    WRITE_AS(unsigned, out + threadIdx.x) = x[0];
}
KERNEL copies(const long long* at, const bf16* from) {
    SHARED(bf16, bytes, SIZE / 2);
    copy(bytes + READ_AS(long long, at + threadIdx.x) / 2, from, false);  // counted
    wait_for_copies();
}
// Lanes make different numbers of rounds; their n-th reads are one access of the warp.
KERNEL in_a_loop(float* out) {
    SHARED(float, words, 1024);
    for (int i = threadIdx.x; i < 1024; i += 32) WRITE_AS(float, words + i) = i;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i <= int(threadIdx.x); i++) sum += READ_AS(float, words + i);  // counted
    WRITE_AS(float, out + threadIdx.x) = sum;
}
