// Sixteen floats: the one vector type of the kernels, whatever the machine's own width is.
//
// AVX-512, AVX2, or the compiler's portable vectors (NEON on aarch64). Kernels are written once
// against F16; a reduction has one fixed order, so a result does not depend on how it was tiled.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace polypeft {

using Half = c10::Half;
using BFloat16 = c10::BFloat16;

constexpr int kLanes = 16;
constexpr int kQuadBytes = 64;  // four of each lane

template <int N>
using Int = std::integral_constant<int, N>;

// Ask for the cache line at p, to be read soon. Any address will do.
inline void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void fetch(const void* p, int64_t num_bytes) {
  for (int64_t at = 0; at < num_bytes; at += 64) fetch(static_cast<const char*>(p) + at);
}

#define POLYPEFT_INLINE __attribute__((always_inline))

// f(Int<0>()), … f(Int<N - 1>()): arrays indexed by these stay in registers, where the compiler
// unrolls a loop too late for that.
template <int N, int I = 0, class F>
POLYPEFT_INLINE inline void unrolled(const F& f) {
  if constexpr (I < N) {
    f(Int<I>());
    unrolled<N, I + 1>(f);
  }
}

#if defined(__AVX512F__)

struct F16 {
  __m512 v;

  static F16 zero() { return {_mm512_setzero_ps()}; }
  static F16 set1(float x) { return {_mm512_set1_ps(x)}; }
  static F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F16 load(const Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static F16 load(const BFloat16* p) {
    __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  // Byte J of each lane's four, signed.
  template <int J>
  static F16 byte(const int8_t* p) {
    __m512i quads = _mm512_loadu_si512(p);
    return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(quads, 24 - 8 * J), 24))};
  }
  static F16 load_n(const float* p, int n) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(Half* p) const {
    __m256i half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  }
  void store(BFloat16* p) const {  // to the nearest, ties to even
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
  }
  void store_n(float* p, int n) const {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
  }
};

inline F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 sqrt(F16 a) { return {_mm512_sqrt_ps(a.v)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 round(F16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a · 2^n for whole n.
inline F16 scale2(F16 a, F16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }

// The table's values at nibble N of sixteen 32-bit words.
struct Table16 {
  __m512 v;
  explicit Table16(const float* p) : v(_mm512_loadu_ps(p)) {}
  template <int N>
  F16 at(const uint8_t* p) const {  // the permutation reads four bits of each index
    return {_mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_loadu_si512(p), 4 * N), v)};
  }
};

#elif defined(__AVX2__)

struct F16 {
  __m256 v[2];

  static F16 zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
  static F16 set1(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
  static F16 load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
  static F16 load(const Half* p) {
    auto at = reinterpret_cast<const __m128i*>(p);
    return {{_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))}};
  }
  static F16 load(const BFloat16* p) {
    auto at = reinterpret_cast<const __m128i*>(p);
    auto widen = [](__m128i b) {
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16));
    };
    return {{widen(_mm_loadu_si128(at)), widen(_mm_loadu_si128(at + 1))}};
  }
  template <int J>
  static F16 byte(const int8_t* p) {
    auto at = reinterpret_cast<const __m256i*>(p);
    auto widen = [](__m256i quads) {
      return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(quads, 24 - 8 * J), 24));
    };
    return {{widen(_mm256_loadu_si256(at)), widen(_mm256_loadu_si256(at + 1))}};
  }
  static F16 load_n(const float* p, int n) {
    alignas(32) float full[kLanes] = {};
    std::memcpy(full, p, sizeof(float) * n);
    return load(full);
  }
  void store(float* p) const {
    _mm256_storeu_ps(p, v[0]);
    _mm256_storeu_ps(p + 8, v[1]);
  }
  void store(Half* p) const {
    auto at = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(at, _mm256_cvtps_ph(v[0], _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(at + 1, _mm256_cvtps_ph(v[1], _MM_FROUND_TO_NEAREST_INT));
  }
  void store(BFloat16* p) const {
    alignas(32) float full[kLanes];
    store(full);
    for (int i = 0; i < kLanes; ++i) p[i] = full[i];
  }
  void store_n(float* p, int n) const {
    alignas(32) float full[kLanes];
    store(full);
    std::memcpy(p, full, sizeof(float) * n);
  }
};

#define POLYPEFT_EACH(op, ...) F16 r; for (int i = 0; i < 2; ++i) r.v[i] = op(__VA_ARGS__); return r
inline F16 operator+(F16 a, F16 b) { POLYPEFT_EACH(_mm256_add_ps, a.v[i], b.v[i]); }
inline F16 operator-(F16 a, F16 b) { POLYPEFT_EACH(_mm256_sub_ps, a.v[i], b.v[i]); }
inline F16 operator*(F16 a, F16 b) { POLYPEFT_EACH(_mm256_mul_ps, a.v[i], b.v[i]); }
inline F16 operator/(F16 a, F16 b) { POLYPEFT_EACH(_mm256_div_ps, a.v[i], b.v[i]); }
inline F16 sqrt(F16 a) { POLYPEFT_EACH(_mm256_sqrt_ps, a.v[i]); }
inline F16 fma(F16 a, F16 b, F16 c) { POLYPEFT_EACH(_mm256_fmadd_ps, a.v[i], b.v[i], c.v[i]); }
inline F16 max(F16 a, F16 b) { POLYPEFT_EACH(_mm256_max_ps, a.v[i], b.v[i]); }
inline F16 min(F16 a, F16 b) { POLYPEFT_EACH(_mm256_min_ps, a.v[i], b.v[i]); }
inline F16 round(F16 a) { POLYPEFT_EACH(_mm256_round_ps, a.v[i], _MM_FROUND_TO_NEAREST_INT); }
#undef POLYPEFT_EACH
inline F16 scale2(F16 a, F16 n) {
  F16 r;
  for (int i = 0; i < 2; ++i) {
    __m256i bits = _mm256_slli_epi32(_mm256_cvtps_epi32(n.v[i]), 23);
    r.v[i] = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v[i]), bits));
  }
  return r;
}

struct Table16 {
  __m256 low, high;
  explicit Table16(const float* p) : low(_mm256_loadu_ps(p)), high(_mm256_loadu_ps(p + 8)) {}
  __m256 look_up(__m256i ids) const {  // three bits choose within a half, the fourth the half
    __m256 in_low = _mm256_permutevar8x32_ps(low, ids);
    __m256 in_high = _mm256_permutevar8x32_ps(high, ids);
    return _mm256_blendv_ps(in_low, in_high, _mm256_castsi256_ps(_mm256_slli_epi32(ids, 28)));
  }
  template <int N>
  F16 at(const uint8_t* p) const {
    auto words = reinterpret_cast<const __m256i*>(p);
    return {{look_up(_mm256_srli_epi32(_mm256_loadu_si256(words), 4 * N)),
             look_up(_mm256_srli_epi32(_mm256_loadu_si256(words + 1), 4 * N))}};
  }
};

#else

typedef float F4 __attribute__((vector_size(16)));

struct F16 {
  F4 v[4];

  static F16 set1(float x) {
    F4 q = {x, x, x, x};
    return {{q, q, q, q}};
  }
  static F16 zero() { return set1(0.f); }
  static F16 load(const float* p) {
    F16 r;
    std::memcpy(&r, p, sizeof(r));
    return r;
  }
  template <class T>
  static F16 load(const T* p) {
    float full[kLanes];
    for (int i = 0; i < kLanes; ++i) full[i] = static_cast<float>(p[i]);
    return load(full);
  }
  static F16 load_n(const float* p, int n) {
    float full[kLanes] = {};
    std::memcpy(full, p, sizeof(float) * n);
    return load(full);
  }
  template <int J>
  static F16 byte(const int8_t* p) {
    float full[kLanes];
    for (int i = 0; i < kLanes; ++i) full[i] = p[4 * i + J];
    return load(full);
  }
  void store(float* p) const { std::memcpy(p, this, sizeof(*this)); }
  template <class T>
  void store(T* p) const {
    float full[kLanes];
    store(full);
    for (int i = 0; i < kLanes; ++i) p[i] = full[i];
  }
  void store_n(float* p, int n) const { std::memcpy(p, this, sizeof(float) * n); }
};

template <class Op>
inline F16 each(F16 a, F16 b, Op op) {
  F16 r;
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) r.v[i][j] = op(a.v[i][j], b.v[i][j]);
  return r;
}
#define POLYPEFT_EACH(expression) F16 r; for (int i = 0; i < 4; ++i) r.v[i] = expression; return r
inline F16 operator+(F16 a, F16 b) { POLYPEFT_EACH(a.v[i] + b.v[i]); }
inline F16 operator-(F16 a, F16 b) { POLYPEFT_EACH(a.v[i] - b.v[i]); }
inline F16 operator*(F16 a, F16 b) { POLYPEFT_EACH(a.v[i] * b.v[i]); }
inline F16 operator/(F16 a, F16 b) { POLYPEFT_EACH(a.v[i] / b.v[i]); }
inline F16 fma(F16 a, F16 b, F16 c) { POLYPEFT_EACH(a.v[i] * b.v[i] + c.v[i]); }
#undef POLYPEFT_EACH
inline F16 max(F16 a, F16 b) {
  return each(a, b, [](float x, float y) { return x > y ? x : y; });
}
inline F16 min(F16 a, F16 b) {
  return each(a, b, [](float x, float y) { return x < y ? x : y; });
}
inline F16 sqrt(F16 a) {
  return each(a, a, [](float x, float) { return std::sqrt(x); });
}
inline F16 round(F16 a) {
  return each(a, a, [](float x, float) { return std::nearbyintf(x); });
}
inline F16 scale2(F16 a, F16 n) {
  return each(a, n, [](float x, float e) { return std::ldexp(x, static_cast<int>(e)); });
}

struct Table16 {
  float v[16];
  explicit Table16(const float* p) { std::memcpy(v, p, sizeof(v)); }
  template <int N>
  F16 at(const uint8_t* p) const {
    float found[kLanes];
    for (int i = 0; i < kLanes; ++i) found[i] = v[p[4 * i + N / 2] >> (N % 2 * 4) & 15];
    return F16::load(found);
  }
};

#endif

// One order for every machine: halves, quarters, pairs.
#if defined(__AVX512F__)
inline float sum(F16 a) { return _mm512_reduce_add_ps(a.v); }
// Lane i: `sum` of a[i], to the bit, for all sixteen at once.
inline F16 sum_each(const F16* a) {
  const auto halves = [&](int i, int j) {
    const __m512 x = a[i].v, y = a[j].v;
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
  };
  const auto quarters = [&](int i) {  // of a[i], a[i + 4], a[i + 8], a[i + 12], one beside another
    const __m512 x = halves(i, i + 4), y = halves(i + 8, i + 12);
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  };
  const auto pairs = [&](int i) {
    const __m512 x = quarters(i), y = quarters(i + 1);
    return _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
  };
  const __m512 x = pairs(0), y = pairs(2);
  return {_mm512_add_ps(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xdd))};
}
inline float max_lane(F16 a) { return _mm512_reduce_max_ps(a.v); }
#else
inline float sum(F16 a) {
  alignas(64) float x[kLanes];
  a.store(x);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}
inline F16 sum_each(const F16* a) {
  float sums[kLanes];
  for (int i = 0; i < kLanes; ++i) sums[i] = sum(a[i]);
  return F16::load(sums);
}
inline float max_lane(F16 a) {
  alignas(64) float x[kLanes];
  a.store(x);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
  return x[0];
}
#endif

// Lanes [from, to) of a, `fill` in the others.
inline F16 keep(F16 a, int from, int to, float fill) {
#if defined(__AVX512F__)
  const uint32_t kept = ((1u << to) - 1) & ~((1u << from) - 1);
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), static_cast<__mmask16>(kept), a.v)};
#else
  alignas(64) float x[kLanes];
  a.store(x);
  for (int i = 0; i < kLanes; ++i)
    if (i < from || i >= to) x[i] = fill;
  return F16::load(x);
#endif
}

template <class T>
inline F16 load_n(const T* p, int n) {
  float full[kLanes] = {};
  for (int i = 0; i < n; ++i) full[i] = static_cast<float>(p[i]);
  return F16::load(full);
}
inline F16 load_n(const float* p, int n) { return F16::load_n(p, n); }

// e^x to about 2 ulp for x ≤ 88; 0 below −87. Range reduction by ln 2, then a polynomial of degree
// 6 (the coefficients of Cephes' expf).
inline F16 exp(F16 x) {
  const F16 low = F16::set1(-87.f);
  F16 bounded = min(max(x, low), F16::set1(88.f));
  F16 n = round(bounded * F16::set1(1.44269504088896341f));
  F16 r = fma(n, F16::set1(-0.693359375f), bounded);
  r = fma(n, F16::set1(2.12194440e-4f), r);
  F16 p = F16::set1(1.9875691500e-4f);
  p = fma(p, r, F16::set1(1.3981999507e-3f));
  p = fma(p, r, F16::set1(8.3334519073e-3f));
  p = fma(p, r, F16::set1(4.1665795894e-2f));
  p = fma(p, r, F16::set1(1.6666665459e-1f));
  p = fma(p, r, F16::set1(5.0000001201e-1f));
  p = fma(p, r * r, r + F16::set1(1.f));
  p = scale2(p, n);
#if defined(__AVX512F__)
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, low.v, _CMP_NLT_UQ), p.v)};
#else
  alignas(64) float from[kLanes], to[kLanes];
  x.store(from);
  p.store(to);
  for (int i = 0; i < kLanes; ++i)
    if (from[i] < -87.f) to[i] = 0.f;
  return F16::load(to);
#endif
}

// -- dot products of bytes -------------------------------------------------------------------------

// I16: sixteen whole numbers of 32 bits. `to_nearest`: of numbers that fit, ties to even.
// `bits_of_magnitude`: of |a| as float32, which are in the order of what they stand for; infinity's are
// kInfinity, and a NaN's are above. `in_signed_bytes`: each number's bytes b such that it is
// Σ 256^j · b[j], b signed. `store_byte`: byte J of each.
constexpr int32_t kInfinity = 0x7f800000;

#if defined(__AVX512VNNI__)

struct I16 {
  __m512i v;
  static I16 zero() { return {_mm512_setzero_si512()}; }
  static I16 set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static I16 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
};
inline I16 operator+(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I16 operator-(I16 a, I16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I16 times256(I16 a) { return {_mm512_slli_epi32(a.v, 8)}; }
inline I16 max(I16 a, I16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline F16 to_float(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I16 to_nearest(F16 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline I16 bits_of_magnitude(F16 a) {
  return {_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff))};
}
inline I16 in_signed_bytes(I16 a) {
  const __m512i bias = _mm512_set1_epi8(-128);
  return {_mm512_xor_si512(_mm512_add_epi32(a.v, bias), bias)};
}
template <int J>
void store_byte(I16 a, int8_t* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_srli_epi32(a.v, 8 * J)));
}
inline int32_t sum(I16 a) { return _mm512_reduce_add_epi32(a.v); }
inline int32_t max_lane(I16 a) { return _mm512_reduce_max_epi32(a.v); }

// Four bytes in each of sixteen lanes. `biased`: signed ones, with 128 added to them.
struct Quads {
  __m512i v;
  static Quads biased(const int8_t* p) {
    return {_mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128))};
  }
  static Quads load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
  void store(uint8_t* p) const { _mm512_storeu_si512(p, v); }
};

// a + Σ (quad's bytes + 128) · the four signed bytes in each lane of x.
// As assembler because GCC 12 copies the sums of its intrinsic back and forth.
inline I16 dot(I16 a, Quads quads, I16 x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(a.v) : "v"(quads.v), "v"(x.v));
  return a;
}

// Of 64 bytes: the table's values at the low nibbles, and at the high ones.
struct NibbleTable {
  __m512i v;
  NibbleTable() = default;
  explicit NibbleTable(const uint8_t* p)
      : v(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))) {}
  void look_up(const uint8_t* p, Quads& low, Quads& high) const {
    const __m512i bytes = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
    low.v = _mm512_shuffle_epi8(v, _mm512_and_si512(bytes, mask));
    high.v = _mm512_shuffle_epi8(v, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask));
  }
};

#elif defined(__AVXVNNI__)

// Whole numbers from -128 to 127.
inline void store_bytes(__m256i a, __m256i b, int8_t* p) {
  const __m256i pairs = _mm256_packs_epi32(a, b);
  const __m256i sorted = _mm256_permute4x64_epi64(pairs, 0b11011000);  // packs work within halves
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(sorted),
                                        _mm256_extracti128_si256(sorted, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

struct I16 {
  __m256i v[2];
  static I16 zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
  static I16 set1(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
};
inline I16 operator+(I16 a, I16 b) {
  return {{_mm256_add_epi32(a.v[0], b.v[0]), _mm256_add_epi32(a.v[1], b.v[1])}};
}
inline I16 operator-(I16 a, I16 b) {
  return {{_mm256_sub_epi32(a.v[0], b.v[0]), _mm256_sub_epi32(a.v[1], b.v[1])}};
}
inline I16 times256(I16 a) {
  return {{_mm256_slli_epi32(a.v[0], 8), _mm256_slli_epi32(a.v[1], 8)}};
}
inline I16 max(I16 a, I16 b) {
  return {{_mm256_max_epi32(a.v[0], b.v[0]), _mm256_max_epi32(a.v[1], b.v[1])}};
}
inline F16 to_float(I16 a) { return {{_mm256_cvtepi32_ps(a.v[0]), _mm256_cvtepi32_ps(a.v[1])}}; }
inline I16 to_nearest(F16 a) { return {{_mm256_cvtps_epi32(a.v[0]), _mm256_cvtps_epi32(a.v[1])}}; }
inline I16 bits_of_magnitude(F16 a) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  return {{_mm256_and_si256(_mm256_castps_si256(a.v[0]), mask),
           _mm256_and_si256(_mm256_castps_si256(a.v[1]), mask)}};
}
inline I16 in_signed_bytes(I16 a) {
  const __m256i bias = _mm256_set1_epi8(-128);
  for (__m256i& v : a.v) v = _mm256_xor_si256(_mm256_add_epi32(v, bias), bias);
  return a;
}
template <int J>
void store_byte(I16 a, int8_t* p) {
  for (__m256i& v : a.v) v = _mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * J), 24);
  store_bytes(a.v[0], a.v[1], p);
}
inline int32_t sum(I16 a) {
  int32_t lanes[kLanes], total = 0;
  std::memcpy(lanes, a.v, sizeof(lanes));
  for (int32_t lane : lanes) total += lane;
  return total;
}
inline int32_t max_lane(I16 a) {
  int32_t lanes[kLanes];
  std::memcpy(lanes, a.v, sizeof(lanes));
  return *std::max_element(lanes, lanes + kLanes);
}

struct Quads {
  __m256i v[2];
  static Quads load(const uint8_t* p) {
    auto at = reinterpret_cast<const __m256i*>(p);
    return {{_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)}};
  }
  static Quads biased(const int8_t* p) {
    const __m256i bias = _mm256_set1_epi8(-128);
    Quads q = load(reinterpret_cast<const uint8_t*>(p));
    return {{_mm256_xor_si256(q.v[0], bias), _mm256_xor_si256(q.v[1], bias)}};
  }
  void store(uint8_t* p) const {
    auto at = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(at, v[0]);
    _mm256_storeu_si256(at + 1, v[1]);
  }
};
inline I16 dot(I16 a, Quads quads, I16 x) {
  return {{_mm256_dpbusd_avx_epi32(a.v[0], quads.v[0], x.v[0]),
           _mm256_dpbusd_avx_epi32(a.v[1], quads.v[1], x.v[1])}};
}

struct NibbleTable {
  __m256i v;
  NibbleTable() = default;
  explicit NibbleTable(const uint8_t* p)
      : v(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))) {}
  void look_up(const uint8_t* p, Quads& low, Quads& high) const {
    const Quads bytes = Quads::load(p);
    const __m256i mask = _mm256_set1_epi8(15);
    for (int i = 0; i < 2; ++i) {
      low.v[i] = _mm256_shuffle_epi8(v, _mm256_and_si256(bytes.v[i], mask));
      high.v[i] =
          _mm256_shuffle_epi8(v, _mm256_and_si256(_mm256_srli_epi16(bytes.v[i], 4), mask));
    }
  }
};

#else

struct I16 {
  int32_t v[kLanes];
  static I16 set1(int32_t x) {
    I16 r;
    for (int32_t& lane : r.v) lane = x;
    return r;
  }
  static I16 zero() { return set1(0); }
};
template <class Op>
inline I16 each(I16 a, I16 b, Op op) {
  I16 r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = op(a.v[i], b.v[i]);
  return r;
}
inline I16 operator+(I16 a, I16 b) {
  return each(a, b, [](int32_t x, int32_t y) { return x + y; });
}
inline I16 operator-(I16 a, I16 b) {
  return each(a, b, [](int32_t x, int32_t y) { return x - y; });
}
inline I16 times256(I16 a) {
  return each(a, a, [](int32_t x, int32_t) { return x * 256; });
}
inline I16 max(I16 a, I16 b) {
  return each(a, b, [](int32_t x, int32_t y) { return x > y ? x : y; });
}
inline I16 to_nearest(F16 a) {
  float full[kLanes];
  round(a).store(full);
  I16 r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = static_cast<int32_t>(full[i]);
  return r;
}
inline I16 bits_of_magnitude(F16 a) {
  I16 r;
  static_assert(sizeof(r) == sizeof(a));
  std::memcpy(&r, &a, sizeof(r));
  return each(r, r, [](int32_t x, int32_t) { return x & 0x7fffffff; });
}
inline I16 in_signed_bytes(I16 a) {
  return each(a, a, [](int32_t x, int32_t) {
    constexpr uint32_t kBias = 0x80808080;
    return static_cast<int32_t>((static_cast<uint32_t>(x) + kBias) ^ kBias);
  });
}
template <int J>
void store_byte(I16 a, int8_t* p) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(a.v[i] >> 8 * J);
}
inline int32_t sum(I16 a) {
  int32_t total = 0;
  for (int32_t lane : a.v) total += lane;
  return total;
}
inline int32_t max_lane(I16 a) { return *std::max_element(a.v, a.v + kLanes); }
inline F16 to_float(I16 a) {
  float full[kLanes];
  for (int i = 0; i < kLanes; ++i) full[i] = static_cast<float>(a.v[i]);
  return F16::load(full);
}

struct Quads {
  uint8_t v[kQuadBytes];
  static Quads load(const uint8_t* p) {
    Quads r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  static Quads biased(const int8_t* p) {
    Quads r;
    for (int i = 0; i < kQuadBytes; ++i) r.v[i] = static_cast<uint8_t>(p[i] + 128);
    return r;
  }
  void store(uint8_t* p) const { std::memcpy(p, v, sizeof(v)); }
};
inline I16 dot(I16 a, Quads quads, I16 x) {
  int8_t bytes[kQuadBytes];
  std::memcpy(bytes, x.v, sizeof(bytes));
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < 4; ++j) a.v[i] += quads.v[4 * i + j] * bytes[4 * i + j];
  return a;
}

struct NibbleTable {
  uint8_t v[16];
  NibbleTable() = default;
  explicit NibbleTable(const uint8_t* p) { std::memcpy(v, p, sizeof(v)); }
  void look_up(const uint8_t* p, Quads& low, Quads& high) const {
    for (int i = 0; i < kQuadBytes; ++i) {
      low.v[i] = v[p[i] & 15];
      high.v[i] = v[p[i] >> 4];
    }
  }
};

#endif

}  // namespace polypeft
