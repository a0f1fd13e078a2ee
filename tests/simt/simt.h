// Runs CUDA kernels on the CPU: g++ -include simt.h -x c++ kernel.cu. Blocks run one after the other. The threads of a
// block are fibers, of which one runs at a time, in a random order that a seed picks; __syncthreads, __syncwarp and
// shuffles switch between them. A fault ends the launch and is reported. Faults are: a barrier that not all threads
// reach, a shuffle that not all lanes of a warp reach, a race on memory, a read of shared memory that was never
// written, an access out of bounds or not aligned, a copy begun by `copy` that is read or overwritten before the thread
// that began it has waited for it.
//
// A race on shared memory is two accesses of one element by different threads, one of them a write, with no
// __syncthreads between them and, if both are in one warp, no __syncwarp either. Shuffles do not count: CUDA promises no
// memory order for them. A race on global memory is an access of what another block has written: blocks have no order.
//
// Kernels declare shared arrays with SHARED, take pointers into them as Shared<T>, and access both these and global
// memory with READ_AS and WRITE_AS (cuda/common.cuh). A report ends with return addresses, which harness.py replaces by
// lines of the source. With -DSIMT_BANKS, banks.h counts bank conflicts.
#pragma once
#include <dlfcn.h>
#include <execinfo.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#define __global__ __attribute__((noinline))
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct Dim3 {
    unsigned x, y, z;
};
static Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

constexpr int WARP = 32, MAX_ARGUMENTS = 24;
constexpr size_t STACK = 128 * 1024;

enum State { READY, AT_BLOCK, AT_WARP, DONE };
const char* const STATES[] = {"is ready", "waits at __syncthreads", "waits for its warp", "has returned"};

struct Thread {
    State state;
    bool begun;
    int line;               // of the barrier at which it waits
    const char* operation;  // the name of that barrier
    unsigned order;         // the number of __syncwarps that it has passed
    unsigned shuffles;      // the number of shuffles that it has reached
    unsigned met;           // how often it has waited for others
    jmp_buf where;
    ucontext_t start;
    std::unique_ptr<char[]> stack{new char[STACK]};
};
static std::vector<Thread> threads;
static std::vector<uint64_t> slots;  // [warp][parity of the shuffle][lane]: a value on its way through a shuffle
static jmp_buf scheduler, failure;
static int current, count;  // the thread that runs, and the number of threads in a block
static unsigned barriers;   // the number of __syncthreads passed, over all blocks
static std::mt19937_64 order;
static char report[4096];
static std::vector<std::pair<uintptr_t, uintptr_t>> global;  // the memory that the kernel may touch: [begin, end)
static std::unordered_map<uintptr_t, unsigned> written_by;   // the block that wrote each two bytes of it
static uint64_t arguments[MAX_ARGUMENTS];
static void* kernel;

// Writes the report and leaves the launch.
[[noreturn]] __attribute__((noinline, format(printf, 1, 2))) static void fail(const char* format, ...) {
    int n = snprintf(report, sizeof report, "block (%u, %u, %u) thread %d: ", blockIdx.x, blockIdx.y, blockIdx.z,
                     current);
    va_list list;
    va_start(list, format);
    n += vsnprintf(report + n, sizeof report - n, format, list);
    va_end(list);
    void* frames[16];
    Dl_info info;
    const int depth = backtrace(frames, 16);
    for (int i = 1; i < depth; i++) {
        if (!dladdr(frames[i], &info) || n > int(sizeof report) - 32) continue;
        const long at = static_cast<char*>(frames[i]) - static_cast<char*>(info.dli_fbase);
        n += snprintf(report + n, sizeof report - n, "%s%lx", i == 1 ? " @" : " ", at - 1);  // inside the call
    }
    _longjmp(failure, 1);
}

// The thread waits in that state until the scheduler lets it go on.
static void wait(State state, const char* operation, int line) {
    Thread& me = threads[current];
    me.state = state;
    me.operation = operation;
    me.line = line;
    me.met++;
    if (!_setjmp(me.where)) _longjmp(scheduler, 1);
}

static int warp_begin(int thread) { return thread / WARP * WARP; }
static int warp_end(int thread) { return warp_begin(thread) + WARP < count ? warp_begin(thread) + WARP : count; }
static void check_mask(unsigned mask, const char* operation, int line) {
    const int lanes = warp_end(current) - warp_begin(current);
    const unsigned all = lanes == WARP ? ~0u : (1u << lanes) - 1;
    if (mask != all) fail("%s at line %d has mask %x; the warp's lanes are %x", operation, line, mask, all);
}

// A shuffle: hands on the thread's value and returns that of lane `source`.
template <class T>
T exchange(const char* operation, int line, unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= 8);
    check_mask(mask, operation, line);
    uint64_t* slot = &slots[current / WARP * 2 * WARP + (threads[current].shuffles++ & 1) * WARP];
    memcpy(slot + current % WARP, &value, sizeof(T));
    wait(AT_WARP, operation, line);
    if (warp_begin(current) + source >= warp_end(current))
        fail("%s at line %d reads lane %d, which is none", operation, line, source);
    memcpy(&value, slot + source, sizeof(T));
    return value;
}

// The mask of the lanes whose flag is set.
static unsigned ballot(const char* operation, int line, unsigned mask, bool flag) {
    exchange(operation, line, mask, flag, current % WARP);
    const uint64_t* slot = &slots[current / WARP * 2 * WARP + ((threads[current].shuffles - 1) & 1) * WARP];
    unsigned lanes = 0;
    for (int lane = 0; lane < warp_end(current) - warp_begin(current); lane++)
        lanes |= unsigned(*reinterpret_cast<const bool*>(slot + lane)) << lane;
    return lanes;
}

// Which threads touched an element of shared memory last (-1: none), and how many __syncthreads (barrier) and
// __syncwarps (order) had been passed then.
struct Shadow {
    int writer = -1, reader = -1;
    unsigned write_barrier = 0, write_order = 0, read_barrier = 0, read_order = 0;
    unsigned lanes = 0;       // of the reader's warp: those that read since the last barrier of either kind
    bool many_warps = false;  // threads of several warps have read since the last __syncthreads
    bool written = false;
    bool copying = false;  // the writer has begun to copy it and has not waited since
};

static std::vector<std::vector<Shadow*>> copies;  // by thread: what it has begun to copy and has not waited for

// A shared array, of any type of element.
struct Memory {
    const char* name;
    int64_t first = 0;  // byte of shared memory at which it begins
    std::vector<Shadow> shadow;
    explicit Memory(const char* name, size_t n) : name(name), shadow(n) { all().push_back(this); }
    static std::vector<Memory*>& all() {
        static std::vector<Memory*> list;
        return list;
    }

    // Notes an access of elements first to first + n - 1 by the current thread; fails if it is out of bounds or a race.
    void touch(int64_t first, int n, bool write) {
        if (first < 0 || first + n > int64_t(shadow.size()))
            fail("out of bounds: %s[%ld], %d elements, of %zu", name, long(first), n, shadow.size());
        for (int64_t i = first; i < first + n; i++) {
            Shadow& x = shadow[i];
            const int warp = current / WARP;
            const unsigned now = threads[current].order, me = 1u << current % WARP;
            if (!write && !x.written) fail("never written: %s[%ld] is read", name, long(i));
            if (x.copying)
                fail("copy: %s[%ld] is %s, thread %d has not waited for its copy", name, long(i),
                     write ? "written" : "read", x.writer);
            if (x.writer >= 0 && x.writer != current && x.write_barrier == barriers &&
                (x.writer / WARP != warp || x.write_order == now))
                fail("race: %s[%ld] is %s, thread %d wrote it", name, long(i), write ? "written" : "read", x.writer);
            const bool read = x.reader >= 0 && x.read_barrier == barriers;
            const bool same_warp = read && x.reader / WARP == warp;
            if (write) {
                if (read && (x.many_warps || !same_warp || (x.read_order == now && (x.lanes & ~me))))
                    fail("race: %s[%ld] is written, thread %d read it", name, long(i), x.reader);
                x.writer = current, x.write_barrier = barriers, x.write_order = now, x.written = true;
            } else {
                x.many_warps = read && (x.many_warps || !same_warp);
                x.lanes = same_warp && x.read_order == now ? x.lanes | me : me;
                x.reader = current, x.read_barrier = barriers, x.read_order = now;
            }
        }
    }
};

static int64_t dynamic_bytes;  // how much dynamic shared memory the kernel that ran last has named

static void take(Memory& array, int64_t first, int64_t size) {
    if (first % 16) fail("not aligned: dynamic shared memory from byte %ld on", long(first));
    array.first = first;
    dynamic_bytes = std::max(dynamic_bytes, first + size);
}

template <class T>
struct Array : Memory {
    alignas(16) std::unique_ptr<T[]> data;
    Array(const char* name, size_t n) : Memory(name, n), data(new T[n]) {}
};

template <class T>
struct Shared {
    Array<T>* array;
    int64_t at;
    Shared operator+(int64_t n) const { return {array, at + n}; }
};

#ifdef SIMT_BANKS
}  // namespace simt
#include "banks.h"
namespace simt {
#endif

// The value of type V at p, after the checks of the access.
template <class V, class T>
V& access(Shared<T> p, bool write) {
    p.array->touch(p.at, sizeof(V) / sizeof(T), write);
    if (p.at * sizeof(T) % alignof(V))
        fail("not aligned: %s[%ld], %zu bytes", p.array->name, long(p.at), sizeof(V));
#ifdef SIMT_BANKS
    banks::note(p.array->first + p.at * int64_t(sizeof(T)), sizeof(V));
#endif
    return *reinterpret_cast<V*>(&p.array->data[p.at]);
}
template <class V, class T>
V& access(T* p, bool write) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
    bool inside = false;
    for (const auto& range : global) inside |= range.first <= begin && begin + sizeof(V) <= range.second;
    if (!inside) fail("out of bounds: %zu bytes of global memory at %p", sizeof(V), (const void*)p);
    if (begin % alignof(V)) fail("not aligned: %zu bytes of global memory at %p", sizeof(V), (const void*)p);
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    for (uintptr_t at = begin / 2; at <= (begin + sizeof(V) - 1) / 2; at++) {
        const auto found = written_by.find(at);
        if (found != written_by.end() && found->second != block)
            fail("race: global memory at %p, which another block has written", (const void*)p);
        if (write) written_by[at] = block;
    }
    return *reinterpret_cast<V*>(const_cast<std::remove_const_t<T>*>(p));
}

// Where a fiber begins: it calls the kernel. All parameters are pointers or 8-byte integers, and a call with more
// arguments than the kernel has parameters does no harm.
static void thread_main() {
    typedef uint64_t U;
    const U* a = arguments;
    reinterpret_cast<void (*)(U, U, U, U, U, U, U, U, U, U, U, U, U, U, U, U, U, U, U, U, U, U, U, U)>(kernel)(
        a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16],
        a[17], a[18], a[19], a[20], a[21], a[22], a[23]);
    threads[current].state = DONE;
    _longjmp(scheduler, 1);
}

// Lets the lanes of a warp go on once all of them wait at the same place.
static void release_warps() {
    for (int first = 0; first < count; first += WARP) {
        const int end = warp_end(first);
        bool together = true;
        for (int i = first; i < end; i++)
            together &= threads[i].state == AT_WARP && threads[i].line == threads[first].line &&
                        threads[i].operation == threads[first].operation;
        for (int i = first; together && i < end; i++) threads[i].state = READY;
    }
}

// To be called when no thread can run. If all threads wait at the same __syncthreads, they go on; if they wait at
// different places, that is reported as a fault; if all have returned, the result is false.
static bool release_block() {
    int done = 0;
    for (int i = 0; i < count; i++) done += threads[i].state == DONE;
    if (done == count) return false;
    const Thread& first = threads[0];
    for (current = 0; current < count; current++) {
        const Thread& x = threads[current];
        if (x.state != AT_BLOCK || x.state != first.state || x.line != first.line)
            fail("divergent: it %s (line %d), thread 0 %s (line %d)", STATES[x.state], x.line, STATES[first.state],
                 first.line);
    }
    barriers++;
    for (int i = 0; i < count; i++) threads[i].state = READY;
    return true;
}

static void run_block() {
    for (Memory* memory : Memory::all()) memory->shadow.assign(memory->shadow.size(), Shadow());
    copies.clear();
    barriers++;
    std::vector<int> turn(count);
    for (int i = 0; i < count; i++) {
        Thread& x = threads[i];
        x.state = READY, x.begun = false, x.line = 0, x.operation = "", x.order = 0, x.shuffles = 0;
        x.met = 0;
        getcontext(&x.start);
        x.start.uc_stack.ss_sp = x.stack.get();
        x.start.uc_stack.ss_size = STACK;
        makecontext(&x.start, thread_main, 0);
        turn[i] = i;
    }
    while (true) {
        static volatile size_t i;  // static and volatile, to keep its value through the jumps
        static volatile bool ready;
        ready = false;
        std::shuffle(turn.begin(), turn.end(), order);
        for (i = 0; i < turn.size(); i = i + 1) {
            Thread& x = threads[turn[i]];
            if (x.state != READY) continue;
            ready = true;
            if (order() % 4 == 0) continue;  // now and then a thread is left behind
            current = turn[i];
            threadIdx = {unsigned(current), 0, 0};
            if (_setjmp(scheduler)) continue;
            if (x.begun) _longjmp(x.where, 1);
            x.begun = true;
            setcontext(&x.start);
        }
        release_warps();
        if (ready) continue;
        for (int k = 0; k < count; k++) ready = ready || threads[k].state == READY;
        if (!ready && !release_block()) break;
    }
#ifdef SIMT_BANKS
    banks::finish_block();
#endif
}

}  // namespace simt

template <class T>
using Shared = simt::Shared<T>;
#define SHARED(type, name, count)                       \
    static simt::Array<type> name##_array(#name, count); \
    const Shared<type> name { &name##_array, 0 }
#define DYNAMIC(type, name, first, count) \
    SHARED(type, name, count);            \
    simt::take(name##_array, first, (count) * sizeof(type))
#define READ_AS(V, p) (simt::access<const V>(p, false))
#define WRITE_AS(V, p) (simt::access<V>(p, true))

static inline void __syncthreads(int line = __builtin_LINE()) { simt::wait(simt::AT_BLOCK, "__syncthreads", line); }
static inline void __syncwarp(unsigned mask, int line = __builtin_LINE()) {
    simt::check_mask(mask, "__syncwarp", line);
    simt::wait(simt::AT_WARP, "__syncwarp", line);
    simt::threads[simt::current].order++;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
    return simt::exchange("__shfl_xor_sync", line, mask, value, simt::current % simt::WARP ^ lanes);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
    const int lane = simt::current % simt::WARP, source = lane + lanes < simt::WARP ? lane + lanes : lane;
    return simt::exchange("__shfl_down_sync", line, mask, value, source);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
    return simt::exchange("__shfl_sync", line, mask, value, source);
}
static inline unsigned __ballot_sync(unsigned mask, bool flag, int line = __builtin_LINE()) {
    return simt::ballot("__ballot_sync", line, mask, flag);
}

// The functions of cuda/mma.cuh, by the fragment layouts of the PTX ISA.
namespace simt {

static std::vector<uint32_t> registers;  // [warp][parity][lane][8]: what lanes give to an operation of the whole warp

// Hands on COUNT registers of each lane; returns those of all lanes of the warp, valid until the next but one exchange.
template <int COUNT>
const uint32_t (*gather(const char* operation, int line, const uint32_t (&mine)[COUNT]))[8] {
    check_mask(~0u, operation, line);
    const size_t parity = threads[current].shuffles++ & 1;
    if (registers.size() < size_t(count) * 16) registers.resize(size_t(count) * 16);
    auto* all = reinterpret_cast<uint32_t(*)[8]>(&registers[(current / WARP * 2 + parity) * WARP * 8]);
    memcpy(all[current % WARP], mine, sizeof mine);
    wait(AT_WARP, operation, line);
    return all;
}
static float bf16_at(uint32_t pair, int which) {
    const uint32_t bits = which ? pair & 0xffff0000u : pair << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static uint32_t half_at(uint32_t pair, int which) { return which ? pair >> 16 : pair & 0xffffu; }

}  // namespace simt

static inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, int line = __builtin_LINE()) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const auto* all = simt::gather("mma", line, mine);
    const int g = simt::current % simt::WARP / 4, t = simt::current % 4;
    for (int i = 0; i < 4; i++) {
        const int m = g + i / 2 * 8, n = 2 * t + i % 2;
        for (int k = 0; k < 16; k++) {
            const uint32_t in_a = all[m % 8 * 4 + k % 8 / 2][m / 8 + k / 8 * 2];
            const uint32_t in_b = all[n * 4 + k % 8 / 2][4 + k / 8];
            c[i] += simt::bf16_at(in_a, k % 2) * simt::bf16_at(in_b, k % 2);
        }
    }
}
template <bool TRANSPOSED, class T>
void load_matrices(unsigned (&x)[4], simt::Shared<T> row, int line = __builtin_LINE()) {
    struct alignas(16) Row {
        uint32_t pairs[4];
    };
    const Row mine = simt::access<const Row>(row, false);
    // A lane hands on its row, of which others take one element or pair.
    const auto* all = simt::gather("load_matrices", line, mine.pairs);
    const int g = simt::current % simt::WARP / 4, t = simt::current % 4;
    for (int i = 0; i < 4; i++)
        x[i] = TRANSPOSED ? simt::half_at(all[8 * i + 2 * t][g / 2], g % 2) |
                                simt::half_at(all[8 * i + 2 * t + 1][g / 2], g % 2) << 16
                          : all[8 * i + g][t];
}
static inline unsigned transposed(unsigned x, int line = __builtin_LINE()) {
    const uint32_t mine[1] = {x};
    const auto* all = simt::gather("transposed", line, mine);
    const int g = simt::current % simt::WARP / 4, t = simt::current % 4;
    const uint32_t low = all[2 * t * 4 + g / 2][0], high = all[(2 * t + 1) * 4 + g / 2][0];
    return simt::half_at(low, g % 2) | simt::half_at(high, g % 2) << 16;
}
template <class T>
void copy(simt::Shared<T> to, const T* from, bool zeros) {
    struct alignas(16) Bytes {
        T values[16 / sizeof(T)];
    };
    Bytes bytes{};
    if (!zeros) bytes = simt::access<const Bytes>(from, false);
    simt::access<Bytes>(to, true) = bytes;
    if (simt::copies.size() < size_t(simt::count)) simt::copies.resize(simt::count);
    for (size_t i = 0; i < 16 / sizeof(T); i++) {
        simt::Shadow& x = to.array->shadow[to.at + i];
        x.copying = true;
        simt::copies[simt::current].push_back(&x);
    }
}
static inline void wait_for_copies() {
    if (simt::copies.size() < size_t(simt::count)) simt::copies.resize(simt::count);
    for (simt::Shadow* x : simt::copies[simt::current]) {  // only now is it written
        x->copying = false;
        x->write_barrier = simt::barriers, x->write_order = simt::threads[simt::current].order;
    }
    simt::copies[simt::current].clear();
}
static inline float exp2_of(float x) { return std::exp2(x); }
static inline float reciprocal(float x) { return 1.0f / x; }
static inline unsigned pack(float low, float high) {
    const auto round = [](float x) {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        return x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fffu;
    };
    return round(low) | round(high) << 16;
}
static inline void __trap() { simt::fail("__trap"); }
#define __expf(x) std::exp(static_cast<float>(x))  // a macro, since glibc has a function of that name
static inline float __fdividef(float x, float y) { return x / y; }
static inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
static inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int bit = 0; bit < 32; bit++) reversed |= (x >> bit & 1) << (31 - bit);
    return reversed;
}
static inline float __uint_as_float(unsigned x) {
    float f;
    memcpy(&f, &x, 4);
    return f;
}
static inline unsigned __float_as_uint(float f) {
    unsigned x;
    memcpy(&x, &f, 4);
    return x;
}

extern "C" int64_t simt_dynamic_bytes() { return simt::dynamic_bytes; }

#ifdef SIMT_COVERAGE
extern "C" void __gcov_dump(void);
extern "C" void simt_write_coverage() { __gcov_dump(); }
#endif

// Runs the kernel over the grid. ranges: n_ranges pairs (address, bytes) of the global memory that it may touch.
// Returns null, or the report of a fault, at which the kernel was left.
extern "C" const char* simt_launch(void* kernel, const unsigned* grid, const unsigned* block, const uint64_t* arguments,
                                   int n_arguments, const uint64_t* ranges, int n_ranges, uint64_t seed) {
    if (n_arguments > simt::MAX_ARGUMENTS) return "too many arguments";
    simt::kernel = kernel;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    if (blockDim.y != 1 || blockDim.z != 1) return "blocks of more than one dimension are not emulated";
    simt::count = blockDim.x;
    while (int(simt::threads.size()) < simt::count) simt::threads.emplace_back();
    simt::slots.resize((simt::count + simt::WARP - 1) / simt::WARP * 2 * simt::WARP);
    memcpy(simt::arguments, arguments, n_arguments * sizeof(uint64_t));
    simt::global.clear();
    simt::written_by.clear();
    for (int i = 0; i < n_ranges; i++) simt::global.emplace_back(ranges[2 * i], ranges[2 * i] + ranges[2 * i + 1]);
    simt::order.seed(seed);
    simt::dynamic_bytes = 0;
    if (_setjmp(simt::failure)) return simt::report;
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                blockIdx = {x, y, z};
                simt::run_block();
            }
    return nullptr;
}
