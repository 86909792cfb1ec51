// The Bi-WKV kernels for bfloat16 tensors.
#include "bi_wkv/bi_wkv_cuda_launch.cuh"

namespace bi_wkv {

template Plan make_plan<__nv_bfloat16>(const Call&);
template void run<__nv_bfloat16>(const Call&, const Plan&, void*);

}  // namespace bi_wkv
