// Structures of `kernels.fused_cpu.layout`, buffers, and threads that work on one phase after another.
// T tokens, D model width, K experts per token, C width of a head.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <vector>

#include "pages.h"
#include "product.h"

struct Layer {
  const bf16 *attention_norm, *ffn_norm, *q_norm, *k_norm;  // the last two may be null
  Matrix qkv, wo;
  bf16 *keys, *values;
  float scale;
  int32_t window, chunk, has_rope;
  int32_t n_experts, top_k, d_expert, d_shared;  // no experts: dense, d_shared wide
  const bf16 *experts13, *experts2;              // packed, one expert after another
  Matrix shared13, shared2;
  const float *router, *bias;  // [E, D] and [E] for the choice
  int32_t softmax, normalize, routes_itself;
  float route_scale;
  int32_t moe_index;  // place among the layers with experts
};

struct Model {
  int32_t d_model, n_heads, n_groups, width, page_size, interleaved, threads;
  float eps;
  const bf16* embed;  // [V, D]
};

struct Step {
  int32_t n_tokens, n_requests, n_columns, longest;
  const int64_t *tokens, *positions;
  const int32_t *starts, *lengths, *tables;
  const float *cos, *sin;  // [positions, C / 2]
  bf16* x;                 // [T, D], the residual stream
  bf16* normed;            // [T rounded up to 8, D]
  int64_t* ids;            // [layers with experts, T, K]
  float* weights;          // [T, K], of the current layer
  int64_t* counts;         // [layers with experts, E], choices so far; or null
};

constexpr int FEW = 2;  // tokens whose norms and heads one thread computes

struct Scratch {
  std::vector<bf16> qkv, out, hidden, made, shared_hidden, shared;
  std::vector<float> wide, logits;
  std::vector<int> order, begins, used;
  std::vector<int64_t> pieces;
};

struct Engine {
  Model model;
  Scratch s;
  std::atomic<int> next, arrived, round;
};

template <typename T>
static T* room(std::vector<T>& buffer, size_t n) {
  if (buffer.size() < n) buffer.resize(n);
  return buffer.data();
}

// The product of n rows with a block, to `wide`.
static void product_rows(const bf16* x, int64_t stride, int n, const Matrix& w, int block,
                         std::vector<float>& wide, std::vector<const bf16*>& rows) {
  rows.resize(n);
  for (int r = 0; r < n; r++) rows[r] = x + r * stride;
  multiply(rows.data(), n, w, block, room(wide, (size_t)n * BLOCK));
}

// The threads of a call. Every thread calls the same methods in the same order.
struct Team {
  Engine& engine;
  int size;

  // Wait for all threads; the last one calls `alone` before it releases the others.
  template <typename F>
  void meet(F alone) {
    const int seen = engine.round.load();
    if (engine.arrived.fetch_add(1) + 1 == size) {
      alone();
      engine.arrived.store(0);
      engine.next.store(0);
      engine.round.fetch_add(1);
      return;
    }
    for (int spins = 0; engine.round.load() == seen; spins++) {
      if (spins < 2000)
        _mm_pause();
      else
        sched_yield();
    }
  }

  void meet() {
    meet([] {});
  }

  // Pieces 0 to n - 1, each computed by the next free thread. A `meet` follows.
  template <typename F>
  void share(int n, F piece) {
    for (int i; (i = engine.next.fetch_add(1)) < n;) piece(i);
  }

  // All threads have arrived; then all pieces; then they meet again. Few small pieces are faster
  // computed by one thread than shared.
  template <typename F>
  void meet_and_share(int n, int few, F piece) {
    if (n <= few) {
      meet([&] {
        for (int i = 0; i < n; i++) piece(i);
      });
      return;
    }
    meet();
    share(n, piece);
    meet();
  }
};

template <typename F>
static void together(Engine& engine, F body) {
  engine.next = engine.arrived = 0;
#pragma omp parallel num_threads(engine.model.threads)
  {
    Team team{engine, omp_get_num_threads()};
    body(team);
  }
}
