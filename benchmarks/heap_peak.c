// Counts what a process holds in the C heap, whoever asked for it: PyTorch's allocator, oneDNN, our own kernels,
// Python. Built and preloaded by training_memory.py. glibc only: its allocator stays in use under the names below.
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

void* __libc_malloc(size_t size);
void* __libc_calloc(size_t count, size_t size);
void* __libc_realloc(void* block, size_t size);
void* __libc_memalign(size_t alignment, size_t size);
void __libc_free(void* block);

static atomic_llong held, peak;

long long heap_held(void) { return held; }
long long heap_peak(void) { return peak; }
void heap_restart(void) { peak = held; }

static void add(long long bytes) {
  const long long now = atomic_fetch_add(&held, bytes) + bytes;
  long long most = peak;
  while (now > most && !atomic_compare_exchange_weak(&peak, &most, now)) {
  }
}

static void* counted(void* block) {
  if (block) add((long long)malloc_usable_size(block));
  return block;
}

void* malloc(size_t size) { return counted(__libc_malloc(size)); }
void* calloc(size_t count, size_t size) { return counted(__libc_calloc(count, size)); }
void* memalign(size_t alignment, size_t size) { return counted(__libc_memalign(alignment, size)); }
void* aligned_alloc(size_t alignment, size_t size) { return counted(__libc_memalign(alignment, size)); }

int posix_memalign(void** block, size_t alignment, size_t size) {
  if (alignment < sizeof(void*) || (alignment & (alignment - 1))) return EINVAL;
  *block = counted(__libc_memalign(alignment, size));
  return *block ? 0 : ENOMEM;
}

void* realloc(void* block, size_t size) {
  const long long before = block ? (long long)malloc_usable_size(block) : 0;
  void* moved = __libc_realloc(block, size);
  if (moved || !size) add((moved ? (long long)malloc_usable_size(moved) : 0) - before);
  return moved;
}

void free(void* block) {
  if (block) atomic_fetch_sub(&held, (long long)malloc_usable_size(block));
  __libc_free(block);
}
