// WKV-7 forward and backward on tensor cores, for bf16: what wkv7.cu computes, in pieces of up to 16 steps.
// docs/kernels.md has the formulas. sm_80 and later.
//
// A piece is a run of at most CHUNK steps of one document: it ends where a document begins, where the number of steps
// before it is a multiple of CHUNK, and at T. So nothing of one document is ever multiplied with anything of another,
// not even by zero. The rows of a piece are its steps; rows that it has too few are zeros and change nothing.
//
// Options: -DHEAD_SIZE=64 sets the head size N (32, 64 or 128). Launch: grid (B * H, P), block 2 N threads, dynamic
// shared memory FORWARD_BYTES or BACKWARD_BYTES. Each warp has 16 values (rows of the state) where it works on the
// state, and 16 keys where it works on inputs and their gradients. The P blocks of a head share out its documents
// (Range): any P from 1 on gives the same results to the bit.
//
// Inputs, seq_start and outputs are those of wkv7.cu. The forward saves the state before every SAVE_EVERY steps (a
// segment), (B, H, ceil(T / SAVE_EVERY), N_value, N_key) bf16 with keys in the order of products (four_keys), or
// nothing if saved_states is null. From it the backward computes the states before the segment's other chunks again,
// into `scratch`, (B, H, P, REPLAYED, N_value, N_key) bf16.
#include "mma.cuh"

constexpr int N = HEAD_SIZE;
constexpr int CHUNK = 16;
constexpr int SAVE_EVERY = 64;  // a multiple of CHUNK, up to 64
constexpr int WARPS = N / 16, THREADS = 32 * WARPS;
constexpr int REPLAYED = SAVE_EVERY / CHUNK - 1;  // chunks of a segment that are worked on again
constexpr int TILES = N / 16;                     // of 16 values or keys in a row of N
constexpr int ROW = N + 16;                     // elements between rows of N in shared memory, for row_at
constexpr int SQUARE_ROW = 24, SOLVE_ROW = 24;  // the same for rows of 16, of bf16 and of fp32
static_assert(N == 32 || N == 64 || N == 128, "HEAD_SIZE: 32, 64 or 128");

constexpr float DECAY_SCALE = 0.6065306597126334f;  // e^-0.5
constexpr float LOG2_E = 1.4426950408889634f;       // logs of decays are to the base 2
// How many blocks an SM has room for with 128 and 255 registers a thread. At N = 128 the forward needs more than 128.
constexpr int FORWARD_BLOCKS = N == 128 ? 1 : 256 / N, BACKWARD_BLOCKS = 128 / N;

// Sizes in shared memory, in bytes.
constexpr int INPUT = CHUNK * ROW * 2, STATE = N * ROW * 2;
constexpr int SQUARE = CHUNK * SQUARE_ROW * 2 + 32;  // two neighbouring ones, written at once, differ in their banks
constexpr int SOLVE = CHUNK * SOLVE_ROW * 4;
constexpr int PAIRS_BYTES = 8 * SQUARE + SOLVE + N * 4;
constexpr int FORWARD_BYTES = (2 * 6 + 1) * INPUT + PAIRS_BYTES;
constexpr int BACKWARD_BYTES = (2 * 7 + 4) * INPUT + 2 * STATE + PAIRS_BYTES;

// The lane's place in a tile of C: rows g and g + 8, columns 2t and 2t + 1.
struct Lane {
    int warp, g, t;
    __device__ Lane() : warp(threadIdx.x / 32), g(threadIdx.x % 32 / 4), t(threadIdx.x % 4) {}
};

// The block's head, as in wkv.cuh.
struct Head {
    long long index, stride, first, flags, steps;
    __device__ Head(long long steps, long long heads)
        : index(blockIdx.x),
          stride(heads * N),
          first((index / heads * steps * heads + index % heads) * N),
          flags(index / heads * steps),
          steps(steps) {}
    __device__ long long row(long long t) const { return first + t * stride; }
    __device__ long long segments() const { return (steps + SAVE_EVERY - 1) / SAVE_EVERY; }
    // The number of steps in the chunk that begins at t0, of those before `end`.
    static __device__ int rows(long long t0, long long end) {
        return static_cast<int>(end - t0 < CHUNK ? end - t0 : CHUNK);
    }
};

// Which steps of a segment begin a document: lane i has the flags of steps i and i + 32. They are read long before the
// mask is needed.
struct Starts {
    bool low, high;
    __device__ Starts(const unsigned char* seq_start, const Head& head, long long t0)
        : low(get(seq_start, head, t0, 0)), high(get(seq_start, head, t0, 32)) {}
    static __device__ bool get(const unsigned char* seq_start, const Head& head, long long t0, int first) {
        const long long t = t0 + first + threadIdx.x % 32;
        return seq_start && t >= 0 && t < head.steps && READ_AS(unsigned char, seq_start + head.flags + t) != 0;
    }
    // A mask whose bit i says that step i of the segment begins a document.
    __device__ unsigned long long mask() const {
        const unsigned long long upper = __ballot_sync(0xffffffffu, high);
        return upper << 32 | __ballot_sync(0xffffffffu, low);
    }
};

// The block's share of the head's steps, begin to end - 1. In the forward a block works on the documents that begin in
// its share, and the first block on what comes before them too: it stops where a document begins behind its share. The
// backward is the mirror image. A block works back from the last begin b with begin < b <= end, the last block from T,
// and stops where a document begins at or before `begin`. So each step is one block's work, and a block looks for its
// own steps only in its share of seq_start. Without a begin there, it has none.
struct Range {
    long long begin, end;
    __device__ explicit Range(const Head& head)
        : begin(head.steps * blockIdx.y / gridDim.y), end(head.steps * (blockIdx.y + 1) / gridDim.y) {}
    // The first step at which the forward's block begins, or -1.
    __device__ long long first(const unsigned char* seq_start, const Head& head) const {
        if (blockIdx.y == 0) return 0;
        long long t = begin;
        for (; t < end; t += 64)
            if (const unsigned long long mask = Starts(seq_start, head, t).mask()) {
                t += __ffsll(mask) - 1;
                break;
            }
        return t < end ? t : -1;
    }
    // The step before which the backward's block begins, or -1.
    __device__ long long last(const unsigned char* seq_start, const Head& head) const {
        if (blockIdx.y == gridDim.y - 1) return head.steps;
        long long t = end;
        for (; t > begin; t -= 64)
            if (const unsigned long long mask = Starts(seq_start, head, t - 63).mask()) {
                t -= __clzll(mask);
                break;
            }
        return t > begin ? t : -1;
    }
};

// Steps t0 + from to t0 + to - 1 of the chunk that begins at t0, in the segment whose documents begin at `starts`.
struct Piece {
    long long t0;
    unsigned long long starts;
    int from, to;
    __device__ int in_segment() const { return static_cast<int>(t0 % SAVE_EVERY); }
    __device__ unsigned in_chunk() const { return static_cast<unsigned>(starts >> in_segment()) & 0xffffu; }
    __device__ int rows() const { return to - from; }
    __device__ long long first() const { return t0 + from; }
    __device__ bool begins() const { return in_chunk() >> from & 1; }
    // `to` for a piece that begins at `from`, in a chunk of so many rows.
    __device__ void find_end(int rows) {
        const unsigned later = in_chunk() & ~((2u << from) - 1);
        to = later ? 31 - __clz(later & (~later + 1)) : rows;
    }
    // `from` for a piece that ends at `to`.
    __device__ void find_begin() {
        const unsigned earlier = in_chunk() & ((1u << to) - 1);
        from = earlier ? 31 - __clz(earlier) : 0;
    }
};

// The row of a thread's group of 8 elements, when rows of N are copied. A warp writes 8 groups at once, at N = 32 two
// rows: these lie in different banks if there is one row between them.
__device__ __forceinline__ int copied_row(int group) {
    const int row = group / (N / 8);
    return N == 32 ? (row & ~3) | (row & 1) << 1 | (row & 2) >> 1 : row;
}
// Begins to copy a piece's rows of its inputs, each to its place in a stage; rows that it has too few are zeros. The
// whole block takes part. from: where the piece's first row stands.
template <int COUNT>
__device__ __forceinline__ void copy_rows(Shared<bf16> stage, const io* const (&inputs)[COUNT], long long from,
                                          long long stride, int rows) {
    constexpr int GROUPS = N / 8;
#pragma unroll
    for (int n = 0; n < CHUNK * GROUPS / THREADS; n++) {
        const int i = threadIdx.x + n * THREADS, row = copied_row(i), column = i % GROUPS * 8;
        const bool zeros = row >= rows;
        const long long at = from + (zeros ? 0 : row * stride) + column;
#pragma unroll
        for (int x = 0; x < COUNT; x++)
            copy(stage + (x * (INPUT / 2) + row_at<ROW>(row) + column), inputs[x] + at, zeros);
    }
}

__device__ __forceinline__ unsigned read_pair(Shared<bf16> p) { return READ_AS(unsigned, p); }
__device__ __forceinline__ void write_pair(Shared<bf16> p, unsigned x) { WRITE_AS(unsigned, p) = x; }

// For a warp's 16 keys and a piece's rows, at the lane's places in two tiles of C: [tile][i] as in c[i]. to_a: the
// product of the decays before the row, to_r: with the row's own, undo: 1 / to_r.
struct Decays {
    float to_a[2][4], to_r[2][4], undo[2][4];
    // From the sum of the logs of the decays before the row, and the log of the row's own.
    __device__ void set(int j, int i, float before, float log) {
        to_a[j][i] = exp2_of(before);
        to_r[j][i] = exp2_of(before + log);
        undo[j][i] = reciprocal(to_r[j][i]);
    }
};

// Sums over the rows of two tiles of C, for each column: of the rows before a lane's own, or of those after it.
template <bool AFTER>
__device__ __forceinline__ void sum_rows(const float (&x)[2][4], float (&sums)[2][4], float (&totals)[4],
                                         const Lane& at) {
    float whole[2][4];
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[j][i] = 0.0f, whole[j][i] = x[j][i];
#pragma unroll
    for (int step = 1; step < 8; step *= 2)
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float other = __shfl_xor_sync(0xffffffffu, whole[j][i], step * 4);
                if (AFTER ? !(at.g & step) : (at.g & step) != 0) sums[j][i] += other;
                whole[j][i] += other;
            }
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            sums[j][AFTER ? e : e + 2] += whole[j][AFTER ? e + 2 : e];
            totals[2 * j + e] = whole[j][e] + whole[j][e + 2];
        }
}

// Where the lane's pair of row g (half 0) or g + 8 (half 1) and tile j of the warp's 16 keys stands.
__device__ __forceinline__ int place(const Lane& at, int j, int half) {
    return row_at<ROW>(at.g + 8 * half) + 16 * at.warp + 8 * j + 2 * at.t;
}
// Keys are in another order where they are multiplied than in memory, so that a lane's four of 16 are neighbours in
// memory: of tile j, columns 2t and 2t + 1 are keys 4t + 2j and 4t + 2j + 1. Where the lane's four keys stand in a row.
__device__ __forceinline__ int four_keys(const Lane& at) { return 16 * at.warp + 4 * at.t; }
__device__ __forceinline__ void read_four(Shared<bf16> row, const Lane& at, float (&x)[4]) {
    load_vec<4, bf16>(row + four_keys(at), x);
}
__device__ __forceinline__ void write_four(io* to, const float (&x)[4]) {
    WRITE_AS(Word, to) = static_cast<Word>(pack(x[2], x[3])) << 32 | pack(x[0], x[1]);
}

// The logs of the decays of rows g (half 0) or g + 8 (half 1); 0 for rows that a piece has too few.
__device__ __forceinline__ void read_logs(Shared<bf16> z, int half, int rows, const Lane& at, float (&logs)[2][4]) {
    const int row = at.g + 8 * half;
    float x[4];
    read_four(z + row_at<ROW>(row), at, x);
#pragma unroll
    for (int q = 0; q < 4; q++) {
        const float small = exp2_of(-LOG2_E * fabsf(x[q]));
        const float log = -DECAY_SCALE * LOG2_E * (x[q] < 0 ? small : 1.0f) * reciprocal(1.0f + small);
        logs[q / 2][2 * half + q % 2] = row < rows ? log : 0.0f;
    }
}

// Multiplies the warp's keys of a, r (if WITH_R), k and b by their products of decays, in their places and in the order
// of products, and writes the product of all decays of the piece to `ends`. What rounding takes away from k and b goes
// to k_rest and b_rest, which may be the places of z and r if these are not needed any more.
template <bool WITH_R>
__device__ __forceinline__ void prepare(Shared<bf16> r, Shared<bf16> z, Shared<bf16> k, Shared<bf16> a, Shared<bf16> b,
                                        Shared<bf16> k_rest, Shared<bf16> b_rest, Shared<float> ends, int rows,
                                        const Lane& at, Decays& d) {
    float logs[2][4], before[2][4], totals[4], in_a[2][4], in_r[2][4], in_k[2][4], in_b[2][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = at.g + 8 * half;
        read_logs(z, half, rows, at, logs);
        read_four(a + row_at<ROW>(row), at, in_a[half]);
        if (WITH_R) read_four(r + row_at<ROW>(row), at, in_r[half]);
        read_four(k + row_at<ROW>(row), at, in_k[half]);
        read_four(b + row_at<ROW>(row), at, in_b[half]);
    }
    sum_rows<false>(logs, before, totals, at);
    __syncwarp(0xffffffffu);  // all lanes have read their keys
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) d.set(j, i, before[j][i], logs[j][i]);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int p = place(at, j, half), i = 2 * half;
            const auto scale = [&](Shared<bf16> to, const float (&x)[2][4], const float (&by)[2][4]) {
                write_pair(to + p, pack(x[half][2 * j] * by[j][i], x[half][2 * j + 1] * by[j][i + 1]));
            };
            const auto scale_in_two = [&](Shared<bf16> to, Shared<bf16> rest, const float (&x)[2][4]) {
                const float low = x[half][2 * j] * d.undo[j][i], high = x[half][2 * j + 1] * d.undo[j][i + 1];
                const unsigned rounded = pack(low, high);
                write_pair(to + p, rounded);
                write_pair(rest + p, pack(low - low_of(rounded), high - high_of(rounded)));
            };
            scale(a, in_a, d.to_a), scale_in_two(k, k_rest, in_k), scale_in_two(b, b_rest, in_b);
            if (WITH_R) scale(r, in_r, d.to_r);
        }
        if (at.g == 0) {
            const float end[2] = {exp2_of(totals[2 * j]), exp2_of(totals[2 * j + 1])};
            store(ends + (16 * at.warp + 8 * j + 2 * at.t), end);
        }
    }
}

// The matrices of a piece, rows t and columns s, each 16 x 16 and the sum of two of bf16: the inverse of 1 - A_ab,
// A_ak, A_rb and A_rk. What rounding took away stands REST behind the rounded ones.
enum Which { INVERSE, AK, RB, RK };
constexpr int REST = SQUARE / 2;
struct Pairs {
    Shared<bf16> squares;
    Shared<float> solve;
    __device__ Shared<bf16> of(int which) const { return squares + which * 2 * REST; }
};

// One of a piece's matrices as B, or its transpose.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_square(unsigned (&x)[4], Shared<bf16> square) {
    if constexpr (TRANSPOSED)
        load_b_transposed<SQUARE_ROW>(x, square);
    else
        load_b<SQUARE_ROW>(x, square);
}

// c += x y^T, over rows of N
__device__ __forceinline__ void multiply_rows(Block& c, Shared<bf16> x, Shared<bf16> y) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        unsigned in_x[4], in_y[4];
        load_a<ROW>(in_x, x + tile * 16);
        load_b_transposed<ROW>(in_y, y + tile * 16);
        mma(c, in_x, in_y);
    }
}
// Keeps row > column, or row >= column.
__device__ __forceinline__ void keep_lower(Block& c, bool with_diagonal, const Lane& at) {
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (at.g + i / 2 * 8 < 8 * j + 2 * at.t + i % 2 + (with_diagonal ? 0 : 1)) c[j][i] = 0.0f;
}
__device__ __forceinline__ void write_square(Shared<bf16> to, const Block& c, const Lane& at) {
    unsigned x[4], rest[4];
    as_a(x, c);
    rest_as_a(rest, c, x);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int p = (at.g + i % 2 * 8) * SQUARE_ROW + i / 2 * 8 + 2 * at.t;
        write_pair(to + p, x[i]);
        write_pair(to + (p + REST), rest[i]);
    }
}

// Writes the inverse of 1 - A for the strictly lower A of a warp, by substitution in fp32: lane j computes column j, so
// that no power of A occurs, which could be large where the inverse is not.
__device__ __forceinline__ void write_inverse(const Pairs& pairs, const Block& c, const Lane& at) {
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float pair[2] = {c[j][2 * half], c[j][2 * half + 1]};
            store(pairs.solve + ((at.g + 8 * half) * SOLVE_ROW + 8 * j + 2 * at.t), pair);
        }
    __syncwarp(0xffffffffu);
    const int lane = threadIdx.x % 32, column = lane % 16;
    float x[CHUNK];
#pragma unroll
    for (int t = 0; t < CHUNK; t++) {
        float row[CHUNK], sums[2] = {t == column ? 1.0f : 0.0f, 0.0f};  // two, to wait less for each other
#pragma unroll
        for (int s = 0; s < t; s += 4) load(pairs.solve + (t * SOLVE_ROW + s), reinterpret_cast<float(&)[4]>(row[s]));
#pragma unroll
        for (int s = 0; s < t; s++) sums[(t - s) % 2] += row[s] * x[s];
        x[t] = sums[0] + sums[1];
    }
    // Lanes from 16 on have the same columns: they write what the rounding took away.
    const Shared<bf16> to = pairs.of(INVERSE) + (column + (lane < 16 ? 0 : REST));
#pragma unroll
    for (int t = 0; t < CHUNK; t++) {
        const unsigned rounded = pack(x[t], 0.0f);
        const unsigned mine = lane < 16 ? rounded : pack(x[t] - low_of(rounded), 0.0f);
        WRITE_AS(unsigned short, to + t * SQUARE_ROW) = static_cast<unsigned short>(mine);
    }
}

// Computes the matrices of a piece, or of them only the first two, which the state needs; each is one warp's work.
template <bool WITH_R>
__device__ __forceinline__ void compute_pairs(const Pairs& pairs, Shared<bf16> r, Shared<bf16> k, Shared<bf16> k_rest,
                                              Shared<bf16> a, Shared<bf16> b, Shared<bf16> b_rest, const Lane& at) {
#pragma unroll 1
    for (int which = at.warp; which <= (WITH_R ? RK : AK); which += WARPS) {
        Block c = {}, rest = {};
        multiply_rows(c, which < RB ? a : r, which % 2 ? k : b);
        multiply_rows(rest, which < RB ? a : r, which % 2 ? k_rest : b_rest);
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) c[j][i] += rest[j][i];
        keep_lower(c, which >= RB, at);
        if (which == INVERSE)
            write_inverse(pairs, c, at);
        else
            write_square(pairs.of(which), c, at);
    }
}

// A warp's part of a state or of its gradient: values g and g + 8 of its 16, and all keys.
typedef float State[N / 8][4];

__device__ __forceinline__ void load_state(State& s, const float* from, const Lane& at) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float four[4];
            load(from + (16 * at.warp + at.g + 8 * half) * N + 16 * tile + 4 * at.t, four);
#pragma unroll
            for (int q = 0; q < 4; q++) s[2 * tile + q / 2][2 * half + q % 2] = four[q];
        }
}
__device__ __forceinline__ void store_state(const State& s, float* to, const Lane& at) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float four[4];
#pragma unroll
            for (int q = 0; q < 4; q++) four[q] = s[2 * tile + q / 2][2 * half + q % 2];
            store(to + (16 * at.warp + at.g + 8 * half) * N + 16 * tile + 4 * at.t, four);
        }
}
// The same in bf16 and with the keys in the order of products, in rows of STRIDE.
template <int STRIDE, typename P>
__device__ __forceinline__ void store_rounded(const State& s, P to, const Lane& at) {
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            WRITE_AS(unsigned, to + (row_at<STRIDE>(16 * at.warp + at.g + 8 * half) + 8 * j + 2 * at.t)) =
                pack(s[j][2 * half], s[j][2 * half + 1]);
}
__device__ __forceinline__ void load_rounded(State& s, Shared<bf16> from, const Lane& at) {
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const unsigned pair = read_pair(from + (row_at<ROW>(16 * at.warp + at.g + 8 * half) + 8 * j + 2 * at.t));
            s[j][2 * half] = low_of(pair), s[j][2 * half + 1] = high_of(pair);
        }
}
__device__ __forceinline__ void clear(State& s) {
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[j][i] = 0.0f;
}
// s = s diag(ends)
__device__ __forceinline__ void decay(State& s, Shared<float> ends, const Lane& at) {
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        float end[2];
        load(ends + (8 * j + 2 * at.t), end);
#pragma unroll
        for (int i = 0; i < 4; i++) s[j][i] *= end[i % 2];
    }
}
__device__ __forceinline__ const Block& tile_of(const State& s, int tile) {
    return reinterpret_cast<const Block&>(s[2 * tile]);
}
__device__ __forceinline__ Block& tile_of(State& s, int tile) { return reinterpret_cast<Block&>(s[2 * tile]); }

// s += x^T y: x is given as A (the warp's values, steps), y is a matrix of steps and keys
__device__ __forceinline__ void add_outer(State& s, const unsigned (&x)[4], Shared<bf16> y) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        unsigned in_y[4];
        load_b<ROW>(in_y, y + tile * 16);
        mma(tile_of(s, tile), x, in_y);
    }
}

// c += x m, or with TRANSPOSED x m^T, for one of the matrices of a piece.
template <bool TRANSPOSED>
__device__ __forceinline__ void times_square(Block& c, const unsigned (&x)[4], Shared<bf16> m) {
    unsigned square[4], rest[4];
    load_square<TRANSPOSED>(square, m);
    load_square<TRANSPOSED>(rest, m + REST);
    mma(c, x, rest);
    mma(c, x, square);
}
// The same for the sum of x and x_rest.
template <bool TRANSPOSED>
__device__ __forceinline__ void times_square(Block& c, const unsigned (&x)[4], const unsigned (&x_rest)[4],
                                             Shared<bf16> m) {
    unsigned square[4];
    load_square<TRANSPOSED>(square, m);
    mma(c, x_rest, square);
    times_square<TRANSPOSED>(c, x, m);
}

// u += U^T of the warp's values, from S0 a, which becomes Z^T, and V^T
__device__ __forceinline__ void solve_values(Block& u, Block& from_a, const unsigned (&in_v)[4], const Pairs& pairs) {
    unsigned in_z[4], z_rest[4];
    times_square<true>(from_a, in_v, pairs.of(AK));
    as_a(in_z, from_a);
    rest_as_a(z_rest, from_a, in_z);
    times_square<true>(u, in_z, z_rest, pairs.of(INVERSE));
}

// Rounds the warp's 16 values of 16 steps and turns them round: pair i is of step g + i / 2 * 8, values 2t and 2t + 1
// of the first (i even) or the last 8.
__device__ __forceinline__ void by_steps(unsigned (&x)[4], const Block& c) {
    as_a(x, c);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = transposed(x[i]);
}
__device__ __forceinline__ void write_values(Shared<bf16> to, const Block& c, const Lane& at) {
    unsigned x[4];
    by_steps(x, c);
#pragma unroll
    for (int i = 0; i < 4; i++)
        write_pair(to + (row_at<ROW>(at.g + i / 2 * 8) + 16 * at.warp + i % 2 * 8 + 2 * at.t), x[i]);
}
__device__ __forceinline__ void store_values(io* to, long long stride, int rows, const Block& c, const Lane& at) {
    unsigned x[4];
    by_steps(x, c);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = at.g + i / 2 * 8;
        if (row < rows) WRITE_AS(unsigned, to + row * stride + 16 * at.warp + i % 2 * 8 + 2 * at.t) = x[i];
    }
}

#define PAIRS(first)                                       \
    DYNAMIC(bf16, squares, (first), 8 * SQUARE / 2);       \
    DYNAMIC(float, solve, (first) + 8 * SQUARE, SOLVE / 4); \
    DYNAMIC(float, ends, (first) + 8 * SQUARE + SOLVE, N); \
    const Pairs pairs = {squares, solve};

extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    wkv7_chunk_forward(const io* __restrict__ r, const io* __restrict__ z, const io* __restrict__ k,
                       const io* __restrict__ v, const io* __restrict__ a, const io* __restrict__ b,
                       const float* __restrict__ state_in, const unsigned char* __restrict__ seq_start,
                       io* __restrict__ y, float* __restrict__ state_out, io* __restrict__ saved_states,
                       long long steps, long long heads) {
    if (blockDim.x != THREADS) __trap();
    DYNAMIC(bf16, stages, 0, 2 * 6 * INPUT / 2);
    DYNAMIC(bf16, b_rest, 2 * 6 * INPUT, INPUT / 2);
    PAIRS((2 * 6 + 1) * INPUT)
    const Lane at;
    const Head head(steps, heads);
    const Range range(head);
    const long long first = range.first(seq_start, head);
    if (first < 0) return;
    State s;
    load_state(s, state_in + head.index * N * N, at);

    const auto read = [&](const Piece& piece, int stage) {
        const io* const inputs[] = {r, z, k, a, b, v};
        copy_rows(stages + stage * (6 * INPUT / 2), inputs, head.row(piece.first()), head.stride, piece.rows());
    };
    const long long segment = first / SAVE_EVERY * SAVE_EVERY;
    Piece next = {first / CHUNK * CHUNK, Starts(seq_start, head, segment).mask(), static_cast<int>(first % CHUNK), 0};
    next.find_end(head.rows(next.t0, steps));
    Starts starts(seq_start, head, segment + SAVE_EVERY);  // of the segment after next's
    const auto is_mine = [&]() { return next.t0 < steps && !(next.begins() && next.first() >= range.end); };
    bool more = is_mine();
    if (more) read(next, 0);
    for (int stage = 0; more; stage ^= 1) {
        const Piece piece = next;
        const Shared<bf16> rs = stages + stage * (6 * INPUT / 2), zs = rs + INPUT / 2, ks = zs + INPUT / 2,
                           as = ks + INPUT / 2, bs = as + INPUT / 2, vs = bs + INPUT / 2;
        wait_for_copies();
        __syncthreads();
        if (piece.to < head.rows(piece.t0, steps)) {
            next.from = piece.to;
        } else {
            next.t0 += CHUNK;
            next.from = 0;
            if (next.in_segment() == 0) {
                next.starts = starts.mask();
                starts = Starts(seq_start, head, next.t0 + SAVE_EVERY);
            }
        }
        next.find_end(head.rows(next.t0, steps));
        more = is_mine();
        if (more) read(next, stage ^ 1);
        if (piece.from == 0 && piece.in_segment() == 0 && saved_states)
            store_rounded<N>(s, saved_states + (head.index * head.segments() + piece.t0 / SAVE_EVERY) * N * N, at);
        if (piece.begins()) clear(s);
        {
            Decays unused;
            prepare<true>(rs, zs, ks, as, bs, zs, b_rest, ends, piece.rows(), at, unused);
        }
        __syncthreads();
        compute_pairs<true>(pairs, rs, ks, zs, as, bs, b_rest, at);
        Block from_a = {}, from_r = {};  // S0 a and S0 r, for the warp's values
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            unsigned state[4], in_a[4], in_r[4];
            as_a(state, tile_of(s, tile));
            load_b_transposed<ROW>(in_a, as + tile * 16);
            load_b_transposed<ROW>(in_r, rs + tile * 16);
            mma(from_a, state, in_a);
            mma(from_r, state, in_r);
        }
        __syncthreads();
        unsigned in_v[4], in_u[4];
        load_a_transposed<ROW>(in_v, vs + 16 * at.warp);
        Block u = {};
        solve_values(u, from_a, in_v, pairs);
        as_a(in_u, u);
        times_square<true>(from_r, in_v, pairs.of(RK));
        times_square<true>(from_r, in_u, pairs.of(RB));
        store_values(y + head.row(piece.first()), head.stride, piece.rows(), from_r, at);
        add_outer(s, in_v, zs);
        add_outer(s, in_v, ks);
        add_outer(s, in_u, b_rest);
        add_outer(s, in_u, bs);
        decay(s, ends, at);
    }
    if (next.t0 >= steps) store_state(s, state_out + head.index * N * N, at);
}

// grad_state is the gradient of the last state, or null for zeros.
extern "C" __global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS)
    wkv7_chunk_backward(const io* __restrict__ r, const io* __restrict__ z, const io* __restrict__ k,
                        const io* __restrict__ v, const io* __restrict__ a, const io* __restrict__ b,
                        const unsigned char* __restrict__ seq_start, const io* __restrict__ saved_states,
                        io* __restrict__ scratch, const io* __restrict__ dy, const float* __restrict__ grad_state,
                        io* __restrict__ dr, io* __restrict__ dz, io* __restrict__ dk, io* __restrict__ dv,
                        io* __restrict__ da, io* __restrict__ db, float* __restrict__ dstate, long long steps,
                        long long heads) {
    if (blockDim.x != THREADS) __trap();
    DYNAMIC(bf16, stages, 0, 2 * 7 * INPUT / 2);
    DYNAMIC(bf16, s0, 2 * 7 * INPUT, STATE / 2);                       // the state before the piece
    DYNAMIC(bf16, gs, 2 * 7 * INPUT + STATE, STATE / 2);               // the gradient of the state after it, decayed
    DYNAMIC(bf16, us, 2 * 7 * INPUT + 2 * STATE, INPUT / 2);           // U
    DYNAMIC(bf16, dus, 2 * 7 * INPUT + 2 * STATE + INPUT, INPUT / 2);  // the gradient of Z
    DYNAMIC(bf16, k_rest, 2 * 7 * INPUT + 2 * STATE + 2 * INPUT, INPUT / 2);
    DYNAMIC(bf16, b_rest, 2 * 7 * INPUT + 2 * STATE + 3 * INPUT, INPUT / 2);
    PAIRS(2 * 7 * INPUT + 2 * STATE + 4 * INPUT)
    const Lane at;
    const Head head(steps, heads);
    const Range range(head);
    const long long end = range.last(seq_start, head);
    if (end < 0) return;
    State grad;
    clear(grad);
    if (grad_state && end == steps) load_state(grad, grad_state + head.index * N * N, at);

    const auto read = [&](const Piece& piece, int stage) {
        const io* const inputs[] = {r, z, k, a, b, v, dy};
        copy_rows(stages + stage * (7 * INPUT / 2), inputs, head.row(piece.first()), head.stride, piece.rows());
    };
    io* const replayed = scratch + (head.index * gridDim.y + blockIdx.y) * REPLAYED * N * N;
    // Copies the state before a piece; zeros where a document begins.
    const auto read_state = [&](const Piece& piece) {
        const int chunk = piece.in_segment() / CHUNK;
        const io* from = chunk == 0 ? saved_states + (head.index * head.segments() + piece.t0 / SAVE_EVERY) * N * N
                                    : replayed + (chunk - 1) * N * N;
        const bool zeros = piece.begins();
#pragma unroll
        for (int n = 0; n < N * N / 8 / THREADS; n++) {
            const int i = threadIdx.x + n * THREADS, row = copied_row(i), column = i % (N / 8) * 8;
            copy(s0 + (row_at<ROW>(row) + column), from + row * N + column, zeros);
        }
    };
    const auto last_chunk = [&](long long segment) {  // where the last chunk of the segment that begins there begins
        return (end - segment < SAVE_EVERY ? end - 1 : segment + SAVE_EVERY - 1) / CHUNK * CHUNK;
    };
    // A segment's pieces are worked on forwards, if it has several chunks, for the states before all chunks but its
    // first, and then backwards.
    long long segment = (end - 1) / SAVE_EVERY * SAVE_EVERY;
    Piece next = {segment, Starts(seq_start, head, segment).mask(), 0, 0};
    bool forwards;  // whether next is to be worked on forwards
    Starts starts(seq_start, head, segment - SAVE_EVERY);  // of the segment before next's
    const auto enter = [&]() {  // next becomes the first piece of its segment
        forwards = last_chunk(segment) > segment;
        next.from = 0, next.to = head.rows(segment, end);
        if (forwards)
            next.find_end(CHUNK);
        else
            next.find_begin();
    };
    bool more = steps > 0;
    if (more) enter(), read(next, 0), read_state(next);
    int stage = 0;
    while (more) {
        if (forwards) {
            State s;
            clear(s);
            while (forwards) {
                const Piece piece = next;
                const Shared<bf16> rs = stages + stage * (7 * INPUT / 2), zs = rs + INPUT / 2, ks = zs + INPUT / 2,
                                   as = ks + INPUT / 2, bs = as + INPUT / 2, vs = bs + INPUT / 2;
                wait_for_copies();
                __syncthreads();
                if (piece.to < CHUNK) {
                    next.from = piece.to;
                } else {
                    next.t0 += CHUNK;
                    next.from = 0;
                    forwards = next.t0 < last_chunk(segment);
                }
                next.find_end(head.rows(next.t0, end));
                if (!forwards) {
                    next.to = head.rows(next.t0, end);
                    next.find_begin();
                }
                read(next, stage ^ 1);
                stage ^= 1;
                if (piece.first() == segment) load_rounded(s, s0, at);
                if (piece.begins()) clear(s);
                {
                    Decays unused;
                    prepare<false>(rs, zs, ks, as, bs, k_rest, b_rest, ends, piece.rows(), at, unused);
                }
                __syncthreads();
                compute_pairs<false>(pairs, rs, ks, k_rest, as, bs, b_rest, at);
                Block from_a = {}, u = {};
                unsigned in_v[4], in_u[4];
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    unsigned state[4], in_a[4];
                    as_a(state, tile_of(s, tile));
                    load_b_transposed<ROW>(in_a, as + tile * 16);
                    mma(from_a, state, in_a);
                }
                __syncthreads();
                load_a_transposed<ROW>(in_v, vs + 16 * at.warp);
                solve_values(u, from_a, in_v, pairs);
                as_a(in_u, u);
                add_outer(s, in_v, k_rest);
                add_outer(s, in_v, ks);
                add_outer(s, in_u, b_rest);
                add_outer(s, in_u, bs);
                decay(s, ends, at);
                if (piece.to == CHUNK)
                    store_rounded<N>(s, replayed + piece.in_segment() / CHUNK * N * N, at);
            }
            // The state before the last chunk is still here.
            if (next.begins())
                read_state(next);
            else
                store_rounded<ROW>(s, s0, at);
        }
        const Piece piece = next;
        const int rows = piece.rows();
        const long long from = head.row(piece.first());
        const Shared<bf16> rs = stages + stage * (7 * INPUT / 2), zs = rs + INPUT / 2, ks = zs + INPUT / 2,
                           as = ks + INPUT / 2, bs = as + INPUT / 2, vs = bs + INPUT / 2, dys = vs + INPUT / 2;
        wait_for_copies();
        __syncthreads();
        if (piece.first() <= (piece.begins() ? range.begin : 0)) {
            more = false;
        } else if (piece.from > 0) {
            next.to = piece.from;
            next.find_begin();
        } else if (piece.t0 > segment) {
            next.t0 -= CHUNK;
            next.to = CHUNK;
            next.find_begin();
        } else {
            segment -= SAVE_EVERY;
            next.t0 = segment;
            next.starts = starts.mask();
            starts = Starts(seq_start, head, segment - SAVE_EVERY);
            enter();
        }
        if (more) read(next, stage ^ 1);
        stage ^= 1;
        Decays d;
        prepare<true>(rs, zs, ks, as, bs, k_rest, b_rest, ends, rows, at, d);
        __syncthreads();

        decay(grad, ends, at);
        compute_pairs<true>(pairs, rs, ks, k_rest, as, bs, b_rest, at);
        Block from_a = {}, du = {}, dvs = {};  // S0 a; G b; G k: for the warp's values
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            unsigned state[4], g[4], rest[4], in_a[4], in_b[4], in_k[4], small[4];
            load_a<ROW>(state, s0 + (16 * at.warp * ROW + tile * 16));
            as_a(g, tile_of(grad, tile));
            rest_as_a(rest, tile_of(grad, tile), g);
#pragma unroll
            for (int i = 0; i < 4; i++)
                write_pair(gs + (row_at<ROW>(16 * at.warp + at.g + i % 2 * 8) + tile * 16 + i / 2 * 8 + 2 * at.t), g[i]);
            load_b_transposed<ROW>(in_a, as + tile * 16);
            load_b_transposed<ROW>(in_b, bs + tile * 16);
            load_b_transposed<ROW>(in_k, ks + tile * 16);
            mma(from_a, state, in_a);
            load_b_transposed<ROW>(small, b_rest + tile * 16);
            mma(du, g, small);
            load_b_transposed<ROW>(small, k_rest + tile * 16);
            mma(dvs, g, small);
            mma(du, rest, in_b);
            mma(dvs, rest, in_k);
            mma(du, g, in_b);
            mma(dvs, g, in_k);
        }
        __syncthreads();

        {
            unsigned in_v[4], in_dy[4], in_du[4], du_rest[4], in_dz[4], dz_rest[4];
            load_a_transposed<ROW>(in_v, vs + 16 * at.warp);
            Block u = {}, dzeta = {};
            solve_values(u, from_a, in_v, pairs);
            write_values(us, u, at);
            load_a_transposed<ROW>(in_dy, dys + 16 * at.warp);
            times_square<false>(du, in_dy, pairs.of(RB));
            as_a(in_du, du);
            rest_as_a(du_rest, du, in_du);
            times_square<false>(dzeta, in_du, du_rest, pairs.of(INVERSE));
            write_values(dus, dzeta, at);
            as_a(in_dz, dzeta);
            rest_as_a(dz_rest, dzeta, in_dz);
            times_square<false>(dvs, in_dy, pairs.of(RK));
            times_square<false>(dvs, in_dz, dz_rest, pairs.of(AK));
            store_values(dv + from, head.stride, rows, dvs, at);
            add_outer(grad, in_dy, rs);
            add_outer(grad, in_dz, as);
            if (piece.begins()) clear(grad);
        }
        __syncthreads();

        // The gradients of the four matrices take their places; each is one warp's work.
#pragma unroll 1
        for (int which = at.warp; which <= RK; which += WARPS) {
            Block c = {};
            multiply_rows(c, which < RB ? dus : dys, which % 2 ? vs : us);
            keep_lower(c, which >= RB, at);
            write_square(pairs.of(which), c, at);
        }
        // For the warp's keys: what goes through the states before and after the piece.
        Block to_a = {}, to_r = {}, to_b = {}, to_k = {};
        float ended[2] = {};  // sums over values of S0 * G, of keys g and g + 8
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            unsigned state[4], g[4], x[4];
            load_b<ROW>(state, s0 + (tile * 16 * ROW + 16 * at.warp));
            load_b<ROW>(g, gs + (tile * 16 * ROW + 16 * at.warp));
#pragma unroll
            for (int i = 0; i < 4; i++)
                ended[i / 2] += low_of(state[i]) * low_of(g[i]) + high_of(state[i]) * high_of(g[i]);
            load_a<ROW>(x, dus + tile * 16);
            mma(to_a, x, state);
            load_a<ROW>(x, dys + tile * 16);
            mma(to_r, x, state);
            load_a<ROW>(x, us + tile * 16);
            mma(to_b, x, g);
            load_a<ROW>(x, vs + tile * 16);
            mma(to_k, x, g);
        }
        sum_to_all<4>(ended, 0xffffffffu);
        __syncthreads();

        if (more) read_state(next);
        Block in_b = {}, in_k = {};  // what goes through the matrices
        {
            unsigned key[4], x[4];
            const auto add = [&](Block& to, int which, Shared<bf16> y, Shared<bf16> y_rest) {
                load_a<SQUARE_ROW>(x, pairs.of(which));
                load_b<ROW>(key, y_rest + 16 * at.warp);
                mma(to, x, key);
                load_b<ROW>(key, y + 16 * at.warp);
                mma(to, x, key);
                load_a<SQUARE_ROW>(x, pairs.of(which) + REST);
                mma(to, x, key);
            };
            add(to_a, INVERSE, bs, b_rest);
            add(to_a, AK, ks, k_rest);
            add(to_r, RB, bs, b_rest);
            add(to_r, RK, ks, k_rest);
            const auto add_transposed = [&](Block& to, int which, Shared<bf16> y) {
                load_b<ROW>(key, y + 16 * at.warp);
                load_a_transposed<SQUARE_ROW>(x, pairs.of(which) + REST);
                mma(to, x, key);
                load_a_transposed<SQUARE_ROW>(x, pairs.of(which));
                mma(to, x, key);
            };
            add_transposed(in_b, INVERSE, as);
            add_transposed(in_k, AK, as);
            add_transposed(in_b, RB, rs);
            add_transposed(in_k, RK, rs);
        }
        // The gradient of the log of a decay: of what passes it from rows before to rows after it.
        Block through, later, inside, before, after;
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int p = place(at, j, half);
                const unsigned xa = read_pair(as + p), xr = read_pair(rs + p), xk = read_pair(ks + p),
                               xb = read_pair(bs + p), k_low = read_pair(k_rest + p), b_low = read_pair(b_rest + p);
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int i = 2 * half + e;
                    const auto of = [&](unsigned pair) { return e ? high_of(pair) : low_of(pair); };
                    const float key = of(xk) + of(k_low), factor = of(xb) + of(b_low);
                    through[j][i] = key * to_k[j][i] + factor * to_b[j][i];
                    inside[j][i] = of(xr) * to_r[j][i] - key * in_k[j][i] - factor * in_b[j][i];
                    later[j][i] = inside[j][i] + of(xa) * to_a[j][i];
                }
            }
        float unused[4];
        if (N == 128) {  // again, as there are no registers to keep them: the state's gradient takes 64
            float logs[2][4];
#pragma unroll
            for (int half = 0; half < 2; half++) read_logs(zs, half, rows, at, logs);
            sum_rows<false>(logs, before, unused, at);
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) d.set(j, i, before[j][i], logs[j][i]);
        }
        sum_rows<false>(through, before, unused, at);
        sum_rows<true>(later, after, unused, at);
        float end[4];
#pragma unroll
        for (int q = 0; q < 4; q++) end[q] = __shfl_sync(0xffffffffu, ended[q / 2], 4 * (2 * at.t + q % 2));
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = at.g + 8 * half;
            float x[4], drs[4], dzs[4], das[4], dks[4], dbs[4];
            read_four(zs + row_at<ROW>(row), at, x);
#pragma unroll
            for (int q = 0; q < 4; q++) {
                const int j = q / 2, i = 2 * half + q % 2;
                // The derivative of the log of a decay is -e^-0.5 sigmoid(z) sigmoid(-z). At a document's first step
                // there is no state that could decay.
                const float small = exp2_of(-LOG2_E * fabsf(x[q])), part = reciprocal(1.0f + small);
                const float passed = end[q] + before[j][i] + inside[j][i] + after[j][i];
                dzs[q] = row == 0 && piece.begins() ? 0.0f : passed * -DECAY_SCALE * small * part * part;
                drs[q] = d.to_r[j][i] * to_r[j][i];
                das[q] = d.to_a[j][i] * to_a[j][i];
                dks[q] = d.undo[j][i] * (in_k[j][i] + to_k[j][i]);
                dbs[q] = d.undo[j][i] * (in_b[j][i] + to_b[j][i]);
            }
            if (row >= rows) continue;
            const long long out = from + row * head.stride + four_keys(at);
            write_four(dr + out, drs);
            write_four(dz + out, dzs);
            write_four(da + out, das);
            write_four(dk + out, dks);
            write_four(db + out, dbs);
        }
    }
    if (next.first() == 0) store_state(grad, dstate + head.index * N * N, at);
}
