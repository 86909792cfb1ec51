// The WKV6 kernels for float16 tensors.
#include "wkv6_cuda_launch.cuh"

namespace wkv6 {

template void forward<__half>(const Call&, void*);
template void gated<__half>(const Call&, const Gating&, void*);
template void backward<__half>(const Call&, const Gradients&);

}  // namespace wkv6
