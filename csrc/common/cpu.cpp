#include "common/cpu.h"

#include <atomic>
#include <cstring>

namespace vtok {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return Isa::avx2;
#endif
  return Isa::portable;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

}  // namespace

Isa cpu_isa() { return chosen().load(std::memory_order_relaxed); }

}  // namespace vtok

// The name of the instruction set in use. A test may ask for a lower one by name; a better one than the processor
// has, or an unknown name, changes nothing.
extern "C" __attribute__((visibility("default"))) const char* vtok_cpu_isa(const char* wanted) {
  for (int isa = 0; wanted && isa <= static_cast<int>(vtok::best_isa()); ++isa)
    if (!std::strcmp(wanted, vtok::kNames[isa])) vtok::chosen() = static_cast<vtok::Isa>(isa);
  return vtok::kNames[static_cast<int>(vtok::cpu_isa())];
}
