"""From a checkpoint to an engine file: read, trace, quantize, write."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from .. import __version__
from ..chat import BUILT_IN, chat_template
from ..enginefile import EngineFile, TensorSource, write_engine
from ..errors import InputError, OutputError, TokenizerError
from ..output import check_output, hidden_folder
from ..residuals import with_residuals
from ..spec import ModelSpec, StateSpec
from ..tokenizer import (
    Tokenizer,
    TrieTokenizer,
    WorldTokenizer,
    check_fits,
    load_tokenizer,
    tokenizer_from_file,
    world_tokenizer,
)
from ..weights import FLOAT_BYTES, EncodedWeight, WeightFormat, encode_blocks
from .activations import split
from .adapters import read_adapter
from .calibration import MomentsFile, multiplied, open_moments
from .calibration_text import CALIBRATION_TOKENS
from .checkpoint import Checkpoint, open_checkpoint
from .compensate import Compensation, compensate
from .gptq import quantize_matrix
from .graph import OPSET, trace_step
from .models.tensors import TensorRule
from .onnxfile import FORMS, ONNXRUNTIME, PORTABLE, write_onnx
from .quantize import GPTQ, MENU, RTN, Recipe, budget_recipe, check_budget, recipe
from .residuals import add_to_graph, add_to_program
from .sensitivity import losses, output_sensitivities
from .streamed import MAX_FILE_BYTES, check_name, data_path
from .tuned_state import read_tuned_state, state_matrices
from .valid_onnx import check_graph

Progress = Callable[[str, int, int], None]
# What stands for a vocabulary without being a path.
TOKENIZER_NAMES = ("bytes", "none", "world")
# A word in the names of RWKV-7's G series, such as rwkv7-g1a-0.1b-20250728-ctx4096.pth, rwkv-g1k-13b-5228.pth or
# rwkv7-2.9B-g1: g1, g1k, g0a2. (Not g64, which is a group of quantization.)
_G_SERIES = re.compile(r"g\d(?:[a-z]\d?)?", re.IGNORECASE)
_LAST_OF_2025 = 2025_12_31


@dataclass(frozen=True)
class ExportReport:
    """What an export made.

    Attributes:
        path: the engine file.
        size_bytes: its size.
        bits_per_weight: bits of the weights section per number of the model, scales included.
        model_id: the model's id.
        spec: the model's dimensions.
        tokenizer_kind: ``world``, ``trie``, ``hf``, ``bytes`` or None.
        calibration_tokens: tokens that were read to calibrate, or None.
        onnx: the files of the ONNX model, if one was asked for.
        duration_s: seconds that the export took.
        notes: what the owner should know of how the checkpoint was read, a sentence each.
    """

    path: Path
    size_bytes: int
    bits_per_weight: float
    model_id: str
    spec: ModelSpec
    tokenizer_kind: str | None
    calibration_tokens: int | None
    onnx: tuple[Path, ...]
    duration_s: float
    notes: tuple[str, ...]


def export_engine(
    checkpoint: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    quant: str | Recipe = "int8",
    group: int = 32,
    bits: float | None = None,
    method: str | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    moments: str | os.PathLike[str] | None = None,
    compensation: Compensation | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    norm_eps: float | None = None,
    state: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    alpha: float | None = None,
    adapter_init: str | os.PathLike[str] | None = None,
    chat: str | os.PathLike[str] | None = None,
    onnx: str | os.PathLike[str] | None = None,
    onnx_form: str = ONNXRUNTIME,
    onnx_batch: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Compile a checkpoint into an engine file, which appears whole or not at all.

    Args:
        checkpoint: an RWKV of version 4, 5, 6, 7 or 7a: a ``.pth``, ``.safetensors`` or ``.gguf`` file, or a Hugging
            Face folder.
        path: the engine file to write.
        quant: f32, f16, bf16, int8, int4 or int3, or a recipe of one's own.
        group: weights that share a scale, 32, 64 or 128; for the integer formats.
        bits: bits per weight of the whole model, scales, padding and vectors included; a calibration then chooses a
            format for every tensor (`goslet.export.quantize.budget_recipe`), and `quant` and `group` are not used.
        method: how integers are chosen: ``gptq``, with error feedback (`goslet.export.gptq`), or ``rtn``, rounding to
            the nearest (`goslet.weights.encode`). None means gptq where there is a calibration, else rtn.
        calibrate: a UTF-8 text to calibrate on (`goslet.export.calibration`).
        calibration_tokens: how many of its tokens.
        moments: where what calibration finds is kept. A file that exists there is used, and finished if it is not.
        compensation: what is put beside quantized matrices to make up for their errors (`goslet.export.compensate`),
            by the calibration's text.
        tokenizer: ``world``, ``bytes``, the path of a vocabulary in the World format (.txt) or a tokenizer.json, or
            ``none`` for an engine that takes and gives token ids only. None means the one in the checkpoint's folder or
            GGUF file where there is one that goslet can use, then bytes for a vocabulary of 256, and for any other
            token ids only.
        norm_eps: eps of the per-head group norm; None is the checkpoint's, or else the version's own.
        state: a tuned initial state (`goslet.export.tuned_state`), which fresh sessions of the engine then begin with;
            it goes before one that lies in the adapter or beside the checkpoint's own tensors.
        adapter: a LoRA, PiSSA, DoRA, bone, DiSHA or state adapter, or a folder of PEFT's, merged into the model
            (`goslet.export.adapters`).
        alpha: the ``lora_alpha`` that a LoRA was trained with, where no ``adapter_config.json`` beside it says it.
        adapter_init: what PiSSA took out of the model when training began (RWKV-PEFT's ``init_pissa.pth``).
        chat: the chat template, a name in `goslet.chat.BUILT_IN`, ``none``, or the path of a JSON file. None means that
            of the G series for an RWKV-7 that is named as its files are, g1-2025 up to that year's last and g1 after
            it, and world for any other.
        onnx: write also a self-contained ONNX model that takes a token, here (`goslet.export.onnxfile`); beyond 2 GiB
            its weights lie in a second file beside it, ``NAME.data``.
        onnx_form: ``onnxruntime``, or ``portable`` for other runtimes.
        onnx_batch: rows of the ONNX model's inputs; None leaves them open.
        overwrite: replace files that exist.
        progress: called with a stage's name, the work done and all of it.

    Raises:
        CheckpointError: the checkpoint, the state or the adapter cannot be read, or they do not fit together.
        TokenizerError, DependencyError: the tokenizer cannot be read or does not fit.
        QuantizationError: the recipe cannot be applied.
        OutputError: an output exists and `overwrite` is false, cannot be written, or is also an input.
        InputError: there is no such chat template; `norm_eps` or `alpha` is not above 0; `alpha` or a calibration is
            missing or of no use; or the calibration text cannot be used.
        ContainerError: the moments file is damaged.
        NonFiniteError: the model gives NaN or infinity on the calibration text.
    """
    start_s = time.monotonic()
    report_progress = progress or (lambda stage, done, total: None)
    if onnx_form not in FORMS:
        raise InputError("no such form", place="onnx_form", expected=" or ".join(FORMS), found=repr(onnx_form))
    if onnx_batch is not None and (isinstance(onnx_batch, bool) or not isinstance(onnx_batch, int) or onnx_batch < 1):
        raise InputError("is no number of rows", place="onnx_batch", expected="1 or more", found=repr(onnx_batch))
    outputs = [path] if onnx is None else [path, onnx]
    for output in outputs:
        check_output(output, overwrite)
    if onnx is not None:
        outputs.append(data_path(Path(onnx)))
    if moments is not None:
        outputs.append(moments)
    vocabulary_file = None if tokenizer in TOKENIZER_NAMES else tokenizer
    _check_apart(
        {
            "the checkpoint": checkpoint,
            "the tokenizer": vocabulary_file,
            "the state": state,
            "the adapter": adapter,
            "the adapter's beginning": adapter_init,
            "the chat template": None if chat == "none" or chat in BUILT_IN else chat,
            "the calibration text": calibrate,
        },
        outputs,
    )
    if norm_eps is not None and not (isinstance(norm_eps, float) and math.isfinite(norm_eps) and norm_eps > 0):
        raise InputError("is not a positive number", place="norm_eps", expected="a float above 0", found=repr(norm_eps))
    chosen = recipe(quant, group) if isinstance(quant, str) else quant
    calibrated = calibrate is not None or moments is not None
    by_feedback = _by_feedback(method, bits, chosen, calibrated, compensation)
    conversation = None if chat in (None, "none") else chat_template(chat)
    change = read_adapter(adapter, alpha, adapter_init)
    with open_checkpoint(checkpoint, norm_eps=norm_eps, adapter=change) as source:
        spec, version = source.spec, source.version
        notes = [*source.notes]
        if chat is None:
            usual = usual_chat(checkpoint, spec.version)
            conversation = chat_template(usual)
            if usual != "world":
                notes.append(f"conversations are written as the template {usual} says, which the file's name asks for")
        vocabulary = _vocabulary(tokenizer, source, notes.append)
        state_spec = version.state_spec(spec)
        if bits is not None:
            check_budget(bits, source.rules)
        if onnx is not None and _onnx_bytes(source.rules, chosen, bits, onnx_form) > MAX_FILE_BYTES:
            check_output(data_path(Path(onnx)), overwrite)
            check_name(data_path(Path(onnx)))
        initial_state = _initial_state(state, source, state_spec, notes.append)
        report_progress("hashing", 0, 1)
        model_id = source.model_id()
        report_progress("hashing", 1, 1)
        inputs = (
            open_moments(
                source,
                model_id,
                vocabulary,
                text=calibrate,
                n_tokens=calibration_tokens,
                path=moments,
                beside=path,
                initial_state=initial_state,
                progress=report_progress,
            )
            if calibrated
            else nullcontext()
        )
        with inputs as seen:
            if bits is not None and seen is not None:
                chosen = _bought(bits, source, seen, initial_state, report_progress)
            formats = {rule.name: chosen.format_of(rule) for rule in source.rules}
            report_progress("tracing", 0, 1)
            graph = trace_step(version, spec, source.rules, formats)
            report_progress("tracing", 1, 1)
            write = partial(
                write_engine,
                spec=spec,
                state_spec=state_spec,
                model_id=model_id,
                graph_info={"format": "onnx", "opset": OPSET},
                initial_state=initial_state,
                chat=conversation,
                tokenizer=None if vocabulary is None else (vocabulary.kind, vocabulary.to_bytes()),
                provenance={
                    "goslet": __version__,
                    "source": source.path.name,
                    "source_format": source.format,
                    "recipe": chosen.to_json(),
                    **({} if state is None else {"state": Path(state).name}),
                    **({} if change is None else {"adapter": change.path.name}),
                    **({} if adapter_init is None else {"adapter_init": Path(adapter_init).name}),
                    **({} if change is None or change.told_alpha is None else {"alpha": change.told_alpha}),
                    **({} if norm_eps is None else {"norm_eps": norm_eps}),
                    **({} if seen is None else {"calibration_tokens": seen.tokens.size}),
                    **({"method": GPTQ} if by_feedback else {}),
                    **({} if compensation is None else {"compensation": compensation.to_json()}),
                },
            )
            tensors = _tensors(source, formats, seen if by_feedback else None, report_progress)
            program = version.program(spec).to_bytes()
            if compensation is None:
                write(path, graph=_stored_graph(graph), tensors=tensors, program=program, overwrite=overwrite)
            else:
                tokens = None if seen is None else seen.tokens
                with _plain_engine(write, path, graph, tensors, program) as plain:
                    residuals = compensate(plain, source, tokens, compensation, report_progress)
                    add_to_graph(graph, residuals)
                    write(
                        path,
                        graph=_stored_graph(graph),
                        tensors=with_residuals(plain, residuals),
                        program=add_to_program(program, residuals),
                        overwrite=overwrite,
                    )
    with EngineFile.open(path) as engine:
        onnx_files: tuple[Path, ...] = ()
        if onnx is not None:
            report_progress("writing ONNX", 0, 1)
            onnx_files = write_onnx(engine, onnx, form=onnx_form, batch=onnx_batch, overwrite=overwrite)
            report_progress("writing ONNX", 1, 1)
        return ExportReport(
            path=Path(path),
            size_bytes=engine.size_bytes,
            bits_per_weight=engine.bits_per_weight,
            model_id=model_id,
            spec=spec,
            tokenizer_kind=engine.tokenizer_kind,
            calibration_tokens=engine.provenance.get("calibration_tokens"),
            onnx=onnx_files,
            duration_s=time.monotonic() - start_s,
            notes=tuple(notes),
        )


def _stored_graph(graph: ModelProto) -> bytes:
    """The step graph as an engine holds it."""
    stored = ModelProto()
    stored.CopyFrom(graph)
    split(stored)
    check_graph(stored)
    content: bytes = stored.SerializeToString(deterministic=True)
    return content


@contextmanager
def _plain_engine(
    write: Callable[..., None],
    path: str | os.PathLike[str],
    graph: ModelProto,
    tensors: list[TensorSource],
    program: bytes,
) -> Iterator[EngineFile]:
    """The engine without residuals, in a hidden folder beside `path` while it is used."""
    with hidden_folder(path) as folder:
        place = Path(folder) / "plain.goslet"
        content = graph.SerializeToString(deterministic=True)
        write(place, graph=content, tensors=tensors, program=program, overwrite=False)
        with EngineFile.open(place) as plain:
            yield plain


def _onnx_bytes(rules: Sequence[TensorRule], chosen: Recipe, bits: float | None, form: str) -> float:
    """About how large an ONNX model's weights will be, rather more than less."""
    # An embedding of 3 or 4 bits takes 8 there, and a scale of a group of 32 takes 32; in the portable form all
    # integers take 8, and bf16 takes 32.
    float_bytes = FLOAT_BYTES | ({"bf16": 4} if form == PORTABLE else {})
    return sum(
        math.prod(rule.shape) * (2 if bits is not None else float_bytes.get(chosen.format_of(rule).name, 1.125))
        for rule in rules
    )


def _by_feedback(
    method: str | None, bits: float | None, chosen: Recipe, calibrated: bool, compensation: Compensation | None
) -> bool:
    """Whether errors are fed back; what needs a calibration has one, and a calibration has a use."""
    if method not in (None, RTN, GPTQ):
        raise InputError("no such method", place="method", expected=f"{RTN} or {GPTQ}", found=repr(method))
    if bits is not None and not (isinstance(bits, int | float) and math.isfinite(bits) and bits > 0):
        raise InputError("is not a positive number", place="bits", expected="a number above 0", found=repr(bits))
    needed = "bits" if bits is not None else f"method {GPTQ}" if method == GPTQ else None
    if needed is None and compensation is not None and compensation.needs_text:
        needed = "residuals (--low-rank, --sparse)"
    if needed and not calibrated:
        raise InputError(
            "needs a calibration", place=needed, remedy="give a text (--calibrate) or a moments file (--moments)"
        )
    integers = any(fmt.is_integer for fmt in [*chosen.by_kind.values(), *chosen.by_name.values()])
    if calibrated and bits is None and compensation is None and (method == RTN or not integers):
        raise InputError(
            "would change nothing",
            place="calibration",
            found=f"method {RTN}" if integers else chosen.name,
            remedy="leave it out, or choose int8, int4, int3 or a number of bits and the method gptq",
        )
    return calibrated and method != RTN and (bits is not None or integers)


def _bought(
    bits: float,
    source: Checkpoint,
    seen: MomentsFile,
    initial_state: Mapping[str, NDArray[np.float32]] | None,
    report_progress: Progress,
) -> Recipe:
    """The recipe that a budget of bits buys."""
    sensitivities = output_sensitivities(source, seen.tokens, initial_state=initial_state, progress=report_progress)
    found = losses(source, seen, sensitivities, MENU, progress=report_progress)
    return budget_recipe(bits, source.rules, found)


def _check_apart(inputs: Mapping[str, str | os.PathLike[str] | None], outputs: list[str | os.PathLike[str]]) -> None:
    """Refuse to write over what is read, or one output over the other."""
    taken = {os.path.realpath(path): what for what, path in inputs.items() if path is not None}
    for output in outputs:
        real = os.path.realpath(output)
        folder = os.path.dirname(real)
        if folder in taken and os.path.exists(real):
            raise OutputError(f"is part of {taken[folder]}", file=output, remedy="choose another name")
        if real in taken:
            raise OutputError(f"is also {taken[real]}", file=output, remedy="choose another name")
        taken[real] = "the engine"


def _initial_state(
    path: str | os.PathLike[str] | None, source: Checkpoint, state_spec: StateSpec, note: Callable[[str], None]
) -> dict[str, NDArray[np.float32]] | None:
    """A tuned state, if there is one, with the fresh values of the tensors that are never tuned."""
    if path is None and not source.tuned_state:
        return None
    tuned = (
        state_matrices(source.tuned_state, source.spec, source.path)
        if path is None
        else read_tuned_state(path, source.spec, note=note)
    )
    return {
        tensor.name: tuned.get(tensor.name, np.full(tensor.shape, tensor.init, np.float32))
        for tensor in state_spec.tensors
    }


def usual_chat(checkpoint: str | os.PathLike[str], version: str) -> str:
    """The built-in chat template of a checkpoint that is named so, or lies in a folder that is where it is not."""
    path = Path(checkpoint).resolve()
    name = path.name if "rwkv" in path.name.lower() else f"{path.parent.name}-{path.name}"
    words = re.split(r"[-_. ]+", name.lower())
    is_g_series = any(word.startswith("rwkv") for word in words) and any(map(_G_SERIES.fullmatch, words))
    if not is_g_series or not version.startswith("7"):
        return "world"
    dates = [int(word) for word in words if re.fullmatch(r"20\d{6}", word)]
    return "g1-2025" if dates and dates[0] <= _LAST_OF_2025 else "g1"


def _vocabulary(
    choice: str | os.PathLike[str] | None, source: Checkpoint, note: Callable[[str], None]
) -> Tokenizer | None:
    """The tokenizer that was asked for or lies beside the checkpoint, where there is one that goslet can use."""
    if choice == "none":
        return None
    beside = source.tokenizer
    try:
        vocabulary = _tokenizer(beside if choice is None else choice, source.spec.vocab_size)
    except TokenizerError as error:
        # A tokenizer.json comes with every folder that transformers saves, and most kinds of it are not exact.
        if choice is None and isinstance(beside, Path) and beside.suffix == ".json":
            note(f"the engine takes and gives token ids only, as its folder's tokenizer cannot be used: {error}")
            return None
        raise TokenizerError(
            error.problem,
            file=error.file,
            place=error.place,
            expected=error.expected,
            found=error.found,
            remedy=f"{error.remedy + ', or ' if error.remedy else ''}--tokenizer none for an engine of token ids",
        ) from error
    if isinstance(vocabulary, TrieTokenizer):
        _note_gaps(vocabulary, source.spec.vocab_size, note)
    return vocabulary


def _note_gaps(vocabulary: TrieTokenizer, vocab_size: int, note: Callable[[str], None]) -> None:
    """What a vocabulary lacks, which is as it should be or comes of a file that was cut off."""
    if isinstance(vocabulary, WorldTokenizer):
        return
    if vocabulary.n_entries + 1 < vocab_size:
        note(f"the vocabulary has {vocabulary.n_entries} tokens for the model's {vocab_size} ids")
    lacking = 256 - len(vocabulary.single_bytes())
    if lacking:
        note(f"the vocabulary has no token for {lacking} of the 256 bytes: a text that needs one is refused")


def _tokenizer(choice: str | os.PathLike[str] | Callable[[], Tokenizer] | None, vocab_size: int) -> Tokenizer | None:
    if choice is None:
        return load_tokenizer("bytes", b"") if vocab_size == 256 else None
    if choice == "bytes":
        vocabulary = load_tokenizer("bytes", b"")
    elif choice == "world":
        vocabulary = world_tokenizer()
    elif callable(choice):
        vocabulary = choice()
    else:
        vocabulary = tokenizer_from_file(choice)
    check_fits(vocabulary, vocab_size)
    return vocabulary


def _tensors(
    source: Checkpoint, formats: dict[str, WeightFormat], seen: MomentsFile | None, report_progress: Progress
) -> list[TensorSource]:
    """What is written; with moments, the matrices that are multiplied with and become integers are made by them."""
    done = iter(range(1, len(source.rules) + 1))
    fed_back = {rule.name for rule in multiplied(source.rules) if formats[rule.name].is_integer and seen is not None}

    def encoded(rule: TensorRule) -> EncodedWeight:
        if seen is not None and rule.name in fed_back:
            weight = quantize_matrix(source.tensor(rule), formats[rule.name], seen.inputs(rule), rule.name)
        else:
            blocks = (block.numpy() for block in source.blocks(rule))
            weight = encode_blocks(blocks, rule.shape, formats[rule.name], rule.name)
        report_progress("quantizing", next(done), len(source.rules))
        return weight

    return [
        TensorSource(rule.name, formats[rule.name], rule.shape, lambda rule=rule: encoded(rule), rule.layout)  # type: ignore[misc]
        for rule in source.rules
    ]
