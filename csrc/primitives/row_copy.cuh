// Copies of whole rows, whatever they hold: a team of threads moves a row, several teams make a block.
#pragma once
#include "primitives/device_vector.cuh"
#include "primitives/row_copy_plan.h"

namespace vlk {

// Rows [first, end) of the result lie behind each other where they come from too: from `from`, or zeros, to `to`.
struct RowRun {
    const char* from;  // null: zeros
    char* to;
    int64_t first, end;
};

template <typename Op>
struct RowCopy {
    Op op;
    int64_t rows, rows_per_block, units;
};

// An op that computes what its rows hold, and how these are divided.
template <typename Op>
struct Divided {
    Op op;
    int64_t rows_per_block, units;
};

template <typename Unit>
__device__ __forceinline__ Unit load_unit(const Unit* from) {
    if constexpr (sizeof(Unit) == access_bytes) {
        const Words words = load_words(from);
        Unit unit;
        memcpy(&unit, &words, sizeof unit);
        return unit;
    } else {
        return *from;
    }
}

template <typename Unit>
__device__ __forceinline__ void store_unit(Unit* to, const Unit& unit) {
    if constexpr (sizeof(Unit) == access_bytes) {
        Words words;
        memcpy(&words, &unit, sizeof words);
        store_words(to, words);
    } else {
        *to = unit;
    }
}

// work(unit of the row) for the units of this thread, `loads_at_once` of them at a time: first(k, unit) for all, then second(k, unit).
template <typename First, typename Second>
__device__ __forceinline__ void for_units(int64_t units, const First& first, const Second& second) {
    const int64_t step = static_cast<int64_t>(blockDim.x) * loads_at_once;
    for (int64_t begin = blockIdx.y * step + threadIdx.x; begin < units; begin += gridDim.y * step) {
#pragma unroll
        for (int k = 0; k < loads_at_once; ++k)
            if (begin + k * static_cast<int>(blockDim.x) < units) first(k, begin + k * static_cast<int>(blockDim.x));
#pragma unroll
        for (int k = 0; k < loads_at_once; ++k)
            if (begin + k * static_cast<int>(blockDim.x) < units) second(k, begin + k * static_cast<int>(blockDim.x));
    }
}

template <typename Unit>
__device__ __forceinline__ void copy_row(const char* from, char* to, int64_t units) {
    const Unit* source = reinterpret_cast<const Unit*>(from);
    Unit* target = reinterpret_cast<Unit*>(to);
    Unit held[loads_at_once];
    for_units(
        units, [&](int k, int64_t unit) { held[k] = source ? load_unit(source + unit) : Unit{}; },
        [&](int k, int64_t unit) { store_unit(target + unit, held[k]); });
}

// work(row) for the rows of this team.
template <typename Work>
__device__ __forceinline__ void for_rows(int64_t rows, int64_t rows_per_block, const Work& work) {
    const int64_t begin = blockIdx.x * rows_per_block;
    const int64_t end = begin + rows_per_block < rows ? begin + rows_per_block : rows;
    for (int64_t row = begin + threadIdx.y; row < end; row += blockDim.y) work(row);
}

// RowRun run_at(const Op&, row) says where a row comes from.
template <typename Unit, typename Op>
__global__ void __launch_bounds__(copy_threads) copy_rows_kernel(const __grid_constant__ RowCopy<Op> copy) {
    RowRun run{nullptr, nullptr, 0, 0};
    for_rows(copy.rows, copy.rows_per_block, [&](int64_t row) {
        if (row >= run.end) run = run_at(copy.op, row);
        const int64_t offset = (row - run.first) * copy.op.row_bytes;
        copy_row<Unit>(run.from ? run.from + offset : nullptr, run.to + offset, copy.units);
    });
}

// Calls work with a value of the type that moves so many bytes.
template <typename Work>
void visit_unit(int unit_bytes, const Work& work) {
    switch (unit_bytes) {
        case 16: return work(Words{});
        case 8: return work(uint64_t{});
        case 4: return work(uint32_t{});
        case 2: return work(uint16_t{});
        case 1: return work(uint8_t{});
    }
}

inline dim3 grid_of(const RowCopyPlan& plan) {
    return dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.column_blocks));
}

template <typename Op, typename Launch>
void launch_row_copy(const Op& op, int64_t rows, const RowCopyPlan& plan, const Launch& launch) {
    if (plan.blocks == 0) return;
    const RowCopy<Op> copy{op, rows, plan.rows_per_block, plan.units};
    visit_unit(plan.unit_bytes, [&](auto unit) {
        launch(copy_rows_kernel<decltype(unit), Op>, grid_of(plan), dim3(plan.threads, plan.rows_at_once), int64_t{0}, copy);
    });
}

}  // namespace vlk
