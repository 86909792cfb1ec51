// Programmatic launches, from compute capability 9.0 on: a kernel may start while the one before it in the stream still
// runs, once all blocks of that one have allowed it. It touches what that kernel writes only after waiting for its end.
#pragma once

__device__ inline void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    allow_next_kernel();
}
