// The scheduler: the threads of the resident blocks are fibers on one OS thread.
//
// The seed chooses their order. 0: every thread one step at a time, in order. 1: backward, each warp as far as it
// gets. Others: at random, warps far out of step. A step ends where a thread waits for others.
// Compile this file without -fsanitize=thread: TSan then sees the kernel's own accesses alone, each fiber as a thread,
// ordered by barriers and fences only (a shuffle orders no memory).
#include <sys/mman.h>
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define WEAK(type, name, ...) __attribute__((weak)) type name(__VA_ARGS__)
extern "C" {  // the interface of the sanitizers: null where none is linked in
WEAK(void, __sanitizer_start_switch_fiber, void**, const void*, size_t);
WEAK(void, __sanitizer_finish_switch_fiber, void*, const void**, size_t*);
WEAK(void, __asan_poison_memory_region, void const volatile*, size_t);
WEAK(void, __asan_unpoison_memory_region, void const volatile*, size_t);
WEAK(void*, __tsan_get_current_fiber, );
WEAK(void*, __tsan_create_fiber, unsigned);
WEAK(void, __tsan_destroy_fiber, void*);
WEAK(void, __tsan_switch_to_fiber, void*, unsigned);
WEAK(void, __tsan_acquire, void*);
WEAK(void, __tsan_release, void*);
WEAK(void, AnnotateIgnoreWritesBegin, const char*, int);
WEAK(void, AnnotateIgnoreWritesEnd, const char*, int);
void emulated_switch(void** save, void* load);
}
static const bool TSAN = __tsan_create_fiber != nullptr, ASAN = __sanitizer_start_switch_fiber != nullptr && !TSAN;

asm(R"(.text
.hidden emulated_switch
emulated_switch:  # x86-64
 pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp,(%rdi); movq %rsi,%rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
 ret
)");

struct Index { unsigned x; };
struct Lane { Index thread, block; void* dynamic; };  // as in emulator.h
extern "C" { Lane* emulated_lane; Index emulated_grid, emulated_block; }

namespace {
enum State : uint8_t { READY, AT_BLOCK_BARRIER, AT_WARP_FUNCTION, DONE };

struct Warp {
  unsigned mask[32], lines[32], source[32], arrived = 0, alive = 0;
  uint64_t in[32], out[32];
  char order;  // an address for TSan
};
struct Memory { int key; void* data; size_t bytes, reserved; };
struct Block {
  unsigned threads = 0, arrived = 0, alive = 0, line = 0;
  size_t first = 0;  // its first fiber
  std::vector<Warp> warps;
  std::vector<Memory> memory;
  char order = 0;
};
struct Fiber {
  Lane lane;
  void *stack_pointer, *tsan, *fake_stack, *stack;
  Block* block;
  Warp* warp;
  State state;
  unsigned line;
};

constexpr size_t STACK = 256 << 10;
std::vector<Fiber> fibers;
std::vector<Block> blocks;
std::vector<char*> stacks;
Fiber* current;
std::string error;
void (*body)(void*);
void *scheduler_pointer, *scheduler_tsan, *body_argument;
const void* scheduler_stack;
size_t scheduler_stack_bytes;
char launched, finished, fenced;  // addresses for TSan

void acquire(void* p) { if (TSAN) __tsan_acquire(p); }
void release(void* p) { if (TSAN) __tsan_release(p); }

void yield() {
  Fiber* self = current;
  void** fake = self->state == DONE ? nullptr : &self->fake_stack;
  if (ASAN) __sanitizer_start_switch_fiber(fake, scheduler_stack, scheduler_stack_bytes);
  if (TSAN) __tsan_switch_to_fiber(scheduler_tsan, 1);
  emulated_switch(&self->stack_pointer, scheduler_pointer);
  if (ASAN) __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
}

void fail(State state, const std::string& message) {  // the scheduler stops at the first error
  error = message;
  current->state = state;
  yield();
}

void open_barrier(Block* block) {
  block->arrived = 0;
  for (Fiber *f = &fibers[block->first], *end = f + block->threads; f < end; ++f)
    if (f->state == AT_BLOCK_BARRIER) f->state = READY;
}

void entry() {
  if (ASAN) __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  acquire(&launched);
  body(body_argument);
  release(&finished);
  Fiber* self = current;
  self->state = DONE;
  self->warp->alive &= ~(1u << (self->lane.thread.x & 31));
  // a thread that has returned counts as arrived
  if (--self->block->alive && self->block->arrived == self->block->alive) open_barrier(self->block);
  yield();  // for good
}

void* allocate(size_t bytes, Block* block, int key) {  // 0xff in every byte: NaN in every float type
  if (TSAN) AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  const size_t reserved = (bytes + 127) / 128 * 128 + 128;
  void* data = memset(aligned_alloc(128, reserved), 0xff, bytes);
  if (ASAN) __asan_poison_memory_region(static_cast<char*>(data) + bytes, reserved - bytes);
  block->memory.push_back({key, data, bytes, reserved});
  if (TSAN) AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  return data;
}

void free_stacks() {
  for (; !stacks.empty(); stacks.pop_back()) munmap(stacks.back(), STACK);
}

void prepare(Fiber& fiber, size_t index) {  // its stack: the next switch to it enters entry()
  if (index >= stacks.size()) {
    void* made = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(made, 4096, PROT_NONE);  // where mmap has failed, the first push will
    stacks.push_back(static_cast<char*>(made));
  }
  char* stack = stacks[index];
  fiber.stack = stack;
  if (ASAN) __asan_unpoison_memory_region(stack + 4096, STACK - 4096);
  // offset by the index, so that the stacks do not compete for the same cache sets
  void** top = reinterpret_cast<void**>(stack + STACK - 128 - (index * 320 & 8191));
  memset(top, 0, 64);  // six registers, then where to return to
  top[6] = reinterpret_cast<void*>(&entry);
  fiber.stack_pointer = top;
  if (TSAN) fiber.tsan = __tsan_create_fiber(0);
}

void start(unsigned threads, size_t shared, unsigned first, unsigned count) {
  blocks.assign(count, Block());
  fibers.assign(size_t(count) * threads, Fiber());
  if (TSAN) free_stacks();  // a used stack would look shared to it
  for (unsigned k = 0; k < count; ++k) {
    Block& block = blocks[k];
    block.threads = block.alive = threads;
    block.first = size_t(k) * threads;
    block.warps.resize((threads + 31) / 32);
    void* dynamic = shared ? allocate(shared, &block, -1) : nullptr;
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& f = fibers[block.first + t];
      f = {{{t}, {first + k}, dynamic}, nullptr, nullptr, nullptr, nullptr, &block, &block.warps[t / 32], READY, 0};
      f.warp->alive |= 1u << (t & 31);
      prepare(f, block.first + t);
    }
  }
}

void step(Fiber& fiber) {
  current = &fiber;
  emulated_lane = &fiber.lane;
  void* fake_stack = nullptr;
  if (ASAN) __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, STACK);
  if (TSAN) __tsan_switch_to_fiber(fiber.tsan, 1);
  emulated_switch(&scheduler_pointer, fiber.stack_pointer);
  if (ASAN) __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

std::string lines(const char* before, unsigned line) { return before + std::to_string(line); }

void describe_deadlock() {
  size_t waiting = 0;
  error = "deadlock:";
  for (Fiber& f : fibers)
    if (f.state != DONE && waiting++ < 4)
      error += " block " + std::to_string(f.lane.block.x) + " thread " + std::to_string(f.lane.thread.x) + " waits at " +
               (f.state == AT_BLOCK_BARRIER ? "__syncthreads" : "a warp function") + lines(", line ", f.line) + ";";
  error += " " + std::to_string(waiting) + " threads never finish";
}

void run(uint64_t seed, std::mt19937_64& random) {  // until all resident threads are done, or nothing moves
  struct Range { size_t first, last; };
  std::vector<Range> warps;
  std::vector<size_t> order(fibers.size());
  std::iota(order.begin(), order.end(), 0);
  for (Block& b : blocks)
    for (size_t t = 0; t < b.threads; t += 32)
      warps.push_back({b.first + t, b.first + std::min<size_t>(t + 32, b.threads)});
  if (seed == 1) {
    std::reverse(warps.begin(), warps.end());
    for (Range warp : warps) std::reverse(order.begin() + warp.first, order.begin() + warp.last);
  }
  for (size_t left = fibers.size(); left && error.empty();) {
    bool moved = false, skipped = false;
    if (seed > 1) std::shuffle(warps.begin(), warps.end(), random);
    for (Range warp : warps) {
      if (seed > 1 && random() & 3) { skipped = true; continue; }
      if (seed > 1) std::shuffle(order.begin() + warp.first, order.begin() + warp.last, random);
      for (bool again = true; again && error.empty();) {
        again = false;
        for (size_t i = warp.first; i < warp.last && error.empty(); ++i)
          if (Fiber& f = fibers[order[i]]; f.state == READY) {
            step(f);
            left -= f.state == DONE;
            moved = true;
            again = seed != 0;
          }
      }
    }
    if (!moved && !skipped && left && error.empty()) describe_deadlock();
  }
}
}  // namespace

extern "C" void emulated_block_barrier(unsigned line) {
  Fiber* self = current;
  Block* block = self->block;
  self->line = line;
  if (block->arrived == 0) block->line = line;
  if (block->line != line)
    fail(AT_BLOCK_BARRIER, lines("divergent __syncthreads(): lines ", block->line) + lines(" and ", line));
  release(&block->order);
  self->state = AT_BLOCK_BARRIER;
  if (++block->arrived == block->alive) open_barrier(block);
  else yield();
  acquire(&block->order);
}

// All lanes of the mask meet, and each takes the value of its source. No memory is ordered: CUDA orders none here.
extern "C" void emulated_exchange(unsigned mask, int source, const uint64_t* value, uint64_t* result, unsigned line) {
  Fiber* self = current;
  Warp* warp = self->warp;
  const unsigned lane = self->lane.thread.x & 31;
  self->line = line;
  if (mask & ~warp->alive)
    fail(AT_WARP_FUNCTION, lines("line ", line) + ": a mask with lanes that have left or do not exist");
  warp->in[lane] = *value, warp->source[lane] = source & 31;
  warp->mask[lane] = mask, warp->lines[lane] = line;
  warp->arrived |= 1u << lane;
  for (unsigned k = 0; k < 32; ++k)
    if ((warp->arrived & mask) >> k & 1 && (warp->lines[k] != line || warp->mask[k] != mask))
      fail(AT_WARP_FUNCTION, lines("a warp meets at lines ", warp->lines[k]) + lines(" and ", line));
  self->state = AT_WARP_FUNCTION;
  if ((warp->arrived & mask) != mask) {
    yield();
  } else {
    warp->arrived &= ~mask;
    for (unsigned k = 0; k < 32; ++k)
      if (mask >> k & 1) {
        // a lane outside the mask is undefined: a NaN
        warp->out[k] = mask >> warp->source[k] & 1 ? warp->in[warp->source[k]] : 0x7ff7dead7fc1deadull;
        self[int(k) - int(lane)].state = READY;
      }
  }
  *result = warp->out[lane];
}

extern "C" void emulated_warp_barrier(unsigned mask, unsigned line) {
  uint64_t nothing = 0;
  if (mask == 0xffffffffu) mask = current->warp->alive;
  release(&current->warp->order);
  emulated_exchange(mask, current->lane.thread.x & 31, &nothing, &nothing, line);
  acquire(&current->warp->order);
}

extern "C" void* emulated_shared(int key, size_t bytes) {
  for (Memory& m : current->block->memory)
    if (m.key == key) return m.data;
  return allocate(bytes, current->block, key);
}

extern "C" void emulated_fence() { release(&fenced), acquire(&fenced); }

extern "C" const char* emulated_launch(void (*kernel)(void*), void* argument, unsigned grid, unsigned threads,
                                       size_t shared, uint64_t seed, unsigned resident) {
  if (!grid || grid > 2147483647u || !threads || threads > 1024) return "invalid grid or block";
  if (shared > 227 * 1024) return "too much shared memory";
  emulated_grid = {grid}, emulated_block = {threads};
  body = kernel, body_argument = argument;
  error.clear();
  std::mt19937_64 random(seed);
  if (TSAN) scheduler_tsan = __tsan_get_current_fiber();
  release(&launched);
  for (uint64_t first = 0; first < grid && error.empty(); first += resident) {
    start(threads, shared, unsigned(first), unsigned(std::min<uint64_t>(resident, grid - first)));
    run(seed, random);
    if (TSAN) AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    for (Fiber& f : fibers) if (TSAN) __tsan_destroy_fiber(f.tsan);
    for (Block& b : blocks)
      for (Memory& m : b.memory) {
        if (ASAN) __asan_unpoison_memory_region(m.data, m.reserved);
        free(m.data);
      }
    if (TSAN) AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  }
  acquire(&finished);
  free_stacks();
  return error.empty() ? nullptr : error.c_str();
}
