// The Bi-WKV kernels for float16 tensors.
#include "bi_wkv/bi_wkv_cuda_launch.cuh"

namespace bi_wkv {

template Plan make_plan<__half>(const Call&);
template void run<__half>(const Call&, const Plan&, void*);

}  // namespace bi_wkv
