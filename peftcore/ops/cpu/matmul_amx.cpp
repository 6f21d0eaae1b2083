#include "matmul.h"

#if defined(__AMX_INT8__)

#include <sys/syscall.h>
#include <unistd.h>

#include "parallel.h"
#include "tiles.h"

namespace polypeft {
namespace {

constexpr int64_t kRows = 16;   // of a tile
constexpr int64_t kDepth = 64;  // inputs of one product of two tiles
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kFewestRows = 5;

// Linux lends a process these registers when it asks for them, and the threads that it starts.
bool ask_for_registers() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Which of the eight are what, where rows have B bytes: a sum for each of two tiles and B positions; then
// rows and weights of each, or for three bytes one of either.
template <int B>
constexpr bool kAllFit = B <= 2;
template <int B>
constexpr int kRowsAt = kAllFit<B> ? 4 : 6;
template <int B>
constexpr int kWeightsAt = kAllFit<B> ? 6 : 7;

// This thread's, for rows and weights of `depth` inputs, a multiple of four.
template <int B>
class Registers {
 public:
  Registers(int64_t rows, int64_t depth) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      const bool is_weight = i >= kWeightsAt<B>, is_row = i >= kRowsAt<B> && !is_weight;
      config.row_bytes[i] = is_row ? static_cast<uint16_t>(depth) : kQuadBytes;
      config.rows[i] = static_cast<uint8_t>(is_weight ? depth / 4 : std::min(rows, kRows));
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Registers() { asm volatile("tilerelease"); }
  Registers(const Registers&) = delete;
};

// Assembler, because GCC 12 does not take its own forms to read memory.
template <int I>
void load(const int8_t* at, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(stride), "i"(I) : "memory");
}
template <int I>
void store(int32_t* at) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(int64_t{kQuadBytes}), "i"(I)
               : "memory");
}
template <int I>
void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(I));
}
// sums += rows · weights, signed bytes.
template <int Sums, int Rows, int Weights>
void dot() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Rows), "i"(Weights));
}

// Some groups' inputs [from, to) of one of a weight's tiles as signed bytes, [⌈(to − from)/64⌉][16][64].
struct Codes {
  const int8_t* at;
  int64_t ahead;  // as `multiply_integer`'s, or 0
};

// At most so many inputs of two tiles stay in the L1 cache, with sixteen rows', while all rows are
// multiplied by them.
template <int S>
constexpr int64_t kInputs = S == 1 ? 640 : 256;

int64_t codes_bytes(int64_t inputs) { return (inputs + kDepth - 1) / kDepth * kTileBytes; }
int64_t depth_of(const Weight& w) { return std::min((w.in + 3) / 4 * 4, kDepth); }

// Each of the tile's S bytes as they lie, where that is how they lie, or in `memory`.
template <int S, class Tiles>
void codes_of(const Weight& w, const Tiles& tiles, int64_t tile, int64_t from, int64_t to, int8_t* memory,
              Codes (&codes)[S]) {
  if (!w.nf4 && (w.in < kDepth || w.in % kDepth == 0)) {
    codes[0] = {static_cast<const int8_t*>(w.codes) + tile * tiles.tile_bytes + from / 4 * kQuadBytes,
                tiles.ahead};
    return;
  }
  const int64_t size = codes_bytes(to - from);
  int8_t* at = memory;
  tiles.template quads<1, S, 0>(tile, from, to, [&](int64_t, auto, const Quads(&weight)[S][1]) {
    unrolled<S>([&](auto s) { weight[s][0].store(reinterpret_cast<uint8_t*>(at + s * size)); });
    at += kQuadBytes;
  });
  for (int s = 0; s < S; ++s) {
    std::memset(at + s * size, 0, memory + size - at);
    codes[s] = {memory + s * size, 0};
  }
}

// Sums over the inputs [from, to), which are in one group, for a tile of rows and NT of outputs, into the
// registers t · B + p. skipped: inputs before those that `codes` begins with.
template <int NT, int B, int S>
void sum_group(const Codes (&codes)[NT][S], int64_t skipped, const Rounded& x, int64_t row, int64_t from,
               int64_t to) {
  const int8_t* bytes[B];
  unrolled<B>([&](auto b) { bytes[b] = x.bytes[b] + row * x.stride; });
  unrolled<NT * B>([](auto i) { zero<i>(); });
  for (int64_t k = from; k < to; k += kDepth) {
    if constexpr (kAllFit<B>)
      unrolled<B>([&](auto b) { load<kRowsAt<B> + b>(bytes[b] + k, x.stride); });
    unrolled<S>([&](auto s) {
      unrolled<NT>([&](auto t) {
        constexpr int kWeights = kWeightsAt<B> + (kAllFit<B> ? t : 0);
        const Codes& of = codes[t][s];
        const int8_t* at = of.at + (k - skipped) / kDepth * kTileBytes;
        load<kWeights>(at, kQuadBytes);
        if (of.ahead) fetch(at + of.ahead, std::min(to - k, kDepth) / 4 * kQuadBytes);
        unrolled<B - s>([&](auto p) {  // from inputs' byte p + s
          constexpr int kRow = kRowsAt<B> + (kAllFit<B> ? p + s : 0);
          if constexpr (!kAllFit<B>) load<kRow>(bytes[p + s] + k, x.stride);
          dot<t * B + p, kRow, kWeights>();
        });
      });
    });
  }
}

template <int NT, int B>
using Sums = int32_t[NT][B][kRows][kLanes];

template <int NT, int B>
void store_sums(Sums<NT, B>& sums) {
  unrolled<NT>([&](auto t) {
    unrolled<B>([&](auto p) { store<t * B + p>(sums[t][p][0]); });
  });
}

template <int NT, int B>
F16 sum_of(const Sums<NT, B>& sums, int t, int64_t r) {
  I16 parts[B];
  unrolled<B>([&](auto p) { parts[p] = I16::load(sums[t][p][r]); });
  return whole_sum(parts);
}

// The same for a weight of one group of inputs that adds: an adapter's B.
template <int NT, int B, int S>
void add(const Codes (&codes)[NT][S], const Rounded& x, int64_t row, int64_t rows, const Weight& w,
         int64_t tile, float* y) {
  alignas(64) Sums<NT, B> sums;
  sum_group<NT, B, S>(codes, 0, x, row, 0, w.in);
  store_sums<NT, B>(sums);
  unrolled<NT>([&](auto t) {
    const int64_t column = (tile + t) * kLanes;
    const int n = static_cast<int>(std::min<int64_t>(kLanes, w.out - column));
    for (int64_t r = 0; r < rows; ++r) {
      float* at = y + r * w.out + column;
      const F16 step = F16::set1(x.steps[row + r]);
      const F16 sum = fma(sum_of<NT, B>(sums, t, r), step, F16::zero());
      n == kLanes ? (sum + F16::load(at)).store(at) : (sum + F16::load_n(at, n)).store_n(at, n);
    }
  });
}

// What the groups [first, last) add to y, for at most a tile of rows and NT of outputs. totals: of the groups
// before.
template <int NT, int B, int S>
void multiply(const Codes (&codes)[NT][S], const Rounded& x, int64_t row, int64_t rows, const Weight& w,
              int64_t tile, int64_t first, int64_t last, float* totals, float* y) {
  alignas(64) Sums<NT, B> of_group;
  if (first == 0) std::fill_n(totals, NT * kRows * kLanes, 0.f);
  const auto add_group = [&](int64_t g) {
    const float* steps = x.steps + row * x.groups + g;
    unrolled<NT>([&](auto t) {
      const F16 scale = w.nf4 ? nf4_scale(w, tile + t, g) : F16::set1(1.f);
      unrolled<kRows>([&](auto r) {
        const F16 sum = sum_of<NT, B>(of_group, t, r);
        float* total = totals + (t * kRows + r) * kLanes;
        fma(sum * scale, F16::set1(steps[r * x.groups]), F16::load(total)).store(total);
      });
    });
  };
  // While one group's products are on their way, the last one's are added up.
  for (int64_t g = first; g < last; ++g) {
    const int64_t from = g * x.group;
    sum_group<NT, B, S>(codes, first * x.group, x, row, from, std::min(from + x.group, w.in));
    if (g > first) add_group(g - 1);
    store_sums<NT, B>(of_group);
  }
  add_group(last - 1);
  if (last < x.groups) return;
  for (int t = 0; t < NT; ++t) {
    const Last end(w, tile + t);
    for (int64_t r = 0; r < rows; ++r)
      end.store(F16::load(totals + (t * kRows + r) * kLanes), y + r * w.out);
  }
}

template <int NT, int B, int S, class Tiles>
void block(const Tiles& tiles, const Rounded& x, int64_t row, int64_t rows, const Weight& w,
           int64_t tile, float* y) {
  const int64_t parts = (w.in + kInputs<S> - 1) / kInputs<S>;
  const int64_t step = (x.groups + parts - 1) / parts;  // groups of a part
  const int64_t size = S * codes_bytes(std::min(step * x.group, w.in)), of_rows = NT * kRows * kLanes;
  float* totals = scratch((rows + kRows - 1) / kRows * of_rows + NT * size / sizeof(float));
  auto* memory = reinterpret_cast<int8_t*>(totals + (rows + kRows - 1) / kRows * of_rows);
  for (int64_t first = 0; first < x.groups; first += step) {
    const int64_t last = std::min(first + step, x.groups);
    const int64_t from = first * x.group, to = std::min(last * x.group, w.in);
    Codes codes[NT][S];
    for (int t = 0; t < NT; ++t)
      codes_of<S>(w, tiles, tile + t, from, to, memory + t * size, codes[t]);
    for (int64_t r = 0; r < rows; r += kRows) {
      const int64_t count = std::min(kRows, rows - r);
      if (w.adds && x.groups == 1)
        add<NT, B, S>(codes, x, row + r, count, w, tile, y + r * w.out);
      else
        multiply<NT, B, S>(codes, x, row + r, count, w, tile, first, last, totals + r / kRows * of_rows,
                           y + r * w.out);
      for (auto& of_tile : codes)
        for (Codes& of : of_tile) of.ahead = 0;  // asked for once
    }
  }
}

template <int B, int S, class Tiles>
void blocks(const Tiles& tiles, const Rounded& x, int64_t row, int64_t rows, const Weight& w,
            int64_t tile, int64_t end, float* y) {
  const Registers<B> registers(rows, depth_of(w));
  for (; tile + 2 <= end; tile += 2) block<2, B, S>(tiles, x, row, rows, w, tile, y);
  if (tile < end) block<1, B, S>(tiles, x, row, rows, w, tile, y);
}

bool have_registers() {
  static const bool given = ask_for_registers();
  return given;
}

}  // namespace

bool multiply_amx(const Rounded& x, int64_t row, int64_t rows, const Weight& w, int64_t tile,
                  int64_t end, int64_t ahead, float* y) {
  if (!have_registers() || rows < kFewestRows || (x.groups > 1 && x.group % kDepth)) return false;
  with_integers(w, ahead, [&](const auto& tiles, auto b, auto s) {
    blocks<decltype(b)::value, decltype(s)::value>(tiles, x, row, rows, w, tile, end, y);
  });
  return true;
}

int float_bits() { return have_registers() ? 24 : 0; }

}  // namespace polypeft

#else

namespace polypeft {

bool multiply_amx(const Rounded&, int64_t, int64_t, const Weight&, int64_t, int64_t, int64_t,
                  float*) {
  return false;
}

int float_bits() { return 0; }

}  // namespace polypeft

#endif
