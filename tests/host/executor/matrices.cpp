// Matrix instructions by the documented layouts of their fragments and descriptors.
#include "machine.h"

#include <cmath>

namespace latent_shift::host {

static float decode(Element element, uint16_t bits) {
  if (element == Element::kBfloat16) {
    const uint32_t x = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &x, 4);
    return value;
  }
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) {
      const int exponent = i >> 10 & 31, mantissa = i & 0x3FF;
      const float magnitude =
          exponent == 31  ? (mantissa ? NAN : INFINITY)
          : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                          : std::ldexp(1024.0f + static_cast<float>(mantissa), exponent - 25);
      values[static_cast<size_t>(i)] = i >> 15 ? -magnitude : magnitude;
    }
    return values;
  }();
  return table[bits];
}

struct Matrices {
  uint32_t* r;
  uintptr_t row;
};

void ldmatrix_x4(uint32_t* r, const void* row) {
  LS_HERE();
  Matrices operands{r, own_shared(row, 16, "ldmatrix")};
  check_shared(operands.row, 16, false);
  meet_all(kLdmatrix, &operands, "ldmatrix", [](Meeting& meeting) {
    const auto lane = [&](uint32_t i) { return static_cast<Matrices*>(meeting.operands[i]); };
    for (uint32_t matrix = 0; matrix < 4; ++matrix)
      for (uint32_t i = 0; i < kWarp; ++i)
        std::memcpy(&lane(i)->r[matrix],
                    reinterpret_cast<void*>(lane(8 * matrix + i / 4)->row + 4 * (i % 4)), 4);
  });
}

struct MmaOperands {
  Element element;
  float* d;
  const uint32_t *a, *b;
};

static void finish_mma(Meeting& meeting) {
  float a[16][16], b[16][8];
  for (uint32_t i = 0; i < kWarp; ++i) {
    const auto& o = *static_cast<MmaOperands*>(meeting.operands[i]);
    const uint32_t g = i / 4, t = 2 * (i % 4);
    for (uint32_t half = 0; half < 2; ++half) {
      const auto element = [&](uint32_t r) {
        return decode(o.element, static_cast<uint16_t>(r >> 16 * half));
      };
      for (uint32_t r = 0; r < 4; ++r)
        a[g + 8 * (r & 1)][t + half + 8 * (r >> 1)] = element(o.a[r]);
      for (uint32_t r = 0; r < 2; ++r) b[t + half + 8 * r][g] = element(o.b[r]);
    }
  }
  float d[16][8] = {};
  for (uint32_t row = 0; row < 16; ++row)
    for (uint32_t k = 0; k < 16; ++k)
      for (uint32_t column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  for (uint32_t i = 0; i < kWarp; ++i)
    for (uint32_t r = 0; r < 4; ++r)
      static_cast<MmaOperands*>(meeting.operands[i])->d[r] +=
          d[i / 4 + 8 * (r >> 1)][2 * (i % 4) + (r & 1)];
}

void mma(Element element, float* d, const uint32_t* a, const uint32_t* b) {
  LS_HERE();
  MmaOperands operands{element, d, a, b};
  meet_all(kMma, &operands, "mma.sync", finish_mma);
}

// ---- wgmma -------------------------------------------------------------------------------------

// The address of a core matrix row: 16 bytes of K of one row of A, or of one column of B.
struct Operand {
  uintptr_t start;
  uint32_t leading, stride;

  Operand(const Block& block, uint64_t bits) {
    constexpr uint64_t kKnown = 0x3FFF'3FFF'3FFF;  // start, leading and stride
    if (bits & ~kKnown)
      fault(say("wgmma descriptor 0x", std::hex, bits,
                ": a swizzle, a base offset or reserved bits, which are not known here"));
    const auto field = [&](int shift) {
      return static_cast<uint32_t>(bits >> shift & 0x3FFF) << 4;
    };
    start = block.shared - kSharedWindow + field(0);
    leading = field(16), stride = field(32);
  }
  uintptr_t core(uint32_t row_group, uint32_t k_chunk) const {
    return start + row_group * stride + k_chunk * leading;
  }
};

// acc[16][n] += a[16][16] b[16][n]
#if defined(__x86_64__) && defined(__GLIBC__)
__attribute__((target_clones("avx2", "default")))
#endif
static void multiply(float* __restrict__ acc, const float* __restrict__ a,
                     const float* __restrict__ b, int n) {
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < n; ++column)
        acc[row * n + column] += a[row * 16 + k] * b[k * n + column];
}

static void compute(const Warp& warp, const Wgmma& op) {
  Tile& tile = *op.tile;
  if (!op.accumulate) std::fill(tile.values.begin(), tile.values.end(), 0.0f);
  const auto at = [&](uintptr_t address) {
    uint16_t bits;
    std::memcpy(&bits, reinterpret_cast<const void*>(address), 2);
    return decode(op.element, bits);
  };
  const Operand a(*warp.block, op.a), b(*warp.block, op.b);
  float rows[16 * 16];
  std::vector<float> columns(static_cast<size_t>(16 * op.n));
  for (uint32_t row = 0; row < 16; ++row)
    for (uint32_t k = 0; k < 16; ++k)
      rows[row * 16 + k] =
          at(a.core(2 * (warp.index % 4) + row / 8, k / 8) + row % 8 * 16 + k % 8 * 2);
  const auto n = static_cast<uint32_t>(op.n);
  for (uint32_t column = 0; column < n; ++column)
    for (uint32_t k = 0; k < 16; ++k)
      columns[k * n + column] = at(b.core(column / 8, k / 8) + column % 8 * 16 + k % 8 * 2);
  multiply(tile.values.data(), rows, columns.data(), op.n);
}

// Between a tile and the registers of the lanes: d[4 j + 2 h + i] of lane l is row 8 h + l / 4,
// column 8 j + 2 (l % 4) + i.
template <class Move>
static void each_register(Tile& tile, Move move) {
  for (uint32_t l = 0; l < kWarp; ++l)
    for (uint32_t r = 0; r < static_cast<uint32_t>(tile.n) / 2; ++r) {
      const uint32_t row = 8 * (r >> 1 & 1) + l / 4, column = 8 * (r / 4) + 2 * (l % 4) + (r & 1);
      move(tile.registers[l][r], tile.values[row * static_cast<uint32_t>(tile.n) + column]);
    }
}

static std::shared_ptr<Tile> tile_of(Warp& warp, int n,
                                     const std::array<float*, kWarp>& registers) {
  for (const auto& tile : warp.tiles)
    if (tile->n == n && tile->registers == registers) return tile;
  auto& tiles = warp.tiles;
  for (size_t i = 0; i < tiles.size();) {
    const float *begin = tiles[i]->registers[0], *end = begin + tiles[i]->n / 2;
    if (registers[0] >= end || registers[0] + n / 2 <= begin) {
      ++i;
    } else {
      if (tiles[i]->in_flight)
        fault("wgmma: accumulates in part of the registers of one in flight");
      tiles.erase(tiles.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
  tiles.push_back(std::make_shared<Tile>());
  tiles.back()->n = n;
  tiles.back()->registers = registers;
  tiles.back()->values.resize(static_cast<size_t>(16 * n));
  return tiles.back();
}

struct WgmmaOperands {
  Wgmma op;
  float* d;
};

static void finish_wgmma(Meeting& meeting) {
  Warp& warp = *current->warp;
  const auto lane = [&](uint32_t i) { return static_cast<WgmmaOperands*>(meeting.operands[i]); };
  Wgmma op = lane(0)->op;
  std::array<float*, kWarp> registers;
  for (uint32_t i = 0; i < kWarp; ++i) {
    const Wgmma& other = lane(i)->op;
    if (other.a != op.a || other.b != op.b || other.accumulate != op.accumulate)
      fault("wgmma: the lanes of a warp have different descriptors");
    registers[i] = lane(i)->d;
  }
  auto& log = warp.block->wgmma_log[warp.index / 4];
  if (warp.issued == log.size()) log.push_back(op);
  const Wgmma& first = log[warp.issued++];
  if (first.a != op.a || first.b != op.b || first.n != op.n || first.accumulate != op.accumulate)
    fault("wgmma: the warps of a warpgroup have different descriptors");

  op.tile = tile_of(warp, op.n, registers);
  Tile& tile = *op.tile;
  if (!warp.fence_seen || tile.touched)
    fault("wgmma: no wgmma_fence after the last access to the accumulators");
  op.epoch = ++warp.agent_epoch;
  const As as{warp.agent, op.epoch, true};
  for (uint32_t chunk = 0; chunk < 2; ++chunk) {
    const Operand a(*warp.block, op.a), b(*warp.block, op.b);
    const auto check = [&](const char* name, const Operand& operand, uint32_t group) {
      const uintptr_t core = operand.core(group, chunk);
      if (core < warp.block->shared || core + 128 > warp.block->shared + m.shared)
        fault(say("out of bounds: wgmma descriptor of ", name, " (leading ", operand.leading,
                  ", stride ", operand.stride, ") reaches shared memory + ",
                  static_cast<int64_t>(core - warp.block->shared), ", which has ", m.shared));
      check_shared(core, 128, false, as);
    };
    for (uint32_t group = 0; group < 2; ++group) check("a", a, 2 * (warp.index % 4) + group);
    for (uint32_t group = 0; group < static_cast<uint32_t>(op.n) / 8; ++group) check("b", b, group);
  }
  if (tile.in_flight == 0) {
    if (op.accumulate) each_register(tile, [](float& r, float& value) { value = r; });
    each_register(tile, [](float& r, float&) { r = std::nanf(""); });
  }
  ++tile.in_flight;
  warp.open.push_back(std::move(op));
}

static void complete_group(Warp& warp) {
  for (const Wgmma& op : warp.groups.front()) {
    compute(warp, op);
    if (--op.tile->in_flight == 0) {
      each_register(*op.tile, [](float& r, float& value) { r = value; });
      op.tile->touched = false;
    }
    if (!m.options.races) continue;
    const Clock clock = with(nullptr, m.timelines, warp.agent, op.epoch);
    for (uint32_t lane = 0; lane < kWarp; ++lane)
      warp.block->fibers[warp.index * kWarp + lane]->time.acquire(clock, nullptr);
  }
  warp.groups.pop_front();
}

static void require_warpgroup(const char* what) {
  require(90, what);
  if (current->block->warps.size() < current->warp->index / 4 * 4 + 4)
    fault(say(what, ": the warp is not one of a whole warpgroup"));
}

void check_descriptor(const void* shared, uint32_t leading_bytes, uint32_t stride_bytes) {
  LS_HERE();
  const auto bad = [](uint32_t bytes) { return bytes % 16 || bytes >= 1u << 18; };
  own_shared(shared, 16, "wgmma descriptor");
  if (bad(leading_bytes) || bad(stride_bytes))
    fault(say("wgmma descriptor: leading ", leading_bytes, ", stride ", stride_bytes,
              " must be multiples of 16 below 2^18"));
}

void wgmma(Element element, int n, float* d, uint64_t a, uint64_t b, bool accumulate) {
  LS_HERE();
  require_warpgroup("wgmma");
  WgmmaOperands operands{{element, n, a, b, accumulate, nullptr, 0}, d};
  meet_all(kWgmma + 64 * n, &operands, "wgmma", finish_wgmma);
}

void wgmma_fence() {
  LS_HERE();
  require_warpgroup("wgmma.fence");
  meet_all(kWgmmaFence, current, "wgmma.fence", [](Meeting&) {
    current->warp->fence_seen = true;
    for (const auto& tile : current->warp->tiles) tile->touched = false;
  });
}

void wgmma_commit() {
  LS_HERE();
  meet_all(kWgmmaCommit, current, "wgmma.commit_group", [](Meeting&) {
    Warp& warp = *current->warp;
    warp.groups.push_back(std::move(warp.open));
    warp.open.clear();
  });
}

void wgmma_wait(int groups) {
  LS_HERE();
  meet_all(kWgmmaWait, &groups, "wgmma.wait_group", [](Meeting& meeting) {
    const auto keep = static_cast<size_t>(*static_cast<int*>(meeting.operands[0]));
    while (current->warp->groups.size() > keep) complete_group(*current->warp);
  });
}

}  // namespace latent_shift::host
