// Products of few rows with weights at 32, 16, 8 or 4 bits, as cpu_kernels.py describes them.
//
// A row of weights is read once, from its first byte to its last, and the next row lies behind it:
// one stream a thread, which is what memory delivers fastest. A row of the result is summed by one
// thread in one order, so it does not depend on how many threads or rows of x there are.
//
// Registers are as wide as the compiler is told: 512 bits with AVX-512, else 256 with AVX2. Memory
// is not read faster by wider ones, but of 4-bit weights and of several rows of x the arithmetic is
// what takes long.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t GROUP = 64;  // inputs that share a scale of x, and at 4 bits those of w
constexpr int64_t LANES = 8;   // fp32 numbers in a register

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Asks for the bytes a page ahead of what is being read: on the machines that were tried, half a page
// was a little slower, a quarter more so.
inline void read_ahead(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + 4096); }

inline float of_bf16(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float sum_of(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// ===== Registers

#ifdef __AVX512F__

using Floats = __m512;
using Ints = __m512i;
constexpr int64_t WIDE = 16;     // fp32 numbers in a register, half as many as numbers of 16 bits
constexpr int64_t TOGETHER = 8;  // rows of x whose sums fit into the registers

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats all(float v) { return _mm512_set1_ps(v); }
inline Floats plus(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats times_plus(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline __m256 eight_of(Floats v) {  // sums of two numbers each
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}
inline Floats load(const float* w) { return _mm512_loadu_ps(w); }
inline Floats load(const uint16_t* w) {  // a bf16 is the upper half of an fp32
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
// Numbers of 16 bits, as they are or from bytes.
inline Ints load(const int16_t* q) { return _mm512_loadu_si512(q); }
inline Ints load(const int8_t* w) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
}
// 4-bit weights as they lie: a register's two groups, or one and zeros. A masked load would do for
// both, but of weights in memory the sums then took 1.4 times as long.
inline Ints load(const uint8_t* w, int64_t groups) {
  if (groups > 1) return _mm512_loadu_si512(w);
  return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
}
template <int BITS>
inline Ints half_byte(Ints v) {  // of each 16 bits the four from bit BITS on
  const Ints shifted = _mm512_srli_epi16(v, BITS);
  return BITS == 12 ? shifted : _mm512_and_si512(shifted, _mm512_set1_epi16(15));
}
// Number `at` of 8 for the first group in a register, the one after it for the second.
inline Floats of_groups(__m256 v, int64_t at) {
  const Ints first = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const Ints places = _mm512_add_epi32(first, _mm512_set1_epi32(int(at)));
  return _mm512_permutexvar_ps(places, _mm512_castps256_ps512(v));
}
inline Ints products(Ints a, Ints b) { return _mm512_madd_epi16(a, b); }  // sums of two of them
#ifdef __AVX512VNNI__
inline Ints products_plus(Ints a, Ints b, Ints c) { return _mm512_dpwssd_epi32(c, a, b); }
#else
inline Ints products_plus(Ints a, Ints b, Ints c) { return _mm512_add_epi32(products(a, b), c); }
#endif
inline Floats numbers(Ints v) { return _mm512_cvtepi32_ps(v); }

#else

using Floats = __m256;
using Ints = __m256i;
constexpr int64_t WIDE = 8;
constexpr int64_t TOGETHER = 4;

inline Floats zeros() { return _mm256_setzero_ps(); }
inline Floats all(float v) { return _mm256_set1_ps(v); }
inline Floats plus(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats times_plus(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline __m256 eight_of(Floats v) { return v; }
inline Floats load(const float* w) { return _mm256_loadu_ps(w); }
inline Floats load(const uint16_t* w) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline Ints load(const int16_t* q) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
}
inline Ints load(const int8_t* w) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
}
inline Ints load(const uint8_t* w, int64_t) {  // a register holds one group
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
}
template <int BITS>
inline Ints half_byte(Ints v) {
  const Ints shifted = _mm256_srli_epi16(v, BITS);
  return BITS == 12 ? shifted : _mm256_and_si256(shifted, _mm256_set1_epi16(15));
}
inline Floats of_groups(__m256 v, int64_t at) {
  return _mm256_permutevar8x32_ps(v, _mm256_set1_epi32(int(at)));
}
inline Ints products(Ints a, Ints b) { return _mm256_madd_epi16(a, b); }
inline Ints products_plus(Ints a, Ints b, Ints c) { return _mm256_add_epi32(products(a, b), c); }
inline Floats numbers(Ints v) { return _mm256_cvtepi32_ps(v); }

#endif

constexpr int64_t WORDS = 2 * WIDE;  // numbers of 16 bits in a register
constexpr int64_t PER_WORD = 4;      // 4-bit weights in each of them
constexpr int64_t HELD = PER_WORD * WORDS / GROUP;  // groups of 4-bit weights in a register

// ===== x, rounded to 16 bits

// One row of x: groups of 64 as q·scale, with q from −32,767 to 32,767, and the sum of each group.
// A group has a scale of its own, so that one large number does not cost the others their digits.
struct Rounded {
  const int16_t* q;
  const float* scale;
  const float* sum;
};

// Rounds one group of x, of which `count` numbers are there, to q. `apart`: 0 leaves them in order;
// else every fourth input from the first on is written to q, every fourth from the second on `apart`
// numbers further, and so on, which is how 4-bit weights come out of a register (`dot_int4`).
void round_group(
    const float* x, int64_t count, int64_t apart, int16_t* q, float* scale, float* sum) {
  alignas(32) float v[GROUP] = {};
  std::memcpy(v, x, sizeof(float) * std::min(count, GROUP));
  const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 most = _mm256_setzero_ps();
  __m256 total = _mm256_setzero_ps();
  for (int64_t k = 0; k < GROUP; k += LANES) {
    const __m256 part = _mm256_load_ps(v + k);
    most = _mm256_max_ps(most, _mm256_and_ps(part, no_sign));
    total = _mm256_add_ps(total, part);
  }
  alignas(32) float m[LANES];
  _mm256_store_ps(m, most);
  const float largest = *std::max_element(m, m + LANES);
  // Where x is not finite the scale is NaN, and so is the result.
  *scale = largest / 32767 + 0 * sum_of(total);
  const __m256 factor = _mm256_set1_ps(largest > 0 ? 32767 / largest : 0);
  // of 8 numbers of 16 bits in each half of a register: 0 and 4, 1 and 5, 2 and 6, 3 and 7
  const __m256i four_apart = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
  const __m256i halves_in_turn = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  __m256i counted = _mm256_setzero_si256();
  for (int64_t k = 0; k < GROUP; k += 2 * LANES) {
    const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(v + k), factor));
    const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(v + k + LANES), factor));
    counted = _mm256_add_epi32(counted, _mm256_add_epi32(a, b));
    // Packing joins the lower halves of a and b, then their upper halves; 0xd8 puts these four
    // quarters into order.
    __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    if (!apart) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + k), both);
      continue;
    }
    both = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(both, four_apart), halves_in_turn);
    alignas(32) int16_t fours[2 * LANES];
    _mm256_store_si256(reinterpret_cast<__m256i*>(fours), both);
    for (int64_t i = 0; i < PER_WORD; i++)
      std::memcpy(q + i * apart + k / PER_WORD, fours + 4 * i, 4 * sizeof(int16_t));
  }
  // Of the rounded numbers, so that what rounding adds is multiplied by w and not by h (`dot_int4`).
  *sum = *scale * sum_of(_mm256_cvtepi32_ps(counted));
}

// fp32 numbers that a rounded row of x takes, its groups filled up to whole registers of scales.
int64_t rounded_size(int64_t inputs) {
  return round_up((inputs + GROUP - 1) / GROUP, LANES) * (GROUP / 2 + 2);
}

// `fours`: for 4-bit weights; a register of them holds HELD groups, PER_WORD · WORDS numbers.
Rounded rounded(const float* x, int64_t count, int64_t inputs, bool fours, float* to) {
  const int64_t groups = round_up((inputs + GROUP - 1) / GROUP, LANES);
  auto* const q = reinterpret_cast<int16_t*>(to);
  float* const scale = to + groups * GROUP / 2;
  float* const sum = scale + groups;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t from = std::min(g * GROUP, count);
    const int64_t of_fours = g / HELD * PER_WORD * WORDS + g % HELD * WORDS / HELD;
    round_group(
        x + from, count - from, fours ? WORDS : 0, q + (fours ? of_fours : g * GROUP), scale + g,
        sum + g);
  }
  return {q, scale, sum};
}

// ===== One row of weights times X rows of x

// Each `dot_…<X>` writes X sums. X rows at a time share what is made of a weight; each is summed as
// if it were alone.

inline float value(float number) { return number; }
inline float value(uint16_t half) { return of_bf16(half); }

// W: fp32, or uint16_t with the bits of bf16.
template <int X, class W>
void dot_floats(const W* w, int64_t n, const float* const* x, float* sums) {
  constexpr int64_t LINE = 64 / sizeof(W);  // weights that memory delivers at once
  // Two sums for each row of x: as many as there are registers for with X rows, and enough for one.
  Floats acc[X][2];
  for (int i = 0; i < X; i++) acc[i][0] = acc[i][1] = zeros();
  int64_t k = 0;
  for (; k + 2 * WIDE <= n; k += 2 * WIDE) {
    for (int64_t at = 0; at < 2 * WIDE; at += LINE) read_ahead(w + k + at);
    for (int j = 0; j < 2; j++) {
      const Floats weight = load(w + k + j * WIDE);
      for (int i = 0; i < X; i++)
        acc[i][j] = times_plus(weight, load(x[i] + k + j * WIDE), acc[i][j]);
    }
  }
  for (int i = 0; i < X; i++) {
    sums[i] = sum_of(eight_of(plus(acc[i][0], acc[i][1])));
    for (int64_t at = k; at < n; at++) sums[i] += value(w[at]) * x[i][at];
  }
}

// 127·32,767·2 fits into 32 bits, and so do the 4 or 8 such sums that a lane adds up in a group.
template <int X>
void dot_int8(const int8_t* w, int64_t n, const Rounded* x, float* sums) {
  constexpr int PARTS = GROUP / WORDS;
  Floats acc[X];
  for (int i = 0; i < X; i++) acc[i] = zeros();
  for (int64_t g = 0; g < n / GROUP; g++) {
    const int8_t* row = w + GROUP * g;
    read_ahead(row);
    Ints weight[PARTS];
    for (int j = 0; j < PARTS; j++) weight[j] = load(row + WORDS * j);
    for (int i = 0; i < X; i++) {
      const int16_t* q = x[i].q + GROUP * g;
      Ints sum = products(weight[0], load(q));
      for (int j = 1; j < PARTS; j++) sum = products_plus(weight[j], load(q + WORDS * j), sum);
      acc[i] = times_plus(all(x[i].scale[g]), numbers(sum), acc[i]);
    }
  }
  for (int i = 0; i < X; i++) sums[i] = sum_of(eight_of(acc[i]));
}

// Sums over `count` groups of 4-bit weights, at most 8, for X rows of x, from group `from` on.
//
// 16 bits of a row hold four weights that follow each other, the first in the lowest bits. So a
// register's shift by 4·i bits leaves every fourth weight from the i-th on, and x lies like that.
template <int X>
inline void add_groups(
    const uint8_t* w, __m256i steps, int64_t from, int64_t count, const Rounded* x, Floats* acc,
    __m256* rest) {
  const __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(steps, 16));
  const __m256 offset =
      _mm256_castsi256_ps(_mm256_and_si256(steps, _mm256_set1_epi32(int(0xffff0000))));
  const __m256 lowest = _mm256_fnmadd_ps(_mm256_set1_ps(8), scale, offset);
  __m256 factor[X];
  for (int i = 0; i < X; i++) {
    factor[i] = _mm256_mul_ps(scale, _mm256_loadu_ps(x[i].scale + from));
    rest[i] = _mm256_fmadd_ps(lowest, _mm256_loadu_ps(x[i].sum + from), rest[i]);
  }
  for (int64_t at = 0; at < count; at += HELD) {
    const uint8_t* const row = w + GROUP / 2 * (from + at);
    read_ahead(row);
    const Ints four = load(row, count - at);
    const Ints weight[PER_WORD] = {
        half_byte<0>(four), half_byte<4>(four), half_byte<8>(four), half_byte<12>(four)};
    for (int i = 0; i < X; i++) {
      const int16_t* const q = x[i].q + GROUP * (from + at);
      Ints sum = products(weight[0], load(q));
      for (int j = 1; j < PER_WORD; j++) sum = products_plus(weight[j], load(q + WORDS * j), sum);
      acc[i] = times_plus(of_groups(factor[i], at), numbers(sum), acc[i]);
    }
  }
}

// w = (h − 8)·scale + offset with half bytes h, so over a group Σ w x is
// scale·Σ h x + (offset − 8·scale)·Σ x. steps: pairs of bf16, scale and offset, one for a group.
template <int X>
void dot_int4(
    const uint8_t* w, const uint32_t* steps, int64_t n, const Rounded* x, float* sums) {
  Floats acc[X];
  __m256 rest[X];
  for (int i = 0; i < X; i++) {
    acc[i] = zeros();
    rest[i] = _mm256_setzero_ps();
  }
  const int64_t groups = n / GROUP;
  int64_t from = 0;
  for (; from + LANES <= groups; from += LANES) {  // 8 groups' scales and offsets at a time
    const __m256i of_eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(steps + from));
    add_groups<X>(w, of_eight, from, LANES, x, acc, rest);
  }
  if (from < groups) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(groups - from)), lanes);
    const __m256i of_rest = _mm256_maskload_epi32(reinterpret_cast<const int*>(steps + from), there);
    add_groups<X>(w, of_rest, from, groups - from, x, acc, rest);
  }
  for (int i = 0; i < X; i++) sums[i] = sum_of(_mm256_add_ps(eight_of(acc[i]), rest[i]));
}

// ===== Finishing

enum Finish : int64_t { PLAIN, GELU, GATE, RELU2 };

// e^v of 8 numbers, to the last digits of fp32: 2^n·e^r, with n whole and |r| ≤ ln 2 / 2, and e^r as
// its series to the seventh power.
inline __m256 exp_of(__m256 v) {
  v = _mm256_min_ps(_mm256_max_ps(v, _mm256_set1_ps(-87)), _mm256_set1_ps(88));  // fp32's range
  const __m256 n = _mm256_round_ps(
      _mm256_mul_ps(v, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // ln 2 in two parts, so that n·ln 2 is exact enough
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693145752f), v);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(1.42860677e-6f), r);
  __m256 e = _mm256_set1_ps(1.0f / 5040);
  for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(factor));
  const __m256i exponent = _mm256_slli_epi32(
      _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(e, _mm256_castsi256_ps(exponent));
}

// GELU(v) = v/2·(1 + erf(v/√2)), erf by formula 7.1.26 of Abramowitz and Stegun, Handbook of
// Mathematical Functions (1964), whose error is at most 1.5e-7.
inline __m256 gelu_of(__m256 v) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  const __m256 one = _mm256_set1_ps(1);
  const __m256 x = _mm256_mul_ps(_mm256_andnot_ps(sign, v), _mm256_set1_ps(0.70710678f));
  const __m256 t = _mm256_div_ps(one, _mm256_fmadd_ps(_mm256_set1_ps(0.3275911f), x, one));
  __m256 p = _mm256_set1_ps(1.061405429f);
  for (const float factor : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0.0f})
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(factor));
  const __m256 e = exp_of(_mm256_sub_ps(_mm256_setzero_ps(), _mm256_mul_ps(x, x)));
  const __m256 erf = _mm256_or_ps(_mm256_fnmadd_ps(p, e, one), _mm256_and_ps(sign, v));
  return _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(0.5f), v), _mm256_add_ps(one, erf));
}

// SiLU(v) = v / (1 + e^−v).
inline __m256 silu_of(__m256 v) {
  const __m256 one = _mm256_set1_ps(1);
  return _mm256_div_ps(v, _mm256_add_ps(one, exp_of(_mm256_sub_ps(_mm256_setzero_ps(), v))));
}

// Finishes 8 sums, of which the first `count` are written to y.
inline void finish(int64_t how, float* sums, int64_t count, float* y) {
  if (how == GELU) {
    _mm256_storeu_ps(sums, gelu_of(_mm256_loadu_ps(sums)));
  } else if (how == GATE) {
    _mm256_storeu_ps(sums, silu_of(_mm256_loadu_ps(sums)));
    for (int64_t i = 0; i < count; i++) sums[i] *= y[i];
  } else if (how == RELU2) {
    const __m256 positive = _mm256_max_ps(_mm256_setzero_ps(), _mm256_loadu_ps(sums));
    _mm256_storeu_ps(sums, _mm256_mul_ps(positive, positive));
  }
  if (count == LANES) {
    _mm256_storeu_ps(y, _mm256_loadu_ps(sums));
  } else {
    for (int64_t i = 0; i < count; i++) y[i] = sums[i];
  }
}

// ===== Several matrices, several products

// An entry of a stack's table: a matrix, and which row of x and y is its own.
struct Matrix {
  int64_t weight;   // address
  int64_t steps;    // address of int8's scales, or of int4's scales and offsets
  int64_t place;
  int64_t outputs;
  int64_t inputs;   // of quantised weights with the filler of their last group
  int64_t reads;    // numbers of x, as many as there are inputs without filler
};

// Rows of x: as they are, and, for integers, rounded.
struct Rows {
  const float* const* plain;
  const Rounded* rounded;
};

// A product. Strides are in numbers; x (S, N, in), y (S, N, width), add (S, N, out), bias (S, out).
struct Call {
  int64_t bits;
  const Matrix* matrices;
  int64_t count;  // of matrices
  int64_t rows;   // N
  const float* x;
  int64_t x_width, x_place, x_row;
  const float* add;
  int64_t add_place, add_row;
  const float* bias;
  int64_t bias_place;
  float* y;
  int64_t width, y_place, y_row;
  int64_t finish;
  float beta;
};

template <int BITS, int X>
inline void dot(const Call& call, const Matrix& m, int64_t r, const Rows& x, float* sums) {
  const int64_t at = r * m.inputs;
  const int64_t n = std::min(m.reads, call.x_width);
  if constexpr (BITS == 32) {
    dot_floats<X>(reinterpret_cast<const float*>(m.weight) + at, n, x.plain, sums);
  } else if constexpr (BITS == 16) {
    dot_floats<X>(reinterpret_cast<const uint16_t*>(m.weight) + at, n, x.plain, sums);
  } else if constexpr (BITS == 8) {
    dot_int8<X>(reinterpret_cast<const int8_t*>(m.weight) + at, m.inputs, x.rounded, sums);
    const float scale = of_bf16(reinterpret_cast<const uint16_t*>(m.steps)[r]);
    for (int i = 0; i < X; i++) sums[i] *= scale;
  } else {
    const auto* steps = reinterpret_cast<const uint32_t*>(m.steps) + at / GROUP;
    const auto* w = reinterpret_cast<const uint8_t*>(m.weight) + at / 2;
    dot_int4<X>(w, steps, m.inputs, x.rounded, sums);
  }
}

// Outputs r to r + count − 1 of a matrix, at most 8, for X rows of x from row i on.
template <int BITS, int X>
void outputs(
    const Call& call, const Matrix& m, int64_t r, int64_t count, int64_t i, const Rows& x) {
  float sums[X][LANES] = {};
  for (int64_t o = 0; o < count; o++) {
    float made[X];
    dot<BITS, X>(call, m, r + o, x, made);
    for (int j = 0; j < X; j++) {
      float sum = made[j];
      if (call.add)
        sum += call.beta * call.add[m.place * call.add_place + (i + j) * call.add_row + r + o];
      if (call.bias) sum += call.bias[m.place * call.bias_place + r + o];
      sums[j][o] = sum;
    }
  }
  for (int j = 0; j < X; j++)
    finish(call.finish, sums[j], count, call.y + m.place * call.y_place + (i + j) * call.y_row + r);
}

// The rows of x of one matrix at a time, for one thread. Kept between calls, since asking for memory
// takes longer than a small product.
struct Held {
  std::vector<const float*> plain;
  std::vector<Rounded> rounded_rows;
  std::vector<float> numbers;

  template <int BITS>
  void hold(const Call& call, const Matrix& m) {
    const int64_t count = std::min(m.reads, call.x_width);
    const int64_t size = round_up(rounded_size(m.inputs), 16);
    plain.resize(call.rows);
    for (int64_t i = 0; i < call.rows; i++)
      plain[i] = call.x + m.place * call.x_place + i * call.x_row;
    if constexpr (BITS < 16) {
      rounded_rows.resize(call.rows);
      numbers.resize(call.rows * size + 16);
      // From a multiple of 64 bytes on: a register is then read from one line of a cache.
      const auto address = reinterpret_cast<uintptr_t>(numbers.data());
      float* const to = numbers.data() + (-address % 64) / sizeof(float);
      for (int64_t i = 0; i < call.rows; i++)
        rounded_rows[i] = rounded(plain[i], count, m.inputs, BITS == 4, to + i * size);
    }
  }
};

// What one of `threads` threads does of a product: an equal share of the weights, in whole rows, of
// one matrix after the other. It makes of x what it needs itself: waiting for others that make a
// part of it takes as long, and once more the time to wake them.
template <int BITS>
void share(const Call& call, int64_t thread, int64_t threads) {
  static thread_local Held held;
  int64_t weights = 0;
  for (int64_t s = 0; s < call.count; s++)
    weights += call.matrices[s].outputs * call.matrices[s].inputs;
  const int64_t begin = weights * thread / threads;
  const int64_t end = weights * (thread + 1) / threads;
  int64_t before = 0;  // weights of the matrices so far
  for (int64_t s = 0; s < call.count; s++) {
    const Matrix& m = call.matrices[s];
    const auto row_at = [&](int64_t weight) {  // the first row that begins there or later
      const int64_t within = std::max<int64_t>(weight - before, 0);
      return std::min((within + m.inputs - 1) / m.inputs, m.outputs);
    };
    const int64_t from = row_at(begin);
    const int64_t last = row_at(end);
    if (from < last) held.hold<BITS>(call, m);
    for (int64_t r = from; r < last; r += LANES) {
      const int64_t count = std::min(LANES, last - r);
      for (int64_t i = 0; i < call.rows;) {
        const Rows x = {held.plain.data() + i, held.rounded_rows.data() + i};
        const int64_t left = call.rows - i;
        if (left >= TOGETHER) {
          outputs<BITS, TOGETHER>(call, m, r, count, i, x);
          i += TOGETHER;
        } else if (left >= TOGETHER / 2) {
          outputs<BITS, TOGETHER / 2>(call, m, r, count, i, x);
          i += TOGETHER / 2;
        } else {
          outputs<BITS, 1>(call, m, r, count, i, x);
          i++;
        }
      }
    }
    before += m.outputs * m.inputs;
    if (thread == 0 && m.outputs < call.width)  // zeros beyond a smaller matrix's outputs
      for (int64_t i = 0; i < call.rows; i++) {
        float* const at = call.y + m.place * call.y_place + i * call.y_row;
        std::fill(at + m.outputs, at + call.width, 0.0f);
      }
  }
}

int64_t weights_of(const Call& call) {  // that are read, by all rows of x
  int64_t weights = 0;
  for (int64_t s = 0; s < call.count; s++)
    weights += call.matrices[s].outputs * call.matrices[s].inputs * call.rows;
  return weights;
}

// What a thread of a team does of a product. The result is there when all threads have done theirs.
void multiply(const Call& call) {
  const auto of_bits = call.bits == 32   ? share<32>
                       : call.bits == 16 ? share<16>
                       : call.bits == 8  ? share<8>
                                         : share<4>;
  of_bits(call, omp_get_thread_num(), omp_get_num_threads());
}

// Below some 64 Ki weights waking the other threads takes longer than doing it alone.
constexpr int64_t ALONE = 65536;

// ===== Programs

// A program is a list of steps, each of which may read what those before it wrote. Its numbers lie
// in one room; a place is where some of them begin. Places below zero are arguments of the call:
// −1 stands for the first, which is nothing, −2 for the second.
struct Memory {
  float* room;
  const int64_t* arguments;
  int64_t rows;  // B, of every operand

  int64_t argument(int64_t place) const { return arguments[-1 - place]; }
  float* at(int64_t place) const {
    return place < 0 ? reinterpret_cast<float*>(argument(place)) : room + place;
  }
};

float number(int64_t bits) {  // from those of a double
  double value;
  std::memcpy(&value, &bits, 8);
  return float(value);
}

const float* constant(int64_t address) { return reinterpret_cast<const float*>(address); }

// The fields of a step after its kind are numbers, places, or addresses of constants.
enum Kind : int64_t { PRODUCT, MEAN, NORM, LAGS, JOIN, ROUTE, COPY, HAAR, PUT, FILTER };
constexpr int64_t FIELDS = 20;

Call product_of(const int64_t* f, const Memory& m) {
  return {
      f[0], reinterpret_cast<const Matrix*>(f[1]), f[2], m.rows, m.at(f[3]), f[4], f[5], f[6],
      m.at(f[7]), f[8], f[9], constant(f[10]), f[11], m.at(f[12]), f[13], f[14], f[15], f[16],
      number(f[17])};
}

// Each of these is a step for the text b of B.

// sum (B, C) gains x and loses `oldest`, into a new sum, and count (B,) becomes one more; y = sum / n
// with n = count, or the window where that is less.
// f: width, x, sum, oldest, its row, new sum, y, count, new count, window, whether sums are fp64.
template <class T>
void mean(const int64_t* f, const Memory& m, int64_t b) {
  const int64_t width = f[0];
  const float* const x = m.at(f[1]) + b * width;
  const T* const sum = reinterpret_cast<const T*>(m.at(f[2])) + b * width;
  const float* oldest = m.at(f[3]);
  if (oldest) oldest += b * m.argument(f[4]);
  T* const total = reinterpret_cast<T*>(m.at(f[5])) + b * width;
  float* const y = m.at(f[6]) + b * width;
  const int64_t count = reinterpret_cast<const int64_t*>(m.at(f[7]))[b] + 1;
  reinterpret_cast<int64_t*>(m.at(f[8]))[b] = count;
  const T n = T(oldest ? std::min(count, f[9]) : count);
  for (int64_t i = 0; i < width; i++) {
    const T value = sum[i] + x[i] - (oldest ? oldest[i] : 0);
    total[i] = value;
    y[i] = float(value / n);
  }
}

// Σ (x_i − middle)^power in 8 sums, which a compiler can keep in a register; it would not change
// the order of one sum.
template <int POWER>
float total(const float* x, int64_t count, float middle) {
  float sums[LANES] = {};
  int64_t i = 0;
  const auto term = [=](float v) { return POWER == 1 ? v - middle : (v - middle) * (v - middle); };
  for (; i + LANES <= count; i += LANES)
    for (int64_t lane = 0; lane < LANES; lane++) sums[lane] += term(x[i + lane]);
  for (; i < count; i++) sums[0] += term(x[i]);
  return sum_of(_mm256_loadu_ps(sums));
}

// x (B, C) gains gamma·e; y (B, P) is its layer norm, filled up with zeros.
// f: width of x, of y, x, e, gamma, the sum, weight, bias, eps, y.
void norm(const int64_t* f, const Memory& m, int64_t b) {
  const int64_t width = f[0];
  const float* const gamma = constant(f[4]);
  const float* const weight = constant(f[6]);
  const float* const bias = constant(f[7]);
  const float* x = m.at(f[2]) + b * width;
  if (gamma) {
    const float* const e = m.at(f[3]) + b * width;
    float* const gained = m.at(f[5]) + b * width;
    for (int64_t i = 0; i < width; i++) gained[i] = x[i] + e[i] * gamma[i];
    x = gained;
  }
  const float middle = total<1>(x, width, 0) / width;
  const float scale = 1 / std::sqrt(total<2>(x, width, middle) / width + number(f[8]));
  float* const y = m.at(f[9]) + b * f[1];
  for (int64_t i = 0; i < width; i++) y[i] = (x[i] - middle) * scale * weight[i] + bias[i];
  std::fill(y + width, y + f[1], 0.0f);
}

// y (J, B, P): of each level the sum of its k lags by their shares (J, k), and bias (J, P). A tape
// has entries (J, P); offsets (J, k) say which.
// f: levels, lags of each, width, the tape, its row, offsets, shares, bias, y.
void lags(const int64_t* f, const Memory& m, int64_t b) {
  const int64_t levels = f[0];
  const int64_t count = f[1];
  const int64_t width = f[2];
  const float* const tape = m.at(f[3]) + b * m.argument(f[4]);
  const auto* const offsets = reinterpret_cast<const int64_t*>(f[5]);
  for (int64_t j = 0; j < levels; j++) {
    float* const y = m.at(f[8]) + (j * m.rows + b) * width;
    std::memcpy(y, constant(f[7]) + j * width, sizeof(float) * width);
    for (int64_t k = j * count; k < (j + 1) * count; k++) {
      const float share = constant(f[6])[k];
      const float* const past = tape + (offsets[k] * levels + j) * width;
      for (int64_t i = 0; i < width; i++) y[i] += share * past[i];
    }
  }
}

// c (S, B, P) gains context (B, C) · gains (S, P).
// f: scales, channels, width, c, context, gains.
void join(const int64_t* f, const Memory& m, int64_t b) {
  const int64_t width = f[1];  // C
  const float* const context = m.at(f[4]) + b * width;
  for (int64_t s = 0; s < f[0]; s++) {
    float* const c = m.at(f[3]) + (s * m.rows + b) * f[2];
    const float* const gains = constant(f[5]) + s * f[2];
    for (int64_t i = 0; i < width; i++) c[i] += context[i] * gains[i];
  }
}

// y = routing (S, S) · c (S, B, P): sums over scales.
// f: scales, width, c, shares, y.
void route(const int64_t* f, const Memory& m, int64_t b) {
  const int64_t scales = f[0];
  const int64_t width = f[1];
  for (int64_t s = 0; s < scales; s++) {
    float* const y = m.at(f[4]) + (s * m.rows + b) * width;
    std::fill(y, y + width, 0.0f);
    for (int64_t t = 0; t < scales; t++) {
      const float share = constant(f[3])[s * scales + t];
      const float* const c = m.at(f[2]) + (t * m.rows + b) * width;
      for (int64_t i = 0; i < width; i++) y[i] += share * c[i];
    }
  }
}

// The first numbers of each row of x, as those of y.
// f: width, x, its row, y, its row.
void copy(const int64_t* f, const Memory& m, int64_t b) {
  std::memcpy(m.at(f[3]) + b * f[4], m.at(f[1]) + b * f[2], sizeof(float) * f[0]);
}

// A level of the fixed wavelet: from its input x and the lag (B, n, P), whose oldest entry leaves it
// as x joins it, into a new one, to detail = (x − oldest)/√2 and approx = (x + oldest)/√2.
// f: n, width, x, past, new past, detail, approx.
void haar(const int64_t* f, const Memory& m, int64_t b) {
  const int64_t n = f[0];
  const int64_t width = f[1];
  const float* const x = m.at(f[2]) + b * width;
  const float* const past = m.at(f[3]) + b * n * width;
  float* const now = m.at(f[4]) + b * n * width;
  std::memcpy(now, past + width, sizeof(float) * (n - 1) * width);
  std::memcpy(now + (n - 1) * width, x, sizeof(float) * width);
  float* const detail = m.at(f[5]) + b * width;
  float* const approx = m.at(f[6]) + b * width;
  for (int64_t i = 0; i < width; i++) {
    detail[i] = (x[i] - past[i]) * float(M_SQRT1_2);
    approx[i] = (x[i] + past[i]) * float(M_SQRT1_2);
  }
}

// An entry of a tape: y (B, J, P), whose rows lie apart, becomes x (J, B, P).
// f: J, width, x, y, its row.
void put(const int64_t* f, const Memory& m, int64_t b) {
  const int64_t width = f[1];
  float* const y = m.at(f[3]) + b * m.argument(f[4]);
  for (int64_t j = 0; j < f[0]; j++)
    std::memcpy(y + j * width, m.at(f[2]) + (j * m.rows + b) * width, sizeof(float) * width);
}

// y = Σ taps ⊙ (the n inputs before, x), the oldest first; past (B, n, C), which x joins in a new one.
// f: n, width, x, past, new past, taps, y.
void filter(const int64_t* f, const Memory& m, int64_t b) {
  const int64_t n = f[0];
  const int64_t width = f[1];
  const float* const x = m.at(f[2]) + b * width;
  const float* const past = m.at(f[3]) + b * n * width;
  float* const now = m.at(f[4]) + b * n * width;
  if (n > 0) {
    std::memcpy(now, past + width, sizeof(float) * (n - 1) * width);
    std::memcpy(now + (n - 1) * width, x, sizeof(float) * width);
  }
  float* const y = m.at(f[6]) + b * width;
  for (int64_t t = 0; t <= n; t++) {
    const float* const taps = constant(f[5]) + t * width;
    const float* const input = t < n ? past + t * width : x;
    for (int64_t i = 0; i < width; i++) y[i] = (t ? y[i] : 0) + taps[i] * input[i];
  }
}

void small_step(const int64_t* step, const Memory& m, int64_t b) {
  const int64_t* const f = step + 1;
  switch (step[0]) {
    case MEAN: return f[10] ? mean<double>(f, m, b) : mean<float>(f, m, b);
    case NORM: return norm(f, m, b);
    case LAGS: return lags(f, m, b);
    case JOIN: return join(f, m, b);
    case ROUTE: return route(f, m, b);
    case COPY: return copy(f, m, b);
    case HAAR: return haar(f, m, b);
    case PUT: return put(f, m, b);
    case FILTER: return filter(f, m, b);
  }
}

// ===== Unpacking

// The bits of the bf16 nearest to each of 8 numbers, in the lower halves; even ones at ties.
inline __m256i bf16_of(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
}

// A row of 4-bit weights, n of them, as `dot_int4` has it, to fp32 or bf16.
void unpack_row(const uint8_t* w, const uint16_t* steps, int64_t n, bool to_bf16, void* to) {
  const __m256i low = _mm256_set1_epi32(15);
  for (int64_t k = 0; k < n; k += 2 * LANES) {  // 8 bytes at a time
    const __m256 scale = _mm256_set1_ps(of_bf16(steps[2 * (k / GROUP)]));
    const __m256 offset = _mm256_set1_ps(of_bf16(steps[2 * (k / GROUP) + 1]));
    const __m256 lowest = _mm256_fnmadd_ps(_mm256_set1_ps(8), scale, offset);
    const auto* at = reinterpret_cast<const __m128i*>(w + k / 2);
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(at));
    const __m256i first = _mm256_and_si256(bytes, low);
    const __m256i second = _mm256_srli_epi32(bytes, 4);
    const __m256 even = _mm256_fmadd_ps(_mm256_cvtepi32_ps(first), scale, lowest);
    const __m256 odd = _mm256_fmadd_ps(_mm256_cvtepi32_ps(second), scale, lowest);
    if (to_bf16) {
      auto* const out = reinterpret_cast<__m256i*>(static_cast<uint16_t*>(to) + k);
      _mm256_storeu_si256(
          out, _mm256_or_si256(bf16_of(even), _mm256_slli_epi32(bf16_of(odd), 16)));
    } else {
      float* const out = static_cast<float*>(to) + k;
      const __m256 front = _mm256_unpacklo_ps(even, odd);  // in each half of the register
      const __m256 back = _mm256_unpackhi_ps(even, odd);
      _mm256_storeu_ps(out, _mm256_permute2f128_ps(front, back, 0x20));
      _mm256_storeu_ps(out + LANES, _mm256_permute2f128_ps(front, back, 0x31));
    }
  }
}

}  // namespace

// Rows of 4-bit weights (count, inputs), inputs in whole groups, to fp32 or bf16 (rows, inputs):
// those that `which` names, or, without it, the first ones. Gives 0 where one is not among them.
extern "C" int64_t unpack(
    const uint8_t* w, const uint16_t* steps, int64_t count, int64_t inputs, const int64_t* which,
    int64_t rows, int64_t to_bf16, void* to) {
  const int64_t bytes = to_bf16 ? 2 : 4;
  for (int64_t i = 0; which && i < rows; i++)
    if (which[i] < 0 || which[i] >= count) return 0;
  const auto unpack_one = [=](int64_t i) {
    const int64_t r = which ? which[i] : i;
    unpack_row(
        w + r * inputs / 2, steps + 2 * r * inputs / GROUP, inputs, to_bf16,
        static_cast<char*>(to) + i * inputs * bytes);
  };
  if (rows * inputs <= ALONE) {
    for (int64_t i = 0; i < rows; i++) unpack_one(i);
    return 1;
  }
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < rows; i++) unpack_one(i);
  return 1;
}

extern "C" void product(
    int64_t bits, const void* table, int64_t count, int64_t rows, const float* x, int64_t x_width,
    int64_t x_place, int64_t x_row, const float* add, int64_t add_place, int64_t add_row,
    const float* bias, float* y, int64_t width, int64_t y_place, int64_t y_row, int64_t how,
    float beta) {
  const Call call = {
      bits,    static_cast<const Matrix*>(table), count, rows, x,     x_width, x_place, x_row, add,
      add_place, add_row, bias, 0, y, width, y_place, y_row, how, beta};
#pragma omp parallel if (weights_of(call) > ALONE)
  multiply(call);
}

// Makes the steps of a program, FIELDS numbers each, for `rows` texts.
extern "C" void program(
    const int64_t* steps, int64_t count, int64_t rows, float* room, const int64_t* arguments) {
  static thread_local std::vector<Call> calls_kept;
  const Memory memory = {room, arguments, rows};
  const auto is_product = [=](int64_t i) { return steps[i * FIELDS] == PRODUCT; };
  calls_kept.resize(count);
  Call* const calls = calls_kept.data();  // other threads would see a vector of their own
  int64_t weights = 0;
  for (int64_t i = 0; i < count; i++) {
    if (!is_product(i)) continue;
    calls[i] = product_of(steps + i * FIELDS + 1, memory);
    weights += weights_of(calls[i]);
  }
  // All in one parallel region: between two steps the threads don't go to sleep.
#pragma omp parallel if (weights > ALONE)
  for (int64_t i = 0; i < count;) {
    if (is_product(i)) {
      multiply(calls[i++]);
#pragma omp barrier
      continue;
    }
    int64_t end = i;
    while (end < count && !is_product(end)) end++;
    // Of other texts none of these steps reads anything.
#pragma omp for schedule(static)
    for (int64_t b = 0; b < rows; b++)
      for (int64_t j = i; j < end; j++) small_step(steps + j * FIELDS, memory, b);
    i = end;
  }
}
