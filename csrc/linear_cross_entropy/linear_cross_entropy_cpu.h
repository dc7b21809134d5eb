#pragma once
#include <cstdint>

#include "primitives/cpu_isa.h"
#include "primitives/dtype.h"

namespace vlk {

// Logits of some rows of a batch, one row to a column: those of an entry of the vocabulary lie side by side.
struct LogitColumns {
    int64_t entries, rows;
    Dtype dtype;
    void* logits;             // [entries, rows] without their bias; derivatives of the losses take their place
    const float* bias;        // [entries]; null: none
    const int64_t* targets;   // [rows]
    const float* cotangents;  // [rows]; null: 1
    double label_smoothing, z_loss;
    float* losses;            // [rows]
    float* over_rows;         // [entries]: sums of the derivatives

    // What the steps leave for each other. Targets are kept apart, so that a row which knows its own has a small loss and
    // derivative and not the difference of large numbers.
    float* at_target;         // [rows] the logit, later the derivative
    float *largest, *total;   // [blocks, rows] but the targets': the largest logit, the sum of exponentials from there
    float* sum;               // [blocks, rows] of logits; null: nobody asks
    float *shift, *factor, *offset;  // [rows]: a logit z turns into factor exp(z - shift) - offset
};

// What is reduced at once, whatever the number of threads.
constexpr int64_t entries_of_block = 512;

inline int64_t blocks_of(const LogitColumns& op) { return (op.entries + entries_of_block - 1) / entries_of_block; }

}  // namespace vlk

// The steps, in their order; the last two are for derivatives. A thread takes all of a step, some blocks or some rows.
VLK_DECLARE_CPU(
    void set_targets_apart(const vlk::LogitColumns& op);
    void reduce_blocks(const vlk::LogitColumns& op, int64_t begin, int64_t end);
    void find_losses(const vlk::LogitColumns& op, int64_t begin, int64_t end);
    void differentiate_blocks(const vlk::LogitColumns& op, int64_t begin, int64_t end);
    void put_targets_back(const vlk::LogitColumns& op);
)
