// Structures of `kernels.fused_cpu.layout`, buffers, and threads that work on one phase after another.
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
  int32_t softmax, normalize;
  float route_scale;
};

struct Model {
  int32_t d_model, n_heads, n_groups, width, page_size, interleaved, threads;
  float eps;
};

struct Step {
  int32_t n_tokens, n_requests, n_columns, longest;
  const int64_t* positions;
  const int32_t *starts, *lengths, *tables;
  const float *cos, *sin;
  bf16* x;            // [T, D], the residual stream
  bf16* normed;       // [T rounded up to 8, D], zeros after T
  int64_t* ids;       // [T, K]
  float* weights;     // [T, K]
};

struct Scratch {
  std::vector<bf16> qkv, out, hidden, made, shared_hidden, shared;
  std::vector<float> wide, logits;
  std::vector<int> order, begins;
};

struct Engine {
  Model model;
  Scratch s;
  std::atomic<int> next[8], arrived;
  std::atomic<int> round;
};

template <typename T>
static T* room(std::vector<T>& buffer, size_t n) {
  if (buffer.size() < n) buffer.resize(n);
  return buffer.data();
}

struct Team {
  Engine& engine;
  int size;

  void meet() {
    const int seen = engine.round.load();
    if (engine.arrived.fetch_add(1) + 1 == size) {
      engine.arrived.store(0);
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

  template <typename F>
  void share(int phase, int n, F piece) {
    for (int i; (i = engine.next[phase].fetch_add(1)) < n;) piece(i);
  }
};

template <typename F>
static void together(Engine& engine, F body) {
  for (auto& counter : engine.next) counter = 0;
  engine.arrived = 0;
#pragma omp parallel num_threads(engine.model.threads)
  {
    Team team{engine, omp_get_num_threads()};
    body(team);
  }
}
