// Quantized weights as the kernels read them.
#pragma once

#include <cstdint>

namespace polypeft {

// How a matrix's numbers are kept; kByte: an adapter's factors, rounded.
enum class Type { kFloat, kHalf, kBFloat16, kByte };

// A quantized weight in tiles of sixteen outputs; the last tile is filled up with zeros.
//
// int8: codes [tiles][⌈in/4⌉][16][4], four inputs of one output together, filled up with zeros;
//       scales [tiles][16], W = code · scale.
// nf4:  codes [tiles][in/8][16][4], byte j of an output's four holds inputs 8q + j (low bits) and
//       8q + 4 + j (high bits); scales [tiles][in/group][16], W = table[code] · scale; in and group
//       are multiples of eight.
//
// activation_bits: 0, inputs are multiplied as they are, in float; 8, 16 or 24, they are rounded to
// integers of so many bits first, with a step for every group of inputs of each row, and multiplied
// byte by byte. At 24 an nf4 weight's table has 24 bits too, and what is left of rounding is no more
// than what sums of floats lose: floats out of bytes, as Ootomo, Ozaki and Yokota have them for
// DGEMM (arXiv:2306.11975).
//
// adds: outputs are added to what is there; such a weight has codes of int8 and no scales.
struct Weight {
  bool nf4;
  int64_t out, in, group;
  int activation_bits;
  const void* codes;
  const float* scales;
  const float* bias;  // [out] or null
  bool adds = false;
  int64_t num_tiles() const { return (out + 15) / 16; }
  int64_t tile_bytes() const { return (nf4 ? in / 8 : (in + 3) / 4) * 64; }  // of codes
};

// The outputs [start, stop) of Wᵀ into out: [in][stop − start], kFloat or kBFloat16; without an int8
// weight's scales where `scaled` is false.
void unpack(const Weight& weight, int64_t start, int64_t stop, bool scaled, void* out, Type type);

}  // namespace polypeft
