// Small kernels, right and wrong, that show what the emulator does and finds.
#include "emulator/emulator.h"
#include "emulator/module.h"

namespace vlk::emulator {
namespace {

// Reverses a block's numbers through shared memory.
__global__ void reverse(int* numbers, bool with_barrier) {
    VLK_SHARED(int, held, [256]);
    held[threadIdx.x] = numbers[threadIdx.x];
    if (with_barrier) __syncthreads();
    numbers[threadIdx.x] = held[blockDim.x - 1 - threadIdx.x];
}

__global__ void different_barriers() {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}

__global__ void barrier_of_some() {
    if (threadIdx.x >= 40) __syncthreads();
}

__global__ void absent_lanes(int* sum) {
    if (threadIdx.x % 2 == 0) *sum += __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void outside_its_mask() { __syncwarp(0x0000ffffu); }

__global__ void unnamed_source(int* sum) {
    if (threadIdx.x < 16) *sum += __shfl_xor_sync(0x0000ffffu, 1, 16);
}

// Per lane: the warp's sum by a butterfly, the neighbour below, lane 3, the votes of odd lanes, any, all.
__global__ void collectives(int* out) {
    const int lane = threadIdx.x;
    int sum = lane;
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    int* own = out + 6 * (blockIdx.x * blockDim.x + lane);
    own[0] = sum;
    own[1] = __shfl_down_sync(0xffffffffu, lane, 1);
    own[2] = __shfl_sync(0xffffffffu, lane, 3);
    own[3] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 2));
    own[4] = __any_sync(0xffffffffu, lane == 7);
    own[5] = __all_sync(0xffffffffu, lane == 7);
}

__global__ void count(int* counter, int* largest) {
    atomicAdd(counter, 1);
    atomicMax(largest, static_cast<int>(threadIdx.x + blockDim.x * threadIdx.y));
    atomicCAS(counter, 1000, 0);
}

// Writes so many floats into the dynamic shared memory.
__global__ void fill_shared(int floats, float* sum) {
    VLK_DYNAMIC_SHARED(memory);
    for (int i = 0; i < floats; ++i) memory[i] = 1.0f;
    for (int i = 0; i < floats; ++i) *sum += memory[i];
}

template <typename T>
T* at(int64_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(VLK_MODULE, m) {
    bind_schedule(m);
    m.def("reverse", [](int64_t numbers, int count, bool with_barrier) {
        launch(reverse, dim3(1), dim3(count), 0, at<int>(numbers), with_barrier);
    });
    m.def("different_barriers", [] { launch(different_barriers, dim3(2), dim3(64), 0); });
    m.def("barrier_of_some", [] { launch(barrier_of_some, dim3(1), dim3(64), 0); });
    m.def("absent_lanes", [](int64_t sum) { launch(absent_lanes, dim3(1), dim3(32), 0, at<int>(sum)); });
    m.def("outside_its_mask", [] { launch(outside_its_mask, dim3(1), dim3(32), 0); });
    m.def("unnamed_source", [](int64_t sum) { launch(unnamed_source, dim3(1), dim3(32), 0, at<int>(sum)); });
    m.def("collectives", [](int64_t out) { launch(collectives, dim3(2), dim3(32), 0, at<int>(out)); });
    m.def("count", [](int64_t counter, int64_t largest) {
        launch(count, dim3(3, 2, 2), dim3(8, 4), 0, at<int>(counter), at<int>(largest));
    });
    m.def("fill_shared", [](int floats, int written, int64_t sum) {
        launch(fill_shared, dim3(1), dim3(1), floats * sizeof(float), written, at<float>(sum));
    });
}

}  // namespace vlk::emulator
