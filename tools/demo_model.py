"""RWKV-7 in PyTorch for training and for measuring: the model of the demonstration checkpoint.

The module tree spells the official checkpoint names (``blocks.0.att.receptance.weight`` and so on), so that
``state_dict()`` *is* the published layout and PyPI's ``rwkv`` package loads the file as it stands.

The recurrence comes twice. ``wkv7_recurrent`` goes token by token and is the definition. ``wkv7_chunked`` computes the
same numbers with batched matrix products over chunks of tokens, is differentiable, and runs wherever torch runs.

Sources: the RWKV-7 paper (Peng et al. 2025) and BlinkDL's public code for the model and its initial values; the WY form
of products of diagonal-plus-rank-one matrices (Bischof and Van Loan 1987; Yang et al. 2024) for the chunks.

Letters in shapes: B lanes, T tokens, D width, H heads, N = D / H head size, L layers, V vocabulary, c chunk length.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DECAY_RATE = math.exp(-0.5)  # log w = -DECAY_RATE * sigmoid(.), so w lies in (0.545, 1)
GROUP_NORM_EPS = 64e-5
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0


@dataclass(frozen=True)
class DemoConfig:
    """Shape of a model. ``rank_*``: widths of the low-rank paths for decay, in-context rate, value mix and gate."""

    vocab: int = 4096
    width: int = 256
    layers: int = 5
    head: int = 64
    rank_w: int = 32
    rank_a: int = 32
    rank_v: int = 16
    rank_g: int = 64

    @property
    def heads(self) -> int:
        """H."""
        return self.width // self.head

    def as_dict(self) -> dict[str, int]:
        """The fields by name."""
        return asdict(self)

    @staticmethod
    def of_state_dict(tensors: dict[str, Tensor]) -> DemoConfig:
        """Read the shape back from a checkpoint in the official layout."""
        vocab, width = tensors["emb.weight"].shape
        layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
        return DemoConfig(
            vocab=vocab,
            width=width,
            layers=layers,
            head=tensors["blocks.0.att.r_k"].shape[1],
            rank_w=tensors["blocks.0.att.w1"].shape[1],
            rank_a=tensors["blocks.0.att.a1"].shape[1],
            rank_v=tensors["blocks.1.att.v1"].shape[1] if layers > 1 else 16,
            rank_g=tensors["blocks.0.att.g1"].shape[1],
        )


class State(NamedTuple):
    """All that a model remembers: att_shift and ffn_shift [L, B, D], wkv [L, B, H, N(value), N(key)], float32."""

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor

    def detach(self) -> State:
        """The same numbers, out of the autograd graph."""
        return State(*(part.detach() for part in self))

    def reset_lanes(self, lanes: Tensor) -> State:
        """Zero the lanes that the boolean vector ``lanes`` [B] names; the others keep their state."""
        keep = (~lanes).to(self.wkv.dtype)
        return State(
            self.att_shift * keep[None, :, None],
            self.wkv * keep[None, :, None, None, None],
            self.ffn_shift * keep[None, :, None],
        )


def wkv7_recurrent(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, z: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition: S_t = S_{t-1} (diag(w_t) + z_t b_t^T) + v_t k_t^T and y_t = S_t r_t, one token after another.

    r, log_w, k, v, z, b: [B, T, H, N]; state: [B, H, N(value), N(key)]. In RWKV-7 z = -k_hat and b = k_hat * a.
    Returns y [B, T, H, N] and the state after the last token.
    """
    out = []
    for t in range(r.shape[1]):
        erased = (state @ z[:, t, :, :, None]) * b[:, t, :, None, :]
        state = state * log_w[:, t, :, None, :].exp() + erased + v[:, t, :, :, None] * k[:, t, :, None, :]
        out.append((state @ r[:, t, :, :, None]).squeeze(-1))
    return torch.stack(out, dim=1), state


class _InverseOfUnitLower(torch.autograd.Function):
    """(I - A)^-1 for strictly lower triangular A [M, c, c].

    Substitution by blocks rather than the product (I + A)(I + A^2)(I + A^4)...: powers of A grow like binomial
    coefficients when keys repeat, and float32 then loses every digit, while the inverse itself stays small.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        inverse: Tensor = torch.linalg.solve_triangular(eye - a, eye.expand_as(a), upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        transposed = inverse.mT
        return torch.bmm(torch.bmm(transposed, grad), transposed)


def wkv7_chunked(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, z: Tensor, b: Tensor, state: Tensor, chunk: int = 32
) -> tuple[Tensor, Tensor]:
    """The same as ``wkv7_recurrent``, by chunks of ``chunk`` tokens; only one small product per chunk is sequential.

    Write W_t for the product of the decays since the chunk began, and S_t = S'_t diag(W_t). Then S' only ever gains
    rank-one terms, and u_t = S_{t-1} z_t solves a unit lower triangular system within the chunk. Everything that does
    not touch the chunk's first state is computed for all chunks at once; 1/W_t is at most 0.545^-c, 3e8 for c = 32,
    and only ever meets a W_s with s >= t, so float32 is enough. Any T is allowed: the tail is padded with steps that
    change nothing.
    """
    lanes, length, heads, size = r.shape
    pad = -length % chunk
    count = (length + pad) // chunk

    def split(x: Tensor) -> Tensor:  # [B, T, H, N] -> [count * B * H, chunk, N]
        if pad:
            x = F.pad(x, (0, 0, 0, 0, 0, pad))
        return x.view(lanes, count, chunk, heads, size).permute(1, 0, 3, 2, 4).reshape(-1, chunk, size)

    r, log_w, k, v, z, b = (split(x) for x in (r, log_w, k, v, z, b))
    total = log_w.cumsum(1)
    grown = (-total).exp()
    end = total[:, -1:].exp()  # [M, 1, N]: the decay of the whole chunk
    readers = torch.cat([z * (total - log_w).exp(), r * total.exp()], dim=1)  # [M, 2c, N]
    writers = torch.cat([b * grown, k * grown], dim=1)  # [M, 2c, N]

    scores = readers @ writers.mT  # [M, 2c, 2c]; z sees what came before it, r also its own token
    index = torch.arange(chunk, device=r.device)
    before, upto = index[:, None] > index[None, :], index[:, None] >= index[None, :]
    mask = torch.cat([before.repeat(1, 2), upto.repeat(1, 2)])
    scores = torch.where(mask, scores, torch.zeros((), dtype=scores.dtype, device=scores.device))
    by_value = scores[:, :, chunk:] @ v  # [M, 2c, N]
    inverse = _InverseOfUnitLower.apply(scores[:, :chunk, :chunk])  # type: ignore[no-untyped-call]

    # u = solved_state S_0^T + solved_value, stored side by side: [M, c, 2N]
    solved = inverse @ torch.cat([readers[:, :chunk], by_value[:, :chunk]], dim=2)
    direct = torch.cat([readers[:, chunk:], by_value[:, chunk:]], dim=2)
    out = torch.baddbmm(direct, scores[:, chunk:, :chunk], solved)  # y = out[..., :N] S_0^T + out[..., N:]

    # over a chunk: S_end = S_0 diag(end) + S_0 erase + write
    ending = writers * end
    erase, write = (solved.mT @ ending[:, :chunk]).split(size, dim=1)
    write = torch.baddbmm(write, v.mT, ending[:, chunk:])
    erase, write, end = (x.reshape(count, lanes * heads, *x.shape[1:]) for x in (erase, write, end))
    carried = state.reshape(lanes * heads, size, size)
    firsts = []
    for i in range(count):
        firsts.append(carried)
        carried = torch.baddbmm(torch.addcmul(write[i], carried, end[i]), carried, erase[i])

    y = torch.baddbmm(out[:, :, size:], out[:, :, :size], torch.cat(firsts).mT)
    y = y.view(count, lanes, heads, chunk, size).permute(1, 0, 3, 2, 4).reshape(lanes, -1, heads, size)
    return y[:, :length], carried.view(lanes, heads, size, size)


def _orthogonal(rows: int, columns: int, gain: float) -> Tensor:
    return nn.init.orthogonal_(torch.empty(rows, columns), gain=gain)


class TimeMix(nn.Module):
    """RWKV-7 attention block. Layer 0 defines ``v_first`` and has no v0, v1, v2."""

    x_r: Tensor
    x_w: Tensor
    x_k: Tensor
    x_v: Tensor
    x_a: Tensor
    x_g: Tensor
    w1: Tensor
    w2: Tensor
    a1: Tensor
    a2: Tensor
    g1: Tensor
    g2: Tensor

    def __init__(self, config: DemoConfig, layer: int) -> None:
        super().__init__()
        width, heads, size = config.width, config.heads, config.head
        self.heads, self.size, self.layer = heads, size, layer
        self.reach = 1.0  # factor on what a removal takes away; with 2, which no released model has, it can turn signs
        depth = layer / max(1, config.layers - 1)  # 0 at the first layer, 1 at the last
        height = 1 - layer / config.layers  # 1 at the first, towards 0 at the last
        channel = torch.arange(width) / width
        for name, power in (("r", 0.2), ("w", 0.9), ("k", 0.7), ("v", 0.7), ("a", 0.9), ("g", 0.2)):
            setattr(self, f"x_{name}", nn.Parameter((1 - channel.pow(power * height)).view(1, 1, -1)))

        ramp = torch.arange(width) / (width - 1)
        zigzag = ((torch.arange(width) % size) - (size - 1) / 2) / ((size - 1) / 2)
        zigzag = zigzag * zigzag.abs()
        linear = ramp - 0.5
        decay = -6 + 6 * ramp.pow(1 + depth**0.3)
        self.w0 = nn.Parameter((decay + 0.5 + zigzag * 2.5).view(1, 1, -1))
        self.a0 = nn.Parameter((-0.19 + zigzag * 0.3 + linear * 0.4).view(1, 1, -1))
        for name, rank in (("w", config.rank_w), ("a", config.rank_a), ("g", config.rank_g)):
            setattr(self, f"{name}1", nn.Parameter(torch.zeros(width, rank)))
            setattr(self, f"{name}2", nn.Parameter(_orthogonal(rank, width, 0.1)))
        nn.init.orthogonal_(self.g1, gain=0.5)
        nn.init.orthogonal_(self.g2, gain=1.0)
        if layer > 0:
            self.v0 = nn.Parameter((0.73 - linear * 0.4).view(1, 1, -1))
            self.v1 = nn.Parameter(torch.zeros(width, config.rank_v))
            self.v2 = nn.Parameter(_orthogonal(config.rank_v, width, 0.1))
        self.k_k = nn.Parameter((0.71 - linear * 0.1).view(1, 1, -1))
        self.k_a = nn.Parameter(torch.full((1, 1, width), 1.02))
        self.r_k = nn.Parameter(torch.full((heads, size), -0.04))
        self.receptance = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        bound = width**-0.5
        for matrix, scale in ((self.receptance, 0.5), (self.key, 0.1), (self.value, 0.5)):
            nn.init.uniform_(matrix.weight, -scale * bound, scale * bound)
        nn.init.zeros_(self.output.weight)
        self.ln_x = nn.GroupNorm(heads, width, eps=GROUP_NORM_EPS)
        nn.init.constant_(self.ln_x.weight, ((1 + layer) / config.layers) ** 0.7)

    def forward(
        self, x: Tensor, shift: Tensor, wkv: Tensor, v_first: Tensor | None, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, T, D], shift [B, D], wkv [B, H, N, N] -> (out [B, T, D], shift, wkv, v_first). chunk 0: by token."""
        lanes, length, _ = x.shape
        past = torch.cat([shift[:, None], x[:, :-1]], dim=1) - x
        r = self.receptance(x + past * self.x_r)
        log_w = -DECAY_RATE * torch.sigmoid(self.w0 + torch.tanh((x + past * self.x_w) @ self.w1) @ self.w2)
        k = self.key(x + past * self.x_k)
        x_v = x + past * self.x_v
        v = self.value(x_v)
        a = torch.sigmoid(self.a0 + (x + past * self.x_a) @ self.a1 @ self.a2)
        g = torch.sigmoid((x + past * self.x_g) @ self.g1) @ self.g2
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(self.v0 + x_v @ self.v1 @ self.v2)

        by_head = (lanes, length, self.heads, self.size)
        k_hat = F.normalize((k * self.k_k).view(by_head), dim=-1, eps=1e-12)
        k = (k * (1 + (a - 1) * self.k_a)).view(by_head)
        r, v_heads = r.view(by_head), v.view(by_head)
        operands = (r, log_w.view(by_head), k, v_heads, -k_hat, k_hat * a.view(by_head) * self.reach)
        with torch.autocast(x.device.type, enabled=False):  # the recurrence never runs below the state's precision
            r32, log_w32, k32, v32, z32, b32 = (operand.to(wkv.dtype) for operand in operands)
            if chunk:
                y, wkv = wkv7_chunked(r32, log_w32, k32, v32, z32, b32, wkv, chunk=chunk)
            else:
                y, wkv = wkv7_recurrent(r32, log_w32, k32, v32, z32, b32, wkv)

        y = F.layer_norm(y, (self.size,), eps=GROUP_NORM_EPS).reshape(x.shape) * self.ln_x.weight + self.ln_x.bias
        y = y + ((r * k * self.r_k).sum(-1, keepdim=True) * v_heads).reshape(x.shape)
        return self.output(y * g), x[:, -1], wkv, v_first


class ChannelMix(nn.Module):
    """RWKV-7 feed-forward block: W_v relu(W_k x)^2."""

    def __init__(self, config: DemoConfig, layer: int) -> None:
        super().__init__()
        width = config.width
        channel = torch.arange(width) / width
        self.x_k = nn.Parameter((1 - channel.pow((1 - layer / config.layers) ** 4)).view(1, 1, -1))
        self.key = nn.Linear(width, 4 * width, bias=False)
        self.value = nn.Linear(4 * width, width, bias=False)
        nn.init.uniform_(self.key.weight, -0.5 * width**-0.5, 0.5 * width**-0.5)
        nn.init.zeros_(self.value.weight)

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, D], shift [B, D] -> (out [B, T, D], shift)."""
        past = torch.cat([shift[:, None], x[:, :-1]], dim=1) - x
        return self.value(torch.relu(self.key(x + past * self.x_k)).square()), x[:, -1]


class Block(nn.Module):
    """One layer; the first also has ln0, which follows the embedding."""

    def __init__(self, config: DemoConfig, layer: int) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.width)
        self.ln1 = nn.LayerNorm(config.width)
        self.ln2 = nn.LayerNorm(config.width)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config, layer)


class DemoModel(nn.Module):
    """RWKV-7. ``state_dict()`` is the official checkpoint layout."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.ln_out = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        nn.init.normal_(self.emb.weight, std=0.1)
        nn.init.normal_(self.head.weight, std=0.5 * config.width**-0.5)

    def zero_state(self, lanes: int) -> State:
        """The state before any token."""
        config, like = self.config, self.head.weight
        shift = like.new_zeros(config.layers, lanes, config.width)
        return State(shift, like.new_zeros(config.layers, lanes, config.heads, config.head, config.head), shift.clone())

    def forward(self, tokens: Tensor, state: State, chunk: int = 32) -> tuple[Tensor, State]:
        """tokens [B, T] int64 -> (logits [B, T, V], state after the last token). ``chunk`` 0: token by token."""
        x = self.emb(tokens)
        att_shift, wkv, ffn_shift = [], [], []
        v_first = None
        for i, module in enumerate(self.blocks):
            block = cast(Block, module)
            if i == 0:
                x = block.ln0(x)
            out, shift, matrix, v_first = block.att(block.ln1(x), state.att_shift[i], state.wkv[i], v_first, chunk)
            x = x + out
            att_shift.append(shift)
            wkv.append(matrix)
            out, shift = block.ffn(block.ln2(x), state.ffn_shift[i])
            x = x + out
            ffn_shift.append(shift)
        logits = self.head(self.ln_out(x))
        return logits, State(torch.stack(att_shift), torch.stack(wkv), torch.stack(ffn_shift))


def load_checkpoint(path: Path) -> DemoModel:
    """Open a checkpoint in the official layout (any float type) as a float32 model."""
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    model = DemoModel(DemoConfig.of_state_dict(tensors))
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.eval()


@torch.no_grad()
def score_text(
    model: DemoModel, tokens: Tensor, *, step: int = 512, chunk: int = 32, start_token: int | None = END_OF_TEXT_ID
) -> float:
    """Total negative log-likelihood of tokens [T] in nats, read in one pass with the state carried from end to end.

    Every token is predicted: the first from ``start_token``, or, where that is None, it is left out of the sum.
    """
    device = model.head.weight.device
    tokens = tokens.to(device=device, dtype=torch.int64)
    if start_token is not None:
        tokens = torch.cat([tokens.new_tensor([start_token]), tokens])
    state, total = model.zero_state(1), 0.0
    for start in range(0, len(tokens) - 1, step):
        inputs = tokens[start : start + step + 1]
        logits, state = model(inputs[None, :-1], state, chunk)
        total += F.cross_entropy(logits[0], inputs[1:], reduction="sum").item()
    return total
