// The scheduler behind csrc/common/host.h, and the test module vtok_host.
#include <pybind11/pybind11.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/kernel.h"

namespace vtok {
namespace host {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kResidentBlocks = 3;  // in flight together

struct Block;

struct Fiber {
  enum State { ready, at_barrier, in_exchange, yielded, left };
  Place place;
  Block* block = nullptr;
  int lane = 0;
  State state = ready;
  unsigned mask = 0;
  uint64_t word = 0;
  std::array<uint64_t, 32> seen{};
  int vote = 0;
  ucontext_t context{};
  std::unique_ptr<char[]> stack;
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::map<std::string, std::vector<std::max_align_t>> arrays;
  size_t dynamic_bytes = 0;
  int votes = 0;
};

std::mt19937_64 rng{0};
Fiber* current = nullptr;
ucontext_t scheduler;
const std::function<void()>* body = nullptr;
std::exception_ptr failure;
std::vector<std::unique_ptr<char[]>> free_stacks;

size_t pick(size_t n) { return rng() % n; }

void suspend(Fiber::State state) {
  Fiber* self = current;
  self->state = state;
  swapcontext(&self->context, &scheduler);
}

void fiber_main() {
  try {
    (*body)();
  } catch (...) {
    failure = std::current_exception();
  }
  suspend(Fiber::left);
}

std::unique_ptr<Block> start_block(dim3 index, dim3 grid, dim3 shape, size_t dynamic_bytes) {
  auto block = std::make_unique<Block>();
  block->dynamic_bytes = dynamic_bytes;
  for (unsigned z = 0; z < shape.z; ++z)
    for (unsigned y = 0; y < shape.y; ++y)
      for (unsigned x = 0; x < shape.x; ++x) {
        auto fiber = std::make_unique<Fiber>();
        fiber->place = {dim3(x, y, z), index, shape, grid};
        fiber->block = block.get();
        fiber->lane = static_cast<int>(block->fibers.size() % 32);
        if (free_stacks.empty()) free_stacks.push_back(std::make_unique<char[]>(kStackBytes));
        fiber->stack = std::move(free_stacks.back());
        free_stacks.pop_back();
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack.get();
        fiber->context.uc_stack.ss_size = kStackBytes;
        fiber->context.uc_link = nullptr;
        makecontext(&fiber->context, fiber_main, 0);
        block->fibers.push_back(std::move(fiber));
      }
  return block;
}

// The lanes of one warp that wait for each other in an exchange go on once all of them have come.
bool finish_exchanges(Fiber** warp, size_t lanes) {
  bool any = false;
  for (size_t l = 0; l < lanes; ++l) {
    if (warp[l]->state != Fiber::in_exchange) continue;
    const unsigned mask = warp[l]->mask;
    bool complete = true;
    for (size_t o = 0; o < 32; ++o)
      if (mask >> o & 1u) complete &= o < lanes && warp[o]->state == Fiber::in_exchange && warp[o]->mask == mask;
    if (!complete) continue;
    for (size_t o = 0; o < lanes; ++o) {
      if (!(mask >> o & 1u)) continue;
      for (size_t from = 0; from < 32; ++from)
        warp[o]->seen[from] = (mask >> from & 1u) ? warp[from]->word : 0xa5a5a5a5a5a5a5a5u;
    }
    for (size_t o = 0; o < lanes; ++o)
      if (mask >> o & 1u) warp[o]->state = Fiber::ready;
    any = true;
  }
  return any;
}

// Runs one warp as far as it gets. True if anything ran.
bool run_warp(Fiber** warp, size_t lanes) {
  bool ran = false;
  for (;;) {
    std::array<size_t, 32> order;
    size_t ready = 0;
    for (size_t l = 0; l < lanes; ++l)
      if (warp[l]->state == Fiber::ready) order[ready++] = l;
    if (!ready) {
      if (finish_exchanges(warp, lanes)) continue;
      return ran;
    }
    std::shuffle(order.begin(), order.begin() + ready, rng);
    for (size_t i = 0; i < ready; ++i) {
      current = warp[order[i]];
      swapcontext(&scheduler, &current->context);
      if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
      ran = true;
    }
  }
}

bool finish_barrier(Block& block) {
  int votes = 0;
  size_t left = 0, waiting = 0;
  for (auto& fiber : block.fibers) {
    left += fiber->state == Fiber::left;
    waiting += fiber->state == Fiber::at_barrier;
    votes += fiber->vote;
  }
  if (waiting != block.fibers.size()) {
    if (waiting && waiting + left == block.fibers.size())
      throw std::runtime_error("a block barrier waits for threads that have left the kernel");
    return false;
  }
  block.votes = votes;
  for (auto& fiber : block.fibers) fiber->state = Fiber::ready;
  return true;
}

bool wake_yielded(Block& block) {
  bool any = false;
  for (auto& fiber : block.fibers)
    if (fiber->state == Fiber::yielded) fiber->state = Fiber::ready, any = true;
  return any;
}

bool done(const Block& block) {
  return std::all_of(block.fibers.begin(), block.fibers.end(), [](auto& f) { return f->state == Fiber::left; });
}

// One turn of a block: its warps in random order, each run ahead. True if anything happened.
bool run_block(Block& block) {
  std::vector<Fiber*> fibers;
  for (auto& fiber : block.fibers) fibers.push_back(fiber.get());
  const size_t warps = (fibers.size() + 31) / 32;
  std::vector<size_t> order(warps);
  for (size_t w = 0; w < warps; ++w) order[w] = w;
  std::shuffle(order.begin(), order.end(), rng);
  bool ran = false;
  for (size_t w : order) ran |= run_warp(&fibers[w * 32], std::min<size_t>(32, fibers.size() - w * 32));
  return finish_barrier(block) || wake_yielded(block) || ran;
}

}  // namespace

std::vector<Registrar>& registrars() {
  static std::vector<Registrar> all;
  return all;
}

const Place& place() { return current->place; }
int lane() { return current->lane; }
void yield() { suspend(Fiber::yielded); }

void* shared(const char* key, size_t bytes) {
  Block& block = *current->block;
  if (!*key) bytes = block.dynamic_bytes;
  auto& array = block.arrays[key];
  if (array.empty()) {
    array.resize(bytes / sizeof(std::max_align_t) + 1);
    memset(array.data(), 0xa5, array.size() * sizeof(std::max_align_t));
  }
  return array.data();
}

int block_barrier(int vote) {
  current->vote = vote;
  suspend(Fiber::at_barrier);
  return current->block->votes;
}

const std::array<uint64_t, 32>& warp_exchange(unsigned mask, uint64_t word) {
  if (!(mask >> current->lane & 1u))
    throw std::runtime_error("a lane joined a warp operation whose mask leaves it out");
  current->mask = mask;
  current->word = word;
  suspend(Fiber::in_exchange);
  return current->seen;
}

void run_grid(dim3 grid, dim3 shape, size_t dynamic_bytes, const std::function<void()>& thread) {
  body = &thread;
  std::vector<dim3> waiting;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) waiting.emplace_back(x, y, z);
  std::shuffle(waiting.begin(), waiting.end(), rng);
  std::vector<std::unique_ptr<Block>> resident;
  while (!waiting.empty() || !resident.empty()) {
    while (!waiting.empty() && resident.size() < kResidentBlocks) {
      resident.push_back(start_block(waiting.back(), grid, shape, dynamic_bytes));
      waiting.pop_back();
    }
    const size_t turn = pick(resident.size());
    Block& block = *resident[turn];
    if (!run_block(block) && !done(block))
      throw std::runtime_error("deadlock: a warp operation waits for lanes that never come");
    if (done(block)) {
      for (auto& fiber : block.fibers) free_stacks.push_back(std::move(fiber->stack));
      resident.erase(resident.begin() + static_cast<std::ptrdiff_t>(turn));
    }
  }
}

}  // namespace host
}  // namespace vtok

PYBIND11_MODULE(vtok_host, m) {
  m.doc() = "The CUDA kernels of vtok, compiled for the host.";
  m.def("seed", [](uint64_t seed) { vtok::host::rng.seed(seed); }, "Seeds the order of blocks, warps and lanes.");
  for (auto& registrar : vtok::host::registrars()) registrar(m);
}
