// Launches kernels on a stream and keeps the first refusal.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace vlk {

class CudaLaunch {
  public:
    explicit CudaLaunch(void* stream) : stream_(static_cast<cudaStream_t>(stream)) {}

    template <typename Op>
    void operator()(void (*kernel)(Op), dim3 grid, dim3 block, int64_t shared_bytes, const Op& op) const {
        constexpr int64_t always_allowed = 48 * 1024;
        const void* function = reinterpret_cast<const void*>(kernel);
        const int shared = static_cast<int>(shared_bytes);
        if (shared_bytes > always_allowed)
            keep(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
        void* arguments[] = {const_cast<Op*>(&op)};
        // Its own result, and not the last error of the thread, which may be somebody else's.
        if (result_ == cudaSuccess) keep(cudaLaunchKernel(function, grid, block, arguments, shared, stream_));
    }

    const char* error() const { return result_ == cudaSuccess ? nullptr : cudaGetErrorString(result_); }

  private:
    void keep(cudaError_t result) const {
        if (result_ == cudaSuccess) result_ = result;
    }

    cudaStream_t stream_;
    mutable cudaError_t result_ = cudaSuccess;
};

}  // namespace vlk
