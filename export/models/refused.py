"""Models that people bring and goslet does not run, told by a tensor's name, so that each is refused by its own."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...errors import CheckpointError

_GROWS = ", so its past has no fixed size"
# What goslet does not run: a pattern of a tensor's name, and what has such a tensor.
_REFUSED = tuple(
    (re.compile(pattern, re.ASCII), problem)
    for pattern, problem in (
        (
            r"blocks\..*\.qkv\.",
            f"is an RWKV-7b, which goslet does not run: its attention keeps keys and values of every token{_GROWS}",
        ),
        (
            r"blocks\..*rosa",
            f"is an RWKV-8, which goslet does not run: its ROSA looks words up in the whole text before them{_GROWS}",
        ),
        (
            r".*\bffnPre\.",
            "was trained with --pre_ffn, a second channel mix in place of the first time mix, which released models do "
            "not have and goslet does not run",
        ),
        (
            r"head_[qk]\.|copy_mask",
            "was trained with --head_qk, an attention over the whole text before the head, which released models do "
            "not have and goslet does not run",
        ),
        (
            r".*\btiny_(ln|q|k|v|mask)\b",
            "was trained with --tiny_att_dim, an attention over the whole text beside the channel mix, which released "
            "models do not have and goslet does not run",
        ),
        (
            r"pos_emb",
            "was trained with --my_pos_emb, embeddings of positions, which released models do not have and goslet does "
            "not run",
        ),
        (
            r".*\b(self_attn\.(.*\.)?(receptance|time_\w+|r_k|w1|x_r|gate)|time_mixer)\b",
            "is a hybrid (QRWKV or ARWKV: RWKV's time mix in the layers of a transformer such as Qwen), which goslet "
            "does not run",
        ),
        (
            r"blocks\.\d+\..*\b([qkvo]_proj|gate_proj|up_proj|down_proj|[qk]_norm)\b",
            "is a hybrid of RWKV and a transformer's layers, which goslet does not run",
        ),
        (
            r"blocks\.\d+\.att\.time_mix_(x|w1)$",
            "is an RWKV-6 whose tensors were renamed for web-rwkv, outside of the .st file that its converter writes",
        ),
    )
)
# What has none of RWKV's own names: a pattern, what it is, and what to do.
_ELSEWHERE = tuple(
    (re.compile(pattern, re.ASCII), problem, remedy)
    for pattern, problem, remedy in (
        (
            r"\.(attention|feed_forward)\.(key|receptance|time_)|\.attn\.r_proj\.",
            "is a single file of a Hugging Face folder, whose config.json says how its numbers are meant",
            "give the folder",
        ),
        (
            r"\b(self_attn|attn|attention)\b.*\b(q_proj|q|qkv|query|c_attn|query_key_value)\b",
            "is a transformer, not an RWKV",
            "goslet runs RWKV alone",
        ),
        (
            r"\b(lora_[AB]|lora\.[01]|bone|disha|time_state)\b",
            "is an adapter or a tuned state, not a model",
            "give the model, and this with --adapter or --state",
        ),
    )
)


def refuse_known(names: Iterable[str], known: str) -> None:
    """Refuse what has tensors of a version or an option that goslet does not run, beside whatever others.

    Args:
        names: the checkpoint's tensors.
        known: the versions that goslet runs, for the message.

    Raises:
        CheckpointError: there is such a tensor.
    """
    for pattern, problem in _REFUSED:
        name = next((name for name in names if pattern.match(name)), None)
        if name is not None:
            raise CheckpointError(
                problem, place=name[:100], expected=known, remedy="give a model of one of these, in its original file"
            )


def refuse_others(names: Iterable[str], known: str) -> None:
    """Refuse what has none of RWKV's own names but some that say what it is; arguments as for `refuse_known`.

    Raises:
        CheckpointError: there is such a tensor.
    """
    for pattern, problem, remedy in _ELSEWHERE:
        name = next((name for name in names if pattern.search(name)), None)
        if name is not None:
            raise CheckpointError(problem, place=name[:100], expected=known, remedy=remedy)
