// The framing that engine files and state files share, as runtime/container.py describes it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "json.h"

namespace goslet {

// A file cannot be read or written, or is not what it should be. `what()` is the whole message without the file's name.
class ContainerError : public std::runtime_error {
  public:
    enum class Kind : std::uint8_t {
        kUnreadable,   // missing, a folder, no permission, no memory to map it into
        kDamaged,      // not such a file, or a damaged one
        kUnsupported,  // of another version of the format, or it requires a feature that is not known
        kMismatch,     // a state of another model
        kUnwritable,
        kNotFinite,  // a state holds NaN or infinity
    };

    ContainerError(Kind kind, std::string problem, std::string place = "", std::string expected = "",
                   std::string found = "");

    Kind kind;
    std::string problem;
    std::string place;
    std::string expected;
    std::string found;
};

// "place: problem (expected …, found …)", without the parts that are empty.
std::string error_message(const std::string& problem, const std::string& place, const std::string& expected,
                          const std::string& found);

// A text that came out of a file, fit for a message: quoted, short and of printable ASCII only.
std::string shown(std::string_view text);

// A file that is mapped read-only. Whoever shortens the file in place while it is mapped makes reading it fatal
// (SIGBUS), where `check_whole` does not find it first; goslet never does, it replaces files by renaming, which leaves
// a map whole.
class MappedFile {
  public:
    // Only ordinary files. Throws ContainerError.
    explicit MappedFile(const std::string& path);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    std::string_view bytes() const noexcept { return {data_, size_bytes_}; }
    // Throws ContainerError where the file is shorter than when it was mapped.
    void check_whole() const;

  private:
    int descriptor_ = -1;
    const char* data_ = nullptr;  // null for an empty file
    std::size_t size_bytes_ = 0;
};

struct ContainerKind {
    std::string_view magic;                               // 8 bytes
    std::uint32_t version;                                // the newest that is known
    const char* name;                                     // "engine file"
    std::array<std::string_view, 4> known_features = {};  // those that a file may require; empty ones are none
};

struct SectionEntry {
    std::string name;
    std::uint64_t offset;
    std::uint64_t size_bytes;
    std::string sha256;
    bool verified_at_open;
};

// An open file whose header, padding and sections that are marked so are verified.
class Container {
  public:
    // Throws ContainerError and std::bad_alloc. Every length is compared with the file's before anything is allocated.
    Container(const std::string& path, const ContainerKind& kind);

    std::uint32_t version() const noexcept { return version_; }
    const Json& header() const noexcept { return header_; }
    // In the file's order.
    const std::vector<SectionEntry>& sections() const noexcept { return sections_; }
    const SectionEntry* find(std::string_view name) const noexcept;
    // A section's bytes, good while the container lives. Throws ContainerError where there is no such section.
    std::string_view section(std::string_view name) const;
    // Throws ContainerError where somebody has shortened the file since it was opened.
    void check_whole() const { file_.check_whole(); }

  private:
    void read_prefix(const ContainerKind& kind);
    void check_features(const ContainerKind& kind) const;
    void read_sections();
    void check_padding() const;
    std::string_view bytes_of(const SectionEntry& entry) const;

    MappedFile file_;
    std::uint32_t version_ = 0;
    std::uint64_t head_bytes_ = 0;  // prefix and JSON, without the digest behind them
    Json header_;
    std::vector<SectionEntry> sections_;
};

// Writes a container of one section that is verified at open, so that it appears whole or not at all; an existing file
// is replaced. `members` is the JSON of the header's own members, without the braces. Throws ContainerError.
void write_container(const std::string& path, const ContainerKind& kind, const std::string& members,
                     const std::string& section_name, std::string_view section);

}  // namespace goslet
