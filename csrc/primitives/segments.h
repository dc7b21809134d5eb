// Which segment a packed row belongs to: a search among the rising starts of a layout.
#pragma once
#include <cstdint>

#include "primitives/device.h"

namespace vlk {

// Segment s of sample b is rows starts[b, s] .. starts[b, s] + lengths[b, s] of a packed tensor; both are [samples, per_sample].
struct Segments {
    const int32_t *starts, *lengths;
    int32_t samples, per_sample;
};

// The last of the numbers at(0) <= at(1) <= .. at(count - 1) that is at most `value`; -1 if there is none. Of equal starts the last
// one is that of the only segment there which is not empty.
template <typename At>
static inline VLK_HOST_DEVICE int64_t last_at_most(int64_t count, int64_t value, const At& at) {
    int64_t low = 0, high = count;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (at(middle) <= value)
            low = middle + 1;
        else
            high = middle;
    }
    return low - 1;
}

}  // namespace vlk
