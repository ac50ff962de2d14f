"""Engines in lm-evaluation-harness: its model ``goslet``.

    python -m goslet.lm_eval --model goslet --model_args engine=model.goslet --tasks lambada_openai,piqa

is the harness's own command line; it does not look for models in other packages, so ``lm_eval`` alone does not know
this one. In a program the import is enough:

    import goslet.lm_eval, lm_eval
    lm_eval.simple_evaluate(model="goslet", model_args="engine=model.goslet,threads=2", tasks=["lambada_openai"])

Needs the package lm_eval (``pip install '.[eval]'`` in goslet's folder). A state has no length limit, so nothing is
ever cut off or read in windows. What several requests have in common, their context, is read once and its state forked.

Every document begins with the end-of-document token where the tokenizer has one, as in training; `encode_pair` says how
pairs are cut into tokens. Without one (raw bytes), nothing predicts a document's first token and it is not counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from .errors import DependencyError, GosletError
from .evaluation import encode_pair, needed_tokenizer, score_continuations, score_tokens
from .sampling import SamplingOptions
from .session import open_engine

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    lacking = DependencyError(
        "lm-evaluation-harness is not installed",
        place=f"package {missing.name}",
        remedy="install it: pip install '.[eval]' in goslet's folder",
    )
    if __name__ == "__main__":
        sys.exit(f"goslet: error: {lacking}")
    raise lacking from missing

MAX_GEN_TOKS = 256  # where a task does not say, as in the harness's other models
# By which names tasks say it, the first that is there counting, as in the harness.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

Answer = TypeVar("Answer")


@register_model("goslet")
class GosletLM(LM):  # type: ignore[misc]  # the harness has no types
    """An engine as the harness's model.

    Args:
        engine: the engine file; it needs a tokenizer.
        backend: native, ort or trt.
        threads: CPU threads.
        batch_size: not used, like the next two; the harness gives them to every model. Sequences are read one by one.
        max_batch_size: not used.
        device: not used; the harness's default is ``cuda:0``. An engine runs where its backend does by default.

    Raises:
        GosletError: the engine cannot be opened, or has no tokenizer.
    """

    def __init__(
        self,
        engine: str,
        backend: str | None = None,
        threads: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        self.engine = open_engine(str(engine), backend=backend, threads=threads)
        self.tokenizer = needed_tokenizer(self.engine)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): ln of its probability, and whether greedy decoding would write it.

        Raises:
            InputError: a continuation has no token.
            NonFiniteError: the engine gave NaN or infinity.
        """
        pairs = [encode_pair(self.tokenizer, *request.args) for request in requests]
        session = self.engine.session()

        def answers(indices: Sequence[int]) -> Iterator[tuple[float, bool]]:
            session.reset()
            for found in score_continuations(session, pairs[indices[0]][0], [pairs[index][1] for index in indices]):
                yield -found.nats, found.greedy

        return self._answered("loglikelihood", requests, [tuple(pair[0]) for pair in pairs], answers, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """For each text: ln of its probability, all of it read with one state.

        Raises:
            InputError: a text has no token that could be predicted.
            NonFiniteError: the engine gave NaN or infinity.
        """
        texts = [request.args[0] for request in requests]
        session = self.engine.session()

        def answers(indices: Sequence[int]) -> Iterator[float]:
            tokens = encode_pair(self.tokenizer, "", texts[indices[0]])
            session.reset()
            found = -score_tokens(session, [*tokens[0], *tokens[1]]).nats
            yield from (found for _ in indices)

        return self._answered("loglikelihood_rolling", requests, texts, answers, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """For each (context, arguments): the text that is written after the context.

        Of the arguments, ``until`` ends it (a text or several, none of which is given), ``max_gen_toks`` bounds it (256
        where it is missing), and ``temperature``, ``top_k``, ``top_p`` and ``do_sample`` choose, greedily where neither
        temperature nor do_sample asks otherwise. The end-of-document token ends it too. Draws follow numpy's global
        seed, which the harness sets.

        Raises:
            InputError: an argument cannot be used.
            NonFiniteError: the engine gave NaN or infinity.
        """
        end = self.tokenizer.end_token
        begin = () if end is None else (end,)
        contexts = [(*begin, *self.tokenizer.encode(request.args[0])) for request in requests]
        session = self.engine.session()

        def answers(indices: Sequence[int]) -> Iterator[str]:
            session.reset()
            context = contexts[indices[0]]
            if len(context) > 1:
                session.feed(context[:-1])
            for index in indices:
                options, max_tokens = _generation(requests[index].args[1])
                yield "".join(
                    self.engine.generate(context[-1:], max_tokens=max_tokens, session=session.fork(), options=options)
                )

        return self._answered("generate_until", requests, contexts, answers, disable_tqdm)

    def _answered(
        self,
        kind: str,
        requests: Sequence[Instance],
        contexts: Sequence[Hashable],
        answers: Callable[[Sequence[int]], Iterator[Answer]],
        disable_tqdm: bool,
    ) -> list[Answer]:
        """Answers in the requests' order; `answers` gives those of requests that have their context in common."""
        together: dict[Hashable, list[int]] = {}
        for index, context in enumerate(contexts):
            together.setdefault(context, []).append(index)
        found: dict[int, Answer] = {}
        with tqdm(total=len(requests), desc=f"goslet {kind}", disable=disable_tqdm) as bar:
            for indices in together.values():
                for index, answer in zip(indices, answers(indices), strict=True):
                    found[index] = answer
                    self.cache_hook.add_partial(kind, requests[index].args, answer)
                    bar.update()
        return [found[index] for index in range(len(requests))]


def _generation(arguments: Mapping[str, Any]) -> tuple[SamplingOptions, int]:
    """What a task asks of the writing, and how many tokens it may have at most."""
    until = arguments.get("until") or []
    lengths = [arguments[name] for name in _LENGTHS if arguments.get(name) is not None]
    temperature = float(arguments.get("temperature") or 0)
    do_sample = arguments.get("do_sample")
    if do_sample is False:
        temperature = 0.0
    elif do_sample and not temperature:
        temperature = 1.0
    options = SamplingOptions(
        temperature=temperature,
        top_k=arguments.get("top_k") or 0,
        top_p=1.0 if arguments.get("top_p") is None else arguments["top_p"],
        seed=int(np.random.randint(1 << 31)) if temperature else None,
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
    )
    return options, int(lengths[0]) if lengths else MAX_GEN_TOKS


def main() -> None:
    """The harness's command line, with an engine's errors on one line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except GosletError as error:
        sys.exit(f"goslet: error: {error}")


if __name__ == "__main__":
    main()
