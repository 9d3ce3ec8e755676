// Attention of some queries of one request and one key head over pages, in the arithmetic of
// kernels.layers.attention_cpu.
//
// Keys of a page [C][size], values [size][C], of one head; size a multiple of 16.
#pragma once

#include "vectors.h"

constexpr int QUERIES = 8;  // processed together

struct Pages {
  const bf16 *keys, *values;  // of this head in page 0
  int64_t stride;             // from page to page, values
  const int32_t* table;
  int size, width;

  int64_t at(int position) const { return (int64_t)table[position / size] * stride; }
};

// The keys of a query at `position`: [first, position].
static inline int first_seen(int position, int window, int chunk) {
  if (window) return std::max(position - window + 1, 0);
  return chunk ? position / chunk * chunk : 0;
}

template <int N>
static void scores_of_16(const float* q, const bf16* k, int width, int size, float* out,
                         int64_t row) {
  __m512 total[N];
  for (auto& v : total) v = _mm512_setzero_ps();
  for (int c = 0; c < width; c++) {
    __m512 keys = widen(k + c * size);
    for (int i = 0; i < N; i++)
      total[i] = _mm512_fmadd_ps(_mm512_set1_ps(q[i * width + c]), keys, total[i]);
  }
  for (int i = 0; i < N; i++) _mm512_storeu_ps(out + i * row, total[i]);
}

template <int N>
static void values_of_16(const Pages& pages, const bf16* probs, int64_t row, int begin, int end,
                         int column, float* out) {
  __m512 total[N];
  for (auto& v : total) v = _mm512_setzero_ps();
  for (int j = begin; j < end; j += 2) {
    const bf16* v = pages.values + pages.at(j) + (j % pages.size) * pages.width + column;
    __m512i pair = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)v));
    if (j + 1 < end) {  // later values of a page are arbitrary
      __m256i next = _mm256_loadu_si256((const __m256i*)(v + pages.width));
      pair = _mm512_or_si512(pair, _mm512_slli_epi32(_mm512_cvtepu16_epi32(next), 16));
    }
    for (int i = 0; i < N; i++) {
      int32_t p;
      __builtin_memcpy(&p, probs + i * row + (j - begin), 4);
      total[i] = _mm512_dpbf16_ps(total[i], (__m512bh)_mm512_set1_epi32(p), (__m512bh)pair);
    }
  }
  for (int i = 0; i < N; i++) _mm512_storeu_ps(out + i * 16, total[i]);
}

// N queries [N][width], scaled, at positions; outputs to out[i] + column.
// scratch: N * (columns + 16) floats and as many bf16, columns = keys that are read.
template <int N>
static void attend(const Pages& pages, const float* q, const int* positions, int window, int chunk,
                   float* scores, bf16* probs, bf16* const* out) {
  int first = positions[0], last = positions[0];
  for (int i = 0; i < N; i++) {
    first = std::min(first, first_seen(positions[i], window, chunk));
    last = std::max(last, positions[i]);
  }
  first &= ~15;
  const int columns = (last - first + 16) & ~15;
  for (int j = 0; j < columns; j += 16) {
    const int position = first + j;
    const bf16* k = pages.keys + pages.at(position) + position % pages.size;
    scores_of_16<N>(q, k, pages.width, pages.size, scores + j, columns);
  }
  for (int i = 0; i < N; i++) {
    float* row = scores + (int64_t)i * columns;
    const int from = first_seen(positions[i], window, chunk) - first, to = positions[i] - first;
    std::fill(row, row + from, -INFINITY);
    std::fill(row + to + 1, row + columns, -INFINITY);
    softmax(row, columns);
    for (int j = 0; j < columns; j += 16) store(probs + (int64_t)i * columns + j, _mm512_loadu_ps(row + j));
  }
  float block[N * 16];
  for (int c = 0; c < pages.width; c += 16) {
    values_of_16<N>(pages, probs, columns, first, last + 1, c, block);
    for (int i = 0; i < N; i++)
      _mm256_storeu_si256((__m256i*)(out[i] + c), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(block + i * 16)));
  }
}
