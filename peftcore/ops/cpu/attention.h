// Attention over a paged cache: the rows' own keys and values are written, then all attend.
#pragma once

#include <cstdint>
#include <vector>

#include "linear.h"

namespace polypeft {

// One layer of the cache. A block's keys lie transposed, so that sixteen positions are one vector:
// keys [blocks][kv_heads][dim][block_size], values [blocks][kv_heads][block_size][v_dim].
struct Cache {
  void* keys;
  void* values;
  Type type;  // kFloat or kHalf
  int64_t kv_heads, dim, v_dim, block_size;
};

// Rows [row, row + num_rows) of the step are positions position.. of one sequence, whose blocks are
// `blocks`, in order.
struct Chunk {
  int64_t row, num_rows, position;
  const int64_t* blocks;
};

// A view [rows][heads][dim] whose innermost stride is one.
struct Heads {
  const float* data;
  int64_t row_stride, head_stride;
  const float* at(int64_t row, int64_t head) const {
    return data + row * row_stride + head * head_stride;
  }
};

// cos and sin [rows][dim] with dim ≤ the heads' own; data null for queries and keys as they are.
struct Rotary {
  const float* cos;
  const float* sin;
  int64_t dim;
};

struct Scores {
  float scale;
  int64_t window;      // positions that a row sees, its own included; 0 for all
  float softcap;       // scores become softcap · tanh(score / softcap); 0 for none
  const float* sinks;  // [heads] logits without a value; null for none
  bool causal;         // a row sees no position behind its own; else all up to its chunk's last
};

// Keys [num_rows] and values of the rows into their slots, slot = block · block_size + place.
void write(const Cache& cache, const int64_t* slots, int64_t num_rows, Heads keys, Heads values,
           const Rotary& rotary);

// out: [rows][heads][v_dim]. Online softmax (arXiv:2205.14135) over 64 positions at a time, counted
// from position 0: how a sequence is cut into chunks does not change a row's result.
void attend(const Cache& cache, const std::vector<Chunk>& chunks, Heads queries, int64_t heads,
            const Rotary& rotary, const Scores& scores, float* out);

}  // namespace polypeft
