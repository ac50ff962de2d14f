// Greedy longest-match tokenization over byte strings, as the RWKV World vocabulary defines it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace goslet {

// A vocabulary, or the blob that should hold one, breaks a rule; what() says which and where.
class VocabularyError : public std::invalid_argument {
  public:
    using std::invalid_argument::invalid_argument;
};

// An immutable vocabulary: token ids in [0, vocab_size), of which some stand for a non-empty byte string that no other
// id stands for. The remaining ids stand for nothing: encode never gives them, and their bytes are empty.
//
// The blob is little-endian: "GVOC", u32 version 1, u32 vocab_size, u32 count, u64 total length of the byte strings,
// u32 ids[count], u16 lengths[count], then the byte strings. Entries are in lexicographic order of their byte strings,
// so that opening neither sorts nor hashes.
class VocabularyTrie {
  public:
    static constexpr std::uint32_t kMaxVocabSize = 1U << 24;
    static constexpr std::size_t kMaxEntryBytes = 0xFFFF;

    using Entry = std::pair<std::uint32_t, std::string>;

    // Both throw VocabularyError.
    VocabularyTrie(std::uint32_t vocab_size, const std::vector<Entry>& entries);
    static VocabularyTrie from_blob(std::string_view blob);

    std::string to_blob() const;

    struct Encoding {
        std::vector<std::uint32_t> ids;
        std::size_t matched_bytes;  // less than the text's length where no entry matches at that offset
    };
    Encoding encode(std::string_view text) const;

    std::uint32_t vocab_size() const noexcept { return vocab_size_; }
    std::size_t n_entries() const noexcept { return ids_.size(); }
    // Empty for an id that stands for nothing; throws std::out_of_range from vocab_size on.
    std::string_view token_bytes(std::uint32_t id) const;
    // The bytes of the ids one after the other; throws std::out_of_range before anything is allocated.
    std::string decode(const std::vector<std::uint32_t>& ids) const;

  private:
    struct Node {
        std::uint32_t first_child = 0;  // children are consecutive nodes, in order of their labels
        std::uint32_t id = kNoId;
        std::uint16_t n_children = 0;
    };
    static constexpr std::uint32_t kNoId = 0xFFFFFFFF;
    static constexpr std::uint32_t kNoRank = 0xFFFFFFFF;

    VocabularyTrie() = default;
    std::string_view entry(std::size_t rank) const noexcept;
    void index_and_check();
    void build_nodes();
    const Node* child(const Node& node, unsigned char label) const noexcept;

    std::uint32_t vocab_size_ = 0;
    std::string pool_;                       // the byte strings in lexicographic order
    std::vector<std::uint32_t> ids_;         // (entries)
    std::vector<std::uint16_t> lengths_;     // (entries)
    std::vector<std::uint64_t> offsets_;     // (entries), into pool_
    std::vector<std::uint32_t> rank_of_id_;  // (vocab_size), kNoRank where the id stands for nothing
    std::vector<Node> nodes_;                // nodes_[0] is the root, then breadth first
    std::vector<unsigned char> labels_;      // (nodes), the byte on the way into the node
};

}  // namespace goslet
