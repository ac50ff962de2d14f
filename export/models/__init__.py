"""The RWKV versions that goslet exports, one file each; `recognise` tells which one a checkpoint is."""

from __future__ import annotations

from typing import cast

from ...errors import CheckpointError
from . import rwkv4, rwkv5, rwkv6, rwkv7
from .blocks import Version
from .refused import refuse_known, refuse_others
from .tensors import Shapes

VERSIONS: tuple[Version, ...] = tuple(cast(Version, module) for module in (rwkv4, rwkv5, rwkv6, rwkv7))
NAMES = tuple(name for version in VERSIONS for name in version.NAMES)


def recognise(shapes: Shapes) -> Version:
    """The version that a checkpoint's tensor names belong to.

    Raises:
        CheckpointError: no version that goslet knows has such tensors, or it is one without a state of fixed size.
    """
    known = f"RWKV-{', '.join(NAMES[:-1])} or {NAMES[-1]}"
    refuse_known(shapes, known)
    for version in VERSIONS:
        if version.recognise(shapes):
            return version
    names = sorted(shapes)
    refuse_others(shapes, known)
    raise CheckpointError(
        "is not a model that goslet knows",
        expected=f"tensors of {known}",
        found=", ".join(names[:3]) + ", …" if names else "no tensors",
        remedy="check that this is an RWKV checkpoint of a supported version in its original tensor names",
    )


def version_named(name: str) -> Version:
    """The version called `name` ("7").

    Raises:
        CheckpointError: goslet has no such version.
    """
    for version in VERSIONS:
        if name in version.NAMES:
            return version
    raise CheckpointError("unknown RWKV version", expected=", ".join(NAMES), found=name, remedy="use a newer goslet")
