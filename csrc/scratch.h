// Working memory of a thread: kept and used again by the next call, so that no step pays for fresh pages.
#pragma once
#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "simd.h"

struct Buffer {
  void* memory = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(memory); }
  void* grow(size_t wanted) {
    if (wanted > bytes) {
      std::free(memory);
      const size_t page = 1 << 21;
      bytes = (wanted + wanted / 8 + page - 1) / page * page;
      memory = std::aligned_alloc(page, bytes);
      if (!memory) { bytes = 0; throw std::bad_alloc(); }
#if defined(__linux__)
      madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    }
    return memory;
  }
};

// Cuts one buffer into arrays: count them all first, then take them, each aligned to a cache line.
struct Scratch {
  Buffer& buffer;
  size_t used = 0;
  explicit Scratch(Buffer& b, size_t bytes) : buffer(b) { buffer.grow(bytes); }
  template <class X>
  X* take(i64 count) {
    X* p = (X*)((char*)buffer.memory + used);
    used += ((size_t)count * sizeof(X) + 63) / 64 * 64;
    return p;
  }
};

static inline Buffer& thread_buffer() {
  static thread_local Buffer buffer;
  return buffer;
}
// For arrays that all threads share; it belongs to the calling thread.
static inline Buffer& shared_buffer() {
  static thread_local Buffer buffer;
  return buffer;
}
