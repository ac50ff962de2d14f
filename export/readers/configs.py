"""What a config.json says of a model's numbers, key by key, and whether goslet computes that.

A key is *read* (it becomes an eps, a head from the embedding, a norm that is left out), is a *size* that must be the
tensors' own, is *fixed* (goslet computes one value of it and refuses any other by name), or changes no number of the
model. A key that no table has is named in a note, unless it speaks of an activation or of an eps by its name: then it
must say what goslet computes.

Sources: flash-linear-attention's ``RWKV7Config`` and ``RWKV6Config`` with their layers, transformers' ``RwkvConfig``
and its coming ``Rwkv7Config`` (pull request 47787), and the ``Rwkv5Config`` and ``Rwkv6Config`` that come with their
models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..models.tensors import LAYER_NORM_EPS, Shapes

Config = Mapping[str, Any]
_SHOWN_CHARACTERS = 60
_RELU_SQUARED = ("sqrelu", "relu2")


@dataclass(frozen=True)
class Fixed:
    """A key of which goslet computes one value.

    Attributes:
        values: the ways to write it.
        computed: what that is, for people.
    """

    values: tuple[Any, ...]
    computed: str


@dataclass(frozen=True)
class Family:
    """One library's form of a folder.

    Attributes:
        library: whose code says what its keys mean.
        read: keys that `goslet.export.readers.hf_folder` reads.
        sizes: keys that must agree with the tensors, and how these tell the size: from all shapes by RWKV's own names,
            None where they do not.
        fixed: keys of which goslet computes one value.
        irrelevant: keys that change no number of the model.
        eps: the key of the LayerNorms' eps, if there is one that may differ from RWKV's 1e-5.
    """

    library: str
    read: frozenset[str]
    sizes: Mapping[str, Callable[[Shapes], int | None]]
    fixed: Mapping[str, Fixed]
    irrelevant: frozenset[str]
    eps: str | None = None


def _axis(name: str, axis: int) -> Callable[[Shapes], int | None]:
    def size(shapes: Shapes) -> int | None:
        shape = shapes.get(name, ())
        return shape[axis] if axis < len(shape) else None

    return size


def _layers(shapes: Shapes) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})


def _head_size(shapes: Shapes) -> int | None:
    """Of versions 5 and 6, whose first layer's bonus or decay has a row for each head."""
    width = _axis("emb.weight", 1)(shapes)
    heads = _axis("blocks.0.att.time_faaaa", 0)(shapes)
    return width // heads if width and heads else None


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_EVERY_FAMILY_READS = frozenset({"model_type", "tie_word_embeddings", "transformers_weights"})
_EVERY_FAMILY_FIXES = {
    "quantization_config": Fixed(({},), "weights that no other library has quantized"),
    "pruned_heads": Fixed(({},), "every head"),
}
_TOP_SIZES = {
    "vocab_size": _axis("emb.weight", 0),
    "hidden_size": _axis("emb.weight", 1),
    "num_hidden_layers": _layers,
    "intermediate_size": _axis("blocks.0.ffn.key.weight", 0),
}
_LORA_SIZES = {
    "decay_low_rank_dim": _axis("blocks.0.att.w1", 1),
    "a_low_rank_dim": _axis("blocks.0.att.a1", 1),
    "gate_low_rank_dim": _axis("blocks.0.att.g1", 1),
    # Layer 0's is never read, and its place may be filled with anything.
    "v_low_rank_dim": _axis("blocks.1.att.v1", 1),
}
# Of every model of transformers: what a file is, how it is trained, run and sampled from; `dtype` is what it is
# computed in there, while goslet keeps float32.
_OF_ANY_MODEL = _names(
    """
    _attn_implementation_autoset _commit_hash _name_or_path architectures auto_map bos_token_id cache_dir
    chunk_size_feed_forward cls_token_id custom_pipelines decoder_start_token_id dtype eos_token_id finetuning_task
    id2label is_encoder_decoder is_decoder label2id max_position_embeddings name_or_path num_labels output_attentions
    output_hidden_states pad_token_id prefix problem_type return_dict sep_token_id task_specific_params
    tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype torchscript transformers_version unsloth_version
    use_bfloat16 use_cache add_cross_attention cross_attention_hidden_size initializer_range

    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens
    target_lookbehind temperature top_k top_p typical_p
    """
)
# How its kernels and losses are put together: the same numbers but for rounding. `hidden_ratio` is what
# `intermediate_size` was made from.
_OF_FLA = _names(
    """
    attn_mode fuse_cross_entropy fuse_linear_cross_entropy fuse_norm hidden_ratio input_precision use_l2warp
    wkv_precision
    """
)
_NO_ATTENTION = Fixed(([], {}), "RWKV in every layer, none with attention")
_ACTIVATION = Fixed(_RELU_SQUARED, "relu², which is called sqrelu or relu2")

FLA7 = Family(
    library="flash-linear-attention",
    read=_EVERY_FAMILY_READS | {"norm_eps", "norm_bias", "norm_first"},
    sizes={
        **_TOP_SIZES,
        **_LORA_SIZES,
        "head_dim": _axis("blocks.0.att.r_k", 1),
        "num_heads": _axis("blocks.0.att.r_k", 0),
        "value_dim": _axis("emb.weight", 1),
    },
    fixed={**_EVERY_FAMILY_FIXES, "hidden_act": _ACTIVATION, "attn": _NO_ATTENTION},
    irrelevant=_OF_ANY_MODEL | _OF_FLA,
    eps="norm_eps",
)
FLA6 = Family(
    library="flash-linear-attention",
    read=FLA7.read,
    sizes={
        **_TOP_SIZES,
        "num_heads": _axis("blocks.0.att.time_faaaa", 0),
        "proj_low_rank_dim": _axis("blocks.0.att.time_maa_w2", 1),
        "gate_low_rank_dim": _axis("blocks.0.att.time_decay_w1", 1),
    },
    fixed={
        **FLA7.fixed,
        "expand_k": Fixed((1,), "keys as wide as the model"),
        "expand_v": Fixed((1,), "values as wide as the model"),
        "use_glu": Fixed((False,), "no gated linear unit"),
        "use_short_conv": Fixed((False,), "no convolutions"),
    },
    irrelevant=FLA7.irrelevant | {"conv_size", "share_conv_kernel"},
    eps="norm_eps",
)
NATIVE7 = Family(
    library="transformers",
    read=_EVERY_FAMILY_READS | {"norm_eps", "norm_bias"},
    sizes={key: size for key, size in FLA7.sizes.items() if key != "value_dim"},
    fixed={
        **_EVERY_FAMILY_FIXES,
        "use_deep_embed": Fixed((False,), "a model without vectors from outside its file"),
        "hidden_act": _ACTIVATION,
    },
    # The state's type there only rounds it; goslet's is float32.
    irrelevant=_OF_ANY_MODEL | {"wkv_state_dtype"},
    eps="norm_eps",
)
OLD = Family(
    library="transformers",
    read=_EVERY_FAMILY_READS | {"head_size_divisor"},
    sizes={**_TOP_SIZES, "attention_hidden_size": _axis("emb.weight", 1), "head_size": _head_size},
    fixed={
        **_EVERY_FAMILY_FIXES,
        # ln_out is made without it there, so another value is two eps in one model.
        "layer_norm_epsilon": Fixed((LAYER_NORM_EPS,), "one eps for all LayerNorms, and ln_out's is always 1e-05"),
    },
    # `rescale_every` halves the residual and what is added to it together against overflow in fp16; the next norm
    # undoes it but for its eps, by which transformers errs (by 2e-4 of range where it halves in every layer).
    # `num_attention_heads` is the number of heads or their size, as the release goes.
    irrelevant=_OF_ANY_MODEL | {"context_length", "model_version", "num_attention_heads", "rescale_every"},
)
FAMILIES = (FLA7, FLA6, NATIVE7, OLD)

_OF_AN_ACTIVATION = re.compile(r"(^|_)act(ivation)?(_fn|_func|_function)?$", re.IGNORECASE)
_OF_AN_EPS = re.compile(r"(^|_)eps(ilon)?(_|$)", re.IGNORECASE)


def check_config(config: Config, family: Family, shapes: Shapes, file: Path) -> tuple[str, ...]:
    """Hold a config.json to what its folder's tensors are and to what goslet computes.

    Args:
        config: the file's object; a key that is null says nothing.
        family: whose keys they are.
        shapes: every tensor's, by RWKV's own names.
        file: the file, for messages.

    Returns:
        what its owner should know: the keys that nobody here knows.

    Raises:
        CheckpointError: a key says what goslet does not compute, or the tensors are of another size.
    """
    said = {key: value for key, value in config.items() if value is not None}
    eps = LAYER_NORM_EPS if family.eps is None else positive(config, family.eps, LAYER_NORM_EPS, file)
    unknown = []
    for key, value in said.items():
        if key in family.fixed:
            _must_be(value, family.fixed[key], key, file)
        elif key in family.sizes:
            _must_have_size(value, family.sizes[key](shapes), key, config, file)
        elif key in family.read or key in family.irrelevant:
            continue
        elif _OF_AN_ACTIVATION.search(key):
            _must_be(value, _ACTIVATION, key, file)
        elif _OF_AN_EPS.search(key):
            if positive(config, key, eps, file) != eps:
                _must_be(value, Fixed((eps,), f"{eps:g} in every LayerNorm"), key, file)
        elif value not in (False, "", [], {}):
            unknown.append(key)
    if not unknown:
        return ()
    names = ", ".join(key[:_SHOWN_CHARACTERS] for key in sorted(unknown)[:8])
    more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
    return (f"{file.name} says things that goslet does not know and takes to change no numbers: {names}{more}",)


def check_eps(config: Config, eps: float, file: Path) -> None:
    """Hold every eps of a config.json to the one that the file of weights says itself, as a GGUF does.

    Raises:
        CheckpointError: a key says another one.
    """
    for key, value in config.items():
        if value is None or not _OF_AN_EPS.search(key):
            continue
        if not math.isclose(positive(config, key, eps, file), eps, rel_tol=1e-6):
            raise CheckpointError(
                "says another eps than the file of weights beside it",
                file=file,
                place=key[:_SHOWN_CHARACTERS],
                expected=f"{eps:g}",
                found=str(value)[:_SHOWN_CHARACTERS],
                remedy="one of the two is of another model: download both again, or give the file of weights itself",
            )


def _must_be(value: Any, fixed: Fixed, key: str, file: Path) -> None:
    # A flag is no number here, though Python takes True for 1.
    if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in fixed.values):
        raise CheckpointError(
            "says something else than goslet computes",
            file=file,
            place=key[:_SHOWN_CHARACTERS],
            expected=fixed.computed,
            found=str(value)[:_SHOWN_CHARACTERS],
            remedy="goslet cannot run this model: its numbers would be wrong",
        )


def _must_have_size(value: Any, size: int | None, key: str, config: Config, file: Path) -> None:
    # fla makes heads from head_dim where it is there, whatever num_heads says.
    if size is None or (key == "num_heads" and config.get("head_dim") is not None):
        return
    told = value if isinstance(value, list) else [value]
    if not all(type(number) is int and number == size for number in told):
        raise CheckpointError(
            "states another size than the tensors have",
            file=file,
            place=key,
            expected=size,
            found=str(value)[:_SHOWN_CHARACTERS],
            remedy="config.json and weights are of different models; download the whole folder again",
        )


def positive(config: Config, key: str, default: float, file: Path) -> float:
    """A positive number of a config.json, which some tools write as text; the default where it says nothing.

    Raises:
        CheckpointError: it is something else.
    """
    value = config.get(key)
    if value is None:
        return default
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise CheckpointError(
            "is not a positive number",
            file=file,
            place=key[:_SHOWN_CHARACTERS],
            expected=f"a number such as {default:g}",
            found=str(value)[:_SHOWN_CHARACTERS],
        )
    return number


def flag(config: Config, key: str, default: bool, file: Path) -> bool:
    """A flag of a config.json; the default where it says nothing.

    Raises:
        CheckpointError: it is something else.
    """
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(
            "is not a flag", file=file, place=key, expected="true or false", found=str(value)[:_SHOWN_CHARACTERS]
        )
    return value
