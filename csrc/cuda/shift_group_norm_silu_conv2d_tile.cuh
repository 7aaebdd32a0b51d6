// What the kernels of shift_group_norm_silu_conv2d share: tiles, the halo in shared memory, and the
// epilogue.
//
// A tile is 8x8 output pixels of one frame. Its input is a halo of 10x10 pixels, in shared memory as
//   [4 chunks][kHaloPitch pixels][8 channels], 16 bytes a pixel and chunk,
// 32 channels at a time: any 8 neighbouring pixels of a row are 128 contiguous bytes, which is a core
// matrix of wgmma and a conflict-free matrix of ldmatrix, wherever they start. A tap (dy, dx) of the
// filter is only another start, dy * 10 + dx pixels on.
#pragma once

#include <cstdint>

#include "../common/shift.h"
#include "shift_group_norm_silu_conv2d_plan.h"
#include "vec.cuh"

namespace latent_shift::cuda {

__host__ __device__ constexpr uint32_t tap_offset(int tap) {
  return (tap / 3 * kHalo + tap % 3) * kVectorBytes;
}

struct ConvParams {
  const void* x;     // [frames, height, width, x_channels]
  const void* skip;  // [frames, height, width, in_channels - x_channels], or null
  const float*
      affine;  // [frames, 2, in_channels]: scale and shift, placement of the shift included
  const void* filters;   // [column blocks, blocks, taps, kBlockChunks, columns, kChunk]
  const void* residual;  // as out, or null
  void* out;             // [frames, height, width, out_channels]
  float* partials;       // [frames, tiles per frame, out_channels, 2], or null
  Table filter_bias, out_temb;
  Shift shift, out_shift;
  int32_t frames, height, width, x_channels, in_channels, out_channels;
  int32_t tiles_x, tiles_per_frame, tiles;
  int32_t blocks;  // of kBlockChannels channels of the input
  float out_scale;
};

__device__ __forceinline__ void load8(const float* from, float (&v)[kChunk]) {
  const float4 low = reinterpret_cast<const float4*>(from)[0];
  const float4 high = reinterpret_cast<const float4*>(from)[1];
  v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
  v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

// The vector whose 16-bit numbers from `begin` on are those of `above`, the others those of `below`.
__device__ __forceinline__ uint4 upper(const uint4& above, const uint4& below, int begin) {
  const auto join = [begin](uint32_t a, uint32_t b, int pair) {
    const uint32_t mask =
        (2 * pair >= begin ? 0x0000ffffu : 0u) | (2 * pair + 1 >= begin ? 0xffff0000u : 0u);
    return (a & mask) | (b & ~mask);
  };
  return {join(above.x, below.x, 0), join(above.y, below.y, 1), join(above.z, below.z, 2),
          join(above.w, below.w, 3)};
}

// Where the slices of a shift end, in registers: the slice of a channel.
struct SliceEnds {
  int32_t first, second;

  __device__ __forceinline__ explicit SliceEnds(const Shift& shift)
      : first(static_cast<int32_t>(shift.end[0])), second(static_cast<int32_t>(shift.end[1])) {}

  // of the second and third slice
  __device__ __forceinline__ int32_t begin(int slice) const { return slice == 1 ? first : second; }

  __device__ __forceinline__ int slice(int32_t channel) const {
    return (channel >= first) + (channel >= second);
  }
};

// Which tile: its frame and its first pixel. A CTA past the last tile has one without pixels.
struct Tile {
  int32_t index, frame, in_frame, y, x, height, width;

  __device__ __forceinline__ Tile(const ConvParams& p, int32_t index_) : index(index_) {
    const bool exists = index < p.tiles;
    frame = exists ? index / p.tiles_per_frame : 0;
    in_frame = exists ? index % p.tiles_per_frame : 0;
    y = in_frame / p.tiles_x * kTile;
    x = in_frame % p.tiles_x * kTile;
    height = exists ? min(kTile, p.height - y) : 0;
    width = exists ? min(kTile, p.width - x) : 0;
  }
};

// What there is to know about a tile, in shared memory: registers are for sums.
struct TileTable {
  static constexpr int kPixels = 128;  // of any loader's last round

  int32_t tile, frame;
  int32_t source[3];  // the frame each slice of channels reads, or -1
  // Where its output goes, by slice: to one or two readers, and to its own frame what no frame feeds.
  enum { kFirst, kSecond, kFill, kTargets };
  int32_t targets[kTargets][3];
  int32_t pixel[kPixels];  // where a pixel of the halo lies in its frame, or -1

  __device__ __forceinline__ void fill(const ConvParams& p, const Tile& of, int thread,
                                       int threads) {
    for (int i = thread; i < kPixels; i += threads) {
      const int32_t y = of.y - 1 + i / kHalo, x = of.x - 1 + i % kHalo;
      const bool inside =
          of.height > 0 && i < kHaloPixels && y >= 0 && y < p.height && x >= 0 && x < p.width;
      pixel[i] = inside ? y * p.width + x : -1;
    }
    if (thread < 3) {
      source[thread] =
          static_cast<int32_t>(source_frame(p.shift, of.frame, p.shift.offset[thread]));
      const int32_t offset = p.out_shift.offset[thread];
      const Readers readers = reader_frames(p.out_shift, of.frame, offset);
      targets[kFirst][thread] = static_cast<int32_t>(readers.first);
      targets[kSecond][thread] = static_cast<int32_t>(readers.second);
      targets[kFill][thread] = source_frame(p.out_shift, of.frame, offset) < 0 ? of.frame : -1;
    }
    if (thread == 0) {
      tile = of.index;
      frame = of.frame;
    }
  }
};

// Channels of one frame of x or skip, whichever holds them.
template <class T>
struct Source {
  const T* base;
  int32_t stride;
  bool exists;

  __device__ __forceinline__ Source(const ConvParams& p, int32_t channel, int32_t frame) {
    const bool in_x = channel < p.x_channels;
    stride = in_x ? p.x_channels : p.in_channels - p.x_channels;
    exists = frame >= 0 && channel < p.in_channels;
    base = static_cast<const T*>(in_x ? p.x : p.skip) +
           int64_t{frame} * p.height * p.width * stride + (in_x ? channel : channel - p.x_channels);
  }

  __device__ __forceinline__ const T* at(int32_t pixel) const {
    return base + int64_t{pixel} * stride;
  }
  // Zeros outside the frame and the clip.
  __device__ __forceinline__ uint4 load(int32_t pixel) const {
    return exists && pixel >= 0 ? *reinterpret_cast<const uint4*>(at(pixel)) : uint4{};
  }
};

// Brings a tile's halo to shared memory, one block of channels at a time: `copy` issues cp.async of the
// raw numbers to their places, `activate` normalises and activates a thread's own where they lie, once
// they have landed. No registers wait in between. A thread keeps its chunk of the block, and has so
// many vectors under way in `activate`.
template <class T, int Threads, int Vectors>
class HaloLoader {
 public:
  __device__ __forceinline__ HaloLoader(const ConvParams& params, const TileTable& table_,
                                        int thread)
      : p(params), table(table_), chunk(thread % kBlockChunks), first(thread / kBlockChunks) {}

  __device__ __forceinline__ void copy(int block, unsigned char* halo) const {
    const int32_t channel = channel_of(block);
    const SliceEnds ends(p.shift);
    const int begin = ends.slice(channel), end = ends.slice(channel + kChunk - 1);
    uint4* const row = row_of(halo);
    for (int k = begin; k <= end; ++k) {
      const Source<T> source(p, channel, table.source[k]);
      if (begin == end) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          const int pixel = first + i * kStep;
          const int32_t from = table.pixel[pixel];
          const bool exists = source.exists && from >= 0;
          if (pixel < kHaloPixels)
            ptx::cp_async_16(row + pixel, exists ? source.at(from) : p.x, exists);
        }
      } else {  // a vector that straddles slices takes its later channels from other frames
#pragma unroll 1
        for (int pixel = first; pixel < kHaloPixels; pixel += kStep) {
          const uint4 v = source.load(table.pixel[pixel]);
          row[pixel] = k == begin ? v : upper(v, row[pixel], ends.begin(k) - channel);
        }
      }
    }
  }

  __device__ __forceinline__ void activate(int block, unsigned char* halo) const {
    const int32_t channel = channel_of(block);
    if (channel >= p.in_channels) return;
    const float4* scale = reinterpret_cast<const float4*>(affine_of(channel));
    const float4* shift = reinterpret_cast<const float4*>(affine_of(channel) + p.in_channels);
    const float4 scale0 = scale[0], scale1 = scale[1], shift0 = shift[0], shift1 = shift[1];
    uint4* const row = row_of(halo);
#pragma unroll Vectors
    for (int pixel = first; pixel < kHaloPixels; pixel += kStep) {
      if (table.pixel[pixel] < 0) continue;  // padding stays zero
      uint4 v = row[pixel];
      activate(v.x, v.y, scale0, shift0);
      activate(v.z, v.w, scale1, shift1);
      row[pixel] = v;
    }
  }

 private:
  static constexpr int kStep = Threads / kBlockChunks;
  static constexpr int kVectors = (kHaloPixels + kStep - 1) / kStep;
  static_assert(Threads % kBlockChunks == 0 && kStep * kVectors <= TileTable::kPixels);

  __device__ __forceinline__ int32_t channel_of(int block) const {
    return block * kBlockChannels + chunk * kChunk;
  }
  __device__ __forceinline__ uint4* row_of(unsigned char* halo) const {
    return reinterpret_cast<uint4*>(halo) + chunk * kHaloPitch;
  }
  __device__ __forceinline__ const float* affine_of(int32_t channel) const {
    return p.affine + int64_t{table.frame} * 2 * p.in_channels + channel;
  }

  // silu(v * scale + shift) of 4 numbers, in place
  static __device__ __forceinline__ void activate(uint32_t& low, uint32_t& high,
                                                  const float4& scale, const float4& shift) {
    constexpr int kNumbers = kChunk / 2;
    const float scales[] = {scale.x, scale.y, scale.z, scale.w};
    const float shifts[] = {shift.x, shift.y, shift.z, shift.w};
    float v[kNumbers];
    widen(Vec<T, kNumbers>{uint2{low, high}}, v);
#pragma unroll
    for (int e = 0; e < kNumbers; ++e) {
      const float z = fmaf(v[e], scales[e], shifts[e]);
      v[e] = z * sigmoid<T>(z);
    }
    const uint2 word = narrow<T, kNumbers>(v).word;
    low = word.x;
    high = word.y;
  }

  const ConvParams& p;
  const TileTable& table;
  const int chunk, first;
};

// Results leave by way of shared memory, 128 threads a tile: first fp32 sums in fragment order, then
// in parts whole vectors with bias, table, residual and scale, stored at every frame that reads them.
template <class T, int Columns, int Part>
class Epilogue {
 public:
  using Shared = EpilogueShared<Columns, Part>;
  static constexpr int kBytes = Shared::kBytes;

  // `barrier`, 1 or 2, is the named barrier of the 128 threads, `shared` kBytes of their own.
  __device__ __forceinline__ Epilogue(const ConvParams& params, const TileTable& table_,
                                      int thread_, int barrier_, unsigned char* shared)
      : p(params),
        table(table_),
        tile(params, table_.tile),
        ends(params.out_shift),
        thread(thread_),
        barrier(barrier_),
        sums(reinterpret_cast<float*>(shared)),
        stored(reinterpret_cast<T*>(shared + Shared::kStoredAt)),
        addend(reinterpret_cast<float*>(shared + Shared::kAddendAt)) {}

  // A fragment of 16 pixels and 8 columns, as mma and wgmma hold it.
  __device__ __forceinline__ void put(int pixel, int column, const float* d, int lane) const {
    float* at = sums + (pixel + lane / 4) * Shared::kPitch + column + lane % 4 * 2;
    *reinterpret_cast<float2*>(at) = {d[0], d[1]};
    *reinterpret_cast<float2*>(at + 8 * Shared::kPitch) = {d[2], d[3]};
  }

  // Waits for every `put`, stores the part that begins at `column0` and output channel `channel0`, and
  // returns when everybody has.
  __device__ __forceinline__ void store_part(int column0, int32_t channel0) const {
    const int64_t temb = row_offset(p.out_temb, tile.frame, p.frames, p.out_channels);
    for (int c = thread; c < Part; c += kTileThreads) {
      const int32_t channel = channel0 + c;
      addend[c] = channel < p.out_channels
                      ? read(p.filter_bias, channel, 0.f) + read(p.out_temb, temb + channel, 0.f)
                      : 0.f;
    }
    sync();
#pragma unroll 1
    for (int target = 0; target < TileTable::kTargets; ++target) {
      const int32_t* frames = table.targets[target];
      if (frames[0] < 0 && frames[1] < 0 && frames[2] < 0) continue;
      store_target(column0, channel0, frames, target != TileTable::kFill);
      if (p.partials) {
        sync();
        reduce_target(channel0, frames);
        sync();
      }
    }
    sync();
  }

 private:
  // The number of a barrier in a register would reserve all sixteen.
  __device__ __forceinline__ void sync() const {
    if (barrier == 1)
      ptx::named_barrier_sync(1, kTileThreads);
    else
      ptx::named_barrier_sync(2, kTileThreads);
  }

  __device__ __forceinline__ int64_t offset_of(int32_t frame, int pixel, int32_t channel) const {
    const int32_t y = tile.y + pixel / kTile, x = tile.x + pixel % kTile;
    return ((int64_t{frame} * p.height + y) * p.width + x) * p.out_channels + channel;
  }

  __device__ __forceinline__ bool inside(int pixel) const {
    return pixel / kTile < tile.height && pixel % kTile < tile.width;
  }

  __device__ __forceinline__ void store_target(int column0, int32_t channel0, const int32_t* frames,
                                               bool has_sum) const {
    constexpr int kChunks = Part / kChunk;
    const T* residual = static_cast<const T*>(p.residual);
    T* out = static_cast<T*>(p.out);
    for (int i = thread; i < kTilePixels * kChunks; i += kTileThreads) {
      const int pixel = i / kChunks, column = i % kChunks * kChunk;
      const int32_t channel = channel0 + column;
      if (channel >= p.out_channels || !inside(pixel)) continue;
      float v[kChunk] = {};
      if (has_sum) {
        float more[kChunk];
        load8(sums + pixel * Shared::kPitch + column0 + column, v);
        load8(addend + column, more);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) v[e] += more[e];
      }
      const int slice = ends.slice(channel);
      const int32_t frame = frames[slice];
      T* const copy = stored + pixel * Shared::kStoredPitch + column;
      if (slice == ends.slice(channel + kChunk - 1)) {
        if (frame < 0) continue;
        const int64_t at = offset_of(frame, pixel, channel);
        if (residual) {
          float more[kChunk];
          widen(load<T, kChunk>(residual + at), more);
#pragma unroll
          for (int e = 0; e < kChunk; ++e) v[e] += more[e];
        }
#pragma unroll
        for (int e = 0; e < kChunk; ++e) v[e] *= p.out_scale;
        const Vec<T, kChunk> packed = narrow<T, kChunk>(v);
        store(out + at, packed);
        if (p.partials) store(copy, packed);
        continue;
      }
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {  // a vector that straddles slices
        const int32_t own = frames[ends.slice(channel + e)];
        if (own < 0) continue;
        const int64_t at = offset_of(own, pixel, channel + e);
        if (residual) v[e] += widen(residual[at]);
        const T value = narrow<T>(v[e] * p.out_scale);
        out[at] = value;
        if (p.partials) copy[e] = value;
      }
    }
  }

  // Sum and centred sum of squares of what store_target stored, a thread per channel.
  __device__ __forceinline__ void reduce_target(int32_t channel0, const int32_t* frames) const {
    const int count = tile.height * tile.width;
    for (int c = thread; c < Part; c += kTileThreads) {
      const int32_t channel = channel0 + c;
      if (channel >= p.out_channels || count == 0) continue;
      const int32_t frame = frames[ends.slice(channel)];
      if (frame < 0) continue;
      float sum = 0.f, centred = 0.f;
      for (int y = 0; y < tile.height; ++y)
        for (int x = 0; x < tile.width; ++x) sum += value(y, x, c);
      const float mean = sum / count;
      for (int y = 0; y < tile.height; ++y) {
        for (int x = 0; x < tile.width; ++x) {
          const float d = value(y, x, c) - mean;
          centred = fmaf(d, d, centred);
        }
      }
      const int64_t row = int64_t{frame} * p.tiles_per_frame + tile.in_frame;
      reinterpret_cast<float2*>(p.partials)[row * p.out_channels + channel] = {sum, centred};
    }
  }

  __device__ __forceinline__ float value(int y, int x, int column) const {
    return widen(stored[(y * kTile + x) * Shared::kStoredPitch + column]);
  }

  const ConvParams& p;
  const TileTable& table;
  const Tile tile;
  const SliceEnds ends;
  const int thread, barrier;
  float* const sums;
  T* const stored;
  float* const addend;
};

}  // namespace latent_shift::cuda
