// Products of bf16 rows with packed bf16 weights, with the bits of oneDNN's: every output is a chain
// of dot products of two values (vdpbf16ps) along K, for any number of rows.
//
// Packed: blocks of 64 outputs one after another, the last of 16, 32, 48 or 64; in a block, for
// every pair of K, two values of each output.
#pragma once

#include <vector>

#include "vectors.h"

constexpr int BLOCK = 64;

struct Matrix {
  const bf16* packed;
  int64_t n, k;  // n a multiple of 16, k even

  int blocks() const { return (int)((n + BLOCK - 1) / BLOCK); }
  int lanes(int block) const { return (int)std::min<int64_t>(BLOCK, n - block * BLOCK) / 16; }
  const bf16* block(int i) const { return packed + (int64_t)i * BLOCK * k; }
};

template <int ROWS, int LANES>
static void tile(const bf16* const* rows, const bf16* w, int pairs, float* out) {
  __m512 total[ROWS][LANES];
  for (auto& row : total)
    for (auto& v : row) v = _mm512_setzero_ps();
  for (int p = 0; p < pairs; p++) {
    __m512bh weights[LANES];
    for (int j = 0; j < LANES; j++)
      weights[j] = (__m512bh)_mm512_loadu_si512(w + ((int64_t)p * LANES + j) * 32);
    for (int r = 0; r < ROWS; r++) {
      int32_t pair;
      __builtin_memcpy(&pair, rows[r] + 2 * p, 4);
      __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < LANES; j++) total[r][j] = _mm512_dpbf16_ps(total[r][j], x, weights[j]);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int j = 0; j < LANES; j++) _mm512_storeu_ps(out + r * BLOCK + j * 16, total[r][j]);
}

template <int LANES>
static void rows_times(const bf16* const* rows, int n, const bf16* w, int pairs, float* out) {
  int r = 0;
  for (; r + 6 <= n; r += 6) tile<6, LANES>(rows + r, w, pairs, out + r * BLOCK);
  switch (n - r) {
    case 5: tile<5, LANES>(rows + r, w, pairs, out + r * BLOCK); break;
    case 4: tile<4, LANES>(rows + r, w, pairs, out + r * BLOCK); break;
    case 3: tile<3, LANES>(rows + r, w, pairs, out + r * BLOCK); break;
    case 2: tile<2, LANES>(rows + r, w, pairs, out + r * BLOCK); break;
    case 1: tile<1, LANES>(rows + r, w, pairs, out + r * BLOCK); break;
  }
}

// out[r][64] = rows[r] @ block, in fp32.
static void multiply(const bf16* const* rows, int n, const Matrix& m, int block, float* out) {
  const bf16* w = m.block(block);
  const int pairs = (int)(m.k / 2);
  switch (m.lanes(block)) {
    case 4: rows_times<4>(rows, n, w, pairs, out); break;
    case 3: rows_times<3>(rows, n, w, pairs, out); break;
    case 2: rows_times<2>(rows, n, w, pairs, out); break;
    case 1: rows_times<1>(rows, n, w, pairs, out); break;
  }
}

// The product rounded to bf16, as fp32.
static inline __m512 rounded(const float* x) {
  __m512 v = _mm512_loadu_ps(x);
  __m256i half = (__m256i)_mm512_cvtneps_pbh(v);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline void store_products(const float* wide, int lanes, bf16* to) {
  for (int j = 0; j < lanes * 16; j += 16) store(to + j, rounded(wide + j));
}
