// Calls of our own operators from C++, by PyTorch's dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace vision_rwkv {

// The operator "vision_rwkv::..." of this C++ signature; look it up once.
template <typename Signature>
auto find(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace vision_rwkv
