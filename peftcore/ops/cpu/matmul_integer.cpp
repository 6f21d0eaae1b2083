// Dot products of bytes (AVX512-VNNI's, AVX-VNNI's): weights as unsigned bytes code + 128, inputs as
// signed ones, so Σ code · x = Σ (code + 128) · x − 128 · Σ x. Within a group of inputs the sums are
// exact; groups are added up in floats.

#include "matmul.h"

#include <bit>

#include "parallel.h"
#include "tiles.h"

namespace polypeft {
namespace {

constexpr int kTiles = 2;  // of a register tile
constexpr int rows_of(int num_bytes) { return num_bytes == 3 ? 4 : 6; }
constexpr int64_t kFewRows = 18;
constexpr int64_t kRowsOfTiles = 5;    // so many share a weight's tile
constexpr int64_t kGroup = 128;        // inputs of an int8 weight's step

int64_t group_of(const Weight& w) { return w.nf4 ? w.group : kGroup; }
int64_t groups_of(const Weight& w) { return (w.in + group_of(w) - 1) / group_of(w); }
// An odd number of cache lines, or sixteen rows would share a few sets of the cache.
int64_t stride_of(const Weight& w) { return ((w.in + 63) / 64 | 1) * 64; }
int64_t whole(int64_t rows) { return (rows + 15) / 16 * 16; }

// The weights of one register tile's tiles, read once for all rows: [quads][S][NT][64].
struct Panel {
  const uint8_t* values;

  template <int NT, int S, class Use>
  void quads(int64_t, int64_t from, int64_t to, const Use& use) const {
    in_pairs(from / 4, (to + 3) / 4, [&](int64_t q, auto parity) POLYPEFT_INLINE {
      const uint8_t* at = values + q * S * NT * kQuadBytes;
      Quads w[S][NT];
      unrolled<S>([&](auto s) {
        unrolled<NT>([&](auto t) { w[s][t] = Quads::load(at + (s * NT + t) * kQuadBytes); });
      });
      use(q, parity, w);
    });
  }
};

I16 four_bytes(const int8_t* p) {
  int32_t bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return I16::set1(bytes);
}

// What a row's sum at position p begins with, for what each of a weight's S bytes has too much.
template <int B, int S>
I16 start_of(const int32_t* sums, int p) {
  int32_t total = 0;
  for (int s = 0; s < S && p + s < B; ++s) total += sums[p + s];
  return I16::set1(-kBias * total);
}

// The sums of one group of inputs, for MR rows and NT tiles, as floats. Few are summed in two halves,
// or each product would wait for the one before.
template <int MR, int NT, int B, int S, class Tiles>
inline void sum_group(const Tiles& tiles, const Rounded& x, int64_t row, int64_t tile, int64_t g,
                      int64_t in, F16 (&whole)[MR][NT]) {
  constexpr int kParts = MR * NT * B <= 4 * S ? 2 : 1;
  I16 sums[kParts][MR][NT][B];
  unrolled<MR>([&](auto r) {
    unrolled<B>([&](auto p) {
      const I16 start = start_of<B, S>(x.sums + ((row + r) * x.groups + g) * B, p);
      unrolled<NT>([&](auto t) {
        sums[0][r][t][p] = start;
        if constexpr (kParts == 2) sums[1][r][t][p] = I16::zero();
      });
    });
  });
  const int64_t first = row * x.stride, stride = x.stride;
  const int8_t* bytes[B];
  unrolled<B>([&](auto b) { bytes[b] = x.bytes[b] + first; });
  const auto add = [&](int64_t q, auto parity, const Quads(&weight)[S][NT]) POLYPEFT_INLINE {
    constexpr int i = decltype(parity)::value % kParts;
    unrolled<MR>([&](auto r) {
      unrolled<B>([&](auto b) {
        const I16 values = four_bytes(bytes[b] + r * stride + 4 * q);
        unrolled<(S <= b ? S : b + 1)>([&](auto s) {
          unrolled<NT>([&](auto t) {
            I16& sum = sums[i][r][t][b - s];
            sum = dot(sum, weight[s][t], values);
          });
        });
      });
    });
  };
  tiles.template quads<NT, S>(tile, g * x.group, std::min((g + 1) * x.group, in), add);
  unrolled<MR>([&](auto r) {
    unrolled<NT>([&](auto t) {
      if constexpr (kParts == 2)
        unrolled<B>([&](auto p) { sums[0][r][t][p] = sums[0][r][t][p] + sums[1][r][t][p]; });
      whole[r][t] = whole_sum(sums[0][r][t]);
    });
  });
}

// y for MR rows and NT tiles.
template <int MR, int NT, int B, int S, class Tiles>
void multiply(const Tiles& tiles, const Rounded& x, int64_t row, const Weight& w, int64_t tile,
              float* y) {
  F16 sums[MR][NT];
  unrolled<MR>([&](auto r) {
    unrolled<NT>([&](auto t) { sums[r][t] = F16::zero(); });
  });
  for (int64_t g = 0; g < x.groups; ++g) {
    F16 of_group[MR][NT];
    sum_group<MR, NT, B, S>(tiles, x, row, tile, g, w.in, of_group);
    F16 scale[NT];
    unrolled<NT>([&](auto t) {
      if (w.nf4) scale[t] = nf4_scale(w, tile + t, g);
    });
    unrolled<MR>([&](auto r) {
      const F16 step = F16::set1(x.steps[(row + r) * x.groups + g]);
      unrolled<NT>([&](auto t) {
        const F16 value = w.nf4 ? of_group[r][t] * scale[t] : of_group[r][t];
        sums[r][t] = fma(value, step, sums[r][t]);
      });
    });
  }
  for (int t = 0; t < NT; ++t) {
    const Last last(w, tile + t);
    for (int r = 0; r < MR; ++r) last.store(sums[r][t], y + r * w.out);
  }
}

template <int NT, int B, int S, class Tiles, int MR = rows_of(B)>
void multiply_rows(int64_t rows, const Tiles& tiles, const Rounded& x, int64_t row, const Weight& w,
                   int64_t tile, float* y) {
  if (rows == MR) return multiply<MR, NT, B, S>(tiles, x, row, w, tile, y);
  if constexpr (MR > 1) multiply_rows<NT, B, S, Tiles, MR - 1>(rows, tiles, x, row, w, tile, y);
}

// Rows in register tiles of nearly one size.
template <int NT, int B, int S, class Tiles>
void all_rows(const Tiles& tiles, const Rounded& x, int64_t row, int64_t rows, const Weight& w,
              int64_t tile, float* y) {
  const int64_t parts = (rows + rows_of(B) - 1) / rows_of(B);
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t start = rows * i / parts, stop = rows * (i + 1) / parts;
    multiply_rows<NT, B, S>(stop - start, tiles, x, row + start, w, tile, y + start * w.out);
  }
}

// All rows of NT tiles: few are multiplied by the weights as they lie, while those come from memory;
// more by a panel of them.
template <int NT, int B, int S, class Tiles>
void block(const Tiles& tiles, const Rounded& x, int64_t row, int64_t rows, const Weight& w,
           int64_t tile, float* y) {
  if (rows <= kFewRows) return all_rows<NT, B, S>(tiles, x, row, rows, w, tile, y);
  auto* panel = reinterpret_cast<uint8_t*>(scratch((w.in + 7) / 8 * 8 * S * NT * kLanes / 4));
  uint8_t* at = panel;
  tiles.template quads<NT, S>(tile, 0, w.in, [&](int64_t, auto, const Quads(&weight)[S][NT]) {
    for (const auto& of_byte : weight)
      for (const Quads& quads : of_byte) {
        quads.store(at);
        at += kQuadBytes;
      }
  });
  all_rows<NT, B, S>(Panel{panel}, x, row, rows, w, tile, y);
}

template <int B, int S, class Tiles>
void blocks(const Tiles& tiles, const Rounded& x, int64_t row, int64_t rows, const Weight& w,
            int64_t tile, int64_t end, float* y) {
  for (; tile + kTiles <= end; tile += kTiles) block<kTiles, B, S>(tiles, x, row, rows, w, tile, y);
  for (; tile < end; ++tile) block<1, B, S>(tiles, x, row, rows, w, tile, y);
}

// y += W x for one row and a weight of Q quads of inputs, one group: an adapter's B.
template <int Q>
void add_row(const Rounded& x, int64_t row, const Weight& w, int64_t tile, int64_t end,
             int64_t ahead, float* y) {
  I16 values[2][Q], starts[2];
  unrolled<2>([&](auto b) {
    unrolled<Q>([&](auto q) { values[b][q] = four_bytes(x.bytes[b] + row * x.stride + 4 * q); });
    starts[b] = start_of<2, 1>(x.sums + 2 * row, b);
  });
  const F16 step = F16::set1(x.steps[row]);
  const auto* codes = static_cast<const int8_t*>(w.codes) + tile * Q * kQuadBytes;
  const auto sum = [&](const int8_t* at) POLYPEFT_INLINE {
    I16 sums[2] = {starts[0], starts[1]};
    unrolled<Q>([&](auto q) {
      const Quads quad = Quads::biased(at + q * kQuadBytes);
      fetch(at + q * kQuadBytes + ahead);
      unrolled<2>([&](auto b) { sums[b] = dot(sums[b], quad, values[b][q]); });
    });
    return fma(whole_sum(sums), step, F16::zero());
  };
  int64_t t = tile;
  const int64_t whole = std::min(end, w.out / kLanes);
  for (; t + 2 <= whole; t += 2, codes += 2 * Q * kQuadBytes) {
    float* at = y + t * kLanes;
    const F16 first = sum(codes), second = sum(codes + Q * kQuadBytes);
    (first + F16::load(at)).store(at);
    (second + F16::load(at + kLanes)).store(at + kLanes);
  }
  for (; t < end; ++t, codes += Q * kQuadBytes) {
    float* at = y + t * kLanes;
    const int n = static_cast<int>(std::min<int64_t>(kLanes, w.out - t * kLanes));
    const F16 one = sum(codes);
    n == kLanes ? (one + F16::load(at)).store(at) : (one + F16::load_n(at, n)).store_n(at, n);
  }
}

// The same for rows that share NT tiles, which stay in registers.
template <int Q, int NT>
void add_tiles(const Rounded& x, int64_t row, int64_t rows, const Weight& w, int64_t tile,
               int64_t ahead, float* y) {
  const auto* codes = static_cast<const int8_t*>(w.codes) + tile * Q * kQuadBytes;
  Quads quads[NT][Q];
  unrolled<NT * Q>([&](auto i) {
    quads[0][i] = Quads::biased(codes + i * kQuadBytes);
    fetch(codes + i * kQuadBytes + ahead);
  });
  const int n = static_cast<int>(std::min<int64_t>(kLanes, w.out - (tile + NT - 1) * kLanes));
  for (int64_t r = row; r < row + rows; ++r) {
    I16 sums[NT][2];
    unrolled<2>([&](auto b) {
      const I16 start = start_of<2, 1>(x.sums + 2 * r, b);
      unrolled<NT>([&](auto t) { sums[t][b] = start; });
    });
    unrolled<Q>([&](auto q) {
      unrolled<2>([&](auto b) {
        const I16 values = four_bytes(x.bytes[b] + r * x.stride + 4 * q);
        unrolled<NT>([&](auto t) { sums[t][b] = dot(sums[t][b], quads[t][q], values); });
      });
    });
    const F16 step = F16::set1(x.steps[r]);
    unrolled<NT>([&](auto t) {
      const F16 sum = fma(whole_sum(sums[t]), step, F16::zero());
      float* at = y + (r - row) * w.out + (tile + t) * kLanes;
      t + 1 < NT || n == kLanes ? (sum + F16::load(at)).store(at)
                                : (sum + F16::load_n(at, n)).store_n(at, n);
    });
  }
}

template <int Q>
void add_rows(const Rounded& x, int64_t row, int64_t rows, const Weight& w, int64_t tile,
              int64_t end, int64_t ahead, float* y) {
  if (rows < kRowsOfTiles) {
    for (int64_t r = 0; r < rows; ++r) add_row<Q>(x, row + r, w, tile, end, ahead, y + r * w.out);
    return;
  }
  for (; tile + 2 <= end; tile += 2) add_tiles<Q, 2>(x, row, rows, w, tile, ahead, y);
  if (tile < end) add_tiles<Q, 1>(x, row, rows, w, tile, ahead, y);
}

// An adapter's B where it has one of the usual ranks, unless AMX is the faster way; false, and nothing
// is done, where not.
bool add(const Rounded& x, int64_t row, int64_t rows, const Weight& w, int64_t tile, int64_t end,
         int64_t ahead, float* y) {
  if (!w.adds || x.groups > 1 || x.num_bytes != 2 || (w.in == 32 && rows >= kRowsOfTiles)) return false;
  switch (w.in) {
    case 8: add_rows<2>(x, row, rows, w, tile, end, ahead, y); return true;
    case 16: add_rows<4>(x, row, rows, w, tile, end, ahead, y); return true;
    case 32: add_rows<8>(x, row, rows, w, tile, end, ahead, y); return true;
    default: return false;
  }
}

}  // namespace

int64_t rounded_bytes(const Weight& w, int64_t rows) {
  const int64_t num_bytes = w.activation_bits / 8;
  const int64_t of_group = sizeof(float) + num_bytes * sizeof(int32_t);
  return whole(rows) * (stride_of(w) * num_bytes + groups_of(w) * of_group);
}

Rounded lay_out(const Weight& w, int64_t rows, char* memory) {
  Rounded r{w.activation_bits / 8, group_of(w), groups_of(w), stride_of(w), {}, nullptr, nullptr};
  rows = whole(rows);
  for (int b = 0; b < r.num_bytes; ++b, memory += rows * r.stride)
    r.bytes[b] = reinterpret_cast<int8_t*>(memory);
  r.steps = reinterpret_cast<float*>(memory);
  r.sums = reinterpret_cast<int32_t*>(r.steps + rows * r.groups);
  return r;
}

namespace {

// In each lane 1 for byte B and 0 for the others: what adds up a byte of every lane's.
template <int B>
Quads ones_at() {
  uint8_t bytes[kQuadBytes];
  for (int i = 0; i < kQuadBytes; ++i) bytes[i] = i % 4 == B;
  return Quads::load(bytes);
}

template <int B>
void round_row(const float* x, int64_t in, int64_t r, const Rounded& rounded) {
  // The largest code: a little less than what B bytes of 127 are, for a float's product may exceed it.
  constexpr float kLargest = B == 1 ? 127.f : B == 2 ? 127.f * 257.f : 127.f * 65793.f - 4.f;
  constexpr int64_t kGroups = 16;  // at a time
  float inverses[kGroups];
  for (int64_t begin = 0; begin < rounded.groups; begin += kGroups) {
    const int64_t end = std::min(begin + kGroups, rounded.groups);
    const auto each = [&](int64_t g, const auto& use) {
      const int64_t stop = std::min((g + 1) * rounded.group, in);
      int64_t k = g * rounded.group;
      for (; k + kLanes <= stop; k += kLanes) use(k, F16::load(x + k));
      if (k < stop) use(k, F16::load_n(x + k, static_cast<int>(stop - k)));
    };
    for (int64_t g = begin; g < end; ++g) {
      I16 top = I16::zero();
      each(g, [&](int64_t, F16 v) { top = max(top, bits_of_magnitude(v)); });
      const int32_t bits = max_lane(top);
      const float magnitude = std::bit_cast<float>(bits);
      // Below, the reciprocal would overflow.
      const bool usable = bits < kInfinity && magnitude > 1e-30f;
      inverses[g - begin] = usable ? kLargest / magnitude : 0.f;
      rounded.steps[r * rounded.groups + g] = usable              ? magnitude / kLargest
                                              : bits < kInfinity ? 0.f
                                                                 : std::nanf("");
    }
    for (int64_t g = begin; g < end; ++g) {
      const bool usable = inverses[g - begin] > 0.f;
      const F16 inverse = F16::set1(inverses[g - begin]);
      I16 totals[B];
      unrolled<B>([&](auto b) { totals[b] = I16::zero(); });
      each(g, [&](int64_t k, F16 v) {
        const I16 code = usable ? in_signed_bytes(to_nearest(v * inverse)) : I16::zero();
        unrolled<B>([&](auto b) {
          totals[b] = dot(totals[b], ones_at<b>(), code);
          store_byte<b>(code, rounded.bytes[b] + r * rounded.stride + k);
        });
      });
      unrolled<B>([&](auto b) {
        rounded.sums[(r * rounded.groups + g) * B + b] = sum(totals[b]);
      });
    }
  }
}

}  // namespace

void round_rows(const float* x, int64_t in, int64_t from, int64_t to, const Rounded& rounded) {
  const auto rows = [&](auto num_bytes) {
    for (int64_t r = from; r < to; ++r)
      round_row<decltype(num_bytes)::value>(x + r * in, in, r, rounded);
  };
  switch (rounded.num_bytes) {
    case 1: return rows(Int<1>());
    case 2: return rows(Int<2>());
    default: return rows(Int<3>());
  }
}

void multiply_integer(const Rounded& x, int64_t row, int64_t rows, const Weight& w, int64_t tile,
                      int64_t end, int64_t ahead, float* y) {
  if (add(x, row, rows, w, tile, end, ahead, y)) return;
  if (multiply_amx(x, row, rows, w, tile, end, ahead, y)) return;
  with_integers(w, ahead, [&](const auto& tiles, auto b, auto s) {
    blocks<decltype(b)::value, decltype(s)::value>(tiles, x, row, rows, w, tile, end, y);
  });
}

}  // namespace polypeft
