// The gradient of Q-Shift with a delta for each mix, first pass: each result's gradient g is taken apart into g m,
// which stays with the token, and g (1 - m), which goes to its neighbour, m being the mix less delta. The sums over the
// mixes are written; a second pass shifts them (q_shift_cuda_teams.cuh), so that a neighbour's gradients are not read
// for each mix. Everything is added up in a fixed order.
#pragma once

#include "q_shift/q_shift_cuda_common.cuh"
#include "tensors.cuh"

namespace q_shift {

template <typename X, typename G>
struct PartTensors {
    const G *g, *delta;  // (mixes, rows, C)
    const X* x;          // (rows, C)
    G* gdelta;           // (mixes, rows, C)
    G* parts;            // what stays, what goes, (2, rows, C)
};

// Block (vectors of a row, rows at a time); each block has rows_a_block rows in a run, and writes its sums of the
// mixes' gradients, (kCount, C), to `part`.
template <typename X, typename G, int kVec, int kCount>
__global__ void __launch_bounds__(kBlock, 3)
    parts_backward(const Args args, const PartTensors<X, G> at, int rows_a_block, float* part) {
    extern __shared__ float4 shared[];
    float* sums = reinterpret_cast<float*>(shared);
    const int vector = blockIdx.y * blockDim.x + threadIdx.x, channel = vector * kVec;
    const int channels = args.channels;
    const bool active = channel < channels;
    const int64_t plane = static_cast<int64_t>(args.rows) * channels;
    const Step step = args.place.step(active ? channel : 0);
    float weight[kVec], bias[kVec], change[kCount][kVec] = {};
    load_parameter(args.weight, active ? channel : 0, 1.0f, weight);
    load_parameter(args.bias, active ? channel : 0, 0.0f, bias);
    const int first = blockIdx.x * rows_a_block, last = min(first + rows_a_block, args.rows);
    const float2* stats = reinterpret_cast<const float2*>(args.stats);
    for (int row = first + threadIdx.y; active && row < last; row += blockDim.y) {
        // All that is read of the tokens is asked for before any of it is used. A source that is not there is read at
        // the token itself, and dropped.
        const Neighbours found = args.place.neighbours(row, step);
        const int source = row + (found.source ? found.offset : 0);
        const int64_t here = static_cast<int64_t>(row) * channels + channel;
        const auto own = *reinterpret_cast<const Pack<X, kVec>*>(at.x + here);
        const auto far =
            *reinterpret_cast<const Pack<X, kVec>*>(at.x + static_cast<int64_t>(source) * channels + channel);
        Pack<G, kVec> grads[kCount], deltas[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            grads[i] = *reinterpret_cast<const Pack<G, kVec>*>(at.g + i * plane + here);
            deltas[i] = *reinterpret_cast<const Pack<G, kVec>*>(at.delta + i * plane + here);
        }
        const float2 own_stats = stats ? stats[row] : make_float2(0, 1);
        const float2 far_stats = stats ? stats[source] : make_float2(0, 1);
        float apart[kVec], stay[kVec] = {}, go[kVec] = {};
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            const float unit = (to_float(own.values[j]) - own_stats.x) * own_stats.y;
            const float other = (to_float(far.values[j]) - far_stats.x) * far_stats.y;
            apart[j] = (found.source ? other * weight[j] + bias[j] : 0.0f) - (unit * weight[j] + bias[j]);
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            float mix[kVec], gdelta[kVec];
            load(args.mix[i] + channel, mix);
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                const float grad = to_float(grads[i].values[j]), stays = mix[j] - to_float(deltas[i].values[j]);
                stay[j] += grad * stays;
                go[j] += grad * (1.0f - stays);
                gdelta[j] = grad * apart[j];
                change[i][j] += gdelta[j];
            }
            store(at.gdelta + i * plane + here, gdelta);
        }
        store(at.parts + here, stay);
        store(at.parts + plane + here, go);
    }
    // (rows at a time, kCount, channels of the block)
    const int width = blockDim.x * kVec;
#pragma unroll
    for (int i = 0; i < kCount; ++i) store(sums + (threadIdx.y * kCount + i) * width + threadIdx.x * kVec, change[i]);
    __syncthreads();
    const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (int k = thread; k < kCount * width; k += threads) {
        const int i = k / width, column = blockIdx.y * width + k - i * width;
        if (column >= channels) continue;
        float total = 0;
        for (unsigned y = 0; y < blockDim.y; ++y) total += sums[y * kCount * width + k];
        part[(static_cast<int64_t>(blockIdx.x) * kCount + i) * channels + column] = total;
    }
}

// As many blocks as the device holds at a time; columns (kCount, C) gets the sums.
template <typename X, typename G, int kVec, int kCount>
void launch_parts(const Args& args, const PartTensors<X, G>& at, const Tensor& columns) {
    const auto kernel = parts_backward<X, G, kVec, kCount>;
    const int vectors = args.channels / kVec, width = vectors < kBlock ? vectors : kBlock;
    const dim3 block(width, kBlock / width);
    const size_t bytes = sizeof(float) * kCount * kVec * block.x * block.y;
    int device = 0, processors = 1, resident = 0;
    C10_CUDA_CHECK(cudaGetDevice(&device));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, block.x * block.y, bytes));
    const int across = (vectors + width - 1) / width, held = processors * (resident > 0 ? resident : 1);
    const int most = held / across > 0 ? held / across : 1;
    const int rows_a_block = (args.rows + most - 1) / most, blocks = (args.rows + rows_a_block - 1) / rows_a_block;
    const Tensor part = new_floats(columns, {blocks, columns.numel()});
    const auto stream = c10::cuda::getCurrentCUDAStream();
    kernel<<<dim3(blocks, across), block, bytes, stream>>>(args, at, rows_a_block, part.mutable_data_ptr<float>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    launch_sum_parts(part.const_data_ptr<float>(), blocks, columns.numel(), columns.mutable_data_ptr<float>(), stream);
}

}  // namespace q_shift
