// Attention of some queries of one request and one key head over pages, in the arithmetic of
// kernels.layers.attention_cpu.
//
// Keys of a page [C][size], values [size][C], of one head; size a multiple of 16.
#pragma once

#include "vectors.h"

constexpr int QUERIES = 8;  // processed together
constexpr int AHEAD = 64;   // positions between a fetch and its use

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

// Scores of N queries and 16 * BLOCKS keys. Several blocks at once hide the latency of additions.
template <int N, int BLOCKS>
static void scores_of(const Pages& pages, const float* q, int position, float* out, int64_t row) {
  __m512 total[N][BLOCKS];
  const bf16* k[BLOCKS];
  for (int b = 0; b < BLOCKS; b++) {
    const int at = position + 16 * b;
    k[b] = pages.keys + pages.at(at) + at % pages.size;
    for (int i = 0; i < N; i++) total[i][b] = _mm512_setzero_ps();
  }
  for (int c = 0; c < pages.width; c++) {
    __m512 keys[BLOCKS];
    for (int b = 0; b < BLOCKS; b++) keys[b] = widen(k[b] + c * pages.size);
    for (int i = 0; i < N; i++) {
      const __m512 x = _mm512_set1_ps(q[i * pages.width + c]);
      for (int b = 0; b < BLOCKS; b++) total[i][b] = _mm512_fmadd_ps(x, keys[b], total[i][b]);
    }
  }
  for (int i = 0; i < N; i++)
    for (int b = 0; b < BLOCKS; b++) _mm512_storeu_ps(out + i * row + 16 * b, total[i][b]);
}

// 16 * BLOCKS columns of the weighted sums of values [begin, end), begin a multiple of 16.
template <int N, int BLOCKS>
static void values_of(const Pages& pages, const bf16* probs, int64_t row, int begin, int end,
                      int column, bf16* const* out) {
  __m512 total[N][BLOCKS];
  for (auto& sums : total)
    for (auto& v : sums) v = _mm512_setzero_ps();
  auto add = [&](const bf16* v, const bf16* p, bool both) {  // two positions, or the last one
    __m512i pair[BLOCKS];
    for (int b = 0; b < BLOCKS; b++) {
      pair[b] = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(v + 16 * b)));
      if (!both) continue;  // later values of a page are arbitrary
      __m256i next = _mm256_loadu_si256((const __m256i*)(v + pages.width + 16 * b));
      pair[b] = _mm512_or_si512(pair[b], _mm512_slli_epi32(_mm512_cvtepu16_epi32(next), 16));
    }
    for (int i = 0; i < N; i++) {
      int32_t both_probs;
      __builtin_memcpy(&both_probs, p + i * row, 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(both_probs);
      for (int b = 0; b < BLOCKS; b++)
        total[i][b] = _mm512_dpbf16_ps(total[i][b], x, (__m512bh)pair[b]);
    }
  };
  for (int j = begin; j < end; j += 16) {
    const bf16* v = pages.values + pages.at(j) + (j % pages.size) * pages.width + column;
    const int n = std::min(16, end - j);
    int i = 0;
    for (; i + 1 < n; i += 2) add(v + i * pages.width, probs + (j - begin) + i, true);
    if (i < n) add(v + i * pages.width, probs + (j - begin) + i, false);
  }
  for (int i = 0; i < N; i++)
    for (int b = 0; b < BLOCKS; b++)
      _mm256_storeu_si256((__m256i*)(out[i] + column + 16 * b),
                          (__m256i)_mm512_cvtneps_pbh(total[i][b]));
}

// Fetch what `scores_of` and `values_of` read of 16 positions: pages are anywhere in memory.
static inline void fetch(const Pages& pages, int position) {
  const int64_t page = pages.at(position);
  const int offset = position % pages.size;
  const bf16 *k = pages.keys + page + offset, *v = pages.values + page + offset * pages.width;
  const int rows = std::max(1, 32 / pages.size);  // of keys per cache line
  for (int c = 0; c < pages.width; c += rows)
    _mm_prefetch((const char*)(k + c * pages.size), _MM_HINT_T1);
  for (int i = 0; i < 16 * pages.width; i += 32) _mm_prefetch((const char*)(v + i), _MM_HINT_T1);
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
  int j = 0;
  for (; j + 32 <= columns; j += 32) {
    for (int ahead = j + AHEAD; ahead < std::min(j + AHEAD + 32, columns); ahead += 16)
      fetch(pages, first + ahead);
    scores_of<N, 2>(pages, q, first + j, scores + j, columns);
  }
  if (j < columns) scores_of<N, 1>(pages, q, first + j, scores + j, columns);
  for (int i = 0; i < N; i++) {
    float* row = scores + (int64_t)i * columns;
    const int from = first_seen(positions[i], window, chunk) - first, to = positions[i] - first;
    std::fill(row, row + from, -INFINITY);
    std::fill(row + to + 1, row + columns, -INFINITY);
    softmax(row, columns);
    for (int j = 0; j < columns; j += 16) store(probs + (int64_t)i * columns + j, _mm512_loadu_ps(row + j));
  }
  constexpr int BLOCKS = N > 4 ? 2 : 4;
  int c = 0;
  for (; c + 16 * BLOCKS <= pages.width; c += 16 * BLOCKS)
    values_of<N, BLOCKS>(pages, probs, columns, first, last + 1, c, out);
  for (; c < pages.width; c += 16) values_of<N, 1>(pages, probs, columns, first, last + 1, c, out);
}
