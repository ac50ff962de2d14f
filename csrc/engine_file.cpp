#include "engine_file.h"

#include <algorithm>
#include <limits>
#include <set>
#include <utility>

#include "chat_template.h"
#include "state_file.h"

namespace goslet {
namespace {

using Kind = ContainerError::Kind;

constexpr ContainerKind kEngineFile{"\x89GOSL\r\n\x1a", 6, "engine file", {"chat-2026", "int3", "residuals"}};
constexpr std::uint64_t kTensorAlignmentBytes = 64;
constexpr std::size_t kMaxAxes = 8;
constexpr std::size_t kMaxNameCharacters = 200;
constexpr std::size_t kModelIdCharacters = 64;
constexpr std::uint64_t kScaleBytes = 2;
// No section is longer, so no tensor has more numbers or bytes; products of two numbers below it are checked.
constexpr std::uint64_t kMaxBytes = std::uint64_t{1} << 48;
// As in runtime/spec.py.
constexpr std::int64_t kMaxVocabSize = 1 << 24;
constexpr std::int64_t kMaxDimension = 1 << 20;
constexpr std::int64_t kMaxLayers = 1 << 10;
constexpr std::int64_t kMaxOpset = 1 << 20;
constexpr std::string_view kKeptInputs = ".kept_inputs";

[[noreturn]] void refuse(const std::string& problem, const std::string& place = "", const std::string& expected = "",
                         const std::string& found = "") {
    throw ContainerError(Kind::kDamaged, problem, place, expected, found);
}

bool is_name(std::string_view name) {
    const auto fits = [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
    };
    return !name.empty() && name.size() <= kMaxNameCharacters && fits(name.front()) &&
           std::all_of(name.begin(), name.end(), [&](char c) { return fits(c) || c == '.' || c == '-'; });
}

std::int64_t need_in(const Json& object, const std::string& key, std::int64_t low, std::int64_t high,
                     const std::string& place) {
    const std::string at = place + "." + key;
    const std::int64_t value = object.need(key, place).integer(at);
    if (value < low || value > high) {
        refuse("is out of range", at, std::to_string(low) + " to " + std::to_string(high), std::to_string(value));
    }
    return value;
}

void need_positive(const Json& object, const std::string& key, const std::string& place) {
    if (!(object.need(key, place).number(place + "." + key) > 0)) {
        refuse("is not a positive number", place + "." + key);
    }
}

// The vocabulary's size. The whole of `model` is checked, as in Python, though no more of it is needed: the rest is in
// the program.
std::size_t read_model(const Json& model) {
    const std::string place = "model";
    const std::int64_t n_embd = need_in(model, "n_embd", 1, kMaxDimension, place);
    const std::int64_t head_size = need_in(model, "head_size", 1, n_embd, place);
    if (n_embd % head_size != 0) {
        refuse("does not divide n_embd", place + ".head_size", std::to_string(n_embd), std::to_string(head_size));
    }
    model.need("version", place).text(place + ".version");
    need_in(model, "n_layer", 1, kMaxLayers, place);
    need_in(model, "n_ffn", 1, kMaxDimension, place);
    need_positive(model, "norm_eps", place);
    need_positive(model, "layer_norm_eps", place);
    const Json& ranks = model.need("ranks", place);
    for (const auto& [letter, rank] : ranks.object(place + ".ranks")) {
        const std::int64_t value = rank.integer(place + ".ranks");
        if (value < 1 || value > kMaxDimension) {
            refuse("is out of range", place + ".ranks", "", std::to_string(value));
        }
    }
    const std::int64_t vocab_size = need_in(model, "vocab_size", 2, kMaxVocabSize, place);
    return static_cast<std::size_t>(vocab_size);
}

void check_graph_info(const Json& graph) {
    if (graph.need("format", "graph").text("graph.format") != "onnx") {
        refuse("is not a known format", "graph.format", "onnx");
    }
    need_in(graph, "opset", 1, kMaxOpset, "graph");
}

// A product of sizes, none above kMaxBytes by much.
std::uint64_t times(std::uint64_t a, std::uint64_t b, const std::string& place) {
    if (b != 0 && a > kMaxBytes / b) {
        refuse("is absurdly large", place);
    }
    return a * b;
}

std::uint64_t up_to(std::uint64_t size, std::uint64_t multiple) {
    return (size + multiple - 1) / multiple * multiple;
}

Format read_format(const Json& item, const std::string& place) {
    const std::string& name = item.need("format", place).text(place + ", format");
    const std::optional<Format> format = format_named(name);
    if (!format.has_value()) {
        refuse("is not a weight format", place, "f32, f16, bf16, int8, int4, int3, u16", shown(name));
    }
    return *format;
}

TensorLayout read_layout(const Json& item, const std::string& place) {
    const std::string& name = item.need("layout", place).text(place + ", layout");
    const std::optional<TensorLayout> layout = layout_named(name);
    if (!layout.has_value()) {
        refuse("is not a layout", place, "rows, tiles, columns", shown(name));
    }
    return *layout;
}

// 0 for the floating formats, which must have null.
std::size_t read_group(const Json& item, Format format, const std::string& place) {
    const Json& group = item.need("group", place);
    if (!is_integer(format)) {
        if (!group.is_null()) {
            refuse("has no groups", place + ", group");
        }
        return 0;
    }
    const std::int64_t size = group.integer(place + ", group");
    if (size != 32 && size != 64 && size != 128) {
        refuse("has no such group", place, "32, 64 or 128", std::to_string(size));
    }
    return static_cast<std::size_t>(size);
}

std::vector<std::size_t> read_shape(const Json& item, const std::string& place) {
    const std::vector<Json>& sizes = item.need("shape", place).array(place + ", shape");
    if (sizes.empty() || sizes.size() > kMaxAxes) {
        refuse("is not a shape", place, "1 to 8 axes", std::to_string(sizes.size()));
    }
    std::vector<std::size_t> shape;
    for (const Json& item_size : sizes) {
        const std::int64_t size = item_size.integer(place + ", shape");
        if (size < 1 || static_cast<std::uint64_t>(size) > kMaxBytes ||
            static_cast<std::uint64_t>(size) > std::numeric_limits<std::size_t>::max()) {
            refuse("is not a shape", place, "", std::to_string(size));
        }
        shape.push_back(static_cast<std::size_t>(size));
    }
    return shape;
}

struct Sizes {
    std::uint64_t data;
    std::uint64_t scales;
};

Sizes stored_sizes(const TensorView& tensor, const std::string& place) {
    const std::uint64_t n_in = tensor.shape.back();
    std::uint64_t n_out = 1;
    for (std::size_t axis = 0; axis + 1 < tensor.shape.size(); ++axis) {
        n_out = times(n_out, tensor.shape[axis], place);
    }
    std::uint64_t row_bytes = (n_in * format_bits(tensor.format) + 7) / 8;
    if (tensor.layout != TensorLayout::kRows) {
        n_out = up_to(n_out, stored_together(tensor.format, tensor.layout == TensorLayout::kTiles ? Layout::kTiles
                                                                                                  : Layout::kColumns));
        row_bytes = up_to(n_in, kColumnPadding) * format_bits(tensor.format) / 8;
    }
    const std::uint64_t groups = tensor.group == 0 ? 0 : (n_in + tensor.group - 1) / tensor.group;
    return {times(n_out, row_bytes, place), times(n_out, groups * kScaleBytes, place)};
}

void check_number(const Json& item, const char* key, std::uint64_t expected, const std::string& place) {
    const std::int64_t found = item.need(key, place).integer(place + ", " + key);
    if (found < 0 || static_cast<std::uint64_t>(found) != expected) {
        refuse("is not what format, layout, shape and the tensor before it imply", place + ", " + key,
               std::to_string(expected), std::to_string(found));
    }
}

// The tensors in order, found to tile the section.
std::vector<TensorView> read_tensors(const std::vector<Json>& items, std::string_view weights) {
    const auto* const start = reinterpret_cast<const std::uint8_t*>(weights.data());
    std::vector<TensorView> tensors;
    std::set<std::string_view> names;
    std::uint64_t end = 0;
    for (std::size_t index = 0; index < items.size(); ++index) {
        const Json& item = items[index];
        std::string place = "tensors[" + std::to_string(index) + "]";
        const std::string& name = item.need("name", place).text(place + ".name");
        if (!is_name(name)) {
            refuse("is not a name", place + ".name", "", shown(name));
        }
        place = "tensor " + name;
        if (!names.insert(name).second) {
            refuse("appears twice", place);
        }
        TensorView tensor{};
        tensor.name = name;
        tensor.format = read_format(item, place);
        tensor.layout = read_layout(item, place);
        tensor.group = read_group(item, tensor.format, place);
        tensor.shape = read_shape(item, place);
        if ((is_integer(tensor.format) || tensor.layout != TensorLayout::kRows) && tensor.shape.size() != 2) {
            refuse("is not a matrix", place, "2 axes", std::to_string(tensor.shape.size()));
        }
        const bool is_places = tensor.format == Format::kU16;
        if (is_places && tensor.layout != TensorLayout::kRows) {
            refuse("cannot be laid out so", place, "rows");
        }
        const bool names_places =
            name.size() >= kKeptInputs.size() && name.substr(name.size() - kKeptInputs.size()) == kKeptInputs;
        if (is_places != names_places) {
            refuse("is stored as places and is none, or the other way round", place);
        }
        const Sizes sizes = stored_sizes(tensor, place);
        const std::uint64_t offset = up_to(end, kTensorAlignmentBytes);
        std::uint64_t scales_offset = 0;
        end = offset + sizes.data;
        check_number(item, "offset", offset, place);
        check_number(item, "size_bytes", sizes.data, place);
        check_number(item, "scales_size_bytes", sizes.scales, place);
        if (is_integer(tensor.format)) {
            scales_offset = up_to(end, kTensorAlignmentBytes);
            check_number(item, "scales_offset", scales_offset, place);
            end = scales_offset + sizes.scales;
        } else if (!item.need("scales_offset", place).is_null()) {
            refuse("has no scales", place + ", scales_offset");
        }
        if (end > weights.size()) {
            refuse("the section ends before it does", place, "at most " + std::to_string(weights.size()) + " bytes",
                   std::to_string(end) + " bytes");
        }
        tensor.data = start + offset;
        tensor.data_bytes = static_cast<std::size_t>(sizes.data);
        tensor.scales = is_integer(tensor.format) ? start + scales_offset : nullptr;
        tensor.scales_bytes = static_cast<std::size_t>(sizes.scales);
        tensors.push_back(std::move(tensor));
    }
    if (end != weights.size()) {
        refuse("does not end with its last tensor", "section weights", std::to_string(end) + " bytes",
               std::to_string(weights.size()) + " bytes");
    }
    return tensors;
}

}  // namespace

EngineFile::EngineFile(const std::string& path) : container_(path, kEngineFile) {
    try {
        read_header();
    } catch (const JsonError& error) {
        refuse(error.what());
    }
}

void EngineFile::read_header() {
    if (container_.version() < kEngineFile.version) {
        throw ContainerError(Kind::kUnsupported, "is an engine of an older goslet; export it again", "format version",
                             std::to_string(kEngineFile.version), std::to_string(container_.version()));
    }
    const Json& header = container_.header();
    vocab_size_ = read_model(header.need("model", "header"));
    state_spec_ = StateSpec::from_json(header.need("state", "header"), "state");
    model_id_ = header.need("model_id", "header").text("model_id");
    if (model_id_.size() != kModelIdCharacters ||
        model_id_.find_first_not_of("0123456789abcdef") != std::string::npos) {
        refuse("is not a model id", "model_id", "64 hex digits");
    }
    header.need("provenance", "header").object("provenance");
    if (const Json& chat = header.need("chat", "header"); !chat.is_null()) {
        check_chat_template(chat);
    }
    check_graph_info(header.need("graph", "header"));
    const Json& tokenizer = header.need("tokenizer", "header");
    if (!tokenizer.is_null()) {
        tokenizer_kind_ = tokenizer.need("kind", "tokenizer").text("tokenizer.kind");
        if (!is_name(tokenizer_kind_)) {
            refuse("is not a name", "tokenizer.kind");
        }
    }
    if (tokenizer.is_null() != (container_.find("tokenizer") == nullptr)) {
        refuse("header and sections disagree about a tokenizer", "tokenizer");
    }
    container_.section("graph");
    for (const SectionEntry& entry : container_.sections()) {
        const bool at_open =
            entry.name == "graph" || entry.name == "program" || entry.name == "tokenizer" || entry.name == "state";
        if (entry.verified_at_open != at_open) {
            refuse("is verified at the wrong time", "section " + entry.name, at_open ? "open" : "check");
        }
    }
    tensors_ = read_tensors(header.need("tensors", "header").array("tensors"), container_.section("weights"));
}

std::unique_ptr<StateBuffer> EngineFile::fresh_state() const {
    auto state = std::make_unique<StateBuffer>(buffer_layout(state_spec_));
    if (container_.find("state") != nullptr) {
        fill_state(state_spec_, container_.section("state"), *state);
    }
    return state;
}

EngineParts EngineFile::parts() const {
    if (container_.find("program") == nullptr) {
        throw ContainerError(Kind::kUnsupported, "the engine has no program for the native engine; export it again",
                             "section program");
    }
    EngineParts parts{container_.section("program"), tensors_, {}, vocab_size_};
    for (const StateTensorSpec& tensor : state_spec_.tensors) {
        parts.state.push_back({tensor.name, {tensor.shape, static_cast<float>(tensor.init)}});
    }
    return parts;
}

}  // namespace goslet
