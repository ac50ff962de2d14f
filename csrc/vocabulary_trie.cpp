#include "vocabulary_trie.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace goslet {
namespace {

constexpr char kMagic[4] = {'G', 'V', 'O', 'C'};
constexpr std::uint32_t kVersion = 1;
constexpr std::size_t kHeaderBytes = 24;

template <typename T>
void append_little_endian(std::string& out, T value) {
    for (std::size_t byte = 0; byte < sizeof(T); ++byte) {
        out.push_back(static_cast<char>((value >> (8 * byte)) & 0xFF));
    }
}

template <typename T>
T read_little_endian(const char* from) {
    T value = 0;
    for (std::size_t byte = 0; byte < sizeof(T); ++byte) {
        value = static_cast<T>(value |
                               static_cast<T>(static_cast<T>(static_cast<unsigned char>(from[byte])) << (8 * byte)));
    }
    return value;
}

std::string describe(std::uint32_t id) {
    return "token " + std::to_string(id);
}

void check_vocab_size(std::uint64_t vocab_size) {
    if (vocab_size == 0 || vocab_size > VocabularyTrie::kMaxVocabSize) {
        throw VocabularyError("the vocabulary size " + std::to_string(vocab_size) + " is not within 1 and " +
                              std::to_string(VocabularyTrie::kMaxVocabSize));
    }
}

}  // namespace

VocabularyTrie::VocabularyTrie(std::uint32_t vocab_size, const std::vector<Entry>& entries) : vocab_size_(vocab_size) {
    check_vocab_size(vocab_size);
    std::vector<std::size_t> order(entries.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(),
              [&](std::size_t left, std::size_t right) { return entries[left].second < entries[right].second; });
    for (const std::size_t place : order) {
        const auto& [id, bytes] = entries[place];
        if (bytes.size() > kMaxEntryBytes) {
            throw VocabularyError(describe(id) + " is " + std::to_string(bytes.size()) + " bytes long, past " +
                                  std::to_string(kMaxEntryBytes));
        }
        ids_.push_back(id);
        lengths_.push_back(static_cast<std::uint16_t>(bytes.size()));
        pool_ += bytes;
    }
    index_and_check();
    build_nodes();
}

VocabularyTrie VocabularyTrie::from_blob(std::string_view blob) {
    if (blob.size() < kHeaderBytes) {
        throw VocabularyError("the vocabulary blob is " + std::to_string(blob.size()) + " bytes long, less than its " +
                              std::to_string(kHeaderBytes) + "-byte header");
    }
    if (std::memcmp(blob.data(), kMagic, sizeof(kMagic)) != 0) {
        throw VocabularyError("the vocabulary blob does not begin with GVOC");
    }
    if (const auto version = read_little_endian<std::uint32_t>(blob.data() + 4); version != kVersion) {
        throw VocabularyError("the vocabulary blob has version " + std::to_string(version) + ", known is " +
                              std::to_string(kVersion));
    }
    VocabularyTrie trie;
    trie.vocab_size_ = read_little_endian<std::uint32_t>(blob.data() + 8);
    check_vocab_size(trie.vocab_size_);
    const std::uint64_t count = read_little_endian<std::uint32_t>(blob.data() + 12);
    const std::uint64_t pool_bytes = read_little_endian<std::uint64_t>(blob.data() + 16);
    if (count > trie.vocab_size_) {
        throw VocabularyError("the vocabulary blob declares " + std::to_string(count) + " entries for " +
                              std::to_string(trie.vocab_size_) + " ids");
    }
    const std::uint64_t table_bytes = count * (sizeof(std::uint32_t) + sizeof(std::uint16_t));
    const std::uint64_t rest = blob.size() - kHeaderBytes;
    if (table_bytes > rest || pool_bytes != rest - table_bytes) {
        throw VocabularyError("the vocabulary blob has " + std::to_string(rest) +
                              " bytes after its header and declares " + std::to_string(table_bytes) +
                              " of tables and " + std::to_string(pool_bytes) + " of byte strings");
    }
    const char* const ids = blob.data() + kHeaderBytes;
    const char* const lengths = ids + count * sizeof(std::uint32_t);
    trie.ids_.resize(count);
    trie.lengths_.resize(count);
    std::uint64_t sum = 0;
    for (std::size_t rank = 0; rank < count; ++rank) {
        trie.ids_[rank] = read_little_endian<std::uint32_t>(ids + rank * sizeof(std::uint32_t));
        trie.lengths_[rank] = read_little_endian<std::uint16_t>(lengths + rank * sizeof(std::uint16_t));
        sum += trie.lengths_[rank];
    }
    if (sum != pool_bytes) {
        throw VocabularyError("the lengths in the vocabulary blob add up to " + std::to_string(sum) + " bytes of " +
                              std::to_string(pool_bytes));
    }
    trie.pool_.assign(lengths + count * sizeof(std::uint16_t), pool_bytes);
    trie.index_and_check();
    trie.build_nodes();
    return trie;
}

std::string VocabularyTrie::to_blob() const {
    std::string blob(kMagic, sizeof(kMagic));
    append_little_endian<std::uint32_t>(blob, kVersion);
    append_little_endian<std::uint32_t>(blob, vocab_size_);
    append_little_endian<std::uint32_t>(blob, static_cast<std::uint32_t>(ids_.size()));
    append_little_endian<std::uint64_t>(blob, pool_.size());
    for (const std::uint32_t id : ids_) {
        append_little_endian(blob, id);
    }
    for (const std::uint16_t length : lengths_) {
        append_little_endian(blob, length);
    }
    return blob + pool_;
}

std::string_view VocabularyTrie::entry(std::size_t rank) const noexcept {
    return {pool_.data() + offsets_[rank], lengths_[rank]};
}

void VocabularyTrie::index_and_check() {
    rank_of_id_.assign(vocab_size_, kNoRank);
    offsets_.resize(ids_.size());
    std::uint64_t offset = 0;
    for (std::size_t rank = 0; rank < ids_.size(); ++rank) {
        const std::uint32_t id = ids_[rank];
        offsets_[rank] = offset;
        offset += lengths_[rank];
        if (id >= vocab_size_) {
            throw VocabularyError(describe(id) + " is not below the vocabulary size " + std::to_string(vocab_size_));
        }
        if (lengths_[rank] == 0) {
            throw VocabularyError(describe(id) + " stands for an empty byte string");
        }
        if (rank_of_id_[id] != kNoRank) {
            throw VocabularyError(describe(id) + " appears twice");
        }
        rank_of_id_[id] = static_cast<std::uint32_t>(rank);
        if (rank == 0) {
            continue;
        }
        const int order = entry(rank - 1).compare(entry(rank));
        if (order == 0) {
            throw VocabularyError("tokens " + std::to_string(ids_[rank - 1]) + " and " + std::to_string(id) +
                                  " stand for the same byte string");
        }
        if (order > 0) {
            throw VocabularyError(describe(id) + " is not in lexicographic order");
        }
    }
}

// The entries are sorted, so the entries below a node are one range of ranks, and its children split that range by the
// byte at the node's depth. Breadth first, because the children of a node must be consecutive.
void VocabularyTrie::build_nodes() {
    struct Range {
        std::uint32_t begin;
        std::uint32_t end;
        std::uint32_t depth;
    };
    std::vector<Range> ranges{{0, static_cast<std::uint32_t>(ids_.size()), 0}};
    nodes_.emplace_back();
    labels_.push_back(0);
    for (std::size_t place = 0; place < nodes_.size(); ++place) {
        auto [begin, end, depth] = ranges[place];
        if (begin < end && lengths_[begin] == depth) {
            nodes_[place].id = ids_[begin];
            ++begin;
        }
        const std::size_t first_child = nodes_.size();
        while (begin < end) {
            const char label = pool_[offsets_[begin] + depth];
            std::uint32_t next = begin + 1;
            while (next < end && pool_[offsets_[next] + depth] == label) {
                ++next;
            }
            ranges.push_back({begin, next, depth + 1});
            nodes_.emplace_back();
            labels_.push_back(static_cast<unsigned char>(label));
            begin = next;
        }
        nodes_[place].first_child = static_cast<std::uint32_t>(first_child);
        nodes_[place].n_children = static_cast<std::uint16_t>(nodes_.size() - first_child);
    }
}

const VocabularyTrie::Node* VocabularyTrie::child(const Node& node, unsigned char label) const noexcept {
    if (node.n_children == 0) {
        return nullptr;
    }
    const unsigned char* const first = labels_.data() + node.first_child;
    const void* const found = std::memchr(first, label, node.n_children);
    if (found == nullptr) {
        return nullptr;
    }
    return &nodes_[node.first_child + (static_cast<const unsigned char*>(found) - first)];
}

VocabularyTrie::Encoding VocabularyTrie::encode(std::string_view text) const {
    Encoding encoding{{}, 0};
    while (encoding.matched_bytes < text.size()) {
        const Node* node = nodes_.data();
        std::uint32_t best_id = kNoId;
        std::size_t best_end = 0;
        for (std::size_t at = encoding.matched_bytes; at < text.size();) {
            node = child(*node, static_cast<unsigned char>(text[at]));
            if (node == nullptr) {
                break;
            }
            ++at;
            if (node->id != kNoId) {
                best_id = node->id;
                best_end = at;
            }
        }
        if (best_id == kNoId) {
            break;
        }
        encoding.ids.push_back(best_id);
        encoding.matched_bytes = best_end;
    }
    return encoding;
}

std::string_view VocabularyTrie::token_bytes(std::uint32_t id) const {
    const std::uint32_t rank = rank_of_id_.at(id);
    return rank == kNoRank ? std::string_view{} : entry(rank);
}

std::string VocabularyTrie::decode(const std::vector<std::uint32_t>& ids) const {
    std::size_t total = 0;
    for (const std::uint32_t id : ids) {
        total += token_bytes(id).size();
    }
    std::string bytes;
    bytes.reserve(total);
    for (const std::uint32_t id : ids) {
        bytes += token_bytes(id);
    }
    return bytes;
}

}  // namespace goslet
