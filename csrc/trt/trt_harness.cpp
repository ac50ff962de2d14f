// Drives a library of TensorRT plugins as TensorRT does, on machines that have none: libgoslet_trt_harness.so.
//
// It opens libgoslet_trt.so, takes a plugin through its life as a network's build and an engine's run do, holds every
// answer to the tensors that the caller is going to give, and starts it on these. tools/gpu_plugin.py calls it, so that
// plugins are held to the same float64 as the kernels in them. It needs TensorRT's headers, those that the plugins were
// built with, and neither TensorRT nor CUDA to run. No number of a tensor is read or written here.
//
// Every function returns null, or one line about what is wrong, which the thread's next call overwrites.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// A tensor without its numbers. `type` is TensorRT's DataType as a number.
struct goslet_harness_tensor {
    std::int32_t type;
    std::int32_t n_dims;
    std::int64_t dims[8];
};

// A plugin's field; all of ours are int32.
struct goslet_harness_field {
    const char* name;
    std::int32_t value;
};

namespace {

using nvinfer1::DataType;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginCreatorV3One;
using nvinfer1::IPluginV3;
using nvinfer1::IPluginV3OneBuild;
using nvinfer1::IPluginV3OneCore;
using nvinfer1::IPluginV3OneRuntime;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;
using nvinfer1::TensorRTPhase;
using Fields = std::vector<std::pair<std::string, std::int32_t>>;

constexpr const char* kVersion = "1";
constexpr const char* kNamespace = "";

class Problem : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

void require(bool holds, const std::string& otherwise) {
    if (!holds) {
        throw Problem(otherwise);
    }
}

// Text of a library that may have given none.
std::string text_of(const char* text) {
    return text == nullptr ? "(null)" : text;
}

std::string text_of(const nvinfer1::Dims& dims) {
    std::string text = "[";
    for (std::int32_t i = 0; i < dims.nbDims; ++i) {
        text += (i == 0 ? "" : ", ") + std::to_string(dims.d[i]);
    }
    return text + "]";
}

// Version 1 alone: version 2 of the build's interface declares aliases, and others may have other functions.
template <typename Interface>
void require_interface(const Interface* found, const char* kind, const std::string& what) {
    require(found != nullptr, what + " is null");
    const nvinfer1::InterfaceInfo info = found->getInterfaceInfo();
    require(info.kind != nullptr && std::strcmp(info.kind, kind) == 0 && info.major == 1,
            what + " is " + text_of(info.kind) + " " + std::to_string(info.major) + ", expected " + kind + " 1");
}

class LoggerFinder final : public nvinfer1::ILoggerFinder {
  public:
    nvinfer1::ILogger* findLogger() override { return nullptr; }
};

// ------------------------------------------------------------------------------------ shapes, as expressions of shapes

class Size final : public nvinfer1::IDimensionExpr {
  public:
    explicit Size(std::int64_t value) : implementation_(value) { mImpl = &implementation_; }

  private:
    class Implementation final : public nvinfer1::apiv::VDimensionExpr {
      public:
        explicit Implementation(std::int64_t value) : value_(value) {}
        bool isConstant() const override { return true; }
        std::int64_t getConstantValue() const override { return value_; }
        bool isSizeTensor() const override { return false; }

      private:
        std::int64_t value_;
    };

    Implementation implementation_;
};

// Makes nothing: all of goslet's outputs have sizes that an input has too.
class NoExpressions final : public nvinfer1::IExprBuilder {
  public:
    NoExpressions() { mImpl = &implementation_; }

  private:
    using Expression = const nvinfer1::IDimensionExpr*;
    class Implementation final : public nvinfer1::apiv::VExprBuilder {
      public:
        Expression constant(std::int64_t) override { return nullptr; }
        Expression operation(nvinfer1::DimensionOperation, const nvinfer1::IDimensionExpr&,
                             const nvinfer1::IDimensionExpr&) override {
            return nullptr;
        }
        Expression declareSizeTensor(std::int32_t, const nvinfer1::IDimensionExpr&,
                                     const nvinfer1::IDimensionExpr&) override {
            return nullptr;
        }
    };

    Implementation implementation_;
};

// -------------------------------------------------------------------------------------------------- tensors and fields

// Inputs first, as supportsFormatCombination has them.
struct Tensors {
    std::vector<DynamicPluginTensorDesc> all;
    std::int32_t n_inputs = 0;
    std::int32_t n_outputs = 0;

    std::vector<PluginTensorDesc> descs(std::int32_t begin, std::int32_t count) const {
        std::vector<PluginTensorDesc> made;
        for (std::int32_t i = begin; i < begin + count; ++i) {
            made.push_back(all[static_cast<std::size_t>(i)].desc);
        }
        return made;
    }
};

Tensors tensors_of(const goslet_harness_tensor* inputs, std::int32_t n_inputs, const goslet_harness_tensor* outputs,
                   std::int32_t n_outputs) {
    require(inputs != nullptr && outputs != nullptr && n_inputs > 0 && n_outputs > 0, "no inputs or no outputs");
    Tensors tensors;
    tensors.n_inputs = n_inputs;
    tensors.n_outputs = n_outputs;
    for (std::int32_t i = 0; i < n_inputs + n_outputs; ++i) {
        const goslet_harness_tensor& given = i < n_inputs ? inputs[i] : outputs[i - n_inputs];
        require(given.n_dims >= 0 && given.n_dims <= nvinfer1::Dims::MAX_DIMS,
                "tensor " + std::to_string(i) + " has " + std::to_string(given.n_dims) + " dimensions");
        PluginTensorDesc desc{};
        desc.dims.nbDims = given.n_dims;
        std::copy_n(given.dims, given.n_dims, desc.dims.d);
        desc.type = static_cast<DataType>(given.type);
        desc.format = TensorFormat::kLINEAR;
        tensors.all.push_back({desc, desc.dims, desc.dims, desc.dims});
    }
    return tensors;
}

std::string text_of(const Fields& fields) {
    std::string text = "{";
    for (const auto& [name, value] : fields) {
        text += (text.size() == 1 ? "" : ", ") + name + " " + std::to_string(value);
    }
    return text + "}";
}

// What a plugin asks to be written into an engine, sorted.
Fields written_fields(IPluginV3OneRuntime& runtime) {
    const PluginFieldCollection* const found = runtime.getFieldsToSerialize();
    require(found != nullptr, "getFieldsToSerialize gives null");
    Fields fields;
    for (std::int32_t i = 0; i < found->nbFields; ++i) {
        const PluginField& field = found->fields[i];
        require(field.name != nullptr && field.data != nullptr && field.length == 1 &&
                    field.type == PluginFieldType::kINT32,
                "the field " + text_of(field.name) + " to be serialized is no int32");
        std::int32_t value = 0;
        std::memcpy(&value, field.data, sizeof value);
        fields.emplace_back(field.name, value);
    }
    std::sort(fields.begin(), fields.end());
    return fields;
}

// A plugin of these fields, or null as the creator gives it. What the fields lie in is overwritten afterwards.
std::unique_ptr<IPluginV3> create(IPluginCreatorV3One& creator, const Fields& fields, TensorRTPhase phase) {
    std::vector<std::string> names;
    std::vector<std::int32_t> values;
    for (const auto& [name, value] : fields) {
        names.push_back(name);
        values.push_back(value);
    }
    std::vector<PluginField> given;
    for (std::size_t i = 0; i < names.size(); ++i) {
        given.emplace_back(names[i].c_str(), &values[i], PluginFieldType::kINT32, 1);
    }
    const PluginFieldCollection collection{static_cast<std::int32_t>(given.size()), given.data()};
    std::unique_ptr<IPluginV3> made(creator.createPlugin("layer", &collection, phase));
    std::fill(values.begin(), values.end(), -1);
    for (std::string& name : names) {
        std::fill(name.begin(), name.end(), '?');
    }
    return made;
}

// ----------------------------------------------------------------------------------------------------- a plugin's life

template <typename Capability>
Capability& capability(IPluginV3& plugin, PluginCapabilityType type, const char* kind) {
    auto* const found = static_cast<Capability*>(plugin.getCapabilityInterface(type));
    require_interface(found, kind, "a capability");
    return *found;
}

IPluginV3OneBuild& build_of(IPluginV3& plugin) {
    return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD, "PLUGIN_V3ONE_BUILD");
}

IPluginV3OneRuntime& runtime_of(IPluginV3& plugin) {
    return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME, "PLUGIN_V3ONE_RUNTIME");
}

// Holds a plugin, new or copied, to its name and to the fields that it was made of.
void check_identity(const std::unique_ptr<IPluginV3>& plugin, const std::string& name, const Fields& fields,
                    const std::string& how) {
    require_interface(plugin.get(), "PLUGIN", "the plugin by " + how);
    const auto& core = capability<IPluginV3OneCore>(*plugin, PluginCapabilityType::kCORE, "PLUGIN_V3ONE_CORE");
    require(text_of(core.getPluginName()) == name && text_of(core.getPluginVersion()) == kVersion &&
                text_of(core.getPluginNamespace()) == kNamespace,
            "the plugin by " + how + " is " + text_of(core.getPluginName()) + " " + text_of(core.getPluginVersion()) +
                " of \"" + text_of(core.getPluginNamespace()) + "\"");
    const Fields written = written_fields(runtime_of(*plugin));
    require(written == fields,
            "the plugin by " + how + " serializes " + text_of(written) + ", expected " + text_of(fields));
}

void check_output_types(const IPluginV3OneBuild& build, const Tensors& tensors) {
    std::vector<DataType> inputs;
    for (std::int32_t i = 0; i < tensors.n_inputs; ++i) {
        inputs.push_back(tensors.all[static_cast<std::size_t>(i)].desc.type);
    }
    std::vector<DataType> outputs(static_cast<std::size_t>(tensors.n_outputs), DataType::kBOOL);
    require(build.getOutputDataTypes(outputs.data(), tensors.n_outputs, inputs.data(), tensors.n_inputs) == 0,
            "getOutputDataTypes fails");
    require(build.getOutputDataTypes(outputs.data(), tensors.n_outputs, inputs.data(), tensors.n_inputs - 1) != 0 &&
                build.getOutputDataTypes(outputs.data(), tensors.n_outputs - 1, inputs.data(), tensors.n_inputs) != 0,
            "getOutputDataTypes takes a tensor too few");
    for (std::size_t i = 0; i < outputs.size(); ++i) {
        const DataType expected = tensors.all[inputs.size() + i].desc.type;
        require(outputs[i] == expected, "output " + std::to_string(i) + " has type " +
                                            std::to_string(static_cast<int>(outputs[i])) + ", expected " +
                                            std::to_string(static_cast<int>(expected)));
    }
}

void check_output_shapes(IPluginV3OneBuild& build, const Tensors& tensors) {
    std::vector<std::unique_ptr<Size>> sizes;
    std::vector<DimsExprs> inputs(static_cast<std::size_t>(tensors.n_inputs));
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        const nvinfer1::Dims& dims = tensors.all[i].desc.dims;
        inputs[i].nbDims = dims.nbDims;
        for (std::int32_t axis = 0; axis < dims.nbDims; ++axis) {
            sizes.push_back(std::make_unique<Size>(dims.d[axis]));
            inputs[i].d[axis] = sizes.back().get();
        }
    }
    std::vector<DimsExprs> outputs(static_cast<std::size_t>(tensors.n_outputs));
    NoExpressions builder;
    require(build.getOutputShapes(inputs.data(), tensors.n_inputs, nullptr, 0, outputs.data(), tensors.n_outputs,
                                  builder) == 0,
            "getOutputShapes fails");
    for (const std::int32_t less : {0, 1}) {
        require(build.getOutputShapes(inputs.data(), tensors.n_inputs - less, nullptr, 0, outputs.data(),
                                      tensors.n_outputs - (1 - less), builder) != 0,
                "getOutputShapes takes a tensor too few");
    }
    for (std::size_t i = 0; i < outputs.size(); ++i) {
        const nvinfer1::Dims& expected = tensors.all[inputs.size() + i].desc.dims;
        nvinfer1::Dims found{};
        found.nbDims = outputs[i].nbDims;
        require(found.nbDims >= 0 && found.nbDims <= nvinfer1::Dims::MAX_DIMS, "an output's shape was not set");
        for (std::int32_t axis = 0; axis < found.nbDims; ++axis) {
            const auto* const size = outputs[i].d[axis];
            require(size != nullptr, "a size of output " + std::to_string(i) + " is null");
            found.d[axis] = size->getConstantValue();
        }
        require(text_of(found) == text_of(expected),
                "output " + std::to_string(i) + " has shape " + text_of(found) + ", expected " + text_of(expected));
    }
}

// The plugin must take the tensors as they are and nothing else in any place, but for the type of its activations,
// which the first input settles. What lies behind the place that is asked for is not set yet, as TensorRT says.
void check_formats(IPluginV3OneBuild& build, const Tensors& tensors) {
    constexpr std::array kTypes = {DataType::kFLOAT, DataType::kHALF,  DataType::kBF16, DataType::kINT8,
                                   DataType::kINT32, DataType::kINT64, DataType::kBOOL, DataType::kFP8};
    std::vector<DynamicPluginTensorDesc> known;
    DynamicPluginTensorDesc unset{};
    unset.desc.type = DataType::kBOOL;
    unset.desc.format = TensorFormat::kCHW32;
    known.assign(tensors.all.size(), unset);
    const auto takes = [&](std::int32_t place) {
        return build.supportsFormatCombination(place, known.data(), tensors.n_inputs, tensors.n_outputs);
    };
    for (std::size_t i = 0; i < known.size(); ++i) {
        const auto place = static_cast<std::int32_t>(i);
        const std::string where = "place " + std::to_string(i);
        known[i] = tensors.all[i];
        for (const DataType type : kTypes) {
            known[i].desc.type = type;
            const bool is_activation = type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
            const bool expected = i == 0 ? is_activation : type == tensors.all[i].desc.type;
            require(takes(place) == expected,
                    where + (expected ? ": refuses type " : ": takes type ") + std::to_string(static_cast<int>(type)));
        }
        known[i] = tensors.all[i];
        for (const TensorFormat format : {TensorFormat::kHWC8, TensorFormat::kCHW4}) {
            known[i].desc.format = format;
            require(!takes(place), where + ": takes format " + std::to_string(static_cast<int>(format)));
        }
        known[i] = tensors.all[i];
        require(takes(place), where + ": refuses the tensor that it is given");
    }
    known.push_back(unset);
    require(!takes(-1) && !takes(tensors.n_inputs + tensors.n_outputs), "takes a place that it does not have");
    require(!build.supportsFormatCombination(0, known.data(), tensors.n_inputs + 1, tensors.n_outputs) &&
                !build.supportsFormatCombination(0, known.data(), tensors.n_inputs, tensors.n_outputs + 1),
            "takes a tensor too many");
}

void check_build(IPluginV3& plugin, const Tensors& tensors) {
    IPluginV3OneBuild& build = build_of(plugin);
    require(build.getNbOutputs() == tensors.n_outputs,
            "has " + std::to_string(build.getNbOutputs()) + " outputs, expected " + std::to_string(tensors.n_outputs));
    check_output_types(build, tensors);
    check_output_shapes(build, tensors);
    check_formats(build, tensors);
    const DynamicPluginTensorDesc* const outputs = tensors.all.data() + tensors.n_inputs;
    require(build.configurePlugin(tensors.all.data(), tensors.n_inputs, outputs, tensors.n_outputs) == 0,
            "configurePlugin fails");
    require(build.configurePlugin(tensors.all.data(), tensors.n_inputs - 1, outputs, tensors.n_outputs) != 0 &&
                build.configurePlugin(tensors.all.data(), tensors.n_inputs, outputs, tensors.n_outputs - 1) != 0,
            "configurePlugin takes a tensor too few");
    const std::size_t workspace =
        build.getWorkspaceSize(tensors.all.data(), tensors.n_inputs, outputs, tensors.n_outputs);
    require(workspace == 0, "asks for a workspace of " + std::to_string(workspace) + " bytes, expected none");
}

// A context's plugin, ready to be started on tensors of these shapes.
struct Attached {
    std::unique_ptr<IPluginV3> plugin;
    std::vector<PluginTensorDesc> inputs;
    std::vector<PluginTensorDesc> outputs;
};

std::unique_ptr<Attached> attach(IPluginV3& made, const Tensors& tensors, const std::string& name,
                                 const Fields& fields) {
    IPluginV3* const copy = runtime_of(made).attachToContext(nullptr);
    require(copy != &made, "attachToContext gives the plugin itself, expected a copy");
    auto attached = std::make_unique<Attached>();
    attached->plugin.reset(copy);
    check_identity(attached->plugin, name, fields, "attachToContext");
    attached->inputs = tensors.descs(0, tensors.n_inputs);
    attached->outputs = tensors.descs(tensors.n_inputs, tensors.n_outputs);
    IPluginV3OneRuntime& runtime = runtime_of(*attached->plugin);
    const auto change = [&](std::int32_t n_inputs) {
        return runtime.onShapeChange(attached->inputs.data(), n_inputs, attached->outputs.data(), tensors.n_outputs);
    };
    require(change(tensors.n_inputs - 1) != 0, "onShapeChange takes an input too few");
    require(change(tensors.n_inputs) == 0, "onShapeChange fails");
    return attached;
}

// A field of another type, or without its number, is none.
void check_fields(IPluginCreatorV3One& creator, const Fields& fields) {
    for (std::size_t wrong = 0; wrong < fields.size(); ++wrong) {
        for (const bool has_data : {false, true}) {
            std::vector<PluginField> given;
            for (const auto& [name, value] : fields) {
                const bool is_wrong = given.size() == wrong;
                given.emplace_back(name.c_str(), is_wrong && !has_data ? nullptr : &value,
                                   is_wrong && has_data ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32, 1);
            }
            const PluginFieldCollection collection{static_cast<std::int32_t>(given.size()), given.data()};
            const std::unique_ptr<IPluginV3> made(creator.createPlugin("layer", &collection, TensorRTPhase::kBUILD));
            require(made == nullptr,
                    "a plugin is made though " + fields[wrong].first + (has_data ? " is no int32" : " has no number"));
        }
    }
}

// As a builder does: made of a node's attributes, copied into the network, asked about its tensors, its fields written
// to the engine; then, as the engine's reader does, made of these alone and attached to a context.
std::unique_ptr<Attached> live(IPluginCreatorV3One& creator, const std::string& name, const Fields& fields,
                               const Tensors& tensors) {
    std::unique_ptr<IPluginV3> node = create(creator, fields, TensorRTPhase::kBUILD);
    require(node != nullptr, "no plugin is made of the fields " + text_of(fields));
    check_identity(node, name, fields, "createPlugin");
    check_fields(creator, fields);
    IPluginV3* const copy = node->clone();
    require(copy != node.get(), "clone gives the plugin itself, expected a copy");
    node.reset();
    const std::unique_ptr<IPluginV3> layer(copy);
    check_identity(layer, name, fields, "clone");
    check_build(*layer, tensors);
    // A builder times a plugin in a context before it writes it.
    attach(*layer, tensors, name, fields);
    const std::unique_ptr<IPluginV3> read =
        create(creator, written_fields(runtime_of(*layer)), TensorRTPhase::kRUNTIME);
    require(read != nullptr, "no plugin is made of the fields that one wrote");
    check_identity(read, name, fields, "createPlugin for a runtime");
    return attach(*read, tensors, name, fields);
}

// --------------------------------------------------------------------------------------------------------- the library

// Never closed: the CUDA runtime within is not made to be.
struct Library {
    std::vector<IPluginCreatorV3One*> creators;
    std::string names;

    IPluginCreatorV3One& creator(const std::string& name) const {
        for (IPluginCreatorV3One* const creator : creators) {
            if (name == creator->getPluginName()) {
                return *creator;
            }
        }
        throw Problem("no plugin of this name; there are: " + names);
    }
};

template <typename Function>
Function symbol(void* library, const char* name) {
    void* const found = dlsym(library, name);
    require(found != nullptr, std::string("the library has no ") + name);
    return reinterpret_cast<Function>(found);
}

std::unique_ptr<Library> open_library(const char* path) {
    static LoggerFinder finder;
    void* const opened = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    require(opened != nullptr, opened == nullptr ? text_of(dlerror()) : "");
    symbol<void (*)(nvinfer1::ILoggerFinder*)>(opened, "setLoggerFinder")(&finder);
    using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(std::int32_t&);
    std::int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* const found = symbol<GetCreators>(opened, "getCreators")(count);
    require(found != nullptr && count > 0, "getCreators gives nothing");
    auto library = std::make_unique<Library>();
    for (std::int32_t i = 0; i < count; ++i) {
        require_interface(found[i], "PLUGIN CREATOR_V3ONE", "creator " + std::to_string(i));
        auto* const creator = static_cast<IPluginCreatorV3One*>(found[i]);
        const std::string name = text_of(creator->getPluginName());
        require(
            text_of(creator->getPluginVersion()) == kVersion && text_of(creator->getPluginNamespace()) == kNamespace,
            "the creator of " + name + " has version \"" + text_of(creator->getPluginVersion()) +
                "\" and namespace \"" + text_of(creator->getPluginNamespace()) + "\", expected \"1\" and \"\"");
        library->creators.push_back(creator);
        library->names += (i == 0 ? "" : " ") + name;
    }
    return library;
}

// The fields that a parser takes from a node: those that the creator names. Sorted.
Fields taken_fields(IPluginCreatorV3One& creator, const goslet_harness_field* given, std::int32_t count) {
    const PluginFieldCollection* const names = creator.getFieldNames();
    require(names != nullptr, "getFieldNames gives null");
    Fields fields;
    for (std::int32_t i = 0; i < count; ++i) {
        bool named = false;
        for (std::int32_t j = 0; j < names->nbFields; ++j) {
            const PluginField& field = names->fields[j];
            named = named || (text_of(field.name) == given[i].name && field.type == PluginFieldType::kINT32);
        }
        require(named, std::string("the creator does not name the int32 field ") + given[i].name);
        fields.emplace_back(given[i].name, given[i].value);
    }
    std::sort(fields.begin(), fields.end());
    return fields;
}

// What `body` throws, as the text that a function of the C interface returns.
template <typename Body>
const char* guarded(const Body& body) noexcept {
    thread_local std::array<char, 1000> text;
    const auto keep = [&](const char* problem) {
        std::strncpy(text.data(), problem, text.size() - 1);
        std::replace(text.begin(), text.end(), '\n', ' ');
        return text.data();
    };
    try {
        body();
        return nullptr;
    } catch (const std::exception& error) {
        return keep(error.what());
    } catch (...) {
        return keep("something unknown was thrown");
    }
}

}  // namespace

#define GOSLET_EXPORT extern "C" __attribute__((visibility("default")))

// Opens libgoslet_trt.so and checks its creators. `names`: those of the plugins, with spaces between them, valid for
// ever like the library.
GOSLET_EXPORT const char* goslet_harness_open(const char* path, Library** library, const char** names) {
    return guarded([&] {
        *library = open_library(path).release();
        *names = (*library)->names.c_str();
    });
}

// Takes the plugin `name` through its life and checks every answer; `made` is then ready to be started on tensors of
// these types and shapes.
GOSLET_EXPORT const char* goslet_harness_make(const Library* library, const char* name,
                                              const goslet_harness_field* fields, std::int32_t n_fields,
                                              const goslet_harness_tensor* inputs, std::int32_t n_inputs,
                                              const goslet_harness_tensor* outputs, std::int32_t n_outputs,
                                              Attached** made) {
    return guarded([&] {
        IPluginCreatorV3One& creator = library->creator(name);
        const Tensors tensors = tensors_of(inputs, n_inputs, outputs, n_outputs);
        *made = live(creator, name, taken_fields(creator, fields, n_fields), tensors).release();
    });
}

// Starts a plugin on the stream, a cudaStream_t. The pointers, as many as it was made with, are its own business.
GOSLET_EXPORT const char* goslet_harness_enqueue(const Attached* attached, const void* const* inputs,
                                                 void* const* outputs, void* stream) {
    return guarded([&] {
        const std::int32_t code = runtime_of(*attached->plugin)
                                      .enqueue(attached->inputs.data(), attached->outputs.data(), inputs, outputs,
                                               nullptr, static_cast<cudaStream_t>(stream));
        require(code == 0, "enqueue gives " + std::to_string(code));
    });
}

GOSLET_EXPORT void goslet_harness_free(Attached* attached) {
    delete attached;
}
