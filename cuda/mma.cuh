// Products of bf16 matrices on tensor cores, and copies to shared memory that nobody waits for: PTX, sm_80 and later.
// simt.h has the same functions for the CPU.
//
// A warp multiplies by tiles. With g = lane / 4 and t = lane % 4, a lane holds
//     of A (16 x 16, rows m, columns k)   (g, 2t) (g + 8, 2t) (g, 2t + 8) (g + 8, 2t + 8), each with the next column;
//     of B (16 x 8, rows k, columns n)    (2t, g) (2t + 8, g), each with the next row;
//     of C (16 x 8, rows m, columns n)    (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1), in fp32
// (PTX ISA, "Matrix Fragments for mma.m16n8k16"). Two neighbouring tiles of C, rounded, are a tile of A.
#pragma once
#include "common.cuh"

#ifdef __CUDACC__
// c += a b
__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Four matrices of 8 x 8: lane l gives the address of row l % 8 of matrix l / 8, 16 bytes. A lane gets (g, 2t) and
// (g, 2t + 1) of each, or with TRANSPOSED (2t, g) and (2t + 1, g).
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(unsigned (&x)[4], Shared<bf16> row) {
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(at)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(at)
                     : "memory");
}
// Of an 8 x 8 matrix, a lane gives (g, 2t) and (g, 2t + 1) and gets (2t, g) and (2t + 1, g).
__device__ __forceinline__ unsigned transposed(unsigned x) {
    unsigned y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
// Two floats rounded to bf16, as from_float rounds: `low` in the lower half.
__device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}
// 2^x and 1 / x, to 2 units of the last place; what is too small for a normal float is 0.
__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Begins to copy 16 bytes to shared memory, or 16 bytes of zeros. They are there after this thread's wait_for_copies.
__device__ __forceinline__ void copy(Shared<bf16> to, const bf16* from, bool zeros) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), "l"(from), "r"(zeros ? 0 : 16)
                 : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" : : : "memory"); }
#endif

__device__ __forceinline__ float low_of(unsigned x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high_of(unsigned x) { return __uint_as_float(x & 0xffff0000u); }

// Where a row begins in a matrix in shared memory whose rows are STRIDE elements apart. The 8 neighbouring rows whose 16
// bytes are read at once must lie in different banks. An odd multiple of 16 bytes sees to that. A STRIDE of 16 elements
// above a multiple of 32 does so if the later 4 of each 8 rows are moved by 16 bytes; then 32 bytes of 4 neighbouring
// rows, which lanes read 8 by 8, lie in different banks too.
template <int STRIDE>
__device__ __forceinline__ int row_at(int row) {
    return row * STRIDE + (STRIDE % 32 == 16 ? (row & 4) * 2 : 0);
}
// Where a lane's row begins in a 16 x 16 tile, for the four loads below.
template <int STRIDE>
__device__ __forceinline__ int by_rows() {
    return row_at<STRIDE>(threadIdx.x % 16) + threadIdx.x % 32 / 16 * 8;
}
template <int STRIDE>
__device__ __forceinline__ int by_columns() {
    return row_at<STRIDE>(threadIdx.x % 8 + threadIdx.x % 32 / 16 * 8) + threadIdx.x / 8 % 2 * 8;
}
// A 16 x 16 tile as A, or as B (two tiles of 8 columns, one behind the other), from a matrix in shared memory that has
// its elements as they are (m rows of k, k rows of n), or from its transpose.
template <int STRIDE>
__device__ __forceinline__ void load_a(unsigned (&x)[4], Shared<bf16> tile) {
    load_matrices<false>(x, tile + by_rows<STRIDE>());
}
template <int STRIDE>
__device__ __forceinline__ void load_a_transposed(unsigned (&x)[4], Shared<bf16> tile) {
    load_matrices<true>(x, tile + by_columns<STRIDE>());
}
template <int STRIDE>
__device__ __forceinline__ void load_b(unsigned (&x)[4], Shared<bf16> tile) {
    load_matrices<true>(x, tile + by_rows<STRIDE>());
}
template <int STRIDE>
__device__ __forceinline__ void load_b_transposed(unsigned (&x)[4], Shared<bf16> tile) {
    load_matrices<false>(x, tile + by_columns<STRIDE>());
}

// A 16 x 16 tile of C: the left and the right 8 columns.
typedef float Block[2][4];

__device__ __forceinline__ void mma(Block& c, const unsigned (&a)[4], const unsigned (&b)[4]) {
    mma(c[0], a, b[0], b[1]);
    mma(c[1], a, b[2], b[3]);
}
// C, rounded, as A; and what the rounding took away, rounded.
__device__ __forceinline__ void as_a(unsigned (&x)[4], const Block& c) {
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = pack(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
}
__device__ __forceinline__ void rest_as_a(unsigned (&x)[4], const Block& c, const unsigned (&rounded)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        x[i] = pack(c[i / 2][i % 2 * 2] - low_of(rounded[i]), c[i / 2][i % 2 * 2 + 1] - high_of(rounded[i]));
}
