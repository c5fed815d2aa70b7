// The arrays of a trie as ops take them: what dgi/trie.h says, in tensors.
#pragma once

#include <vector>

#include "dgi/trie.h"
#include "register/tensors.h"

namespace dgi::registration {

inline void check_array(const char* name, const Tensor& x, ScalarType dtype) {
  STD_TORCH_CHECK(x.dim() == 1 && x.is_contiguous() && x.scalar_type() == dtype, "dgi_kernels: ", name,
                  " must be a contiguous array of a trie, of the right dtype");
}

// int32 or int64, or as dgi/offsets.h says, by the array's dtype; nothing is the identity.
inline dgi::Offsets offsets_of(const char* name, const std::optional<Tensor>& x) {
  if (!x) return {};
  const bool is_wide = x->scalar_type() == ScalarType::Long;
  check_array(name, *x, is_wide ? ScalarType::Long : ScalarType::Int);
  return {x->const_data_ptr(), is_wide ? dgi::Offsets::Stored::kInt64 : dgi::Offsets::Stored::kInt32};
}

inline dgi::Offsets starts_of(const char* name, const Tensor& x) {
  if (x.scalar_type() != ScalarType::UInt64) return offsets_of(name, x);
  check_array(name, x, ScalarType::UInt64);
  return {x.const_data_ptr(), dgi::Offsets::Stored::kRunMarks};
}

inline dgi::Offsets rows_of(const char* name, const std::optional<Tensor>& x) {
  if (!x || x->scalar_type() != ScalarType::Byte) return offsets_of(name, x);
  check_array(name, *x, ScalarType::Byte);
  return {x->const_data_ptr(), dgi::Offsets::Stored::kUInt24};
}

// The edges out of one depth.
template <class Token>
dgi::TrieLevel<Token> level_of(const Tensor& tokens, const Tensor& child_start) {
  check_array("tokens", tokens, sizeof(Token) == 2 ? ScalarType::Short : ScalarType::Int);
  STD_TORCH_CHECK(child_start.numel() >= 1, "dgi_kernels: child_start must have an element more than there are nodes");
  return {data_of<Token>(tokens), offsets_of("child_start", child_start), child_start.numel() - 1};
}

// The child_start of the levels below some depth, and item_start.
class Below {
 public:
  explicit Below(const std::vector<Tensor>& starts) {
    for (const Tensor& level : starts) starts_.push_back(starts_of("below", level));
  }

  dgi::LowerLevels levels() const { return {starts_.data(), static_cast<int64_t>(starts_.size())}; }

 private:
  std::vector<dgi::Offsets> starts_;
};

// int64, one for each node of the delta; nothing where there is no delta.
inline dgi::Anchors anchors_of(const Tensor& x) {
  check_array("anchors", x, ScalarType::Long);
  return {data_of<int64_t>(x), x.numel()};
}

// The sets of a call, of which there need be none, or of which no request has one (set_of is -1): four arrays each
// (words and ranks of the base, of the delta; words of no element stand for every place), and which of them each
// request has, -1 for none. They have room for so many places of base and delta, or more.
class Allowed {
 public:
  Allowed(const std::vector<Tensor>& sets, const std::vector<int64_t>& set_of, int64_t requests, int64_t base_places,
          int64_t delta_places) {
    STD_TORCH_CHECK(sets.size() % 4 == 0, "dgi_kernels: sets must hold four arrays each");
    for (size_t i = 0; i < sets.size(); i += 4) {
      sets_.push_back({item_set(sets[i], sets[i + 1], base_places), item_set(sets[i + 2], sets[i + 3], delta_places)});
    }
    if (sets_.empty() || (set_of.size() == 1 && set_of[0] < 0)) return;
    STD_TORCH_CHECK(static_cast<int64_t>(set_of.size()) == requests, "dgi_kernels: set_of must have B entries");
    for (int64_t set : set_of) {
      STD_TORCH_CHECK(-1 <= set && set < static_cast<int64_t>(sets_.size()), "dgi_kernels: there is no set ", set);
      of_.push_back(set < 0 ? nullptr : &sets_[static_cast<size_t>(set)]);
    }
  }
  Allowed(const Allowed&) = delete;

  const dgi::AllowedItems* const* of_requests() const { return of_.empty() ? nullptr : of_.data(); }

 private:
  static dgi::ItemSet item_set(const Tensor& words, const Tensor& ranks, int64_t places) {
    check_array("words", words, ScalarType::Long);
    check_array("ranks", ranks, ScalarType::Long);
    STD_TORCH_CHECK(words.numel() == dgi::ItemSet::kBlockWords * ranks.numel(), "dgi_kernels: a set has ",
                    dgi::ItemSet::kBlockWords, " words to a rank");
    if (words.numel() == 0) return {};
    STD_TORCH_CHECK(words.numel() > places / dgi::ItemSet::kWordBits,
                    "dgi_kernels: a set is over fewer places than there are");
    return {static_cast<const uint64_t*>(words.const_data_ptr()), data_of<int64_t>(ranks)};
  }

  std::vector<dgi::AllowedItems> sets_;
  std::vector<const dgi::AllowedItems*> of_;
};

}  // namespace dgi::registration
