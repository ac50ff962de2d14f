#include "chat_template.h"

#include <algorithm>
#include <initializer_list>
#include <string>
#include <string_view>

#include "container.h"

namespace goslet {
namespace {

constexpr std::size_t kMaxCharacters = 1000;
constexpr std::size_t kMaxModes = 20;
constexpr std::size_t kMaxModeName = 40;
constexpr std::int64_t kMaxTopK = 1 << 24;

struct Range {
    std::string_view name;
    double low, high;
};
// As runtime/sampling.py has them; top_k beside them is a whole number.
constexpr Range kDecoding[] = {{"temperature", 0, 1e6},
                               {"top_p", 0, 1},
                               {"min_p", 0, 1},
                               {"presence_penalty", -1e6, 1e6},
                               {"frequency_penalty", -1e6, 1e6},
                               {"repeat_penalty", 0.01, 100},
                               {"penalty_decay", 0, 1}};

[[noreturn]] void refuse(const std::string& problem, const std::string& place) {
    throw ContainerError(ContainerError::Kind::kDamaged, problem, place);
}

using Keys = std::initializer_list<std::string_view>;

bool is_among(std::string_view key, Keys keys) {
    return std::find(keys.begin(), keys.end(), key) != keys.end();
}

// All of the keys are there, and beside them none but optional ones.
void check_keys(const Json& value, const std::string& place, Keys keys, Keys optional = {}) {
    for (const auto& [key, member] : value.object(place)) {
        if (!is_among(key, keys) && !is_among(key, optional)) {
            refuse("has other keys than it should", place);
        }
    }
    for (const std::string_view key : keys) {
        value.need(key, place);
    }
}

// Strings are UTF-8, and characters are counted as Python counts them.
const std::string& need_text(const Json& object, const std::string& key, const std::string& place) {
    const std::string& text = object.need(key, place).text(place + "." + key);
    const auto begins = [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; };
    if (static_cast<std::size_t>(std::count_if(text.begin(), text.end(), begins)) > kMaxCharacters) {
        refuse("is not a text of at most 1000 characters", place + "." + key);
    }
    return text;
}

void need_place(const Json& object, const std::string& key, const std::string& place) {
    const std::string& text = need_text(object, key, place);
    const std::size_t first = text.find("{}");
    if (first == std::string::npos || text.find("{}", first + 2) != std::string::npos) {
        refuse("has not one place for the text", place + "." + key);
    }
}

void check_sampling(const Json& holder, const std::string& holder_place) {
    const Json* sampling = holder.find("sampling", holder_place);
    if (sampling == nullptr) {
        return;
    }
    const std::string place = holder_place + ".sampling";
    for (const auto& [key, value] : sampling->object(place)) {
        const std::string at = place + "." + key;
        if (key == "top_k") {
            const std::int64_t top_k = value.integer(at);
            if (top_k < 0 || top_k > kMaxTopK) {
                refuse("is out of range", at);
            }
            continue;
        }
        const auto* const range = std::find_if(std::begin(kDecoding), std::end(kDecoding),
                                               [&name = key](const Range& one) { return one.name == name; });
        if (range == std::end(kDecoding)) {
            refuse("is no decoding parameter", at);
        }
        const double number = value.number(at);
        if (!(number >= range->low && number <= range->high)) {
            refuse("is out of range", at);
        }
    }
}

bool is_mode_name(std::string_view name) {
    const auto fits = [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'); };
    return !name.empty() && name.size() <= kMaxModeName && fits(name.front()) &&
           std::all_of(name.begin(), name.end(), [&](char c) { return fits(c) || c == '-'; });
}

}  // namespace

void check_chat_template(const Json& chat) {
    const std::string place = "chat";
    check_keys(chat, place, {"system", "user", "assistant", "end", "modes"}, {"tools", "sampling"});
    need_place(chat, "system", place);
    need_place(chat, "user", place);
    need_text(chat, "assistant", place);
    need_text(chat, "end", place);
    const Json& modes = chat.need("modes", place);
    const std::size_t count = modes.object(place + ".modes").size();
    if (count < 1 || count > kMaxModes) {
        refuse("is not an object of 1 to 20 modes", place + ".modes");
    }
    for (const auto& [name, mode] : modes.object(place + ".modes")) {
        if (!is_mode_name(name)) {
            refuse("is not a name", place + ".modes");
        }
        const std::string at = place + ".modes." + name;
        check_keys(mode, at, {"ask", "open"}, {"sampling"});
        need_text(mode, "ask", at);
        need_text(mode, "open", at);
        check_sampling(mode, at);
    }
    if (const Json* tools = chat.find("tools", place); tools != nullptr) {
        const std::string at = place + ".tools";
        check_keys(*tools, at, {"system", "call", "output", "mode"});
        for (const char* key : {"system", "call", "output"}) {
            need_place(*tools, key, at);
        }
        if (modes.find(need_text(*tools, "mode", at), place + ".modes") == nullptr) {
            refuse("is no mode", at + ".mode");
        }
    }
    check_sampling(chat, place);
}

}  // namespace goslet
