"""Reading an adapter: a file and the ``adapter_config.json`` beside it, if there is one, or PEFT's folder of both."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CheckpointError, InputError, TensorValueError
from ..readers.beside import Beside, load_beside
from .adapter_config import CONFIG_NAME, AdapterConfig, read_adapter_config

# In the order in which PEFT looks for them.
_FOLDER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# What a name ends in, and which part of a module's change that is. PEFT may put an adapter's own name behind.
_PARTS = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "init_lora_A": "init_A",
    "init_lora_B": "init_B",
    "lora_M": "column_norms",
    "lora_magnitude_vector": "row_norms",
    "bone": "blocks",
    "disha": "blocks",
    "miss_block": "miss",
    "bone_block": "miss",
}
_PART = re.compile(rf"(.+)\.({'|'.join(_PARTS)})(?:\.(?!weight$)([\w-]+))?(?:\.weight)?", re.ASCII)
_WRAPPED = re.compile(r"\.(?:modules_to_save\.[\w-]+|base_layer)(?=\.)", re.ASCII)
# Wrappers that training puts around modules after PEFT has found them; others were there before, and PEFT saw them.
_WRAPPED_LATER = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", re.ASCII)
_QUANTIZED = re.compile(
    r".+\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\S+|SCB|weight_format|qweight|qzeros|scales)",
    re.ASCII,
)


@dataclass(frozen=True)
class Part:
    """A tensor of an adapter.

    Attributes:
        name: its name, as the file has it behind all prefixes.
        tensor: float32, finite.
        module: of a part of a module's change, the module's name in the model that was trained, which
            ``adapter_config.json`` goes by.
    """

    name: str
    tensor: Tensor
    module: str = ""


Modules = Mapping[str, Mapping[str, Part]]


@dataclass(frozen=True)
class Adapter:
    """An adapter's tensors.

    Attributes:
        path: the file or folder.
        alpha: LoRA's alpha, where it was told; a config may say more (`AdapterConfig.scale`).
        config: what an ``adapter_config.json`` says, where there is one.
        modules: the parts of each module's change, by the module's name in the file and the part's own.
        whole: tensors that were trained as a whole, by their names in the file.
        init: the modules as they were when training began, of PiSSA and the like, or None.
        init_path: where those lie.
        notes: what the owner should know of how the files were read, a sentence each.
    """

    path: Path
    alpha: float | None
    config: AdapterConfig | None
    modules: Modules
    whole: Mapping[str, Part]
    init: Modules | None = None
    init_path: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def told_alpha(self) -> float | None:
        """Alpha, whoever said it."""
        return self.alpha if self.config is None else self.config.alpha

    @property
    def took_out_plainly(self) -> bool:
        """Whether what was taken out is RWKV-PEFT's, which takes it and adds the trained product without any scale."""
        return self.init is not None and any("init_A" in parts or "init_B" in parts for parts in self.init.values())


def read_adapter(
    path: str | os.PathLike[str] | None, alpha: float | None, init: str | os.PathLike[str] | None = None
) -> Adapter | None:
    """Read an adapter; it meets its model in `merged`.

    Args:
        path: a file of tensors, or a folder of PEFT's; None for no adapter, and then None is returned.
        alpha: the ``lora_alpha`` of training; for LoRA alone, and only where no ``adapter_config.json`` says it.
        init: what PiSSA took out of the model when training began: RWKV-PEFT's ``init_pissa.pth``, or the adapter as
            PEFT saved it before training.

    Raises:
        CheckpointError: a file cannot be read, or is no adapter, or of a kind that goslet does not merge.
        TensorValueError: a tensor is not finite.
        InputError: alpha is not a positive number, contradicts the config, or is of no use; init is of no use.
    """
    if path is None:
        for name, given in (("alpha", alpha), ("adapter_init", init)):
            if given is not None:
                raise InputError("is given without an adapter", place=name, remedy="give the adapter, or leave it out")
        return None
    path = Path(path)
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise InputError("is not a positive number", place="alpha", found=alpha)
    config, beside = _load(path)
    notes = beside.notes
    modules, whole = _sorted_out(beside, path)
    if any("init_A" in parts or "init_B" in parts for parts in modules.values()):
        raise CheckpointError(
            "is what PiSSA took out of the model when training began, not what was trained",
            file=path,
            expected="names that end in lora_A and lora_B",
            found=next(part.name for parts in modules.values() for part in parts.values())[:100],
            remedy="give this file as --adapter-init, and the trained one (rwkv-N.pth) as --adapter",
        )
    low_rank = any(_is_low_rank(parts) for parts in modules.values())
    if not modules:
        config = None  # of whole tensors and states it says nothing
    if config is not None:
        trained = {part.module for parts in modules.values() for part in parts.values()}
        unused = config.without_module(trained)
        if unused:
            notes += (
                f"{config.path.name}: {', '.join(unused)[:200]}: of no use, as this adapter changes no module of that "
                f"name; the names of those that it changes are such as {min(trained)[:100]}",
            )
    adapter = Adapter(path, alpha, config, modules, whole, notes=notes)
    _check_kind(adapter)
    if init is not None:
        adapter = _with_init(adapter, Path(init), low_rank)
    if not low_rank and alpha is not None:
        raise InputError(
            "belongs to a LoRA, which this adapter is not", file=path, place="alpha", remedy="leave it out"
        )
    if config is not None and config.alpha is not None and alpha is not None and alpha != config.alpha:
        raise InputError(
            f"contradicts {CONFIG_NAME} beside the adapter",
            file=path,
            place="alpha",
            expected=f"{config.alpha:g}, which is lora_alpha in {config.path}",
            found=f"{alpha:g}",
            remedy="leave --alpha out, or correct the config",
        )
    if adapter.took_out_plainly and alpha is not None:
        raise InputError(
            "does not belong to a PiSSA of RWKV-PEFT, which is trained and merged without one",
            file=path,
            place="alpha",
            remedy="leave it out",
        )
    return adapter


def _is_low_rank(parts: Mapping[str, Part]) -> bool:
    return any(part in parts for part in ("lora_A", "lora_B", "embedding_A", "embedding_B"))


def _load(path: Path) -> tuple[AdapterConfig | None, Beside]:
    """An adapter's config, where there is one, and its tensors."""
    config: AdapterConfig | None
    if path.is_dir():
        if not (path / CONFIG_NAME).is_file():
            raise CheckpointError(
                f"is a folder without {CONFIG_NAME}, so no adapter of PEFT",
                file=path,
                remedy="give the adapter's own folder or file; a folder with a whole model is exported by itself",
            )
        config = read_adapter_config(path / CONFIG_NAME)
        file = next((path / name for name in _FOLDER_FILES if (path / name).is_file()), None)
        if file is None:
            raise CheckpointError("holds no weights", file=path, expected=" or ".join(_FOLDER_FILES))
    elif path.is_file():
        file, beside = path, path.parent / CONFIG_NAME
        config = read_adapter_config(beside) if beside.is_file() else None
    else:
        raise CheckpointError("is no file", file=path, remedy="check the path")
    beside_model = load_beside(file)
    tensors = beside_model.tensors
    if not tensors:
        raise CheckpointError("holds no tensor", file=path, expected="an adapter")
    for name, tensor in tensors.items():
        if _QUANTIZED.fullmatch(name):
            raise CheckpointError(
                "holds quantized weights of a base model, not an adapter alone",
                file=file,
                place=name[:100],
                found=str(tensor.dtype),
                remedy="save the adapter alone (PEFT's save_pretrained does), and merge it into the base as it was "
                "before quantization",
            )
        if not tensor.dtype.is_floating_point or not torch.isfinite(tensor.float()).all():
            raise TensorValueError("is not finite numbers", file=file, place=name[:100], found=str(tensor.dtype))
    return config, beside_model._replace(tensors={name: tensor.detach().float() for name, tensor in tensors.items()})


def _sorted_out(beside: Beside, path: Path) -> tuple[dict[str, dict[str, Part]], dict[str, Part]]:
    """The changes of modules, and the tensors that are whole."""
    modules: dict[str, dict[str, Part]] = {}
    whole: dict[str, Part] = {}
    adapters = set()
    for name, tensor in beside.tensors.items():
        found = _PART.fullmatch(name)
        if found is None:
            whole[_WRAPPED.sub("", name)] = Part(name, tensor)
            continue
        parts, part = modules.setdefault(_module(found[1]), {}), _PARTS[found[2]]
        adapters.add(found[3])
        if part in parts and len(adapters) == 1:
            raise CheckpointError(
                "two tensors stand for one", file=path, place=name[:100], found=parts[part].name[:100]
            )
        long_name = _WRAPPED_LATER.sub("", beside.long_names[name])
        # Wrappers may stand before the name of the part, but never within it.
        parts[part] = Part(name, tensor, _module(long_name.removesuffix(name[found.end(1) :])))
    if len(adapters) > 1:
        raise CheckpointError(
            "holds several adapters",
            file=path,
            found=", ".join(sorted(str(name) for name in adapters))[:100],
            remedy="save one of them alone (PEFT's save_pretrained has selected_adapters)",
        )
    for parts in modules.values():
        if "embedding_A" in parts and "embedding_B" in parts:
            # PEFT holds those of an embedding [tokens, width] the other way round, as its transpose's.
            first, second = parts.pop("embedding_A"), parts.pop("embedding_B")
            parts["lora_A"] = Part(second.name, second.tensor.T, second.module)
            parts["lora_B"] = Part(first.name, first.tensor.T, first.module)
    return modules, whole


def _module(name: str) -> str:
    """A module's own name, without what PEFT puts around modules."""
    return _WRAPPED.sub("", f"{name}.")[:-1]


def _check_kind(adapter: Adapter) -> None:
    """The config and the tensors are of one kind of adapter, and nothing is missing for it."""
    config, found = adapter.config, {part for parts in adapter.modules.values() for part in parts}
    miss = "miss" in found
    if config is not None:
        fits = miss if config.kind != "LORA" else bool(found & {"lora_A", "lora_B", "embedding_A", "embedding_B"})
        if not fits or config.dora != ("row_norms" in found):
            raise CheckpointError(
                f"belongs to another adapter than the {CONFIG_NAME} beside it describes",
                file=adapter.path,
                expected=f"{config.kind}{' with use_dora' if config.dora else ''}, as {config.path} says",
                found=next(part.name for parts in adapter.modules.values() for part in parts.values())[:100],
                remedy="give the adapter from a folder of its own",
            )


def _with_init(adapter: Adapter, path: Path, low_rank: bool) -> Adapter:
    """The adapter with what was taken out of its model when its training began."""
    if not low_rank:
        raise InputError(
            "belongs to PiSSA, which this adapter is not",
            file=adapter.path,
            place="adapter_init",
            remedy="leave it out",
        )
    config, beside = _load(path)
    modules, _ = _sorted_out(beside, path)
    same = all(
        part in modules.get(module, {}) and torch.equal(modules[module][part].tensor, trained.tensor)
        for module, parts in adapter.modules.items()
        for part, trained in parts.items()
    )
    if same:
        raise InputError(
            "is the trained adapter itself, so that nothing would be changed",
            file=path,
            place="adapter_init",
            expected="the adapter as it was when training began",
            remedy="give RWKV-PEFT's init_pissa.pth, or what PEFT saved before training",
        )
    ours = adapter.config
    if config is not None and ours is not None:
        for key in ("alpha", "rank_stabilized", "alpha_pattern", "rank", "rank_pattern"):
            if getattr(config, key) != getattr(ours, key):
                raise CheckpointError(
                    "was scaled in another way than the adapter",
                    file=config.path,
                    place=key,
                    expected=getattr(ours, key),
                    found=getattr(config, key),
                    remedy="give the adapter that was saved when this training began",
                )
    return Adapter(
        adapter.path,
        adapter.alpha,
        adapter.config,
        adapter.modules,
        adapter.whole,
        init=modules,
        init_path=path,
        notes=adapter.notes + beside.notes,
    )
