// Runs CUDA kernels on the CPU, thread by thread, from the very sources that nvcc compiles. Test equipment.
//
// This header comes first, because it stands in for CUDA's words, then the kernels; and
//
//     vlk::emulator::launch(kernel, grid, block, shared_bytes, arguments...);
//
// Every thread of a block is a fiber; blocks run one after another. A thread runs until it meets a barrier, a
// collective of its warp or its end, then the next one does: in the order of their indices, or, with a seed, one warp
// as far as it comes and then another, drawn at random. launch() throws std::runtime_error, with the state of every thread, where threads
// wait for each other for ever (a barrier that not all threads of the block reach, lanes absent from a
// collective whose mask names them) or meet at different barriers.
//
// It finds wrong indices, masks and barriers, by wrong results or by that report; with AddressSanitizer and
// UndefinedBehaviorSanitizer also what lies outside an array or on no boundary of its access. It does not find
// races between blocks, what the memory model alone forbids, or anything about speed.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulator/fiber.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// One block runs at a time, so that what a block shares is static.
#define VLK_SHARED(type, name, extents)                            \
    static ::vlk::emulator::Shared<type extents> shared_##name;     \
    auto& name = shared_##name.of_this_block()
#define VLK_DYNAMIC_SHARED(name) float* name = ::vlk::emulator::dynamic_shared()
#define VLK_REQUIRE(condition, sentence) \
    if (!(condition)) ::vlk::emulator::fail(sentence)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace vlk::emulator {

struct Schedule {
    unsigned seed = 0;                                      // 0: threads in order
    int64_t first_block = 0;                                // only these blocks run
    int64_t last_block = std::numeric_limits<int64_t>::max();
};
inline Schedule schedule;

// Where in the source a thread waits.
struct Site {
    const char* file = "";
    int line = 0;
    bool operator==(const Site& other) const { return line == other.line && !std::strcmp(file, other.file); }
};

enum class State { ready, at_barrier, in_collective, ended };

constexpr unsigned lanes = 32;

struct Thread {
    Fiber fiber;
    dim3 index;
    State state = State::ready;
    Site site;
    const char* collective = "";
    uint32_t mask = 0;
    uint64_t given = 0, taken = 0;  // what it brings to a collective and what it gets
};

struct Block {
    std::vector<std::unique_ptr<Thread>> threads;
    unsigned count = 0, current = 0;
    uint64_t number = 0;  // of all blocks that ever ran
    std::function<void()> kernel;
    std::unique_ptr<char, decltype(&std::free)> shared{nullptr, std::free};
    std::exception_ptr failure;

    Thread& self() { return *threads[current]; }
};
inline Block block;

// Full of NaN when a block first comes to it: what the block before left there must not pass for a result.
template <typename T>
class Shared {
  public:
    T& of_this_block() {
        if (filled_for_ != block.number) std::memset(&memory_, 0xff, sizeof memory_);
        filled_for_ = block.number;
        return memory_;
    }

  private:
    T memory_;
    uint64_t filled_for_ = 0;
};

inline float* dynamic_shared() { return reinterpret_cast<float*>(block.shared.get()); }

inline std::string describe(const Thread& thread) {
    const std::string where = std::string(" at ") + thread.site.file + ":" + std::to_string(thread.site.line);
    char mask[16];
    std::snprintf(mask, sizeof mask, "(%08x)", thread.mask);
    switch (thread.state) {
        case State::ready: return "ready";
        case State::at_barrier: return "waits in __syncthreads" + where;
        case State::in_collective: return std::string("waits in ") + thread.collective + mask + where;
        case State::ended: return "has ended";
    }
    return "";
}

// The complaint, and below it the state of every thread, neighbours in the same state on one line.
[[noreturn]] inline void fail(const std::string& complaint) {
    std::string report = "emulator: " + complaint + " in block (" + std::to_string(blockIdx.x) + ", " +
                         std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
    for (unsigned first = 0, next; first < block.count; first = next) {
        const std::string state = describe(*block.threads[first]);
        for (next = first + 1; next < block.count && describe(*block.threads[next]) == state;) ++next;
        report += "\n  threads " + std::to_string(first) + " to " + std::to_string(next - 1) + ": " + state;
    }
    throw std::runtime_error(report);
}

inline void wait() { block.self().fiber.leave(); }

inline void run_thread() {
    Thread& self = block.self();
    self.fiber.entered();
    try {
        block.kernel();
    } catch (...) {  // nothing unwinds from one stack to another
        block.failure = std::current_exception();
    }
    self.state = State::ended;
    self.fiber.finish();
}

inline bool resume_if_ready(unsigned number) {
    Thread& thread = *block.threads[number];
    if (thread.state != State::ready) return false;
    block.current = number;
    threadIdx = thread.index;
    thread.fiber.resume();
    if (block.failure) std::rethrow_exception(std::exchange(block.failure, nullptr));
    return true;
}

// All threads in turn.
inline bool resume_in_order() {
    bool any = false;
    for (unsigned number = 0; number < block.count; ++number) any |= resume_if_ready(number);
    return any;
}

// One warp after another in random order, each as far as it comes without the others.
inline bool resume_by_warps(std::mt19937& random) {
    std::vector<unsigned> warps((block.count + lanes - 1) / lanes);
    std::iota(warps.begin(), warps.end(), 0u);
    std::shuffle(warps.begin(), warps.end(), random);
    bool any = false;
    for (const unsigned warp : warps) {
        std::vector<unsigned> threads(std::min(lanes, block.count - warp * lanes));
        std::iota(threads.begin(), threads.end(), warp * lanes);
        for (bool more = true; more; any |= more) {
            std::shuffle(threads.begin(), threads.end(), random);
            more = false;
            for (const unsigned number : threads) more |= resume_if_ready(number);
        }
    }
    return any;
}

inline unsigned threads_in(State state) {
    unsigned found = 0;
    for (unsigned number = 0; number < block.count; ++number) found += block.threads[number]->state == state;
    return found;
}

// Lets all go when all have come.
inline bool pass_barrier() {
    if (threads_in(State::at_barrier) < block.count) return false;
    for (unsigned number = 0; number < block.count; ++number) {
        if (!(block.threads[number]->site == block.threads[0]->site)) fail("threads meet at different barriers");
    }
    for (unsigned number = 0; number < block.count; ++number) block.threads[number]->state = State::ready;
    return true;
}

inline void run_block(size_t shared_bytes, std::mt19937& random) {
    ++block.number;
    if (shared_bytes) std::memset(block.shared.get(), 0xff, shared_bytes);
    for (unsigned number = 0; number < block.count; ++number) {
        block.threads[number]->state = State::ready;
        block.threads[number]->fiber.start(run_thread);
    }
    while (threads_in(State::ended) < block.count) {
        const bool any = schedule.seed ? resume_by_warps(random) : resume_in_order();
        if (!any && !pass_barrier()) fail("threads wait for each other for ever");
    }
}

inline void prepare(dim3 shape, size_t shared_bytes) {
    block.count = shape.x * shape.y * shape.z;
    while (block.threads.size() < block.count) block.threads.push_back(std::make_unique<Thread>());
    for (unsigned number = 0; number < block.count; ++number)
        block.threads[number]->index = dim3(number % shape.x, number / shape.x % shape.y, number / shape.x / shape.y);
    void* shared = nullptr;  // of exactly this size, so that AddressSanitizer sees its end
    if (shared_bytes && posix_memalign(&shared, 16, shared_bytes)) throw std::bad_alloc();
    block.shared.reset(static_cast<char*>(shared));
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 shape, size_t shared_bytes, const Arguments&... arguments) {
    gridDim = grid;
    blockDim = shape;
    prepare(shape, shared_bytes);
    block.kernel = [&] { kernel(arguments...); };
    std::mt19937 random(schedule.seed);
    const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
    for (int64_t number = schedule.first_block; number < std::min(blocks, schedule.last_block); ++number) {
        blockIdx = dim3(static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                        static_cast<unsigned>(number / grid.x / grid.y));
        run_block(shared_bytes, random);
    }
}

}  // namespace vlk::emulator

#include "emulator/collectives.h"
