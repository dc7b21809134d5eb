// The rows that add up to a row of z, for CUDA kernels. The dense term is one more table, whose id is the row itself.
#pragma once
#include "embed_layer_norm/embed_layer_norm_plan.h"
#include "primitives/held_row.cuh"

namespace vlk {

constexpr int most_terms_at_once = 4;

struct Terms {
    Ids ids;
    int num_tables, count;  // with the dense term
    const void* data[most_tables + most_terms_at_once];
    int64_t rows[most_tables + most_terms_at_once];
};

// A kernel's argument: the lists of op.sum are the host's.
template <typename Op>
struct WithTerms {
    Op op;
    Terms terms;
};

inline Terms terms_of(const EmbeddingSum& sum) {
    const int num_tables = static_cast<int>(sum.num_tables);
    Terms terms{sum.ids, num_tables, num_tables + (sum.dense ? 1 : 0), {}, {}};
    for (int table = 0; table < num_tables; ++table) {
        terms.data[table] = sum.tables[table];
        terms.rows[table] = sum.table_rows[table];
    }
    terms.data[num_tables] = sum.dense;
    terms.rows[num_tables] = sum.rows;
    return terms;
}

// The row of a table that is term `term` of a row of z; -1 where it adds nothing.
__device__ __forceinline__ int64_t term_id(const Terms& terms, int64_t row, int term) {
    int64_t id = term < terms.count ? row : -1;
    if (term < terms.num_tables) id = id_at(terms.ids, row * terms.num_tables + term);
    VLK_REQUIRE(-1 <= id && id < terms.rows[term], "ids of embed_layer_norm must be -1 or rows of their tables");
    return id;
}

// `AtOnce` terms of a row: asked for together, added one after another.
template <typename T, int V, int N, int AtOnce>
struct TermRows {
    HeldRow<T, V, N> at[AtOnce];

    __device__ __forceinline__ void ask(const Terms& terms, int first, int64_t row, int width) {
#pragma unroll
        for (int j = 0; j < AtOnce; ++j) {
            const int term = first + j;
            const int64_t id = term_id(terms, row, term);
            const bool there = id >= 0;  // what is absent has no columns
            at[j].load(terms.data[term], there ? id * width : 0, there ? width : 0);
        }
    }

    __device__ __forceinline__ void add_to(float (&z)[N][V]) const {
#pragma unroll
        for (int j = 0; j < AtOnce; ++j)
            for_held<V, N>([&](int k, int i) { z[k][i] += to_float(at[j].at[k].at[i]); });
    }
};

// z = the sum of the terms, in the order of the tables; meanwhile() runs while the first of them are on their way.
template <typename T, int V, int N, int AtOnce, typename Work>
__device__ __forceinline__ void sum_terms(const Terms& terms, int64_t row, int width, float (&z)[N][V],
                                          const Work& meanwhile) {
    TermRows<T, V, N, AtOnce> rows;
    rows.ask(terms, 0, row, width);
    meanwhile();
    for_held<V, N>([&](int k, int i) { z[k][i] = 0.0f; });
    rows.add_to(z);
#pragma unroll 1
    for (int first = AtOnce; first < terms.count; first += AtOnce) {
        rows.ask(terms, first, row, width);
        rows.add_to(z);
    }
}

// The same for one group of columns of a row that no thread holds.
template <typename T, int V>
__device__ __forceinline__ void sum_terms_of_group(const Terms& terms, int64_t row, int64_t width, int column,
                                                   float (&z)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) z[i] = 0.0f;
    for (int term = 0; term < terms.count; ++term) {
        const int64_t id = term_id(terms, row, term);
        if (id < 0) continue;
        float values[V];
        load_floats<T, V>(static_cast<const T*>(terms.data[term]) + id * width + column, values);
#pragma unroll
        for (int i = 0; i < V; ++i) z[i] += values[i];
    }
}

}  // namespace vlk
