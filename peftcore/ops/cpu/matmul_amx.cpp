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

// This thread's: 0 to 3 are sums, 4 and 5 the rows' low and high bytes, 6 and 7 weights of `depth`
// inputs, a multiple of four.
class Registers {
 public:
  Registers(int64_t rows, int64_t depth) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = i == 4 || i == 5 ? static_cast<uint16_t>(depth) : kQuadBytes;
      config.rows[i] = static_cast<uint8_t>(i < 6 ? std::min(rows, kRows) : depth / 4);
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

// One of a weight's tiles as signed bytes, [⌈in/64⌉][16][64].
struct Codes {
  const int8_t* at;
  int64_t ahead;  // as `multiply_integer`'s, or 0
};

int64_t codes_bytes(const Weight& w) { return (w.in + kDepth - 1) / kDepth * kTileBytes; }
int64_t depth_of(const Weight& w) { return std::min((w.in + 3) / 4 * 4, kDepth); }

// As they lie, where that is how they lie, or in `memory`.
template <class Tiles>
Codes codes_of(const Weight& w, const Tiles& tiles, int64_t tile, int8_t* memory) {
  if (!w.nf4 && (w.in < kDepth || w.in % kDepth == 0))
    return {static_cast<const int8_t*>(w.codes) + tile * tiles.tile_bytes,
            tiles.ahead};
  int8_t* at = memory;
  tiles.template quads<1>(tile, 0, w.in, [&](int64_t, auto, const Quads(&weight)[1]) {
    weight[0].store_unbiased(at);
    at += kQuadBytes;
  });
  std::memset(at, 0, memory + codes_bytes(w) - at);
  return {memory, 0};
}

// Sums over one group of inputs, for a tile of rows and NT of outputs, into the registers t · Bytes + b.
template <int NT, int Bytes>
void sum_group(const Codes (&codes)[NT], const Rounded& x, int64_t row, int64_t from, int64_t to) {
  const int8_t *const low = x.low + row * x.stride, *const high = x.high + row * x.stride;
  unrolled<NT * Bytes>([](auto i) { zero<i>(); });
  for (int64_t k = from; k < to; k += kDepth) {
    load<4>(low + k, x.stride);
    if constexpr (Bytes == 2) load<5>(high + k, x.stride);
    unrolled<NT>([&](auto t) {
      const int8_t* at = codes[t].at + k / kDepth * kTileBytes;
      load<6 + t>(at, kQuadBytes);
      if (codes[t].ahead) fetch(at + codes[t].ahead, std::min(to - k, kDepth) / 4 * kQuadBytes);
      unrolled<Bytes>([&](auto b) { dot<t * Bytes + b, 4 + b, 6 + t>(); });
    });
  }
}

template <int NT, int Bytes>
using Sums = int32_t[NT][Bytes][kRows][kLanes];

template <int NT, int Bytes>
void store_sums(Sums<NT, Bytes>& sums) {
  unrolled<NT>([&](auto t) {
    unrolled<Bytes>([&](auto b) { store<t * Bytes + b>(sums[t][b][0]); });
  });
}

template <int NT, int Bytes>
F16 whole_sum(const Sums<NT, Bytes>& sums, int t, int64_t r) {
  I16 sum = I16::load(sums[t][0][r]);
  if constexpr (Bytes == 2) sum = times256(I16::load(sums[t][1][r])) + sum;
  return to_float(sum);
}

// The same for a weight of one group of inputs that adds: an adapter's B.
template <int NT, int Bytes>
void add(const Codes (&codes)[NT], const Rounded& x, int64_t row, int64_t rows, const Weight& w,
         int64_t tile, float* y) {
  alignas(64) Sums<NT, Bytes> sums;
  sum_group<NT, Bytes>(codes, x, row, 0, w.in);
  store_sums<NT, Bytes>(sums);
  unrolled<NT>([&](auto t) {
    const int64_t column = (tile + t) * kLanes;
    const int n = static_cast<int>(std::min<int64_t>(kLanes, w.out - column));
    for (int64_t r = 0; r < rows; ++r) {
      float* at = y + r * w.out + column;
      const F16 step = F16::set1(x.steps[row + r]);
      const F16 sum = fma(whole_sum<NT, Bytes>(sums, t, r), step, F16::zero());
      n == kLanes ? (sum + F16::load(at)).store(at) : (sum + F16::load_n(at, n)).store_n(at, n);
    }
  });
}

// y for at most a tile of rows and NT of outputs.
template <int NT, int Bytes>
void multiply(const Codes (&codes)[NT], const Rounded& x, int64_t row, int64_t rows, const Weight& w,
              int64_t tile, float* y) {
  alignas(64) Sums<NT, Bytes> of_group;
  alignas(64) float sums[NT][kRows][kLanes] = {};
  const auto add_group = [&](int64_t g) {
    const float* steps = x.steps + row * x.groups + g;
    unrolled<NT>([&](auto t) {
      const F16 scale = w.nf4 ? nf4_scale(w, tile + t, g) : F16::set1(1.f);
      unrolled<kRows>([&](auto r) {
        const F16 sum = whole_sum<NT, Bytes>(of_group, t, r);
        float* total = sums[t][r];
        fma(sum * scale, F16::set1(steps[r * x.groups]), F16::load(total)).store(total);
      });
    });
  };
  // While one group's products are on their way, the last one's are added up.
  for (int64_t g = 0; g < x.groups; ++g) {
    const int64_t from = g * x.group;
    sum_group<NT, Bytes>(codes, x, row, from, std::min(from + x.group, w.in));
    if (g > 0) add_group(g - 1);
    store_sums<NT, Bytes>(of_group);
  }
  add_group(x.groups - 1);
  for (int t = 0; t < NT; ++t) {
    const Last last(w, tile + t);
    for (int64_t r = 0; r < rows; ++r) last.store(F16::load(sums[t][r]), y + r * w.out);
  }
}

template <int NT, int Bytes, class Tiles>
void block(const Tiles& tiles, const Rounded& x, int64_t row, int64_t rows, const Weight& w,
           int64_t tile, float* y) {
  const int64_t size = codes_bytes(w);
  auto* memory = reinterpret_cast<int8_t*>(scratch(NT * size / sizeof(float)));
  Codes codes[NT];
  for (int t = 0; t < NT; ++t) codes[t] = codes_of(w, tiles, tile + t, memory + t * size);
  const auto some_rows = w.adds && x.groups == 1 ? add<NT, Bytes> : multiply<NT, Bytes>;
  for (int64_t r = 0; r < rows; r += kRows)
    some_rows(codes, x, row + r, std::min(kRows, rows - r), w, tile, y + r * w.out);
}

template <int Bytes, class Tiles>
void blocks(const Tiles& tiles, const Rounded& x, int64_t row, int64_t rows, const Weight& w,
            int64_t tile, int64_t end, float* y) {
  const Registers registers(rows, depth_of(w));
  for (; tile + 2 <= end; tile += 2) block<2, Bytes>(tiles, x, row, rows, w, tile, y);
  if (tile < end) block<1, Bytes>(tiles, x, row, rows, w, tile, y);
}

}  // namespace

bool multiply_amx(const Rounded& x, int64_t row, int64_t rows, const Weight& w, int64_t tile,
                  int64_t end, int64_t ahead, float* y) {
  static const bool have_registers = ask_for_registers();
  if (!have_registers || rows < kFewestRows || (x.groups > 1 && x.group % kDepth)) return false;
  with_integers(w, ahead, [&](const auto& tiles, auto bytes) {
    blocks<decltype(bytes)::value>(tiles, x, row, rows, w, tile, end, y);
  });
  return true;
}

}  // namespace polypeft

#else

namespace polypeft {

bool multiply_amx(const Rounded&, int64_t, int64_t, const Weight&, int64_t, int64_t, int64_t,
                  float*) {
  return false;
}

}  // namespace polypeft

#endif
