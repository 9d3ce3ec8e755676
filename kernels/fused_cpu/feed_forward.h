// The feed-forward half of a transformer block: router, routed experts, and shared experts or a dense
// network.
#pragma once

#include <cstring>

#include "engine.h"

extern "C" void SGEMM(const char*, const char*, const int*, const int*, const int*, const float*,
                      const float*, const int*, const float*, const int*, const float*, float*,
                      const int*);
extern "C" int MKL_Set_Num_Threads_Local(int);

constexpr int ROUTED = 32;  // rows of a router's product

// The number of a router's rows is a multiple of 8, and that of its experts one of 16 or all of them:
// MKL then adds in the same order for any number.
static int padded(const Step& s) { return (s.n_tokens + 7) & ~7; }

static void choose(const Layer& l, const float* scores, int64_t* ids, float* weights) {
  const int E = l.n_experts, K = l.top_k;
  for (int k = 0; k < K; k++) {
    int best = -1;
    for (int e = 0; e < E; e++) {
      if (std::find(ids, ids + k, e) != ids + k) continue;
      if (best < 0 || scores[e] + l.bias[e] > scores[best] + l.bias[best]) best = e;
    }
    ids[k] = best;
    weights[k] = scores[best];
  }
  if (l.normalize) {
    const float total = cascade_sum(weights, K) + 1e-20f;
    for (int k = 0; k < K; k++) weights[k] /= total;
  }
  for (int k = 0; k < K; k++) weights[k] *= l.route_scale;
}

// Logits of `n_experts` experts from `expert` on, for rows from `row` on, in fp32 as models.router.
static void route_some(Engine& e, const Layer& l, const Step& s, int row, int expert, int n_experts) {
  const int E = l.n_experts, D = e.model.d_model, n = std::min(ROUTED, padded(s) - row);
  const float one = 1, zero = 0;
  thread_local std::vector<float> wide;
  float* x = room(wide, (size_t)n * D);
  for (int64_t i = 0; i < (int64_t)n * D; i += 16)
    _mm512_storeu_ps(x + i, widen(s.normed + (int64_t)row * D + i));
  SGEMM("T", "N", &n_experts, &n, &D, &one, l.router + (int64_t)expert * D, &D, x, &D, &zero,
        e.s.logits.data() + (int64_t)row * E + expert, &E);
}

// The router's product. Few rows are divided among the threads by experts, many by rows.
static void route(Engine& e, Team& team, const Layer& l, const Step& s) {
  const int E = l.n_experts, rows = (padded(s) + ROUTED - 1) / ROUTED;
  const int part = rows == 1 && E % 16 == 0 ? 16 : E, parts = E / part;
  const int before = MKL_Set_Num_Threads_Local(1);
  team.share(rows * parts, [&](int i) {
    route_some(e, l, s, i / parts * ROUTED, i % parts * part, part);
  });
  MKL_Set_Num_Threads_Local(before);
}

// The experts of a token and their weights.
static void decide(Engine& e, const Layer& l, const Step& s, int t) {
  const int E = l.n_experts, K = l.top_k;
  const float* logits = e.s.logits.data() + (int64_t)t * E;
  thread_local std::vector<float> scores;
  room(scores, E + 16);
  std::copy(logits, logits + E, scores.begin());
  std::fill(scores.begin() + E, scores.end(), -INFINITY);
  if (l.softmax)
    softmax(scores.data(), (E + 15) & ~15);
  else
    for (int i = 0; i < E; i += 16)
      _mm512_storeu_ps(scores.data() + i, sigmoid(_mm512_loadu_ps(scores.data() + i)));
  const int64_t at = ((int64_t)l.moe_index * s.n_tokens + t) * K;
  choose(l, scores.data(), s.ids + at, s.weights + (int64_t)t * K);
}

// Rows t * K + k in the order of their experts (`order`, `begins`), and the experts that have rows.
static void group_rows(Engine& e, const Layer& l, const Step& s) {
  const int E = l.n_experts, R = E ? s.n_tokens * l.top_k : 0;
  const int64_t* ids = s.ids + (int64_t)l.moe_index * R;
  int *order = e.s.order.data(), *begins = e.s.begins.data();
  std::fill(begins, begins + E + 2, 0);
  for (int r = 0; r < R; r++) begins[ids[r] + 2]++;
  if (s.counts)
    for (int r = 0; r < R; r++) s.counts[(int64_t)l.moe_index * E + ids[r]]++;
  e.s.used.clear();
  for (int i = 0; i < E; i++) {
    if (begins[i + 2]) e.s.used.push_back(i);
    begins[i + 2] += begins[i + 1];
  }
  for (int r = 0; r < R; r++) order[begins[ids[r] + 1]++] = r;  // afterwards begins[i] is i's first
}

// All threads have arrived; afterwards all of this is known.
static void choose_experts(Engine& e, Team& team, const Layer& l, const Step& s) {
  const int T = s.n_tokens, few = 8;
  const bool alone = T <= few;
  if (l.routes_itself && !alone) {
    team.meet();
    team.share((T + few - 1) / few, [&](int i) {
      for (int t = i * few; t < std::min((i + 1) * few, T); t++) decide(e, l, s, t);
    });
  }
  team.meet([&] {
    for (int t = 0; l.routes_itself && alone && t < T; t++) decide(e, l, s, t);
    group_rows(e, l, s);
  });
}

// hidden = silu(gate) * up * weight of one block, whose first half is gate.
static void swiglu(const float* product, int lanes, const float* weight, bf16* hidden) {
  const int half = lanes * 8;
  for (int j = 0; j < half; j += 16) {
    __m512 up = rounded(product + half + j);
    if (weight) up = _mm512_mul_ps(up, _mm512_set1_ps(*weight));
    store(hidden + j, _mm512_mul_ps(silu(rounded(product + j)), up));
  }
}

// s.x += feed_forward(s.normed).
static void feed_forward(Engine& e, Team& team, const Layer& l, const Step& s) {
  const int T = s.n_tokens, D = e.model.d_model, K = l.top_k, F = l.d_expert, E = l.n_experts;
  choose_experts(e, team, l, s);
  const int *order = e.s.order.data(), *begins = e.s.begins.data();
  const std::vector<int>& used = e.s.used;
  bf16 *hidden = e.s.hidden.data(), *made = e.s.made.data();
  bf16 *shared_hidden = e.s.shared_hidden.data(), *shared = e.s.shared.data();
  const Matrix first{l.experts13, 2 * F, D}, second{l.experts2, D, F};
  const int up_blocks = first.blocks(), routed = (int)used.size() * up_blocks;
  const int shared_blocks = l.d_shared ? l.shared13.blocks() : 0;
  auto expert = [&](const Matrix& like, int i) {
    return Matrix{like.packed + (int64_t)i * like.n * like.k, like.n, like.k};
  };
  thread_local std::vector<float> wide;
  thread_local std::vector<const bf16*> rows;
  team.share(routed + shared_blocks, [&](int item) {
    if (item >= routed) {
      const int i = item - routed;
      product_rows(s.normed, D, T, l.shared13, i, wide, rows);
      for (int t = 0; t < T; t++)
        swiglu(wide.data() + t * BLOCK, l.shared13.lanes(i), nullptr,
               shared_hidden + (int64_t)t * l.d_shared + i * BLOCK / 2);
      return;
    }
    const int i = used[item / up_blocks], block = item % up_blocks;
    const int n = begins[i + 1] - begins[i];
    rows.resize(n);
    for (int r = 0; r < n; r++) rows[r] = s.normed + (int64_t)(order[begins[i] + r] / K) * D;
    const Matrix w = expert(first, i);
    multiply(rows.data(), n, w, block, room(wide, (size_t)n * BLOCK));
    for (int r = 0; r < n; r++) {
      const int row = order[begins[i] + r];
      swiglu(wide.data() + r * BLOCK, w.lanes(block), s.weights + row,
             hidden + (int64_t)row * F + block * BLOCK / 2);
    }
  });
  team.meet();
  team.share((D + BLOCK - 1) / BLOCK, [&](int block) {
    const int lanes = std::min(4, D / 16 - block * 4);
    for (int i : used) {
      const int n = begins[i + 1] - begins[i];
      rows.resize(n);
      for (int r = 0; r < n; r++) rows[r] = hidden + (int64_t)order[begins[i] + r] * F;
      multiply(rows.data(), n, expert(second, i), block, room(wide, (size_t)n * BLOCK));
      for (int r = 0; r < n; r++)
        store_products(wide.data() + r * BLOCK, lanes,
                       made + (int64_t)order[begins[i] + r] * D + block * BLOCK);
    }
    if (l.d_shared) {
      product_rows(shared_hidden, l.d_shared, T, l.shared2, block, wide, rows);
      for (int t = 0; t < T; t++)
        store_products(wide.data() + t * BLOCK, lanes, shared + (int64_t)t * D + block * BLOCK);
    }
    for (int t = 0; t < T; t++)
      for (int j = block * BLOCK; j < block * BLOCK + lanes * 16; j += 16) {
        bf16 sum[16];  // rounded after every step that is one in training
        if (E) {
          __m512 total = widen(made + (int64_t)t * K * D + j);
          for (int k = 1; k < K; k++)
            total = _mm512_add_ps(total, widen(made + ((int64_t)t * K + k) * D + j));
          store(sum, total);
          if (l.d_shared)
            store(sum, _mm512_add_ps(widen(sum), widen(shared + (int64_t)t * D + j)));
        } else {
          std::memcpy(sum, shared + (int64_t)t * D + j, sizeof sum);
        }
        bf16* x = s.x + (int64_t)t * D + j;
        store(x, _mm512_add_ps(widen(x), widen(sum)));
      }
  });
}
