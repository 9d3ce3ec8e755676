// Transformer blocks over the tokens of a step, in one call. Threads process the pieces of a phase one
// after another, and wait for each other between phases.
#include "attention.h"
#include "feed_forward.h"

// Buffers that all threads use, for the stages of `forward`.
static void make_room(Engine& e, const Layer* layers, int begin, int end, const Step& s) {
  const size_t T = s.n_tokens;
  const Model& m = e.model;
  room(e.s.qkv, T * (m.n_heads + 2 * m.n_groups) * m.width);
  room(e.s.out, T * m.n_heads * m.width);
  for (int i = begin / 2; i < (end + 1) / 2; i++) {
    const Layer& l = layers[i];
    const size_t R = T * l.top_k;
    room(e.s.order, R + 1);
    room(e.s.begins, l.n_experts + 2);
    room(e.s.logits, (T + 8) * l.n_experts);
    room(e.s.hidden, R * l.d_expert + 1);
    room(e.s.made, R * m.d_model + 1);
    room(e.s.shared_hidden, T * l.d_shared + 1);
    room(e.s.shared, T * m.d_model + 1);
  }
}

static void embed(const Model& m, const Step& s) {
  const size_t D = m.d_model;
  for (int t = 0; t < s.n_tokens; t++)
    std::memcpy(s.x + t * D, m.embed + s.tokens[t] * D, D * sizeof(bf16));
  std::memset(s.normed + s.n_tokens * D, 0, (padded(s) - s.n_tokens) * D * sizeof(bf16));
}

// Stages [begin, end): 2 * i is the attention of layer i, with its router if that is in Layer;
// 2 * i + 1 is its feed-forward.
extern "C" void forward(Engine* e, const Layer* layers, int begin, int end, const Step* step) {
  make_room(*e, layers, begin, end, *step);
  if (begin == 0) embed(e->model, *step);
  list_pieces(e->model, *step, e->s.pieces);
  together(*e, [&](Team& team) {
    for (int stage = begin; stage < end; stage++) {
      const Layer& layer = layers[stage / 2];
      if (stage % 2) {
        feed_forward(*e, team, layer, *step);
        continue;
      }
      attention_block(*e, team, layer, *step);
      if (layer.routes_itself) route(*e, team, layer, *step);
    }
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
    team.share(head->blocks(), [&](int i) {
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
