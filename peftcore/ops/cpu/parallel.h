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
#include <functional>
#include <thread>
#include <vector>

namespace polypeft {

struct Phase {
  int64_t count;
  std::function<void(int64_t)> task;
};

// Calls each phase's task(i) for every i in [0, count), one phase after the other, by one thread where
// `parallel` is false. One parallel region for all: between phases threads wait for each other at a
// counter, which costs less than to leave and enter again.
inline void run_phases(const std::vector<Phase>& phases, bool parallel) {
  int64_t most = 0;
  for (const Phase& phase : phases) most = std::max(most, phase.count);
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), most);
  if (!parallel || threads <= 1 || at::in_parallel_region()) {
    for (const Phase& phase : phases)
      for (int64_t i = 0; i < phase.count; ++i) phase.task(i);
    return;
  }
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  struct Ended {  // told once, for the counter is everybody's; also where a task throws: none waits for ever
    std::atomic<int64_t>& done;
    int64_t count = 0;
    ~Ended() { done.fetch_add(count, std::memory_order_release); }
  };
  std::vector<Range> ranges(phases.size() * threads);
  std::vector<Counter> done(phases.size());
  for (size_t p = 0; p < phases.size(); ++p)
    for (int64_t t = 0; t < threads; ++t) {
      ranges[p * threads + t].next = phases[p].count * t / threads;
      ranges[p * threads + t].end = phases[p].count * (t + 1) / threads;
    }
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (size_t p = 0; p < phases.size(); ++p) {
        {
          Ended ended{done[p].value};
          for (int64_t k = 0; k < threads; ++k) {
            Range& range = ranges[p * threads + (t + k) % threads];
            for (int64_t i = range.next++; i < range.end; i = range.next++) {
              ++ended.count;
              phases[p].task(i);
            }
          }
        }
        // All are taken, so that whoever waits here waits for one that runs.
        for (int spins = 0; done[p].value.load(std::memory_order_acquire) < phases[p].count; ++spins)
          if (spins > 1000) std::this_thread::yield();
      }
  });
}

template <class Task>
void for_each_task(int64_t count, bool parallel, const Task& task) {
  run_phases({{count, std::cref(task)}}, parallel);
}

// The next address that begins a cache line.
template <class T>
T* aligned(T* p) {
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(p) + kQuadBytes - 1) & -uintptr_t{kQuadBytes});
}

// This thread's scratch memory of at least `count` floats; its contents belong to one task.
inline float* scratch(size_t count) {
  thread_local std::vector<float> memory;
  if (memory.size() < count + kLanes) memory.resize(count + kLanes);
  return aligned(memory.data());
}

}  // namespace polypeft
