#include "layer.h"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace polypeft {
namespace {

// Each part in whole cache lines.
int64_t whole(int64_t count) { return (count + 15) / 16 * 16; }

// Adds the time since the last call to a part's.
class Laps {
 public:
  void end(std::atomic<double>& seconds) {
    const auto now = std::chrono::steady_clock::now();
    seconds.fetch_add(std::chrono::duration<double>(now - last_).count(), std::memory_order_relaxed);
    last_ = now;
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

Module at(const Projection& p, float* y) {
  return {p.weight, p.id, p.weight->in, p.weight->out, y};
}

void apply(const Norm& norm, const float* x, int64_t rows, int64_t dim, float* out) {
  rms_norm(x, norm.weight, norm.offset, norm.eps, rows, dim, out);
}

// In place, if there is one.
void apply(const Norm& norm, float* x, int64_t rows, int64_t dim) {
  if (norm.weight) apply(norm, x, rows, dim, x);
}

int64_t attention_floats(const Layer& l, int64_t rows) {
  return whole(rows * l.q.weight->out) + whole(rows * l.k.weight->out) + whole(rows * l.v.weight->out) +
         whole(rows * l.o.weight->in);
}

int64_t mlp_floats(const Layer& l, int64_t rows) { return 2 * whole(rows * l.gate.weight->out); }

}  // namespace

int64_t scratch_floats(const Layer& l, int64_t rows) {
  return whole(rows * l.q.weight->in) + std::max(attention_floats(l, rows), mlp_floats(l, rows));
}

void run(const Layer& l, const float* x, int64_t rows, const Cache& cache, const int64_t* slots,
         const std::vector<Chunk>& chunks, const Rotary& rotary, const Batch* batch, float* memory,
         float* out, LayerSeconds& seconds) {
  const int64_t hidden = l.q.weight->in, heads = l.q.weight->out / l.head_dim;
  const int64_t kv_heads = l.k.weight->out / l.head_dim;
  float* branch = memory;  // first what goes into a branch, then what comes out of it
  float* rest = memory + whole(rows * hidden);
  Laps laps;
  {
    float *q = rest, *k = q + whole(rows * l.q.weight->out), *v = k + whole(rows * l.k.weight->out);
    float* attended = v + whole(rows * l.v.weight->out);
    apply(l.before_attention, x, rows, hidden, branch);
    laps.end(seconds.norms);
    linear(branch, rows, {at(l.q, q), at(l.k, k), at(l.v, v)}, batch);
    laps.end(seconds.linear);
    apply(l.of_queries, q, rows * heads, l.head_dim);
    apply(l.of_keys, k, rows * kv_heads, l.head_dim);
    laps.end(seconds.norms);
    const Heads queries{q, heads * l.head_dim, l.head_dim}, keys{k, kv_heads * l.head_dim, l.head_dim};
    write(cache, slots, rows, keys, {v, kv_heads * l.v_dim, l.v_dim}, rotary);
    std::memset(attended, 0, sizeof(float) * rows * l.o.weight->in);
    attend(cache, chunks, queries, heads, rotary, l.scores, attended);
    laps.end(seconds.attention);
    linear(attended, rows, {at(l.o, branch)}, batch);
    laps.end(seconds.linear);
  }
  apply(l.after_attention, branch, rows, hidden);
  add(x, branch, rows * hidden, out);
  apply(l.before_mlp, out, rows, hidden, branch);
  laps.end(seconds.norms);
  float *gates = rest, *ups = rest + whole(rows * l.gate.weight->out);
  linear(branch, rows, {at(l.gate, gates), at(l.up, ups)}, batch);
  laps.end(seconds.linear);
  gate(gates, ups, rows * l.gate.weight->out, l.activation);
  laps.end(seconds.gates);
  linear(gates, rows, {at(l.down, branch)}, batch);
  laps.end(seconds.linear);
  apply(l.after_mlp, branch, rows, hidden);
  add(out, branch, rows * hidden, out);
  laps.end(seconds.norms);
}

}  // namespace polypeft
