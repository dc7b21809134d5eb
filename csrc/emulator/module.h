// From a Python dictionary of integers (addresses, sizes, dtypes) to what a launch takes: the modules of the
// emulator know no tensors. A name that is missing is null, zero or absent.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "primitives/norm.h"
#include "primitives/partial_rows.h"
#include "primitives/philox.h"
#include "primitives/segments.h"

namespace vlk::emulator {

namespace py = pybind11;

class Fields {
  public:
    explicit Fields(const py::dict& fields) : fields_(fields) {}

    int64_t integer(const char* name) const {
        return fields_.contains(name) ? fields_[name].cast<int64_t>() : 0;
    }
    float number(const char* name) const { return fields_[name].cast<float>(); }
    Dtype dtype(const char* name) const { return static_cast<Dtype>(integer(name)); }
    void* pointer(const char* name) const { return reinterpret_cast<void*>(integer(name)); }
    std::vector<int64_t> integers(const char* name) const { return fields_[name].cast<std::vector<int64_t>>(); }
    std::vector<float> numbers(const char* name) const { return fields_[name].cast<std::vector<float>>(); }
    template <typename T>
    T* pointer_to(const char* name) const {
        return static_cast<T*>(pointer(name));
    }
    // A pair of the address and the dtype.
    Parameter parameter(const char* name) const {
        if (!fields_.contains(name)) return {};
        const auto [address, dtype] = fields_[name].cast<std::pair<int64_t, int32_t>>();
        return {reinterpret_cast<void*>(address), static_cast<Dtype>(dtype)};
    }
    Gradient gradient(const char* name) const {
        const Parameter parameter = this->parameter(name);
        return {const_cast<void*>(parameter.data), parameter.dtype};
    }
    Segments segments() const {
        return {pointer_to<int32_t>("starts"), pointer_to<int32_t>("lengths"), static_cast<int32_t>(integer("samples")),
                static_cast<int32_t>(integer("per_sample"))};
    }
    Dropout dropout() const {
        return {pointer_to<int64_t>("rng_state"), pointer_to<int32_t>("keys"), integer("stream"),
                static_cast<int32_t>(integer("threshold"))};
    }

  private:
    const py::dict& fields_;
};

inline void bind_schedule(py::module_& m) {
    m.def("run_in_order", [] { schedule = Schedule{}; }, "Threads run in the order of their indices, and all blocks.");
    m.def("shuffle", [](unsigned seed) { schedule.seed = seed; }, "Warps and their threads run in a random order.");
    m.def(
        "only_blocks",
        [](int64_t first, int64_t last) {
            schedule.first_block = first;
            schedule.last_block = last;
        },
        "Blocks outside [first, last) do not run.");
}

}  // namespace vlk::emulator
