#include "program.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "json.h"
#include "program_tensors.h"

namespace goslet {
namespace {

constexpr std::int64_t kVersion = 3;
constexpr std::size_t kMaxRegisters = 2048;
constexpr std::size_t kMaxSteps = std::size_t{1} << 16;
constexpr std::size_t kMaxRegisterSize = std::size_t{1} << 20;
// All registers together: far more than any model's, and few enough to be allocated.
constexpr std::size_t kMaxRegisterTotal = std::size_t{1} << 22;
// Below this the kernel keeps a head's vectors on the stack.
constexpr std::size_t kMaxHeadSize = 256;
constexpr const char* kEmbedding = "emb.weight";

class Loader {
  public:
    explicit Loader(const EngineParts& parts) : parts_(parts), tensors_(parts.tensors, program_.decoded) {
        for (std::size_t index = 0; index < parts.state.size(); ++index) {
            if (!states_.emplace(parts.state[index].name, index).second) {
                throw EngineError("a state tensor appears twice", parts.state[index].name);
            }
        }
    }

    Program load() {
        const Json root = Json::parse(parts_.program);
        const std::int64_t version = root.need("version", "program").integer("program.version");
        if (version != kVersion) {
            throw EngineError("is of another version", "program.version", std::to_string(kVersion),
                              std::to_string(version));
        }
        read_registers(root.need("registers", "program"), root.need("input", "program"));
        const TensorView& embedding =
            tensors_.of_shape(kEmbedding, "embedding", {parts_.vocab_size, program_.input.size});
        if (embedding.layout != TensorLayout::kRows) {
            throw EngineError("is not stored in rows", kEmbedding);
        }
        program_.embedding = embedding;
        const std::vector<Json>& steps = root.need("steps", "program").array("program.steps");
        if (steps.size() > kMaxSteps) {
            throw EngineError("has too many steps", "program.steps", "at most " + std::to_string(kMaxSteps),
                              std::to_string(steps.size()));
        }
        for (std::size_t index = 0; index < steps.size(); ++index) {
            const std::string place = "program.steps[" + std::to_string(index) + "]";
            const bool is_last = index + 1 == steps.size();
            program_.steps.push_back(read_step(steps[index], place, is_last));
        }
        if (steps.empty()) {
            throw EngineError("has no steps", "program.steps");
        }
        for (const auto& [name, index] : states_) {
            if (used_states_.count(index) == 0) {
                throw EngineError("no step moves a tensor of the state on", name);
            }
        }
        return std::move(program_);
    }

  private:
    // The registers that `input` lists lie behind each other in one, which takes the token's row of the embedding.
    void read_registers(const Json& json, const Json& input) {
        const auto& members = json.object("program.registers");
        std::size_t total = 0;
        if (members.size() > kMaxRegisters) {
            throw EngineError("has too many registers", "program.registers", std::to_string(kMaxRegisters),
                              std::to_string(members.size()));
        }
        std::unordered_map<std::string, std::size_t> sizes;
        for (const auto& [name, value] : members) {
            const std::string place = "program.registers." + name;
            const std::int64_t size = value.integer(place);
            if (size < 1 || size > static_cast<std::int64_t>(kMaxRegisterSize)) {
                throw EngineError("is out of range", place, "1 to " + std::to_string(kMaxRegisterSize),
                                  std::to_string(size));
            }
            total += static_cast<std::size_t>(size);
            if (total > kMaxRegisterTotal) {
                throw EngineError("ask for too much memory", "program.registers",
                                  "at most " + std::to_string(kMaxRegisterTotal) + " numbers", "");
            }
            sizes.emplace(name, static_cast<std::size_t>(size));
        }
        const std::vector<Json>& pieces = input.array("program.input");
        std::vector<std::string> names;
        std::size_t n_input = 0;
        for (const Json& piece : pieces) {
            const std::string& name = piece.text("program.input");
            const auto found = sizes.find(name);
            if (found == sizes.end() || std::find(names.begin(), names.end(), name) != names.end()) {
                throw EngineError("is not a register, or comes twice", "program.input", "", name);
            }
            names.push_back(name);
            n_input += found->second;
        }
        if (names.empty()) {
            throw EngineError("has no registers", "program.input");
        }
        program_.input = make_register(n_input, program_.needs);
        std::size_t start = program_.input.offset;
        for (const std::string& name : names) {
            const std::size_t size = sizes.at(name);
            registers_.emplace(name, Register{size, program_.input.stride, start, names.size() == 1});
            start += size;
            sizes.erase(name);
        }
        for (const auto& [name, size] : sizes) {
            registers_.emplace(name, make_register(size, program_.needs));
        }
    }

    // A register of any size.
    const Register& register_of(const Json& step, std::string_view key, const std::string& place) {
        const std::string at = place + "." + std::string(key);
        return named_register(step.need(key, place).text(at), at);
    }

    const Register& named_register(const std::string& name, const std::string& place) {
        const auto found = registers_.find(name);
        if (found == registers_.end()) {
            throw EngineError("is not a register", place, "", name);
        }
        return found->second;
    }

    const Register& register_of(const Json& step, std::string_view key, const std::string& place, std::size_t size) {
        const Register& found = register_of(step, key, place);
        if (found.size != size) {
            const std::string at = place + "." + std::string(key);
            throw EngineError("a register has the wrong size", at, std::to_string(size),
                              step.need(key, place).text(at) + " of " + std::to_string(found.size));
        }
        return found;
    }

    const float* vector_of(const Json& step, std::string_view key, const std::string& place, std::size_t size) {
        const std::string at = place + "." + std::string(key);
        return tensors_.vector(step.need(key, place).text(at), at, size);
    }

    // Null means none.
    std::optional<Register> register_or_none(const Json& step, std::string_view key, const std::string& place,
                                             std::size_t size) {
        if (step.need(key, place).is_null()) {
            return std::nullopt;
        }
        return register_of(step, key, place, size);
    }

    Norm norm_of(const Json& step, const std::string& place, std::size_t size) {
        const std::string& name = step.need("norm", place).text(place + ".norm");
        const double eps = step.need("eps", place).number(place + ".eps");
        if (!(eps > 0 && std::isfinite(eps))) {
            throw EngineError("is not a positive number", place + ".eps", "", std::to_string(eps));
        }
        return {tensors_.vector(name + ".weight", place + ".norm", size),
                tensors_.vector(name + ".bias", place + ".norm", size), static_cast<float>(eps)};
    }

    std::size_t state_of(const Json& step, std::string_view key, const std::string& place,
                         const std::vector<std::size_t>& shape) {
        const std::string at = place + "." + std::string(key);
        const std::string& name = step.need(key, place).text(at);
        const auto found = states_.find(name);
        if (found == states_.end()) {
            throw EngineError("a tensor of the state is missing", at, name, "nothing");
        }
        const std::vector<std::size_t>& real = parts_.state[found->second].layout.shape;
        if (real != shape) {
            throw EngineError("a tensor of the state has the wrong shape", at + ": " + name, shape_text(shape),
                              shape_text(real));
        }
        if (!used_states_.insert(found->second).second) {
            throw EngineError("a tensor of the state is moved on twice", at, "", name);
        }
        return found->second;
    }

    Matrix matrix_of(const Json& step, const std::string& place, std::size_t n_out, std::size_t n_in) {
        const std::string at = place + ".weight";
        return tensors_.matrix(step.need("weight", place).text(at), at, n_out, n_in);
    }

    const TensorView& rows_of(const Json& step, std::string_view key, const std::string& place, std::size_t n_rows,
                              std::size_t max_columns) {
        const std::string at = place + "." + std::string(key);
        return tensors_.rows(step.need(key, place).text(at), at, n_rows, max_columns);
    }

    // null, or {up, low, kept, kept_inputs}: a tensor [n_out, rank] and a register of rank numbers, and two tensors
    // [n_out, kept]; each pair may be null.
    Residual residual_of(const Json& item, const std::string& place, std::size_t n_out, std::size_t n_in) {
        const Json& json = item.need("residual", place);
        Residual residual;
        if (json.is_null()) {
            return residual;
        }
        const std::string at = place + ".residual";
        if (!json.need("low", at).is_null()) {
            residual.low = register_of(json, "low", at);
            residual.rank = residual.low.size;
            const TensorView& up = rows_of(json, "up", at, n_out, residual.rank);
            if (up.shape[1] != residual.rank) {
                throw EngineError("a tensor has the wrong shape", at + ".up", shape_text({n_out, residual.rank}),
                                  shape_text(up.shape));
            }
            residual.up = tensors_.turned(up);
        }
        if (!json.need("kept", at).is_null()) {
            const TensorView& kept = rows_of(json, "kept", at, n_out, n_in);
            const TensorView& inputs = rows_of(json, "kept_inputs", at, n_out, n_in);
            if (inputs.format != Format::kU16 || inputs.shape != kept.shape) {
                throw EngineError("are not places for the numbers kept", at + ".kept_inputs",
                                  "u16 " + shape_text(kept.shape), shape_text(inputs.shape));
            }
            residual.n_kept = kept.shape[1];
            residual.kept_inputs = tensors_.places(inputs);
            for (std::size_t index = 0; index < n_out * residual.n_kept; ++index) {
                if (residual.kept_inputs[index] >= n_in) {
                    throw EngineError("is not an input", at + ".kept_inputs", "0 to " + std::to_string(n_in - 1),
                                      std::to_string(residual.kept_inputs[index]));
                }
            }
            residual.kept = tensors_.decoded(kept);
        }
        return residual;
    }

    std::unique_ptr<Step> read_step(const Json& step, const std::string& place, bool is_last) {
        const std::string& op = step.need("op", place).text(place + ".op");
        if ((op == "logits") != is_last) {
            throw EngineError("logits come last, and nothing else", place + ".op", is_last ? "logits" : "another op",
                              op);
        }
        if (op == "norm_shift") {
            return read_norm_shift(step, place);
        }
        if (op == "linear") {
            return read_linear(step, place);
        }
        if (op == "wkv4") {
            return read_wkv4(step, place);
        }
        if (op == "wkv5" || op == "wkv6") {
            return read_wkv6(step, place, op == "wkv6");
        }
        if (op == "wkv7") {
            return read_wkv7(step, place);
        }
        if (op == "token_product") {
            return read_token_product(step, place);
        }
        if (op == "logits") {
            return read_logits(step, place);
        }
        throw EngineError("is an op that this goslet does not know", place + ".op",
                          "norm_shift, linear, wkv4, wkv5, wkv6, wkv7, token_product, logits", op);
    }

    // x, norm, eps, shift; mixes: [{mix, out}, …]; normed, previous: register or null
    std::unique_ptr<Step> read_norm_shift(const Json& step, const std::string& place) {
        const Register& x = register_of(step, "x", place);
        const std::size_t size = x.size;
        std::vector<NormShift::Mix> mixes;
        const std::vector<Json>& items = step.need("mixes", place).array(place + ".mixes");
        std::vector<Register> outs;
        for (std::size_t index = 0; index < items.size(); ++index) {
            const std::string at = place + ".mixes[" + std::to_string(index) + "]";
            outs.push_back(register_of(items[index], "out", at, size));
            mixes.push_back({vector_of(items[index], "mix", at, size), outs.back()});
        }
        const NormShift::Kept kept{register_or_none(step, "normed", place, size),
                                   register_or_none(step, "previous", place, size)};
        for (const std::optional<Register>& out : {kept.normed, kept.previous}) {
            if (out.has_value()) {
                outs.push_back(*out);
            }
        }
        refuse_overlap(outs, {x}, place);
        return std::make_unique<NormShift>(x, norm_of(step, place, size), state_of(step, "shift", place, {size}),
                                           std::move(mixes), kept, program_.needs);
    }

    // What a step writes must not be what it reads, or writes elsewhere, in another order.
    static void refuse_overlap(const std::vector<Register>& outs, const std::vector<Register>& inputs,
                               const std::string& place) {
        for (std::size_t index = 0; index < outs.size(); ++index) {
            const auto same = [&](const Register& other) { return other.offset == outs[index].offset; };
            if (std::any_of(inputs.begin(), inputs.end(), same) ||
                std::any_of(outs.begin() + static_cast<std::ptrdiff_t>(index) + 1, outs.end(), same)) {
                throw EngineError("would overwrite what it reads or writes", place);
            }
        }
    }

    // products: [{weight, x, out, residual, bias: tensor or null, activation, combine, operands: [register, …]}, …]
    std::unique_ptr<Step> read_linear(const Json& step, const std::string& place) {
        std::vector<Linear::Product> products;
        const std::vector<Json>& items = step.need("products", place).array(place + ".products");
        for (std::size_t index = 0; index < items.size(); ++index) {
            const Json& item = items[index];
            const std::string at = place + ".products[" + std::to_string(index) + "]";
            Linear::Product product{};
            product.x = register_of(item, "x", at);
            if (!product.x.padded) {
                throw EngineError("is a piece of the token, which no product can take", at + ".x");
            }
            product.out = register_of(item, "out", at);
            product.matrix = matrix_of(item, at, product.out.size, product.x.size);
            product.residual = residual_of(item, at, product.out.size, product.x.size);
            product.bias = item.need("bias", at).is_null() ? nullptr : vector_of(item, "bias", at, product.out.size);
            product.activation = activation_of(item, at);
            read_combine(item, at, product);
            products.push_back(product);
        }
        if (products.empty()) {
            throw EngineError("has no products", place + ".products");
        }
        std::size_t n_sums = 0;
        for (const Linear::Product& product : products) {
            n_sums += product.needs_sum() ? 1 : 0;
            for (const Linear::Product& other : products) {
                const bool is_other = &product != &other;
                const bool feeds_residual = other.residual.rank != 0 && product.out.offset == other.residual.low.offset;
                if (product.out.offset == other.x.offset || feeds_residual ||
                    (is_other && (product.out.offset == other.out.offset || product.out.offset == other.a.offset ||
                                  product.out.offset == other.b.offset))) {
                    throw EngineError("products of one step touch each other's registers", place + ".products");
                }
            }
        }
        if (n_sums > 1) {
            throw EngineError("only one product of a step can read what it is combined into", place + ".products");
        }
        return std::make_unique<Linear>(std::move(products), program_.needs);
    }

    void read_combine(const Json& item, const std::string& place, Linear::Product& product) {
        struct Way {
            const char* name;
            Combine combine;
            std::size_t n_operands;
        };
        static constexpr Way kWays[] = {{"set", Combine::kSet, 0},
                                        {"add", Combine::kAdd, 0},
                                        {"gate", Combine::kGate, 1},
                                        {"gate_add", Combine::kGateAdd, 1},
                                        {"lerp", Combine::kLerp, 2}};
        const std::string& name = item.need("combine", place).text(place + ".combine");
        const Way* const way =
            std::find_if(std::begin(kWays), std::end(kWays), [&](const Way& known) { return name == known.name; });
        if (way == std::end(kWays)) {
            throw EngineError("is no way to combine", place + ".combine", "set, add, gate, gate_add, lerp", name);
        }
        const std::vector<Json>& operands = item.need("operands", place).array(place + ".operands");
        if (operands.size() != way->n_operands) {
            throw EngineError("has the wrong number of operands", place, std::to_string(way->n_operands),
                              std::to_string(operands.size()));
        }
        product.combine = way->combine;
        // Operands that are not there stand for a place that nothing else has.
        product.a = product.b = Register{0, 0, std::numeric_limits<std::size_t>::max(), false};
        Register* const places[] = {&product.a, &product.b};
        for (std::size_t index = 0; index < operands.size(); ++index) {
            *places[index] = named_register(operands[index].text(place + ".operands"), place + ".operands");
            if (places[index]->size != product.out.size) {
                throw EngineError("a register has the wrong size", place + ".operands",
                                  std::to_string(product.out.size), std::to_string(places[index]->size));
            }
        }
        if (product.combine == Combine::kLerp &&
            (product.a.offset == product.out.offset || product.b.offset == product.out.offset)) {
            throw EngineError("would overwrite what it reads", place + ".operands");
        }
    }

    static Activation activation_of(const Json& item, const std::string& place) {
        static constexpr std::pair<const char*, Activation> kNames[] = {{"none", Activation::kNone},
                                                                        {"tanh", Activation::kTanh},
                                                                        {"sigmoid", Activation::kSigmoid},
                                                                        {"silu", Activation::kSilu},
                                                                        {"relu_squared", Activation::kReluSquared},
                                                                        {"decay", Activation::kDecay},
                                                                        {"double_exp", Activation::kDoubleExp}};
        const std::string& name = item.need("activation", place).text(place + ".activation");
        for (const auto& [known, activation] : kNames) {
            if (name == known) {
                return activation;
            }
        }
        throw EngineError("is not an activation", place + ".activation",
                          "none, tanh, sigmoid, silu, relu_squared, decay, double_exp", name);
    }

    std::size_t head_size_of(const Json& step, const std::string& place, std::size_t size) {
        const std::int64_t head_size = step.need("head_size", place).integer(place + ".head_size");
        if (head_size < 1 || head_size > static_cast<std::int64_t>(kMaxHeadSize) ||
            size % static_cast<std::size_t>(head_size) != 0) {
            throw EngineError("is not a size of heads", place + ".head_size",
                              "a divisor of " + std::to_string(size) + " up to " + std::to_string(kMaxHeadSize),
                              std::to_string(head_size));
        }
        return static_cast<std::size_t>(head_size);
    }

    // r, k, v, out; decay, first; aa, bb, pp
    std::unique_ptr<Step> read_wkv4(const Json& step, const std::string& place) {
        Wkv4::Inputs in{};
        in.r = register_of(step, "r", place);
        const std::size_t size = in.r.size;
        in.k = register_of(step, "k", place, size);
        in.v = register_of(step, "v", place, size);
        in.out = register_of(step, "out", place, size);
        refuse_overlap({in.out}, {in.r, in.k, in.v}, place + ".out");
        in.decay = vector_of(step, "decay", place, size);
        in.first = vector_of(step, "first", place, size);
        in.aa = state_of(step, "aa", place, {size});
        in.bb = state_of(step, "bb", place, {size});
        in.pp = state_of(step, "pp", place, {size});
        return std::make_unique<Wkv4>(in);
    }

    // r, k, v, out; g: register or null; w (6) or decay (5), bonus; state; norm, eps, head_size
    std::unique_ptr<Step> read_wkv6(const Json& step, const std::string& place, bool by_token) {
        Wkv6::Inputs in{};
        in.r = register_of(step, "r", place);
        const std::size_t size = in.r.size;
        const std::size_t n = head_size_of(step, place, size);
        in.k = register_of(step, "k", place, size);
        in.v = register_of(step, "v", place, size);
        in.g = register_or_none(step, "g", place, size);
        in.out = register_of(step, "out", place, size);
        std::vector<Register> inputs{in.r, in.k, in.v};
        if (by_token) {
            in.w = register_of(step, "w", place, size);
            inputs.push_back(*in.w);
        } else {
            in.decay = vector_of(step, "decay", place, size);
        }
        if (in.g.has_value()) {
            inputs.push_back(*in.g);
        }
        refuse_overlap({in.out}, inputs, place + ".out");
        in.bonus = vector_of(step, "bonus", place, size);
        in.norm = norm_of(step, place, size);
        in.n_head = size / n;
        in.head_size = n;
        in.state = state_of(step, "state", place, {in.n_head, n, n});
        return std::make_unique<Wkv6>(in);
    }

    // r, w, k, v, a, g, first_value, out; value_mix: register or null in layer 0; state; k_k, k_a, r_k, norm, eps
    std::unique_ptr<Step> read_wkv7(const Json& step, const std::string& place) {
        Wkv7::Inputs in{};
        in.r = register_of(step, "r", place);
        const std::size_t size = in.r.size;
        const std::size_t n = head_size_of(step, place, size);
        in.w = register_of(step, "w", place, size);
        in.k = register_of(step, "k", place, size);
        in.v = register_of(step, "v", place, size);
        in.a = register_of(step, "a", place, size);
        in.g = register_of(step, "g", place, size);
        in.first_value = register_of(step, "first_value", place, size);
        in.out = register_of(step, "out", place, size);
        in.is_first = step.need("value_mix", place).is_null();
        in.value_mix = in.is_first ? in.first_value : register_of(step, "value_mix", place, size);
        refuse_overlap({in.out}, {in.r, in.w, in.k, in.v, in.a, in.g, in.first_value, in.value_mix}, place + ".out");
        in.k_k = vector_of(step, "k_k", place, size);
        in.k_a = vector_of(step, "k_a", place, size);
        in.r_k = vector_of(step, "r_k", place, size);
        in.norm = norm_of(step, place, size);
        in.n_head = size / n;
        in.head_size = n;
        in.state = state_of(step, "state", place, {in.n_head, n, n});
        return std::make_unique<Wkv7>(in);
    }

    // x, matrix, out
    std::unique_ptr<Step> read_token_product(const Json& step, const std::string& place) {
        const Register& x = register_of(step, "x", place);
        const Register& matrix = register_of(step, "matrix", place, x.size * x.size);
        const Register& out = register_of(step, "out", place, x.size);
        refuse_overlap({out}, {x, matrix}, place + ".out");
        return std::make_unique<TokenProduct>(x, matrix, out);
    }

    // x, norm, eps, weight
    std::unique_ptr<Step> read_logits(const Json& step, const std::string& place) {
        const Register& x = register_of(step, "x", place);
        const std::size_t size = x.size;
        return std::make_unique<Logits>(x, norm_of(step, place, size), matrix_of(step, place, parts_.vocab_size, size),
                                        program_.needs);
    }

    const EngineParts& parts_;
    Program program_{};
    ProgramTensors tensors_;
    std::unordered_map<std::string, std::size_t> states_;
    std::unordered_set<std::size_t> used_states_;
    std::unordered_map<std::string, Register> registers_;
};

}  // namespace

Program load_program(const EngineParts& parts) {
    try {
        return Loader(parts).load();
    } catch (const JsonError& error) {
        throw EngineError(error.what(), "section program");
    }
}

}  // namespace goslet
