#include "program_tensors.h"

#include <cstring>
#include <string_view>
#include <utility>

#include "embedding.h"

namespace goslet {
namespace {

constexpr std::size_t kMaxTensorElements = std::size_t{1} << 40;
// How the names of a residual's places end.
constexpr std::string_view kPlaces = ".kept_inputs";

Matrix view(const TensorView& tensor) {
    return {tensor.format,
            tensor.layout == TensorLayout::kColumns ? Layout::kColumns : Layout::kTiles,
            tensor.group,
            tensor.shape[0],
            tensor.shape[1],
            tensor.data,
            reinterpret_cast<const std::uint16_t*>(tensor.scales)};
}

void check_tensor(const TensorView& tensor) {
    std::size_t elements = 1;
    for (const std::size_t size : tensor.shape) {
        if (size == 0 || size > kMaxTensorElements / elements) {
            throw EngineError("has an impossible shape", tensor.name, "", shape_text(tensor.shape));
        }
        elements *= size;
    }
    if (tensor.shape.empty()) {
        throw EngineError("has no shape", tensor.name);
    }
    const bool integer = is_integer(tensor.format);
    const bool has_group = tensor.group == 32 || tensor.group == 64 || tensor.group == 128;
    if (integer ? !has_group : tensor.group != 0) {
        throw EngineError("has an unknown group", tensor.name, integer ? "32, 64 or 128" : "none",
                          std::to_string(tensor.group));
    }
    const std::string_view name = tensor.name;
    const bool is_places = name.size() > kPlaces.size() && name.substr(name.size() - kPlaces.size()) == kPlaces;
    if ((tensor.format == Format::kU16) != is_places) {
        throw EngineError("is stored as places and is none, or the other way round", tensor.name);
    }
    if (is_places && tensor.layout != TensorLayout::kRows) {
        throw EngineError("holds places and is not stored in rows", tensor.name);
    }
    std::size_t data_bytes = 0;
    std::size_t scales_bytes = 0;
    if (tensor.layout == TensorLayout::kRows) {
        data_bytes = rows_data_bytes(tensor.format, tensor.shape);
        scales_bytes = rows_scales_bytes(tensor.group, tensor.shape);
    } else {
        if (tensor.shape.size() != 2) {
            throw EngineError("is packed but not a matrix", tensor.name, "2 axes", shape_text(tensor.shape));
        }
        const Matrix matrix = view(tensor);
        data_bytes = matrix.data_bytes();
        scales_bytes = matrix.scales_bytes();
    }
    if (tensor.data_bytes != data_bytes || tensor.scales_bytes != scales_bytes) {
        throw EngineError("has a wrong length", tensor.name,
                          std::to_string(data_bytes) + " and " + std::to_string(scales_bytes) + " bytes",
                          std::to_string(tensor.data_bytes) + " and " + std::to_string(tensor.scales_bytes));
    }
}

}  // namespace

std::string shape_text(const std::vector<std::size_t>& shape) {
    std::string text = "[";
    for (const std::size_t size : shape) {
        text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    }
    return text + "]";
}

ProgramTensors::ProgramTensors(const std::vector<TensorView>& tensors, DecodedTensors& decoded) : kept_(decoded) {
    for (const TensorView& tensor : tensors) {
        check_tensor(tensor);
        if (!tensors_.emplace(tensor.name, &tensor).second) {
            throw EngineError("a tensor appears twice", tensor.name);
        }
    }
}

const TensorView& ProgramTensors::named(const std::string& name, const std::string& place) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) {
        throw EngineError("a tensor is missing", place, name, "nothing");
    }
    return *found->second;
}

const TensorView& ProgramTensors::of_shape(const std::string& name, const std::string& place,
                                           const std::vector<std::size_t>& shape) const {
    const TensorView& stored = named(name, place);
    if (stored.shape != shape) {
        throw EngineError("a tensor has the wrong shape", place + ": " + name, shape_text(shape),
                          shape_text(stored.shape));
    }
    return stored;
}

const TensorView& ProgramTensors::rows(const std::string& name, const std::string& place, std::size_t n_rows,
                                       std::size_t max_columns) const {
    const TensorView& stored = named(name, place);
    if (stored.shape.size() != 2 || stored.shape[0] != n_rows || stored.shape[1] > max_columns) {
        throw EngineError("a tensor has the wrong shape", place + ": " + name,
                          "[" + std::to_string(n_rows) + ", up to " + std::to_string(max_columns) + "]",
                          shape_text(stored.shape));
    }
    if (stored.layout != TensorLayout::kRows) {
        throw EngineError("is not stored in rows", place + ": " + name);
    }
    return stored;
}

Matrix ProgramTensors::matrix(const std::string& name, const std::string& place, std::size_t n_out,
                              std::size_t n_in) const {
    const TensorView& stored = of_shape(name, place, {n_out, n_in});
    if (stored.layout == TensorLayout::kRows) {
        throw EngineError("a matrix is not packed", place, "tiles or columns", name + " in rows");
    }
    return view(stored);
}

const float* ProgramTensors::vector(const std::string& name, const std::string& place, std::size_t size) {
    const TensorView& stored = of_shape(name, place, {size});
    if (stored.layout != TensorLayout::kRows) {
        throw EngineError("is not stored in rows", place + ": " + name);
    }
    return decoded(stored);
}

const float* ProgramTensors::decoded(const TensorView& stored) {
    const auto known = decoded_.find(stored.name);
    if (known != decoded_.end()) {
        return known->second;
    }
    const std::size_t n_rows = stored.shape.size() == 1 ? 1 : stored.shape[0];
    const std::size_t n_columns = stored.shape.back();
    AlignedArray<float> values(n_rows * n_columns);
    for (std::size_t row = 0; row < n_rows; ++row) {
        decode_row(stored, row, values.get() + row * n_columns);
    }
    kept_.numbers.push_back(std::move(values));
    return decoded_[stored.name] = kept_.numbers.back().get();
}

const float* ProgramTensors::turned(const TensorView& stored) {
    const auto known = turned_.find(stored.name);
    if (known != turned_.end()) {
        return known->second;
    }
    const std::size_t n_rows = stored.shape[0];
    const std::size_t n_columns = stored.shape[1];
    std::vector<float> row(n_columns);
    AlignedArray<float> values(n_rows * n_columns);
    for (std::size_t index = 0; index < n_rows; ++index) {
        decode_row(stored, index, row.data());
        for (std::size_t column = 0; column < n_columns; ++column) {
            values.get()[column * n_rows + index] = row[column];
        }
    }
    kept_.numbers.push_back(std::move(values));
    return turned_[stored.name] = kept_.numbers.back().get();
}

const std::uint16_t* ProgramTensors::places(const TensorView& stored) {
    const auto known = places_.find(stored.name);
    if (known != places_.end()) {
        return known->second;
    }
    AlignedArray<std::uint16_t> values(stored.shape[0] * stored.shape[1]);
    std::memcpy(values.get(), stored.data, stored.data_bytes);
    kept_.places.push_back(std::move(values));
    return places_[stored.name] = kept_.places.back().get();
}

}  // namespace goslet
