// The host build of the CUDA kernels: every CUDA thread is a fiber, so that the very .cuh that nvcc compiles runs on
// one CPU thread, under gdb and the sanitizers. Several blocks are in flight; which block, warp and lane runs next is
// random (seeded), and a chosen warp runs ahead to its next barrier, which is what finds a missing one. Shared memory
// starts out poisoned. Not seen: the memory model, and whatever is not defined below. Scheduler: tests/host/fibers.cpp.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <array>
#include <functional>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

#define VTOK_SHARED(Type, name) Type& name = *static_cast<Type*>(::vtok::host::shared(__FILE__ #name, sizeof(Type)))
#define VTOK_DYNAMIC_SHARED(name) char* const name = static_cast<char*>(::vtok::host::shared("", 0))
#define VTOK_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ::vtok::launch(kernel, grid, block, shared, stream, __VA_ARGS__)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  template <class X, class Y = unsigned, class Z = unsigned>
  dim3(X x_, Y y_ = 1u, Z z_ = 1u)
      : x(static_cast<unsigned>(x_)), y(static_cast<unsigned>(y_)), z(static_cast<unsigned>(z_)) {}
};

struct CUstream_st;
typedef CUstream_st* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

namespace vtok {
namespace host {

struct Place {
  dim3 thread, block, block_dim, grid_dim;
};
const Place& place();                         // of the running fiber
void* shared(const char* key, size_t bytes);  // the block's static array of that name; "" is the dynamic one
int block_barrier(int vote);                  // the sum of the votes of all threads
const std::array<uint64_t, 32>& warp_exchange(unsigned mask, uint64_t value);  // what each lane of the mask brought
int lane();
void yield();
void run_grid(dim3 grid, dim3 block, size_t dynamic_shared, const std::function<void()>& thread);

template <class T>
uint64_t pack_word(T value) {
  static_assert(sizeof(T) <= 8, "a lane exchanges at most 8 bytes");
  uint64_t word = 0;
  memcpy(&word, &value, sizeof(T));
  return word;
}

template <class T>
T unpack_word(uint64_t word) {
  T value;
  memcpy(&value, &word, sizeof(T));
  return value;
}

template <class T>
T shuffle(unsigned mask, T value, int from) {
  return unpack_word<T>(warp_exchange(mask, pack_word(value))[from & 31]);
}

}  // namespace host

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t,
                   Arguments... arguments) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535u || grid.z > 65535u || !threads ||
      threads > 1024 || block.z > 64 || shared > 227 * 1024)
    return cudaErrorInvalidConfiguration;
  std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  host::run_grid(grid, block, shared, [&] { std::apply(kernel, values); });
  return cudaSuccess;
}

inline void spin_yield() { host::yield(); }

}  // namespace vtok

#define threadIdx (::vtok::host::place().thread)
#define blockIdx (::vtok::host::place().block)
#define blockDim (::vtok::host::place().block_dim)
#define gridDim (::vtok::host::place().grid_dim)

inline void __syncthreads() { vtok::host::block_barrier(0); }
inline int __syncthreads_count(int p) { return vtok::host::block_barrier(p != 0); }
inline int __syncthreads_or(int p) { return vtok::host::block_barrier(p != 0) != 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { vtok::host::warp_exchange(mask, 0); }

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int base = vtok::host::lane() & ~(width - 1);
  return vtok::host::shuffle(mask, value, base + (from & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return vtok::host::shuffle(mask, value, vtok::host::lane() ^ with);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const int lane = vtok::host::lane();
  return vtok::host::shuffle(mask, value, lane < static_cast<int>(by) ? lane : lane - static_cast<int>(by));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const int lane = vtok::host::lane();
  return vtok::host::shuffle(mask, value, lane + static_cast<int>(by) > 31 ? lane : lane + static_cast<int>(by));
}
inline unsigned __ballot_sync(unsigned mask, int p) {
  const auto& seen = vtok::host::warp_exchange(mask, p != 0);
  unsigned bits = 0;
  for (int l = 0; l < 32; ++l) bits |= (mask >> l & 1u) && seen[l] ? 1u << l : 0u;
  return bits;
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, p) == mask; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const uint64_t mine = vtok::host::pack_word(value);
  const auto& seen = vtok::host::warp_exchange(mask, mine);
  unsigned bits = 0;
  for (int l = 0; l < 32; ++l) bits |= (mask >> l & 1u) && seen[l] == mine ? 1u << l : 0u;
  return bits;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
// Four bytes of a word side by side.
template <class Op>
unsigned each_byte(Op op) {
  unsigned word = 0;
  for (int shift = 0; shift < 32; shift += 8) word |= static_cast<unsigned>(op(shift)) << shift;
  return word;
}
inline unsigned __vmaxu4(unsigned a, unsigned b) {
  return each_byte([=](int s) { return (a >> s & 255) > (b >> s & 255) ? a >> s & 255 : b >> s & 255; });
}
inline unsigned __vminu4(unsigned a, unsigned b) {
  return each_byte([=](int s) { return (a >> s & 255) < (b >> s & 255) ? a >> s & 255 : b >> s & 255; });
}
inline unsigned __vabsdiffu4(unsigned a, unsigned b) {
  const unsigned most = __vmaxu4(a, b), least = __vminu4(a, b);
  return most - least;  // no byte borrows
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
  for (int s = 0; s < 32; s += 8) sum += (a >> s & 255) * (b >> s & 255);
  return sum;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (by & 31));
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// One CPU thread runs all fibers and none is interrupted, so plain reads and writes are atomic. A fiber may be
// suspended around an atomic: the order in which blocks reach it is random too.
template <class T>
T atomicAdd(T* p, T value) {
  const T old = *p;
  *p = old + value;
  return old;
}
template <class T>
T atomicMax(T* p, T value) {
  const T old = *p;
  if (value > old) *p = value;
  return old;
}
template <class T>
T atomicMin(T* p, T value) {
  const T old = *p;
  if (value < old) *p = value;
  return old;
}
template <class T>
T atomicExch(T* p, T value) {
  const T old = *p;
  *p = value;
  return old;
}
template <class T>
T atomicOr(T* p, T value) {
  const T old = *p;
  *p = old | value;
  return old;
}
template <class T>
T atomicCAS(T* p, T expected, T value) {
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return sqrt(a); }

#ifdef VTOK_HOST_MODULE
#include "host/export.h"  // tests/: VTOK_HOST_EXPORT registers a launcher with the test module
#else
#define VTOK_HOST_EXPORT(name, ...)
#endif
