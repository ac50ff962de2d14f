"""What RWKV-5 and RWKV-6 share: a matrix state that decays by key, read before it is written.

Source: Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence" (2024), section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import no_type_check

from onnx import FunctionProto
from onnxscript import script
from onnxscript.onnx_opset import opset21 as op
from onnxscript.values import Opset
from torch import Tensor

from ...spec import ModelSpec, StateSpec, StateTensor
from .blocks import Operator

_goslet = Opset("goslet", 1)


def wkv(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence for one token, in plain form: y = r·(diag(u)·kᵀv + S), S ← diag(w)·S + kᵀv.

    Args:
        r: receptance [B, H, N].
        k: key [B, H, N].
        v: value [B, H, N].
        w: decay, within (0, 1): [H, N] where it is the same for every token (5), [B, H, N] where it is not (6).
        u: the present token's weight over the past's [H, N].
        state: [B, H, N (key), N (value)].

    Returns:
        y [B, H, N], read from the old state, and the new state in its shape.
    """
    written = k.unsqueeze(-1) @ v.unsqueeze(-2)
    y = r.unsqueeze(-2) @ (u.unsqueeze(-1) * written + state)
    return y.squeeze(-2), w.unsqueeze(-1) * state + written


@script(_goslet, default_opset=op)
@no_type_check  # onnxscript reads the source; its operators take tensors of any type
def Wkv6(r, k, v, w, u, state):  # noqa: D103 - an ONNX function; `wkv` documents it
    last = op.Constant(value_ints=[-1])
    second_last = op.Constant(value_ints=[-2])
    written = op.MatMul(op.Unsqueeze(k, last), op.Unsqueeze(v, second_last))
    seen = op.Add(op.Mul(op.Unsqueeze(u, last), written), state)
    y = op.Squeeze(op.MatMul(op.Unsqueeze(r, second_last), seen), second_last)
    state_out = op.Add(op.Mul(op.Unsqueeze(w, last), state), written)
    return y, state_out


def _named(name: str) -> Callable[[], FunctionProto]:
    def function() -> FunctionProto:
        proto: FunctionProto = Wkv6.to_function_proto()
        proto.name = name
        return proto

    return function


def operator(name: str) -> Operator:
    """The recurrence as an operator of this name; the body is the same for all."""
    return Operator(
        name=name,
        reference=wkv,
        output_shapes=lambda r, k, v, w, u, state: (r.shape, state.shape),
        function=_named(name),
    )


def state_spec(spec: ModelSpec) -> StateSpec:
    """Per layer the two shift vectors and the WKV matrix, rows by key and columns by value."""
    matrix = (spec.n_head, spec.head_size, spec.head_size)
    tensors = []
    for layer in range(spec.n_layer):
        tensors.append(StateTensor(f"{layer}.att_shift", (spec.n_embd,), "channel"))
        tensors.append(StateTensor(f"{layer}.wkv", matrix, "head,key,value"))
        tensors.append(StateTensor(f"{layer}.ffn_shift", (spec.n_embd,), "channel"))
    return StateSpec(tuple(tensors))
