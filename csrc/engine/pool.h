// Threads that work on one step together: between its phases they spin, between steps they sleep.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
 public:
  explicit Pool(int threads) : threads(threads) {
    for (int t = 1; t < threads; t++) workers.emplace_back([this, t] { work(t); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> hold(lock);
      stopping = true;
    }
    wake.notify_all();
    for (auto& worker : workers) worker.join();
  }
  Pool(const Pool&) = delete;

  const int threads;

  // How many of them take part from now on, 1 to all: the others sleep.
  void use(int count) { active = std::max(1, std::min(count, threads)); }
  int used() const { return active; }

  // job(t) on every thread t in use; returns when all are done. Only one thread at a time may call this.
  template <class Job>
  void run(const Job& job) {
    call = [](const void* j, int t) { (*(const Job*)j)(t); };
    argument = &job;
    if (active == 1) return job(0);
    running.store(threads - 1, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> hold(lock);
      turn.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
    job(0);
    for (int spins = 0; running.load(std::memory_order_acquire) > 0;) pause(spins);
  }

  // Every thread of the running job waits here for the others.
  void barrier() {
    if (active == 1) return;
    const unsigned now = phase.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == active - 1) {
      arrived.store(0, std::memory_order_relaxed);
      phase.store(now + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase.load(std::memory_order_acquire) == now;) pause(spins);
  }

 private:
  static constexpr int SPINS = 2000;  // some fifty microseconds: a step follows a step sooner where tokens are few

  // Where another process has taken the core, the thread that is waited for needs it.
  static void pause(int& spins) {
    if (++spins < SPINS) _mm_pause();
    else std::this_thread::yield();
  }

  void work(int t) {
    for (unsigned seen = 0;;) {
      for (int spins = 0; spins < SPINS && turn.load(std::memory_order_acquire) == seen; spins++) _mm_pause();
      if (turn.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> hold(lock);
        wake.wait(hold, [&] { return stopping || turn.load(std::memory_order_relaxed) != seen; });
        if (stopping) return;
      }
      seen++;
      if (t < active) call(argument, t);
      running.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers;
  std::mutex lock;
  std::condition_variable wake;
  bool stopping = false;
  int active = threads;  // changes only while no job runs
  void (*call)(const void*, int) = nullptr;
  const void* argument = nullptr;
  alignas(64) std::atomic<unsigned> turn{0};
  alignas(64) std::atomic<int> running{0};
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<unsigned> phase{0};
};
