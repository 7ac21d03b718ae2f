// Union-find that the threads of a CPU share, without a lock; union_find.cuh is the same for a GPU. Labels [n] start as
// label[s] = s, and label[s] <= s stays true: a root is its own label and ends as the lowest node of its component,
// whatever the order of the joins.
#pragma once

#include <stdint.h>

namespace vtok {

static inline int64_t read_label(const int64_t* label, int64_t x) {
  return __atomic_load_n(label + x, __ATOMIC_RELAXED);
}

// A root of x, as of now; on the way every second node is hung higher, which only ever moves it among its own.
static inline int64_t find_root(int64_t* label, int64_t x) {
  int64_t above = read_label(label, x);
  while (above != x) {
    const int64_t next = read_label(label, above);
    if (next != above) __atomic_store_n(label + x, next, __ATOMIC_RELAXED);
    x = above;
    above = next;
  }
  return x;
}

// Hangs the higher root under the lower one, unless another thread was faster: then once more from where it is now.
static inline void join_roots(int64_t* label, int64_t a, int64_t b) {
  a = find_root(label, a);
  b = find_root(label, b);
  while (a != b) {
    const int64_t low = a > b ? b : a;
    int64_t high = a > b ? a : b;
    if (__atomic_compare_exchange_n(label + high, &high, low, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return;
    a = low;
    b = find_root(label, high);
  }
}

// After all joins: every label becomes its root, as those of lower nodes already are.
static inline void flatten_labels(int64_t* label, int64_t n) {
  for (int64_t s = 0; s < n; ++s) label[s] = label[label[s]];
}

}  // namespace vtok
