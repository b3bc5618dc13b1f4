// Passes over memory of a training step on a CPU, each made once where torch makes several, as
// passes.py describes them: the softmax of logits and its error, a causal filter, and the fixed
// Haar wavelet with the gates behind it, forward and backward.
//
// Tensors are fp32 or bf16, arithmetic is fp32. Rows and texts are shared out among threads, and
// what one of them computes does not depend on how many there are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

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

// A row of logits becomes softmax − one-hot; returns its nats. e: room for a row.
template <class T>
float error_of_row(int64_t words, int64_t target, T* row, float* e) {
  const float wanted = number(row[target]);
  float highest = -INFINITY;
#pragma omp simd reduction(max : highest)
  for (int64_t w = 0; w < words; w++) highest = std::max(highest, number(row[w]));
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t w = 0; w < words; w++) {
    e[w] = exponential(number(row[w]) - highest);
    sum += e[w];
  }
  const float share = 1.0f / sum;
#pragma omp simd
  for (int64_t w = 0; w < words; w++) put(e[w] * share, row + w);
  put(e[target] * share - 1.0f, row + target);
  return std::log(sum) + (highest - wanted);
}

template <class T>
void error_of_logits(int64_t rows, int64_t words, const int64_t* targets, T* logits, float* nats) {
#pragma omp parallel
  {
    std::vector<float> e(words);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < rows; n++)
      nats[n] = error_of_row(words, targets[n], logits + n * words, e.data());
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

// u (length, LANES) becomes its coefficients. pasts: of each level the 2^level inputs of that level
// before the text, of the columns that get so far (2^level, reach of the level).
template <class T>
void decompose(const Columns& columns, int64_t length, const T* const* pasts,
               const int64_t* reaches, float* u) {
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
      const T* lagged = pasts[level] + t * reaches[level] + columns.first;
      float* now = u + t * LANES;
      for (int64_t c = 0; c < columns.count; c++)
        now[c] = (now[c] + sign * number(lagged[c])) * HALF_ROOT;
    }
  }
}

// From the gradients of the coefficients, in place, those of what went in; and of the pasts.
template <class T>
void decompose_backward(const Columns& columns, int64_t length, T* const* of_pasts,
                        const int64_t* reaches, float* of_u) {
  for (int64_t level = columns.levels - 1; level >= 0; level--) {
    const int64_t lag = int64_t(1) << level;
    const float sign = columns.sign(level) * HALF_ROOT;
    for (int64_t t = 0; t < lag; t++) {
      T* to = of_pasts[level] + t * reaches[level] + columns.first;
      for (int64_t c = 0; c < columns.count; c++)
        put(t < length ? sign * of_u[t * LANES + c] : 0.0f, to + c);
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

// The sizes of a call: texts, their length, the scales' columns together and of each scale, and how
// many columns get to each level.
struct Sizes {
  int64_t texts, length, scales, width;
  const int64_t *widths, *reaches;

  int64_t levels() const { return scales - 1; }

  // The pasts of a text, from those of all texts.
  template <class T>
  std::vector<T*> pasts(T* const* all, int64_t text) const {
    std::vector<T*> own(levels());
    for (int64_t l = 0; l < levels(); l++)
      own[l] = all[l] + text * (int64_t(1) << l) * reaches[l];
    return own;
  }
};

// both (texts, length, 2 · width): values, then gates → out (texts, length, width): the values'
// coefficients ⊙ silu(gates).
template <class T>
void gated(const Sizes& sizes, const T* both, const T* const* pasts, T* out) {
  const auto groups = columns_of(sizes.scales, sizes.widths);
  const int64_t length = sizes.length, width = sizes.width;
#pragma omp parallel
  {
    std::vector<float> u(length * LANES), gate(length * LANES);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < sizes.texts; n++) {
      const auto own = sizes.pasts(pasts, n);
      for (const auto& group : groups) {
        const T* values = both + n * length * 2 * width + group.first;
        gather(length, 2 * width, group.count, values, u.data());
        gather(length, 2 * width, group.count, values + width, gate.data());
        decompose(group, length, own.data(), sizes.reaches, u.data());
#pragma omp simd
        for (int64_t i = 0; i < length * LANES; i++) u[i] *= gate[i] * sigmoid(gate[i]);
        scatter(length, width, group.count, u.data(), out + n * length * width + group.first);
      }
    }
  }
}

// The gradients of both and of the pasts, from that of out. Coefficients are made once more.
template <class T>
void gated_backward(const Sizes& sizes, const T* both, const T* const* pasts, const T* of_out,
                    T* of_both, T* const* of_pasts) {
  const auto groups = columns_of(sizes.scales, sizes.widths);
  const int64_t length = sizes.length, width = sizes.width;
#pragma omp parallel
  {
    std::vector<float> u(length * LANES), gate(length * LANES), of(length * LANES);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < sizes.texts; n++) {
      const auto own = sizes.pasts(pasts, n);
      const auto of_own = sizes.pasts(of_pasts, n);
      for (const auto& group : groups) {
        const T* values = both + n * length * 2 * width + group.first;
        T* of_values = of_both + n * length * 2 * width + group.first;
        gather(length, 2 * width, group.count, values, u.data());
        gather(length, 2 * width, group.count, values + width, gate.data());
        gather(length, width, group.count, of_out + n * length * width + group.first, of.data());
        decompose(group, length, own.data(), sizes.reaches, u.data());
#pragma omp simd
        for (int64_t i = 0; i < length * LANES; i++) {
          const float open = sigmoid(gate[i]), through = of[i];
          of[i] = through * gate[i] * open;  // of the coefficient
          gate[i] = through * u[i] * open * (1.0f + gate[i] * (1.0f - open));  // of the gate
        }
        scatter(length, 2 * width, group.count, gate.data(), of_values + width);
        decompose_backward(group, length, of_own.data(), sizes.reaches, of.data());
        scatter(length, 2 * width, group.count, of.data(), of_values);
      }
    }
  }
}

}  // namespace

extern "C" {

// bf16: whether tensors without a type here are bf16; else they are fp32.

// logits (rows, words) become softmax − one-hot; nats (rows).
void error_of_logits(int64_t bf16, int64_t rows, int64_t words, const int64_t* targets,
                     void* logits, float* nats) {
  if (bf16) return error_of_logits(rows, words, targets, static_cast<uint16_t*>(logits), nats);
  error_of_logits(rows, words, targets, static_cast<float*>(logits), nats);
}

// x (texts, taps − 1 + length, width), weights (taps, width) → out (texts, length, width).
void causal_filter(int64_t texts, int64_t length, int64_t width, int64_t taps, const float* x,
                   const float* weights, float* out) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < texts; n++)
    filter(length, width, taps, x + n * (taps - 1 + length) * width, weights,
           out + n * length * width);
}

// of_weights (texts, taps, width): of each text.
void causal_filter_backward(int64_t texts, int64_t length, int64_t width, int64_t taps,
                            const float* x, const float* weights, const float* of_out, float* of_x,
                            float* of_weights) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < texts; n++)
    filter_backward(length, width, taps, x + n * (taps - 1 + length) * width, weights,
                    of_out + n * length * width, of_x + n * (taps - 1 + length) * width,
                    of_weights + n * taps * width);
}

// widths (scales) from coarse to fine; reaches and pasts of each level, (texts, 2^level, reach).
void gated_haar(int64_t bf16, int64_t texts, int64_t length, int64_t scales, int64_t width,
                const int64_t* widths, const int64_t* reaches, const void* both,
                const void* const* pasts, void* out) {
  const Sizes sizes{texts, length, scales, width, widths, reaches};
  if (bf16) {
    return gated(sizes, static_cast<const uint16_t*>(both),
                 reinterpret_cast<const uint16_t* const*>(pasts), static_cast<uint16_t*>(out));
  }
  gated(sizes, static_cast<const float*>(both), reinterpret_cast<const float* const*>(pasts),
        static_cast<float*>(out));
}

void gated_haar_backward(int64_t bf16, int64_t texts, int64_t length, int64_t scales, int64_t width,
                         const int64_t* widths, const int64_t* reaches, const void* both,
                         const void* const* pasts, const void* of_out, void* of_both,
                         void* const* of_pasts) {
  const Sizes sizes{texts, length, scales, width, widths, reaches};
  if (bf16) {
    return gated_backward(sizes, static_cast<const uint16_t*>(both),
                          reinterpret_cast<const uint16_t* const*>(pasts),
                          static_cast<const uint16_t*>(of_out), static_cast<uint16_t*>(of_both),
                          reinterpret_cast<uint16_t* const*>(of_pasts));
  }
  gated_backward(sizes, static_cast<const float*>(both),
                 reinterpret_cast<const float* const*>(pasts), static_cast<const float*>(of_out),
                 static_cast<float*>(of_both), reinterpret_cast<float* const*>(of_pasts));
}

}  // extern "C"
