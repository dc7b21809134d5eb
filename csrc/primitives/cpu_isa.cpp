#include "primitives/cpu_isa.h"

#include <algorithm>
#include <atomic>

namespace vlk {
namespace {

Isa detect() {
#ifdef VLK_X86_LEVELS
    __builtin_cpu_init();
    // The rest of x86-64-v3 (F16C, LZCNT, MOVBE) comes with these on every CPU made, and older compilers
    // cannot ask for it. The built-in also asks the operating system whether it saves the wide registers.
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return v4 ? Isa::avx512 : v3 ? Isa::avx2 : Isa::baseline;
#else
    return Isa::baseline;
#endif
}

std::atomic<Isa>& current() {
    static std::atomic<Isa> isa{best_cpu_isa()};
    return isa;
}

}  // namespace

Isa best_cpu_isa() {
    static const Isa best = detect();
    return best;
}

Isa cpu_isa() { return current().load(std::memory_order_relaxed); }

void limit_cpu_isa(Isa highest) {
    current().store(std::min(highest, best_cpu_isa()), std::memory_order_relaxed);
}

const char* isa_name(Isa isa) {
    static constexpr const char* names[] = {"baseline", "avx2", "avx512"};
    return names[static_cast<int>(isa)];
}

const char* cpu_vendor() {
#ifdef VLK_X86_LEVELS
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") ? "amd" : __builtin_cpu_is("intel") ? "intel" : "";
#else
    return "";
#endif
}

}  // namespace vlk
