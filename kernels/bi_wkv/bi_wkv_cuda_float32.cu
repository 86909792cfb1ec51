// The Bi-WKV kernels for float32 tensors.
#include "bi_wkv/bi_wkv_cuda_launch.cuh"

namespace bi_wkv {

template Plan make_plan<float>(const Call&);
template void run<float>(const Call&, const Plan&, void*);

}  // namespace bi_wkv
