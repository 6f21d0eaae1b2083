#include "allocator.h"

#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <cstdlib>

namespace polypeft {
namespace {

// The address that malloc gave lies in front of the tensor.
struct MallocAllocator final : c10::Allocator {
  static constexpr size_t kAlignment = 64, kBefore = sizeof(void*);

  static void release(void* data) {
    if (data) std::free(static_cast<void**>(data)[-1]);
  }
  c10::DataPtr allocate(size_t size) override {
    const c10::Device cpu(c10::kCPU);
    if (size == 0) return {nullptr, nullptr, &release, cpu};
    const size_t with_room = size + kBefore + kAlignment - 1;
    void* given = with_room > size ? std::malloc(with_room) : nullptr;
    TORCH_CHECK_WITH(OutOfMemoryError, given, "there are no ", size, " bytes for a tensor");
    const auto first = reinterpret_cast<uintptr_t>(given) + kBefore;
    void* data = reinterpret_cast<void*>((first + kAlignment - 1) & -uintptr_t{kAlignment});
    static_cast<void**>(data)[-1] = given;
    return {data, data, &release, cpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};

}  // namespace

void allocate_by_malloc() {
  static MallocAllocator allocator;  // tensors outlive whoever asked
  c10::SetCPUAllocator(&allocator);
}

}  // namespace polypeft
