"""Engines and sessions: open an engine file, feed tokens, fork, save and restore states, write text."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends import Backend, open_backend
from .chat import FREE_TEXT, ChatTemplate
from .enginefile import EngineFile
from .errors import EmptyPromptError, InputError, StateError, TokenError, TokenizerError
from .sampling import Sampler, SamplingOptions, StopMatcher, UncountedTokens
from .spec import ModelSpec, StateSpec
from .state import State, fresh_buffer
from .tokenizer import Tokenizer, check_fits, load_tokenizer

# A call holds the sessions' locks in nested frames. The weights are read once for 64 sessions, so little is lost.
MAX_BATCH = 256


class Session:
    """One conversation: a state of fixed size and the step that moves it on. Made by `Engine.session`.

    A session may be used from any thread; calls from several threads wait for each other. Different sessions of one
    engine run in parallel. A call from within another one on the same thread, as a signal handler may make it, must not
    wait, whichever of the engine's sessions it is for: it raises StateError. A session belongs to the process that
    opened its engine: in a child of ``os.fork()`` its methods raise InputError, since locks and compute threads of the
    parent may never answer there. The properties work anywhere at any time.
    """

    def __init__(self, engine: Engine, state: State) -> None:
        self._engine = engine
        self._state = state
        self._stepper = engine.backend.stepper(state)
        self._lock = threading.Lock()
        self._logits: tuple[int, NDArray[np.float32]] | None = None

    @property
    def engine(self) -> Engine:
        """The engine that this session runs on."""
        return self._engine

    @property
    def state(self) -> State:
        """The session's state; its buffers keep their addresses for the session's life."""
        return self._state

    @property
    def tokens_seen(self) -> int:
        """Tokens fed since the state was fresh."""
        return self._state.tokens_seen

    @property
    def logits(self) -> NDArray[np.float32] | None:
        """float32 [V], the logits after the last token, where `Engine.generate` left off or a file held them; or None.

        `save` keeps them with the state, so that text can go on from the file alone.
        """
        if self._logits is None or self._logits[0] != self.tokens_seen:
            return None
        return self._logits[1]

    def remember(self, logits: NDArray[np.float32] | None) -> None:
        """Keep the logits after the last token; None forgets them. The array must not change afterwards."""
        self._logits = None if logits is None else (self.tokens_seen, logits)

    @property
    def state_size_bytes(self) -> int:
        """Bytes of one copy of the state."""
        return self._engine.state_spec.size_bytes

    def feed(
        self, tokens: Sequence[int] | NDArray[np.integer[Any]], *, all_logits: bool = False
    ) -> NDArray[np.float32]:
        """Feed tokens; the state moves on past them.

        Feeding a sequence whole, in pieces or token by token gives the same logits and state. An interrupted call
        (Ctrl-C, a backend's failure) leaves a whole state, after the first `tokens_seen` tokens.

        Args:
            tokens: token ids [T], at least one.
            all_logits: return the logits after every token, not after the last one alone.

        Returns:
            float32 [V], or [T, V] with `all_logits`; the array is the caller's.

        Raises:
            EmptyPromptError: there are no tokens.
            TokenError: a token is not an integer or outside the vocabulary; nothing was fed then.
            BackendError: the step failed.
            TruncatedError: somebody has shortened the engine's file since it was opened.
            InputError: the engine is closed, or was opened by another process.
            StateError: this thread is within another call of this engine's sessions.
        """
        ids = self._engine.check_tokens(tokens)
        logits = np.empty((len(ids) if all_logits else 1, self._engine.spec.vocab_size), np.float32)
        with self._engine.turn(), self._lock:
            self._engine.check_open()
            self._engine.file.check_whole()
            self.remember(None)
            self._stepper.feed(ids, logits)
        return logits if all_logits else logits[0]

    def fork(self) -> Session:
        """A session of its own that continues from the same state.

        Raises:
            InputError: the engine was opened by another process.
            StateError: this thread is within another call of this engine's sessions, or memory is short.
        """
        with self._engine.turn(), self._lock:
            twin = Session(self._engine, self._state.clone())
            twin.remember(self.logits)
            return twin

    def reset(self, initial: Mapping[str, NDArray[np.float32]] | None = None) -> None:
        """Go back to the fresh state, or to one with other initial numbers.

        Args:
            initial: numbers for some of the state's tensors, by name, float32 in their shapes; for example what
                `goslet.export.tuned_state.read_tuned_state` gives.

        Raises:
            StateMismatchError: the state has no such tensor, or of another shape; it is then unchanged.
            StateError: a number is not finite, or this thread is within another call of this engine's sessions; the
                state is then unchanged.
            InputError: the engine was opened by another process.
        """
        with self._engine.turn(), self._lock:
            self._state.reset(initial)
            self.remember(None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, replacing one that exists.

        Raises:
            OutputError: the file cannot be written; an existing one is then untouched.
            StateError: the state holds NaN or infinity, which `load` would refuse (an existing file is untouched), or
                this thread is within another call of this engine's sessions.
            InputError: the path is none, or the engine was opened by another process.
        """
        with self._engine.turn(), self._lock:
            logits = self.logits
            self._state.save(path, logits if logits is not None and np.isfinite(logits).all() else None)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take the state from a file that `save` wrote, in any quantization of the same model.

        Raises:
            StateMismatchError: the file's state belongs to another model or layout; the session's state is untouched.
            ContainerError, StateError: the file is damaged; the session's state is untouched.
            StateError: this thread is within another call of this engine's sessions.
            InputError: the engine was opened by another process.
        """
        with self._engine.turn(), self._lock:
            logits = self._state.load(path)
            fits = logits is not None and logits.shape == (self._engine.spec.vocab_size,) and np.isfinite(logits).all()
            self.remember(logits if fits else None)


class _ThisThread(threading.local):
    """A lock of each thread's own: whether it is held tells whether the thread is within a call."""

    def __init__(self) -> None:
        self.lock = threading.RLock()


class Engine:
    """An opened engine file on a backend. Made by `goslet.open`; close it, or use it in a ``with`` statement.

    An engine belongs to the process that opened it; a child of ``os.fork()`` opens the file again, and the two share
    the memory that the file is mapped into. ONNX Runtime cannot end in such a child: leave it with ``os._exit()``, as
    multiprocessing does.
    """

    def __init__(self, file: EngineFile, backend: Backend, tokenizer: Tokenizer | None) -> None:
        self._file = file
        self._backend = backend
        self._tokenizer = tokenizer
        self._uncounted: UncountedTokens | None = None
        self._forbidden: Mapping[int, float] | None = None
        self._process = os.getpid()
        self._this_thread = _ThisThread()
        self._open = True
        initial = file.initial_state
        self._fresh = None if initial is None else fresh_buffer(file.state_spec, initial)

    @property
    def file(self) -> EngineFile:
        """The engine file."""
        return self._file

    @property
    def backend(self) -> Backend:
        """The backend that runs the steps."""
        return self._backend

    @property
    def backend_name(self) -> str:
        """The backend's name: native, ort or trt."""
        return self._backend.name

    @property
    def spec(self) -> ModelSpec:
        """The model's dimensions."""
        return self._file.spec

    @property
    def state_spec(self) -> StateSpec:
        """The state's tensors."""
        return self._file.state_spec

    @property
    def model_id(self) -> str:
        """The model's id: the same for every quantization of one checkpoint."""
        return self._file.model_id

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The engine's tokenizer, or None when it takes and gives token ids only."""
        return self._tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        """How conversations with the model are written; None where the engine does not say."""
        return self._file.chat

    @property
    def decoding(self) -> SamplingOptions:
        """The decoding parameters for text that go with the model; where the engine does not say, those of its authors
        for text in general. `ChatTemplate.decoding` has those for answers."""
        template = self.chat_template
        return FREE_TEXT if template is None or template.sampling is None else template.sampling

    def session(self) -> Session:
        """A new session with a fresh state."""
        self.check_open()
        state = State(self.state_spec, self.model_id, double_buffered=not self._backend.in_place, fresh=self._fresh)
        return Session(self, state)

    def step_batch(
        self, sessions: Sequence[Session], tokens: Sequence[int] | NDArray[np.integer[Any]]
    ) -> NDArray[np.float32]:
        """Feed several sessions one token each; the native backend reads the weights once for all of them.

        Whenever this raises an error of goslet's, no session has moved. An interrupted call (Ctrl-C) leaves every
        session's state whole, and its `tokens_seen` tells whether it has moved.

        Args:
            sessions: different sessions of this engine [n], 1 to 256.
            tokens: a token id for each [n].

        Returns:
            float32 [n, V]: the logits after each session's token; the array is the caller's.

        Raises:
            EmptyPromptError: there are no tokens.
            TokenError: a token is not an integer or outside the vocabulary.
            InputError: there are no sessions, too many, not as many as tokens, or one is given twice or of another
                engine; or the engine is closed, or was opened by another process.
            BackendError: the step failed.
            TruncatedError: somebody has shortened the engine's file since it was opened.
            StateError: this thread is within another call of this engine's sessions.
        """
        batch = list(sessions)
        ids = self.check_tokens(tokens)
        if not 1 <= len(batch) <= MAX_BATCH:
            raise InputError(
                "is not a number of sessions that can be stepped together",
                place="sessions",
                expected=f"1 to {MAX_BATCH}",
                found=len(batch),
            )
        if len(batch) != len(ids):
            raise InputError("are not one for each session", place="tokens", expected=len(batch), found=len(ids))
        places: dict[Session, int] = {}
        for index, session in enumerate(batch):
            if not isinstance(session, Session) or session.engine is not self:
                raise InputError(
                    "is no session of this engine", place=f"sessions[{index}]", remedy="use sessions of this engine"
                )
            if session in places:
                raise InputError(
                    "is given twice",
                    place=f"sessions[{index}]",
                    found=f"the same session as sessions[{places[session]}]",
                )
            places[session] = index
        logits = np.empty((len(batch), self.spec.vocab_size), np.float32)
        # One order for all batches, so that two of them never wait for each other.
        locks = sorted((session._lock for session in batch), key=id)

        def step() -> None:
            self.check_open()
            self._file.check_whole()
            self._backend.step_batch([session._stepper for session in batch], ids, logits)

        with self.turn():
            _holding(locks, step)
        return logits

    def turn(self) -> contextlib.AbstractContextManager[bool]:
        """This thread's own lock, to be held during each call of a session, before the session's own.

        A call within another one could wait for a session that another thread's batch holds, while that one waits for
        the session of the outer call. Like all locks here it is taken by ``with`` itself: Ctrl-C then cannot leak it.

        Raises:
            StateError: this thread is within another call of this engine's sessions.
            InputError: this is not the process that opened the engine.
        """
        self.check_process()
        lock = self._this_thread.lock
        # Only the lock itself can tell this without a second record, which an interruption might leave wrong.
        if lock._is_owned():  # type: ignore[attr-defined]
            raise StateError(
                "the engine is busy with another call on this thread",
                place="session",
                remedy="from a signal handler, set a flag and act once that call has returned",
            )
        return lock

    def check_open(self) -> None:
        """Raise InputError when the engine was closed, or opened by another process."""
        if not self._open:
            raise InputError("the engine is closed", file=self._file.path, remedy="open it again with goslet.open")
        self.check_process()

    def check_process(self) -> None:
        """Raise InputError when another process opened the engine: this one came from it by ``os.fork()``."""
        if os.getpid() != self._process:
            raise InputError(
                "the engine was opened by another process",
                file=self._file.path,
                expected=f"process {self._process}",
                found=f"process {os.getpid()}",
                remedy="open it again after os.fork()",
            )

    def check_tokens(self, tokens: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Token ids as int64 [T].

        Raises:
            EmptyPromptError: there are none.
            TokenError: one of them is not an integer or outside the vocabulary; the first such is named.
        """
        try:
            array = np.asarray(tokens)
        except (ValueError, OverflowError, TypeError) as error:
            raise TokenError("are not token ids", place="tokens", expected="a sequence of integers") from error
        if array.size == 0:
            raise EmptyPromptError(
                "there is no token to feed", place="tokens", remedy="give a prompt of at least one token"
            )
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise TokenError(
                "are not token ids",
                place="tokens",
                expected="a flat sequence of integers",
                found=f"{array.dtype} of shape {list(array.shape)}",
            )
        wrong = (array < 0) | (array >= self.spec.vocab_size)
        if wrong.any():
            index = int(np.argmax(wrong))
            raise TokenError(
                "a token id is outside the vocabulary",
                place=f"tokens[{index}]",
                expected=f"0 to {self.spec.vocab_size - 1}",
                found=int(array[index]),
                remedy="use this engine's tokenizer",
            )
        return array.astype(np.int64)

    def encode(self, prompt: str) -> list[int]:
        """The prompt's token ids.

        Raises:
            TokenizerError: the engine has no tokenizer.
            EmptyPromptError: the prompt is empty.
        """
        if self._tokenizer is None:
            raise self._no_tokenizer()
        if not prompt:
            raise EmptyPromptError("the prompt is empty", place="prompt", remedy="give at least one character")
        return self._tokenizer.encode(prompt)

    def _no_tokenizer(self) -> TokenizerError:
        return TokenizerError(
            "this engine has no tokenizer and takes token ids only",
            file=self._file.path,
            remedy="export it with --tokenizer, or feed token ids",
        )

    def sampler(self, options: SamplingOptions) -> Sampler:
        """A sampler for this engine's vocabulary; whitespace and digits take no penalty where text is known.

        Ids that the tokenizer has no text for are never sampled, whatever their bias; the end-of-document token is.
        """
        vocab_size, tokenizer = self.spec.vocab_size, self._tokenizer
        if tokenizer is not None:
            if self._forbidden is None:
                # A model may also have rows past its tokenizer's vocabulary.
                textless = (*tokenizer.textless_tokens(), *range(tokenizer.vocab_size, vocab_size))
                self._forbidden = dict.fromkeys(textless, -math.inf)
            options = replace(options, logit_bias={**options.logit_bias, **self._forbidden})
            if self._uncounted is None and options.penalizes:
                self._uncounted = UncountedTokens(tokenizer)
        return Sampler(options, vocab_size, self._uncounted or ())

    def generate_tokens(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 256,
        session: Session | None = None,
        options: SamplingOptions | None = None,
    ) -> Iterator[int]:
        """Sample token ids after a prompt, one at a time.

        Every token is fed to the session before the next is asked for, the last one too, so the session may be
        continued, saved or forked at any time. The end-of-document token ends the generation and is not given.

        Args:
            prompt: token ids [T]; at least one, unless the session has `Session.logits` to go on from.
            max_tokens: at most this many.
            session: continue this one; None uses a fresh one.
            options: how to sample; None is temperature 1 and nothing else, whatever the engine's `decoding` is. Its
                `stop` texts need `generate`.

        Raises:
            EmptyPromptError, TokenError, InputError: the arguments cannot be used; raised here, not at the first token.
        """
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 0:
            raise InputError(
                "is not a number of tokens", place="max_tokens", expected="0 or more", found=repr(max_tokens)
            )
        if session is not None and session.engine is not self:
            raise InputError("belongs to another engine", place="session", remedy="use a session of this engine")
        goes_on = session is not None and len(prompt) == 0 and session.logits is not None
        ids = None if goes_on else self.check_tokens(prompt)
        sampler = self.sampler(options or SamplingOptions())
        return self._sampled(ids, max_tokens, session or self.session(), sampler)

    def _sampled(
        self, prompt: NDArray[np.int64] | None, max_tokens: int, session: Session, sampler: Sampler
    ) -> Iterator[int]:
        end_token = None if self._tokenizer is None else self._tokenizer.end_token
        logits = session.logits if prompt is None else None
        if logits is None:
            # Without a prompt, and fed in between: `check_tokens` says so.
            logits = session.feed([] if prompt is None else prompt)
            session.remember(logits)
        for _ in range(max_tokens):
            token = sampler.sample(logits)
            if token == end_token:
                return
            sampler.observe(token)
            logits = session.feed([token])
            session.remember(logits)
            yield token

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        session: Session | None = None,
        options: SamplingOptions | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Write text after a prompt, piece by piece.

        Pieces hold whole characters only; text that could be the beginning of a stop text is held back until it is
        known not to be, and the stop text itself is never given.

        Args:
            prompt: text, or token ids.
            max_tokens: at most this many tokens.
            session: continue this one; None uses a fresh one.
            options: how to sample, such as the engine's `decoding`; or give the fields of `SamplingOptions` by name.
                What is not given is off, and the temperature is 1: nothing here depends on the engine.
            **sampling: fields of `SamplingOptions`: temperature, top_k, top_p, seed, stop and so on.

        Raises:
            TokenizerError: the engine has no tokenizer.
            EmptyPromptError, TokenError, InputError: the arguments cannot be used; raised here, not at the first piece.
        """
        if self._tokenizer is None:
            raise self._no_tokenizer()
        if options is not None and sampling:
            raise InputError("is given beside options", place=", ".join(sampling), remedy="give one or the other")
        if options is None:
            known = [option.name for option in fields(SamplingOptions)]
            for name in sampling.keys() - known:
                raise InputError("no such sampling option", place=name, expected=", ".join(known))
            options = SamplingOptions(**sampling)
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        tokens = self.generate_tokens(ids, max_tokens=max_tokens, session=session, options=options)
        return self._text(tokens, self._tokenizer, StopMatcher(options.stop))

    @staticmethod
    def _text(tokens: Iterator[int], tokenizer: Tokenizer, matcher: StopMatcher) -> Iterator[str]:
        decoder = tokenizer.stream()
        for token in tokens:
            if piece := matcher.feed(decoder.push(token)):
                yield piece
            if matcher.matched is not None:
                return
        if piece := matcher.feed(decoder.finish()) + matcher.flush():
            yield piece

    def close(self) -> None:
        """Close the engine file; closing it twice is allowed.

        Nothing can be fed and no session made any more. Sessions that exist keep their states: `Session.fork`, `save`,
        `load`, `reset` and the properties go on working, and a feed that another thread has begun ends normally.
        """
        self._open = False
        self._file.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _holding(locks: Sequence[contextlib.AbstractContextManager[bool]], act: Callable[[], None]) -> None:
    """Call `act` while holding all of the locks; nested, since only ``with`` itself gives back each that it took."""
    if not locks:
        act()
        return
    with locks[0]:
        _holding(locks[1:], act)


def open_engine(
    path: str | os.PathLike[str],
    *,
    backend: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    check: bool = False,
) -> Engine:
    """Open an engine file; `goslet.open` is this function.

    Args:
        path: a ``.goslet`` file.
        backend: ``native``, ``ort`` or ``trt``; None takes native.
        device: ``cpu`` or ``cuda``; None takes the backend's own, which is cuda for trt and cpu for the others.
        threads: compute threads; None leaves it to the backend.
        check: verify the weights' checksum too, which reads the whole file.

    Raises:
        ContainerError: the file is damaged, of a newer format, or not an engine.
        BackendUnavailableError, BackendError: the backend does not exist here or refuses the engine.
        DependencyError: the backend needs a package that is not installed.
        TokenizerError: the engine's tokenizer cannot be read, or has more ids than the model.
        InputError: an argument cannot be used.
    """
    with contextlib.ExitStack() as stack:
        file = EngineFile.open(path, check=check)
        stack.callback(file.close)
        tokenizer = None
        if file.tokenizer_kind is not None:
            tokenizer = load_tokenizer(file.tokenizer_kind, file.tokenizer_bytes, file.path)
            check_fits(tokenizer, file.spec.vocab_size, file.path)
        engine = Engine(file, open_backend(backend, file, device, threads), tokenizer)
        stack.pop_all()
    return engine
