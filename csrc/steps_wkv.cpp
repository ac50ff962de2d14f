// The steps that move a state on: tokens of a session one behind the other, heads and sessions side by side.
#include <algorithm>

#include "steps.h"

namespace goslet {
namespace {

// Channels of RWKV-4 that a thread takes at a time.
constexpr std::size_t kChannels = 64;

// Calls body(span, part) for `n_parts` parts of every session, shared among the team.
template <typename Body>
void for_each_part(const Pass& pass, ThreadPool::Member& member, std::size_t n_parts, Body body) {
    const std::size_t n_units = pass.spans.size() * n_parts;
    std::size_t begin = 0;
    std::size_t end = 0;
    for (member.claim(n_units, 1, begin, end); begin < end; member.claim(n_units, 1, begin, end)) {
        for (std::size_t unit = begin; unit < end; ++unit) {
            body(pass.spans[unit / n_parts], unit % n_parts);
        }
    }
    member.sync();
}

}  // namespace

void Wkv4::run(Pass& pass, ThreadPool::Member& member) const {
    const Workspace& space = pass.workspace;
    const std::size_t size = in_.out.size;
    for_each_part(pass, member, (size + kChannels - 1) / kChannels, [&](const Span& span, std::size_t part) {
        const std::size_t at = part * kChannels;
        Wkv4Channels args{};
        args.n = std::min(kChannels, size - at);
        args.decay = in_.decay + at;
        args.first = in_.first + at;
        args.aa = span.state->tensor(in_.aa) + at;
        args.bb = span.state->tensor(in_.bb) + at;
        args.pp = span.state->tensor(in_.pp) + at;
        for (std::size_t row = span.first_row; row < span.first_row + span.n_rows; ++row) {
            args.r = space.row(in_.r, row) + at;
            args.k = space.row(in_.k, row) + at;
            args.v = space.row(in_.v, row) + at;
            args.y = space.row(in_.out, row) + at;
            pass.kernels.wkv4(args);
        }
    });
}

void Wkv6::run(Pass& pass, ThreadPool::Member& member) const {
    const Workspace& space = pass.workspace;
    for_each_part(pass, member, in_.n_head, [&](const Span& span, std::size_t head) {
        const std::size_t at = head * in_.head_size;
        Wkv6Head args{};
        args.head_size = in_.head_size;
        args.bonus = in_.bonus + at;
        args.norm_weight = in_.norm.weight + at;
        args.norm_bias = in_.norm.bias + at;
        args.norm_eps = in_.norm.eps;
        args.state = span.state->tensor(in_.state) + at * in_.head_size;
        for (std::size_t row = span.first_row; row < span.first_row + span.n_rows; ++row) {
            args.r = space.row(in_.r, row) + at;
            args.w = (in_.w.has_value() ? space.row(*in_.w, row) : in_.decay) + at;
            args.k = space.row(in_.k, row) + at;
            args.v = space.row(in_.v, row) + at;
            args.g = in_.g.has_value() ? space.row(*in_.g, row) + at : nullptr;
            args.y = space.row(in_.out, row) + at;
            pass.kernels.wkv6(args);
        }
    });
}

void Wkv7::run(Pass& pass, ThreadPool::Member& member) const {
    const Workspace& space = pass.workspace;
    for_each_part(pass, member, in_.n_head, [&](const Span& span, std::size_t head) {
        const std::size_t at = head * in_.head_size;
        Wkv7Head args{};
        args.head_size = in_.head_size;
        args.k_k = in_.k_k + at;
        args.k_a = in_.k_a + at;
        args.r_k = in_.r_k + at;
        args.norm_weight = in_.norm.weight + at;
        args.norm_bias = in_.norm.bias + at;
        args.norm_eps = in_.norm.eps;
        args.state = span.state->tensor(in_.state) + at * in_.head_size;
        for (std::size_t row = span.first_row; row < span.first_row + span.n_rows; ++row) {
            args.r = space.row(in_.r, row) + at;
            args.w = space.row(in_.w, row) + at;
            args.k = space.row(in_.k, row) + at;
            args.v = space.row(in_.v, row) + at;
            args.a = space.row(in_.a, row) + at;
            args.g = space.row(in_.g, row) + at;
            args.value_mix = in_.is_first ? nullptr : space.row(in_.value_mix, row) + at;
            args.first_value = space.row(in_.first_value, row) + at;
            args.y = space.row(in_.out, row) + at;
            pass.kernels.wkv7(args);
        }
    });
}

void TokenProduct::run(Pass& pass, ThreadPool::Member& member) const {
    const Workspace& space = pass.workspace;
    std::size_t begin = 0;
    std::size_t end = 0;
    for (member.claim(pass.n_rows, 1, begin, end); begin < end; member.claim(pass.n_rows, 1, begin, end)) {
        for (std::size_t row = begin; row < end; ++row) {
            pass.kernels.small_product(space.row(x_, row), space.row(matrix_, row), x_.size, space.row(out_, row));
        }
    }
    member.sync();
}

}  // namespace goslet
