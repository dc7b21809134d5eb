#pragma once
#include "patchify/patchify.h"

namespace vlk {

// Launch on a stream of the current device; null, or what a launch was refused for.
const char* patchify_cuda(const Patchify& op, void* stream);
const char* patchify_backward_cuda(const PatchifyBackward& op, void* stream);

}  // namespace vlk
