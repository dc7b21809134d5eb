// On the host: from a plan to the instance of a kernel that holds a row.
#pragma once
#include "primitives/device_vector.cuh"
#include "primitives/row_plan.h"

namespace vlk {

template <typename T, int V, int N>
struct Shape {
    using Element = T;
    static constexpr int columns = V, vectors = N;
};

// Calls work(a kernel's element type, columns and vectors, as one type).
template <typename Work>
void visit_shape(Dtype dtype, const RowPlan& plan, const Work& work) {
    visit_element(dtype, [&](auto element) {
        using T = decltype(element);
        constexpr int at_once = access_bytes / sizeof(T);
        if (plan.columns == 1)
            visit_count(plan.vectors, VectorCounts<1>{}, [&](auto n) { work(Shape<T, 1, n>{}); });
        else
            visit_count(plan.vectors, VectorCounts<at_once>{}, [&](auto n) { work(Shape<T, at_once, n>{}); });
    });
}

// Calls work(element type, columns) as for visit_shape, for a row that no thread holds.
template <typename Work>
void visit_columns(Dtype dtype, const RowPlan& plan, const Work& work) {
    visit_element(dtype, [&](auto element) {
        using T = decltype(element);
        constexpr int at_once = access_bytes / sizeof(T);
        if (plan.columns == 1)
            work(Shape<T, 1, 0>{});
        else
            work(Shape<T, at_once, 0>{});
    });
}

}  // namespace vlk
