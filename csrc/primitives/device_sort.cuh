// A stable sort of (key, value) pairs for CUDA kernels, in passes of eight bits: a pass counts the digits of every
// tile of keys, adds the counts up, and moves every pair behind those that come before it. Equal keys keep their
// order, so that the result does not depend on how threads run.
#pragma once
#include "primitives/device_sort_plan.h"
#include "primitives/row_team.cuh"

namespace vlk {

// Pairs in memory. Whatever has key(i) and value(i) can be sorted.
struct Pairs {
    int32_t* keys;
    int32_t* values;
    __device__ __forceinline__ int32_t key(int64_t i) const { return keys[i]; }
    __device__ __forceinline__ int32_t value(int64_t i) const { return values[i]; }
};

template <typename Source>
struct SortPass {
    Source from;
    Pairs to;
    int32_t* counts;  // [sort_digits, tiles]: how many come before the tile's first
    int64_t count, tiles;
    int shift;
};

// The keys of a warp, a round of 32 neighbours after another, and how many of the warp's keys before each have the
// same digit; of_warp becomes how often the warp has every digit.
struct WarpDigits {
    int key[sort_rounds], before[sort_rounds];

    template <typename Source>
    __device__ __forceinline__ WarpDigits(const SortPass<Source>& pass, int64_t first, int* of_warp) {
        const int lane = threadIdx.x % warp_threads;
        for (int digit = lane; digit < sort_digits; digit += warp_threads) of_warp[digit] = 0;
        __syncwarp();
#pragma unroll
        for (int round = 0; round < sort_rounds; ++round) {
            const int64_t i = first + round * warp_threads + lane;
            key[round] = i < pass.count ? pass.from.key(i) : -1;
            const int digit = i < pass.count ? digit_of(pass, key[round]) : -1;
            const uint32_t equal = __match_any_sync(whole_warp, digit), below = equal & ((1u << lane) - 1);
            const int earlier = digit < 0 ? 0 : of_warp[digit];
            before[round] = earlier + __popc(below);
            __syncwarp();
            if (digit >= 0 && !below) of_warp[digit] = earlier + __popc(equal);
            __syncwarp();
        }
    }

    template <typename Source>
    static __device__ __forceinline__ int digit_of(const SortPass<Source>& pass, int key) {
        return key >> pass.shift & (sort_digits - 1);
    }
};

__device__ __forceinline__ int64_t first_of_warp() {
    return blockIdx.x * int64_t{sort_tile} + threadIdx.x / warp_threads * (sort_rounds * warp_threads);
}

template <typename Source>
__global__ void __launch_bounds__(sort_warps* warp_threads)
    count_digits_kernel(const __grid_constant__ SortPass<Source> pass) {
    VLK_SHARED(int, of_warps, [sort_warps][sort_digits]);
    const WarpDigits digits(pass, first_of_warp(), of_warps[threadIdx.x / warp_threads]);
    __syncthreads();
    const int digit = threadIdx.x;  // as many threads as digits
    int count = 0;
    for (int warp = 0; warp < sort_warps; ++warp) count += of_warps[warp][digit];
    pass.counts[digit * pass.tiles + blockIdx.x] = count;
}

constexpr int scan_threads = 1024;

struct RunningSums {
    int32_t* values;  // each becomes the sum of those before it
    int64_t count;
};

// One block; a thread takes a run of neighbours.
__global__ void __launch_bounds__(scan_threads) running_sums_kernel(const __grid_constant__ RunningSums op) {
    VLK_SHARED(int, of_warps, [warp_threads]);
    const int lane = threadIdx.x % warp_threads, warp = threadIdx.x / warp_threads;
    const int64_t run = (op.count + scan_threads - 1) / scan_threads, first = threadIdx.x * run;
    const int64_t last = first + run < op.count ? first + run : op.count;
    int sum = 0;
    for (int64_t i = first; i < last; ++i) sum += op.values[i];
    int through = sum;  // of this lane and those before it
    for (int distance = 1; distance < warp_threads; distance *= 2) {
        const int other = __shfl_up_sync(whole_warp, through, distance);
        if (lane >= distance) through += other;
    }
    if (lane == warp_threads - 1) of_warps[warp] = through;
    __syncthreads();
    int before = through - sum;
    for (int other = 0; other < warp; ++other) before += of_warps[other];
    for (int64_t i = first; i < last; ++i) {
        const int value = op.values[i];
        op.values[i] = before;
        before += value;
    }
}

template <typename Source>
__global__ void __launch_bounds__(sort_warps* warp_threads)
    move_pairs_kernel(const __grid_constant__ SortPass<Source> pass) {
    VLK_SHARED(int, of_warps, [sort_warps][sort_digits]);
    const int warp = threadIdx.x / warp_threads, lane = threadIdx.x % warp_threads;
    const WarpDigits digits(pass, first_of_warp(), of_warps[warp]);
    __syncthreads();
    int before = pass.counts[threadIdx.x * pass.tiles + blockIdx.x];
    for (int other = 0; other < sort_warps; ++other) {
        const int count = of_warps[other][threadIdx.x];
        of_warps[other][threadIdx.x] = before;
        before += count;
    }
    __syncthreads();
#pragma unroll
    for (int round = 0; round < sort_rounds; ++round) {
        const int64_t i = first_of_warp() + round * warp_threads + lane;
        if (i >= pass.count) continue;
        const int key = digits.key[round];
        const int to = of_warps[warp][WarpDigits::digit_of(pass, key)] + digits.before[round];
        pass.to.keys[to] = key;
        pass.to.values[to] = pass.from.value(i);
    }
}

template <typename Source, typename Launch>
void launch_sort_pass(const SortPass<Source>& pass, const Launch& launch) {
    const dim3 grid(static_cast<unsigned>(pass.tiles)), block(sort_warps * warp_threads);
    launch(count_digits_kernel<Source>, grid, block, int64_t{0}, pass);
    launch(running_sums_kernel, dim3(1), dim3(scan_threads), int64_t{0},
           RunningSums{pass.counts, sort_digits * pass.tiles});
    launch(move_pairs_kernel<Source>, grid, block, int64_t{0}, pass);
}

// Sorts what `from` gives by its keys; returns which of the two workspaces holds the result.
template <typename Source, typename Launch>
Pairs launch_sort(const SortPlan& plan, const Source& from, Pairs one, Pairs other, int32_t* counts,
                  const Launch& launch) {
    if (plan.count == 0) return one;
    launch_sort_pass(SortPass<Source>{from, one, counts, plan.count, plan.tiles, 0}, launch);
    for (int pass = 1; pass < plan.passes; ++pass) {
        launch_sort_pass(SortPass<Pairs>{one, other, counts, plan.count, plan.tiles, 8 * pass}, launch);
        const Pairs sorted = other;
        other = one;
        one = sorted;
    }
    return one;
}

}  // namespace vlk
