#include "steps.h"

#include <algorithm>
#include <cstring>

namespace goslet {
namespace {

// Numbers of a cache line, so that threads that share a row's columns do not write into one line.
constexpr std::size_t kLine = 16;

struct Columns {
    std::size_t begin;
    std::size_t end;
};

Columns columns_of(const ThreadPool::Member& member, std::size_t size) {
    const std::size_t share = round_up((size + member.n_threads() - 1) / member.n_threads(), kLine);
    const std::size_t begin = std::min(size, member.index() * share);
    return {begin, std::min(size, begin + share)};
}

// Bytes of a row packed for a matrix: whole groups.
std::size_t packed_bytes(const Matrix& matrix) {
    return matrix.n_activation_groups() * matrix.activation_group() * activation_bytes(matrix.format);
}

// The packed rows of one input, of which there are `slots`, as a matrix of integers wants them.
class PackedInput {
  public:
    PackedInput(const Matrix& matrix, std::size_t slots, std::uint8_t* integers, float* scales, std::int32_t* sums)
        : matrix_(matrix), slots_(slots), integers_(integers), scales_(scales), sums_(sums) {}

    void pack(const Kernels& kernels, const float* x, std::size_t row) const {
        const std::size_t group = matrix_.activation_group();
        const std::size_t place = row * group;
        if (takes_bytes(matrix_.format)) {
            kernels.pack8(x, matrix_.n_in, group, slots_, integers8() + place, scales_ + row, sums_ + row);
        } else {
            kernels.pack16(x, matrix_.n_in, group, slots_, integers16() + place, scales_ + row, sums_ + row);
        }
    }

    // As a product reads `n_rows` of them, from `row` on.
    Activations rows(std::size_t row, std::size_t n_rows) const {
        const std::size_t place = row * matrix_.activation_group();
        const bool narrow = takes_bytes(matrix_.format);
        return {n_rows,
                0,
                nullptr,
                slots_,
                narrow ? nullptr : integers16() + place,
                narrow ? integers8() + place : nullptr,
                scales_ + row,
                sums_ + row};
    }

    // Zeros of the only row there is.
    std::ptrdiff_t count_zeros() const {
        const auto n_in = static_cast<std::ptrdiff_t>(matrix_.n_in);
        return takes_bytes(matrix_.format) ? std::count(integers8(), integers8() + n_in, std::int8_t{0})
                                           : std::count(integers16(), integers16() + n_in, std::int16_t{0});
    }

  private:
    std::int8_t* integers8() const { return reinterpret_cast<std::int8_t*>(integers_); }
    std::int16_t* integers16() const { return reinterpret_cast<std::int16_t*>(integers_); }

    const Matrix& matrix_;
    std::size_t slots_;
    std::uint8_t* integers_;
    float* scales_;
    std::int32_t* sums_;
};

// Floating activations as a product reads them.
Activations floating_rows(std::size_t n_rows, std::size_t stride, const float* floats) {
    return {n_rows, stride, floats, 0, nullptr, nullptr, nullptr, nullptr};
}

}  // namespace

Register make_register(std::size_t size, Needs& needs) {
    // An odd number of cache lines, so that the same numbers of many rows do not fall into few sets of a cache.
    const Register place{size, round_up(size, 2 * kLine) + kLine, needs.floats, true};
    needs.floats += place.stride * kMaxRows;
    return place;
}

Workspace::Workspace(const Needs& needs, std::size_t n_threads)
    : thread_stride_(round_up(needs.thread_floats, kLine)),
      packed_stride_(round_up(needs.packed_bytes, 4 * kLine)),
      groups_stride_(round_up(needs.packed_groups, kLine)),
      floats_(needs.floats),
      thread_floats_(thread_stride_ * n_threads),
      integers_(packed_stride_ * (kMaxRows + n_threads)),
      scales_(groups_stride_ * (kMaxRows + n_threads)),
      sums_(groups_stride_ * (kMaxRows + n_threads)) {}

Workspace::Packed Workspace::packed_at(std::size_t row, std::size_t capacity) const {
    return {capacity, integers_.get() + row * packed_stride_, scales_.get() + row * groups_stride_,
            sums_.get() + row * groups_stride_};
}

// ---------------------------------------------------------------------------------------------------------- NormShift

NormShift::NormShift(Register x, Norm norm, std::size_t shift_tensor, std::vector<Mix> mixes, Kept kept, Needs& needs)
    : x_(x),
      norm_(norm),
      shift_tensor_(shift_tensor),
      mixes_(std::move(mixes)),
      kept_(kept),
      normed_(make_register(x.size, needs)) {
    needs.thread_floats = std::max(needs.thread_floats, x.size);
}

void NormShift::write(const Pass& pass, std::size_t row, const float* h, const float* previous, std::size_t begin,
                      std::size_t end) const {
    const Workspace& space = pass.workspace;
    for (const Mix& mix : mixes_) {
        pass.kernels.lerp(h + begin, previous + begin, mix.mix + begin, end - begin, space.row(mix.out, row) + begin);
    }
    if (kept_.normed.has_value()) {
        std::copy(h + begin, h + end, space.row(*kept_.normed, row) + begin);
    }
    if (kept_.previous.has_value()) {
        std::copy(previous + begin, previous + end, space.row(*kept_.previous, row) + begin);
    }
}

void NormShift::run(Pass& pass, ThreadPool::Member& member) const {
    const Kernels& kernels = pass.kernels;
    const Workspace& space = pass.workspace;
    const std::size_t size = x_.size;
    if (pass.n_rows == 1) {
        // Every thread norms the one row for itself: that takes less time than waiting for another to do it.
        float* const h = space.thread_floats(member.index());
        kernels.layer_norm(space.row(x_, 0), norm_.weight, norm_.bias, norm_.eps, size, h);
        const auto [begin, end] = columns_of(member, size);
        if (begin < end) {
            float* const shift = pass.spans[0].state->tensor(shift_tensor_);
            write(pass, 0, h, shift, begin, end);
            std::copy(h + begin, h + end, shift + begin);
        }
        member.sync();
        return;
    }
    std::size_t begin = 0;
    std::size_t end = 0;
    for (member.claim(pass.n_rows, 1, begin, end); begin < end; member.claim(pass.n_rows, 1, begin, end)) {
        for (std::size_t row = begin; row < end; ++row) {
            kernels.layer_norm(space.row(x_, row), norm_.weight, norm_.bias, norm_.eps, size, space.row(normed_, row));
        }
    }
    member.sync();
    const std::size_t n_spans = pass.spans.size();
    // A span is one piece of work, or as many as it has rows where it is alone.
    const bool alone = n_spans == 1;
    const std::size_t n_units = alone ? pass.n_rows : n_spans;
    for (member.claim(n_units, 1, begin, end); begin < end; member.claim(n_units, 1, begin, end)) {
        for (std::size_t unit = begin; unit < end; ++unit) {
            const Span& span = pass.spans[alone ? 0 : unit];
            float* const shift = span.state->tensor(shift_tensor_);
            const std::size_t first = alone ? unit : span.first_row;
            const std::size_t last = alone ? unit + 1 : span.first_row + span.n_rows;
            for (std::size_t row = first; row < last; ++row) {
                const bool is_first = row == span.first_row;
                const float* const previous = is_first ? shift : space.row(normed_, row - 1);
                write(pass, row, space.row(normed_, row), previous, 0, size);
                // Only a span's first row reads the shift, so it may be replaced right behind.
                if (is_first) {
                    const float* const newest = space.row(normed_, span.first_row + span.n_rows - 1);
                    std::copy(newest, newest + size, shift);
                }
            }
        }
    }
    member.sync();
}

// ------------------------------------------------------------------------------------------------------------- Linear

void Residual::add(const float* low_row, const float* x, std::size_t n_out, std::size_t begin, std::size_t end,
                   float* y) const {
    for (std::size_t index = 0; index < rank; ++index) {
        const float* const column = up + index * n_out;
        const float factor = low_row[index];
        for (std::size_t output = begin; output < end; ++output) {
            y[output - begin] += column[output] * factor;
        }
    }
    if (n_kept == 0) {
        return;
    }
    for (std::size_t output = begin; output < end; ++output) {
        const float* const numbers = kept + output * n_kept;
        const std::uint16_t* const inputs = kept_inputs + output * n_kept;
        float sum = 0.0F;
        for (std::size_t index = 0; index < n_kept; ++index) {
            sum += numbers[index] * x[inputs[index]];
        }
        y[output - begin] += sum;
    }
}

Linear::Linear(std::vector<Product> products, Needs& needs) : products_(std::move(products)) {
    std::size_t sum_size = 0;
    std::size_t packed = 0;
    std::size_t groups = 0;
    for (const Product& product : products_) {
        const Matrix& matrix = product.matrix;
        n_units_ += matrix.n_units();
        has_columns_ = has_columns_ || matrix.layout == Layout::kColumns;
        if (product.needs_sum()) {
            sum_size = std::max(sum_size, product.out.size);
        }
        if (!is_integer(matrix.format)) {
            product_inputs_.push_back(0);
            continue;
        }
        const auto same = std::find_if(inputs_.begin(), inputs_.end(), [&](const Input& input) {
            return input.x.offset == product.x.offset && input.matrix.activation_group() == matrix.activation_group() &&
                   activation_bytes(input.matrix.format) == activation_bytes(matrix.format);
        });
        product_inputs_.push_back(static_cast<std::size_t>(same - inputs_.begin()));
        if (same == inputs_.end()) {
            inputs_.push_back({product.x, matrix, packed, groups});
            packed += packed_bytes(matrix);
            groups += matrix.n_activation_groups();
        }
    }
    needs.packed_bytes = std::max(needs.packed_bytes, packed);
    needs.packed_groups = std::max(needs.packed_groups, groups);
    if (sum_size != 0) {
        sum_ = make_register(sum_size, needs);
    }
}

namespace {

template <typename Input>
PackedInput packed_input(const Input& input, const Workspace::Packed& packed, std::size_t slots) {
    return {input.matrix, slots, packed.integers + input.offset * packed.capacity,
            packed.scales + input.group_offset * packed.capacity, packed.sums + input.group_offset * packed.capacity};
}

}  // namespace

void Linear::run(Pass& pass, ThreadPool::Member& member) const {
    const Workspace& space = pass.workspace;
    const bool single = pass.n_rows == 1;
    const Workspace::Packed packed = single ? space.thread_packed(member.index()) : space.shared_packed();
    std::size_t begin = 0;
    std::size_t end = 0;
    const auto pack = [&](const Input& input, std::size_t row) {
        packed_input(input, packed, pass.n_rows).pack(pass.kernels, space.row(input.x, row), row);
    };
    if (single) {
        // As with norms: packing a row takes less time than waiting for it.
        for (const Input& input : inputs_) {
            pack(input, 0);
        }
        if (has_columns_ && member.index() == 0) {
            count_zeros(pass, packed);
        }
    } else if (!inputs_.empty()) {
        const std::size_t n_packs = inputs_.size() * pass.n_rows;
        for (member.claim(n_packs, 4, begin, end); begin < end; member.claim(n_packs, 4, begin, end)) {
            for (std::size_t unit = begin; unit < end; ++unit) {
                pack(inputs_[unit / pass.n_rows], unit % pass.n_rows);
            }
        }
        member.sync();
    }
    for (member.claim(n_units_, 1, begin, end); begin < end; member.claim(n_units_, 1, begin, end)) {
        std::size_t first = 0;  // unit of the whole step at which a product begins
        for (std::size_t index = 0; index < products_.size() && first < end; ++index) {
            const std::size_t past = first + products_[index].matrix.n_units();
            if (past > begin) {
                multiply(products_[index], product_inputs_[index], pass, packed, std::max(begin, first) - first,
                         std::min(end, past) - first);
            }
            first = past;
        }
    }
    member.sync();
}

void Linear::count_zeros(const Pass& pass, const Workspace::Packed& packed) const {
    for (std::size_t index = 0; index < products_.size(); ++index) {
        const Product& product = products_[index];
        if (product.matrix.layout != Layout::kColumns) {
            continue;
        }
        const std::size_t n_in = product.matrix.n_in;
        std::ptrdiff_t zeros = 0;
        if (is_integer(product.matrix.format)) {
            zeros = packed_input(inputs_[product_inputs_[index]], packed, 1).count_zeros();
        } else {
            const float* const x = pass.workspace.row(product.x, 0);
            zeros = std::count(x, x + n_in, 0.0F);
        }
        pass.inputs_seen.fetch_add(n_in, std::memory_order_relaxed);
        pass.inputs_active.fetch_add(n_in - static_cast<std::size_t>(zeros), std::memory_order_relaxed);
    }
}

void Linear::multiply(const Product& product, std::size_t input, const Pass& pass, const Workspace::Packed& packed,
                      std::size_t first_unit, std::size_t end_unit) const {
    const Workspace& space = pass.workspace;
    const Matrix& matrix = product.matrix;
    const Activations x = is_integer(matrix.format)
                              ? packed_input(inputs_[input], packed, pass.n_rows).rows(0, pass.n_rows)
                              : floating_rows(pass.n_rows, product.x.stride, space.row(product.x, 0));
    const Register& target = product.needs_sum() ? sum_ : product.out;
    pass.kernels.multiply(matrix, x, first_unit, end_unit, space.row(target, 0), target.stride, pass.skip_zeros);
    const std::size_t begin = first_unit * matrix.unit_outputs();
    const std::size_t n_outputs = std::min(end_unit * matrix.unit_outputs(), matrix.n_out) - begin;
    for (std::size_t row = 0; row < pass.n_rows; ++row) {
        float* const y = space.row(target, row) + begin;
        const Residual& residual = product.residual;
        if (residual.rank != 0 || residual.n_kept != 0) {
            residual.add(space.row(residual.low, row), space.row(product.x, row), matrix.n_out, begin,
                         begin + n_outputs, y);
        }
        if (product.bias != nullptr || product.activation != Activation::kNone) {
            pass.kernels.activate(product.activation, product.bias == nullptr ? nullptr : product.bias + begin,
                                  n_outputs, y);
        }
        if (product.combine != Combine::kSet) {
            pass.kernels.combine(product.combine, y, space.row(product.a, row) + begin,
                                 space.row(product.b, row) + begin, n_outputs, space.row(product.out, row) + begin);
        }
    }
}

// ------------------------------------------------------------------------------------------------------------- Logits

Logits::Logits(Register x, Norm norm, Matrix head, Needs& needs)
    : x_(x), norm_(norm), head_(head), normed_(make_register(x.size, needs)) {
    needs.thread_floats = std::max(needs.thread_floats, normed_.stride);
    if (is_integer(head.format)) {
        needs.packed_bytes = std::max(needs.packed_bytes, packed_bytes(head));
        needs.packed_groups = std::max(needs.packed_groups, head.n_activation_groups());
    }
}

void Logits::run(Pass& pass, ThreadPool::Member& member) const {
    const std::size_t n_rows = pass.output_rows.size();
    if (n_rows == 0) {
        return;
    }
    const Workspace& space = pass.workspace;
    const bool packs = is_integer(head_.format);
    const bool single = n_rows == 1;
    const Workspace::Packed place = single ? space.thread_packed(member.index()) : space.shared_packed();
    const PackedInput packed(head_, n_rows, place.integers, place.scales, place.sums);
    float* const normed = single ? space.thread_floats(member.index()) : space.row(normed_, 0);
    std::size_t begin = 0;
    std::size_t end = 0;
    const auto prepare = [&](std::size_t output) {
        float* const h = normed + output * normed_.stride;
        pass.kernels.layer_norm(space.row(x_, pass.output_rows[output]), norm_.weight, norm_.bias, norm_.eps, x_.size,
                                h);
        if (packs) {
            packed.pack(pass.kernels, h, output);
        }
    };
    if (single) {
        std::fill(normed + x_.size, normed + normed_.stride, 0.0F);
        prepare(0);
    } else {
        for (member.claim(n_rows, 1, begin, end); begin < end; member.claim(n_rows, 1, begin, end)) {
            for (std::size_t output = begin; output < end; ++output) {
                prepare(output);
            }
        }
        member.sync();
    }
    const auto rows = [&](std::size_t first, std::size_t count) {
        return packs ? packed.rows(first, count)
                     : floating_rows(count, normed_.stride, normed + first * normed_.stride);
    };
    // One array takes them all where the rows lie evenly in it, as they do unless the caller scattered them.
    const std::ptrdiff_t apart = single ? 0 : pass.logits[1] - pass.logits[0];
    bool even = apart >= 0;
    for (std::size_t output = 1; output < n_rows; ++output) {
        even = even && pass.logits[output] - pass.logits[output - 1] == apart;
    }
    const std::size_t n_units = head_.n_units();
    for (member.claim(n_units, 1, begin, end); begin < end; member.claim(n_units, 1, begin, end)) {
        if (even) {
            pass.kernels.multiply(head_, rows(0, n_rows), begin, end, pass.logits[0], static_cast<std::size_t>(apart),
                                  pass.skip_zeros);
            continue;
        }
        for (std::size_t output = 0; output < n_rows; ++output) {
            pass.kernels.multiply(head_, rows(output, 1), begin, end, pass.logits[output], 0, pass.skip_zeros);
        }
    }
    member.sync();
}

}  // namespace goslet
