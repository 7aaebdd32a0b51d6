// Happens-before by vector clocks. A launch's timelines are its threads, then agents for what the
// hardware does asynchronously (one per warp for wgmma, one per mbarrier for bulk copies), so that
// only the proper wait orders a thread after them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

namespace latent_shift::host {

using Epochs = std::vector<uint32_t>;
// What somebody knows of every timeline; shared by all who know the same, null for nothing.
using Clock = std::shared_ptr<const Epochs>;

inline Clock join(const Clock& a, const Clock& b) {
  if (a == b || !b) return a;
  if (!a) return b;
  // All threads of a block often join the same pair.
  static Clock left, right, last;
  if (left == a && right == b) return last;
  auto joined = std::make_shared<Epochs>(*a);
  for (size_t i = 0; i < joined->size(); ++i) (*joined)[i] = std::max((*joined)[i], (*b)[i]);
  left = a, right = b, last = *joined == *b ? b : *joined == *a ? a : joined;
  return last;
}

inline Clock with(const Clock& clock, size_t size, uint32_t timeline, uint32_t epoch) {
  auto copy = clock ? std::make_shared<Epochs>(*clock) : std::make_shared<Epochs>(size);
  (*copy)[timeline] = std::max((*copy)[timeline], epoch);
  return copy;
}

struct Timeline {
  uint32_t id = 0, epoch = 1;
  Clock known;   // of the others; of itself a thread knows everything
  Clock fenced;  // the part of it that a proxy fence has made visible to asynchronous accesses

  bool knows(uint32_t other, uint32_t at) const {
    return other == id || (known && (*known)[other] >= at);
  }
  bool has_fenced(uint32_t other, uint32_t at) const { return fenced && (*fenced)[other] >= at; }
  void fence(size_t size) {
    fenced = join(fenced, with(known, size, id, epoch));
    ++epoch;
  }
  void acquire(const Clock& other_known, const Clock& other_fenced) {
    known = join(known, other_known);
    fenced = join(fenced, other_fenced);
  }
};

// Gathers what the arrivals at a barrier release.
class Gather {
 public:
  void add(const Timeline& timeline, size_t size) {
    add(timeline.id, timeline.epoch, size);
    if (timeline.known && timeline.known != last_) {
      for (size_t i = 0; i < size; ++i)
        (*epochs_)[i] = std::max((*epochs_)[i], (*timeline.known)[i]);
      last_ = timeline.known;
    }
    fenced_ = join(fenced_, timeline.fenced);
  }
  void add(uint32_t timeline, uint32_t epoch, size_t size) {
    if (!epochs_) epochs_ = std::make_shared<Epochs>(size);
    (*epochs_)[timeline] = std::max((*epochs_)[timeline], epoch);
  }
  // Both clocks, leaving this empty for the next phase.
  std::pair<Clock, Clock> take() {
    last_ = nullptr;
    return {std::exchange(epochs_, nullptr), std::exchange(fenced_, nullptr)};
  }
  bool knows(uint32_t timeline, uint32_t epoch) const {
    return epochs_ && (*epochs_)[timeline] >= epoch;
  }

 private:
  std::shared_ptr<Epochs> epochs_;
  Clock last_, fenced_;
};

// The last write and the reads since of two bytes of memory (FastTrack: one reader as long as reads
// are ordered, then a list). `serial` numbers the cluster that ran; a cell of an older one is stale
// in shared memory and, within one launch, evidence in global memory.
struct Cell {
  uint32_t serial;
  uint32_t write_epoch;
  uint32_t read_epoch;
  uint16_t writer, reader;
  uint32_t readers;   // index + 1 into the pool of lists
  bool read_earlier;  // by another cluster of this launch
};

struct Conflict {
  enum Kind { kNone, kWrite, kRead, kOtherBlockWrite, kOtherBlockRead, kProxy } kind = kNone;
  uint32_t timeline = 0;
};

class Races {
 public:
  // Numbers the cluster that runs now.
  void begin_cluster(bool first_of_launch) {
    ++serial_;
    if (first_of_launch) launch_serial_ = serial_;
    lists_.clear();
  }

  struct Access {
    const Timeline& by;  // whose knowledge must cover what happened before
    uint32_t timeline;   // on whose behalf: the thread, or an agent
    uint32_t epoch;
    uint32_t threads;  // timelines from here on are agents
    bool write, async, global;
  };

  Conflict check(Cell* cell, size_t count, const Access& access) {
    for (size_t i = 0; i < count; ++i) {
      const Conflict conflict = check(cell[i], access);
      if (conflict.kind != Conflict::kNone) return conflict;
    }
    return {};
  }

 private:
  Conflict check(Cell& cell, const Access& a) {
    if (cell.serial != serial_) {
      const bool evidence = a.global && cell.serial >= launch_serial_;
      if (evidence && cell.write_epoch) return {Conflict::kOtherBlockWrite, cell.writer};
      const bool read = evidence && (cell.read_epoch || cell.read_earlier);
      cell = Cell{serial_, 0, 0, 0, 0, 0, read};
    }
    if (cell.write_epoch) {
      if (!a.by.knows(cell.writer, cell.write_epoch)) return {Conflict::kWrite, cell.writer};
      if (a.async && cell.writer < a.threads && !a.by.has_fenced(cell.writer, cell.write_epoch))
        return {Conflict::kProxy, cell.writer};
    }
    if (!a.write) {
      record_read(cell, a);
      return {};
    }
    if (cell.read_earlier) return {Conflict::kOtherBlockRead, 0};
    if (cell.read_epoch && !a.by.knows(cell.reader, cell.read_epoch))
      return {Conflict::kRead, cell.reader};
    if (cell.readers) {
      for (const auto& [reader, epoch] : lists_[cell.readers - 1])
        if (!a.by.knows(reader, epoch)) return {Conflict::kRead, reader};
      lists_[cell.readers - 1].clear();
    }
    cell.read_epoch = 0;
    cell.writer = static_cast<uint16_t>(a.timeline);
    cell.write_epoch = a.epoch;
    return {};
  }

  void record_read(Cell& cell, const Access& a) {
    if (cell.read_epoch && cell.reader != a.timeline && !a.by.knows(cell.reader, cell.read_epoch)) {
      if (!cell.readers) {
        lists_.emplace_back();
        cell.readers = static_cast<uint32_t>(lists_.size());
      }
      auto& list = lists_[cell.readers - 1];
      const auto same = std::find_if(list.begin(), list.end(),
                                     [&](const auto& r) { return r.first == cell.reader; });
      if (same == list.end())
        list.emplace_back(cell.reader, cell.read_epoch);
      else
        same->second = cell.read_epoch;
    }
    cell.reader = static_cast<uint16_t>(a.timeline);
    cell.read_epoch = a.epoch;
  }

  uint32_t serial_ = 0, launch_serial_ = 0;
  std::deque<std::vector<std::pair<uint32_t, uint32_t>>> lists_;
};

}  // namespace latent_shift::host
