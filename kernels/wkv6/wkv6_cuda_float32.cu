// The WKV6 kernels for float32 tensors.
#include "wkv6_cuda_launch.cuh"

namespace wkv6 {

template void forward<float>(const Call&, void*);
template void gated<float>(const Call&, const Gating&, void*);
template void backward<float>(const Call&, const Gradients&);

}  // namespace wkv6
