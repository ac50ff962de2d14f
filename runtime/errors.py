"""The errors goslet raises: one base class, one subclass for each thing that a caller may want to tell apart.

Every message names the file, the place in it, what was expected, what was found and what to do about it, as far
as each of them is known, on one line and without control characters; the attributes hold the parts as they are.
"""

from __future__ import annotations

import os
import re

# C0, DEL and C1 drive a terminal; the rest turn the direction of the text around them.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def one_line(text: str) -> str:
    """A text on one line, with control characters written out (``\\x1b``): fit to be shown wherever it came from."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), " ".join(text.split()))


def first_line(error: BaseException) -> str:
    """What another library's exception says, cut to its first line; its type's name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


class GosletError(Exception):
    """Base of every error that goslet raises on purpose.

    Args:
        problem: what is wrong, as a phrase without a full stop.
        file: the file concerned.
        place: where in the file or call: a tensor's name, an offset with its unit, a header key.
        expected: what should have been there.
        found: what was there.
        remedy: what the user can do, as a sentence without a full stop.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | os.PathLike[str] | None = None,
        place: str | None = None,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = None if file is None else os.fspath(file)
        self.place = place
        self.expected = expected
        self.found = found
        self.remedy = remedy
        super().__init__(self._message())

    def _message(self) -> str:
        where = ": ".join(part for part in (self.file, self.place) if part)
        message = f"{where}: {self.problem}" if where else self.problem
        details = []
        if self.expected is not None:
            details.append(f"expected {self.expected}")
        if self.found is not None:
            details.append(f"found {self.found}")
        if details:
            message += f" ({', '.join(details)})"
        if self.remedy:
            message += f"; {self.remedy}"
        return one_line(message)


class InputError(GosletError, ValueError):
    """An argument of a call cannot be used: a wrong type, range or shape."""


class TokenError(InputError):
    """A token id is outside the vocabulary or not an integer."""


class EmptyPromptError(InputError):
    """There is no token to feed, so there are no logits to return."""


class TokenizerError(GosletError):
    """A vocabulary cannot be read, or an engine has no tokenizer and text was asked for."""


class NotByteLevelError(TokenizerError):
    """A ``tokenizer.json`` is of a kind whose tokens are not byte strings; its model can be run by token ids."""


class ContainerError(GosletError):
    """An engine or state file is damaged or is not one."""


class WrongMagicError(ContainerError):
    """The file does not begin as this kind of file must."""


class NewerVersionError(ContainerError):
    """The file was written by a newer goslet than this one."""


class UnknownFeatureError(ContainerError):
    """The file requires a feature that this goslet does not know."""


class TruncatedError(ContainerError):
    """The file ends before its own header says that it should."""


class OversizedError(ContainerError):
    """The file goes on after its own header says that it should end, or declares absurd lengths."""


class HeaderError(ContainerError):
    """The header is not what the format says: a missing key, a wrong type, sections with holes or overlaps."""


class ChecksumError(ContainerError):
    """A part of the file does not have the checksum that the header records."""


class CheckpointError(GosletError):
    """A checkpoint cannot be read or is not a model that goslet knows."""


class MissingTensorError(CheckpointError):
    """The checkpoint lacks a tensor that its version needs."""


class ExtraTensorError(CheckpointError):
    """The checkpoint holds a tensor that its version does not know."""


class TensorShapeError(CheckpointError):
    """A tensor of the checkpoint has the wrong shape."""


class TensorValueError(CheckpointError):
    """A tensor of the checkpoint holds NaN or infinity, or values that a format cannot hold."""


class UnsafeCheckpointError(CheckpointError):
    """The checkpoint is a pickle that would run code; goslet never runs it."""


class QuantizationError(InputError):
    """A quantization recipe cannot be applied."""


class StateError(GosletError):
    """A state cannot be read or used."""


class StateMismatchError(StateError):
    """A state belongs to another model or to another layout."""


class BackendUnavailableError(GosletError):
    """A backend or device does not exist here, or not yet."""


class BackendError(GosletError):
    """A backend failed while it opened or ran an engine."""


class NonFiniteError(GosletError):
    """A step gave NaN or infinity where numbers were needed."""


class OutputError(GosletError):
    """An output file cannot be written: it exists, the folder is missing or read-only, the disk is full."""


class DependencyError(GosletError):
    """An optional package is needed and not installed."""


class ConvergenceError(GosletError):
    """An iteration ended before it reached what it was to reach."""
