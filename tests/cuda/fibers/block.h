// The threads of a block as fibers: their scheduling, barriers, where a warp meets, and what they do to shared arrays.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "language.h"

namespace cuda_on_cpu {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr unsigned kWarp = 32;
constexpr size_t kMaxThreads = 1024, kMaxShared = 48 << 10, kStack = 64 << 10;
constexpr unsigned kSwitchOneIn = 8;  // accesses to shared memory

inline std::mt19937_64 generator{1};

// A place in the source of a kernel.
struct Site {
  const char* file;
  int line;

  bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

enum class Collective { kNone, kSync, kShuffle, kVote, kReduce, kMatch };

inline const char* name_of(Collective kind) {
  constexpr const char* kNames[] = {"", "__syncwarp", "a shuffle", "a vote", "a reduction", "a match"};
  return kNames[static_cast<int>(kind)];
}

// How often a thread has passed a barrier of its block, and of its warp.
struct Epoch {
  unsigned block = 0, warp = 0;
};

struct Thread {
  enum State { kNew, kReady, kAtBarrier, kInCollective, kReturned };

  ucontext_t start;
  jmp_buf resume;
  State state = kNew;
  Epoch epoch;

  Collective kind = Collective::kNone;
  unsigned mask = 0;
  uint64_t given = 0;         // to the collective
  uint64_t received[kWarp];   // what all lanes of the mask gave
};

// The accesses to one element of a shared array that a later one could race with.
struct Accesses {
  static constexpr int kNobody = -1, kSeveral = -2;

  bool written = false;
  bool is_atomic = false;  // the last write
  int writer = kNobody, reader = kNobody, reading_warp = kNobody;
  Epoch write, read;
};

struct SharedArray {
  std::string name;
  std::unique_ptr<unsigned char[]> bytes;
  size_t element, count, offset = 0;
  std::vector<Accesses> accesses;
};

// The memory of the fibers' stacks, each above a page that no one may touch; kept between launches.
class Stacks {
 public:
  Stacks() : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    void* const memory = mmap(nullptr, kMaxThreads * pitch(), PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("cuda_on_cpu: no memory for the stacks");
    base_ = static_cast<unsigned char*>(memory);
    for (size_t i = 0; i < kMaxThreads; ++i) mprotect(base_ + i * pitch(), page_, PROT_NONE);
  }

  stack_t of(size_t thread) const {
    stack_t stack{};
    stack.ss_sp = base_ + thread * pitch() + page_;
    stack.ss_size = kStack;
    return stack;
  }

 private:
  size_t pitch() const { return page_ + kStack; }

  size_t page_;
  unsigned char* base_;
};

class Block {
 public:
  Block(unsigned threads, size_t dynamic_bytes, const std::function<void()>& body)
      : body_(body), threads_(threads), dynamic_bytes_(dynamic_bytes) {}

  // The block whose threads run now.
  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  void run() {
    current() = this;
    ready_.resize(threads_.size());
    for (size_t i = 0; i < threads_.size(); ++i) ready_[i] = static_cast<int>(i);
    if (_setjmp(finished_) == 0) next();
    current() = nullptr;
    if (!fault_.empty()) throw Fault(fault_);
  }

  [[noreturn]] void fault(const std::string& what) {
    fault_ = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + "), thread "
             + std::to_string(running_) + ": " + what;
    _longjmp(finished_, 1);
  }

  void barrier(const Site& site) {
    if (returned_ > 0) fault("waits at __syncthreads (" + site.text() + "), but a thread has returned");
    if (at_barrier_ > 0 && !(site == barrier_)) {
      fault("is at __syncthreads in " + site.text() + ", others at the one in " + barrier_.text());
    }
    threads_[running_].state = Thread::kAtBarrier, barrier_ = site;
    if (++at_barrier_ == threads_.size()) {
      at_barrier_ = 0;
      for (size_t i = 0; i < threads_.size(); ++i) {
        ++threads_[i].epoch.block;
        threads_[i].state = Thread::kReady;
        ready_.push_back(static_cast<int>(i));
      }
    }
    wait();
  }

  // All lanes of the mask give a value; each gets them all, in the order of lanes.
  const uint64_t* meet(Collective kind, unsigned mask, uint64_t given) {
    Thread& self = threads_[running_];
    const unsigned first = running_ / kWarp * kWarp;
    if ((mask >> (running_ - first) & 1) == 0) fault(std::string(name_of(kind)) + " whose mask leaves out its caller");
    bool complete = true;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1) == 0 || first + lane == static_cast<unsigned>(running_)) continue;
      if (first + lane >= threads_.size()) {
        fault(std::string(name_of(kind)) + " names lane " + std::to_string(lane) + ", which does not exist");
      }
      const Thread& other = threads_[first + lane];
      if (other.state == Thread::kReturned) {
        fault(std::string(name_of(kind)) + " names lane " + std::to_string(lane) + ", which has returned");
      }
      complete &= other.state == Thread::kInCollective && other.kind == kind && other.mask == mask;
    }
    self.kind = kind, self.mask = mask, self.given = given, self.state = Thread::kInCollective;
    if (complete) release(first, mask, kind);
    wait();
    return self.received;
  }

  // Lets another thread run.
  void give_way() {
    ready_.push_back(running_);
    wait();
  }

  SharedArray& static_array(const void* declaration, const char* name, size_t element, size_t count) {
    const auto found = static_arrays_.find(declaration);
    if (found != static_arrays_.end()) return *found->second;
    return *(static_arrays_[declaration] = make(name, element, count));
  }

  SharedArray& dynamic_array(size_t offset, size_t element, size_t count) {
    for (const auto& array : dynamic_arrays_) {
      if (array->offset == offset && array->element == element && array->count == count) return *array;
      if (array->offset < offset + element * count && offset < array->offset + array->element * array->count) {
        fault("dynamic shared arrays at bytes " + std::to_string(array->offset) + " and " + std::to_string(offset)
              + " overlap");
      }
    }
    if (offset % element != 0) fault("a dynamic shared array at byte " + std::to_string(offset) + " is not aligned");
    if (offset + element * count > dynamic_bytes_) {
      fault("a dynamic shared array ends at byte " + std::to_string(offset + element * count) + " of "
            + std::to_string(dynamic_bytes_));
    }
    dynamic_arrays_.push_back(make("dynamic shared memory", element, count));
    dynamic_arrays_.back()->offset = offset;
    return *dynamic_arrays_.back();
  }

  enum class Access { kRead, kWrite, kAtomic };

  // Notes an access, and checks it against those before.
  unsigned char* access(SharedArray& array, int64_t index, Access access) {
    if (index < 0 || index >= static_cast<int64_t>(array.count)) {
      fault("index " + std::to_string(index) + " of " + array.name + "[" + std::to_string(array.count) + "]");
    }
    if (generator() % kSwitchOneIn == 0) give_way();
    Accesses& last = array.accesses[static_cast<size_t>(index)];
    const Epoch now = threads_[running_].epoch;
    const int warp = running_ / static_cast<int>(kWarp);
    const auto races = [&](int thread, int its_warp, const Epoch& then) {
      if (thread == Accesses::kNobody || thread == running_ || then.block < now.block) return false;
      return !(its_warp == warp && then.warp < now.warp);
    };
    const auto element = [&] { return array.name + "[" + std::to_string(index) + "]"; };
    const bool atomics = last.is_atomic && access == Access::kAtomic;
    if (!atomics && races(last.writer, last.writer / static_cast<int>(kWarp), last.write)) {
      fault("accesses " + element() + ", which thread " + std::to_string(last.writer)
            + " has written, with no barrier between");
    }
    if (access != Access::kWrite && !last.written) fault("reads " + element() + ", which was never written");
    if (access == Access::kRead) {
      const bool joins = last.reader != Accesses::kNobody && last.reader != running_ && last.read.block == now.block;
      last.reading_warp = joins && last.reading_warp != warp ? Accesses::kSeveral : warp;
      last.reader = joins ? Accesses::kSeveral : running_;
      last.read = {now.block, joins ? std::max(last.read.warp, now.warp) : now.warp};
    } else {
      if (races(last.reader, last.reading_warp, last.read)) {
        fault("writes " + element() + ", which another thread reads, with no barrier between");
      }
      last.written = true, last.is_atomic = access == Access::kAtomic, last.writer = running_, last.write = now;
    }
    return array.bytes.get() + static_cast<size_t>(index) * array.element;
  }

 private:
  static std::string hex(unsigned mask) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", mask);
    return text;
  }

  static void entry() {
    Block& block = *current();
    block.body_();
    block.threads_[block.running_].state = Thread::kReturned;
    ++block.returned_;
    block.wait();
  }

  void release(unsigned first, unsigned mask, Collective kind) {
    unsigned epoch = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (mask >> lane & 1) epoch = std::max(epoch, threads_[first + lane].epoch.warp);
    }
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Thread& thread = threads_[first + lane];
      for (unsigned i = 0; i < kWarp; ++i) thread.received[i] = mask >> i & 1 ? threads_[first + i].given : 0;
      if (kind == Collective::kSync) thread.epoch.warp = epoch + 1;
      thread.state = Thread::kReady;
      ready_.push_back(static_cast<int>(first + lane));
    }
  }

  // Runs others until this thread is ready and chosen.
  void wait() {
    if (_setjmp(threads_[running_].resume) == 0) next();
  }

  [[noreturn]] void next() {
    if (ready_.empty()) finish();
    std::swap(ready_[generator() % ready_.size()], ready_.back());
    running_ = ready_.back();
    ready_.pop_back();
    const unsigned index = static_cast<unsigned>(running_);
    threadIdx = {index % blockDim.x, index / blockDim.x % blockDim.y, index / blockDim.x / blockDim.y};
    Thread& thread = threads_[running_];
    if (thread.state != Thread::kNew) _longjmp(thread.resume, 1);
    thread.state = Thread::kReady;
    getcontext(&thread.start);
    thread.start.uc_stack = stacks().of(index);
    makecontext(&thread.start, entry, 0);
    setcontext(&thread.start);
    std::abort();
  }

  // No thread can go on: all have returned, or some wait for ever.
  [[noreturn]] void finish() {
    for (size_t i = 0; i < threads_.size(); ++i) {
      const Thread& thread = threads_[i];
      if (thread.state == Thread::kReturned) continue;
      running_ = static_cast<int>(i);
      if (thread.state == Thread::kAtBarrier) {
        fault("waits at __syncthreads (" + barrier_.text() + "), which not every thread reaches");
      }
      fault("waits in " + std::string(name_of(thread.kind)) + " for lanes of the mask " + hex(thread.mask)
            + " that do not arrive");
    }
    _longjmp(finished_, 1);
  }

  std::unique_ptr<SharedArray> make(const char* name, size_t element, size_t count) {
    auto array = std::make_unique<SharedArray>();
    array->name = name, array->element = element, array->count = count;
    array->bytes = std::make_unique<unsigned char[]>(element * count);
    array->accesses.resize(count);
    shared_bytes_ += element * count;
    if (shared_bytes_ > kMaxShared) {
      fault("the block takes more than " + std::to_string(kMaxShared) + " bytes of shared memory");
    }
    return array;
  }

  static const Stacks& stacks() {
    static const Stacks memory;
    return memory;
  }

  const std::function<void()>& body_;
  std::vector<Thread> threads_;
  std::vector<int> ready_;
  int running_ = 0;
  size_t at_barrier_ = 0, returned_ = 0, dynamic_bytes_, shared_bytes_ = 0;
  Site barrier_{"", 0};  // that threads wait at
  std::map<const void*, std::unique_ptr<SharedArray>> static_arrays_;
  std::vector<std::unique_ptr<SharedArray>> dynamic_arrays_;
  std::string fault_;
  jmp_buf finished_;
};

}  // namespace cuda_on_cpu
