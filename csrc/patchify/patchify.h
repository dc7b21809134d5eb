// What patchify takes and gives, for the kernels of every device and their bindings.
#pragma once
#include <cstdint>

#include "primitives/dtype.h"
#include "primitives/segments.h"

namespace vlk {

constexpr int most_normalized_channels = 16;

// Patch t of image b, row by row of its grid, is row starts[b] + t of the patches for t < lengths[b].
struct PatchGrid {
    int64_t batch, channels, height, width;  // [batch, channels, height, width]: the images with their padding
    int64_t patch;                           // pixels on a side
    const int32_t* sizes;                    // [batch, 2]: height and width of each image; null: no padding
    const int32_t *starts, *lengths;         // [batch]
    int64_t rows;                            // [rows, channels * patch * patch]: the patches
};

// What a pixel is multiplied by, and what is added; else it is copied.
struct PixelScale {
    bool is_given;
    float scale[most_normalized_channels], shift[most_normalized_channels];
};

struct Patchify {
    Dtype dtype;          // of the patches, and of the images unless these are bytes, which have a scale
    bool images_are_bytes;
    PatchGrid grid;
    PixelScale normalize;
    const void* images;
    void* patches;        // rows of nobody become zero
};

struct PatchifyBackward {
    Dtype dtype;
    PatchGrid grid;
    PixelScale normalize;
    const void* patches;  // the gradient
    void* images;         // pixels without a patch become zero
};

static inline VLK_HOST_DEVICE int64_t patch_elements(const PatchGrid& grid) { return grid.channels * grid.patch * grid.patch; }

// How many patches stand in a row of an image's grid, and in a column: none where a size is negative.
static inline VLK_HOST_DEVICE int64_t patches_along(const PatchGrid& grid, int64_t image, int axis, int64_t longest) {
    const int64_t own = grid.sizes ? grid.sizes[2 * image + axis] : longest;
    return own < 0 ? 0 : (own < longest ? own : longest) / grid.patch;
}
static inline VLK_HOST_DEVICE int64_t rows_of(const PatchGrid& grid, int64_t image) { return patches_along(grid, image, 0, grid.height); }
static inline VLK_HOST_DEVICE int64_t columns_of(const PatchGrid& grid, int64_t image) { return patches_along(grid, image, 1, grid.width); }

// The offset among the images of the first pixel of the patch in this row; -1: it belongs to nobody.
static inline VLK_HOST_DEVICE int64_t corner_of(const PatchGrid& grid, int64_t row) {
    const int64_t image = last_at_most(grid.batch, row, [&grid](int64_t b) { return static_cast<int64_t>(grid.starts[b]); });
    if (image < 0) return -1;
    const int64_t t = row - grid.starts[image], columns = columns_of(grid, image);
    if (t >= grid.lengths[image] || t >= rows_of(grid, image) * columns) return -1;
    const int64_t y = t / columns * grid.patch, x = t % columns * grid.patch;
    return (image * grid.channels * grid.height + y) * grid.width + x;
}

// A line of pixels of the images: which image and channel, and how far down.
static inline VLK_HOST_DEVICE int64_t lines_of(const PatchGrid& grid) { return grid.batch * grid.channels * grid.height; }
struct PixelLine {
    int64_t image, channel, y;
};
static inline VLK_HOST_DEVICE PixelLine line_of(const PatchGrid& grid, int64_t line) {
    const int64_t plane = line / grid.height, image = plane / grid.channels;
    return {image, plane - image * grid.channels, line - plane * grid.height};
}

// The patches that a line of pixels crosses: `count` of them, one row of the patches after another; `first` is where, in the
// first one, its pixels lie.
struct CrossedPatches {
    int64_t first, count;
};
static inline VLK_HOST_DEVICE CrossedPatches crossed_by(const PatchGrid& grid, const PixelLine& line) {
    const int64_t down = line.y / grid.patch, columns = columns_of(grid, line.image);
    if (down >= rows_of(grid, line.image)) return {0, 0};
    const int64_t t = down * columns, length = grid.lengths[line.image], row = grid.starts[line.image] + t;
    int64_t count = columns;
    if (count > length - t) count = length - t;
    if (count > grid.rows - row) count = grid.rows - row;
    const int64_t within = (line.channel * grid.patch + line.y - down * grid.patch) * grid.patch;
    return {row * patch_elements(grid) + within, count > 0 && row >= 0 ? count : 0};
}

}  // namespace vlk
