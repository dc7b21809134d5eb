// What the compiled library says about itself. Ops bind in a file each; every schema is defined in Python.
#include "binding/binding.h"

#include <build_info.h>  // written by CMake
#include <string>

#include "primitives/cpu_isa.h"

namespace vlk {
namespace {

// JSON. `cuda_missing` says why there are no CUDA kernels; it is empty when there are.
std::string build_info() {
    return std::string("{\"cpu_isa\": \"") + isa_name(cpu_isa()) +
           "\", \"cpu_vendor\": \"" + cpu_vendor() +
           "\", \"compiler\": \"" VLK_COMPILER
           "\", \"cuda_toolkit\": \"" VLK_CUDA_TOOLKIT
           "\", \"cuda_architectures\": \"" VLK_CUDA_ARCHITECTURES
           "\", \"cuda_missing\": \"" VLK_CUDA_MISSING "\"}";
}

std::string limit_isa(const std::string& highest) {
    for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
        if (highest == isa_name(isa)) {
            limit_cpu_isa(isa);
            return isa_name(cpu_isa());
        }
    }
    STD_TORCH_CHECK(false, "highest must be baseline, avx2 or avx512, got ", highest);
}

STABLE_TORCH_LIBRARY_IMPL(vlkernels, CompositeExplicitAutograd, m) {
    m.impl("build_info", TORCH_BOX(&build_info));
    m.impl("limit_cpu_isa", TORCH_BOX(&limit_isa));
}

}  // namespace
}  // namespace vlk
