// How the matmuls read a weight's tiles: as floats, or as integers for a dot product of bytes.
#pragma once

#include "simd.h"
#include "weight.h"

#include <algorithm>
#include <array>

namespace polypeft {

// QLoRA's sixteen values (arXiv:2305.14314), as bitsandbytes has them.
constexpr float kNf4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
// What a dot product of unsigned bytes with signed ones takes weights with.
constexpr int kBias = 128;
// The same times 127 in signed bytes, Σ 256^-s · kNf4Bytes[s], and `Bias` added to each; the first alone
// is the value rounded.
template <int Bias>
constexpr auto kNf4Bytes = [] {
  std::array<std::array<uint8_t, 16>, 3> bytes{};
  for (int i = 0; i < 16; ++i) {
    double left = 127.0 * kNf4[i];
    for (auto& byte : bytes) {
      const int nearest = static_cast<int>(left + (left < 0 ? -0.5 : 0.5));
      byte[i] = static_cast<uint8_t>(nearest + Bias);
      left = 256 * (left - nearest);
    }
  }
  return bytes;
}();

// `step` calls `use(k, w)` for inputs [from, to) in order, w the weights of NT tiles from `tile` as
// floats, an int8 weight's without its scale. `quads` calls `use(q, parity, w)` for inputs 4q to 4q + 3
// of [from, to), w[s][t] as integers in S bytes, of which there is more than one in `kNf4Bytes` alone: an
// nf4 weight's without its scale; with kBias added to each byte, or as they are; parity: Int<q % 2>.
// `from` is a multiple of eight. Both ask for what is read `ahead` bytes later, so that memory works
// while these are multiplied.

// use(q, Int<q % 2>()) for [from, to), from an even number on.
template <class Use>
inline void in_pairs(int64_t from, int64_t to, const Use& use) {
  int64_t q = from;
  for (; q + 2 <= to; q += 2) {
    use(q, Int<0>());
    use(q + 1, Int<1>());
  }
  if (q < to) use(q, Int<0>());
}

// How far behind byte `at` of a tile lies what is to be asked for there, where NT tiles are read side by
// side. Less than a tile ahead counts over all of them, and behind their end come the next NT; more, or
// back, is the way to another weight.
template <int NT>
inline int64_t reach(int64_t at, int64_t ahead, int64_t tile_bytes) {
  if (ahead < 0 || ahead >= tile_bytes) return ahead;
  const int64_t own = ahead / NT;
  return at + own < tile_bytes ? own : own + (NT - 1) * tile_bytes;
}

struct Int8Tiles {
  const int8_t* codes;
  int64_t tile_bytes, ahead;

  Int8Tiles(const Weight& w, int64_t ahead)
      : codes(static_cast<const int8_t*>(w.codes)), tile_bytes(w.tile_bytes()), ahead(ahead) {}

  template <int NT, class Use>
  void step(int64_t tile, int64_t from, int64_t to, const Use& use) const {
    const int8_t* at = codes + tile * tile_bytes;
    const int64_t size = tile_bytes;
    for (int64_t k = from; k < to; k += 4) {
      const int8_t* quad = at + k / 4 * kQuadBytes;
      const int64_t later = reach<NT>(quad - at, ahead, size);
      for (int t = 0; t < NT; ++t) fetch(quad + t * size + later);
      const auto one = [&](auto j) {
        F16 w[NT];
        for (int t = 0; t < NT; ++t) w[t] = F16::byte<decltype(j)::value>(quad + t * size);
        use(k + j, w);
      };
      one(Int<0>());
      if (k + 4 <= to) {
        one(Int<1>());
        one(Int<2>());
        one(Int<3>());
        continue;
      }
      if (k + 1 < to) one(Int<1>());
      if (k + 2 < to) one(Int<2>());
    }
  }

  template <int NT, int S, int Bias = kBias, class Use>
  void quads(int64_t tile, int64_t from, int64_t to, const Use& use) const {
    static_assert(S == 1);
    const int8_t* at = codes + tile * tile_bytes;
    const int64_t size = tile_bytes;
    in_pairs(from / 4, (to + 3) / 4, [&](int64_t q, auto parity) POLYPEFT_INLINE {
      Quads w[1][NT];
      const int64_t later = reach<NT>(q * kQuadBytes, ahead, size);
      unrolled<NT>([&](auto t) {
        const int8_t* quad = at + t * size + q * kQuadBytes;
        w[0][t] = Bias ? Quads::biased(quad) : Quads::load(reinterpret_cast<const uint8_t*>(quad));
        fetch(quad + later);
      });
      use(q, parity, w);
    });
  }
};

struct Nf4Tiles {
  const uint8_t* codes;
  const float* scales;
  int64_t in, group, tile_bytes, ahead;

  Nf4Tiles(const Weight& w, int64_t ahead)
      : codes(static_cast<const uint8_t*>(w.codes)), scales(w.scales), in(w.in), group(w.group),
        tile_bytes(w.tile_bytes()), ahead(ahead) {}

  const float* scale_at(int64_t tile, int64_t g) const {
    return scales + (tile * (in / group) + g) * kLanes;
  }

  template <int NT, class Use>
  void step(int64_t tile, int64_t from, int64_t to, const Use& use) const {
    const Table16 table(kNf4);
    const uint8_t* at = codes + tile * tile_bytes;
    const int64_t size = tile_bytes;
    for (int64_t k = from; k < to;) {
      const int64_t g = k / group, end = std::min((g + 1) * group, to);
      F16 scale[NT];
      for (int t = 0; t < NT; ++t) scale[t] = F16::load(scale_at(tile + t, g));
      for (; k < end; k += 8) {
        const uint8_t* word = at + k / 8 * kQuadBytes;
        const int64_t later = reach<NT>(word - at, ahead, size);
        for (int t = 0; t < NT; ++t) fetch(word + t * size + later);
        const auto one = [&](auto j, auto nibble) {
          F16 w[NT];
          for (int t = 0; t < NT; ++t)
            w[t] = table.at<decltype(nibble)::value>(word + t * size) * scale[t];
          use(k + j, w);
        };
        one(Int<0>(), Int<0>());
        one(Int<1>(), Int<2>());
        one(Int<2>(), Int<4>());
        one(Int<3>(), Int<6>());
        one(Int<4>(), Int<1>());
        one(Int<5>(), Int<3>());
        one(Int<6>(), Int<5>());
        one(Int<7>(), Int<7>());
      }
    }
  }

  template <int NT, int S, int Bias = kBias, class Use>
  void quads(int64_t tile, int64_t from, int64_t to, const Use& use) const {
    NibbleTable tables[S];
    unrolled<S>([&](auto s) { tables[s] = NibbleTable(kNf4Bytes<Bias>[s].data()); });
    const uint8_t* at = codes + tile * tile_bytes;
    const int64_t size = tile_bytes;
    for (int64_t word = from / 8; word < to / 8; ++word) {
      Quads low[S][NT], high[S][NT];
      const int64_t later = reach<NT>(word * kQuadBytes, ahead, size);
      unrolled<NT>([&](auto t) {
        const uint8_t* eights = at + t * size + word * kQuadBytes;
        unrolled<S>([&](auto s) { tables[s].look_up(eights, low[s][t], high[s][t]); });
        fetch(eights + later);
      });
      use(2 * word, Int<0>(), low);
      use(2 * word + 1, Int<1>(), high);
    }
  }
};

// use(tiles, Int<B>(), Int<S>()): a weight's tiles, the bytes of its inputs' codes, and of its own.
template <class Use>
void with_integers(const Weight& w, int64_t ahead, const Use& use) {
  const auto run = [&](const auto& tiles, auto most) {
    switch (w.activation_bits) {
      case 8: return use(tiles, Int<1>(), Int<1>());
      case 16: return use(tiles, Int<2>(), Int<1>());
      default: return use(tiles, Int<3>(), most);
    }
  };
  w.nf4 ? run(Nf4Tiles(w, ahead), Int<3>()) : run(Int8Tiles(w, ahead), Int<1>());
}

// Inputs' and weights' bytes make B sums, of which `position` p counts 256^p times: inputs' byte b and
// weights' s add to sum b − s, and what would come below 0 is less than is kept. The whole as a float.
template <int B>
F16 whole_sum(const I16 (&sums)[B]) {
  if constexpr (B == 1) {
    return to_float(sums[0]);
  } else {
    const F16 lower = to_float(times256(sums[1]) + sums[0]);
    if constexpr (B == 2) return lower;
    return fma(to_float(sums[B - 1]), F16::set1(65536.f), lower);
  }
}

// The scales of an nf4 weight's tile for one group of inputs, where its codes are `kNf4Bytes`.
inline F16 nf4_scale(const Weight& w, int64_t tile, int64_t g) {
  return F16::load(w.scales + (tile * (w.in / w.group) + g) * kLanes) * F16::set1(1.f / 127.f);
}

// What is left to do with a tile's sums: an int8 weight's scales, the bias, fewer than sixteen.
struct Last {
  int64_t column;
  int n;
  bool has_scale, has_bias, adds;
  F16 scale, bias;

  Last(const Weight& w, int64_t tile)
      : column(tile * kLanes), n(static_cast<int>(std::min<int64_t>(kLanes, w.out - column))),
        has_scale(!w.nf4 && w.scales), has_bias(w.bias), adds(w.adds) {
    if (has_scale) scale = F16::load(w.scales + column);
    if (has_bias) bias = F16::load_n(w.bias + column, n);
  }
  void store(F16 sum, float* row) const {
    if (has_scale) sum = sum * scale;
    if (has_bias) sum = sum + bias;
    if (adds) sum = sum + (n == kLanes ? F16::load(row + column) : F16::load_n(row + column, n));
    n == kLanes ? sum.store(row + column) : sum.store_n(row + column, n);
  }
};

}  // namespace polypeft
