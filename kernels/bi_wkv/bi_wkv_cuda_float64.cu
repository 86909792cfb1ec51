// The Bi-WKV kernels for float64 tensors.
#include "bi_wkv/bi_wkv_cuda_launch.cuh"

namespace bi_wkv {

template Plan make_plan<double>(const Call&);
template void run<double>(const Call&, const Plan&, void*);

}  // namespace bi_wkv
