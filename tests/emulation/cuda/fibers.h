// Runs CUDA blocks on the CPU: a fiber for each thread of a block, one block after another.
//
// A fiber runs until it reaches a barrier, a warp collective or its end, so nothing depends on the machine. The
// schedule (EMULATOR_SCHEDULE or `schedule`) picks the order: 0 forward, 1 backward, from 2 on a seed for a random
// order. A warp runs as far ahead of the others as it can get: a missing barrier then gives a wrong result in at least
// one order.
//
// Reported: a barrier that a part of the block reaches, or reaches elsewhere; a warp collective with lanes missing,
// elsewhere or outside their mask; a deadlock; copies in flight at the end; too much shared memory; impossible grids.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_ASAN 1
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct uint3 {
  unsigned x, y, z;
};

namespace emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int kSlot = 64;  // bytes a lane can post to a warp collective
#ifdef EMULATOR_ASAN
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif
constexpr size_t kSharedLimit = 163 << 10;  // dynamic shared memory of a block on sm_80

struct Place {
  const char* file = "?";
  int line = 0;
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

// The lanes of `mask` meet here. `posted` fills as they arrive; `seen` is what all of them read afterwards.
struct Collective {
  unsigned mask = 0, arrived = 0;
  Place place;
  alignas(16) unsigned char posted[32][kSlot], seen[32][kSlot];
};

// An asynchronous copy that was issued but not yet waited for.
struct Copy {
  void* to;
  const void* from;
  int bytes, from_bytes;
};

enum class State { kReady, kAtBarrier, kAtCollective, kDone };

struct Fiber {
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;  // ASan's
  uint3 index{};
  unsigned linear = 0;
  State state = State::kReady;
  Collective* collective = nullptr;
  Place place;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

struct Block {
  dim3 grid, block;
  uint3 index{};
  std::vector<Fiber> fibers;
  std::vector<std::vector<std::unique_ptr<Collective>>> collectives;  // of each warp, by mask
  std::vector<unsigned> returned;                                     // lanes of each warp that have ended
  std::function<void()> body;
  unsigned live = 0, waiting = 0;
  unsigned char* shared = nullptr;
  std::string error;
  void *scheduler = nullptr, *scheduler_fake = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
};

inline thread_local Fiber* self = nullptr;
inline thread_local Block* current = nullptr;
inline int schedule = 0;
inline std::string last_error;  // what the launchers return as an error, in words

// Saves the callee-saved registers and the stack pointer in *save and takes up those that `load` points to.
[[gnu::naked, gnu::noinline]] static void switch_stack(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n movq %rsp,(%rdi)\n"
      "movq %rsi,%rsp\n popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

inline void to_scheduler(bool ended = false) {
#ifdef EMULATOR_ASAN
  __sanitizer_start_switch_fiber(ended ? nullptr : &self->fake_stack, current->scheduler_bottom,
                                 current->scheduler_size);
#endif
  switch_stack(&self->stack_pointer, current->scheduler);
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(self->fake_stack, &current->scheduler_bottom, &current->scheduler_size);
#endif
}

[[noreturn]] inline void fail(const std::string& message) {
  if (current->error.empty()) {
    char where[128];
    const uint3 b = current->index, t = self->index;
    std::snprintf(where, sizeof where, " [block %u,%u,%u thread %u,%u,%u]", b.x, b.y, b.z, t.x, t.y, t.z);
    current->error = message + where;
  }
  self->state = State::kDone;
  to_scheduler(true);
  __builtin_unreachable();
}

inline void open_barrier() {
  for (Fiber& f : current->fibers) {
    if (f.state == State::kAtBarrier) f.state = State::kReady;
  }
  current->waiting = 0;
}

inline void barrier(Place place) {
  Block& b = *current;
  self->place = place;
  for (const Fiber& f : b.fibers) {
    if (f.state == State::kDone) fail("__syncthreads at " + place.text() + " but a thread of the block has returned");
    if (f.state == State::kAtBarrier && f.place.line != place.line) {
      fail("__syncthreads at " + place.text() + " while another thread waits at " + f.place.text());
    }
  }
  if (++b.waiting == b.live) return open_barrier();
  self->state = State::kAtBarrier;
  to_scheduler();
}

inline unsigned lanes_of(size_t warp) {
  const size_t threads = current->fibers.size();
  return (warp + 1) * 32 <= threads ? ~0u : (1u << (threads & 31)) - 1;
}

inline Collective& collective_of(size_t warp, unsigned mask) {
  for (auto& c : current->collectives[warp]) {
    if (c->mask == mask) return *c;
  }
  current->collectives[warp].push_back(std::make_unique<Collective>());
  current->collectives[warp].back()->mask = mask;
  return *current->collectives[warp].back();
}

// Every lane of `mask` posts `bytes` bytes. Returns what all of them posted, until this lane's next collective of the
// mask.
inline unsigned char (*exchange(unsigned mask, const void* value, int bytes, Place place)) [kSlot] {
  Block& b = *current;
  const unsigned lane = self->linear & 31;
  const size_t warp = self->linear >> 5;
  if (!(mask >> lane & 1)) fail("lane not in the mask it passes, " + place.text());
  if (mask & ~lanes_of(warp)) fail("mask names lanes that do not exist, " + place.text());
  if (mask & b.returned[warp]) fail("mask names lanes that have returned, " + place.text());
  Collective& c = collective_of(warp, mask);
  if (c.arrived && c.place.line != place.line) {
    fail("warp collective at " + place.text() + " while other lanes are at " + c.place.text());
  }
  c.place = place;
  if (bytes) std::memcpy(c.posted[lane], value, bytes);
  c.arrived |= 1u << lane;
  if (c.arrived == mask) {
    if (bytes) std::memcpy(c.seen, c.posted, sizeof c.seen);
    c.arrived = 0;
    for (size_t i = warp * 32; i < std::min<size_t>((warp + 1) * 32, b.fibers.size()); ++i) {
      Fiber& f = b.fibers[i];
      if (f.state == State::kAtCollective && f.collective == &c) f.state = State::kReady;
    }
  } else {
    self->collective = &c, self->state = State::kAtCollective, self->place = place;
    to_scheduler();
  }
  return c.seen;
}

// Nothing is copied before the wait that covers it; until then the destination holds NaN.
inline void copy_async(void* to, const void* from, int bytes, int from_bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | (from_bytes ? reinterpret_cast<uintptr_t>(from) : 0)) % bytes) {
    fail("cp.async: misaligned");
  }
  std::memset(to, 0xFF, bytes);
  self->open.push_back({to, from, bytes, from_bytes});
}

inline void copy_commit() {
  self->groups.push_back(std::move(self->open));
  self->open.clear();
}

inline void copy_wait(size_t in_flight) {
  auto& groups = self->groups;
  while (groups.size() > in_flight) {
    for (const Copy& c : groups.front()) {
      std::memset(c.to, 0, c.bytes);
      if (c.from_bytes) std::memcpy(c.to, c.from, c.from_bytes);
    }
    groups.erase(groups.begin());
  }
}

static void enter_fiber() {
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &current->scheduler_bottom, &current->scheduler_size);
#endif
  Block& b = *current;
  b.body();
  for (const auto& group : self->groups) {
    if (!group.empty() && b.error.empty()) b.error = "a thread returned with cp.async copies in flight";
  }
  self->state = State::kDone;
  --b.live;
  b.returned[self->linear >> 5] |= 1u << (self->linear & 31);
  if (b.waiting && b.error.empty()) {
    b.error = "thread " + std::to_string(self->linear) + " returned while others wait at __syncthreads";
  }
  to_scheduler(true);
  std::abort();
}

inline void resume(Block& b, Fiber& f) {
  self = &f;
#ifdef EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&b.scheduler_fake, f.stack, kStack);
#endif
  switch_stack(&b.scheduler, f.stack_pointer);
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(b.scheduler_fake, nullptr, nullptr);
#endif
}

inline std::string describe_deadlock(const Block& b) {
  std::string text = "deadlock:";
  int told = 0;
  for (const Fiber& f : b.fibers) {
    if (f.state == State::kDone || told++ == 4) continue;
    text += " thread " + std::to_string(f.linear) + " at " + f.place.text() + ";";
  }
  return text;
}

// Runs the block's threads to their end, warp by warp in `order`, each warp as far as it gets.
inline void run_block(Block& b, const std::vector<unsigned>& order) {
  const size_t threads = order.size();
  for (bool alive = true, progress = true; alive && b.error.empty();) {
    if (!progress) {
      b.error = describe_deadlock(b);
      return;
    }
    alive = progress = false;
    for (size_t first = 0; first < threads; first += 32) {
      for (bool again = true; again;) {
        again = false;
        for (size_t i = first; i < std::min(first + 32, threads); ++i) {
          Fiber& f = b.fibers[order[i]];
          if (f.state == State::kDone) continue;
          alive = true;
          if (f.state != State::kReady) continue;
          progress = again = true;
          resume(b, f);
          if (!b.error.empty()) return;
        }
      }
    }
  }
}

// Warps in a random order, and the lanes inside each.
inline void shuffle(std::vector<unsigned>& order, std::mt19937& random) {
  const size_t threads = order.size();
  std::vector<unsigned> warps((threads + 31) / 32);
  for (size_t i = 0; i < warps.size(); ++i) warps[i] = i;
  if (threads % 32 == 0) std::shuffle(warps.begin(), warps.end(), random);
  size_t at = 0;
  for (unsigned warp : warps) {
    const size_t begin = at;
    for (size_t i = warp * 32; i < std::min<size_t>(threads, (warp + 1) * 32); ++i) order[at++] = i;
    std::shuffle(order.begin() + begin, order.begin() + at, random);
  }
}

inline void prepare(Fiber& f, unsigned linear, dim3 block, unsigned char* stack) {
  f.stack = stack, f.state = State::kReady, f.linear = linear, f.fake_stack = nullptr;
  f.index = {linear % block.x, linear / block.x % block.y, linear / block.x / block.y};
  f.open.clear(), f.groups.clear();
#ifdef EMULATOR_ASAN
  __asan_unpoison_memory_region(stack, kStack);  // the fiber before ended without returning from its frames
#endif
  void** top = reinterpret_cast<void**>(stack + kStack - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&enter_fiber);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  f.stack_pointer = top;
}

inline void run_grid(const std::string& name, dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
  const unsigned threads = block.x * block.y * block.z;
  if (!threads || threads > 1024) throw Error("block of " + std::to_string(threads) + " threads");
  if (shared_bytes > kSharedLimit) throw Error(std::to_string(shared_bytes) + " bytes of dynamic shared memory");
  if (!grid.x || !grid.y || !grid.z || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535)
    throw Error("grid size");
  static thread_local std::vector<unsigned char*> stacks;
  while (stacks.size() < threads) stacks.push_back(static_cast<unsigned char*>(std::aligned_alloc(4096, kStack)));

  Block b;
  b.grid = grid, b.block = block, b.body = std::move(body);
  b.fibers.resize(threads), b.collectives.resize((threads + 31) / 32), b.returned.resize(b.collectives.size());
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) order[i] = schedule == 1 ? threads - 1 - i : i;
  std::mt19937 random(schedule);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  current = &b;
  for (uint64_t k = 0; k < blocks && b.error.empty(); ++k) {
    const uint64_t at = schedule == 1 ? blocks - 1 - k : k;
    b.index = {unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y)};
    if (schedule > 1) shuffle(order, random);
    b.live = threads, b.waiting = 0;
    std::fill(b.returned.begin(), b.returned.end(), 0u);
    for (auto& warp : b.collectives) warp.clear();
    // Exactly as large as asked for, so that ASan sees its end; NaN until it is written.
    const size_t room = shared_bytes / 128 * 128 + 256;
    b.shared = static_cast<unsigned char*>(std::aligned_alloc(128, room));
    std::memset(b.shared, 0xFF, room);
#ifdef EMULATOR_ASAN
    __asan_poison_memory_region(b.shared + shared_bytes, room - shared_bytes);
#endif
    for (unsigned i = 0; i < threads; ++i) prepare(b.fibers[i], i, block, stacks[i]);
    run_block(b, order);
#ifdef EMULATOR_ASAN
    __asan_unpoison_memory_region(b.shared, room);
#endif
    std::free(b.shared);
  }
  current = nullptr, self = nullptr;
  if (!b.error.empty()) throw Error(name + ": " + b.error);
}

// What SK_LAUNCH calls. An error is kept for cudaGetLastError, as a GPU does it.
template <typename Body>
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, Body body) {
  try {
    run_grid(name, grid, block, shared_bytes, body);
  } catch (const Error& error) {
    if (last_error.empty()) last_error = std::string(name) + ": " + error.what();
  }
}

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(current->shared);
}

}  // namespace emulator
