// Checks of every memory access. The compiler calls them (see the end of the file).
#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "state.h"

namespace simt {
namespace {

constexpr size_t kAlignment = 512;  // as of device memory

constexpr uint16_t kSeveralLanes = 0x8000, kSeveralWarps = 0xffff;

// Who touched a byte last, and when.
struct Stamp {
  uint32_t tick;
  uint32_t code;
  uint16_t thread;     // or kSeveralWarps, or kSeveralLanes + warp
  uint16_t warp_tick;  // of that thread's warp
};

struct Cell {
  Stamp write, read;
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

using Cells = std::unique_ptr<Cell[], Free>;

Cells make_cells(size_t bytes) { return Cells(static_cast<Cell*>(std::calloc(bytes, sizeof(Cell)))); }

struct Region {
  uintptr_t begin;
  size_t bytes;
  bool shared;
  std::string name;
  Cells cells;  // one a byte, null where kernels only read

  bool contains(uintptr_t address, size_t size) const {
    return address >= begin && size <= bytes && address - begin <= bytes - size;
  }
};

std::vector<Region> regions;
Region shared, image;  // the library's thread-local segment, and everything else that it holds

const Region* find(uintptr_t address, size_t size) {
  static const Region* last = nullptr;
  if (shared.contains(address, size)) return &shared;
  if (image.contains(address, size)) return &image;
  if (last >= regions.data() && last < regions.data() + regions.size() && last->contains(address, size)) return last;
  for (const Region& region : regions)
    if (region.contains(address, size)) return last = &region;
  return nullptr;
}

[[noreturn]] void fail_outside(const std::string& access, uintptr_t address, size_t size) {
  std::string where = "far from every buffer";
  size_t nearest = 4096;
  const auto compare = [&](const Region& region) {
    const uintptr_t end = region.begin + region.bytes;
    const size_t distance = address + size > end ? address + size - end : region.begin - address;
    if (address < region.begin + region.bytes + nearest && address + nearest > region.begin && distance < nearest) {
      nearest = distance;
      where = (address + size > end ? "reaching " + std::to_string(distance) + " bytes past the end of "
                                    : std::to_string(distance) + " bytes before ") +
              region.name + " (" + std::to_string(region.bytes) + " bytes)";
    }
  };
  for (const Region& region : regions) compare(region);
  compare(shared);
  fail_in_thread("out of bounds: " + access + ", " + where);
}

std::string thread_name(uint16_t thread) {
  if (thread == kSeveralWarps) return "several threads";
  return thread & kSeveralLanes ? number("several threads of warp", thread & ~kSeveralLanes) : number("thread", thread);
}

uint16_t warp_of(uint16_t thread) {
  return thread == kSeveralWarps ? kSeveralWarps : thread & kSeveralLanes ? thread & ~kSeveralLanes : thread / kLanes;
}

// Whether what `before` tells of was over before the current thread's access. Blocks are never ordered, except that
// each has its own shared memory.
bool ordered(const Region& region, const Stamp& before) {
  if (before.tick != tick) return before.tick >= block_tick || before.tick < launch_tick || region.shared;
  const unsigned warp = current->id / kLanes;
  return before.thread == current->id || (warp_of(before.thread) == warp && before.warp_tick < warp_ticks[warp]);
}

// The current thread and, if they have read in the same interval, those before it.
uint16_t readers(const Stamp& before) {
  const uint16_t id = current->id, warp = id / kLanes;
  if (before.tick != tick || before.thread == id) return id;
  if (warp_of(before.thread) != warp) return kSeveralWarps;
  return before.warp_tick < warp_ticks[warp] ? id : uint16_t(kSeveralLanes | warp);
}

void check_byte(const Region& region, Cell& cell, bool write, uint32_t code) {
  if (!write && cell.write.tick < (region.shared ? block_tick : 1))
    fail_in_thread("reads unwritten " + region.name + " at " + code_name(code));
  const bool after_write = ordered(region, cell.write);
  if (!after_write || (write && !ordered(region, cell.read))) {
    const Stamp& other = after_write ? cell.read : cell.write;
    fail_in_thread("race: " + std::string(write ? "writes " : "reads ") + region.name + " at " + code_name(code) +
                   (after_write ? ", read by " : ", written by ") +
                   (other.tick < block_tick ? "another block" : thread_name(other.thread)) + " at " +
                   code_name(other.code) + " with no barrier between");
  }
  const uint16_t id = current->id, warp_tick = warp_ticks[id / kLanes];
  if (write)
    cell.write = {tick, code, id, warp_tick};
  else
    cell.read = {tick, code, readers(cell.read), warp_tick};
}

void access(const void* pointer, size_t size, bool write, const void* from) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (current == nullptr || address - current->stack < kStack) return;
  const uint32_t code = code_at(from) - 1;
  const Region* region = find(address, size);
  if (region != nullptr && region->cells != nullptr) {
    Cell* cells = region->cells.get() + (address - region->begin);
    for (size_t i = 0; i < size; ++i) check_byte(*region, cells[i], write, code);
    return;
  }
  const auto arguments = reinterpret_cast<uintptr_t>(call.arguments);
  if (!write && (region != nullptr || address - arguments < call.bytes)) return;
  const std::string what = (write ? "writes " : "reads ") + std::to_string(size) + " bytes at " + code_name(code);
  if (region != nullptr) fail_in_thread(what + ", in " + region->name + ", which is only for reading");
  fail_outside(what, address, size);
}

void add_region(const void* memory, size_t bytes, bool writable, const char* name) {
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  regions.push_back({begin, bytes, false, name, writable ? make_cells(bytes) : nullptr});
}

}  // namespace

uint32_t code_at(const void* instruction) { return reinterpret_cast<uintptr_t>(instruction) - image.begin; }

std::string code_name(uint32_t code) {
  char text[24];
  std::snprintf(text, sizeof(text), "code+0x%x", code);
  return text;
}

void find_segments() {
  static thread_local volatile char anchor;
  anchor = 1;  // the segment exists from the first access on
  const auto visit = [](dl_phdr_info* info, size_t, void*) {
    Region module{};
    size_t thread_local_bytes = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      if (header.p_type == PT_LOAD) module.bytes = std::max<size_t>(module.bytes, header.p_vaddr + header.p_memsz);
      if (header.p_type == PT_TLS) thread_local_bytes = header.p_memsz;
    }
    module.begin = info->dlpi_addr;
    if (!module.contains(reinterpret_cast<uintptr_t>(&tick), 1)) return 0;
    image = std::move(module);
    image.name = "the library's constants";
    const auto begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
    shared = {begin, thread_local_bytes, true, "shared memory", make_cells(thread_local_bytes)};
    return 1;
  };
  if (!shared.contains(reinterpret_cast<uintptr_t>(&anchor), 1)) dl_iterate_phdr(visit, nullptr);
}

void* allocate(size_t bytes, const char* name) {
  // One more unit of alignment keeps the end of one from touching the next.
  void* memory = std::aligned_alloc(kAlignment, (bytes / kAlignment + 2) * kAlignment);
  if (memory == nullptr) throw std::bad_alloc();
  std::memset(memory, 0xff, bytes);
  add_region(memory, bytes, true, name);
  return memory;
}

void release(void* memory) {
  std::erase_if(regions, [&](const Region& region) { return region.begin == reinterpret_cast<uintptr_t>(memory); });
  std::free(memory);
}

}  // namespace simt

extern "C" {

// For build.py.
void simt_add(const void* memory, size_t bytes, bool writable, const char* name) {
  simt::add_region(memory, bytes, writable, name);
}

void simt_clear() { simt::regions.clear(); }

// First byte of a buffer that no kernel has written, -1 if there is none.
int64_t simt_unwritten(const void* memory) {
  for (const auto& region : simt::regions) {
    if (region.begin != reinterpret_cast<uintptr_t>(memory)) continue;
    for (size_t i = 0; i < region.bytes; ++i)
      if (region.cells[i].write.tick == 0) return i;
  }
  return -1;
}

// Before each access (-fsanitize=thread).
#define SIMT_ACCESS(SIZE)                                                                          \
  void __tsan_read##SIZE(void* at) { simt::access(at, SIZE, false, __builtin_return_address(0)); } \
  void __tsan_write##SIZE(void* at) { simt::access(at, SIZE, true, __builtin_return_address(0)); }
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)
void __tsan_read_range(void* at, size_t size) { simt::access(at, size, false, __builtin_return_address(0)); }
void __tsan_write_range(void* at, size_t size) { simt::access(at, size, true, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}

// Where an address is misaligned for its type, or an index outside its array (-fsanitize=alignment,bounds-strict).
// Both pass a structure that begins like this.
struct SanitizedType {
  uint16_t kind, info;
  char name[1];
};

struct SanitizedAccess {
  const char* file;
  uint32_t line, column;
  const SanitizedType* type;
  unsigned char log_alignment;
};

void __ubsan_handle_type_mismatch_v1(const SanitizedAccess* data, uintptr_t address) {
  if (simt::current == nullptr) return;
  const unsigned alignment = 1u << data->log_alignment;
  simt::fail_in_thread("misaligned: " + simt::place(data->file, data->line) + " takes " + data->type->name + " from " +
                       std::to_string(address % alignment) + " bytes past a multiple of " + std::to_string(alignment));
}

void __ubsan_handle_out_of_bounds(const SanitizedAccess* data, uintptr_t index) {
  if (simt::current == nullptr) return;
  simt::fail_in_thread("out of bounds: " + simt::place(data->file, data->line) + " takes index " +
                       std::to_string(static_cast<intptr_t>(index)) + " of " + data->type->name);
}

}  // extern "C"
