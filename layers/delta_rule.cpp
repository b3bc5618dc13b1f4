// The gated delta rule of an associative memory, forward and backward, as memory.py states it:
//
//   S_t = α_t S_{t−1} + u_t k_tᵀ,  u_t = β_t (v_t − α_t S_{t−1} k_t),  o_t = S_t q_t
//
// one position after the other. The matrix of a text and head stays in the nearest cache meanwhile,
// so a CPU is done before torch has called the dozens of operations of the chunked form.
//
// Inside, a matrix lies transposed, r[j][i] = S[i][j]: i numbers the value's channels, which are
// the lanes of a register, j the key's. All is fp32. Texts and heads are shared out among threads,
// and what one of them computes does not depend on how many there are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

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

// What one position does to the matrix: `next` from r, and u. Both may be the same memory.
template <int D>
void advance(const float* r, const float* k, const float* v, float alpha, float beta, float* u,
             float* next) {
  float found[D] = {};  // S k
  for (int j = 0; j < D; j++) {
#pragma omp simd
    for (int i = 0; i < D; i++) found[i] += k[j] * r[j * D + i];
  }
#pragma omp simd
  for (int i = 0; i < D; i++) u[i] = beta * (v[i] - alpha * found[i]);
  for (int j = 0; j < D; j++) {
#pragma omp simd
    for (int i = 0; i < D; i++) next[j * D + i] = alpha * r[j * D + i] + k[j] * u[i];
  }
}

// One text and head of `length` positions. marks: where the matrix before each piece of `piece`
// positions goes, for the way back, or null.
template <int D>
void forward(int64_t length, int64_t piece, const float* q, const float* k, const float* v,
             const float* log_alpha, const float* beta, const float* before, float* o, float* after,
             float* marks) {
  alignas(64) float r[D * D];
  alignas(64) float u[D];
  transpose<D>(before, r);
  for (int64_t t = 0; t < length; t++) {
    if (marks && t % piece == 0) std::memcpy(marks + t / piece * D * D, r, sizeof(r));
    advance<D>(r, k + t * D, v + t * D, std::exp(log_alpha[t]), beta[t], u, r);
    float read[D] = {};
    for (int j = 0; j < D; j++) {
#pragma omp simd
      for (int i = 0; i < D; i++) read[i] += q[t * D + j] * r[j * D + i];
    }
    std::memcpy(o + t * D, read, sizeof(read));
  }
  transpose<D>(r, after);
}

// The gradients of all that went in, from those of o and of the matrix after the text. Piece by
// piece from the end: its matrices are made once more from the one before it, then gone back over.
template <int D>
void backward(int64_t length, int64_t piece, const float* q, const float* k, const float* v,
              const float* log_alpha, const float* beta, const float* marks, const float* of_o,
              const float* of_after, float* of_q, float* of_k, float* of_v, float* of_log_alpha,
              float* of_beta, float* of_before) {
  std::vector<float> matrices((piece + 1) * D * D);  // before each position, and after the last
  std::vector<float> us(piece * D);
  alignas(64) float g[D * D];  // of the matrix after position t, transposed as r
  transpose<D>(of_after, g);
  for (int64_t start = (length - 1) / piece * piece; start >= 0; start -= piece) {
    const int64_t count = std::min(piece, length - start);
    std::memcpy(matrices.data(), marks + start / piece * D * D, sizeof(g));
    for (int64_t n = 0; n < count; n++) {
      const int64_t t = start + n;
      float* r = matrices.data() + n * D * D;
      advance<D>(r, k + t * D, v + t * D, std::exp(log_alpha[t]), beta[t], us.data() + n * D,
                 r + D * D);
    }
    for (int64_t n = count - 1; n >= 0; n--) {
      const int64_t t = start + n;
      const float* r = matrices.data() + n * D * D;  // S_{t−1}
      const float* next = r + D * D;                 // S_t
      const float* u = us.data() + n * D;
      const float* key = k + t * D;
      const float* of_read = of_o + t * D;
      const float alpha = std::exp(log_alpha[t]);
      alignas(64) float of_u[D] = {};
      alignas(64) float found[D] = {};
      float of_alpha = 0;
      for (int j = 0; j < D; j++) {
        const float query = q[t * D + j];
        float* gj = g + j * D;
        const float* rj = r + j * D;
#pragma omp simd
        for (int i = 0; i < D; i++) {
          gj[i] += query * of_read[i];
          of_u[i] += key[j] * gj[i];
          found[i] += key[j] * rj[i];
        }
        of_q[t * D + j] = dot<D>(next + j * D, of_read);
        of_alpha += dot<D>(gj, rj);
      }
      alignas(64) float of_found[D];
      float of_rate = 0;  // of β
#pragma omp simd reduction(+ : of_rate, of_alpha)
      for (int i = 0; i < D; i++) {
        of_rate += of_u[i] * (v[t * D + i] - alpha * found[i]);
        of_alpha -= beta[t] * of_u[i] * found[i];
        of_v[t * D + i] = beta[t] * of_u[i];
        of_found[i] = -beta[t] * alpha * of_u[i];
      }
      of_beta[t] = of_rate;
      of_log_alpha[t] = of_alpha * alpha;
      for (int j = 0; j < D; j++) {
        float* gj = g + j * D;
        of_k[t * D + j] = dot<D>(gj, u) + dot<D>(r + j * D, of_found);
#pragma omp simd
        for (int i = 0; i < D; i++) gj[i] = alpha * gj[i] + key[j] * of_found[i];
      }
    }
  }
  transpose<D>(g, of_before);
}

// Calls run(width as a type, n) for each n below `texts`, shared out among threads.
template <int D, class Run>
void for_each_text(int64_t texts, const Run& run) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < texts; n++) run(std::integral_constant<int, D>(), n);
}

// The same for the widths of keys and values that there is code for.
template <class Run>
void for_each_text(int64_t width, int64_t texts, const Run& run) {
  switch (width) {
    case 16: return for_each_text<16>(texts, run);
    case 32: return for_each_text<32>(texts, run);
    case 64: return for_each_text<64>(texts, run);
  }
}

}  // namespace

extern "C" {

// texts: of all rows and heads, one after the other: q, k, v, o (texts, length, width), log_alpha,
// beta (texts, length), before, after (texts, width, width), marks (texts, pieces, width, width).
void delta_rule(int64_t width, int64_t texts, int64_t length, int64_t piece, const float* q,
                const float* k, const float* v, const float* log_alpha, const float* beta,
                const float* before, float* o, float* after, float* marks) {
  const int64_t vectors = length * width, square = width * width;
  const int64_t pieces = (length + piece - 1) / piece;
  for_each_text(width, texts, [=](auto d, int64_t n) {
    forward<d()>(length, piece, q + n * vectors, k + n * vectors, v + n * vectors,
                 log_alpha + n * length, beta + n * length, before + n * square, o + n * vectors,
                 after + n * square, marks ? marks + n * pieces * square : nullptr);
  });
}

void delta_rule_backward(int64_t width, int64_t texts, int64_t length, int64_t piece,
                         const float* q, const float* k, const float* v, const float* log_alpha,
                         const float* beta, const float* marks, const float* of_o,
                         const float* of_after, float* of_q, float* of_k, float* of_v,
                         float* of_log_alpha, float* of_beta, float* of_before) {
  const int64_t vectors = length * width, square = width * width;
  const int64_t pieces = (length + piece - 1) / piece;
  for_each_text(width, texts, [=](auto d, int64_t n) {
    backward<d()>(length, piece, q + n * vectors, k + n * vectors, v + n * vectors,
                  log_alpha + n * length, beta + n * length, marks + n * pieces * square,
                  of_o + n * vectors, of_after + n * square, of_q + n * vectors,
                  of_k + n * vectors, of_v + n * vectors, of_log_alpha + n * length,
                  of_beta + n * length, of_before + n * square);
  });
}

}  // extern "C"
