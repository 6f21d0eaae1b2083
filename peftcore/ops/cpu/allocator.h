// Where this process's tensors lie.
#pragma once

namespace polypeft {

// From now on torch takes the memory of CPU tensors from malloc, not from posix_memalign; tensors
// begin at a cache line as before. Before version 2.38 glibc's posix_memalign does not find the hole
// that a tensor of the same size has left, for it asks for more than is needed and cuts the rest off:
// the heap of a process whose tensors come and go grows to twice what it ever holds at a time.
void allocate_by_malloc();

}  // namespace polypeft
