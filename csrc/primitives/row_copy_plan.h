// How CUDA kernels divide a result whose rows are written one by one, each by a team of threads: a pure function of
// sizes and alignment, which the launcher and the emulator both follow.
#pragma once
#include <cstdint>
#include <initializer_list>

namespace vlk {

constexpr int copy_threads = 256;      // of a block
constexpr int loads_at_once = 4;       // that a thread asks for before it waits
constexpr int most_row_threads = 32;   // that share a row: a warp
constexpr int64_t most_copy_blocks = 2112;  // two rounds of eight blocks on each multiprocessor of a Hopper card

struct RowCopyPlan {
    int unit_bytes;          // moved by one access
    int64_t units;           // of a row
    int threads;             // that share a row
    int rows_at_once;        // of a block
    int64_t rows_per_block;  // in turns; a search for the owner of a row serves the rows behind it too
    int64_t blocks, column_blocks;
};

// The largest access, up to 16 bytes, that fits all of these addresses and sizes.
inline int common_access(std::initializer_list<uint64_t> addresses) {
    uint64_t bits = 16;
    for (const uint64_t address : addresses) bits |= address;
    return static_cast<int>(bits & (~bits + 1));
}

inline int64_t quotient_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

inline RowCopyPlan plan_row_copy(int64_t rows, int64_t row_bytes, int unit_bytes) {
    RowCopyPlan plan{unit_bytes, row_bytes / unit_bytes, 1, 0, 0, 0, 0};
    if (rows == 0 || plan.units == 0) return plan;
    while (plan.threads < most_row_threads && plan.threads < plan.units) plan.threads *= 2;
    plan.rows_at_once = copy_threads / plan.threads;
    const int64_t most_column_blocks = 65535, wanted = quotient_up(plan.units, plan.threads * loads_at_once);
    plan.column_blocks = wanted < most_column_blocks ? wanted : most_column_blocks;
    const int64_t row_blocks = quotient_up(rows, plan.rows_at_once);
    const int64_t most_blocks = quotient_up(most_copy_blocks, plan.column_blocks);
    plan.rows_per_block = plan.rows_at_once * quotient_up(row_blocks, most_blocks);
    plan.blocks = quotient_up(rows, plan.rows_per_block);
    return plan;
}

}  // namespace vlk
