// How the elementwise kernels walk a tensor: one block per tile of a frame, whose vectors are
// consecutive in memory in either layout; one thread moves kVectors of them.
#pragma once

#include <initializer_list>

#include "launch.h"
#include "shift_access.cuh"

namespace latent_shift::cuda {

// Blocks a multiprocessor that are asked for: 768 threads of 64 bytes each cover the latency of
// memory, and for more the compiler would spill.
constexpr int kFlatBlocks = 3;

struct FlatFrames {
  Shift shift;
  Slices slices;
  uint32_t frame_size;  // elements
  uint32_t tiles;       // per frame
};

// What the elementwise operators work on: x (frames, channels, pixels), dense in either layout.
struct FlatShape {
  Shift shift;
  bool channels_last;
  int64_t frames, channels, pixels;
};

// Whether frames of `frame_size` elements behind these pointers can be accessed by 16 bytes.
inline bool fits_vectors(int64_t frame_size, int element_size,
                         std::initializer_list<const void*> pointers) {
  bool aligned = true;
  for (const void* p : pointers) aligned = aligned && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  return aligned && flat_vector(frame_size, element_size, aligned) * element_size == 16;
}

inline FlatFrames flat_frames(const FlatShape& shape, int vector) {
  check_frame_size(shape.channels, shape.pixels);
  const auto frame_size = static_cast<uint32_t>(shape.channels * shape.pixels);
  FlatFrames flat;
  flat.shift = shape.shift;
  flat.slices = shape.channels_last
                    ? slices_of(shape.shift, static_cast<uint32_t>(shape.channels), 1)
                    : slices_of(shape.shift, frame_size, static_cast<uint32_t>(shape.pixels));
  flat.frame_size = frame_size;
  flat.tiles = static_cast<uint32_t>(flat_tiles(frame_size, vector));
  return flat;
}

inline Grid flat_grid(const FlatShape& shape, const FlatFrames& flat) {
  return grid_of(shape.frames * flat.tiles, kFlatThreads);
}

// This thread's vectors: the frame, and the offsets in it; those past its end are left out.
template <int N>
struct FlatTile {
  int64_t frame;
  uint32_t first, frame_size;

  LS_DEVICE explicit FlatTile(const FlatFrames& flat) : frame_size(flat.frame_size) {
    const uint32_t n = blockIdx.x / flat.tiles;
    frame = n;
    first = ((blockIdx.x - n * flat.tiles) * (kFlatThreads * kFlatVectors) + threadIdx.x) * N;
  }
  LS_DEVICE uint32_t offset(int i) const { return first + i * (kFlatThreads * N); }
  LS_DEVICE bool holds(int i) const { return offset(i) < frame_size; }
};

}  // namespace latent_shift::cuda
