#include "engine_file.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "check.h"
#include "container.h"
#include "output_file.h"
#include "sha256.h"
#include "state_file.h"

using goslet::Container;
using goslet::ContainerError;
using goslet::ContainerKind;
using goslet::EngineFile;
using goslet::EngineParts;
using goslet::StateBuffer;
using goslet::StateSpec;
using goslet::TensorLayout;
using Kind = ContainerError::Kind;
using namespace std::literals;

namespace {

constexpr std::size_t kPage = 4096;
const std::string kModelId(64, 'a');

// A folder of the test's own, gone when the test ends.
class Folder {
  public:
    Folder() {
        std::string pattern = (std::filesystem::temp_directory_path() / "goslet_test.XXXXXX").string();
        if (mkdtemp(pattern.data()) == nullptr) {
            throw std::runtime_error("no folder for the test");
        }
        path_ = pattern;
    }
    ~Folder() { std::filesystem::remove_all(path_); }
    std::string operator/(const std::string& name) const { return path_ + "/" + name; }
    std::size_t n_files() const {
        return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(path_), {}));
    }

  private:
    std::string path_;
};

void write(const std::string& path, std::string_view bytes) {
    std::ofstream(path, std::ios::binary) << bytes;
}

std::string read(const std::string& path) {
    std::ostringstream out;
    out << std::ifstream(path, std::ios::binary).rdbuf();
    return out.str();
}

std::string little_endian(std::uint64_t value, int n_bytes) {
    std::string bytes;
    for (int i = 0; i < n_bytes; ++i) {
        bytes += static_cast<char>(value >> (8 * i));
    }
    return bytes;
}

std::string padded(std::string bytes) {
    bytes.resize((bytes.size() + kPage - 1) / kPage * kPage);
    return bytes;
}

struct Section {
    std::string name;
    std::string content;
    const char* verify = "open";
};

constexpr std::uint32_t kVersion = 6;

// A container put together by hand, so that the writer's mistakes are not made twice. Its header fits in a page.
std::string container_bytes(std::string_view magic, std::uint32_t version, const std::string& members,
                            const std::vector<Section>& sections, const std::string& features = "") {
    std::string list;
    std::string content;
    for (const Section& section : sections) {
        content = padded(content);
        list += (list.empty() ? "" : ",") + R"({"name":")"s + section.name + R"(","offset":)" +
                std::to_string(kPage + content.size()) + R"(,"size_bytes":)" + std::to_string(section.content.size()) +
                R"(,"sha256":")" + goslet::hex(goslet::sha256(section.content)) + R"(","verify":")" + section.verify +
                R"("})";
        content += section.content;
    }
    const std::string json = "{\"required_features\":[" + features + "]," + members + ",\"sections\":[" + list + "]}";
    std::string head =
        std::string(magic) + little_endian(version, 4) + little_endian(0, 4) + little_endian(json.size(), 8) + json;
    const goslet::Sha256Digest digest = goslet::sha256(head);
    head.append(digest.begin(), digest.end());
    CHECK(head.size() <= kPage);
    return padded(head) + content;
}

struct StoredTensor {
    const char* format;
    const char* layout;
    std::size_t group;
    std::string shape;
    std::size_t data_bytes;
    std::size_t scales_bytes;
};

// An engine of one tensor.
std::string engine_bytes(const StoredTensor& tensor) {
    const bool has_scales = tensor.group != 0;
    const std::size_t scales_offset = (tensor.data_bytes + 63) / 64 * 64;
    std::string weights(has_scales ? scales_offset + tensor.scales_bytes : tensor.data_bytes, '\1');
    if (has_scales) {
        weights[scales_offset] = '\2';
    }
    const std::string members =
        R"("model":{"version":"7","n_layer":1,"n_embd":64,"n_ffn":256,"head_size":16,"vocab_size":256,"norm_eps":6.4e-4,)"
        R"("layer_norm_eps":1e-05,"ranks":{"w":8}},"state":{"layout_version":1,"dtype":"float32","tensors":[)"
        R"({"name":"0.wkv","shape":[4,16,16],"axes":"head,value,key","init":0.0}]},"model_id":")" +
        kModelId +
        R"(","provenance":{},"tokenizer":null,"chat":null,"graph":{"opset":21,"format":"onnx"},"tensors":[{"name":"w",)" +
        R"("format":")" + tensor.format + R"(","group":)" + (has_scales ? std::to_string(tensor.group) : "null") +
        R"(,"layout":")" + tensor.layout + R"(","shape":)" + tensor.shape + R"(,"offset":0,"size_bytes":)" +
        std::to_string(tensor.data_bytes) + R"(,"scales_offset":)" +
        (has_scales ? std::to_string(scales_offset) : "null") + R"(,"scales_size_bytes":)" +
        std::to_string(tensor.scales_bytes) + "}]";
    return container_bytes("\x89GOSL\r\n\x1a", kVersion, members,
                           {{"graph", "g"}, {"program", "[]"}, {"weights", weights, "check"}});
}

// The kind of error that reading gives; empty for none.
template <typename Read>
std::string error_of(const Read& read) {
    try {
        read();
    } catch (const ContainerError& error) {
        switch (error.kind) {
            case Kind::kUnreadable:
                return "unreadable";
            case Kind::kDamaged:
                return "damaged";
            case Kind::kUnsupported:
                return "unsupported";
            case Kind::kMismatch:
                return "mismatch";
            case Kind::kUnwritable:
                return "unwritable";
            case Kind::kNotFinite:
                return "not finite";
        }
    }
    return "";
}

std::string engine_error(const Folder& folder, const std::string& bytes) {
    write(folder / "m.goslet", bytes);
    return error_of([&] { EngineFile(folder / "m.goslet"); });
}

goslet::Format format_named(std::string_view name) {
    return name == "f32"    ? goslet::Format::kF32
           : name == "f16"  ? goslet::Format::kF16
           : name == "bf16" ? goslet::Format::kBf16
           : name == "int8" ? goslet::Format::kInt8
           : name == "int4" ? goslet::Format::kInt4
                            : goslet::Format::kInt3;
}

// Names that need escapes, and a tensor so long a name that the header takes two pages.
StateSpec awkward_spec() {
    return {1,
            {{"0.\"\\\n\x01\xC3\xA9", {3, 5}, "a,b", -1e38},
             {"1." + std::string(5000, 'x'), {7}, "", 0.1},
             {"2", {1, 2, 3, 4}, "c", 0}}};
}

void fill(const StateSpec& spec, StateBuffer& state, float start, std::int64_t count) {
    for (std::size_t index = 0; index < spec.tensors.size(); ++index) {
        for (std::size_t i = 0; i < spec.tensors[index].n_elements(); ++i) {
            state.tensor(index)[i] = start += 0.25F;
        }
    }
    std::memcpy(state.tensor(spec.tensors.size()), &count, sizeof count);
}

bool same(const StateBuffer& a, const StateBuffer& b) {
    return a.size_bytes() == b.size_bytes() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

}  // namespace

// FIPS 180-4's examples, and lengths around the end of a block.
TEST(sha256_is_the_standards) {
    const auto hash = [](const std::string& text) { return goslet::hex(goslet::sha256(text)); };
    CHECK(hash("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    CHECK(hash("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    CHECK(hash("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
          "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    CHECK(hash(std::string(1000000, 'a')) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    CHECK(hash(std::string(55, 'a')) == "9f4390f8d30c2dd92ec9f095b65e2b9ae9b0a925a5258e241c9f1e910f734318");
    CHECK(hash(std::string(56, 'a')) == "b35439a4ac6f0948b6d6f9e3c6af0f5f590ce20f1bde7090ef7970686ec6738a");
    CHECK(hash(std::string(63, 'a')) == "7d3e74a05d7db15bce4ad9ec0658ea98e3f06eeecf16b4c6fff2da457ddc2f34");
    CHECK(hash(std::string(64, 'a')) == "ffe054fe7ae0cb6dc65c3af9b61d5209f439851db43d0ba5997337df154668eb");
}

// The sizes are those of the kernels' own matrices, so that the reader and the kernels cannot disagree.
TEST(tensors_are_found_in_every_layout) {
    const Folder folder;
    for (const char* const format : {"f32", "f16", "bf16", "int8", "int4", "int3"}) {
        for (const char* const layout : {"tiles", "columns"}) {
            for (const std::size_t n_out : {1, 8, 65}) {
                for (const std::size_t n_in : {1, 31, 32, 67, 130}) {
                    const bool tiles = layout == "tiles"sv;
                    const bool is_integer = goslet::is_integer(format_named(format));
                    const goslet::Matrix matrix{format_named(format),
                                                tiles ? goslet::Layout::kTiles : goslet::Layout::kColumns,
                                                is_integer ? 64U : 0U,
                                                n_out,
                                                n_in,
                                                nullptr,
                                                nullptr};
                    const StoredTensor stored{format,
                                              layout,
                                              matrix.group,
                                              "[" + std::to_string(n_out) + "," + std::to_string(n_in) + "]",
                                              matrix.data_bytes(),
                                              matrix.scales_bytes()};
                    write(folder / "m.goslet", engine_bytes(stored));
                    const EngineFile file(folder / "m.goslet");
                    const EngineParts parts = file.parts();
                    const goslet::TensorView& tensor = parts.tensors.at(0);
                    CHECK(tensor.name == "w" && tensor.format == matrix.format && tensor.group == matrix.group);
                    CHECK(tensor.layout == (tiles ? TensorLayout::kTiles : TensorLayout::kColumns));
                    CHECK((tensor.shape == std::vector<std::size_t>{n_out, n_in}));
                    CHECK(tensor.data_bytes == matrix.data_bytes() && tensor.scales_bytes == matrix.scales_bytes());
                    CHECK(tensor.data[0] == 1 && tensor.data[tensor.data_bytes - 1] == 1);
                    CHECK((tensor.scales == nullptr) == !is_integer);
                    CHECK(tensor.scales == nullptr || (tensor.scales[0] == 2 && tensor.scales[-1] == 1));
                    StoredTensor wrong = stored;
                    wrong.data_bytes += 64;
                    CHECK(engine_error(folder, engine_bytes(wrong)) == "damaged");
                }
            }
        }
    }
}

TEST(tensors_are_found_in_rows) {
    const Folder folder;
    const StoredTensor good[] = {{"f32", "rows", 0, "[2,3,5]", 120, 0},
                                 {"f16", "rows", 0, "[7]", 14, 0},
                                 {"int8", "rows", 128, "[3,130]", 390, 12},
                                 {"int4", "rows", 32, "[5,67]", 170, 30},
                                 {"int3", "rows", 32, "[5,67]", 130, 30}};
    for (const StoredTensor& stored : good) {
        CHECK(engine_error(folder, engine_bytes(stored)) == "");
    }
    const StoredTensor wrong[] = {{"f32", "rows", 0, "[2,3,5]", 121, 0},
                                  {"f32", "tiles", 0, "[64]", 256, 0},
                                  {"int4", "rows", 32, "[64]", 32, 4},
                                  {"int4", "rows", 33, "[5,67]", 170, 30},
                                  {"f32", "rows", 32, "[64]", 256, 0},
                                  {"f32", "rows", 0, "[]", 4, 0},
                                  {"f32", "rows", 0, "[1,1,1,1,1,1,1,1,1]", 4, 0},
                                  {"f32", "rows", 0, "[4294967296,4294967296]", 0, 0},
                                  {"f32", "tiles", 0, "[4611686018427387904,4611686018427387904]", 0, 0},
                                  {"f32", "rows", 0, "[9223372036854775807]", 4, 0},
                                  {"int2", "rows", 32, "[5,67]", 85, 30},
                                  {"f32", "diagonal", 0, "[1]", 4, 0}};
    for (const StoredTensor& stored : wrong) {
        CHECK(engine_error(folder, engine_bytes(stored)) == "damaged");
    }
}

TEST(an_engine_says_what_it_is) {
    const Folder folder;
    write(folder / "m.goslet", engine_bytes({"f32", "rows", 0, "[7]", 28, 0}));
    const EngineFile file(folder / "m.goslet");
    CHECK(file.model_id() == kModelId && file.vocab_size() == 256 && file.tokenizer_kind().empty());
    const EngineParts parts = file.parts();
    CHECK(parts.program == "[]" && parts.vocab_size == 256);
    CHECK(parts.state.size() == 1 && parts.state[0].name == "0.wkv" && parts.state[0].layout.init == 0);
    CHECK((parts.state[0].layout.shape == std::vector<std::size_t>{4, 16, 16}));
    CHECK(error_of([&] { file.tokenizer(); }) == "damaged");
}

TEST(every_flipped_bit_of_the_frame_is_noticed) {
    const Folder folder;
    const std::string good = engine_bytes({"int4", "tiles", 32, "[5,67]", 384, 48});
    CHECK(engine_error(folder, good) == "");
    // Prefix, JSON, digest and padding; then graph and program, which are verified at open.
    for (std::size_t offset = 0; offset < 3 * kPage + 2; offset += offset < 64 ? 1 : 37) {
        std::string bad = good;
        bad[offset] = static_cast<char>(bad[offset] ^ (1 << offset % 8));
        CHECK(engine_error(folder, bad) != "");
    }
    std::string weights = good;
    weights[3 * kPage] = 'x';
    CHECK(engine_error(folder, weights) == "");
}

TEST(every_cut_is_noticed) {
    const Folder folder;
    const std::string good = engine_bytes({"f32", "rows", 0, "[7]", 28, 0});
    for (std::size_t size = 0; size < good.size(); size += size < 40 ? 1 : 61) {
        CHECK(engine_error(folder, good.substr(0, size)) == "damaged");
    }
    CHECK(engine_error(folder, good + '\0') == "damaged");
}

TEST(versions_and_features_are_told_from_damage) {
    const Folder folder;
    const std::vector<Section> none;
    CHECK(engine_error(folder, container_bytes("\x89GOSL\r\n\x1a", kVersion - 1, "\"x\":0", none)) == "unsupported");
    CHECK(engine_error(folder, container_bytes("\x89GOSL\r\n\x1a", kVersion + 1, "\"x\":0", none)) == "unsupported");
    CHECK(engine_error(folder, container_bytes("\x89GOSL\r\n\x1a", kVersion, "\"x\":0", none)) == "damaged");
    CHECK(engine_error(folder, container_bytes("GOSLETST", kVersion, "\"x\":0", none)) == "damaged");
    const auto requiring = [&](const std::string& features) {
        return engine_error(folder, container_bytes("\x89GOSL\r\n\x1a", kVersion, "\"x\":0", none, features));
    };
    CHECK(requiring("\"int3\"") == "damaged");
    CHECK(requiring("\"int3\",\"residuals\"") == "damaged");
    CHECK(requiring("\"int3\",\"telepathy\"") == "unsupported");
    CHECK(requiring("\"\"") == "unsupported");
}

TEST(only_ordinary_files_are_opened) {
    const Folder folder;
    CHECK(error_of([&] { EngineFile(folder / "missing"); }) == "unreadable");
    CHECK(error_of([&] { EngineFile(folder / "."); }) == "unreadable");
    CHECK(error_of([&] { EngineFile("/dev/zero"); }) == "unreadable");
    CHECK(error_of([&] { EngineFile(""); }) == "unreadable");
    // Opening a pipe that nobody writes to would wait for ever.
    CHECK(mkfifo((folder / "pipe").c_str(), 0600) == 0);
    CHECK(error_of([&] { EngineFile(folder / "pipe"); }) == "unreadable");
}

TEST(texts_of_files_are_shown_safely) {
    CHECK(goslet::shown("a\x1b[2J\n\xE2\x80\xAE") == "'a\\x1b[2J\\x0a\\xe2\\x80\\xae'");
    CHECK(goslet::shown(std::string(1000, 'x')).size() < 100);
}

TEST(a_state_comes_back) {
    const Folder folder;
    const StateSpec spec = awkward_spec();
    StateBuffer state(goslet::buffer_layout(spec));
    StateBuffer loaded(goslet::buffer_layout(spec));
    CHECK(state.tensor(0)[0] == -1e38F && state.tensor(1)[6] == 0.1F && goslet::tokens_seen(state) == 0);
    fill(spec, state, -3, std::numeric_limits<std::int64_t>::max());
    goslet::save_state(folder / "s", kModelId, spec, state);
    goslet::load_state(folder / "s", kModelId, spec, loaded);
    CHECK(same(state, loaded) && goslet::tokens_seen(loaded) == std::numeric_limits<std::int64_t>::max());
    CHECK(folder.n_files() == 1);
    // Header and section of the same state are the same bytes.
    goslet::save_state(folder / "t", kModelId, spec, loaded);
    CHECK(read(folder / "s") == read(folder / "t"));
}

TEST(what_is_no_state_of_the_model_changes_nothing) {
    const Folder folder;
    const StateSpec spec = awkward_spec();
    StateBuffer state(goslet::buffer_layout(spec));
    StateBuffer before(goslet::buffer_layout(spec));
    fill(spec, state, 5, 7);
    before.copy_from(state);
    const auto load_error = [&](const StateSpec& wanted, const std::string& id) {
        const std::string error = error_of([&] { goslet::load_state(folder / "s", id, wanted, state); });
        CHECK(same(state, before));
        return error;
    };
    StateBuffer other(goslet::buffer_layout(spec));
    goslet::save_state(folder / "s", kModelId, spec, other);
    CHECK(load_error(spec, std::string(64, 'b')) == "mismatch");
    for (int change = 0; change < 5; ++change) {
        StateSpec changed = spec;
        switch (change) {
            case 0:
                changed.layout_version = 2;
                break;
            case 1:
                changed.tensors[0].shape = {5, 3};
                break;
            case 2:
                changed.tensors[1].name = "1";
                break;
            case 3:
                changed.tensors[2].axes = "d";
                break;
            default:
                changed.tensors[1].init = 0.1F;
        }
        goslet::save_state(folder / "s", kModelId, changed, other);
        CHECK(load_error(spec, kModelId) == "mismatch");
    }
    std::string bytes = read(folder / "s");
    bytes.back() = static_cast<char>(bytes.back() ^ 1);
    write(folder / "s", bytes);
    CHECK(load_error(spec, kModelId) == "damaged");
    write(folder / "s", bytes.substr(0, bytes.size() - 1));
    CHECK(load_error(spec, kModelId) == "damaged");
    // Rightly signed, but with NaN, of a wrong length or without the section.
    const ContainerKind kind{"GOSLETST", 1, "state file"};
    const std::string members = "\"model_id\":\"" + kModelId + "\",\"tokens_seen\":1,\"state\":" + spec.to_json();
    std::string values(spec.size_bytes(), '\0');
    goslet::write_container(folder / "s", kind, members, "state", values + '\0');
    CHECK(load_error(spec, kModelId) == "damaged");
    goslet::write_container(folder / "s", kind, members, "stale", values);
    CHECK(load_error(spec, kModelId) == "damaged");
    values[values.size() - 2] = '\xC0';
    values.back() = '\x7F';
    goslet::write_container(folder / "s", kind, members, "state", values);
    CHECK(load_error(spec, kModelId) == "not finite");
}

TEST(a_state_that_is_not_finite_is_not_saved) {
    const Folder folder;
    const StateSpec spec = awkward_spec();
    StateBuffer state(goslet::buffer_layout(spec));
    write(folder / "s", "precious");
    for (const float wrong : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
        state.tensor(1)[6] = wrong;
        CHECK(error_of([&] { goslet::save_state(folder / "s", kModelId, spec, state); }) == "not finite");
    }
    CHECK(read(folder / "s") == "precious" && folder.n_files() == 1);
}

TEST(files_are_replaced_whole) {
    const Folder folder;
    goslet::write_whole(folder / "a", {"one", "", "two"});
    CHECK(read(folder / "a") == "onetwo");
    CHECK(chmod((folder / "a").c_str(), 0640) == 0);
    std::filesystem::create_symlink("a", folder / "link");
    goslet::write_whole(folder / "link", {"three"});
    CHECK(read(folder / "a") == "three" && std::filesystem::is_symlink(folder / "link"));
    struct stat status{};
    CHECK(stat((folder / "a").c_str(), &status) == 0 && (status.st_mode & 0777) == 0640);
    std::filesystem::create_symlink("b", folder / "dangling");
    goslet::write_whole(folder / "dangling", {"four"});
    CHECK(read(folder / "b") == "four" && std::filesystem::is_symlink(folder / "dangling"));
    std::string long_name(250, 'n');
    long_name.replace(47, 2, "\xC3\xA9");
    goslet::write_whole(folder / long_name, {"five"});
    CHECK(read(folder / long_name) == "five");
    CHECK(folder.n_files() == 5);
}

TEST(what_cannot_be_written_leaves_nothing) {
    const Folder folder;
    write(folder / "file", "precious");
    std::filesystem::create_symlink("loop", folder / "loop");
    for (const std::string& path : {folder / "missing/a", folder / "file/a", folder / ".", folder / "a/", ""s,
                                    folder / "loop", "/dev/null"s, folder / std::string(300, 'n')}) {
        CHECK(error_of([&] { goslet::write_whole(path, {"x"}); }) == "unwritable");
    }
    CHECK(read(folder / "file") == "precious" && folder.n_files() == 2);
    // A full disk.
    if (std::filesystem::exists("/dev/full")) {
        CHECK(error_of([&] { goslet::write_whole("/dev/full", {"x"}); }) == "unwritable");
    }
}
