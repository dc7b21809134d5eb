// CUDA's barriers, warp collectives and atomics for the emulator. A collective happens when the last lane of its
// mask arrives; where it is called from comes along as default arguments. Included by emulator.h.
#pragma once

namespace vlk::emulator {

inline void barrier(Site site) {
    block.self().site = site;
    block.self().state = State::at_barrier;
    wait();
}

using Warp = std::array<Thread*, lanes>;  // null: the mask does not name the lane

// Whether all threads that `mask` names in the calling warp wait in the caller's collective.
inline bool all_arrived(const Thread& self, Warp& warp) {
    const unsigned first = block.current / lanes * lanes;
    for (unsigned lane = 0; lane < lanes; ++lane) {
        warp[lane] = nullptr;
        if (!(self.mask >> lane & 1)) continue;
        if (first + lane >= block.count) return false;
        Thread& other = *block.threads[first + lane];
        if (other.state != State::in_collective || other.mask != self.mask || other.collective != self.collective)
            return false;
        warp[lane] = &other;
    }
    return true;
}

// Brings `given`; work(warp) fills what every lane takes.
template <typename Work>
uint64_t collective(const char* name, Site site, uint32_t mask, uint64_t given, const Work& work) {
    Thread& self = block.self();
    self.collective = name;
    self.site = site;
    self.mask = mask;
    self.given = given;
    self.state = State::in_collective;
    if (!(mask >> block.current % lanes & 1)) fail(std::string("a lane is not in its own mask of ") + name);
    Warp warp;
    if (!all_arrived(self, warp)) {
        wait();
        return self.taken;
    }
    work(warp);
    for (Thread* thread : warp)
        if (thread) thread->state = State::ready;
    return self.taken;
}

// Every lane takes what lane source(its own number) gives; a source outside the warp is the lane itself.
template <typename T, typename Source>
T shuffle(const char* name, Site site, uint32_t mask, T value, const Source& source) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most eight bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = collective(name, site, mask, bits, [&](const Warp& warp) {
        for (int lane = 0; lane < static_cast<int>(lanes); ++lane) {
            if (!warp[lane]) continue;
            const int from = source(lane);
            const int read = from < 0 || from >= static_cast<int>(lanes) ? lane : from;
            if (!warp[read]) fail(std::string(name) + " reads a lane that its mask does not name");
            warp[lane]->taken = warp[read]->given;
        }
    });
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace vlk::emulator

#define VLK_FROM_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(VLK_FROM_HERE) { vlk::emulator::barrier({file, line}); }

inline void __syncwarp(uint32_t mask = 0xffffffffu, VLK_FROM_HERE) {
    vlk::emulator::collective("__syncwarp", {file, line}, mask, 0, [](const auto&) {});
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, VLK_FROM_HERE) {
    const auto source = [=](int lane) { return lane ^ lane_mask; };
    return vlk::emulator::shuffle("__shfl_xor_sync", {file, line}, mask, value, source);
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, VLK_FROM_HERE) {
    const auto source = [=](int lane) { return lane + static_cast<int>(delta); };
    return vlk::emulator::shuffle("__shfl_down_sync", {file, line}, mask, value, source);
}

template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, VLK_FROM_HERE) {
    const auto source = [=](int lane) { return lane - static_cast<int>(delta); };
    return vlk::emulator::shuffle("__shfl_up_sync", {file, line}, mask, value, source);
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane, VLK_FROM_HERE) {
    const auto source = [=](int) { return lane & 31; };
    return vlk::emulator::shuffle("__shfl_sync", {file, line}, mask, value, source);
}

inline uint32_t __ballot_sync(uint32_t mask, int vote, VLK_FROM_HERE) {
    const auto count = [](const vlk::emulator::Warp& warp) {
        uint32_t votes = 0;
        for (unsigned lane = 0; lane < vlk::emulator::lanes; ++lane)
            votes |= static_cast<uint32_t>(warp[lane] && warp[lane]->given) << lane;
        for (vlk::emulator::Thread* thread : warp)
            if (thread) thread->taken = votes;
    };
    return static_cast<uint32_t>(vlk::emulator::collective("__ballot_sync", {file, line}, mask, vote != 0, count));
}

inline int __any_sync(uint32_t mask, int vote, VLK_FROM_HERE) {
    return __ballot_sync(mask, vote, file, line) != 0;
}

inline int __all_sync(uint32_t mask, int vote, VLK_FROM_HERE) {
    return __ballot_sync(mask, vote, file, line) == mask;
}

// The lanes that bring the same value.
inline uint32_t __match_any_sync(uint32_t mask, int value, VLK_FROM_HERE) {
    const auto match = [](const vlk::emulator::Warp& warp) {
        for (vlk::emulator::Thread* thread : warp) {
            if (!thread) continue;
            thread->taken = 0;
            for (unsigned lane = 0; lane < vlk::emulator::lanes; ++lane)
                thread->taken |= static_cast<uint64_t>(warp[lane] && warp[lane]->given == thread->given) << lane;
        }
    };
    const uint64_t given = static_cast<uint32_t>(value);
    return static_cast<uint32_t>(vlk::emulator::collective("__match_any_sync", {file, line}, mask, given, match));
}

inline int __ffs(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

template <typename T>
T atomicAdd(T* address, T value) {
    const T before = *address;
    *address = before + value;
    return before;
}

template <typename T>
T atomicMax(T* address, T value) {
    const T before = *address;
    if (value > before) *address = value;
    return before;
}

template <typename T>
T atomicCAS(T* address, T expected, T value) {
    const T before = *address;
    if (before == expected) *address = value;
    return before;
}

#undef VLK_FROM_HERE
