// Counts bank conflicts of shared memory; simt.h includes it with -DSIMT_BANKS, and tests/simt/banks.py reads the result.
//
// Shared memory has 32 banks of 4-byte words, of which each gives or takes one word at a time. An access of a warp takes
// a wavefront at least for each of its phases: one of 32 lanes for up to 4 bytes a lane, two of 16 for 8 bytes, four of 8
// for 16 bytes. ldmatrix is such a read of 16 bytes a lane, cp.async such a write. A phase takes as many wavefronts as
// the words that it wants of its busiest bank; several lanes may share a word.
#pragma once
#include <map>
#include <set>
#include <tuple>

namespace simt {
namespace banks {

constexpr int BANKS = 32;
constexpr int DEPTH = 12;  // of a place in the source: an access lies within so many calls

typedef std::vector<void*> Place;  // return addresses, innermost first
struct Cost {
    uint64_t instructions = 0, least = 0, wavefronts = 0;
};
// What identifies an access of a warp: the warp, how often it has met, the place, and how often the thread has been at
// that place since.
typedef std::tuple<int, unsigned, int, unsigned> Key;
struct Lanes {
    int bytes;
    std::vector<std::pair<int, int64_t>> at;  // lane, byte
};

static std::map<Place, int> numbers;  // of places, in the order in which they were found
static std::vector<Cost> costs;       // by the number of the place
static std::map<Key, Lanes> accesses;
static std::vector<std::pair<unsigned, std::map<int, unsigned>>> visits;  // by thread: of a meeting, by place
static std::string text;

// The current thread accesses so many bytes of shared memory, from that byte of it on.
static void note(int64_t byte, int bytes) {
    void* frames[DEPTH];
    const int depth = backtrace(frames, DEPTH);
    const int number = numbers.emplace(Place(frames, frames + depth), int(numbers.size())).first->second;
    if (visits.size() < size_t(count)) visits.resize(count);
    const unsigned met = threads[current].met;
    auto& visited = visits[current];
    if (visited.first != met) visited = {met, {}};
    Lanes& lanes = accesses[Key(current / WARP, met, number, visited.second[number]++)];
    lanes.bytes = bytes;
    lanes.at.emplace_back(current % WARP, byte);
}

// Adds up what a block did.
static void finish_block() {
    costs.resize(numbers.size());
    for (const auto& [key, lanes] : accesses) {
        const int phases = lanes.bytes <= 4 ? 1 : lanes.bytes / 4;
        std::map<int, std::map<int, std::set<int64_t>>> words;  // phase, bank
        for (const auto& [lane, byte] : lanes.at)
            for (int64_t word = byte / 4; word <= (byte + lanes.bytes - 1) / 4; word++)
                words[lane * phases / WARP][word % BANKS].insert(word);
        Cost& cost = costs[std::get<2>(key)];
        cost.instructions++;
        for (const auto& phase : words) {
            size_t most = 0;
            for (const auto& bank : phase.second) most = std::max(most, bank.second.size());
            cost.least++, cost.wavefronts += most;
        }
    }
    accesses.clear();
    visits.clear();
}

}  // namespace banks
}  // namespace simt

// What happened since the last call. A line for each place: instructions, the least wavefronts, wavefronts, and the
// return addresses within the library.
extern "C" const char* simt_banks() {
    using namespace simt::banks;
    text.clear();
    for (const auto& [place, number] : numbers) {
        const Cost& cost = costs[number];
        for (uint64_t x : {cost.instructions, cost.least, cost.wavefronts}) text += std::to_string(x) + " ";
        for (void* frame : place) {
            Dl_info info;
            char hex[20];
            if (!dladdr(frame, &info)) continue;
            snprintf(hex, sizeof hex, "%lx ", static_cast<char*>(frame) - static_cast<char*>(info.dli_fbase) - 1);
            text += hex;
        }
        text += "\n";
    }
    numbers.clear();
    costs.clear();
    return text.c_str();
}
