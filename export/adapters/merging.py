"""An adapter in its model: every form as arithmetic on a matrix, done when a tensor is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...errors import (
    CheckpointError,
    ExtraTensorError,
    InputError,
    MissingTensorError,
    TensorShapeError,
)
from ..models.tensors import TIME_STATE, Shape, squeezed
from ..readers.fla_names import from_fla6, from_fla7
from ..readers.hf_folder import from_old
from ..readers.stored import ConvertedTensor, FloatTensor, StoredModel, StoredTensor
from .pissa import ALIGNED, SHARE_TOLERANCE, align, holds_principal_part, sampled
from .reading import Adapter, Modules, Part

Named = Callable[[str, StoredTensor], Iterator[tuple[str, StoredTensor]]]

# RWKV-LM-RLHF adds this to the norms of a DoRA's columns; PEFT adds nothing to those of rows.
_COLUMN_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Product:
    """scale · up · down as a stored tensor.

    Attributes:
        up: [out, r].
        down: [r, in].
        scale: a factor.
    """

    up: Tensor
    down: Tensor
    scale: float

    @property
    def shape(self) -> Shape:
        """[out, in]."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def dtype(self) -> str:
        """As it is computed."""
        return "float32"

    @property
    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, rows: slice) -> Tensor:
        """Some rows."""
        return self.scale * (self.up[rows] @ self.down)


@dataclass(frozen=True)
class Added:
    """A tensor of the model and what is added to it."""

    base: StoredTensor
    change: StoredTensor

    @property
    def shape(self) -> Shape:
        """The model's."""
        return self.base.shape

    @property
    def dtype(self) -> str:
        """The model's."""
        return self.base.dtype

    @property
    def readable(self) -> bool:
        """The model's."""
        return self.base.readable

    def read(self, rows: slice) -> Tensor:
        """Some rows of the sum in float32."""
        base = self.base.read(rows)
        return base + self.change.read(rows).reshape(base.shape)


def merged(model: StoredModel, adapter: Adapter) -> StoredModel:
    """A model with the adapter in it; a change is computed when its tensor is read.

    Some matrices are read at once, to tell a PiSSA from a LoRA.

    Raises:
        CheckpointError: the file is a whole model, of which nothing of this one would be left; it is a PiSSA and what
            was taken out of the model is not given, or was not taken out of this one.
        InputError: the alpha of a LoRA is not known.
        MissingTensorError: half of a LoRA is missing.
        ExtraTensorError: the adapter changes a tensor that the model does not have.
        TensorShapeError: a tensor does not fit the one that it changes, or the two of a LoRA have different ranks.
    """
    return _Merger(model, adapter).merged()


class _Merger:
    def __init__(self, model: StoredModel, adapter: Adapter) -> None:
        self._model = model
        self._adapter = adapter
        self._tensors = dict(model.tensors)
        self._names = _naming(model, adapter)

    def merged(self) -> StoredModel:
        adapter = self._adapter
        # Whole tensors first: a change of one that is there too is a change of what took the model's place.
        replaced = {
            own: (part, stored)
            for name, part in adapter.whole.items()
            for own, stored in self._names(name, FloatTensor(part.tensor))
        }
        if self._model.tensors.keys() <= replaced.keys():
            raise CheckpointError(
                "is a whole model, not an adapter of one",
                file=adapter.path,
                expected="some of the model's tensors, or changes of them",
                remedy="export it by itself",
            )
        for own, (part, stored) in replaced.items():
            known = f"{own.removesuffix(TIME_STATE)}.ln1.weight" if own.endswith(TIME_STATE) else own
            if known not in self._tensors:
                raise self._unknown(part)
            if own in self._tensors and squeezed(self._tensors[own].shape) != squeezed(stored.shape):
                raise self._misfit(part, list(self._tensors[own].shape))
            self._tensors[own] = stored
        low_rank = {}
        for module, parts in adapter.modules.items():
            plain = self._plain(module)
            if plain is not None:
                self._target(plain, next(iter(parts.values())))
            if "blocks" in parts or "miss" in parts:
                for kind, part in parts.items():
                    if kind not in ("blocks", "miss"):
                        raise self._unknown(part)
                self._change_blocks(module, parts)
            else:
                low_rank[module] = self._pair(module, adapter.modules, "lora_A", "lora_B")
        self._add_products(low_rank)
        return replace(self._model, tensors=self._tensors, notes=self._model.notes + adapter.notes)

    def _add_products(self, pairs: Mapping[str, tuple[Part, Part]]) -> None:
        """LoRA, PiSSA and DoRA."""
        adapter = self._adapter
        if not pairs:
            return
        taken = {} if adapter.init is None else {module: self._taken_out(module) for module in pairs}
        for module, (down, up) in pairs.items():
            self._check_product(module, down, up, adapter.path)
            if module in taken:
                self._check_product(module, *taken[module], adapter.init_path)
        self._check_beginning(pairs, taken)
        for module, (down, up) in pairs.items():
            scale = self._scale(down)
            products = [Product(up.tensor, down.tensor, scale)]
            if module in taken:
                before_down, before_up = taken[module]
                products.insert(0, Product(before_up.tensor, before_down.tensor, -scale))
            for product in products:
                for own, change in self._names(module + ".weight", product):
                    base = self._target(own, down)
                    if squeezed(change.shape) != squeezed(base.shape):
                        raise self._misfit(down, list(base.shape))
                    self._tensors[own] = Added(base, change)
            self._rescale(module, adapter.modules[module])

    def _check_product(self, module: str, down: Part, up: Part, file: Path | None) -> None:
        if down.tensor.ndim != 2 or not down.tensor.shape[0]:
            raise self._misfit(down, "[rank, inputs]", file)
        rank = down.tensor.shape[0]
        if up.tensor.ndim != 2 or up.tensor.shape[1] != rank:
            raise self._misfit(up, f"[outputs, {rank}]", file)
        own = self._plain(module)
        if own is None:
            return
        n_out, n_in = self._matrix(own, down)
        if down.tensor.shape[1] != n_in:
            raise self._misfit(down, f"[rank, {n_in}]", file)
        if up.tensor.shape[0] != n_out:
            raise self._misfit(up, [n_out, rank], file)

    def _scale(self, down: Part) -> float:
        adapter, rank = self._adapter, down.tensor.shape[0]
        if adapter.took_out_plainly:
            return 1.0
        if adapter.config is not None:
            return adapter.config.scale(down.module, rank)
        if adapter.alpha is None:
            raise InputError(
                "is needed to merge a LoRA, whose file does not say it",
                file=adapter.path,
                place="alpha",
                remedy="give the lora_alpha of training (--alpha), or the folder with adapter_config.json",
            )
        return adapter.alpha / rank

    def _taken_out(self, module: str) -> tuple[Part, Part]:
        """What was taken out of a module when training began, in the form of its products."""
        init = self._adapter.init or {}
        own = ("init_A", "init_B") if self._adapter.took_out_plainly else ("lora_A", "lora_B")
        if module not in init:
            raise MissingTensorError(
                "holds nothing of a matrix that the adapter changes",
                file=self._adapter.init_path,
                place=module[:100],
                remedy="give what was saved when this adapter's training began",
            )
        return self._pair(module, init, *own)

    def _check_beginning(self, pairs: Mapping[str, tuple[Part, Part]], taken: Mapping[str, tuple[Part, Part]]) -> None:
        """Whether the products are to be added to the matrices as they are, or to what was left of them."""
        adapter = self._adapter
        config = adapter.config
        if config is not None and config.took_out and not taken:
            raise CheckpointError(
                f"began its training with {config.beginning}, which takes a part out of the model's matrices that must "
                "be taken out again",
                file=adapter.path,
                place=f"init_lora_weights in {config.path.name}",
                remedy="give the adapter as it was saved before training (--adapter-init FOLDER), or save it with "
                "PEFT's path_initial_model_for_weight_conversion; where the checkpoint is what was left of the model, "
                "set init_lora_weights to true",
            )
        # OLoRA takes its projection times the scale out, PEFT's others a projection whatever the scale is, and
        # RWKV-PEFT's PiSSA has none.
        unscaled = config is not None and config.beginning == "olora"
        plain, scaled = [], []
        for module in sampled([module for module in pairs if self._plain(module) is not None]):
            down, up = taken.get(module, pairs[module])
            weight = self._target(self._plain(module) or "", down).read(slice(None))
            found = align(weight, up.tensor, down.tensor)
            if not taken:
                plain.append(found)
                if config is not None or adapter.alpha is not None:
                    scaled.append(found.times(self._scale(down)))
                continue
            share = (found if unscaled else found.times(self._scale(pairs[module][0]))).share
            fits = abs(share - 1) <= SHARE_TOLERANCE  # which a NaN does not
            if not fits and not (config is not None and config.beginning == "lora_ga"):
                raise CheckpointError(
                    "is not what was taken out of this model's matrix when training began",
                    file=adapter.init_path,
                    place=module[:100],
                    expected="a part of it (share 1)",
                    found=f"share {share:.3g}",
                    remedy="give the checkpoint that was trained on and what was saved when this training began; of an "
                    "adapter of PEFT also its adapter_config.json or the right --alpha",
                )
        if holds_principal_part(plain) or holds_principal_part(scaled):
            raise CheckpointError(
                "is a PiSSA, not a LoRA: its products hold the principal part of the matrices that they would be "
                "added to, which was taken out of them for training and would count twice",
                file=adapter.path,
                expected=f"an alignment below {ALIGNED}",
                found=f"{sum(one.aligned for one in plain) / len(plain):.2f}",
                remedy="give what was saved when training began as --adapter-init: RWKV-PEFT's init_pissa.pth, in its "
                "proj_dir, or the adapter as PEFT saved it before training",
            )

    def _rescale(self, module: str, parts: Mapping[str, Part]) -> None:
        """DoRA's magnitudes, of a matrix that its product is in already."""
        if "column_norms" in parts:
            part, axis, eps = parts["column_norms"], 0, _COLUMN_NORM_EPS
        elif "row_norms" in parts:
            part, axis, eps = parts["row_norms"], 1, 0.0
        else:
            return
        own = self._plain_or_refused(module, part, "DoRA")
        n_out, n_in = self._matrix(own, part)
        wanted = (1, n_in) if axis == 0 else (n_out,)
        if tuple(part.tensor.shape) != wanted:
            raise self._misfit(part, list(wanted))
        sizes = part.tensor.unsqueeze(1) if axis else part.tensor

        def merge(weight: Tensor) -> Tensor:
            norms: Tensor = torch.linalg.vector_norm(weight, dim=axis, keepdim=True)
            return sizes * weight / (norms + eps)

        self._tensors[own] = ConvertedTensor(self._tensors[own], (n_out, n_in), merge)

    def _change_blocks(self, module: str, parts: Mapping[str, Part]) -> None:
        """Bone, DiSHA, MiSS and bat."""
        by_peft = "miss" in parts
        part = parts["miss" if by_peft else "blocks"]
        own = self._plain_or_refused(module, part, "this form")
        base = self._target(own, part)
        n_out, n_in = self._matrix(own, part)
        change, config = part.tensor, self._adapter.config
        mini = config.mini_rank if config is not None and by_peft else 0
        if mini and n_out % mini == 0 and change.ndim == 2 and change.shape[1] == mini:
            change = change.repeat(1, n_out // mini)
        if change.ndim == 2 and change.shape[0] and change.shape[1] == n_out:
            places = torch.arange(n_in) % change.shape[0]
            merge = lambda weight: weight + change[places].T  # noqa: E731 - one of two
        else:
            size = change.shape[-1] if change.ndim == 3 else 0
            along = n_out if by_peft else n_in
            fits = size and tuple(change.shape) == (along / size, size, size) and not (n_out % size or n_in % size)
            if not fits:
                raise self._misfit(
                    part,
                    f"[rank, {n_out}], or [{along} / rank, rank, rank] with a rank that divides {n_out} and {n_in}",
                )
            each = change[:, None] if by_peft else change

            def merge(weight: Tensor) -> Tensor:
                blocks = weight.reshape(n_out // size, size, n_in // size, size).transpose(1, 2)
                return (blocks + blocks @ each + each).transpose(1, 2).reshape(n_out, n_in)

        self._tensors[own] = ConvertedTensor(base, base.shape, merge)

    def _pair(self, module: str, modules: Modules, first: str, second: str) -> tuple[Part, Part]:
        parts = modules[module]
        for wanted, other in ((first, second), (second, first)):
            if wanted not in parts:
                missing = wanted.replace("init_", "init_lora_")
                raise MissingTensorError(
                    "a LoRA lacks one of its two",
                    file=self._adapter.path if modules is self._adapter.modules else self._adapter.init_path,
                    place=f"{module}.{missing}"[:100],
                    found=(parts[other] if other in parts else next(iter(parts.values()))).name[:100],
                    remedy="the file is incomplete; save the adapter again",
                )
        return parts[first], parts[second]

    def _plain(self, module: str) -> str | None:
        """The model's tensor that a module is, where it lies there as it does in the adapter's own names."""
        probe = FloatTensor(torch.zeros(5, 5))
        found = list(self._names(module + ".weight", probe))
        return found[0][0] if len(found) == 1 and found[0][1] is probe else None

    def _plain_or_refused(self, module: str, part: Part, form: str) -> str:
        own = self._plain(module)
        if own is None:
            raise CheckpointError(
                f"changes a matrix in a way ({form}) that goslet does not merge there, because RWKV's own files hold "
                "it in another form",
                file=self._adapter.path,
                place=part.name[:100],
                remedy="merge it with PEFT (merge_and_unload) and export the model that this makes",
            )
        return own

    def _target(self, own: str, part: Part) -> StoredTensor:
        if own not in self._tensors:
            raise self._unknown(part)
        return self._tensors[own]

    def _matrix(self, own: str, part: Part) -> tuple[int, int]:
        base = self._target(own, part)
        if len(base.shape) != 2:
            raise self._misfit(part, "a change of a matrix")
        return base.shape[0], base.shape[1]

    def _unknown(self, part: Part) -> ExtraTensorError:
        return ExtraTensorError(
            "the adapter changes a tensor that the model does not have",
            file=self._adapter.path,
            place=part.name[:100],
            expected="tensors of the model, or their lora_A and lora_B, bone, disha or miss_block",
            remedy="it belongs to another model or version, or is of a form that goslet does not merge",
        )

    def _misfit(self, part: Part, expected: object, file: Path | None = None) -> TensorShapeError:
        return TensorShapeError(
            "the adapter does not fit the model",
            file=file or self._adapter.path,
            place=part.name[:100],
            expected=expected,
            found=list(part.tensor.shape),
            remedy="use the model that it was trained on",
        )


def _naming(model: StoredModel, adapter: Adapter) -> Named:
    """From the adapter's names to RWKV's own, told apart by the names themselves."""
    names = [*adapter.modules, *adapter.whole]
    if any(name.startswith("model.layers.") for name in names):
        return from_fla7 if "blocks.0.att.r_k" in model.tensors else from_fla6
    return _from_transformers


def _from_transformers(name: str, stored: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    """Names of transformers' RWKV, whose prefix is off, and RWKV's own."""
    return from_old(f"rwkv.{name}" if name.startswith("embeddings.") else name, stored)
