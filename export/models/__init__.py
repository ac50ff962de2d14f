"""The RWKV versions that goslet exports, one file each; `recognise` tells which one a checkpoint is."""

from __future__ import annotations

from typing import cast

from ...errors import CheckpointError
from . import rwkv7
from .blocks import Shapes, Version

VERSIONS: tuple[Version, ...] = (cast(Version, rwkv7),)


def recognise(shapes: Shapes) -> Version:
    """The version that a checkpoint's tensor names belong to.

    Raises:
        CheckpointError: no version that goslet knows has such tensors.
    """
    for version in VERSIONS:
        if version.recognise(shapes):
            return version
    names = sorted(shapes)
    raise CheckpointError(
        "is not a model that goslet knows",
        expected=f"tensors of RWKV-{' or RWKV-'.join(version.NAME for version in VERSIONS)}",
        found=", ".join(names[:3]) + ", …" if names else "no tensors",
        remedy="check that this is an RWKV checkpoint of a supported version in its original tensor names",
    )


def version_named(name: str) -> Version:
    """The version called `name` ("7").

    Raises:
        CheckpointError: goslet has no such version.
    """
    for version in VERSIONS:
        if name == version.NAME:
            return version
    known = ", ".join(version.NAME for version in VERSIONS)
    raise CheckpointError("unknown RWKV version", expected=known, found=name, remedy="use a newer goslet")
