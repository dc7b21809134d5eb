// What the bindings of CUDA kernels share: the stream to launch on, and the launch's refusal. The library must load
// beside a torch without CUDA, so what is not in libtorch_cpu is looked up at run time.
#pragma once
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "binding/binding.h"

namespace vlk {

// Makes the tensor's device the current one; launches go to its current stream.
class OnDeviceOf {
  public:
    explicit OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {
        using Getter = AOTITorchError (*)(int32_t device, void** stream);
        static const auto get = reinterpret_cast<Getter>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
        STD_TORCH_CHECK(get, "this torch was built without CUDA");
        STD_TORCH_CHECK(get(tensor.get_device_index(), &stream_) == 0, "torch has no current CUDA stream");
    }
    void* stream() const { return stream_; }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
    void* stream_ = nullptr;
};

// `error` is what a launcher returns: null, or why a launch was refused.
inline void check_launch(const char* error, const char* op) {
    STD_TORCH_CHECK(!error, op, " was not launched: ", error ? error : "");
}

}  // namespace vlk
