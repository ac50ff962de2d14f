"""The state of one session: fixed-size buffers that never move, and the state file.

A state file is a container (`goslet.container`) with the magic ``GOSLETST``. Its header holds ``model_id``,
``tokens_seen`` and ``state`` (`StateSpec.to_json`); its section ``state`` holds the tensors in the spec's order,
little-endian float32, without gaps.
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._native import StateBuffer
from .container import Section, errors_in, read_container, write_container
from .errors import HeaderError, InputError, StateError, StateMismatchError
from .output import Path
from .spec import StateSpec

_LOGITS = "logits"  # a section that readers may pass over
STATE_FILE_MAGIC = b"GOSLETST"
STATE_FILE_VERSION = 1
MAX_TOKENS_SEEN = (1 << 63) - 1

_COUNT_SHAPE = (2,)  # float32, as long as one int64

Tensors: TypeAlias = "Mapping[str, NDArray[np.float32]]"


class Elsewhere(abc.ABC):
    """Other memory, such as a GPU's, in which a backend moves a state on; `State` asks for it back when it is read.

    Attributes:
        steps: grows whenever the state there may have moved on since it was last the same as the front buffer.
        steps_fetched: what `steps` was then. Where the two are equal, the front buffer is the state.
    """

    steps = 0
    steps_fetched = 0

    @property
    def ahead(self) -> bool:
        """Whether the state is there, and the front buffer holds an older one."""
        return self.steps != self.steps_fetched

    @abc.abstractmethod
    def tokens_seen(self) -> int:
        """The token count of the state that is there; for a state that is ahead.

        Raises:
            BackendError: it cannot be read.
        """

    @abc.abstractmethod
    def fetch(self, tensors: Tensors, count: NDArray[np.int64]) -> None:
        """Write the state that is there.

        Args:
            tensors: where to, as `State.front`.
            count: where its token count goes, int64 [1].

        Raises:
            BackendError: it cannot be read; what was written means nothing.
        """


class State:
    """Everything that a session remembers.

    All memory is allocated here, once; no address changes during the state's life. A backend that cannot update a
    state in place reads `front`, writes `back` and calls `advance`, which exchanges the two and moves nothing.

    Where a backend moves the state on in other memory, `front` and whatever reads the state bring it here first, and
    the next step takes it back. A view that was taken before that step stays what it was until the state is read again.

    Every buffer carries its own token count behind its tensors, and one index says which buffer is the front. So each
    change of a state is one assignment or one call of native code, and an exception that falls anywhere (Ctrl-C)
    leaves the state as it was before that change or after it.

    Args:
        spec: the tensors, their shapes and their initial values.
        model_id: the model that the state belongs to.
        double_buffered: whether there is a back buffer.
        fresh: what the fresh state is, from `fresh_buffer`; None for the spec's initial values.

    Raises:
        StateError: the state is larger than goslet allows or than the memory at hand.
    """

    def __init__(
        self, spec: StateSpec, model_id: str, *, double_buffered: bool = False, fresh: StateBuffer | None = None
    ) -> None:
        self.spec = spec
        self.model_id = model_id
        self._fresh = fresh
        self._buffers = [_allocate(spec) for _ in range(2 if double_buffered else 1)]
        self._views = [_views(spec, buffer) for buffer in self._buffers]
        self._counts = [_count_view(spec, buffer) for buffer in self._buffers]
        self._front = 0
        self._elsewhere: Elsewhere | None = None
        # Between the front buffer and what is elsewhere one copy at a time; a signal handler may make one within one.
        self._moving = threading.RLock()
        if fresh is not None:
            self._buffers[0].copy_from(fresh)

    @property
    def double_buffered(self) -> bool:
        """Whether there is a back buffer."""
        return len(self._buffers) == 2

    @property
    def tokens_seen(self) -> int:
        """Tokens fed since the fresh state; the count stops at 2^63 - 1."""
        if self._elsewhere is not None and self._elsewhere.ahead:
            return self._elsewhere.tokens_seen()
        return int(self._counts[self._front][0])

    @property
    def size_bytes(self) -> int:
        """Bytes of all the state's buffers, alignment and token counts included."""
        return sum(buffer.size_bytes for buffer in self._buffers)

    @property
    def front(self) -> Tensors:
        """The present state: writable float32 views by tensor name, each in its spec's shape and 64-byte aligned."""
        self._bring_here()
        return self._views[self._front]

    @property
    def back(self) -> Tensors:
        """Where the next state is written before `advance`, like `front`; what it holds before that means nothing.

        Raises:
            InputError: the state has no back buffer.
        """
        return self._views[self._back_index()]

    @property
    def front_buffer(self) -> StateBuffer:
        """The buffer behind `front`, for native code: the spec's tensors, and one more that holds the token count."""
        self._bring_here()
        return self._buffers[self._front]

    def live_in(self, elsewhere: Elsewhere) -> None:
        """Let a backend move the state on in memory of its own; done once, before the first step."""
        self._elsewhere = elsewhere

    def _bring_here(self) -> None:
        elsewhere = self._elsewhere
        if elsewhere is None or not elsewhere.ahead:
            return
        with self._moving:
            # Read before the copy: a step that another thread makes meanwhile then still counts as one to fetch.
            steps = elsewhere.steps
            if steps == elsewhere.steps_fetched:
                return  # while this waited, another thread fetched it or gave the state other numbers
            staged = _allocate(self.spec)
            elsewhere.fetch(_views(self.spec, staged), _count_view(self.spec, staged))
            self._buffers[self._front].copy_from(staged)
            elsewhere.steps_fetched = steps

    def _take_over(self, buffer: StateBuffer | None) -> None:
        """Let the front buffer, as `_put` makes it, be the state, whatever is elsewhere."""
        elsewhere = self._elsewhere
        with self._moving:
            _put(self._buffers[self._front], buffer)
            if elsewhere is not None:
                elsewhere.steps_fetched = elsewhere.steps

    def _back_index(self) -> int:
        if not self.double_buffered:
            raise InputError("the state has no back buffer", remedy="make it with double_buffered=True")
        return 1 - self._front

    def advance(self) -> None:
        """Let the back buffer, which a step has written, be the front, one token further than the front was.

        Raises:
            InputError: the state has no back buffer.
        """
        back = self._back_index()
        self._counts[back][0] = min(self.tokens_seen + 1, MAX_TOKENS_SEEN)
        self._front = back

    def reset(self, initial: Mapping[str, NDArray[np.float32]] | None = None) -> None:
        """Return to the fresh state, with the numbers of `initial` in its tensors of those names.

        Raises:
            StateMismatchError: the state has no such tensor, or of another shape; it is then unchanged.
            StateError: a number is not finite; the state is then unchanged.
        """
        fresh = self._fresh if initial is None else fresh_buffer(self.spec, initial, self._fresh)
        # The back buffer forgets too, and first: an interruption between the two leaves the state as it was.
        if self.double_buffered:
            _put(self._buffers[self._back_index()], fresh)
        self._take_over(fresh)

    def clone(self) -> State:
        """An independent state with the same values, buffering and token count."""
        twin = State(self.spec, self.model_id, double_buffered=self.double_buffered, fresh=self._fresh)
        twin.copy_from(self)
        return twin

    def copy_from(self, other: State) -> None:
        """Take another state's values and token count; the two may be buffered differently.

        Raises:
            StateMismatchError: it is of another model or layout; this state is then unchanged.
        """
        self._check_model(other.model_id, None)
        self._check_layout(other.spec, None)
        self._take_over(other.front_buffer)

    def save(self, path: Path, logits: NDArray[np.float32] | None = None) -> None:
        """Write a state file; an existing file is replaced once the new one is whole.

        Args:
            path: the file.
            logits: float32 [V], those after the last token, where they are to be kept with it.

        Raises:
            StateError: the state holds NaN or infinity, which `load` would refuse.
            OutputError: the file cannot be written.
        """
        _check_finite(self.front.items(), path)
        header = {"model_id": self.model_id, "tokens_seen": self.tokens_seen, "state": self.spec.to_json()}
        tensors = (view.astype("<f4", copy=False).data.cast("B") for view in self.front.values())
        sections = [Section("state", self.spec.size_bytes, tensors)]
        if logits is not None:
            sections.append(Section.of(_LOGITS, logits.astype("<f4").tobytes()))
        write_container(
            path,
            magic=STATE_FILE_MAGIC,
            version=STATE_FILE_VERSION,
            header=header,
            sections=sections,
            overwrite=True,
        )

    def load(self, path: Path) -> NDArray[np.float32] | None:
        """Take the values and the token count of a state file. Whenever this raises, the state is unchanged.

        Returns:
            float32 [V], the logits after the last token; None where the file does not hold them.

        Raises:
            StateMismatchError: the file's state is of another model or another layout.
            StateError: it holds NaN or infinity.
            ContainerError: the file is damaged or is not a state file (a subclass says how).
        """
        container = read_container(path, magic=STATE_FILE_MAGIC, version=STATE_FILE_VERSION, kind="state file")
        with container, errors_in(path):
            header = container.header
            self._check_model(_text(header, "model_id"), path)
            spec_json = header.get("state")
            if not isinstance(spec_json, Mapping):
                raise HeaderError("is not a JSON object", place="state", found=type(spec_json).__name__)
            # First of all the version: another one may describe its tensors differently.
            self._check_layout_version(_count(spec_json, "layout_version"), path)
            self._check_layout(StateSpec.from_json(spec_json), path)
            tokens_seen = _count(header, "tokens_seen")
            # A copy, which nobody can change between the check and its use; taken over in one uninterrupted call.
            staged = _allocate(self.spec)
            _fill(_views(self.spec, staged), container.section("state"), self.spec.size_bytes)
            logits = None
            if _LOGITS in container.sections and container.section(_LOGITS).nbytes % 4 == 0:
                logits = np.array(np.frombuffer(container.section(_LOGITS), "<f4"), np.float32)
        _check_finite(_views(self.spec, staged).items(), path)
        _count_view(self.spec, staged)[0] = tokens_seen
        self._take_over(staged)
        return logits

    def _check_model(self, model_id: str, file: Path | None) -> None:
        if model_id != self.model_id:
            raise StateMismatchError(
                "the state is of another model",
                file=file,
                expected=f"model {self.model_id}",
                found=f"model {model_id[:100]}",
                remedy="open the engine that it was made with",
            )

    def _check_layout_version(self, version: int, file: Path | None) -> None:
        if version != self.spec.layout_version:
            raise StateMismatchError(
                "the state has another layout version",
                file=file,
                expected=self.spec.layout_version,
                found=version,
                remedy="use the goslet and the engine that it was made with",
            )

    def _check_layout(self, spec: StateSpec, file: Path | None) -> None:
        if spec == self.spec:
            return
        self._check_layout_version(spec.layout_version, file)
        for index in range(max(len(spec.tensors), len(self.spec.tensors))):
            expected, found = (
                str(side.tensors[index]) if index < len(side.tensors) else "none" for side in (self.spec, spec)
            )
            if expected != found:
                raise StateMismatchError(
                    "the state has another layout",
                    file=file,
                    place=f"tensor {index}",
                    expected=expected,
                    found=found[:300],
                    remedy="use the engine that it was made with",
                )


def fresh_buffer(spec: StateSpec, initial: Tensors, base: StateBuffer | None = None) -> StateBuffer:
    """A state that holds the numbers of `initial` in its tensors of those names, and elsewhere those of `base`.

    Args:
        spec: the state's tensors.
        initial: float32 in their tensors' shapes, by name.
        base: another such buffer; None stands for the spec's initial values.

    Raises:
        StateMismatchError: the state has no such tensor, or of another shape.
        StateError: a number is not finite, or the memory at hand is short.
    """
    shapes = {tensor.name: tensor.shape for tensor in spec.tensors}
    given = {name: np.asarray(values, np.float32) for name, values in initial.items()}
    for name, values in given.items():
        if shapes.get(name) != values.shape:
            raise StateMismatchError(
                "is not a tensor of this model's state",
                place=f"tensor {name}",
                expected=list(shapes[name]) if name in shapes else ", ".join(list(shapes)[:3]) + ", …",
                found=list(values.shape),
            )
    _check_finite(given.items(), None)
    buffer = _allocate(spec)
    if base is not None:
        buffer.copy_from(base)
    views = _views(spec, buffer)
    for name, values in given.items():
        views[name][...] = values
    return buffer


def _put(target: StateBuffer, source: StateBuffer | None) -> None:
    """Make a buffer a copy of another, or, where that is None, of the spec's initial values; one native call."""
    if source is None:
        target.reset()
    else:
        target.copy_from(source)


def _allocate(spec: StateSpec) -> StateBuffer:
    shapes = [tensor.shape for tensor in spec.tensors]
    inits = [tensor.init for tensor in spec.tensors]
    try:
        return StateBuffer([*shapes, _COUNT_SHAPE], [*inits, 0.0])
    except (ValueError, MemoryError) as error:
        raise StateError(f"a state cannot be allocated: {error}", found=f"{spec.size_bytes} bytes") from error


def _views(spec: StateSpec, buffer: StateBuffer) -> Tensors:
    return MappingProxyType({tensor.name: buffer.tensor(index) for index, tensor in enumerate(spec.tensors)})


def _count_view(spec: StateSpec, buffer: StateBuffer) -> NDArray[np.int64]:
    """The token count [1], in the bytes of the buffer's last tensor; two zeros as float32 are also the integer 0."""
    return buffer.tensor(len(spec.tensors)).view(np.int64)


def _check_finite(tensors: Iterable[tuple[str, NDArray[np.float32]]], file: Path | None) -> None:
    for name, values in tensors:
        finite = np.isfinite(values)
        if not finite.all():
            raise StateError(
                "the state holds NaN or infinity",
                file=file,
                place=f"tensor {name}",
                found=f"{finite.size - np.count_nonzero(finite)} of {finite.size} numbers",
                remedy="start from a fresh state",
            )


def _text(header: Mapping[str, object], key: str) -> str:
    value = header.get(key)
    if not isinstance(value, str):
        raise HeaderError("is not text", place=key, found=type(value).__name__)
    return value


def _count(header: Mapping[str, object], key: str) -> int:
    value = header.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_TOKENS_SEEN:
        raise HeaderError("is not a count", place=key, found=repr(value)[:50])
    return value


def _fill(tensors: Tensors, section: memoryview, size_bytes: int) -> None:
    if section.nbytes != size_bytes:
        raise HeaderError(
            "has a wrong length", place="section state", expected=f"{size_bytes} bytes", found=f"{section.nbytes} bytes"
        )
    values = np.frombuffer(section, dtype="<f4")
    begin = 0
    for view in tensors.values():
        view[...] = values[begin : begin + view.size].reshape(view.shape)
        begin += view.size
