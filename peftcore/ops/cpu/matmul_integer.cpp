// Dot products of bytes (AVX512-VNNI's, AVX-VNNI's): weights as unsigned bytes code + 128, inputs as
// signed ones, so Σ code · x = Σ (code + 128) · x − 128 · Σ x. Within a group of inputs the sums are
// exact; groups are added up in floats.

#include "matmul.h"
#include "parallel.h"
#include "tiles.h"

namespace polypeft {
namespace {

constexpr int kRows = 6, kTiles = 2;  // of a register tile
constexpr int64_t kFewRows = 18;
constexpr int64_t kRowsOfTiles = 5;    // so many share a weight's tile
constexpr int64_t kGroup = 128;        // inputs of an int8 weight's step

int64_t group_of(const Weight& w) { return w.nf4 ? w.group : kGroup; }
int64_t groups_of(const Weight& w) { return (w.in + group_of(w) - 1) / group_of(w); }
int64_t stride_of(const Weight& w) { return (w.in + 63) / 64 * 64; }
int64_t whole(int64_t rows) { return (rows + 15) / 16 * 16; }

// The weights of one register tile's tiles, read once for all rows: [quads][NT][64].
struct Panel {
  const uint8_t* values;

  template <int NT, class Use>
  void quads(int64_t, int64_t from, int64_t to, const Use& use) const {
    in_pairs(from / 4, (to + 3) / 4, [&](int64_t q, auto parity) POLYPEFT_INLINE {
      const uint8_t* at = values + q * NT * kQuadBytes;
      Quads w[NT];
      unrolled<NT>([&](auto t) { w[t] = Quads::load(at + t * kQuadBytes); });
      use(q, parity, w);
    });
  }
};

I16 four_bytes(const int8_t* p) {
  int32_t bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return I16::set1(bytes);
}

// The sums of one group of inputs, for MR rows and NT tiles. Few are summed in two halves, or each
// product would wait for the one before.
template <int MR, int NT, int Bytes, class Tiles>
inline void sum_group(const Tiles& tiles, const Rounded& x, int64_t row, int64_t tile,
                                 int64_t from, int64_t to, I16 (&sums)[MR][NT]) {
  constexpr int kParts = MR * NT * Bytes <= 4 ? 2 : 1;
  I16 low[kParts][MR][NT], high[kParts][MR][NT];
  unrolled<kParts * MR * NT>([&](auto i) { low[0][0][i] = high[0][0][i] = I16::zero(); });
  const int64_t start = row * x.stride, stride = x.stride;
  const int8_t *const x_low = x.low + start, *const x_high = x.high + start;
  const auto add = [&](int64_t q, auto parity, const Quads(&weight)[NT]) POLYPEFT_INLINE {
    constexpr int p = decltype(parity)::value % kParts;
    unrolled<MR>([&](auto r) {
      const I16 values = four_bytes(x_low + r * stride + 4 * q);
      unrolled<NT>([&](auto t) { low[p][r][t] = dot(low[p][r][t], weight[t], values); });
      if constexpr (Bytes == 2) {
        const I16 upper = four_bytes(x_high + r * stride + 4 * q);
        unrolled<NT>([&](auto t) { high[p][r][t] = dot(high[p][r][t], weight[t], upper); });
      }
    });
  };
  tiles.template quads<NT>(tile, from, to, add);
  unrolled<MR>([&](auto r) {
    unrolled<NT>([&](auto t) {
      const I16 of_low = kParts == 2 ? low[0][r][t] + low[1][r][t] : low[0][r][t];
      const I16 of_high = kParts == 2 ? high[0][r][t] + high[1][r][t] : high[0][r][t];
      sums[r][t] = Bytes == 2 ? times256(of_high) + of_low : of_low;
    });
  });
}

// y for MR rows and NT tiles.
template <int MR, int NT, int Bytes, class Tiles>
void multiply(const Tiles& tiles, const Rounded& x, int64_t row, const Weight& w, int64_t tile,
              float* y) {
  F16 sums[MR][NT];
  unrolled<MR>([&](auto r) {
    unrolled<NT>([&](auto t) { sums[r][t] = F16::zero(); });
  });
  for (int64_t g = 0; g < x.groups; ++g) {
    I16 of_group[MR][NT];
    const int64_t from = g * x.group, to = std::min(from + x.group, w.in);
    sum_group<MR, NT, Bytes>(tiles, x, row, tile, from, to, of_group);
    F16 scale[NT];
    unrolled<NT>([&](auto t) {
      if (w.nf4) scale[t] = nf4_scale(w, tile + t, g);
    });
    unrolled<MR>([&](auto r) {
      const int64_t at = (row + r) * x.groups + g;
      const F16 step = F16::set1(x.steps[at]);
      const I16 correction = I16::set1(x.corrections[at]);
      unrolled<NT>([&](auto t) {
        F16 value = to_float(of_group[r][t] - correction);
        if (w.nf4) value = value * scale[t];
        sums[r][t] = fma(value, step, sums[r][t]);
      });
    });
  }
  for (int t = 0; t < NT; ++t) {
    const Last last(w, tile + t);
    for (int r = 0; r < MR; ++r) last.store(sums[r][t], y + r * w.out);
  }
}

template <int NT, int Bytes, class Tiles, int MR = kRows>
void multiply_rows(int64_t rows, const Tiles& tiles, const Rounded& x, int64_t row, const Weight& w,
                   int64_t tile, float* y) {
  if (rows == MR) return multiply<MR, NT, Bytes>(tiles, x, row, w, tile, y);
  if constexpr (MR > 1) multiply_rows<NT, Bytes, Tiles, MR - 1>(rows, tiles, x, row, w, tile, y);
}

// Rows in register tiles of nearly one size.
template <int NT, int Bytes, class Tiles>
void all_rows(const Tiles& tiles, const Rounded& x, int64_t row, int64_t rows, const Weight& w,
              int64_t tile, float* y) {
  const int64_t parts = (rows + kRows - 1) / kRows;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t start = rows * i / parts, stop = rows * (i + 1) / parts;
    multiply_rows<NT, Bytes>(stop - start, tiles, x, row + start, w, tile, y + start * w.out);
  }
}

// All rows of NT tiles: few are multiplied by the weights as they lie, while those come from memory;
// more by a panel of them.
template <int NT, int Bytes, class Tiles>
void block(const Tiles& tiles, const Rounded& x, int64_t row, int64_t rows, const Weight& w,
           int64_t tile, float* y) {
  if (rows <= kFewRows) return all_rows<NT, Bytes>(tiles, x, row, rows, w, tile, y);
  auto* panel = reinterpret_cast<uint8_t*>(scratch((w.in + 7) / 8 * 8 * NT * kLanes / 4));
  uint8_t* at = panel;
  tiles.template quads<NT>(tile, 0, w.in, [&](int64_t, auto, const Quads(&weight)[NT]) {
    for (int t = 0; t < NT; ++t, at += kQuadBytes) weight[t].store(at);
  });
  all_rows<NT, Bytes>(Panel{panel}, x, row, rows, w, tile, y);
}

template <int Bytes, class Tiles>
void blocks(const Tiles& tiles, const Rounded& x, int64_t row, int64_t rows, const Weight& w,
            int64_t tile, int64_t end, float* y) {
  for (; tile + kTiles <= end; tile += kTiles) block<kTiles, Bytes>(tiles, x, row, rows, w, tile, y);
  for (; tile < end; ++tile) block<1, Bytes>(tiles, x, row, rows, w, tile, y);
}

// y += W x for one row and a weight of Q quads of inputs, one group: an adapter's B.
template <int Q>
void add_row(const Rounded& x, int64_t row, const Weight& w, int64_t tile, int64_t end,
             int64_t ahead, float* y) {
  I16 low[Q], high[Q];
  unrolled<Q>([&](auto q) {
    low[q] = four_bytes(x.low + row * x.stride + 4 * q);
    high[q] = four_bytes(x.high + row * x.stride + 4 * q);
  });
  const F16 step = F16::set1(x.steps[row]);
  const I16 correction = I16::set1(x.corrections[row]);
  const auto* codes = static_cast<const int8_t*>(w.codes) + tile * Q * kQuadBytes;
  const auto sum = [&](const int8_t* at) POLYPEFT_INLINE {
    I16 of_low = I16::zero(), of_high = I16::zero();
    unrolled<Q>([&](auto q) {
      const Quads quad = Quads::biased(at + q * kQuadBytes);
      fetch(at + q * kQuadBytes + ahead);
      of_low = dot(of_low, quad, low[q]);
      of_high = dot(of_high, quad, high[q]);
    });
    return fma(to_float(times256(of_high) + of_low - correction), step, F16::zero());
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
    I16 low[NT], high[NT];
    unrolled<NT>([&](auto t) {
      low[t] = I16::set1(-x.corrections[r]);
      high[t] = I16::zero();
    });
    unrolled<Q>([&](auto q) {
      const I16 lower = four_bytes(x.low + r * x.stride + 4 * q);
      const I16 upper = four_bytes(x.high + r * x.stride + 4 * q);
      unrolled<NT>([&](auto t) {
        low[t] = dot(low[t], quads[t][q], lower);
        high[t] = dot(high[t], quads[t][q], upper);
      });
    });
    const F16 step = F16::set1(x.steps[r]);
    unrolled<NT>([&](auto t) {
      const F16 sum = fma(to_float(times256(high[t]) + low[t]), step, F16::zero());
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
  if (!w.adds || x.groups > 1 || x.bits != 16 || (w.in == 32 && rows >= kRowsOfTiles)) return false;
  switch (w.in) {
    case 8: add_rows<2>(x, row, rows, w, tile, end, ahead, y); return true;
    case 16: add_rows<4>(x, row, rows, w, tile, end, ahead, y); return true;
    case 32: add_rows<8>(x, row, rows, w, tile, end, ahead, y); return true;
    default: return false;
  }
}

F16 load_part(const float* p, int n) { return n == kLanes ? F16::load(p) : F16::load_n(p, n); }

}  // namespace

int64_t rounded_bytes(const Weight& w, int64_t rows) {
  const int64_t codes = stride_of(w) * (w.activation_bits / 8);
  return whole(rows) * (codes + groups_of(w) * (sizeof(float) + sizeof(int32_t)));
}

Rounded lay_out(const Weight& w, int64_t rows, char* memory) {
  Rounded r{w.activation_bits, group_of(w), groups_of(w), stride_of(w), nullptr, nullptr, nullptr,
            nullptr};
  rows = whole(rows);
  r.low = reinterpret_cast<int8_t*>(memory);
  r.high = r.low + (r.bits == 16 ? rows * r.stride : 0);
  r.steps = reinterpret_cast<float*>(r.high + rows * r.stride);
  r.corrections = reinterpret_cast<int32_t*>(r.steps + rows * r.groups);
  return r;
}

void round_rows(const float* x, int64_t in, int64_t from, int64_t to, const Rounded& rounded) {
  const bool wide = rounded.bits == 16;
  // The largest code: its high byte is 127, as is its low one.
  const float largest = wide ? 127.f * 256.f + 127.f : 127.f;
  for (int64_t r = from; r < to; ++r)
    for (int64_t g = 0; g < rounded.groups; ++g) {
      const int64_t start = g * rounded.group, stop = std::min(start + rounded.group, in);
      const float* row = x + r * in;
      F16 top = F16::zero(), poison = F16::zero();
      for (int64_t k = start; k < stop; k += kLanes) {
        const F16 v = load_part(row + k, static_cast<int>(std::min<int64_t>(kLanes, stop - k)));
        top = max(top, max(v, F16::zero() - v));
        poison = fma(v, F16::zero(), poison);  // NaN from what is not finite
      }
      const float magnitude = max_lane(top) + sum(poison);
      // Below, the reciprocal would overflow; a NaN is not above either.
      const bool usable = magnitude > 1e-30f;
      const F16 inverse = F16::set1(usable ? largest / magnitude : 0.f);
      F16 total = F16::zero();
      int8_t* low = rounded.low + r * rounded.stride;
      int8_t* high = rounded.high + r * rounded.stride;
      for (int64_t k = start; k < stop; k += kLanes) {
        const int n = static_cast<int>(std::min<int64_t>(kLanes, stop - k));
        F16 code = usable ? round(load_part(row + k, n) * inverse) : F16::zero();
        total = total + code;
        if (wide) {  // never half-way between two whole numbers
          const F16 upper = round(fma(code, F16::set1(1.f / 256), F16::set1(0.25f / 256)));
          upper.store(high + k);
          code = fma(upper, F16::set1(-256.f), code);
        }
        code.store(low + k);
      }
      const bool zero = magnitude <= 1e-30f;
      rounded.steps[r * rounded.groups + g] = zero ? 0.f : magnitude / largest;
      rounded.corrections[r * rounded.groups + g] = 128 * static_cast<int32_t>(sum(total));
    }
}

void multiply_integer(const Rounded& x, int64_t row, int64_t rows, const Weight& w, int64_t tile,
                      int64_t end, int64_t ahead, float* y) {
  if (add(x, row, rows, w, tile, end, ahead, y)) return;
  if (multiply_amx(x, row, rows, w, tile, end, ahead, y)) return;
  with_integers(w, ahead, [&](const auto& tiles, auto bytes) {
    blocks<decltype(bytes)::value>(tiles, x, row, rows, w, tile, end, y);
  });
}

}  // namespace polypeft
