// How the matmuls read a weight's tiles: as floats, or as integers for a dot product of bytes.
#pragma once

#include "simd.h"
#include "weight.h"

#include <algorithm>

namespace polypeft {

// QLoRA's sixteen values (arXiv:2305.14314), as bitsandbytes has them.
constexpr float kNf4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
// The same times 127, rounded.
constexpr int8_t kNf4Rounded[16] = {-127, -88, -67, -50, -36, -23, -12, 0,
                                    10, 20, 31, 43, 56, 71, 92, 127};

// `step` calls `use(k, w)` for inputs [from, to) in order, w the weights of NT tiles from `tile` as
// floats, an int8 weight's without its scale. `quads` calls `use(q, parity, w)` for inputs 4q to 4q + 3
// of [from, to), w as integers: an nf4 weight's without its scale and times 127; parity: Int<q % 2>.
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

  template <int NT, class Use>
  void quads(int64_t tile, int64_t from, int64_t to, const Use& use) const {
    const int8_t* at = codes + tile * tile_bytes;
    const int64_t size = tile_bytes;
    in_pairs(from / 4, (to + 3) / 4, [&](int64_t q, auto parity) POLYPEFT_INLINE {
      Quads w[NT];
      const int64_t later = reach<NT>(q * kQuadBytes, ahead, size);
      unrolled<NT>([&](auto t) {
        const int8_t* quad = at + t * size + q * kQuadBytes;
        w[t] = Quads::biased(quad);
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

  template <int NT, class Use>
  void quads(int64_t tile, int64_t from, int64_t to, const Use& use) const {
    const NibbleTable table(kNf4Rounded);
    const uint8_t* at = codes + tile * tile_bytes;
    const int64_t size = tile_bytes;
    for (int64_t word = from / 8; word < to / 8; ++word) {
      Quads low[NT], high[NT];
      const int64_t later = reach<NT>(word * kQuadBytes, ahead, size);
      unrolled<NT>([&](auto t) {
        const uint8_t* eights = at + t * size + word * kQuadBytes;
        table.look_up(eights, low[t], high[t]);
        fetch(eights + later);
      });
      use(2 * word, Int<0>(), low);
      use(2 * word + 1, Int<1>(), high);
    }
  }
};

// use(tiles, Int<bytes>()): a weight's tiles, and the bytes of its inputs' codes.
template <class Use>
void with_integers(const Weight& w, int64_t ahead, const Use& use) {
  const auto run = [&](const auto& tiles) {
    w.activation_bits == 16 ? use(tiles, Int<2>()) : use(tiles, Int<1>());
  };
  w.nf4 ? run(Nf4Tiles(w, ahead)) : run(Int8Tiles(w, ahead));
}

// The scales of an nf4 weight's tile for one group of inputs, where its codes are `kNf4Rounded`.
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
