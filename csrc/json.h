// A strict reader of JSON for engine files: UTF-8, no duplicate keys, bounded depth and size.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace goslet {

// The text is not JSON, or a value is not what was asked for. `what()` names the place.
class JsonError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

class Json {
  public:
    enum class Kind : std::uint8_t { kNull, kBoolean, kInteger, kNumber, kText, kArray, kObject };

    // Throws JsonError; at most kMaxDepth values lie within each other, and there are at most kMaxValues commas
    // and opening brackets, one for each value.
    static Json parse(std::string_view text);
    static constexpr std::size_t kMaxDepth = 64;
    static constexpr std::size_t kMaxValues = std::size_t{1} << 20;

    Kind kind() const noexcept { return kind_; }
    bool is_null() const noexcept { return kind_ == Kind::kNull; }

    // Each throws JsonError when the value is of another kind; `place` names it there. An integer is a number written
    // without fraction or exponent that fits int64; number() takes both.
    bool boolean(const std::string& place) const;
    std::int64_t integer(const std::string& place) const;
    double number(const std::string& place) const;
    const std::string& text(const std::string& place) const;
    const std::vector<Json>& array(const std::string& place) const;
    // In the order of the text.
    const std::vector<std::pair<std::string, Json>>& object(const std::string& place) const;

    // A member of an object: null pointer when it is absent; `need` throws instead.
    const Json* find(std::string_view key, const std::string& place) const;
    const Json& need(std::string_view key, const std::string& place) const;

  private:
    friend class JsonParser;
    Kind kind_ = Kind::kNull;
    bool boolean_ = false;
    std::int64_t integer_ = 0;
    double number_ = 0;
    std::string text_;
    std::vector<Json> array_;
    std::vector<std::pair<std::string, Json>> object_;
};

}  // namespace goslet
