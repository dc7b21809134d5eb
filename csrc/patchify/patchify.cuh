// The CUDA kernels of patchify: a team of threads writes a row of the patches, or a line of the images' gradient, once. Compiled by
// nvcc from patchify.cu and by the emulator.
#pragma once
#include <type_traits>

#include "patchify/patchify_plan.h"
#include "primitives/row_copy.cuh"

namespace vlk {

__device__ __forceinline__ float pixel(uint8_t value) { return static_cast<float>(value); }
template <typename T>
__device__ __forceinline__ float pixel(T value) {
    return to_float(value);
}

// What is stored for pixels of one channel; where they only move, their bits do.
template <typename In, typename Out, int V>
__device__ __forceinline__ Vector<Out, V> scaled(const Vector<In, V>& pixels, const PixelScale& normalize, uint32_t channel, float shift) {
    if constexpr (std::is_same_v<In, Out>)
        if (!normalize.is_given) return pixels;
    const float scale = normalize.scale[channel];
    float values[V];
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] = pixel(pixels.at[i]) * scale + shift;
    return narrow<Out, V>(values);
}

template <typename In, typename Out, int V>
__global__ void __launch_bounds__(copy_threads, 4) patchify_kernel(const __grid_constant__ Divided<Patchify> divided) {
    using Pixels = Vector<In, V>;
    const Patchify& op = divided.op;
    const PatchGrid& grid = op.grid;
    const uint32_t patch = static_cast<uint32_t>(grid.patch), height = static_cast<uint32_t>(grid.height);
    const auto channel_of = [&](int64_t unit) { return static_cast<uint32_t>(unit) * V / patch / patch; };
    for_rows(grid.rows, divided.rows_per_block, [&](int64_t row) {
        const int64_t corner = corner_of(grid, row);
        const In* from = static_cast<const In*>(op.images) + corner;
        auto* to = reinterpret_cast<Vector<Out, V>*>(static_cast<Out*>(op.patches) + row * patch_elements(grid));
        const auto load = [&](int64_t unit) {
            const uint32_t element = static_cast<uint32_t>(unit) * V, line = element / patch, channel = line / patch;
            const int64_t down = static_cast<int64_t>(channel) * height + (line - channel * patch);
            return load_unit(reinterpret_cast<const Pixels*>(from + down * grid.width + (element - line * patch)));
        };
        Pixels held[loads_at_once];
        for_units(
            divided.units, [&](int k, int64_t unit) { held[k] = corner < 0 ? Pixels{} : load(unit); },
            [&](int k, int64_t unit) {
                const uint32_t channel = op.normalize.is_given ? channel_of(unit) : 0;
                const float shift = op.normalize.is_given ? op.normalize.shift[channel] : 0.0f;
                const Vector<Out, V> patches = scaled<In, Out, V>(held[k], op.normalize, channel, shift);
                store_unit(to + unit, corner < 0 ? Vector<Out, V>{} : patches);
            });
    });
}

template <typename T, int V>
__global__ void __launch_bounds__(copy_threads, 3) patchify_backward_kernel(const __grid_constant__ Divided<PatchifyBackward> divided) {
    using Pixels = Vector<T, V>;
    const PatchifyBackward& op = divided.op;
    const PatchGrid& grid = op.grid;
    const uint32_t patch = static_cast<uint32_t>(grid.patch);
    const int64_t width = patch_elements(grid);
    for_rows(lines_of(grid), divided.rows_per_block, [&](int64_t number) {
        const PixelLine line = line_of(grid, number);
        const CrossedPatches crossed = crossed_by(grid, line);
        const T* from = static_cast<const T*>(op.patches) + crossed.first;
        auto* to = reinterpret_cast<Pixels*>(static_cast<T*>(op.images) + number * grid.width);
        const auto load = [&](int64_t unit) {
            const uint32_t x = static_cast<uint32_t>(unit) * V, column = x / patch;
            if (column >= crossed.count) return Pixels{};
            return load_unit(reinterpret_cast<const Pixels*>(from + column * width + (x - column * patch)));
        };
        Pixels held[loads_at_once];
        for_units(
            divided.units, [&](int k, int64_t unit) { held[k] = load(unit); },
            [&](int k, int64_t unit) {
                store_unit(to + unit, scaled<T, T, V>(held[k], op.normalize, static_cast<uint32_t>(line.channel), 0.0f));
            });
    });
}

// Calls work(element, pixels at once as a constant).
template <typename Op, typename Work>
void visit_pixels(const Op& op, const Work& work) {
    visit_element(op.dtype, [&](auto element) {
        constexpr int at_once = access_bytes / sizeof(element);
        switch (pixels_at_once(op)) {
            case at_once: return work(element, std::integral_constant<int, at_once>{});
            case 2: return work(element, std::integral_constant<int, 2>{});
            default: return work(element, std::integral_constant<int, 1>{});
        }
    });
}

template <typename Launch>
void launch_patchify(const Patchify& op, const Launch& launch) {
    const RowCopyPlan plan = plan_rows(op);
    if (plan.blocks == 0) return;
    const Divided<Patchify> divided{op, plan.rows_per_block, plan.units};
    const dim3 block(plan.threads, plan.rows_at_once);
    visit_pixels(op, [&](auto element, auto pixels) {
        using T = decltype(element);
        if (op.images_are_bytes)
            launch(patchify_kernel<uint8_t, T, pixels.value>, grid_of(plan), block, int64_t{0}, divided);
        else
            launch(patchify_kernel<T, T, pixels.value>, grid_of(plan), block, int64_t{0}, divided);
    });
}

template <typename Launch>
void launch_patchify_backward(const PatchifyBackward& op, const Launch& launch) {
    const RowCopyPlan plan = plan_rows(op);
    if (plan.blocks == 0) return;
    visit_pixels(op, [&](auto element, auto pixels) {
        launch(patchify_backward_kernel<decltype(element), pixels.value>, grid_of(plan), dim3(plan.threads, plan.rows_at_once),
               int64_t{0}, Divided<PatchifyBackward>{op, plan.rows_per_block, plan.units});
    });
}

}  // namespace vlk
