// goslet's operators as TensorRT plugins: the library libgoslet_trt.so.
//
// The step graph's nodes goslet::Wkv4 to Wkv7, and GosletProduct, a product with quantized weights. TensorRT finds them
// through getCreators; nothing here is linked to it. All of them are of namespace "" and version "1", because a parser
// prefers a model's own function to a plugin anywhere else (its flag kENABLE_PLUGIN_OVERRIDE turns that round).
//
// Kernels run on the given stream only, nothing is allocated while they are started, and nothing is thrown. The new
// state may lie where the old one does or apart from it; which of the two is the runtime's to say, by the addresses
// that it binds. No alias is declared: a compiler that sees one copies every layer's state.
#include <NvInferRuntime.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <string_view>

#include "goslet_cuda.h"

namespace {

using nvinfer1::AsciiChar;
using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginTensorDesc;

constexpr int kFailed = 1;
constexpr const char* kVersion = "1";
constexpr const char* kNamespace = "";
constexpr int kMaxInputs = 7;
constexpr int kMaxOutputs = 4;
constexpr std::int64_t kMaxProductRows = 8;
constexpr std::int64_t kPaddedTo = GOSLET_CUDA_PADDED_TO;

struct Call {
    const PluginTensorDesc* input_descs;
    const void* const* inputs;
    void* const* outputs;
    goslet_cuda_type type;
    std::int32_t bits;
    std::int32_t group;
    goslet_cuda_stream stream;

    std::int64_t size(int input, int axis) const { return input_descs[input].dims.d[axis]; }
    const float* floats(int input) const { return static_cast<const float*>(inputs[input]); }
    float* float_output(int output) const { return static_cast<float*>(outputs[output]); }
};

// What a tensor must be: 't' of the activations' type, which all of these share, 'f' float, 'h' half, 'i' int32; and
// its shape, a letter an axis, where a letter is the same size everywhere.
struct Operator {
    const char* name;
    std::string_view inputs;
    std::string_view outputs;
    std::string_view input_shapes[kMaxInputs];
    std::string_view output_shapes[kMaxOutputs];
    bool has_fields;  // bits and group
    int (*run)(const Call& call);
};

int run_wkv4(const Call& c) {
    return goslet_cuda_wkv4(c.type, c.size(0, 0), c.size(0, 1), c.inputs[0], c.inputs[1], c.floats(2), c.floats(3),
                            c.floats(4), c.floats(5), c.floats(6), c.outputs[0], c.float_output(1), c.float_output(2),
                            c.float_output(3), c.stream);
}

int run_wkv6(const Call& c) {
    const int by_token = c.input_descs[3].dims.nbDims == 3 ? 1 : 0;  // as in Wkv6
    return goslet_cuda_wkv6(c.type, GOSLET_CUDA_F32, c.size(0, 0), c.size(0, 1), c.size(0, 2), c.inputs[0], c.inputs[1],
                            c.inputs[2], c.floats(3), by_token, c.floats(4), c.inputs[5], c.outputs[0], c.outputs[1],
                            c.stream);
}

int run_wkv7(const Call& c) {
    return goslet_cuda_wkv7(c.type, GOSLET_CUDA_F32, c.size(0, 0), c.size(0, 1), c.size(0, 2), c.inputs[0], c.floats(1),
                            c.inputs[2], c.inputs[3], c.inputs[4], c.inputs[5], c.inputs[6], c.outputs[0], c.outputs[1],
                            c.stream);
}

int run_product(const Call& c) {
    const std::int64_t n_rows = c.size(0, 0);
    const std::int64_t n_in = c.size(0, 1);
    const std::int64_t n_out = c.size(1, 0);
    const std::int64_t number_bytes = c.type == GOSLET_CUDA_F32 ? 4 : 2;
    for (std::int64_t row = 0; row < n_rows; row += kMaxProductRows) {
        const std::int64_t count = n_rows - row < kMaxProductRows ? n_rows - row : kMaxProductRows;
        const auto* const x = static_cast<const std::uint8_t*>(c.inputs[0]) + row * n_in * number_bytes;
        auto* const y = static_cast<std::uint8_t*>(c.outputs[0]) + row * n_out * number_bytes;
        const int code =
            goslet_cuda_product(c.type, c.bits, c.group, count, n_in, n_out, x, c.inputs[1], c.inputs[2], y, c.stream);
        if (code != 0) {
            return code;
        }
    }
    return 0;
}

constexpr Operator kOperators[] = {
    {"Wkv4", "ttfffff", "tfff", {"bc", "bc", "c", "c", "bc", "bc", "bc"}, {"bc", "bc", "bc", "bc"}, false, run_wkv4},
    {"Wkv5", "tttfff", "tf", {"bhn", "bhn", "bhn", "hn", "hn", "bhnn"}, {"bhn", "bhnn"}, false, run_wkv6},
    {"Wkv6", "tttfff", "tf", {"bhn", "bhn", "bhn", "bhn", "hn", "bhnn"}, {"bhn", "bhnn"}, false, run_wkv6},
    {"Wkv7", "tfttttf", "tf", {"bhn", "bhn", "bhn", "bhn", "bhn", "bhn", "bhnn"}, {"bhn", "bhnn"}, false, run_wkv7},
    {"GosletProduct", "tih", "t", {"bi", "ow", "og"}, {"bo"}, true, run_product},
};

bool is_activation(DataType type) {
    return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

bool is_kind(char kind, DataType type) {
    switch (kind) {
        case 'f':
            return type == DataType::kFLOAT;
        case 'h':
            return type == DataType::kHALF;
        case 'i':
            return type == DataType::kINT32;
        default:
            return is_activation(type);
    }
}

goslet_cuda_type cuda_type(DataType type) {
    return type == DataType::kHALF ? GOSLET_CUDA_F16 : type == DataType::kBF16 ? GOSLET_CUDA_BF16 : GOSLET_CUDA_F32;
}

// The sizes that the letters of shapes stand for.
class Sizes {
  public:
    // Whether a tensor has this shape; letters that are new get its sizes.
    bool take(std::string_view letters, const nvinfer1::Dims& dims) noexcept {
        if (dims.nbDims != static_cast<std::int32_t>(letters.size())) {
            return false;
        }
        for (std::size_t axis = 0; axis < letters.size(); ++axis) {
            std::int64_t& size = sizes_[letters[axis] - 'a'];
            size = size == 0 ? dims.d[axis] : size;
            if (dims.d[axis] < 1 || dims.d[axis] != size) {
                return false;
            }
        }
        return true;
    }

    std::int64_t operator[](char letter) const noexcept { return sizes_[letter - 'a']; }

  private:
    std::int64_t sizes_['z' - 'a' + 1]{};
};

// One operator as a plugin with all three capabilities. The activations are its first input.
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
  public:
    Plugin(const Operator& op, std::int32_t bits, std::int32_t group) : op_(op), bits_(bits), group_(group) {
        if (op_.has_fields) {
            fields_[0] = PluginField("bits", &bits_, nvinfer1::PluginFieldType::kINT32, 1);
            fields_[1] = PluginField("group", &group_, nvinfer1::PluginFieldType::kINT32, 1);
            collection_ = {2, fields_};
        }
    }

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
            case nvinfer1::PluginCapabilityType::kCORE:
                return static_cast<nvinfer1::IPluginV3OneCore*>(this);
            case nvinfer1::PluginCapabilityType::kBUILD:
                return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
            case nvinfer1::PluginCapabilityType::kRUNTIME:
                return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(op_, bits_, group_); }

    const AsciiChar* getPluginName() const noexcept override { return op_.name; }
    const AsciiChar* getPluginVersion() const noexcept override { return kVersion; }
    const AsciiChar* getPluginNamespace() const noexcept override { return kNamespace; }

    std::int32_t getNbOutputs() const noexcept override { return static_cast<std::int32_t>(op_.outputs.size()); }

    std::int32_t configurePlugin(const DynamicPluginTensorDesc*, std::int32_t n_inputs, const DynamicPluginTensorDesc*,
                                 std::int32_t n_outputs) noexcept override {
        return counts_fit(n_inputs, n_outputs) ? 0 : kFailed;
    }

    std::int32_t getOutputDataTypes(DataType* output_types, std::int32_t n_outputs, const DataType* input_types,
                                    std::int32_t n_inputs) const noexcept override {
        if (!counts_fit(n_inputs, n_outputs)) {
            return kFailed;
        }
        for (std::int32_t i = 0; i < n_outputs; ++i) {
            output_types[i] = op_.outputs[static_cast<std::size_t>(i)] == 'f' ? DataType::kFLOAT : input_types[0];
        }
        return 0;
    }

    std::int32_t getOutputShapes(const DimsExprs* inputs, std::int32_t n_inputs, const DimsExprs*, std::int32_t,
                                 DimsExprs* outputs, std::int32_t n_outputs,
                                 nvinfer1::IExprBuilder&) noexcept override {
        if (!counts_fit(n_inputs, n_outputs)) {
            return kFailed;
        }
        for (std::int32_t i = 0; i < n_outputs; ++i) {
            const std::string_view letters = op_.output_shapes[i];
            outputs[i].nbDims = static_cast<std::int32_t>(letters.size());
            for (std::size_t axis = 0; axis < letters.size(); ++axis) {
                if (!find_size(inputs, n_inputs, letters[axis], outputs[i].d[axis])) {
                    return kFailed;
                }
            }
        }
        return 0;
    }

    bool supportsFormatCombination(std::int32_t position, const DynamicPluginTensorDesc* tensors, std::int32_t n_inputs,
                                   std::int32_t n_outputs) noexcept override {
        if (!counts_fit(n_inputs, n_outputs) || position < 0 || position >= n_inputs + n_outputs) {
            return false;
        }
        const PluginTensorDesc& tensor = tensors[position].desc;
        const auto place = static_cast<std::size_t>(position);
        const char kind = place < op_.inputs.size() ? op_.inputs[place] : op_.outputs[place - op_.inputs.size()];
        return tensor.format == nvinfer1::TensorFormat::kLINEAR && is_kind(kind, tensor.type) &&
               (kind != 't' || tensor.type == tensors[0].desc.type);
    }

    // The kernels are given sizes of one tensor and read others by them: what does not fit together is refused here.
    std::int32_t onShapeChange(const PluginTensorDesc* inputs, std::int32_t n_inputs, const PluginTensorDesc* outputs,
                               std::int32_t n_outputs) noexcept override {
        if (!counts_fit(n_inputs, n_outputs)) {
            return kFailed;
        }
        Sizes sizes;
        for (std::int32_t i = 0; i < n_inputs + n_outputs; ++i) {
            const bool is_input = i < n_inputs;
            const std::string_view letters = is_input ? op_.input_shapes[i] : op_.output_shapes[i - n_inputs];
            if (!sizes.take(letters, is_input ? inputs[i].dims : outputs[i - n_inputs].dims)) {
                return kFailed;
            }
        }
        return !op_.has_fields || weights_fit(sizes) ? 0 : kFailed;
    }

    std::int32_t enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc*, const void* const* inputs,
                         void* const* outputs, void*, cudaStream_t stream) noexcept override {
        return op_.run({input_descs, inputs, outputs, cuda_type(input_descs[0].type), bits_, group_, stream});
    }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

    const PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }

  private:
    // An axis of the inputs that this letter stands for.
    bool find_size(const DimsExprs* inputs, std::int32_t n_inputs, char letter,
                   const nvinfer1::IDimensionExpr*& size) const noexcept {
        for (std::int32_t i = 0; i < n_inputs; ++i) {
            const std::size_t axis = op_.input_shapes[i].find(letter);
            if (axis < static_cast<std::size_t>(inputs[i].nbDims)) {
                size = inputs[i].d[axis];
                return true;
            }
        }
        return false;
    }

    // A product's weights in words, w, and scales, g, are those of its inputs, padded.
    bool weights_fit(const Sizes& sizes) const noexcept {
        const std::int64_t padded_in = (sizes['i'] + kPaddedTo - 1) / kPaddedTo * kPaddedTo;
        return sizes['w'] * 32 == padded_in * bits_ && sizes['g'] * group_ == padded_in;
    }

    bool counts_fit(std::int32_t n_inputs, std::int32_t n_outputs) const noexcept {
        return n_inputs == static_cast<std::int32_t>(op_.inputs.size()) && n_outputs == getNbOutputs();
    }

    const Operator& op_;
    std::int32_t bits_;
    std::int32_t group_;
    PluginField fields_[2]{};
    PluginFieldCollection collection_{0, nullptr};
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
  public:
    explicit Creator(const Operator& op) : op_(op) {
        if (op_.has_fields) {
            fields_[0] = PluginField("bits", nullptr, nvinfer1::PluginFieldType::kINT32, 1);
            fields_[1] = PluginField("group", nullptr, nvinfer1::PluginFieldType::kINT32, 1);
            collection_ = {2, fields_};
        }
    }

    // Null where a field is missing or no product has it.
    nvinfer1::IPluginV3* createPlugin(const AsciiChar*, const PluginFieldCollection* given,
                                      nvinfer1::TensorRTPhase) noexcept override {
        std::int32_t bits = 0;
        std::int32_t group = 0;
        for (std::int32_t i = 0; given != nullptr && i < given->nbFields; ++i) {
            const PluginField& field = given->fields[i];
            if (field.name == nullptr || field.data == nullptr || field.length < 1) {
                continue;
            }
            std::int32_t* const target = std::strcmp(field.name, "bits") == 0    ? &bits
                                         : std::strcmp(field.name, "group") == 0 ? &group
                                                                                 : nullptr;
            if (target != nullptr && field.type == nvinfer1::PluginFieldType::kINT32) {
                std::memcpy(target, field.data, sizeof *target);
            }
        }
        const bool fits = (bits == 4 || bits == 8) && (group == 32 || group == 64 || group == 128);
        return op_.has_fields && !fits ? nullptr : new (std::nothrow) Plugin(op_, bits, group);
    }

    const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
    const AsciiChar* getPluginName() const noexcept override { return op_.name; }
    const AsciiChar* getPluginVersion() const noexcept override { return kVersion; }
    const AsciiChar* getPluginNamespace() const noexcept override { return kNamespace; }

  private:
    const Operator& op_;
    PluginField fields_[2]{};
    PluginFieldCollection collection_{0, nullptr};
};

}  // namespace

#define GOSLET_EXPORT extern "C" __attribute__((visibility("default")))

GOSLET_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& n_creators) {
    static Creator creators[] = {Creator(kOperators[0]), Creator(kOperators[1]), Creator(kOperators[2]),
                                 Creator(kOperators[3]), Creator(kOperators[4])};
    static nvinfer1::IPluginCreatorInterface* const pointers[] = {&creators[0], &creators[1], &creators[2],
                                                                  &creators[3], &creators[4]};
    n_creators = static_cast<std::int32_t>(sizeof pointers / sizeof pointers[0]);
    return pointers;
}

// What is wrong is said by return codes alone, so no logger is needed.
GOSLET_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder*) {}
