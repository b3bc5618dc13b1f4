// Passes over memory of a training step on a CPU, each made once where torch makes several, as
// passes.py describes them: the softmax of logits and its error, a causal filter, the fixed Haar
// wavelet with the gates behind it and what it remembers, squared ReLU, sums of the residual stream,
// and an associative memory, forward and backward.
//
// Tensors are fp32 or bf16, arithmetic is fp32. Rows and texts are shared out among threads, and
// what one of them computes does not depend on how many there are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

// Numbers below which waking the other threads takes longer than doing it alone: a single token's
// are fewer.
constexpr int64_t ALONE = 16384;
constexpr int64_t LANES = 16;  // numbers that are worked on side by side
constexpr float HALF_ROOT = 0.70710678f;  // 1 / √2

// ===== Numbers

inline float number(float x) { return x; }

inline float number(uint16_t half) {  // bf16: the upper half of an fp32 number
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void put(float x, float* to) { *to = x; }

inline void put(float x, uint16_t* to) {  // rounded to the nearest, from the middle to the even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *to = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A row of D numbers to fp32.
template <int D, class T>
inline void numbers(const T* from, float* to) {
#pragma omp simd
  for (int c = 0; c < D; c++) to[c] = number(from[c]);
}

// e^x to the last bit but one or two: 2^n times a polynomial of what is left of x (Cephes' expf,
// Moshier, 1992). Without a branch, so that a compiler makes it for a register of numbers.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;  // e^-87 is the least normal number; a NaN stays one
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: rounds to a whole number
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits + 127) << 23;  // 2^n: n stands in the last bits of `shifted`
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// ===== The loss

// The nats of a row of logits, which with `want_error` becomes softmax − one-hot. e: room for a row.
template <class T>
float error_of_row(int64_t words, int64_t target, bool want_error, T* row, float* e) {
  const float wanted = number(row[target]);
  float highest = -INFINITY;
#pragma omp simd reduction(max : highest)
  for (int64_t w = 0; w < words; w++) highest = std::max(highest, number(row[w]));
  double sum = 0;  // of pieces: one sum of 50,000 numbers in fp32 would lose digits
  for (int64_t at = 0; at < words; at += 128) {
    float piece = 0;
    const int64_t end = std::min(at + 128, words);
#pragma omp simd reduction(+ : piece)
    for (int64_t w = at; w < end; w++) {
      e[w] = exponential(number(row[w]) - highest);
      piece += e[w];
    }
    sum += piece;
  }
  if (want_error) {
    const float share = float(1.0 / sum);
#pragma omp simd
    for (int64_t w = 0; w < words; w++) put(e[w] * share, row + w);
    put(e[target] * share - 1.0f, row + target);
  }
  return float(std::log(sum)) + (highest - wanted);
}

template <class T>
void error_of_logits(int64_t rows, int64_t words, bool want_errors, const int64_t* targets,
                     T* logits, float* nats) {
#pragma omp parallel if (rows * words > ALONE)
  {
    std::vector<float> e(words);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < rows; n++)
      nats[n] = error_of_row(words, targets[n], want_errors, logits + n * words, e.data());
  }
}

// ===== A causal filter

// out_t = Σ_i taps_i ⊙ x_{t+i} of one text: x (taps − 1 + length, width), out (length, width).
void filter(int64_t length, int64_t width, int64_t taps, const float* x, const float* weights,
            float* out) {
  for (int64_t t = 0; t < length; t++) {
    float* to = out + t * width;
    for (int64_t i = 0; i < taps; i++) {
      const float* from = x + (t + i) * width;
      const float* w = weights + i * width;
      if (i == 0) {
#pragma omp simd
        for (int64_t c = 0; c < width; c++) to[c] = w[c] * from[c];
      } else {
#pragma omp simd
        for (int64_t c = 0; c < width; c++) to[c] += w[c] * from[c];
      }
    }
  }
}

// The gradients of x and, of this text alone, of the taps, from that of out.
void filter_backward(int64_t length, int64_t width, int64_t taps, const float* x,
                     const float* weights, const float* of_out, float* of_x, float* of_weights) {
  std::memset(of_x, 0, (taps - 1 + length) * width * sizeof(float));
  std::memset(of_weights, 0, taps * width * sizeof(float));
  for (int64_t t = 0; t < length; t++) {
    const float* from = of_out + t * width;
    for (int64_t i = 0; i < taps; i++) {
      const float* in = x + (t + i) * width;
      const float* w = weights + i * width;
      float* to = of_x + (t + i) * width;
      float* of_w = of_weights + i * width;
#pragma omp simd
      for (int64_t c = 0; c < width; c++) {
        to[c] += w[c] * from[c];
        of_w[c] += in[c] * from[c];
      }
    }
  }
}

// ===== The Haar wavelet of scales that have columns of their own, and the gates behind it

// Some columns of one scale of one text, at most LANES, and what they go through: `levels` levels,
// at each of which a position becomes its sum with the one 2^level before it, over √2, and at the
// last of a detail the difference.
struct Columns {
  int64_t first, count;  // among the columns of all scales
  int64_t levels;
  bool detail;
  float sign(int64_t level) const { return detail && level == levels - 1 ? -1.0f : 1.0f; }
};

std::vector<Columns> columns_of(int64_t scales, const int64_t* widths) {
  std::vector<Columns> all;
  int64_t first = 0;
  for (int64_t s = 0; s < scales; s++) {
    const int64_t levels = s == 0 ? scales - 1 : scales - s;
    for (int64_t at = 0; at < widths[s]; at += LANES)
      all.push_back({first + at, std::min(LANES, widths[s] - at), levels, s > 0});
    first += widths[s];
  }
  return all;
}

// Columns of a text (length, stride) to fp32 (length, LANES), with zeros beside them; and back.
template <class T>
void gather(int64_t length, int64_t stride, int64_t count, const T* from, float* to) {
  if (count < LANES) std::memset(to, 0, length * LANES * sizeof(float));
  for (int64_t t = 0; t < length; t++) {
    if (count == LANES) {
#pragma omp simd
      for (int64_t c = 0; c < LANES; c++) to[t * LANES + c] = number(from[t * stride + c]);
    } else {
      for (int64_t c = 0; c < count; c++) to[t * LANES + c] = number(from[t * stride + c]);
    }
  }
}

template <class T>
void scatter(int64_t length, int64_t stride, int64_t count, const float* from, T* to) {
  for (int64_t t = 0; t < length; t++) {
    if (count == LANES) {
#pragma omp simd
      for (int64_t c = 0; c < LANES; c++) put(from[t * LANES + c], to + t * stride + c);
    } else {
      for (int64_t c = 0; c < count; c++) put(from[t * LANES + c], to + t * stride + c);
    }
  }
}

// Where the 2^level inputs of a level before a text begin among those of all levels.
inline int64_t before_level(int64_t level) { return (int64_t(1) << level) - 1; }

// u (length, LANES) becomes its coefficients. before: of each level the 2^level inputs of that level
// before the text, one level after the other, (2^levels − 1, width).
template <class T>
void decompose(const Columns& columns, int64_t length, int64_t width, const T* before, float* u) {
  for (int64_t level = 0; level < columns.levels; level++) {
    const int64_t lag = int64_t(1) << level;
    const float sign = columns.sign(level);
    for (int64_t t = length - 1; t >= lag; t--) {  // from the end: what is read is still unchanged
      float* now = u + t * LANES;
      const float* lagged = now - lag * LANES;
#pragma omp simd
      for (int64_t c = 0; c < LANES; c++) now[c] = (now[c] + sign * lagged[c]) * HALF_ROOT;
    }
    for (int64_t t = 0; t < std::min(lag, length); t++) {
      const T* lagged = before + (before_level(level) + t) * width + columns.first;
      float* now = u + t * LANES;
      for (int64_t c = 0; c < columns.count; c++)
        now[c] = (now[c] + sign * number(lagged[c])) * HALF_ROOT;
    }
  }
}

// From the gradients of the coefficients, in place, those of what went in; and of what was before,
// all zeros when this is called.
template <class T>
void decompose_backward(const Columns& columns, int64_t length, int64_t width, T* of_before,
                        float* of_u) {
  for (int64_t level = columns.levels - 1; level >= 0; level--) {
    const int64_t lag = int64_t(1) << level;
    const float sign = columns.sign(level) * HALF_ROOT;
    for (int64_t t = 0; t < std::min(lag, length); t++) {
      T* to = of_before + (before_level(level) + t) * width + columns.first;
      for (int64_t c = 0; c < columns.count; c++) put(sign * of_u[t * LANES + c], to + c);
    }
    for (int64_t t = 0; t < length; t++) {
      float* now = of_u + t * LANES;
      if (t + lag < length) {
        const float* later = now + lag * LANES;
#pragma omp simd
        for (int64_t c = 0; c < LANES; c++) now[c] = HALF_ROOT * now[c] + sign * later[c];
      } else {
#pragma omp simd
        for (int64_t c = 0; c < LANES; c++) now[c] *= HALF_ROOT;
      }
    }
  }
}

// The sizes of a call: texts, their length, the scales, their columns together and of each.
struct Sizes {
  int64_t texts, length, scales, width;
  const int64_t* widths;
  int64_t before() const { return before_level(scales - 1) * width; }  // numbers of a text
};

// both (texts, length, 2 · width): values, then gates → out (texts, length, width): the values'
// coefficients ⊙ silu(gates).
template <class T>
void gated(const Sizes& sizes, const T* both, const T* before, T* out) {
  const auto groups = columns_of(sizes.scales, sizes.widths);
  const int64_t length = sizes.length, width = sizes.width;
#pragma omp parallel if (sizes.texts * length * width > ALONE)
  {
    std::vector<float> u(length * LANES), gate(length * LANES);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < sizes.texts; n++) {
      for (const auto& group : groups) {
        const T* values = both + n * length * 2 * width + group.first;
        gather(length, 2 * width, group.count, values, u.data());
        gather(length, 2 * width, group.count, values + width, gate.data());
        decompose(group, length, width, before + n * sizes.before(), u.data());
#pragma omp simd
        for (int64_t i = 0; i < length * LANES; i++) u[i] *= gate[i] * sigmoid(gate[i]);
        scatter(length, width, group.count, u.data(), out + n * length * width + group.first);
      }
    }
  }
}

// The gradients of both and of what was before, from that of out. Coefficients are made once more.
template <class T>
void gated_backward(const Sizes& sizes, const T* both, const T* before, const T* of_out,
                    T* of_both, T* of_before) {
  const auto groups = columns_of(sizes.scales, sizes.widths);
  const int64_t length = sizes.length, width = sizes.width;
#pragma omp parallel if (sizes.texts * length * width > ALONE)
  {
    std::vector<float> u(length * LANES), gate(length * LANES), of(length * LANES);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < sizes.texts; n++) {
      std::memset(of_before + n * sizes.before(), 0, sizes.before() * sizeof(T));
      for (const auto& group : groups) {
        const T* values = both + n * length * 2 * width + group.first;
        T* of_values = of_both + n * length * 2 * width + group.first;
        gather(length, 2 * width, group.count, values, u.data());
        gather(length, 2 * width, group.count, values + width, gate.data());
        gather(length, width, group.count, of_out + n * length * width + group.first, of.data());
        decompose(group, length, width, before + n * sizes.before(), u.data());
#pragma omp simd
        for (int64_t i = 0; i < length * LANES; i++) {
          const float open = sigmoid(gate[i]), through = of[i];
          of[i] = through * gate[i] * open;  // of the coefficient
          gate[i] = through * u[i] * open * (1.0f + gate[i] * (1.0f - open));  // of the gate
        }
        scatter(length, 2 * width, group.count, gate.data(), of_values + width);
        decompose_backward(group, length, width, of_before + n * sizes.before(), of.data());
        scatter(length, 2 * width, group.count, of.data(), of_values);
      }
    }
  }
}

// What `before` is for the text behind one of a fixed wavelet's inputs h (length, width): of each
// level its last 2^level inputs. Of a longer text the last 2^levels − 1 positions are enough.
void next_before(int64_t length, int64_t levels, int64_t width, const float* h, const float* before,
                 float* after) {
  std::vector<float> u(h, h + length * width);
  for (int64_t level = 0; level < levels; level++) {
    const int64_t lag = int64_t(1) << level;
    const float* old = before + before_level(level) * width;
    float* now = after + before_level(level) * width;
    const int64_t fresh = std::min(lag, length);
    std::memcpy(now, old + fresh * width, (lag - fresh) * width * sizeof(float));
    std::memcpy(now + (lag - fresh) * width, u.data() + (length - fresh) * width,
                fresh * width * sizeof(float));
    for (int64_t t = length - 1; t >= 0; t--) {  // the next level's inputs
      const float* lagged = t >= lag ? u.data() + (t - lag) * width : old + t * width;
      float* to = u.data() + t * width;
#pragma omp simd
      for (int64_t c = 0; c < width; c++) to[c] = (to[c] + lagged[c]) * HALF_ROOT;
    }
  }
}

// ===== Squared ReLU, and sums of the residual stream

template <class T>
void squared_relu(int64_t count, const T* x, T* out) {
#pragma omp parallel for simd schedule(static) if (parallel : count > ALONE)
  for (int64_t i = 0; i < count; i++) {
    const float above = std::max(number(x[i]), 0.0f);
    put(above * above, out + i);
  }
}

template <class T>
void squared_relu_backward(int64_t count, const T* x, const T* of_out, T* of_x) {
#pragma omp parallel for simd schedule(static) if (parallel : count > ALONE)
  for (int64_t i = 0; i < count; i++)
    put(2.0f * std::max(number(x[i]), 0.0f) * number(of_out[i]), of_x + i);
}

constexpr int64_t AT_ONCE = 4096;  // numbers of a sum that a cache holds with their gradients

// out (+)= weight · x.
template <class T>
void add_weighted(int64_t count, float weight, const T* x, bool first, float* out) {
  if (first) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) out[i] = weight * number(x[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) out[i] += weight * number(x[i]);
  }
}

// The gradient of x, and returned that of its weight: 0 where x is null, for a constant one.
template <class T>
float add_weighted_backward(int64_t count, float weight, const T* x, const float* of_out, T* of_x) {
#pragma omp simd
  for (int64_t i = 0; i < count; i++) put(weight * of_out[i], of_x + i);
  double of_weight = 0;  // of pieces, as `error_of_row` sums
  for (int64_t at = 0; x && at < count; at += 128) {
    float piece = 0;
    const int64_t end = std::min(at + 128, count);
#pragma omp simd reduction(+ : piece)
    for (int64_t i = at; i < end; i++) piece += of_out[i] * number(x[i]);
    of_weight += piece;
  }
  return float(of_weight);
}

// ===== The associative memory: the gated delta rule, as memory.py states it
//
//   S_t = α_t S_{t−1} + u_t k_tᵀ,  u_t = β_t (v_t − α_t S_{t−1} k_t),  o_t = S_t q_t
//
// one position after the other. The matrix of a text and head stays in the nearest cache meanwhile,
// so a CPU is done before torch has called the dozens of operations of the chunked form. A matrix
// lies transposed, r[j][i] = S[i][j]: i numbers the value's channels, which are the lanes of a
// register, j the key's.

constexpr int64_t TAPS = 4;       // of the filters of queries and keys
constexpr float LEAST = 0.01f;    // what `unit` of memory.py adds to a squared length

// Sums over the value's channels, D of them. The order is the compiler's, and the same each time.
template <int D>
inline float dot(const float* a, const float* b) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < D; i++) sum += a[i] * b[i];
  return sum;
}

template <int D>
void transpose(const float* from, float* to) {
  for (int i = 0; i < D; i++)
    for (int j = 0; j < D; j++) to[j * D + i] = from[i * D + j];
}

// LANES numbers that the compiler keeps in a register, or in two of them, wherever they lie.
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef float LanesAnywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Lanes load(const float* from) { return *reinterpret_cast<const LanesAnywhere*>(from); }
inline void store(Lanes x, float* to) { *reinterpret_cast<LanesAnywhere*>(to) = x; }

// Sums of D numbers that terms are added to in turn. A sum waits for the one before it, so there
// are several chains of them, as many as there are registers for, which come together at the end.
template <int D, int CHAINS>
struct Sums {
  static constexpr int N = D / LANES;
  Lanes parts[CHAINS][N] = {};
  void put(float* to) const {
    for (int n = 0; n < N; n++) {
      Lanes sum = parts[0][n];
      for (int c = 1; c < CHAINS; c++) sum += parts[c][n];
      store(sum, to + n * LANES);
    }
  }
};

// What one position does to the matrix: `next` from r, and u. Both may be the same memory. With a
// query q, also what it reads of `next`.
template <int D, bool READS>
void advance(const float* r, const float* k, const float* v, float alpha, float beta, float* u,
             float* next, const float* q = nullptr, float* read = nullptr) {
  constexpr int N = D / LANES, CHAINS = 4;
  alignas(64) float found[D];  // S k
  Sums<D, CHAINS> of_key;
  for (int j = 0; j < D; j += CHAINS) {
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; c++)
#pragma GCC unroll 4
      for (int n = 0; n < N; n++)
        of_key.parts[c][n] += k[j + c] * load(r + (j + c) * D + n * LANES);
  }
  of_key.put(found);
#pragma omp simd
  for (int i = 0; i < D; i++) u[i] = beta * (v[i] - alpha * found[i]);
  Sums<D, CHAINS> of_query;
  for (int j = 0; j < D; j += CHAINS) {
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; c++) {
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        const int place = (j + c) * D + n * LANES;
        const Lanes changed = alpha * load(r + place) + k[j + c] * load(u + n * LANES);
        store(changed, next + place);
        if (READS) of_query.parts[c][n] += q[j + c] * changed;
      }
    }
  }
  if (READS) of_query.put(read);
}

// The sizes of a call: texts, heads, positions, and from one kept matrix to the next; and the most
// of what it holds that a memory keeps from one position to the next.
struct Memory {
  int64_t texts, heads, length, piece;
  float most;
  int64_t pieces() const { return (length + piece - 1) / piece; }
  float alpha(float rate) const { return most * sigmoid(-rate); }  // exp(−softplus − least)
};

// One head of one text: where its part of each tensor, or of its gradient, begins, and how far rows
// are apart. T: the type of the projections, F: of the rest, fp32; both const but for gradients.
template <int D, class T, class F>
struct Head {
  int64_t inner;  // heads · D
  T *query, *key, *value, *gate;
  F *forget, *write;                 // rows of 2 · heads
  F *query_taps, *key_taps;          // rows of inner
  F *queries_before, *keys_before;   // (TAPS − 1, 2 · inner)

  Head(const Memory& m, int64_t text, int64_t head, T* query_key, T* value_gate, F* rates, F* taps,
       F* keys)
      : inner(m.heads * D) {
    query = query_key + text * m.length * 2 * inner + head * D;
    key = query + inner;
    value = value_gate + text * m.length * 2 * inner + head * D;
    gate = value + inner;
    forget = rates + text * m.length * 2 * m.heads + head;
    write = forget + m.heads;
    query_taps = taps + head * D;
    key_taps = query_taps + TAPS * inner;
    queries_before = keys + text * (TAPS - 1) * 2 * inner + head * D;
    keys_before = queries_before + inner;
  }

  // Projections of queries or of keys, from TAPS − 1 positions before the text on, to x.
  void joined(int64_t length, F* before, T* projected, float* x) const {
    for (int64_t t = 0; t < TAPS - 1; t++)
      std::memcpy(x + t * D, before + t * 2 * inner, D * sizeof(float));
    for (int64_t t = 0; t < length; t++)
      numbers<D>(projected + t * 2 * inner, x + (TAPS - 1 + t) * D);
  }
};

template <int D, class T>
using Given = Head<D, const T, const float>;
template <int D, class T>
using OfGiven = Head<D, T, float>;

// TAPS rows of x, filtered and brought to length 1; returns what that multiplied by.
template <int D>
float filtered_unit(const float* x, const float* taps, int64_t inner, float* y) {
  alignas(64) float sum[D];
#pragma omp simd
  for (int c = 0; c < D; c++) sum[c] = taps[c] * x[c];
  for (int64_t i = 1; i < TAPS; i++) {
#pragma omp simd
    for (int c = 0; c < D; c++) sum[c] += taps[i * inner + c] * x[i * D + c];
  }
  const float scale = 1.0f / std::sqrt(dot<D>(sum, sum) + LEAST);
#pragma omp simd
  for (int c = 0; c < D; c++) y[c] = sum[c] * scale;
  return scale;
}

// The way back through `filtered_unit`: from the gradient of y, those of x and of the taps, which
// are added to.
template <int D>
void filtered_unit_backward(const float* x, const float* taps, int64_t inner, const float* y,
                            float scale, const float* of_y, float* of_x, float* of_taps) {
  alignas(64) float of_sum[D];
  const float along = dot<D>(y, of_y);
#pragma omp simd
  for (int c = 0; c < D; c++) of_sum[c] = scale * (of_y[c] - along * y[c]);
  for (int64_t i = 0; i < TAPS; i++) {
#pragma omp simd
    for (int c = 0; c < D; c++) {
      of_x[i * D + c] += taps[i * inner + c] * of_sum[c];
      of_taps[i * inner + c] += x[i * D + c] * of_sum[c];
    }
  }
}

// Of a head of a text what it reads, gated: out (length, rows of inner). reads: what it reads
// without the gate, and marks: the matrix before each piece, both for the way back, or null.
template <int D, class T>
void recall(const Memory& m, const Given<D, T>& h, const float* before, T* out, float* after,
            float* reads, float* marks) {
  std::vector<float> queries((TAPS - 1 + m.length) * D), keys(queries.size());
  h.joined(m.length, h.queries_before, h.query, queries.data());
  h.joined(m.length, h.keys_before, h.key, keys.data());
  alignas(64) float r[D * D];
  alignas(64) float q[D], k[D], v[D], u[D], gate[D];
  transpose<D>(before, r);
  for (int64_t t = 0; t < m.length; t++) {
    if (marks && t % m.piece == 0) std::memcpy(marks + t / m.piece * D * D, r, sizeof(r));
    filtered_unit<D>(queries.data() + t * D, h.query_taps, h.inner, q);
    filtered_unit<D>(keys.data() + t * D, h.key_taps, h.inner, k);
    numbers<D>(h.value + t * 2 * h.inner, v);
    const float alpha = m.alpha(h.forget[t * 2 * m.heads]);
    alignas(64) float read[D];
    advance<D, true>(r, k, v, alpha, sigmoid(h.write[t * 2 * m.heads]), u, r, q, read);
    if (reads) std::memcpy(reads + t * h.inner, read, sizeof(read));
    numbers<D>(h.gate + t * 2 * h.inner, gate);
#pragma omp simd
    for (int i = 0; i < D; i++) put(read[i] * gate[i] * sigmoid(gate[i]), out + t * h.inner + i);
  }
  transpose<D>(r, after);
}

// The gradients of all that went in, from those of out and of the matrix after the text. Piece by
// piece from the end: its matrices are made once more from the one before it, then gone back over.
template <int D, class T>
void recall_backward(const Memory& m, const Given<D, T>& h, const OfGiven<D, T>& of,
                     const float* reads, const float* marks, const T* of_out,
                     const float* of_after, float* of_before) {
  const int64_t length = m.length, piece = m.piece, inner = h.inner, joined = TAPS - 1 + length;
  std::vector<float> queries(joined * D), keys(joined * D);
  std::vector<float> of_queries(joined * D, 0.0f), of_keys(joined * D, 0.0f);
  std::vector<float> q(piece * D), k(piece * D), v(piece * D), us(piece * D);
  std::vector<float> q_scale(piece), k_scale(piece), alphas(piece), betas(piece);
  std::vector<float> matrices((piece + 1) * D * D);  // before each position, and after the last
  h.joined(length, h.queries_before, h.query, queries.data());
  h.joined(length, h.keys_before, h.key, keys.data());
  for (int64_t i = 0; i < TAPS; i++) {
    std::memset(of.query_taps + i * inner, 0, D * sizeof(float));
    std::memset(of.key_taps + i * inner, 0, D * sizeof(float));
  }
  alignas(64) float g[D * D];  // of the matrix after position t, transposed as r
  transpose<D>(of_after, g);
  for (int64_t start = (length - 1) / piece * piece; start >= 0; start -= piece) {
    const int64_t count = std::min(piece, length - start);
    std::memcpy(matrices.data(), marks + start / piece * D * D, sizeof(g));
    for (int64_t n = 0; n < count; n++) {
      const int64_t t = start + n;
      float* r = matrices.data() + n * D * D;
      q_scale[n] = filtered_unit<D>(queries.data() + t * D, h.query_taps, inner, q.data() + n * D);
      k_scale[n] = filtered_unit<D>(keys.data() + t * D, h.key_taps, inner, k.data() + n * D);
      numbers<D>(h.value + t * 2 * inner, v.data() + n * D);
      alphas[n] = m.alpha(h.forget[t * 2 * m.heads]);
      betas[n] = sigmoid(h.write[t * 2 * m.heads]);
      advance<D, false>(r, k.data() + n * D, v.data() + n * D, alphas[n], betas[n],
                        us.data() + n * D, r + D * D);
    }
    for (int64_t n = count - 1; n >= 0; n--) {
      const int64_t t = start + n;
      const float* r = matrices.data() + n * D * D;  // S_{t−1}
      const float* next = r + D * D;                 // S_t
      const float *u = us.data() + n * D, *key = k.data() + n * D, *query = q.data() + n * D;
      const float* value = v.data() + n * D;
      const float alpha = alphas[n], beta = betas[n];
      alignas(64) float gate[D], of_read[D], of_gated[D];
      numbers<D>(h.gate + t * 2 * inner, gate);
      numbers<D>(of_out + t * inner, of_gated);
#pragma omp simd
      for (int i = 0; i < D; i++) {
        const float open = sigmoid(gate[i]);
        of_read[i] = of_gated[i] * gate[i] * open;
        put(of_gated[i] * reads[t * inner + i] * open * (1.0f + gate[i] * (1.0f - open)),
            of.gate + t * 2 * inner + i);
      }
      alignas(64) float of_u[D] = {};
      alignas(64) float found[D] = {};
      alignas(64) float along[D] = {};  // sums to Σ g ⊙ r; sums across a register are dear
      alignas(64) float of_query[D], of_key[D];
      for (int j = 0; j < D; j++) {
        float* gj = g + j * D;
        const float* rj = r + j * D;
#pragma omp simd
        for (int i = 0; i < D; i++) {
          gj[i] += query[j] * of_read[i];
          of_u[i] += key[j] * gj[i];
          found[i] += key[j] * rj[i];
          along[i] += gj[i] * rj[i];
        }
        of_query[j] = dot<D>(next + j * D, of_read);
      }
      alignas(64) float of_found[D];
      float of_alpha = 0, of_beta = 0;
#pragma omp simd reduction(+ : of_beta, of_alpha)
      for (int i = 0; i < D; i++) {
        of_beta += of_u[i] * (value[i] - alpha * found[i]);
        of_alpha += along[i] - beta * of_u[i] * found[i];
        of_found[i] = -beta * alpha * of_u[i];
        put(beta * of_u[i], of.value + t * 2 * inner + i);
      }
      of.forget[t * 2 * m.heads] = -of_alpha * alpha * (1.0f - alpha / m.most);
      of.write[t * 2 * m.heads] = of_beta * beta * (1.0f - beta);
      for (int j = 0; j < D; j++) {
        float* gj = g + j * D;
        const float* rj = r + j * D;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < D; i++) {
          sum += gj[i] * u[i] + rj[i] * of_found[i];
          gj[i] = alpha * gj[i] + key[j] * of_found[i];
        }
        of_key[j] = sum;
      }
      filtered_unit_backward<D>(queries.data() + t * D, h.query_taps, inner, query, q_scale[n],
                                of_query, of_queries.data() + t * D, of.query_taps);
      filtered_unit_backward<D>(keys.data() + t * D, h.key_taps, inner, key, k_scale[n], of_key,
                                of_keys.data() + t * D, of.key_taps);
    }
  }
  transpose<D>(g, of_before);
  for (int64_t t = 0; t < TAPS - 1; t++) {
    std::memcpy(of.queries_before + t * 2 * inner, of_queries.data() + t * D, D * sizeof(float));
    std::memcpy(of.keys_before + t * 2 * inner, of_keys.data() + t * D, D * sizeof(float));
  }
  for (int64_t t = 0; t < length; t++) {
#pragma omp simd
    for (int c = 0; c < D; c++) {
      put(of_queries[(TAPS - 1 + t) * D + c], of.query + t * 2 * inner + c);
      put(of_keys[(TAPS - 1 + t) * D + c], of.key + t * 2 * inner + c);
    }
  }
}

// Calls run(width as a type, text, head) for each head of each text, shared out among threads.
template <int D, class Run>
void for_each_head(const Memory& m, const Run& run) {
#pragma omp parallel for schedule(static) if (m.texts * m.heads * m.length * D * D > ALONE)
  for (int64_t n = 0; n < m.texts * m.heads; n++)
    run(std::integral_constant<int, D>(), n / m.heads, n % m.heads);
}

// The same for the widths of keys and values that there is code for.
template <class Run>
void for_each_head(int64_t width, const Memory& m, const Run& run) {
  switch (width) {
    case 16: return for_each_head<16>(m, run);
    case 32: return for_each_head<32>(m, run);
    case 64: return for_each_head<64>(m, run);
  }
}

template <class T>
void recall_all(int64_t width, const Memory& m, const T* query_key, const T* value_gate,
                const float* rates, const float* taps, const float* keys, const float* before,
                T* out, float* after, float* reads, float* marks) {
  for_each_head(width, m, [=](auto d, int64_t text, int64_t head) {
    constexpr int D = d();
    const Given<D, T> h(m, text, head, query_key, value_gate, rates, taps, keys);
    const int64_t n = text * m.heads + head, first = text * m.length * h.inner + head * D;
    recall(m, h, before + n * D * D, out + first, after + n * D * D,
           reads ? reads + first : nullptr, marks ? marks + n * m.pieces() * D * D : nullptr);
  });
}

template <class T>
void recall_all_backward(int64_t width, const Memory& m, const T* query_key, const T* value_gate,
                         const float* rates, const float* taps, const float* keys,
                         const float* reads, const float* marks, const T* of_out,
                         const float* of_after, T* of_query_key, T* of_value_gate,
                         float* of_rates, float* of_taps, float* of_keys, float* of_before) {
  for_each_head(width, m, [=](auto d, int64_t text, int64_t head) {
    constexpr int D = d();
    const Given<D, T> h(m, text, head, query_key, value_gate, rates, taps, keys);
    float* const of_own_taps = of_taps + text * 2 * TAPS * h.inner;  // each text has its own
    const OfGiven<D, T> of(m, text, head, of_query_key, of_value_gate, of_rates, of_own_taps,
                           of_keys);
    const int64_t n = text * m.heads + head, first = text * m.length * h.inner + head * D;
    recall_backward(m, h, of, reads + first, marks + n * m.pieces() * D * D, of_out + first,
                    of_after + n * D * D, of_before + n * D * D);
  });
}

}  // namespace

extern "C" {

// bf16: whether tensors without a type here are bf16; else they are fp32.

// logits (rows, words) become softmax − one-hot, with want_errors; nats (rows).
void error_of_logits(int64_t bf16, int64_t rows, int64_t words, int64_t want_errors,
                     const int64_t* targets, void* logits, float* nats) {
  const auto all = [=](auto type) {
    error_of_logits(rows, words, want_errors, targets, static_cast<decltype(type)*>(logits), nats);
  };
  bf16 ? all(uint16_t()) : all(float());
}

// x (texts, taps − 1 + length, width), weights (taps, width) → out (texts, length, width).
void causal_filter(int64_t texts, int64_t length, int64_t width, int64_t taps, const float* x,
                   const float* weights, float* out) {
#pragma omp parallel for schedule(static) if (texts * length * width > ALONE)
  for (int64_t n = 0; n < texts; n++)
    filter(length, width, taps, x + n * (taps - 1 + length) * width, weights,
           out + n * length * width);
}

// of_weights (texts, taps, width): of each text.
void causal_filter_backward(int64_t texts, int64_t length, int64_t width, int64_t taps,
                            const float* x, const float* weights, const float* of_out, float* of_x,
                            float* of_weights) {
#pragma omp parallel for schedule(static) if (texts * length * width > ALONE)
  for (int64_t n = 0; n < texts; n++)
    filter_backward(length, width, taps, x + n * (taps - 1 + length) * width, weights,
                    of_out + n * length * width, of_x + n * (taps - 1 + length) * width,
                    of_weights + n * taps * width);
}

// widths (scales) from coarse to fine; before (texts, 2^levels − 1, width).
void gated_haar(int64_t bf16, int64_t texts, int64_t length, int64_t scales, int64_t width,
                const int64_t* widths, const void* both, const void* before, void* out) {
  const auto all = [=](auto type) {
    using T = decltype(type);
    gated(Sizes{texts, length, scales, width, widths}, static_cast<const T*>(both),
          static_cast<const T*>(before), static_cast<T*>(out));
  };
  bf16 ? all(uint16_t()) : all(float());
}

void gated_haar_backward(int64_t bf16, int64_t texts, int64_t length, int64_t scales, int64_t width,
                         const int64_t* widths, const void* both, const void* before,
                         const void* of_out, void* of_both, void* of_before) {
  const auto all = [=](auto type) {
    using T = decltype(type);
    gated_backward(Sizes{texts, length, scales, width, widths}, static_cast<const T*>(both),
                   static_cast<const T*>(before), static_cast<const T*>(of_out),
                   static_cast<T*>(of_both), static_cast<T*>(of_before));
  };
  bf16 ? all(uint16_t()) : all(float());
}

// h (texts, length, width), before (texts, 2^levels − 1, width) → after, the same of the next text.
void haar_state(int64_t texts, int64_t length, int64_t levels, int64_t width, const float* h,
                const float* before, float* after) {
  const int64_t size = before_level(levels) * width;
#pragma omp parallel for schedule(static) if (texts * length * width > ALONE)
  for (int64_t n = 0; n < texts; n++)
    next_before(length, levels, width, h + n * length * width, before + n * size, after + n * size);
}

// query_key, value_gate (texts, length, 2 · inner) and out (texts, length, inner) with inner = heads
// · width, rates (texts, length, 2 · heads), taps (2, TAPS, inner), keys (texts, TAPS − 1, 2 ·
// inner), before, after (texts, heads, width, width); reads (texts, length, inner) and marks (texts,
// heads, pieces, width, width) are null where there is no way back. most: of α.
void recall(int64_t bf16, int64_t width, int64_t texts, int64_t heads, int64_t length,
            int64_t piece, const void* query_key, const void* value_gate, const float* rates,
            const float* taps, const float* keys, const float* before, void* out, float* after,
            float* reads, float* marks, float most) {
  const Memory m{texts, heads, length, piece, most};
  const auto all = [=](auto type) {
    using T = decltype(type);
    recall_all(width, m, static_cast<const T*>(query_key), static_cast<const T*>(value_gate),
               rates, taps, keys, before, static_cast<T*>(out), after, reads, marks);
  };
  bf16 ? all(uint16_t()) : all(float());
}

// of_taps (texts, 2, TAPS, inner): of each text.
void recall_backward(int64_t bf16, int64_t width, int64_t texts, int64_t heads, int64_t length,
                     int64_t piece, const void* query_key, const void* value_gate,
                     const float* rates, const float* taps, const float* keys, const float* reads,
                     const float* marks, const void* of_out, const float* of_after,
                     void* of_query_key, void* of_value_gate, float* of_rates, float* of_taps,
                     float* of_keys, float* of_before, float most) {
  const Memory m{texts, heads, length, piece, most};
  const auto all = [=](auto type) {
    using T = decltype(type);
    recall_all_backward(width, m, static_cast<const T*>(query_key),
                        static_cast<const T*>(value_gate), rates, taps, keys, reads, marks,
                        static_cast<const T*>(of_out), of_after, static_cast<T*>(of_query_key),
                        static_cast<T*>(of_value_gate), of_rates, of_taps, of_keys, of_before);
  };
  bf16 ? all(uint16_t()) : all(float());
}

// x, out: `count` numbers.
void squared_relu(int64_t bf16, int64_t count, const void* x, void* out) {
  const auto all = [=](auto type) {
    using T = decltype(type);
    squared_relu(count, static_cast<const T*>(x), static_cast<T*>(out));
  };
  bf16 ? all(uint16_t()) : all(float());
}

void squared_relu_backward(int64_t bf16, int64_t count, const void* x, const void* of_out,
                           void* of_x) {
  const auto all = [=](auto type) {
    using T = decltype(type);
    squared_relu_backward(count, static_cast<const T*>(x), static_cast<const T*>(of_out),
                          static_cast<T*>(of_x));
  };
  bf16 ? all(uint16_t()) : all(float());
}

// out = Σ_i weights_i · parts_i, of `count` numbers each. bf16 (parts): whether each one is.
void weighted_sum(int64_t count, int64_t parts, const int64_t* bf16, const float* const* weights,
                  const void* const* x, float* out) {
#pragma omp parallel for schedule(static) if (count > ALONE)
  for (int64_t at = 0; at < count; at += AT_ONCE) {
    const int64_t some = std::min(AT_ONCE, count - at);
    for (int64_t i = 0; i < parts; i++) {
      if (bf16[i])
        add_weighted(some, *weights[i], static_cast<const uint16_t*>(x[i]) + at, !i, out + at);
      else
        add_weighted(some, *weights[i], static_cast<const float*>(x[i]) + at, !i, out + at);
    }
  }
}

// of_weights (parts). x: null for a part whose weight is constant.
void weighted_sum_backward(int64_t count, int64_t parts, const int64_t* bf16,
                           const float* const* weights, const void* const* x, const float* of_out,
                           void* const* of_x, float* of_weights) {
  const int64_t pieces = (count + AT_ONCE - 1) / AT_ONCE;
  std::vector<float> of_piece(pieces * parts);
#pragma omp parallel for schedule(static) if (count > ALONE)
  for (int64_t piece = 0; piece < pieces; piece++) {
    const int64_t at = piece * AT_ONCE, some = std::min(AT_ONCE, count - at);
    for (int64_t i = 0; i < parts; i++) {
      const auto back = [&](auto type) {
        using T = decltype(type);
        const T* given = static_cast<const T*>(x[i]);
        return add_weighted_backward(some, *weights[i], given ? given + at : nullptr, of_out + at,
                                     static_cast<T*>(of_x[i]) + at);
      };
      of_piece[piece * parts + i] = bf16[i] ? back(uint16_t()) : back(float());
    }
  }
  for (int64_t i = 0; i < parts; i++) {
    double sum = 0;
    for (int64_t piece = 0; piece < pieces; piece++) sum += of_piece[piece * parts + i];
    of_weights[i] = float(sum);
  }
}

}  // extern "C"
