// The arguments and the results of the operators of a block, `vrwkv_block` and `vrwkv6_block`, in the order of their
// schemas.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/ivalue.h>

namespace vision_rwkv {

// The first arguments; then come those of the spatial mix alone, then the last ones.
enum FirstArgument : size_t {
    kX,
    kStats,
    kNorms,
    kEps1,
    kEps2,
    kNextEps,
    kPostNorm,
    kMixes,  // of the spatial mix, then of the channel mix
    kMaps,   // of the spatial mix's tokens, then kMapsAfter more
    kFirstArguments
};

enum LastArgument : size_t {
    kGamma1,
    kGamma2,
    kScale1,
    kScale2,
    kHeight,
    kWidth,
    kPixels,
    kGamma,
    kDtype,
    kLastArguments
};

inline const c10::IValue& last(c10::ArrayRef<c10::IValue> given, LastArgument which) {
    return given[given.size() - kLastArguments + which];
}

inline c10::ArrayRef<c10::IValue> of_spatial_mix(c10::ArrayRef<c10::IValue> given) {
    return given.slice(kFirstArguments, given.size() - kFirstArguments - kLastArguments);
}

constexpr size_t kNormCount = 4, kChannelMixes = 2;

enum MapAfter : size_t { kOutput, kKey, kReceptance, kValue, kMapsAfter };

// What the backward operators return: these, the gradients of kMapsAfter maps, those of the spatial mix's arguments,
// those of the norms with post_norm, and those of the layer scales that there are. Columns: the gradients of a half's
// mixes, then those of the norm before it, (n, C). kGspatial: of the maps of the spatial mix's tokens, (n, D, C).
enum BlockGradient : size_t { kGx, kColumns1, kColumns2, kGspatial, kGmaps, kGothers = kGmaps + kMapsAfter };

}  // namespace vision_rwkv
