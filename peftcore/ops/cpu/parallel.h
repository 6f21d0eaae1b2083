// Tasks over at::parallel_for's threads.
//
// Each thread has a range of its own, in which one task's memory follows another's; who has done his
// takes what is left of the others', for a fixed split would wait for whichever thread the operating
// system has put aside. Which thread computes a task never changes the result.
#pragma once

#include <ATen/Parallel.h>

#include "simd.h"

#include <algorithm>
#include <atomic>
#include <vector>

namespace polypeft {

// Calls task(i) for every i in [0, count), by one thread where `parallel` is false.
template <class Task>
void for_each_task(int64_t count, bool parallel, const Task& task) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  if (!parallel || threads <= 1 || at::in_parallel_region()) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Range> ranges(threads);
  for (int64_t t = 0; t < threads; ++t) {
    ranges[t].next = count * t / threads;
    ranges[t].end = count * (t + 1) / threads;
  }
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t k = 0; k < threads; ++k) {
        Range& range = ranges[(t + k) % threads];
        for (int64_t i = range.next++; i < range.end; i = range.next++) task(i);
      }
  });
}

// This thread's scratch memory of at least `count` floats; its contents belong to one task.
inline float* scratch(size_t count) {
  thread_local std::vector<float> memory;
  if (memory.size() < count + kLanes) memory.resize(count + kLanes);
  auto address = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (-address / sizeof(float)) % kLanes;
}

}  // namespace polypeft
