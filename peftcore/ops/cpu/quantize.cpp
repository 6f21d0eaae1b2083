#include "quantize.h"

#include <bit>

#include "parallel.h"

namespace polypeft {
namespace {

// Loops over fixed numbers of whole and floating numbers, which compilers turn into vectors.
void quantize_block(const float* weight, const float* bounds, uint8_t* codes, float* absmax) {
  int32_t largest = 0;  // without their signs floats are in the order of their bits, NaN the last
  for (int64_t i = 0; i < kBlock; ++i)
    largest = std::max(largest, std::bit_cast<int32_t>(weight[i]) & 0x7fffffff);
  *absmax = std::bit_cast<float>(largest);
  const float scale = 1.f / (*absmax < 1e-38f ? 1e-38f : *absmax);
  float scaled[kBlock];
  int32_t code[kBlock] = {};
  for (int64_t i = 0; i < kBlock; ++i) scaled[i] = weight[i] * scale;
  for (int64_t b = 0; b < kBounds; ++b)
    for (int64_t i = 0; i < kBlock; ++i) code[i] += !(scaled[i] <= bounds[b]);
  for (int64_t i = 0; i < kBlock / 2; ++i)
    codes[i] = static_cast<uint8_t>(code[2 * i] << 4 | code[2 * i + 1]);
}

}  // namespace

void quantize_nf4(const float* weight, int64_t blocks, const float* bounds, uint8_t* codes,
                  float* absmax) {
  constexpr int64_t kPerTask = 256;
  for_each_task((blocks + kPerTask - 1) / kPerTask, blocks > kPerTask, [&](int64_t task) {
    for (int64_t b = task * kPerTask; b < std::min(blocks, (task + 1) * kPerTask); ++b)
      quantize_block(weight + b * kBlock, bounds, codes + b * kBlock / 2, absmax + b);
  });
}

}  // namespace polypeft
