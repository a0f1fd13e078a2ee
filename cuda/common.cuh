// What any kernel can use: bf16, vector access, sums over lanes, copies to shared memory. It needs no CUDA header, so
// that NVRTC compiles it alone. With tests/simt/simt.h before it, g++ compiles the same text for the CPU, where every
// access is checked.
//
// The option -DIO_BF16=1 makes io, the type of a kernel's inputs and outputs, bf16, and -DIO_BF16=0 makes it fp32.
// Every pointer to global memory that a kernel is given must be 16-byte aligned.
#pragma once

// SHARED declares an array in shared memory, DYNAMIC one in the memory that the launch gives, where it has `count`
// elements from byte `first` on, a multiple of 16. Shared<T> is the type of a pointer into one. READ_AS and WRITE_AS
// access a value of type V at p, in shared or in global memory. simt.h has its own, which check.
#ifdef __CUDACC__
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define DYNAMIC(type, name, first, count) type* const name = reinterpret_cast<type*>(dynamic_shared + (first))
extern __shared__ __align__(16) unsigned char dynamic_shared[];
#define READ_AS(V, p) (*reinterpret_cast<const V*>(p))
#define WRITE_AS(V, p) (*reinterpret_cast<V*>(p))
template <typename T>
using Shared = T*;
#endif

struct bf16 {
    unsigned short bits;
};
#if IO_BF16
typedef bf16 io;
#else
typedef float io;
#endif

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {  // rounds to nearest, ties to even; a NaN stays a NaN
    const unsigned bits = __float_as_uint(x);
    const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return bf16{static_cast<unsigned short>(x == x ? rounded : 0x7fffu)};
}

// For an access of BYTES bytes, the type to access memory as, and its value made of 8-byte words. The types are
// integers, or a struct of two: stores of structs with more members are split by the compiler in some places.
typedef unsigned long long Word;
template <int BYTES>
struct Access;
template <>
struct Access<2> {
    typedef unsigned short Type;
    static __device__ Type from(const Word* words) { return static_cast<Type>(words[0]); }
};
template <>
struct Access<4> {
    typedef unsigned Type;
    static __device__ Type from(const Word* words) { return static_cast<Type>(words[0]); }
};
template <>
struct Access<8> {
    typedef Word Type;
    static __device__ Type from(const Word* words) { return words[0]; }
};
template <>
struct Access<16> {
    struct alignas(16) Type {
        Word low, high;
    };
    static __device__ Type from(const Word* words) { return Type{words[0], words[1]}; }
};

__device__ __forceinline__ Word bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ Word bits_of(bf16 x) { return x.bits; }

// Load and store COUNT neighbours, a power of two, in one access. T is the type in memory, float or bf16; P is a
// pointer to global or to shared memory.
template <int COUNT, typename T, typename P>
__device__ __forceinline__ void load_vec(P p, float (&x)[COUNT]) {
    typedef typename Access<COUNT * sizeof(T)>::Type V;
    const V bits = READ_AS(V, p);
    T values[COUNT];
    memcpy(values, &bits, sizeof(V));
#pragma unroll
    for (int i = 0; i < COUNT; i++) x[i] = to_float(values[i]);
}
template <int COUNT, typename T, typename P>
__device__ __forceinline__ void store_vec(P p, const float (&x)[COUNT]) {
    typedef Access<COUNT * sizeof(T)> A;
    typedef typename A::Type V;
    constexpr int PER_WORD = 8 / sizeof(T);
    Word words[(COUNT + PER_WORD - 1) / PER_WORD] = {};
#pragma unroll
    for (int i = 0; i < COUNT; i++) words[i / PER_WORD] |= bits_of(from_float<T>(x[i])) << i % PER_WORD * 8 * sizeof(T);
    WRITE_AS(V, p) = A::from(words);
}
template <int COUNT, typename T>
__device__ __forceinline__ void load(const T* p, float (&x)[COUNT]) {
    load_vec<COUNT, T>(p, x);
}
template <int COUNT, typename T>
__device__ __forceinline__ void store(T* p, const float (&x)[COUNT]) {
    store_vec<COUNT, T>(p, x);
}
#ifndef __CUDACC__
template <int COUNT>
void load(Shared<float> p, float (&x)[COUNT]) {
    load_vec<COUNT, float>(p, x);
}
template <int COUNT>
void store(Shared<float> p, const float (&x)[COUNT]) {
    store_vec<COUNT, float>(p, x);
}
#endif

// The mask of the lanes of this thread's warp that exist: the last warp of a block may have fewer than 32.
__device__ __forceinline__ unsigned warp_lanes() {
    const unsigned left = blockDim.x - threadIdx.x / 32 * 32;
    return left < 32 ? (1u << left) - 1 : 0xffffffffu;
}

// Replaces each x[q] by its sum over LANES neighbouring lanes, in all of these lanes.
template <int LANES, int COUNT>
__device__ __forceinline__ void sum_to_all(float (&x)[COUNT], unsigned warp) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2)
#pragma unroll
        for (int q = 0; q < COUNT; q++) x[q] += __shfl_xor_sync(warp, x[q], step);
}

// The same sums, shared out among the lanes: each lane gets the sum of x[lane / (LANES / COUNT)]. COUNT <= LANES, both
// powers of two. Each exchange halves the number of sums that a lane still works on: LANES values cost LANES - 1
// shuffles, not LANES log2(LANES).
template <int LANES, int COUNT>
__device__ __forceinline__ float sum_shared_out(const float (&x)[COUNT], int lane, unsigned warp) {
    if constexpr (COUNT == 1) {
        float only[1] = {x[0]};
        sum_to_all<LANES>(only, warp);
        return only[0];
    } else {
        const bool upper = lane & (LANES / 2);
        float kept[COUNT / 2];
#pragma unroll
        for (int q = 0; q < COUNT / 2; q++) {
            const float other = __shfl_xor_sync(warp, upper ? x[q] : x[q + COUNT / 2], LANES / 2);
            kept[q] = (upper ? x[q + COUNT / 2] : x[q]) + other;
        }
        return sum_shared_out<LANES / 2>(kept, lane, warp);
    }
}

struct Same {
    __device__ float operator()(float x) const { return x; }
};

// Copies `rows` rows of WIDTH values, which begin `stride` elements apart in global memory, to shared memory, row
// behind row, each value as convert(value). The whole block takes part; the caller synchronises afterwards.
template <int WIDTH, typename T, typename Convert = Same>
__device__ __forceinline__ void stage(Shared<float> to, const T* from, long long stride, int rows,
                                      Convert convert = Convert()) {
    for (int i = threadIdx.x; i < rows * (WIDTH / 4); i += blockDim.x) {
        const int row = i / (WIDTH / 4), column = i % (WIDTH / 4) * 4;
        float x[4];
        load(from + row * stride + column, x);
#pragma unroll
        for (int q = 0; q < 4; q++) x[q] = convert(x[q]);
        store(to + (row * WIDTH + column), x);
    }
}

// Writes `count` zeros, a multiple of 4. The whole block takes part; the caller synchronises afterwards.
__device__ __forceinline__ void fill_zeros(Shared<float> to, int count) {
    const float zeros[4] = {};
    for (int i = threadIdx.x * 4; i < count; i += blockDim.x * 4) store(to + i, zeros);
}
