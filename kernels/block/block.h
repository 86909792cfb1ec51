// The arguments of the operators of a block, in the order of their schemas.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/ivalue.h>

#include <optional>
#include <vector>

namespace vision_rwkv {

enum BlockArgument : size_t {
    kX,
    kStats,
    kNorms,
    kEps1,
    kEps2,
    kNextEps,
    kPostNorm,
    kMixes,
    kMaps,
    kW,
    kU,
    kGamma1,
    kGamma2,
    kScale1,
    kScale2,
    kHeight,
    kWidth,
    kPixels,
    kGamma,
    kDtype,
    kBlockArguments  // so many
};

constexpr int kSpatial = 3;  // mixes of the spatial mix: key, value, receptance; then those of the channel mix
constexpr int kMixCount = 5, kMapCount = 7, kNormCount = 4;
constexpr int kOutput = 3, kKey = 4, kReceptance = 5, kValue = 6;  // maps after those of the spatial mix's tokens

// What vrwkv_block_backward returns, in this order: then, with post_norm, the gradients of the norms, and those of the
// layer scales that there are. Columns: the gradients of a mix's mixes, then those of the norm before it, (n, C). Those
// of the first kSpatial maps are one tensor too.
enum BlockGradient : size_t {
    kGx,
    kColumns1,
    kColumns2,
    kGw,
    kGu,
    kGspatial,
    kGmaps,
    kOthers = kGmaps + kMapCount - kSpatial
};

}  // namespace vision_rwkv
