// One source, several instruction sets. CMake compiles every csrc/<op>/<op>_cpu.cpp once per level, with
// VLK_ISA naming the namespace of that copy; VLK_CPU(kernel) takes the best copy for the machine it runs on.
//
// Everything a *_cpu.cpp defines or instantiates must live in `namespace vlk::VLK_ISA`, inline helpers and
// templates included: the linker keeps one copy of an inline function, and if it kept the AVX-512 one under a
// shared name, an older machine would fault.
#pragma once

namespace vlk {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

Isa best_cpu_isa();               // of this machine, among the levels that were compiled
Isa cpu_isa();                    // what VLK_CPU takes: the best level, unless lowered
void limit_cpu_isa(Isa highest);  // lets a test run the copies written for older machines
const char* isa_name(Isa isa);
const char* cpu_vendor();         // "amd", "intel" or, for anybody else, ""

}  // namespace vlk

#ifdef VLK_X86_LEVELS
#define VLK_DECLARE_CPU(...)                     \
    namespace vlk::baseline { __VA_ARGS__ }      \
    namespace vlk::avx2 { __VA_ARGS__ }          \
    namespace vlk::avx512 { __VA_ARGS__ }
#define VLK_CPU(kernel) \
    ::vlk::pick_isa(&::vlk::baseline::kernel, &::vlk::avx2::kernel, &::vlk::avx512::kernel)
#else
#define VLK_DECLARE_CPU(...) namespace vlk::baseline { __VA_ARGS__ }
#define VLK_CPU(kernel) (&::vlk::baseline::kernel)
#endif

namespace vlk {

template <typename Kernel>
Kernel* pick_isa(Kernel* baseline, Kernel* avx2, Kernel* avx512) {
    Kernel* const copies[] = {baseline, avx2, avx512};
    return copies[static_cast<int>(cpu_isa())];
}

}  // namespace vlk
