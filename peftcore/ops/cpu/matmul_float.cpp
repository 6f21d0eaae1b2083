#include "matmul.h"
#include "parallel.h"
#include "tiles.h"

namespace polypeft {
namespace {

// Register tiles: rows × tiles of sixteen outputs. Each output is summed over the inputs one after
// another, by whichever tile: that is why no result depends on the number of rows.
#if defined(__AVX512F__)
constexpr int kRows = 6, kTiles = 4, kTall = 16;
#else
constexpr int kRows = 6, kTiles = 1, kTall = 6;
#endif
constexpr int64_t kPanelInputs = 1024;  // inputs of a widened panel: it stays in the L2 cache

// A widened panel [inputs][NT][16] of one tile and range of inputs.
struct Panel {
  const float* values;

  template <int NT, class Use>
  void step(int64_t, int64_t from, int64_t to, const Use& use) const {
    const float* at = values;
    for (int64_t k = from; k < to; ++k, at += NT * kLanes) {
      F16 w[NT];
      for (int t = 0; t < NT; ++t) w[t] = F16::load(at + t * kLanes);
      use(k, w);
    }
  }
};

// Inputs as they are, [rows][in], or transposed, [in][rows] for all the rows of a tall tile.
struct Rows {
  const float* x;
  int64_t in;
  float at(int r, int64_t k) const { return x[r * in + k]; }
};
template <int MR>
struct Columns {
  const float* x;
  float at(int r, int64_t k) const { return x[k * MR + r]; }
};

// y[r][t] over MR rows and NT tiles: starts at 0 where `from` is 0 and the weight does not add, else goes
// on from y.
template <int MR, int NT, class Tiles, class Inputs>
void multiply(const Tiles& tiles, const Inputs& x, const Weight& w, int64_t tile, int64_t from,
              int64_t to, float* y) {
  const int64_t in = w.in, out = w.out, column = tile * kLanes;
  const int last = static_cast<int>(std::min<int64_t>(kLanes, out - column - (NT - 1) * kLanes));
  F16 acc[MR][NT];
  for (int r = 0; r < MR; ++r)
    for (int t = 0; t < NT; ++t) {
      const float* at = y + r * out + column + t * kLanes;
      acc[r][t] = from == 0 && !w.adds             ? F16::zero()
                  : t + 1 < NT || last == kLanes ? F16::load(at)
                                                 : F16::load_n(at, last);
    }
  tiles.template step<NT>(tile, from, to, [&](int64_t k, const F16(&weight)[NT]) {
    for (int r = 0; r < MR; ++r) {
      const F16 value = F16::set1(x.at(r, k));
      for (int t = 0; t < NT; ++t) acc[r][t] = fma(value, weight[t], acc[r][t]);
    }
  });
  const bool finished = to == in, has_scale = finished && !w.nf4 && w.scales;
  for (int t = 0; t < NT; ++t) {
    const int n = t + 1 < NT ? kLanes : last;
    const int64_t c = column + t * kLanes;
    F16 scale, bias;
    if (has_scale) scale = F16::load(w.scales + c);
    if (finished && w.bias) bias = F16::load_n(w.bias + c, n);
    for (int r = 0; r < MR; ++r) {
      F16 value = acc[r][t];
      if (has_scale) value = value * scale;
      if (finished && w.bias) value = value + bias;
      float* at = y + r * out + c;
      n == kLanes ? value.store(at) : value.store_n(at, n);
    }
  }
}

template <int NT, class Tiles, int MR = kRows>
void multiply_rows(int rows, const Tiles& tiles, const float* x, const Weight& w, int64_t tile,
                   int64_t from, int64_t to, float* y) {
  if (rows == MR) return multiply<MR, NT>(tiles, Rows{x, w.in}, w, tile, from, to, y);
  if constexpr (MR > 1)
    multiply_rows<NT, Tiles, MR - 1>(rows, tiles, x, w, tile, from, to, y);
}

// Up to kTall rows at once over one tile: every weight is widened once, and in the loop. x: [in][rows].
template <class Tiles, int MR = kTall>
void multiply_tall(int rows, const Tiles& tiles, const float* x, const Weight& w, int64_t tile,
                   float* y) {
  if (rows == MR) return multiply<MR, 1>(tiles, Columns<MR>{x}, w, tile, 0, w.in, y);
  if constexpr (MR > kRows + 1) multiply_tall<Tiles, MR - 1>(rows, tiles, x, w, tile, y);
}

// Rows in register tiles of nearly one size.
template <int NT, class Tiles>
void all_rows(const Tiles& tiles, const float* x, int64_t rows, const Weight& w, int64_t tile,
              int64_t from, int64_t to, float* y) {
  const int64_t parts = (rows + kRows - 1) / kRows;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t start = rows * i / parts, stop = rows * (i + 1) / parts;
    multiply_rows<NT>(static_cast<int>(stop - start), tiles, x + start * w.in, w, tile, from, to,
                      y + start * w.out);
  }
}

template <int NT, class Tiles>
void widen(const Tiles& tiles, int64_t tile, int64_t from, int64_t to, float* panel) {
  tiles.template step<NT>(tile, from, to, [&](int64_t, const F16(&w)[NT]) {
    for (int t = 0; t < NT; ++t) w[t].store(panel + t * kLanes);
    panel += NT * kLanes;
  });
}

// All rows of NT tiles from `tile`: up to kRows the loop widens the weights, else a panel is widened
// once for all of them.
template <int NT, class Tiles>
void block(const Tiles& tiles, const float* x, int64_t rows, const Weight& w, int64_t tile,
           float* y) {
  if (rows <= kRows) return all_rows<NT>(tiles, x, rows, w, tile, 0, w.in, y);
  float* panel = scratch(kPanelInputs * NT * kLanes);
  for (int64_t from = 0; from < w.in; from += kPanelInputs) {
    const int64_t to = std::min(from + kPanelInputs, w.in);
    widen<NT>(tiles, tile, from, to, panel);
    all_rows<NT>(Panel{panel}, x, rows, w, tile, from, to, y);
  }
}

// W x + b for the tiles [tile, end). x: [rows][in], or [in][rows] where all the launch's rows make
// a tall tile: a last block may have as few rows, but has them as they are.
template <class Tiles>
void blocks(const Tiles& tiles, const float* x, int64_t rows, bool tall, const Weight& w,
            int64_t tile, int64_t end, float* y) {
  if (tall) {
    for (; tile < end; ++tile)
      multiply_tall(static_cast<int>(rows), tiles, x, w, tile, y);
    return;
  }
  for (; tile + kTiles <= end; tile += kTiles) block<kTiles>(tiles, x, rows, w, tile, y);
  if constexpr (kTiles > 2)
    for (; tile + 2 <= end; tile += 2) block<2>(tiles, x, rows, w, tile, y);
  for (; tile < end; ++tile) block<1>(tiles, x, rows, w, tile, y);
}

}  // namespace

bool is_tall(int64_t rows) { return rows > kRows && rows <= kTall; }

void multiply_float(const float* x, int64_t rows, bool tall, const Weight& w, int64_t tile,
                    int64_t end, int64_t ahead, float* y) {
  if (w.nf4)
    blocks(Nf4Tiles(w, ahead), x, rows, tall, w, tile, end, y);
  else
    blocks(Int8Tiles(w, ahead), x, rows, tall, w, tile, end, y);
}

namespace {

template <class Tiles, class T>
void unpack_tile(const Tiles& tiles, const Weight& w, int64_t tile, int64_t start, int64_t stop,
                 bool scaled, T* out) {
  const int64_t first = std::max(start, tile * kLanes), width = stop - start;
  const int skipped = static_cast<int>(first - tile * kLanes);
  const int n = static_cast<int>(std::min(stop, (tile + 1) * kLanes) - first);
  const F16 scale = scaled && !w.nf4 ? F16::load(w.scales + tile * kLanes) : F16::set1(1.f);
  T* row = out + first - start;
  tiles.template step<1>(tile, 0, w.in, [&](int64_t, const F16(&value)[1]) {
    if (n == kLanes) {
      (value[0] * scale).store(row);
    } else {
      T full[kLanes];
      (value[0] * scale).store(full);
      std::copy(full + skipped, full + skipped + n, row);
    }
    row += width;
  });
}

template <class T>
void unpack_as(const Weight& w, int64_t start, int64_t stop, bool scaled, T* out) {
  const int64_t first = start / kLanes, last = (stop + kLanes - 1) / kLanes;
  for_each_task(last - first, true, [&](int64_t i) {
    if (w.nf4)
      unpack_tile(Nf4Tiles(w, 0), w, first + i, start, stop, scaled, out);
    else
      unpack_tile(Int8Tiles(w, 0), w, first + i, start, stop, scaled, out);
  });
}

}  // namespace

void unpack(const Weight& w, int64_t start, int64_t stop, bool scaled, void* out, Type type) {
  if (type == Type::kBFloat16)
    unpack_as(w, start, stop, scaled, static_cast<BFloat16*>(out));
  else
    unpack_as(w, start, stop, scaled, static_cast<float*>(out));
}

}  // namespace polypeft
