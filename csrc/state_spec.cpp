#include "state_spec.h"

#include <cmath>
#include <locale>
#include <set>
#include <sstream>
#include <string_view>

#include "container.h"
#include "state_buffer.h"

namespace goslet {
namespace {

constexpr std::int64_t kMaxLayoutVersion = 1 << 16;
constexpr std::int64_t kMaxDimension = 1 << 20;
constexpr std::size_t kMaxAxes = 4;

[[noreturn]] void refuse(const std::string& problem, const std::string& place, const std::string& expected = "",
                         const std::string& found = "") {
    throw ContainerError(ContainerError::Kind::kDamaged, problem, place, expected, found);
}

std::int64_t integer_in(const Json& value, std::int64_t low, std::int64_t high, const std::string& place) {
    const std::int64_t number = value.integer(place);
    if (number < low || number > high) {
        refuse("is out of range", place, std::to_string(low) + " to " + std::to_string(high), std::to_string(number));
    }
    return number;
}

// A number in the digits that read back as the same double, in whatever locale the application has set.
std::string number_json(double value) {
    std::ostringstream out;
    out.imbue(std::locale::classic());
    out.precision(17);
    out << value;
    return out.str();
}

std::string text_json(std::string_view text) {
    static constexpr char kDigits[] = "0123456789abcdef";
    std::string out = "\"";
    for (const char c : text) {
        const auto byte = static_cast<unsigned char>(c);
        if (byte < 0x20) {
            out += {'\\', 'u', '0', '0', kDigits[byte >> 4], kDigits[byte & 15]};
        } else {
            if (c == '"' || c == '\\') {
                out += '\\';
            }
            out += c;
        }
    }
    return out + '"';
}

std::string shape_json(const std::vector<std::size_t>& shape) {
    std::string out;
    for (const std::size_t size : shape) {
        out += (out.empty() ? "[" : ",") + std::to_string(size);
    }
    return out + "]";
}

}  // namespace

std::size_t StateTensorSpec::n_elements() const {
    std::size_t count = 1;
    for (const std::size_t size : shape) {
        count *= size;
    }
    return count;
}

std::string StateTensorSpec::shown() const {
    return goslet::shown(name) + " " + shape_json(shape) + " " + goslet::shown(axes) + " from " + number_json(init);
}

StateSpec StateSpec::from_json(const Json& value, const std::string& place) {
    StateSpec spec;
    spec.layout_version =
        integer_in(value.need("layout_version", place), 1, kMaxLayoutVersion, place + ".layout_version");
    if (value.need("dtype", place).text(place + ".dtype") != "float32") {
        refuse("is not supported", place + ".dtype", "float32");
    }
    const std::vector<Json>& items = value.need("tensors", place).array(place + ".tensors");
    std::set<std::string_view> names;
    std::size_t left = StateBuffer::kMaxSizeBytes / sizeof(float);
    for (std::size_t index = 0; index < items.size(); ++index) {
        const std::string at = place + ".tensors[" + std::to_string(index) + "]";
        const Json& item = items[index];
        StateTensorSpec tensor;
        const std::vector<Json>& sizes = item.need("shape", at).array(at + ".shape");
        if (sizes.empty() || sizes.size() > kMaxAxes) {
            refuse("has a wrong length", at + ".shape", "1 to 4", std::to_string(sizes.size()));
        }
        std::size_t n_elements = 1;
        for (const Json& size : sizes) {
            tensor.shape.push_back(static_cast<std::size_t>(integer_in(size, 1, kMaxDimension, at + ".shape")));
            if (tensor.shape.back() > left / n_elements) {
                refuse("is too large", at + ".shape",
                       "at most " + std::to_string(StateBuffer::kMaxSizeBytes) + " bytes");
            }
            n_elements *= tensor.shape.back();
        }
        left -= n_elements;
        const std::string& name = item.need("name", at).text(at + ".name");
        if (!names.insert(name).second) {
            refuse("appears twice", at + ".name", "", goslet::shown(name));
        }
        tensor.name = name;
        tensor.axes = item.need("axes", at).text(at + ".axes");
        tensor.init = item.need("init", at).number(at + ".init");
        if (!std::isfinite(static_cast<float>(tensor.init))) {
            refuse("is not a float32", at + ".init");
        }
        spec.tensors.push_back(std::move(tensor));
    }
    if (items.empty()) {
        refuse("is empty", place + ".tensors", "at least one tensor");
    }
    return spec;
}

std::string StateSpec::to_json() const {
    std::string out = "{\"layout_version\":" + std::to_string(layout_version) + ",\"dtype\":\"float32\",\"tensors\":[";
    for (std::size_t index = 0; index < tensors.size(); ++index) {
        const StateTensorSpec& tensor = tensors[index];
        out += index == 0 ? "" : ",";
        out += "{\"name\":" + text_json(tensor.name) + ",\"shape\":" + shape_json(tensor.shape) +
               ",\"axes\":" + text_json(tensor.axes) + ",\"init\":" + number_json(tensor.init) + "}";
    }
    return out + "]}";
}

std::size_t StateSpec::size_bytes() const {
    std::size_t n_elements = 0;
    for (const StateTensorSpec& tensor : tensors) {
        n_elements += tensor.n_elements();
    }
    return n_elements * sizeof(float);
}

}  // namespace goslet
