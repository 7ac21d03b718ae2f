// Union-find that all threads of a grid share, without a lock: labels [n] start as label[s] = s and label[s] <= s stays
// true. A join hangs the higher root under the lower one by an atomic minimum. Where another thread was faster, the
// minimum tells what the root had become, and the join goes on from there: lower each time, so it ends, and no link is
// lost. Whatever the order, the root of a component ends as its lowest node.
#pragma once

#include "common/kernel.h"

namespace vtok {

VTOK_DEVICE int64_t read_label(const int64_t* label, int64_t x) {
#ifndef __CUDACC__
  spin_yield();  // on a GPU others may come in between at any time: in the host build here
#endif
  return *static_cast<const volatile int64_t*>(label + x);
}
VTOK_DEVICE void write_label(int64_t* label, int64_t x, int64_t value) {
  *static_cast<volatile int64_t*>(label + x) = value;
}

// A root of x, as of now; on the way every second node is hung higher, which only ever moves it among its own.
VTOK_DEVICE int64_t find_root(int64_t* label, int64_t x) {
  int64_t above = read_label(label, x);
  while (above != x) {
    const int64_t next = read_label(label, above);
    if (next != above) write_label(label, x, next);
    x = above;
    above = next;
  }
  return x;
}

VTOK_DEVICE void join_roots(int64_t* label, int64_t a, int64_t b) {
  a = find_root(label, a);
  b = find_root(label, b);
  while (a != b) {
    const int64_t high = a > b ? a : b, low = a > b ? b : a;
    const int64_t was = atomicMin(reinterpret_cast<long long*>(label + high), static_cast<long long>(low));
    if (was == high) return;
    a = low;
    b = find_root(label, was);
  }
}

// For a launch of its own after all joins, of a thread for each node s: its label becomes its root. A thread writes
// its own label alone, or a late one could undo another's last; the higher labels that it leaves on its way help those
// who come by.
VTOK_DEVICE void flatten_label(int64_t* label, int64_t s) {
  int64_t x = s, above = read_label(label, x);
  while (above != x) {
    x = above;
    above = read_label(label, x);
    write_label(label, s, above);
  }
}

}  // namespace vtok
