#include "patchify/patchify_cpu.h"

#include <cstring>
#include <type_traits>

#include "primitives/cpu_scalar.h"

namespace vlk::VLK_ISA {

namespace {

inline float pixel(uint8_t value) { return static_cast<float>(value); }
template <typename T>
inline float pixel(T value) { return to_float(value); }

// `count` neighbouring pixels of one channel.
template <typename In, typename Out>
void move_pixels(const In* from, int64_t count, const PixelScale& normalize, int64_t channel, float shift, Out* to) {
    if constexpr (std::is_same_v<In, Out>) {
        if (!normalize.is_given) {
            std::memcpy(to, from, count * sizeof(Out));
            return;
        }
    }
    const float scale = normalize.scale[channel];
    for (int64_t i = 0; i < count; ++i) to[i] = from_float<Out>(pixel(from[i]) * scale + shift);
}

template <typename In, typename Out>
void patchify_rows(const Patchify& op, int64_t begin, int64_t end) {
    const PatchGrid& grid = op.grid;
    const int64_t width = patch_elements(grid), patch = grid.patch;
    for (int64_t row = begin; row < end; ++row) {
        Out* to = static_cast<Out*>(op.patches) + row * width;
        const int64_t corner = corner_of(grid, row);
        if (corner < 0) {
            std::memset(to, 0, width * sizeof(Out));
            continue;
        }
        const In* from = static_cast<const In*>(op.images) + corner;
        for (int64_t channel = 0; channel < grid.channels; ++channel, from += (grid.height - patch) * grid.width) {
            const float shift = op.normalize.is_given ? op.normalize.shift[channel] : 0.0f;
            for (int64_t y = 0; y < patch; ++y, from += grid.width, to += patch)
                move_pixels(from, patch, op.normalize, channel, shift, to);
        }
    }
}

}  // namespace

void patchify(const Patchify& op, int64_t begin, int64_t end) {
    visit(op.dtype, [&](auto element) {
        using Out = decltype(element);
        if (op.images_are_bytes)
            patchify_rows<uint8_t, Out>(op, begin, end);
        else
            patchify_rows<Out, Out>(op, begin, end);
    });
}

void patchify_backward(const PatchifyBackward& op, int64_t begin, int64_t end) {
    visit(op.dtype, [&](auto element) {
        using T = decltype(element);
        const PatchGrid& grid = op.grid;
        const int64_t patch = grid.patch, width = patch_elements(grid);
        for (int64_t number = begin; number < end; ++number) {
            const PixelLine line = line_of(grid, number);
            const CrossedPatches crossed = crossed_by(grid, line);
            const T* from = static_cast<const T*>(op.patches) + crossed.first;
            T* to = static_cast<T*>(op.images) + number * grid.width;
            for (int64_t i = 0; i < crossed.count; ++i)
                move_pixels(from + i * width, patch, op.normalize, line.channel, 0.0f, to + i * patch);
            std::memset(to + crossed.count * patch, 0, (grid.width - crossed.count * patch) * sizeof(T));
        }
    });
}

}  // namespace vlk::VLK_ISA
