// A tile's way into shared memory, one or two tiles ahead: by the copy engine (compute capability 9.0 on), or by all
// threads. Memory loads of other kinds wait for the copies that the threads start, not for the engine's.
#pragma once

#include "bi_wkv/bi_wkv_cuda_exact.cuh"

namespace bi_wkv {

constexpr int kSharedRowBytes = sizeof(State);  // a thread's part of what rows share, first in the shared memory
constexpr int kMostStages = 2;

// One tensor's tile in shared memory, token after token; what does not exist is zero.
template <typename T>
struct Staged {
    static constexpr int kToken = kLanes * sizeof(T);
    char* base;

    __device__ T* at(int token) const { return reinterpret_cast<T*>(base + token * kToken); }
};

__device__ inline uint32_t shared_address(const void* x) { return static_cast<uint32_t>(__cvta_generic_to_shared(x)); }

// The copies of a block's tiles; turn: how many tiles of the block come before.
template <typename T, int kTensors>
struct Copies {
    const Problem& p;

    // Where a tensor's tile lies.
    __device__ Staged<T> staged(unsigned turn, int tensor) const {
        const int stage = stage_of(turn);
        return {shared_memory() + p.plan.shared_before_stages +
                (stage * kTensors + tensor) * (p.chunk_tokens * Staged<T>::kToken)};
    }

    // Once, before everything else; all threads.
    __device__ void prepare() const {
#if __CUDA_ARCH__ >= 900
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < kMostStages; ++stage) {
                asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier(stage)) : "memory");
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        }
#endif
        __syncthreads();
    }

    // Starts to copy a tile, if it exists. All threads have read what was there.
    __device__ void start(bool exists, unsigned number, unsigned turn) const {
        if (by_engine()) {
            if (exists && threadIdx.x == 0) start_engine(locate(p, number), turn);
            return;
        }
        if (exists) copy_by_threads(locate(p, number), turn);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }

    // Until the tile is there, for all threads.
    __device__ void wait(unsigned turn) const {
        if (by_engine()) {
            const unsigned parity = turn >> (p.plan.stages - 1) & 1;  // changes each time a stage is used again
            while (!arrived(barrier(stage_of(turn)), parity)) continue;
        } else if (p.plan.stages == 1) {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
        } else {
            asm volatile("cp.async.wait_group 1;" ::: "memory");
        }
        __syncthreads();
    }

 private:
    __device__ int stage_of(unsigned turn) const { return turn & (p.plan.stages - 1); }  // of 1 or 2

    __device__ bool by_engine() const {
#if __CUDA_ARCH__ >= 900
        return p.vectors;
#else
        return false;
#endif
    }

    static __device__ uint32_t barrier(int stage) {
        __shared__ uint64_t barriers[kMostStages];
        return shared_address(barriers + stage);
    }

    __device__ const void* tensor(int i) const {
        return i == 0 ? p.call.k : i == 1 ? p.call.v : p.call.backward ? p.call.gy : p.call.r;
    }

    static __device__ bool arrived(uint32_t barrier, unsigned parity) {
        unsigned done = 1;
#if __CUDA_ARCH__ >= 900
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
#endif
        return done;
    }

    __device__ void start_engine(const Tile& t, unsigned turn) const {
#if __CUDA_ARCH__ >= 900
        const uint32_t at = barrier(stage_of(turn));
        const unsigned bytes = kTensors * p.chunk_tokens * Staged<T>::kToken;
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
#pragma unroll
        for (int i = 0; i < kTensors; ++i) {
            asm volatile(
                "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
                "[%2];" ::"r"(shared_address(staged(turn, i).base)),
                "l"(p.maps + i), "r"(at), "r"(t.slice * kLanes), "r"(t.chunk * p.chunk_tokens), "r"(t.sample)
                : "memory");
        }
#endif
    }

    // A thread copies one piece of as many tokens as a token has pieces.
    __device__ void copy_by_threads(const Tile& t, unsigned turn) const {
        constexpr int kPieces = Staged<T>::kToken / 16, kInPiece = 16 / sizeof(T);
        const int first = threadIdx.x / kPieces * kPieces, in_token = threadIdx.x % kPieces * kInPiece;
        const int channels = static_cast<int>(p.channels - t.slice * kLanes) - in_token;  // that exist from there on
        const int64_t offset = t.at + (uint64_t(first) * p.channels + in_token);
        const bool whole = p.vectors && channels > 0 && first + kPieces <= t.in_chunk;
#pragma unroll
        for (int i = 0; i < kTensors; ++i) {
            const T* from = static_cast<const T*>(tensor(i)) + offset;
            T* to = staged(turn, i).at(first) + in_token;
            if (whole) {
#pragma unroll
                for (int j = 0; j < kPieces; ++j) {
                    asm volatile(
                        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to + j * kLanes)),
                        "l"(offset_by(from, j, p.token_bytes))
                        : "memory");
                }
            } else {
                copy_one_by_one(to, from, kPieces, t.in_chunk - first, channels);
            }
        }
    }

    __device__ void copy_one_by_one(T* to, const T* from, int pieces, int tokens, int channels) const {
#pragma unroll 1
        for (int i = 0; i < pieces; ++i) {
#pragma unroll 1
            for (int j = 0; j < 16 / int(sizeof(T)); ++j) {
                store(to + i * kLanes + j,
                      i < tokens && j < channels ? to_real(offset_by(from, i, p.token_bytes)[j]) : 0);
            }
        }
    }
};

}  // namespace bi_wkv
