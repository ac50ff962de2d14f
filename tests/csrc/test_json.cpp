#include "json.h"

#include <clocale>
#include <cstdint>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "check.h"

using goslet::Json;
using goslet::JsonError;
using namespace std::literals;

namespace {

bool is_refused(std::string_view text) {
    try {
        Json::parse(text);
    } catch (const JsonError&) {
        return true;
    }
    return false;
}

template <typename Read>
std::string message_of(const Read& read) {
    try {
        read();
    } catch (const JsonError& error) {
        return error.what();
    }
    return "nothing thrown";
}

std::string repeated(const std::string& text, std::size_t times) {
    std::string out;
    for (std::size_t i = 0; i < times; ++i) {
        out += text;
    }
    return out;
}

void check_text(std::string_view json, std::string_view expected) {
    if (Json::parse(json).text("here") != expected) {
        check::fail(__FILE__, __LINE__, "misread: " + std::string(json));
    }
}

}  // namespace

TEST(values_are_read) {
    const Json value = Json::parse(
        " {\"a\" : [1, -2.5e1, true, false, null, \"x\"],\t\"b\":{}\r\n, \"\": [ ], \"c\": 0, \"d\": -0, \"e\": 1E+2}\n"sv);
    const std::vector<Json>& items = value.need("a", "top").array("a");
    CHECK(items.size() == 6);
    CHECK(items[0].kind() == Json::Kind::kInteger && items[0].integer("0") == 1 && items[0].number("0") == 1.0);
    CHECK(items[1].kind() == Json::Kind::kNumber && items[1].number("1") == -25.0);
    CHECK(items[2].boolean("2") && !items[3].boolean("3"));
    CHECK(items[4].is_null() && !items[0].is_null());
    CHECK(items[5].text("5") == "x");
    CHECK(value.need("b", "top").object("b").empty() && value.need("", "top").array("").empty());
    CHECK(value.need("c", "top").integer("c") == 0 && value.need("d", "top").integer("d") == 0);
    CHECK(value.need("e", "top").kind() == Json::Kind::kNumber && value.need("e", "top").number("e") == 100.0);
    CHECK(value.object("top")[1].first == "b" && value.object("top")[3].first == "c");
    CHECK(value.find("f", "top") == nullptr);
}

TEST(numbers_keep_their_value) {
    CHECK(Json::parse("9223372036854775807").integer("n") == INT64_MAX);
    CHECK(Json::parse("-9223372036854775808").integer("n") == INT64_MIN);
    for (const std::string_view text : {"9223372036854775808"sv, "-9223372036854775809"sv, "18446744073709551616"sv,
                                        "99999999999999999999999999999999999999"sv}) {
        CHECK(Json::parse(text).kind() == Json::Kind::kNumber);
    }
    CHECK(Json::parse("9223372036854775808").number("n") == 9223372036854775808.0);
    CHECK(Json::parse("0.1").number("n") == 0.1);
    CHECK(Json::parse("6.4e-4").number("n") == 6.4e-4);
    CHECK(Json::parse("-1e+38").number("n") == -1e38);
    CHECK(Json::parse("1.7976931348623157e308").number("n") == 1.7976931348623157e308);
}

// An application may set any locale; strtod would then read 0.5 as 0.
TEST(numbers_have_points_in_every_locale) {
    bool found = false;
    for (const char* const name : {"de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "nb_NO.UTF-8", "C"}) {
        found = found || std::setlocale(LC_ALL, name) != nullptr;
        CHECK(Json::parse("0.5").number("n") == 0.5);
    }
    std::setlocale(LC_ALL, "C");
    CHECK(found);
}

TEST(texts_are_unescaped) {
    check_text(R"("\"\\\/\b\f\n\r\t")", "\"\\/\b\f\n\r\t");
    check_text(R"("\u0041\u00e9\u20AC\ud83e\udd9a")", "A\xC3\xA9\xE2\x82\xAC\xF0\x9F\xA6\x9A");
    check_text(R"("\u0000x")", "\0x"sv);
    check_text("\"\xC3\xA9\xE2\x82\xAC\xF0\x9F\xA6\x9A\x7F\"", "\xC3\xA9\xE2\x82\xAC\xF0\x9F\xA6\x9A\x7F");
    check_text("\"\xEE\x80\x80\xF4\x8F\xBF\xBF\"", "\xEE\x80\x80\xF4\x8F\xBF\xBF");
}

TEST(what_is_not_json_is_refused) {
    const std::string_view wrong[] = {
        ""sv,
        " "sv,
        "import os"sv,
        "{} {}"sv,
        "[],"sv,
        "[1,]"sv,
        "[,1]"sv,
        "[1 2]"sv,
        "[1"sv,
        "["sv,
        "]"sv,
        "{"sv,
        "}"sv,
        "{\"a\"}"sv,
        "{\"a\":}"sv,
        "{\"a\":1,}"sv,
        "{,}"sv,
        "{a:1}"sv,
        "{'a':1}"sv,
        "{1:1}"sv,
        "{\"a\":1 \"b\":2}"sv,
        "{\"a\" 1}"sv,
        "{\"a\":1"sv,
        "[}"sv,
        "{]"sv,
        "// x\n1"sv,
        "1 /* x */"sv,
        "tru"sv,
        "truex"sv,
        "True"sv,
        "TRUE"sv,
        "nul"sv,
        "none"sv,
        "NaN"sv,
        "Infinity"sv,
        "-Infinity"sv,
        "nan"sv,
        "+1"sv,
        "01"sv,
        "-01"sv,
        "-"sv,
        ".5"sv,
        "1."sv,
        "1.e5"sv,
        "1e"sv,
        "1e+"sv,
        "0x10"sv,
        "1_000"sv,
        "--1"sv,
        "1e999"sv,
        "-1e999"sv,
        "0b1"sv,
        "1f"sv,
        "\xD9\xA1"sv,
        "\""sv,
        "\"a"sv,
        "\"\\\""sv,
        "\"\\x41\""sv,
        "\"\\u12\""sv,
        "\"\\u12g4\""sv,
        "\"\\U00000041\""sv,
        "\"\\"sv,
        "\"a\nb\""sv,
        "\"a\tb\""sv,
        "\"\0\""sv,
        "\0"sv,
        "1\0"sv,
        "'a'"sv,
        "\"\\ud800\""sv,
        "\"\\udc00\""sv,
        "\"\\ud800x\""sv,
        "\"\\ud800\\n\""sv,
        "\"\\ud800\\ud800\""sv,
        "\"\\udc00\\ud800\""sv,
        "\"\\ud800\\u0041\""sv,
        "\"\x80\""sv,
        "\"\xC3\""sv,
        "\"\xC3(\""sv,
        "\"\xE2\x82\""sv,
        "\"\xF0\x9F\xA6\""sv,  // cut short
        "\"\xC0\x80\""sv,
        "\"\xC1\xBF\""sv,
        "\"\xE0\x9F\xBF\""sv,
        "\"\xF0\x8F\xBF\xBF\""sv,  // not the shortest form
        "\"\xED\xA0\x80\""sv,
        "\"\xED\xBF\xBF\""sv,  // surrogates
        "\"\xF4\x90\x80\x80\""sv,
        "\"\xF5\x80\x80\x80\""sv,
        "\"\xFF\""sv,  // past U+10FFFF
        "\xEF\xBB\xBF{}"sv,
        "\xFF\xFE{\0}\0"sv,
        "\xC2\xA0{}"sv,
        "\v1"sv,
        "\f1"sv,
    };
    for (const std::string_view text : wrong) {
        if (!is_refused(text)) {
            check::fail(__FILE__, __LINE__, "accepted: " + std::string(text));
        }
    }
}

TEST(keys_are_different) {
    CHECK(is_refused(R"({"a":1,"a":1})"));
    CHECK(is_refused(R"({"x":{"a":1,"b":2,"a":3}})"));
    CHECK(is_refused(R"({"a":1,"\u0061":2})"));
    CHECK(is_refused(R"({"":1,"":2})"));
    CHECK(!is_refused(R"({"a":{"a":1},"A":1,"a ":1})"));
}

TEST(limits_hold_exactly) {
    const std::size_t depth = Json::kMaxDepth;
    CHECK(!is_refused(repeated("[", depth) + repeated("]", depth)));
    CHECK(is_refused(repeated("[", depth) + "1" + repeated("]", depth)));
    CHECK(is_refused(repeated("{\"a\":", depth) + "1" + repeated("}", depth)));
    CHECK(is_refused(repeated("[", 1000000)));
    CHECK(!is_refused("[" + repeated("1,", Json::kMaxValues - 1) + "1]"));
    CHECK(is_refused("[" + repeated("1,", Json::kMaxValues) + "1]"));
    CHECK(!is_refused("0." + std::string(38, '9')));
    CHECK(is_refused("0." + std::string(39, '9')));
    CHECK(is_refused(std::string(5000, '9')));
}

TEST(values_of_another_kind_are_refused_by_name) {
    const Json value = Json::parse(R"({"n":1,"x":1.0,"big":9223372036854775808,"t":"1","b":true,"z":null,"a":[]})");
    const auto at = [&](const char* key) -> const Json& { return value.need(key, "top"); };
    CHECK(message_of([&] { at("x").integer("the size"); }) == "the size: is not a whole number but a number");
    CHECK(message_of([&] { at("big").integer("n"); }) != "nothing thrown");
    CHECK(message_of([&] { at("b").integer("n"); }) != "nothing thrown");
    CHECK(message_of([&] { at("t").integer("n"); }) != "nothing thrown");
    CHECK(message_of([&] { at("z").number("n"); }) != "nothing thrown");
    CHECK(message_of([&] { at("b").number("n"); }) != "nothing thrown");
    CHECK(message_of([&] { at("n").boolean("n"); }) != "nothing thrown");
    CHECK(message_of([&] { at("n").text("n"); }) != "nothing thrown");
    CHECK(message_of([&] { value.array("n"); }) != "nothing thrown");
    CHECK(message_of([&] { at("a").object("n"); }) != "nothing thrown");
    CHECK(message_of([&] { at("a").find("k", "the list"); }) == "the list: is not an object but a list");
    CHECK(message_of([&] { value.need("missing", "top"); }) == "top: the key missing is missing");
    CHECK(message_of([&] { Json::parse("[1,x]"); }) == "is not JSON at byte 3: expected a value");
}

// Nothing but a value or JsonError comes of any bytes; sanitizers see the rest.
TEST(random_bytes_are_read_or_refused) {
    std::mt19937 random(1);
    const std::string alphabet = "{}[]:,\"\\u0123456789abcdefDC.-+eE tfnrul\xC3\xA9\xED\xF0\x9F\n";
    const std::string good = R"({"a":[1,-2.5e1,true,null,"\u00e9\ud83e\udd9a"],"b":{"c":"d"}})";
    int n_read = 0;
    for (int round = 0; round < 20000; ++round) {
        std::string text;
        if (round % 2 == 0) {
            for (std::size_t length = random() % 24; length > 0; --length) {
                text += alphabet[random() % alphabet.size()];
            }
        } else {
            text = good.substr(0, good.size() - random() % 3);
            for (int changes = static_cast<int>(random() % 3); changes > 0; --changes) {
                text[random() % text.size()] = static_cast<char>(random());
            }
        }
        n_read += is_refused(text) ? 0 : 1;
    }
    CHECK(n_read > 1000 && n_read < 19000);
}

TEST(every_beginning_of_a_text_is_refused) {
    const std::string good = R"({"a":[1,true,null,"\u00e9\ud83e\udd9a"],"b":{"c":"é"}})";
    CHECK(!is_refused(good));
    for (std::size_t length = 0; length < good.size(); ++length) {
        CHECK(is_refused(good.substr(0, length)));
    }
}
