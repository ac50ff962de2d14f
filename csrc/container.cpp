#include "container.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <set>
#include <utility>

#include "output_file.h"
#include "sha256.h"

namespace goslet {
namespace {

using Kind = ContainerError::Kind;

constexpr std::uint64_t kAlignmentBytes = 4096;
constexpr std::size_t kMagicBytes = 8;
constexpr std::size_t kPrefixBytes = 24;
constexpr std::size_t kDigestBytes = 32;
constexpr std::uint64_t kMaxHeaderBytes = std::uint64_t{64} << 20;
constexpr std::uint64_t kMaxSectionBytes = std::uint64_t{1} << 48;
constexpr std::size_t kMaxNameCharacters = 100;
constexpr std::size_t kShownCharacters = 60;

// Sizes here are below 2^49, so nothing overflows.
constexpr std::uint64_t align_up(std::uint64_t size_bytes) {
    return (size_bytes + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
}

[[noreturn]] void refuse(Kind kind, std::string problem, std::string place = "", std::string expected = "",
                         std::string found = "") {
    throw ContainerError(kind, std::move(problem), std::move(place), std::move(expected), std::move(found));
}

std::string in_bytes(std::uint64_t size_bytes) {
    return std::to_string(size_bytes) + " bytes";
}

std::uint64_t little_endian(std::string_view bytes) {
    std::uint64_t value = 0;
    for (std::size_t i = bytes.size(); i-- > 0;) {
        value = value << 8 | static_cast<unsigned char>(bytes[i]);
    }
    return value;
}

std::string little_endian_bytes(std::uint64_t value, std::size_t n_bytes) {
    std::string bytes;
    for (std::size_t i = 0; i < n_bytes; ++i) {
        bytes += static_cast<char>(value >> (8 * i));
    }
    return bytes;
}

bool is_letter_or_digit(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
}

bool is_section_name(std::string_view name) {
    return !name.empty() && name.size() <= kMaxNameCharacters && is_letter_or_digit(name.front()) &&
           std::all_of(name.begin(), name.end(),
                       [](char c) { return is_letter_or_digit(c) || c == '.' || c == '_' || c == '+' || c == '-'; });
}

bool is_sha256(std::string_view text) {
    return text.size() == 2 * kDigestBytes && text.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

std::uint64_t section_number(const Json& item, const std::string& key, const std::string& place) {
    const std::string at = place + "." + key;
    const std::int64_t value = item.need(key, place).integer(at);
    if (value < 0 || static_cast<std::uint64_t>(value) > kMaxSectionBytes) {
        refuse(Kind::kDamaged, "is not a number of bytes", at, "0 to " + std::to_string(kMaxSectionBytes),
               std::to_string(value));
    }
    return static_cast<std::uint64_t>(value);
}

SectionEntry section_entry(const Json& item, const std::string& place) {
    const std::string& name = item.need("name", place).text(place + ".name");
    if (!is_section_name(name)) {
        refuse(Kind::kDamaged, "is not a section name", place + ".name", "", shown(name));
    }
    const std::string& sha256 = item.need("sha256", place).text(place + ".sha256");
    if (!is_sha256(sha256)) {
        refuse(Kind::kDamaged, "is not a SHA-256", place + ".sha256", "64 hex digits");
    }
    const std::string& verify = item.need("verify", place).text(place + ".verify");
    if (verify != "open" && verify != "check") {
        refuse(Kind::kDamaged, "is neither open nor check", place + ".verify");
    }
    return {name, section_number(item, "offset", place), section_number(item, "size_bytes", place), sha256,
            verify == "open"};
}

class Descriptor {
  public:
    explicit Descriptor(int number) : number_(number) {}
    ~Descriptor() {
        if (number_ >= 0) {
            close(number_);
        }
    }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    int number() const { return number_; }
    int release() { return std::exchange(number_, -1); }

  private:
    int number_;
};

[[noreturn]] void refuse_unreadable(int error) {
    refuse(Kind::kUnreadable,
           error == ENOENT ? "does not exist" : std::string("cannot be read: ") + std::strerror(error));
}

void check_regular(mode_t mode) {
    if (!S_ISREG(mode)) {
        refuse(Kind::kUnreadable, S_ISDIR(mode) ? "is a folder" : "is not an ordinary file");
    }
}

}  // namespace

ContainerError::ContainerError(Kind kind, std::string problem, std::string place, std::string expected,
                               std::string found)
    : std::runtime_error(error_message(problem, place, expected, found)),
      kind(kind),
      problem(std::move(problem)),
      place(std::move(place)),
      expected(std::move(expected)),
      found(std::move(found)) {}

std::string error_message(const std::string& problem, const std::string& place, const std::string& expected,
                          const std::string& found) {
    std::string message = place.empty() ? problem : place + ": " + problem;
    if (!expected.empty() || !found.empty()) {
        message += " (";
        message += expected.empty() ? "" : "expected " + expected;
        message += expected.empty() || found.empty() ? "" : ", ";
        message += found.empty() ? "" : "found " + found;
        message += ")";
    }
    return message;
}

std::string shown(std::string_view text) {
    static constexpr char kDigits[] = "0123456789abcdef";
    std::string out = "'";
    for (const char c : text.substr(0, kShownCharacters)) {
        if (c >= 0x20 && c < 0x7F) {
            out += c;
        } else {
            const auto byte = static_cast<unsigned char>(c);
            out += {'\\', 'x', kDigits[byte >> 4], kDigits[byte & 15]};
        }
    }
    return out + (text.size() > kShownCharacters ? "…'" : "'");
}

MappedFile::MappedFile(const std::string& path) {
    // Looked at before it is opened: opening some devices does things, and opening a pipe waits for a writer.
    struct stat status{};
    if (stat(path.c_str(), &status) != 0) {
        refuse_unreadable(errno);
    }
    check_regular(status.st_mode);
    Descriptor descriptor(open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
    if (descriptor.number() < 0 || fstat(descriptor.number(), &status) != 0) {
        refuse_unreadable(errno);
    }
    check_regular(status.st_mode);
    if (status.st_size == 0) {
        return;
    }
    const auto size_bytes = static_cast<std::uint64_t>(status.st_size);
    if (size_bytes > std::numeric_limits<std::size_t>::max()) {
        refuse(Kind::kUnreadable, "is larger than this machine's addresses", "", "", in_bytes(size_bytes));
    }
    void* const data =
        mmap(nullptr, static_cast<std::size_t>(size_bytes), PROT_READ, MAP_SHARED, descriptor.number(), 0);
    if (data == MAP_FAILED) {
        refuse(Kind::kUnreadable, std::string("cannot be mapped into memory: ") + std::strerror(errno));
    }
    descriptor_ = descriptor.release();
    data_ = static_cast<const char*>(data);
    size_bytes_ = static_cast<std::size_t>(size_bytes);
}

void MappedFile::check_whole() const {
    struct stat status{};
    if (descriptor_ >= 0 && fstat(descriptor_, &status) == 0 &&
        static_cast<std::uint64_t>(status.st_size) < size_bytes_) {
        refuse(Kind::kDamaged, "was cut short while it was open; copy it again, and open it again", "",
               in_bytes(size_bytes_), in_bytes(static_cast<std::uint64_t>(status.st_size)));
    }
}

MappedFile::~MappedFile() {
    if (data_ != nullptr) {
        munmap(const_cast<char*>(data_), size_bytes_);
        close(descriptor_);
    }
}

Container::Container(const std::string& path, const ContainerKind& kind) : file_(path) {
    read_prefix(kind);
    const std::string_view bytes = file_.bytes();
    const std::string_view head = bytes.substr(0, head_bytes_);
    const Sha256Digest digest = sha256(head);
    if (std::memcmp(digest.data(), bytes.data() + head_bytes_, kDigestBytes) != 0) {
        refuse(Kind::kDamaged, "is damaged: wrong SHA-256", "header");
    }
    try {
        header_ = Json::parse(head.substr(kPrefixBytes));
        check_features(kind);
        read_sections();
    } catch (const JsonError& error) {
        refuse(Kind::kDamaged, error.what(), "header");
    }
    check_padding();
    for (const SectionEntry& entry : sections_) {
        if (entry.verified_at_open) {
            const std::string found = hex(sha256(bytes_of(entry)));
            if (found != entry.sha256) {
                refuse(Kind::kDamaged, "is damaged: wrong SHA-256", "section " + entry.name, entry.sha256, found);
            }
        }
    }
}

void Container::read_prefix(const ContainerKind& kind) {
    const std::string_view bytes = file_.bytes();
    const std::string_view start = bytes.substr(0, kMagicBytes);
    if (start != kind.magic) {
        const bool cut = !start.empty() && kind.magic.substr(0, start.size()) == start;
        refuse(Kind::kDamaged, cut ? "ends within its first bytes" : std::string("is not a goslet ") + kind.name,
               "magic");
    }
    if (bytes.size() < kPrefixBytes) {
        refuse(Kind::kDamaged, "ends before its header", "", in_bytes(kPrefixBytes), in_bytes(bytes.size()));
    }
    version_ = static_cast<std::uint32_t>(little_endian(bytes.substr(8, 4)));
    if (version_ > kind.version) {
        refuse(Kind::kUnsupported, "was written by a newer goslet", "format version",
               "at most " + std::to_string(kind.version), std::to_string(version_));
    }
    if (version_ < 1) {
        refuse(Kind::kDamaged, "is not a version", "format version", "", "0");
    }
    if (little_endian(bytes.substr(12, 4)) != 0) {
        refuse(Kind::kDamaged, "is not zero", "offset 12");
    }
    const std::uint64_t json_bytes = little_endian(bytes.substr(16, 8));
    if (json_bytes > kMaxHeaderBytes) {
        refuse(Kind::kDamaged, "the header is too long", "offset 16", "at most " + in_bytes(kMaxHeaderBytes),
               in_bytes(json_bytes));
    }
    head_bytes_ = kPrefixBytes + json_bytes;
    if (head_bytes_ + kDigestBytes > bytes.size()) {
        refuse(Kind::kDamaged, "ends within its header", "", "at least " + in_bytes(head_bytes_ + kDigestBytes),
               in_bytes(bytes.size()));
    }
}

void Container::check_features(const ContainerKind& kind) const {
    for (const Json& feature : header_.need("required_features", "header").array("required_features")) {
        const std::string& name = feature.text("required_features");
        const auto& known = kind.known_features;
        if (name.empty() || std::find(known.begin(), known.end(), name) == known.end()) {
            refuse(Kind::kUnsupported, "requires a feature that this goslet does not know", "required_features", "",
                   shown(name));
        }
    }
}

void Container::read_sections() {
    const std::vector<Json>& items = header_.need("sections", "header").array("sections");
    const std::uint64_t file_bytes = file_.bytes().size();
    std::set<std::string_view> names;
    std::uint64_t end = align_up(head_bytes_ + kDigestBytes);
    for (std::size_t index = 0; index < items.size(); ++index) {
        SectionEntry entry = section_entry(items[index], "sections[" + std::to_string(index) + "]");
        const std::string place = "section " + entry.name;
        if (!names.insert(items[index].need("name", place).text(place)).second) {
            refuse(Kind::kDamaged, "appears twice", place);
        }
        if (entry.offset != align_up(end)) {
            const char* const problem = entry.offset % kAlignmentBytes != 0 ? "does not begin at a multiple of 4096"
                                        : entry.offset < end                ? "overlaps what is before it"
                                                                            : "leaves a hole before it";
            refuse(Kind::kDamaged, problem, place, "offset " + std::to_string(align_up(end)),
                   std::to_string(entry.offset));
        }
        end = entry.offset + entry.size_bytes;
        if (end > file_bytes) {
            refuse(Kind::kDamaged, "the file ends before it does", place, "at least " + in_bytes(end),
                   in_bytes(file_bytes));
        }
        sections_.push_back(std::move(entry));
    }
    if (file_bytes != end) {
        refuse(Kind::kDamaged, "has a wrong length", "", in_bytes(end), in_bytes(file_bytes));
    }
}

void Container::check_padding() const {
    const std::string_view bytes = file_.bytes();
    const auto check = [&](std::uint64_t begin, std::uint64_t end, const std::string& place) {
        const std::string_view padding =
            bytes.substr(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
        if (padding.find_first_not_of('\0') != std::string_view::npos) {
            refuse(Kind::kDamaged, "padding is not zero", place);
        }
    };
    std::uint64_t end = head_bytes_ + kDigestBytes;
    for (const SectionEntry& entry : sections_) {
        check(end, entry.offset, "before section " + entry.name);
        end = entry.offset + entry.size_bytes;
    }
    if (sections_.empty()) {
        check(end, bytes.size(), "after the header");
    }
}

const SectionEntry* Container::find(std::string_view name) const noexcept {
    for (const SectionEntry& entry : sections_) {
        if (entry.name == name) {
            return &entry;
        }
    }
    return nullptr;
}

std::string_view Container::section(std::string_view name) const {
    const SectionEntry* const entry = find(name);
    if (entry == nullptr) {
        refuse(Kind::kDamaged, "a section is missing", std::string(name));
    }
    return bytes_of(*entry);
}

std::string_view Container::bytes_of(const SectionEntry& entry) const {
    return file_.bytes().substr(static_cast<std::size_t>(entry.offset), static_cast<std::size_t>(entry.size_bytes));
}

void write_container(const std::string& path, const ContainerKind& kind, const std::string& members,
                     const std::string& section_name, std::string_view section) {
    const std::string sha256_hex = hex(sha256(section));
    std::string head;
    // The section's offset stands in the header and depends on the header's length.
    std::uint64_t offset = kAlignmentBytes;
    while (true) {
        const std::string json = "{\"required_features\":[]," + members + ",\"sections\":[{\"name\":\"" + section_name +
                                 "\",\"offset\":" + std::to_string(offset) +
                                 ",\"size_bytes\":" + std::to_string(section.size()) + ",\"sha256\":\"" + sha256_hex +
                                 "\",\"verify\":\"open\"}]}";
        head =
            std::string(kind.magic) + little_endian_bytes(kind.version, 8) + little_endian_bytes(json.size(), 8) + json;
        const std::uint64_t needed = align_up(head.size() + kDigestBytes);
        if (needed <= offset) {
            break;
        }
        offset = needed;
    }
    const Sha256Digest digest = sha256(head);
    head.append(reinterpret_cast<const char*>(digest.data()), digest.size());
    head.resize(static_cast<std::size_t>(offset), '\0');
    write_whole(path, {head, section});
}

}  // namespace goslet
