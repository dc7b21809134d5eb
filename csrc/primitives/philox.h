// Philox4x32-7 (Salmon et al., SC 2011) and the coordinates vlkernels draws by; vlkernels/core/random.py is
// the definition.
#pragma once
#include <cstdint>

#include "primitives/device.h"

namespace vlk {

struct PhiloxWords {
    uint32_t x, y, z, w;
};
struct PhiloxKey {
    uint32_t x, y;
};

// `static`: every copy of a CPU kernel keeps the one compiled for its own instruction set (see cpu_isa.h).
static inline VLK_HOST_DEVICE void philox_round(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w,
                                                uint32_t key_x, uint32_t key_y) {
    const uint64_t first = static_cast<uint64_t>(0xD2511F53u) * x;
    const uint64_t second = static_cast<uint64_t>(0xCD9E8D57u) * z;
    x = static_cast<uint32_t>(second >> 32) ^ y ^ key_x;
    y = static_cast<uint32_t>(second);
    z = static_cast<uint32_t>(first >> 32) ^ w ^ key_y;
    w = static_cast<uint32_t>(first);
}

// Seven rounds, written out and on scalars: compilers vectorise a loop over counters only when its body is
// straight-line code.
static inline VLK_HOST_DEVICE PhiloxWords philox(PhiloxWords counter, PhiloxKey key) {
    constexpr uint32_t step_x = 0x9E3779B9u, step_y = 0xBB67AE85u;
    uint32_t x = counter.x, y = counter.y, z = counter.z, w = counter.w;
    philox_round(x, y, z, w, key.x, key.y);
    philox_round(x, y, z, w, key.x + step_x, key.y + step_y);
    philox_round(x, y, z, w, key.x + 2 * step_x, key.y + 2 * step_y);
    philox_round(x, y, z, w, key.x + 3 * step_x, key.y + 3 * step_y);
    philox_round(x, y, z, w, key.x + 4 * step_x, key.y + 4 * step_y);
    philox_round(x, y, z, w, key.x + 5 * step_x, key.y + 5 * step_y);
    philox_round(x, y, z, w, key.x + 6 * step_x, key.y + 6 * step_y);
    return {x, y, z, w};
}

// The key of a step, from the device state [seed, step].
static inline VLK_HOST_DEVICE PhiloxKey philox_key(const int64_t* state) {
    const uint64_t seed = static_cast<uint64_t>(state[0]), step = static_cast<uint64_t>(state[1]);
    const PhiloxWords words = philox({static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                                      static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32)},
                                     {0, 0});
    return {words.x, words.y};
}

// One draw serves this many neighbouring columns: column i of them is byte i % 4 of word i / 4, low byte
// first.
constexpr int64_t columns_per_draw = 16;

// What dropout needs beside the data. `keys` is (sample id, position) per row; without it sample 0, position
// = row.
struct Dropout {
    const int64_t* state = nullptr;
    const int32_t* keys = nullptr;
    int64_t stream = 0;
    int32_t threshold = 0;  // a byte below it is dropped; 0: no dropout
};

// What kept values are multiplied by: the exact reciprocal of the probability that a value is kept.
static inline VLK_HOST_DEVICE float keep_scale(const Dropout& dropout) {
    return 256.0f / static_cast<float>(256 - dropout.threshold);
}

// The counter of a row's first columns; x counts the groups of sixteen columns.
static inline VLK_HOST_DEVICE PhiloxWords row_counter(const Dropout& dropout, int64_t row) {
    const uint32_t sample = dropout.keys ? static_cast<uint32_t>(dropout.keys[2 * row]) : 0u;
    const uint32_t position =
        dropout.keys ? static_cast<uint32_t>(dropout.keys[2 * row + 1]) : static_cast<uint32_t>(row);
    return {0, position, sample, static_cast<uint32_t>(dropout.stream) << 16};
}

}  // namespace vlk
