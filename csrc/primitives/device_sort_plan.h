// A stable sort of small integers on a device, eight bits of them at a time: how its CUDA kernels divide the work.
#pragma once
#include <cstdint>

namespace vlk {

constexpr int sort_digits = 256;
constexpr int sort_warps = 8;            // of a block
constexpr int sort_rounds = 8;           // in which a warp takes 32 keys each
constexpr int sort_tile = sort_warps * sort_rounds * 32;

struct SortPlan {
    int64_t count;    // of keys
    int64_t tiles;    // of sort_tile keys, one to a block
    int passes;       // of eight bits
};

inline SortPlan plan_sort(int64_t count, int64_t largest_key) {
    SortPlan plan{count, (count + sort_tile - 1) / sort_tile, 1};
    while (largest_key >> 8 * plan.passes) ++plan.passes;
    return plan;
}

// Integers of workspace beside keys and values: how often every digit comes in every tile.
inline int64_t sort_counts(const SortPlan& plan) { return sort_digits * plan.tiles; }

}  // namespace vlk
