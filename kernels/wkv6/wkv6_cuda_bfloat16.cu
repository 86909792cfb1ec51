// The WKV6 kernels for bfloat16 tensors.
#include "wkv6_cuda_launch.cuh"

namespace wkv6 {

template void forward<__nv_bfloat16>(const Call&, void*);
template void gated<__nv_bfloat16>(const Call&, const Gating&, void*);
template void backward<__nv_bfloat16>(const Call&, const Gradients&);

}  // namespace wkv6
