// Memory for the operands of the vendor's matrix product.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace fbkd {

// The product's rounding depends on where its operands lie relative to a cache line: plain new gives 16 bytes, and
// other last bits from run to run.
template <typename T>
struct CacheLineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kCacheLine{64};

  CacheLineAllocator() = default;
  template <typename U>
  CacheLineAllocator(const CacheLineAllocator<U>&) {}

  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kCacheLine)); }
  void deallocate(T* data, size_t) { ::operator delete(data, kCacheLine); }

  friend bool operator==(const CacheLineAllocator&, const CacheLineAllocator&) { return true; }
  friend bool operator!=(const CacheLineAllocator&, const CacheLineAllocator&) { return false; }
};

// Starts as zeros, like any vector.
template <typename T>
using Buffer = std::vector<T, CacheLineAllocator<T>>;

// Uninitialised memory with the same alignment.
template <typename T>
class UndefinedBuffer {
 public:
  UndefinedBuffer() = default;
  explicit UndefinedBuffer(int64_t count) : data_(CacheLineAllocator<T>().allocate(static_cast<size_t>(count))) {}
  T* get() const { return data_.get(); }

 private:
  struct Deleter {
    void operator()(T* data) const { CacheLineAllocator<T>().deallocate(data, 0); }
  };
  std::unique_ptr<T[], Deleter> data_;
};

}  // namespace fbkd
