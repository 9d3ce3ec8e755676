// The attention half of a transformer block over the tokens of a step.
#pragma once

#include <cstring>

#include "engine.h"

static void rotate(const float* x, const float* cos, const float* sin, int width, bool interleaved,
                   float* y) {
  const int half = width / 2;
  for (int i = 0; i < half; i++) {
    const int a = interleaved ? 2 * i : i, b = interleaved ? a + 1 : i + half;
    y[a] = std::fma(-x[b], sin[i], x[a] * cos[i]);
    y[b] = std::fma(x[a], sin[i], x[b] * cos[i]);
  }
}

// Normalize and rotate one head in place, rounded after each as in training.
static void finish_head(const Model& m, const Layer& l, const Step& s, int t, const bf16* norm,
                        bf16* head) {
  float values[512], turned[512];
  if (norm) rms_norm(head, norm, m.width, m.eps, values, head);
  if (!l.has_rope) return;
  for (int c = 0; c < m.width; c++) values[c] = widen1(head[c]);
  const int64_t at = s.positions[t] * (m.width / 2);
  rotate(values, s.cos + at, s.sin + at, m.width, m.interleaved, turned);
  for (int c = 0; c < m.width; c += 16) store(head + c, _mm512_loadu_ps(turned + c));
}

static void remember(const Model& m, const Layer& l, const Step& s, int request, int t,
                     const bf16* k, const bf16* v) {
  const int size = m.page_size, position = (int)s.positions[t], offset = position % size;
  const int64_t page = s.tables[(int64_t)request * s.n_columns + position / size];
  bf16* keys = l.keys + page * m.n_groups * m.width * size + offset;
  bf16* values = l.values + (page * m.n_groups * size + offset) * m.width;
  for (int g = 0; g < m.n_groups; g++) {
    for (int c = 0; c < m.width; c++)
      keys[((int64_t)g * m.width + c) * size] = k[g * m.width + c];
    std::memcpy(values + (int64_t)g * size * m.width, v + g * m.width, m.width * sizeof(bf16));
  }
}

static int request_of(const Step& s, int t) {
  return (int)(std::upper_bound(s.starts, s.starts + s.n_requests + 1, t) - s.starts) - 1;
}

template <int N>
static void attend_some(const Model& m, const Layer& l, const Step& s, const Pages& pages,
                        const bf16* q, int64_t stride, int first, int heads, int group, int b,
                        bf16* out, std::vector<float>& scores, std::vector<bf16>& probs) {
  float scaled[N * 512];
  int positions[N];
  bf16* to[N];
  for (int i = 0; i < N; i++) {
    const int t = s.starts[b] + (first + i) / heads, head = group * heads + (first + i) % heads;
    positions[i] = (int)s.positions[t];
    to[i] = out + ((int64_t)t * m.n_heads + head) * m.width;
    for (int c = 0; c < m.width; c++)
      scaled[i * m.width + c] = widen1(q[t * stride + head * m.width + c]) * l.scale;
  }
  const size_t room_for = (size_t)N * (s.longest + 32);
  attend<N>(pages, scaled, positions, l.window, l.chunk, room(scores, room_for),
            room(probs, room_for), to);
}

// One piece: up to QUERIES query vectors of one request and group.
static void attend_piece(const Model& m, const Layer& l, const Step& s, const bf16* qkv, int b,
                         int group, int first, bf16* out) {
  thread_local std::vector<float> scores;
  thread_local std::vector<bf16> probs;
  const int heads = m.n_heads / m.n_groups, n = (s.starts[b + 1] - s.starts[b]) * heads;
  const int64_t stride = (int64_t)(m.n_heads + 2 * m.n_groups) * m.width;
  const int64_t of_head = (int64_t)group * m.width * m.page_size;
  const Pages pages{l.keys + of_head, l.values + of_head,
                    (int64_t)m.n_groups * m.width * m.page_size,
                    s.tables + (int64_t)b * s.n_columns, m.page_size, m.width};
  for (int end = std::min(first + QUERIES, n); first < end;) {
#define SOME(N)                                                                               \
  if (end - first >= N) {                                                                     \
    attend_some<N>(m, l, s, pages, qkv, stride, first, heads, group, b, out, scores, probs);  \
    first += N;                                                                               \
    continue;                                                                                 \
  }
    SOME(8) SOME(4) SOME(2) SOME(1)
#undef SOME
  }
}

// x += product, both in bf16.
static void add_product(bf16* x, const float* product, int lanes) {
  for (int j = 0; j < lanes * 16; j += 16)
    store(x + j, _mm512_add_ps(widen(x + j), rounded(product + j)));
}

// The pieces of attention: request, group, first query vector.
static void list_pieces(const Model& m, const Step& s, std::vector<int64_t>& pieces) {
  const int heads = m.n_heads / m.n_groups;
  pieces.clear();
  for (int b = 0; b < s.n_requests; b++)
    for (int first = 0; first < (s.starts[b + 1] - s.starts[b]) * heads; first += QUERIES)
      for (int g = 0; g < m.n_groups; g++)
        pieces.push_back(((int64_t)b << 44) | ((int64_t)g << 32) | first);
}

// s.x += attention(norm(s.x)); `pieces` are those of `list_pieces`.
static void attention_block(Engine& e, Team& team, const Layer& l, const Step& s) {
  const Model& m = e.model;
  const int T = s.n_tokens, D = m.d_model, n_rotated = m.n_heads + m.n_groups;
  const int64_t qkv_width = (int64_t)(m.n_heads + 2 * m.n_groups) * m.width;
  bf16 *qkv = e.s.qkv.data(), *out = e.s.out.data();
  thread_local std::vector<float> wide;
  thread_local std::vector<const bf16*> rows;
  team.meet_and_share(T, FEW, [&](int t) {
    rms_norm(s.x + (int64_t)t * D, l.attention_norm, D, m.eps, room(wide, D), s.normed + (int64_t)t * D);
  });
  team.share(l.qkv.blocks(), [&](int i) {
    product_rows(s.normed, D, T, l.qkv, i, wide, rows);
    for (int t = 0; t < T; t++)
      store_products(wide.data() + t * BLOCK, l.qkv.lanes(i), qkv + t * qkv_width + i * BLOCK);
  });
  team.meet_and_share(T, FEW, [&](int t) {
    bf16* head = qkv + t * qkv_width;
    for (int h = 0; h < n_rotated; h++, head += m.width)
      finish_head(m, l, s, t, h < m.n_heads ? l.q_norm : l.k_norm, head);
    remember(m, l, s, request_of(s, t), t, qkv + t * qkv_width + m.n_heads * m.width, head);
  });
  team.share((int)e.s.pieces.size(), [&](int i) {
    const int64_t p = e.s.pieces[i];
    attend_piece(m, l, s, qkv, (int)(p >> 44), (int)(p >> 32) & 0xfff, (int)(p & 0xffffffff), out);
  });
  team.meet();
  team.share(l.wo.blocks(), [&](int i) {
    product_rows(out, (int64_t)m.n_heads * m.width, T, l.wo, i, wide, rows);
    for (int t = 0; t < T; t++)
      add_product(s.x + (int64_t)t * D + i * BLOCK, wide.data() + t * BLOCK, l.wo.lanes(i));
  });
  team.meet_and_share(T, FEW, [&](int t) {
    rms_norm(s.x + (int64_t)t * D, l.ffn_norm, D, m.eps, room(wide, D), s.normed + (int64_t)t * D);
  });
}
