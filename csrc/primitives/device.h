// The words in which a kernel body differs between nvcc, the emulator (whose header comes first and brings its
// own) and plain C++.
#pragma once

#ifdef __CUDACC__
#include <cassert>

#define VLK_HOST_DEVICE __host__ __device__
// An array in shared memory: VLK_SHARED(float, held, [2][32]).
#define VLK_SHARED(type, name, extents) __shared__ type name extents
// Declares `float* name`: the shared memory whose size the launch gives, on a 16-byte boundary.
#define VLK_DYNAMIC_SHARED(name)                   \
    extern __shared__ float4 vlk_dynamic_shared[]; \
    float* name = reinterpret_cast<float*>(vlk_dynamic_shared)
// Stops the kernel with the sentence where values that no host has seen are not what they must be.
#define VLK_REQUIRE(condition, sentence) assert((condition) && (sentence))
#else
#define VLK_HOST_DEVICE
#endif
