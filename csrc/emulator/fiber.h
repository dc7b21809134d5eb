// A function that can be left in the middle and resumed: a stack of its own and a switch of the registers that
// a called function must keep. AddressSanitizer is told of every switch.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulator switches stacks on Linux on x86-64 only"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define VLK_ADDRESS_SANITIZER 1
#else
#define VLK_ADDRESS_SANITIZER 0
#endif

// Keeps the caller's registers on its stack, stores that stack in *from, and goes on where `to` was left.
extern "C" void vlk_switch_stack(void** from, void* to);
asm(R"(
    .pushsection .text
    .weak vlk_switch_stack
    .hidden vlk_switch_stack
    .type vlk_switch_stack, @function
vlk_switch_stack:
    endbr64
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
    .size vlk_switch_stack, . - vlk_switch_stack
    .popsection
)");

namespace vlk::emulator {

class Fiber {
  public:
    Fiber() {
        memory_ = static_cast<char*>(mmap(nullptr, page + stack_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (memory_ == MAP_FAILED || mprotect(memory_ + page, stack_bytes, PROT_READ | PROT_WRITE) != 0)
            throw std::bad_alloc();
    }
    ~Fiber() { munmap(memory_, page + stack_bytes); }
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // The next resume() calls `entry`, which ends with finish(); what the fiber did before is forgotten.
    void start(void (*entry)()) {
#if VLK_ADDRESS_SANITIZER
        // What finished has left the marks of its first function alone; what was given up, those of all.
        const size_t marked = finished_ ? page : stack_bytes;
        __asan_unpoison_memory_region(memory_ + page + stack_bytes - marked, marked);
        finished_ = false;
#endif
        void** top = reinterpret_cast<void**>(memory_ + page + stack_bytes);
        *--top = nullptr;  // where entry would return to
        *--top = reinterpret_cast<void*>(entry);
        for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
        stack_ = top;
    }

    // Runs the fiber until it is left again.
    void resume() {
#if VLK_ADDRESS_SANITIZER
        void* fake = nullptr;
        __sanitizer_start_switch_fiber(&fake, memory_ + page, stack_bytes);
#endif
        vlk_switch_stack(&caller_, stack_);
#if VLK_ADDRESS_SANITIZER
        __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    }

    // Called in the fiber, first of all.
    void entered() {
#if VLK_ADDRESS_SANITIZER
        __sanitizer_finish_switch_fiber(nullptr, &caller_bottom_, &caller_size_);
#endif
    }

    // Called in the fiber: back to whoever resumed it.
    void leave() {
#if VLK_ADDRESS_SANITIZER
        void* fake = nullptr;
        __sanitizer_start_switch_fiber(&fake, caller_bottom_, caller_size_);
#endif
        vlk_switch_stack(&stack_, caller_);
#if VLK_ADDRESS_SANITIZER
        __sanitizer_finish_switch_fiber(fake, &caller_bottom_, &caller_size_);
#endif
    }

    // leave() for the last time.
    void finish() {
#if VLK_ADDRESS_SANITIZER
        finished_ = true;
        __sanitizer_start_switch_fiber(nullptr, caller_bottom_, caller_size_);
#endif
        vlk_switch_stack(&stack_, caller_);
    }

  private:
    static constexpr size_t page = 4096, stack_bytes = 256 * 1024;  // the page below the stack is no memory
    char* memory_;
    void* stack_ = nullptr;
    void* caller_ = nullptr;
#if VLK_ADDRESS_SANITIZER
    const void* caller_bottom_ = nullptr;
    size_t caller_size_ = 0;
    bool finished_ = false;
#endif
};

}  // namespace vlk::emulator
