// Conversions, sums and functions of vectors, each with the bits of the torch operation that
// training uses on a CPU (torch 2.13, AVX512). Compiled without contraction of a * b + c.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

using bf16 = uint16_t;

extern "C" __m512 Sleef_expf16_u10(__m512);  // of libtorch_cpu, the exp() of its vectors

static inline __m512 widen(const bf16* x) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}

static inline float widen1(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Round to nearest, ties to even; denormals are kept, unlike in the instruction for it.
static inline __m256i narrow(__m512 x) {
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

static inline void store(bf16* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, narrow(x)); }

static inline bf16 narrow1(float x) {
  return (bf16)_mm_extract_epi16(_mm256_castsi256_si128(narrow(_mm512_set1_ps(x))), 0);
}

static inline float sum_of_lanes(__m512 v) {
  v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0x4E));
  v = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xB1));
  v = _mm512_add_ps(v, _mm512_shuffle_ps(v, v, 0x4E));
  v = _mm512_add_ps(v, _mm512_shuffle_ps(v, v, 0xB1));
  return _mm512_cvtss_f32(v);
}

// at::sum over a contiguous row: 8 lanes, 4 accumulators, in levels of 16 or more.
static float cascade_sum(const float* x, int n) {
  const int vectors = n / 8, size = vectors / 4;
  int bits = 0;
  while ((1 << bits) < size) bits++;
  const int power = std::max(4, bits / 4), step = 1 << power;
  __m256 level[4][4];
  for (auto& row : level)
    for (auto& v : row) v = _mm256_setzero_ps();
  int i = 0;
  while (i + step <= size) {
    for (int j = 0; j < step; j++, i++)
      for (int k = 0; k < 4; k++)
        level[0][k] = _mm256_add_ps(level[0][k], _mm256_loadu_ps(x + (i * 4 + k) * 8));
    for (int j = 1; j < 4; j++) {
      for (int k = 0; k < 4; k++) {
        level[j][k] = _mm256_add_ps(level[j][k], level[j - 1][k]);
        level[j - 1][k] = _mm256_setzero_ps();
      }
      if (i & ((step - 1) << (j * power))) break;
    }
  }
  for (; i < size; i++)
    for (int k = 0; k < 4; k++)
      level[0][k] = _mm256_add_ps(level[0][k], _mm256_loadu_ps(x + (i * 4 + k) * 8));
  for (int j = 1; j < 4; j++)
    for (int k = 0; k < 4; k++) level[0][k] = _mm256_add_ps(level[0][k], level[j][k]);
  for (i = size * 4; i < vectors; i++)
    level[0][0] = _mm256_add_ps(level[0][0], _mm256_loadu_ps(x + i * 8));
  for (int k = 1; k < 4; k++) level[0][0] = _mm256_add_ps(level[0][0], level[0][k]);
  float total = 0, lanes[8];
  for (i = vectors * 8; i < n; i++) total += x[i];
  _mm256_storeu_ps(lanes, level[0][0]);
  for (float lane : lanes) total += lane;
  return total;
}

// F.rms_norm in bf16. `squares` has n elements; n is a multiple of 16.
static void rms_norm(const bf16* x, const bf16* weight, int n, float eps, float* squares, bf16* y) {
  for (int i = 0; i < n; i += 16) {
    __m512 v = widen(x + i);
    _mm512_storeu_ps(squares + i, _mm512_mul_ps(v, v));
  }
  __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(cascade_sum(squares, n) / (float)n + eps));
  for (int i = 0; i < n; i += 16)
    store(y + i, _mm512_mul_ps(_mm512_mul_ps(widen(x + i), factor), widen(weight + i)));
}

// torch.softmax of n values in place, n a multiple of 16.
static void softmax(float* s, int n) {
  __m512 top = _mm512_loadu_ps(s);
  for (int i = 16; i < n; i += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(s + i));
  top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < n; i += 16) {
    __m512 e = Sleef_expf16_u10(_mm512_sub_ps(_mm512_loadu_ps(s + i), top));
    _mm512_storeu_ps(s + i, e);
    sum = _mm512_add_ps(sum, e);
  }
  __m512 factor = _mm512_set1_ps(1.0f / sum_of_lanes(sum));
  for (int i = 0; i < n; i += 16)
    _mm512_storeu_ps(s + i, _mm512_mul_ps(_mm512_loadu_ps(s + i), factor));
}

static inline __m512 one_plus_exp_of_minus(__m512 x) {
  return _mm512_add_ps(_mm512_set1_ps(1.0f),
                       Sleef_expf16_u10(_mm512_sub_ps(_mm512_setzero_ps(), x)));
}

static inline __m512 silu(__m512 x) { return _mm512_div_ps(x, one_plus_exp_of_minus(x)); }

static inline __m512 sigmoid(__m512 x) {
  return _mm512_div_ps(_mm512_set1_ps(1.0f), one_plus_exp_of_minus(x));
}
