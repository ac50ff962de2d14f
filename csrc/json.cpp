#include "json.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <locale>
#include <sstream>

namespace goslet {
namespace {

// As in runtime/container.py: nothing that goslet writes needs more, and a long number is slow to convert.
constexpr std::size_t kMaxNumberCharacters = 40;

[[noreturn]] void refuse(std::size_t offset, const std::string& problem) {
    throw JsonError("is not JSON at byte " + std::to_string(offset) + ": " + problem);
}

bool is_digit(char c) {
    return c >= '0' && c <= '9';
}

const char* kind_name(Json::Kind kind) {
    switch (kind) {
        case Json::Kind::kNull:
            return "null";
        case Json::Kind::kBoolean:
            return "a truth value";
        case Json::Kind::kInteger:
            return "a whole number";
        case Json::Kind::kNumber:
            return "a number";
        case Json::Kind::kText:
            return "a text";
        case Json::Kind::kArray:
            return "a list";
        case Json::Kind::kObject:
            return "an object";
    }
    return "";
}

void require(const Json& value, bool fits, Json::Kind wanted, const std::string& place) {
    if (!fits) {
        throw JsonError(place + ": is not " + kind_name(wanted) + " but " + kind_name(value.kind()));
    }
}

// Appends a code point that is not half of a surrogate pair.
void append_utf8(std::string& out, std::uint32_t code) {
    if (code < 0x80) {
        out += static_cast<char>(code);
    } else if (code < 0x800) {
        out += static_cast<char>(0xC0 | (code >> 6));
        out += static_cast<char>(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
        out += static_cast<char>(0xE0 | (code >> 12));
        out += static_cast<char>(0x80 | ((code >> 6) & 0x3F));
        out += static_cast<char>(0x80 | (code & 0x3F));
    } else {
        out += static_cast<char>(0xF0 | (code >> 18));
        out += static_cast<char>(0x80 | ((code >> 12) & 0x3F));
        out += static_cast<char>(0x80 | ((code >> 6) & 0x3F));
        out += static_cast<char>(0x80 | (code & 0x3F));
    }
}

// Bytes of the UTF-8 character at the start of `text`, which is not ASCII; 0 if there is none. The shortest form only,
// and no surrogates (Unicode 15, table 3-7).
std::size_t utf8_length(std::string_view text) {
    const auto byte = [&](std::size_t index) {
        return index < text.size() ? static_cast<unsigned char>(text[index]) : 0U;
    };
    const auto within = [&](std::size_t index, unsigned low, unsigned high) {
        return byte(index) >= low && byte(index) <= high;
    };
    const unsigned first = byte(0);
    if (first >= 0xC2 && first <= 0xDF) {
        return within(1, 0x80, 0xBF) ? 2 : 0;
    }
    if (first >= 0xE0 && first <= 0xEF) {
        const unsigned low = first == 0xE0 ? 0xA0 : 0x80;
        const unsigned high = first == 0xED ? 0x9F : 0xBF;
        return within(1, low, high) && within(2, 0x80, 0xBF) ? 3 : 0;
    }
    if (first >= 0xF0 && first <= 0xF4) {
        const unsigned low = first == 0xF0 ? 0x90 : 0x80;
        const unsigned high = first == 0xF4 ? 0x8F : 0xBF;
        return within(1, low, high) && within(2, 0x80, 0xBF) && within(3, 0x80, 0xBF) ? 4 : 0;
    }
    return 0;
}

}  // namespace

class JsonParser {
  public:
    explicit JsonParser(std::string_view text) : text_(text) {}

    Json document() {
        // A short text can ask for much memory. As runtime/container.py counts them, also within texts.
        const auto n_values = static_cast<std::size_t>(
            std::count_if(text_.begin(), text_.end(), [](char c) { return c == ',' || c == '[' || c == '{'; }));
        if (n_values > Json::kMaxValues) {
            refuse(0, "more than " + std::to_string(Json::kMaxValues) + " values");
        }
        Json value = this->value(1);
        skip_blanks();
        if (offset_ != text_.size()) {
            refuse(offset_, "there is more after the value");
        }
        return value;
    }

  private:
    // '\0' at the end; a NUL in the text fits nowhere either.
    char peek() const { return offset_ < text_.size() ? text_[offset_] : '\0'; }

    void skip_blanks() {
        while (offset_ < text_.size() && (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r')) {
            ++offset_;
        }
    }

    void expect(char c) {
        if (peek() != c) {
            refuse(offset_, std::string("expected '") + c + "'");
        }
        ++offset_;
    }

    Json value(std::size_t depth) {
        skip_blanks();
        if (depth > Json::kMaxDepth) {
            refuse(offset_, "nested more than " + std::to_string(Json::kMaxDepth) + " deep");
        }
        Json value;
        switch (peek()) {
            case '{':
                value.kind_ = Json::Kind::kObject;
                members(value.object_, depth);
                break;
            case '[':
                value.kind_ = Json::Kind::kArray;
                items(value.array_, depth);
                break;
            case '"':
                value.kind_ = Json::Kind::kText;
                value.text_ = string();
                break;
            case 't':
                word("true");
                value.kind_ = Json::Kind::kBoolean;
                value.boolean_ = true;
                break;
            case 'f':
                word("false");
                value.kind_ = Json::Kind::kBoolean;
                break;
            case 'n':
                word("null");
                break;
            default:
                number(value);
        }
        return value;
    }

    void word(std::string_view word) {
        if (text_.substr(offset_, word.size()) != word) {
            refuse(offset_, "expected a value");
        }
        offset_ += word.size();
    }

    void items(std::vector<Json>& out, std::size_t depth) {
        ++offset_;
        skip_blanks();
        if (peek() == ']') {
            ++offset_;
            return;
        }
        while (true) {
            out.push_back(value(depth + 1));
            skip_blanks();
            if (peek() != ',') {
                break;
            }
            ++offset_;
        }
        expect(']');
    }

    void members(std::vector<std::pair<std::string, Json>>& out, std::size_t depth) {
        const std::size_t start = offset_++;
        skip_blanks();
        if (peek() == '}') {
            ++offset_;
            return;
        }
        while (true) {
            skip_blanks();
            std::string key = string();
            skip_blanks();
            expect(':');
            out.emplace_back(std::move(key), value(depth + 1));
            skip_blanks();
            if (peek() != ',') {
                break;
            }
            ++offset_;
        }
        expect('}');
        std::vector<std::string_view> keys;
        keys.reserve(out.size());
        for (const auto& member : out) {
            keys.emplace_back(member.first);
        }
        std::sort(keys.begin(), keys.end());
        if (std::adjacent_find(keys.begin(), keys.end()) != keys.end()) {
            refuse(start, "an object has a key twice");
        }
    }

    std::string string() {
        expect('"');
        std::string out;
        while (true) {
            if (offset_ == text_.size()) {
                refuse(offset_, "a text does not end");
            }
            const auto byte = static_cast<unsigned char>(text_[offset_]);
            if (byte == '"') {
                ++offset_;
                return out;
            }
            if (byte == '\\') {
                escape(out);
            } else if (byte < 0x20) {
                refuse(offset_, "a text holds a control character");
            } else {
                const std::size_t length = byte < 0x80 ? 1 : utf8_length(text_.substr(offset_));
                if (length == 0) {
                    refuse(offset_, "a text is not UTF-8");
                }
                out.append(text_.substr(offset_, length));
                offset_ += length;
            }
        }
    }

    void escape(std::string& out) {
        static constexpr std::string_view kLetters = "\"\\/bfnrt";
        static constexpr std::string_view kMeanings = "\"\\/\b\f\n\r\t";
        const std::size_t start = offset_++;
        const std::size_t letter = offset_ < text_.size() ? kLetters.find(text_[offset_]) : std::string_view::npos;
        if (letter != std::string_view::npos) {
            ++offset_;
            out += kMeanings[letter];
            return;
        }
        std::uint32_t code = code_unit();
        if (code >= 0xD800 && code <= 0xDFFF) {
            // Half a surrogate pair has no UTF-8.
            if (code >= 0xDC00 || peek() != '\\') {
                refuse(start, "a text holds half a surrogate pair");
            }
            ++offset_;
            const std::uint32_t low = code_unit();
            if (low < 0xDC00 || low > 0xDFFF) {
                refuse(start, "a text holds half a surrogate pair");
            }
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        }
        append_utf8(out, code);
    }

    // The four hex digits behind "\u", of which the backslash is read.
    std::uint32_t code_unit() {
        if (peek() != 'u') {
            refuse(offset_, "an escape is not known");
        }
        ++offset_;
        std::uint32_t code = 0;
        for (int digit = 0; digit < 4; ++digit, ++offset_) {
            const char c = peek();
            if (is_digit(c)) {
                code = code * 16 + static_cast<std::uint32_t>(c - '0');
            } else if (c >= 'a' && c <= 'f') {
                code = code * 16 + static_cast<std::uint32_t>(c - 'a' + 10);
            } else if (c >= 'A' && c <= 'F') {
                code = code * 16 + static_cast<std::uint32_t>(c - 'A' + 10);
            } else {
                refuse(offset_, "an escape needs four hex digits");
            }
        }
        return code;
    }

    void digits() {
        if (!is_digit(peek())) {
            refuse(offset_, "expected a value");
        }
        while (is_digit(peek())) {
            ++offset_;
        }
    }

    void number(Json& out) {
        const std::size_t start = offset_;
        if (peek() == '-') {
            ++offset_;
        }
        if (peek() == '0') {
            ++offset_;
        } else {
            digits();
        }
        const bool negative = text_[start] == '-';
        const std::string_view whole = text_.substr(start + (negative ? 1 : 0), offset_ - start - (negative ? 1 : 0));
        bool is_whole = true;
        if (peek() == '.') {
            is_whole = false;
            ++offset_;
            digits();
        }
        if (peek() == 'e' || peek() == 'E') {
            is_whole = false;
            ++offset_;
            if (peek() == '+' || peek() == '-') {
                ++offset_;
            }
            digits();
        }
        const std::string_view text = text_.substr(start, offset_ - start);
        if (text.size() > kMaxNumberCharacters) {
            refuse(start, "a number is longer than " + std::to_string(kMaxNumberCharacters) + " characters");
        }
        // Neither strtod, which reads the decimal point of whatever locale the application has set, nor from_chars,
        // which not every C++17 library has for double.
        std::istringstream stream{std::string(text)};
        stream.imbue(std::locale::classic());
        if (!(stream >> out.number_) || !std::isfinite(out.number_)) {
            refuse(start, "a number is not finite");
        }
        const bool fits = is_whole && to_integer(whole, negative, out.integer_);
        out.kind_ = fits ? Json::Kind::kInteger : Json::Kind::kNumber;
    }

    // False where the digits do not fit.
    static bool to_integer(std::string_view digits, bool negative, std::int64_t& out) {
        constexpr std::int64_t kLeast = std::numeric_limits<std::int64_t>::min();
        std::int64_t value = 0;  // negated: there is one more number below zero than above
        for (const char c : digits) {
            const std::int64_t digit = c - '0';
            if (value < (kLeast + digit) / 10) {
                return false;
            }
            value = value * 10 - digit;
        }
        if (!negative && value == kLeast) {
            return false;
        }
        out = negative ? value : -value;
        return true;
    }

    std::string_view text_;
    std::size_t offset_ = 0;
};

Json Json::parse(std::string_view text) {
    return JsonParser(text).document();
}

bool Json::boolean(const std::string& place) const {
    require(*this, kind_ == Kind::kBoolean, Kind::kBoolean, place);
    return boolean_;
}

std::int64_t Json::integer(const std::string& place) const {
    require(*this, kind_ == Kind::kInteger, Kind::kInteger, place);
    return integer_;
}

double Json::number(const std::string& place) const {
    require(*this, kind_ == Kind::kInteger || kind_ == Kind::kNumber, Kind::kNumber, place);
    return number_;
}

const std::string& Json::text(const std::string& place) const {
    require(*this, kind_ == Kind::kText, Kind::kText, place);
    return text_;
}

const std::vector<Json>& Json::array(const std::string& place) const {
    require(*this, kind_ == Kind::kArray, Kind::kArray, place);
    return array_;
}

const std::vector<std::pair<std::string, Json>>& Json::object(const std::string& place) const {
    require(*this, kind_ == Kind::kObject, Kind::kObject, place);
    return object_;
}

const Json* Json::find(std::string_view key, const std::string& place) const {
    for (const auto& [name, value] : object(place)) {
        if (name == key) {
            return &value;
        }
    }
    return nullptr;
}

const Json& Json::need(std::string_view key, const std::string& place) const {
    const Json* const value = find(key, place);
    if (value == nullptr) {
        throw JsonError(place + ": the key " + std::string(key) + " is missing");
    }
    return *value;
}

}  // namespace goslet
