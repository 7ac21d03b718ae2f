// One table of entry points per op and instruction set; the best the processor has is chosen once.
#pragma once

#include <stdint.h>

namespace vtok {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

Isa cpu_isa();  // cpu.cpp

}  // namespace vtok

// Declares the tables of an op: instances of `Table` that <op>_cpu.inc defines once per instruction set.
#if defined(__x86_64__)
#define VTOK_CPU_TABLES(Table, op)                          \
  namespace vtok {                                          \
  extern const Table op##_portable, op##_avx2, op##_avx512; \
  inline const Table& op##_cpu() {                          \
    switch (cpu_isa()) {                                    \
      case Isa::avx512: return op##_avx512;                 \
      case Isa::avx2: return op##_avx2;                     \
      default: return op##_portable;                        \
    }                                                       \
  }                                                         \
  }
#else
#define VTOK_CPU_TABLES(Table, op)                         \
  namespace vtok {                                         \
  extern const Table op##_portable;                        \
  inline const Table& op##_cpu() { return op##_portable; } \
  }
#endif

// Names the table that this translation unit defines: VTOK_TABLE(pack) is pack_avx2 where VTOK_ISA is avx2.
#define VTOK_JOIN_(a, b) a##_##b
#define VTOK_JOIN(a, b) VTOK_JOIN_(a, b)
#define VTOK_TABLE(op) VTOK_JOIN(op, VTOK_ISA)
