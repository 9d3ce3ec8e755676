// A transformer block over the tokens of a step, in two calls: up to the input of the feed-forward,
// and the feed-forward. Threads process the pieces of a phase one after another, and wait for
// each other between phases.
#include <cstring>

#include "engine.h"

extern "C" void SGEMM(const char*, const char*, const int*, const int*, const int*, const float*,
                      const float*, const int*, const float*, const int*, const float*, float*,
                      const int*);
extern "C" int MKL_Set_Num_Threads_Local(int);

constexpr int64_t ALONE = 1 << 20;

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
  const int64_t at = (int64_t)t * (m.width / 2);
  rotate(values, s.cos + at, s.sin + at, m.width, m.interleaved, turned);
  for (int c = 0; c < m.width; c += 16) store(head + c, _mm512_loadu_ps(turned + c));
}

static void product_rows(const bf16* x, int64_t stride, int n, const Matrix& w, int block,
                         std::vector<float>& wide, std::vector<const bf16*>& rows) {
  rows.resize(n);
  for (int r = 0; r < n; r++) rows[r] = x + r * stride;
  multiply(rows.data(), n, w, block, room(wide, (size_t)n * BLOCK));
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

extern "C" void attention_block(Engine* e, const Layer* layer, const Step* step) {
  const Model& m = e->model;
  const Layer& l = *layer;
  const Step& s = *step;
  const int T = s.n_tokens, D = m.d_model, heads = m.n_heads / m.n_groups;
  const int64_t qkv_width = (int64_t)(m.n_heads + 2 * m.n_groups) * m.width;
  bf16* qkv = room(e->s.qkv, T * qkv_width);
  bf16* out = room(e->s.out, (size_t)T * m.n_heads * m.width);
  std::vector<int64_t> pieces;  // request, group, first query vector
  for (int b = 0; b < s.n_requests; b++)
    for (int first = 0; first < (s.starts[b + 1] - s.starts[b]) * heads; first += QUERIES)
      for (int g = 0; g < m.n_groups; g++)
        pieces.push_back(((int64_t)b << 44) | ((int64_t)g << 32) | first);
  together(*e, [&](Team& team) {
    thread_local std::vector<float> wide;
    thread_local std::vector<const bf16*> rows;
    team.share(0, T, [&](int t) {
      rms_norm(s.x + (int64_t)t * D, l.attention_norm, D, m.eps, room(wide, D), s.normed + (int64_t)t * D);
    });
    team.meet();
    team.share(1, l.qkv.blocks(), [&](int i) {
      product_rows(s.normed, D, T, l.qkv, i, wide, rows);
      for (int t = 0; t < T; t++)
        for (int j = 0; j < l.qkv.lanes(i) * 16; j += 16)
          store(qkv + t * qkv_width + i * BLOCK + j, rounded(wide.data() + t * BLOCK + j));
    });
    team.meet();
    team.share(2, T, [&](int t) {
      bf16* head = qkv + t * qkv_width;
      for (int h = 0; h < m.n_heads + m.n_groups; h++, head += m.width)
        finish_head(m, l, s, t, h < m.n_heads ? l.q_norm : l.k_norm, head);
      remember(m, l, s, request_of(s, t), t, qkv + t * qkv_width + m.n_heads * m.width, head);
    });
    team.meet();
    team.share(3, (int)pieces.size(), [&](int i) {
      const int64_t p = pieces[i];
      attend_piece(m, l, s, qkv, (int)(p >> 44), (int)(p >> 32) & 0xfff, (int)(p & 0xffffffff), out);
    });
    team.meet();
    team.share(4, l.wo.blocks(), [&](int i) {
      product_rows(out, (int64_t)m.n_heads * m.width, T, l.wo, i, wide, rows);
      for (int t = 0; t < T; t++)
        add_product(s.x + (int64_t)t * D + i * BLOCK, wide.data() + t * BLOCK, l.wo.lanes(i));
    });
    team.meet();
    team.share(5, T, [&](int t) {
      rms_norm(s.x + (int64_t)t * D, l.ffn_norm, D, m.eps, room(wide, D), s.normed + (int64_t)t * D);
    });
  });
}

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

// Experts and weights of every token, as models.router: fp32 throughout.
extern "C" void route(Engine* e, const Layer* layer, const Step* step) {
  const Layer& l = *layer;
  const int T = (step->n_tokens + 7) & ~7, E = l.n_experts, D = e->model.d_model;
  const float one = 1, zero = 0;
  float* x = room(e->s.wide, (size_t)T * D);
  float* logits = room(e->s.logits, (size_t)T * E + 32);
  for (int64_t i = 0; i < (int64_t)T * D; i += 16) _mm512_storeu_ps(x + i, widen(step->normed + i));
  // for a few rows, waking MKL's threads takes longer than the product; the bits are the same
  const bool alone = (int64_t)T * E * D < ALONE;
  const int before = alone ? MKL_Set_Num_Threads_Local(1) : 0;
  SGEMM("T", "N", &E, &T, &D, &one, l.router, &D, x, &D, &zero, logits, &E);
  if (alone) MKL_Set_Num_Threads_Local(before);
  std::vector<float> scores(E + 16);
  for (int t = 0; t < step->n_tokens; t++) {
    std::copy(logits + t * E, logits + (t + 1) * E, scores.begin());
    std::fill(scores.begin() + E, scores.end(), -INFINITY);
    if (l.softmax)
      softmax(scores.data(), (E + 15) & ~15);
    else
      for (int i = 0; i < E; i += 16)
        _mm512_storeu_ps(scores.data() + i, sigmoid(_mm512_loadu_ps(scores.data() + i)));
    choose(l, scores.data(), step->ids + (int64_t)t * l.top_k, step->weights + (int64_t)t * l.top_k);
  }
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

static void store_products(const float* wide, int lanes, bf16* to) {
  for (int j = 0; j < lanes * 16; j += 16) store(to + j, rounded(wide + j));
}

extern "C" void feed_forward(Engine* e, const Layer* layer, const Step* step) {
  const Layer& l = *layer;
  const Step& s = *step;
  const int T = s.n_tokens, D = e->model.d_model, K = l.top_k, F = l.d_expert, R = T * K;
  const int E = l.n_experts;
  int* order = room(e->s.order, R + 1);    // rows t * K + k, grouped by expert
  int* begins = room(e->s.begins, E + 2);
  std::fill(begins, begins + E + 2, 0);
  for (int r = 0; r < R; r++) begins[s.ids[r] + 1]++;
  std::vector<int> used;
  for (int i = 0; i < E; i++) {
    if (begins[i + 1]) used.push_back(i);
    begins[i + 1] += begins[i];
  }
  std::vector<int> at(begins, begins + E + 1);
  for (int r = 0; r < R; r++) order[at[s.ids[r]]++] = r;
  bf16* hidden = room(e->s.hidden, (size_t)R * F + 1);
  bf16* made = room(e->s.made, (size_t)R * D + 1);
  bf16* shared_hidden = room(e->s.shared_hidden, (size_t)T * l.d_shared + 1);
  bf16* shared = room(e->s.shared, (size_t)T * D + 1);
  const Matrix first{l.experts13, 2 * F, D}, second{l.experts2, D, F};
  const int up_blocks = first.blocks(), routed = (int)used.size() * up_blocks;
  const int shared_blocks = l.d_shared ? l.shared13.blocks() : 0;
  auto expert = [&](const Matrix& like, int i) {
    return Matrix{like.packed + (int64_t)i * like.n * like.k, like.n, like.k};
  };
  together(*e, [&](Team& team) {
    thread_local std::vector<float> wide;
    thread_local std::vector<const bf16*> rows;
    team.share(0, routed + shared_blocks, [&](int item) {
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
    team.share(1, (D + BLOCK - 1) / BLOCK, [&](int block) {
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
  });
}

// fp32 logits [n, V] of rows of x, from the final norm on.
extern "C" void logits(Engine* e, const bf16* norm, const Matrix* head, const bf16* x,
                       const int64_t* picked, int n, float* out) {
  const int D = e->model.d_model;
  bf16* normed = room(e->s.out, (size_t)n * D);
  float* squares = room(e->s.wide, D);
  for (int r = 0; r < n; r++)
    rms_norm(x + picked[r] * D, norm, D, e->model.eps, squares, normed + (int64_t)r * D);
  together(*e, [&](Team& team) {
    thread_local std::vector<float> wide;
    thread_local std::vector<const bf16*> rows;
    team.share(0, head->blocks(), [&](int i) {
      product_rows(normed, D, n, *head, i, wide, rows);
      for (int r = 0; r < n; r++)
        for (int j = 0; j < head->lanes(i) * 16; j += 16)
          _mm512_storeu_ps(out + r * head->n + (int64_t)i * BLOCK + j,
                           rounded(wide.data() + r * BLOCK + j));
    });
  });
}

extern "C" Engine* make_engine(const Model* model) {
  Engine* e = new Engine();
  e->model = *model;
  e->round = 0;
  return e;
}

extern "C" void free_engine(Engine* e) { delete e; }
