// A weight's nf4 codes, when a model is loaded.
#pragma once

#include <cstdint>

namespace polypeft {

// Semantics: for each block of kBlock weights absmax = max |w|, and of each weight the number of
// `bounds` that are less than w · (1 / max(absmax, 10⁻³⁸)), in float; that of NaN is fifteen.
// weight: [blocks][kBlock]; bounds: [15], ascending; codes: [blocks][kBlock / 2], of two weights the
// first in the high bits; absmax: [blocks].
constexpr int64_t kBlock = 64, kBounds = 15;
void quantize_nf4(const float* weight, int64_t blocks, const float* bounds, uint8_t* codes,
                  float* absmax);

}  // namespace polypeft
