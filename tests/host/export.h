// VTOK_HOST_EXPORT(name, launcher): the launcher as a function of the test module that takes NumPy arrays (or None)
// for pointers and numbers for numbers; the trailing stream is left out. Contiguity and item size are checked here.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

namespace vtok {
namespace host {

namespace py = pybind11;
using Registrar = std::function<void(py::module_&)>;
std::vector<Registrar>& registrars();

template <class A>
struct Argument {
  static A from(py::handle h) { return h.cast<A>(); }
};

template <class T>
struct Argument<T*> {
  static T* from(py::handle h) {
    if (h.is_none()) return nullptr;
    auto array = py::reinterpret_borrow<py::array>(h);
    if (!py::isinstance<py::array>(h) || !(array.flags() & py::array::c_style))
      throw py::type_error("expected a C-contiguous NumPy array or None");
    if constexpr (!std::is_void_v<std::remove_const_t<T>> && !std::is_same_v<std::remove_const_t<T>, char>)
      if (static_cast<size_t>(array.itemsize()) != sizeof(T)) throw py::type_error("expected another item size");
    return static_cast<T*>(const_cast<void*>(array.data()));
  }
};

template <>
struct Argument<cudaStream_t> {
  static cudaStream_t from(py::handle) { return nullptr; }
};

template <class... A, size_t... I>
void call(cudaError_t (*launcher)(A...), const py::args& args, std::index_sequence<I...>) {
  if (args.size() + 1 != sizeof...(A)) throw py::type_error("expected every argument but the stream");
  const cudaError_t error =
      launcher(Argument<A>::from(I + 1 < sizeof...(A) ? py::handle(args[I < args.size() ? I : 0]) : py::none())...);
  if (error != cudaSuccess) throw std::runtime_error("launch failed: error " + std::to_string(static_cast<int>(error)));
}

template <class... A>
bool add(const char* name, cudaError_t (*launcher)(A...)) {
  registrars().push_back([=](py::module_& m) {
    m.def(name, [=](py::args args) { call(launcher, args, std::index_sequence_for<A...>{}); });
  });
  return true;
}

}  // namespace host
}  // namespace vtok

#define VTOK_EXPORT_JOIN_(a, b) a##b
#define VTOK_EXPORT_JOIN(a, b) VTOK_EXPORT_JOIN_(a, b)
#define VTOK_HOST_EXPORT(name, ...) \
  static const bool VTOK_EXPORT_JOIN(vtok_exported_, __COUNTER__) = ::vtok::host::add(name, __VA_ARGS__);
