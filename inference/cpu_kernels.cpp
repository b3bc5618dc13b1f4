// Products of few rows with weights at 32, 16, 8 or 4 bits, as cpu_kernels.py describes them.
//
// A row of weights is read once, from its first byte to its last, and the next row lies behind it:
// one stream a thread, which is what memory delivers fastest. A row of the result is summed by one
// thread in one order, so it does not depend on how many threads or rows of x there are.
//
// AVX2 throughout: wider registers would not read memory faster.

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

// ===== x, rounded to 16 bits

// One row of x: groups of 64 as q·scale, with q from −32,767 to 32,767, and the sum of each group.
// A group has a scale of its own, so that one large number does not cost the others their digits.
struct Rounded {
  const int16_t* q;
  const float* scale;
  const float* sum;
};

// Rounds one group of x, of which `count` numbers are there. With `halves` even inputs come first
// and odd ones after them, as a row of 4-bit weights has them in its low and high half bytes.
void round_group(const float* x, int64_t count, bool halves, int16_t* q, float* scale, float* sum) {
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
  const __m256i even_first = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  __m256i counted = _mm256_setzero_si256();
  for (int64_t k = 0; k < GROUP; k += 2 * LANES) {
    __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(v + k), factor));
    __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(v + k + LANES), factor));
    counted = _mm256_add_epi32(counted, _mm256_add_epi32(a, b));
    if (halves) {
      a = _mm256_permutevar8x32_epi32(a, even_first);
      b = _mm256_permutevar8x32_epi32(b, even_first);
    }
    // Packing joins the lower halves of a and b, then their upper halves. With `halves` these are
    // the even and the odd inputs; without, 0xd8 puts the four quarters into order.
    __m256i both = _mm256_packs_epi32(a, b);
    if (halves) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + k / 2), _mm256_castsi256_si128(both));
      _mm_storeu_si128(
          reinterpret_cast<__m128i*>(q + GROUP / 2 + k / 2), _mm256_extracti128_si256(both, 1));
    } else {
      both = _mm256_permute4x64_epi64(both, 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + k), both);
    }
  }
  // Of the rounded numbers, so that what rounding adds is multiplied by w and not by h (`dot_int4`).
  *sum = *scale * sum_of(_mm256_cvtepi32_ps(counted));
}

// ===== One row of weights times X rows of x

// Each `dot_…<X>` writes X sums. X rows at a time share what is made of a weight; each is summed as
// if it were alone.

inline float value(float number) { return number; }
inline float value(uint16_t half) { return of_bf16(half); }

inline __m256 load8(const float* w) { return _mm256_loadu_ps(w); }

inline __m256 load8(const uint16_t* w) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
  // a bf16 is the upper half of an fp32
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// W: fp32, or uint16_t with the bits of bf16.
template <int X, class W>
void dot_floats(const W* w, int64_t n, const float* const* x, float* sums) {
  constexpr int64_t LINE = 64 / sizeof(W);  // weights that memory delivers at once
  __m256 acc[X][4];
  for (int i = 0; i < X; i++)
    for (int j = 0; j < 4; j++) acc[i][j] = _mm256_setzero_ps();
  int64_t k = 0;
  for (; k + 4 * LANES <= n; k += 4 * LANES) {
    for (int64_t at = 0; at < 4 * LANES; at += LINE) read_ahead(w + k + at);
    for (int j = 0; j < 4; j++) {
      const __m256 weight = load8(w + k + j * LANES);
      for (int i = 0; i < X; i++)
        acc[i][j] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(x[i] + k + j * LANES), acc[i][j]);
    }
  }
  for (int i = 0; i < X; i++) {
    float rest = 0;
    for (int64_t at = k; at < n; at++) rest += value(w[at]) * x[i][at];
    const __m256 first = _mm256_add_ps(acc[i][0], acc[i][1]);
    const __m256 last = _mm256_add_ps(acc[i][2], acc[i][3]);
    sums[i] = sum_of(_mm256_add_ps(first, last)) + rest;
  }
}

inline __m256i load16(const int16_t* q) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
}

// 127·32,767·2 fits into 32 bits, and so do the 8 such sums that a lane adds up in a group.
template <int X>
void dot_int8(const int8_t* w, int64_t n, const Rounded* x, float* sums) {
  __m256 acc[X];
  for (int i = 0; i < X; i++) acc[i] = _mm256_setzero_ps();
  for (int64_t g = 0; g < n / GROUP; g++) {
    const int8_t* row = w + GROUP * g;
    read_ahead(row);
    __m256i weight[4];
    for (int j = 0; j < 4; j++) {
      const auto* at = reinterpret_cast<const __m128i*>(row + 16 * j);
      weight[j] = _mm256_cvtepi8_epi16(_mm_loadu_si128(at));
    }
    for (int i = 0; i < X; i++) {
      const int16_t* q = x[i].q + GROUP * g;
      const __m256i first = _mm256_add_epi32(
          _mm256_madd_epi16(weight[0], load16(q)), _mm256_madd_epi16(weight[1], load16(q + 16)));
      const __m256i last = _mm256_add_epi32(
          _mm256_madd_epi16(weight[2], load16(q + 32)),
          _mm256_madd_epi16(weight[3], load16(q + 48)));
      const __m256 sum = _mm256_cvtepi32_ps(_mm256_add_epi32(first, last));
      acc[i] = _mm256_fmadd_ps(_mm256_broadcast_ss(x[i].scale + g), sum, acc[i]);
    }
  }
  for (int i = 0; i < X; i++) sums[i] = sum_of(acc[i]);
}

// w = (h − 8)·scale + offset with half bytes h, so over a group Σ w x is
// scale·Σ h x + (offset − 8·scale)·Σ x. steps: pairs of bf16, scale and offset, one for a group.
template <int X>
void dot_int4(
    const uint8_t* w, const uint32_t* steps, int64_t n, const Rounded* x, float* sums) {
  __m256 acc[X];
  __m256 rest[X];
  for (int i = 0; i < X; i++) acc[i] = rest[i] = _mm256_setzero_ps();
  const __m256i low = _mm256_set1_epi16(15);
  const int64_t groups = n / GROUP;
  for (int64_t from = 0; from < groups; from += LANES) {  // 8 groups' scales and offsets at a time
    const int64_t count = std::min(LANES, groups - from);
    __m256i both;
    if (count == LANES) {  // a copy of a size that is known takes a twentieth of one that is not
      both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(steps + from));
    } else {
      alignas(32) uint32_t pairs[LANES] = {};
      std::memcpy(pairs, steps + from, 4 * count);
      both = _mm256_load_si256(reinterpret_cast<const __m256i*>(pairs));
    }
    const __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    const __m256 offset =
        _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000))));
    const __m256 lowest = _mm256_fnmadd_ps(_mm256_set1_ps(8), scale, offset);
    alignas(32) float factor[X][LANES];
    for (int i = 0; i < X; i++) {
      _mm256_store_ps(factor[i], _mm256_mul_ps(scale, _mm256_loadu_ps(x[i].scale + from)));
      rest[i] = _mm256_fmadd_ps(lowest, _mm256_loadu_ps(x[i].sum + from), rest[i]);
    }
    for (int64_t g = 0; g < count; g++) {
      const auto* row = reinterpret_cast<const __m128i*>(w + GROUP / 2 * (from + g));
      read_ahead(row);
      const __m256i first = _mm256_cvtepu8_epi16(_mm_loadu_si128(row));
      const __m256i second = _mm256_cvtepu8_epi16(_mm_loadu_si128(row + 1));
      const __m256i even[2] = {_mm256_and_si256(first, low), _mm256_and_si256(second, low)};
      const __m256i odd[2] = {_mm256_srli_epi16(first, 4), _mm256_srli_epi16(second, 4)};
      for (int i = 0; i < X; i++) {
        const int16_t* q = x[i].q + GROUP * (from + g);
        const __m256i a = _mm256_add_epi32(
            _mm256_madd_epi16(even[0], load16(q)), _mm256_madd_epi16(odd[0], load16(q + 32)));
        const __m256i b = _mm256_add_epi32(
            _mm256_madd_epi16(even[1], load16(q + 16)), _mm256_madd_epi16(odd[1], load16(q + 48)));
        const __m256 sum = _mm256_cvtepi32_ps(_mm256_add_epi32(a, b));
        acc[i] = _mm256_fmadd_ps(_mm256_broadcast_ss(factor[i] + g), sum, acc[i]);
      }
    }
  }
  for (int i = 0; i < X; i++) sums[i] = sum_of(_mm256_add_ps(acc[i], rest[i]));
}

// ===== Finishing

enum Finish : int64_t { PLAIN, GELU, GATE };

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

// A product. Strides are in numbers; x (S, N, in), y (S, N, width), add (S, N, out).
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
  float* y;
  int64_t width, y_place, y_row;
  int64_t finish;
  float beta;
};

// The rows of x of one product, (count, rows): as they are, or rounded.
struct Rows {
  const float* const* plain;
  const Rounded* rounded;
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
      if (call.bias) sum += call.bias[r + o];
      sums[j][o] = sum;
    }
  }
  for (int j = 0; j < X; j++)
    finish(call.finish, sums[j], count, call.y + m.place * call.y_place + (i + j) * call.y_row + r);
}

// What one of `threads` threads does of a product: an equal share of the weights, in whole rows, of
// one matrix after the other.
template <int BITS>
void share(const Call& call, const Rows& x, int64_t thread, int64_t threads) {
  constexpr int TOGETHER = 4;  // rows of x that fit into the registers
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
    const int64_t last = row_at(end);
    for (int64_t r = row_at(begin); r < last; r += LANES) {
      const int64_t count = std::min(LANES, last - r);
      for (int64_t i = 0; i < call.rows;) {
        const Rows rows = {x.plain + s * call.rows + i, x.rounded + s * call.rows + i};
        if (i + TOGETHER <= call.rows) {
          outputs<BITS, TOGETHER>(call, m, r, count, i, rows);
          i += TOGETHER;
        } else {
          outputs<BITS, 1>(call, m, r, count, i, rows);
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

// Makes the products one after the other; each may read what those before it wrote.
void run(const Call* calls, int64_t many) {
  int64_t weights = 0;  // that are read, by all rows of x
  int64_t rows = 0;     // of x, of all products
  int64_t groups = 0;   // of the widest matrix, in whole registers
  for (int64_t c = 0; c < many; c++) {
    rows += calls[c].count * calls[c].rows;
    for (int64_t s = 0; s < calls[c].count; s++) {
      const Matrix& m = calls[c].matrices[s];
      weights += m.outputs * m.inputs * calls[c].rows;
      groups = std::max(groups, (m.inputs + GROUP - 1) / GROUP);
    }
  }
  groups = (groups + LANES - 1) / LANES * LANES;
  // Kept between calls, since asking for memory takes longer than a small product.
  static thread_local std::vector<const float*> plain_kept;
  static thread_local std::vector<Rounded> rounded_kept;
  static thread_local std::vector<int16_t> q_kept;
  static thread_local std::vector<float> scales_kept;
  plain_kept.resize(rows);
  rounded_kept.resize(rows);
  q_kept.resize(rows * groups * GROUP);
  scales_kept.resize(2 * rows * groups);
  // Other threads see these vectors by what they are here, not as their own.
  const float** const plain = plain_kept.data();
  Rounded* const rounded = rounded_kept.data();
  int16_t* const q = q_kept.data();
  float* const scales = scales_kept.data();
  int64_t at = 0;
  for (int64_t c = 0; c < many; c++)
    for (int64_t i = 0; i < calls[c].count * calls[c].rows; i++, at++) {
      const Call& call = calls[c];
      plain[at] = call.x + call.matrices[i / call.rows].place * call.x_place +
                  i % call.rows * call.x_row;
      float* const own = scales + 2 * at * groups;
      rounded[at] = {q + at * groups * GROUP, own, own + groups};
    }
  // Below some 64 Ki weights waking the other threads takes longer than doing it alone.
#pragma omp parallel if (weights > 65536)
  {
    const int64_t threads = omp_get_num_threads();
    const int64_t thread = omp_get_thread_num();
    int64_t first = 0;  // row of the product, among all rows
    for (int64_t c = 0; c < many; c++) {
      const Call& call = calls[c];
      const int64_t own = call.count * call.rows;
      if (call.bits < 16) {
#pragma omp for schedule(static)
        for (int64_t part = 0; part < own * groups; part++) {
          const int64_t i = part / groups;
          const int64_t g = part % groups;
          const int64_t n = std::min(call.matrices[i / call.rows].reads, call.x_width);
          float* const scale = scales + 2 * (first + i) * groups + g;
          round_group(
              plain[first + i] + std::min(g * GROUP, n), std::max<int64_t>(n - g * GROUP, 0),
              call.bits == 4, q + ((first + i) * groups + g) * GROUP, scale, scale + groups);
        }
      }
      const auto of_bits = call.bits == 32   ? share<32>
                           : call.bits == 16 ? share<16>
                           : call.bits == 8  ? share<8>
                                             : share<4>;
      of_bits(call, {plain + first, rounded + first}, thread, threads);
      first += own;
      if (c + 1 < many) {
#pragma omp barrier
      }
    }
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

// 4-bit weights (rows, inputs), inputs in whole groups, to fp32 or bf16 of the same shape.
extern "C" void unpack(
    const uint8_t* w, const uint16_t* steps, int64_t rows, int64_t inputs, int64_t to_bf16,
    void* to) {
  const int64_t bytes = to_bf16 ? 2 : 4;
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; r++)
    unpack_row(
        w + r * inputs / 2, steps + 2 * r * inputs / GROUP, inputs, to_bf16,
        static_cast<char*>(to) + r * inputs * bytes);
}

extern "C" void product(
    int64_t bits, const void* table, int64_t count, int64_t rows, const float* x, int64_t x_width,
    int64_t x_place, int64_t x_row, const float* add, int64_t add_place, int64_t add_row,
    const float* bias, float* y, int64_t width, int64_t y_place, int64_t y_row, int64_t how,
    float beta) {
  const Call call = {
      bits,    static_cast<const Matrix*>(table), count, rows, x,     x_width, x_place, x_row, add,
      add_place, add_row, bias, y, width, y_place, y_row, how, beta};
  run(&call, 1);
}

// One row through a chain of products of one matrix each. An entry of `links` is: bits, table,
// x, x_width, add, beta, bias, y, width, how. x, add and y are places in `room`, in numbers; add is
// −1 where nothing is added, and beta is the bits of a double.
extern "C" void chain(const int64_t* links, int64_t many, float* room) {
  constexpr int64_t SIZE = 10;
  static thread_local std::vector<Call> calls;
  calls.resize(many);
  for (int64_t c = 0; c < many; c++) {
    const int64_t* const link = links + c * SIZE;
    double beta;
    std::memcpy(&beta, link + 5, 8);
    calls[c] = {
        link[0], reinterpret_cast<const Matrix*>(link[1]), 1, 1, room + link[2], link[3], 0, 0,
        link[4] < 0 ? nullptr : room + link[4], 0, 0, reinterpret_cast<const float*>(link[6]),
        room + link[7], link[8], 0, 0, link[9], float(beta)};
  }
  run(calls.data(), many);
}
