// Attention over packed samples that are short enough for the scores of one head to stay in the caches.
#pragma once
#include <atomic>
#include <cstdint>

#include "primitives/cpu_isa.h"
#include "primitives/dtype.h"
#include "primitives/philox.h"

namespace vlk {

// [tokens, heads, width] anywhere in memory, in elements; the last dimension is contiguous.
struct HeadRows {
    void* data = nullptr;
    int64_t row = 0, head = 0;
};

// int32 [samples, segments]: a sample is the rows from the start of its first segment on.
struct Samples {
    const int32_t *starts = nullptr, *lengths = nullptr;
    int64_t count = 0, segments = 0;
};

// Sample b reads the keys of sample sources[b].
struct Attention {
    Dtype dtype;
    int64_t heads, key_heads, width;
    HeadRows q, k, v;
    Samples queries, keys;
    const int64_t* sources;
    const int32_t* table;  // [query segments, key segments]: 0 none, 1 full, 2 causal
    const int32_t* sample_ids;
    Dropout dropout;  // keyed by sample_ids and positions, not by its own keys
    float scale;
    int64_t longest_query, longest_key;
    float* lse;  // [heads, query tokens]; the backward reads it
    int64_t lse_stride;
};

struct AttentionForward : Attention {
    HeadRows out;
};

// readers[first[s] .. first[s + 1]) are the samples that read the keys of sample s, in order.
struct AttentionBackward : Attention {
    HeadRows grad_out, dq, dk, dv;
    const float* grad_lse;  // like lse, or null
    const int64_t *first, *readers;
};

// Threads take the next share of the items, a sample and a key head each, until none is left.
struct Items {
    const int64_t* samples;  // in the order they are taken
    const int64_t* bounds;   // share s is items bounds[s] .. bounds[s + 1]
    int64_t shares;
    std::atomic<int64_t>* next;
};

}  // namespace vlk

VLK_DECLARE_CPU(
    // Items of the query samples. Rows that belong to no sample are left alone.
    void attention_forward(const vlk::AttentionForward& op, const vlk::Items& items);
    // Items of the key samples.
    void attention_backward(const vlk::AttentionBackward& op, const vlk::Items& items);
)
