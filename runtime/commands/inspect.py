"""Show what is in an engine file, without running it."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import Any

from ..chat import FREE_TEXT, ChatTemplate
from ..enginefile import EngineFile
from ..errors import one_line
from .console import Console, readable_size
from .flags import readable_sampling

NAME = "inspect"
SUMMARY = "show what is in an engine file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("engine", metavar="ENGINE", help="an engine file, from goslet export")
    parser.add_argument("--check", action="store_true", help="verify the checksum of the weights too")
    parser.add_argument("--json", action="store_true", help="write one JSON object")


def execute(args: argparse.Namespace, console: Console) -> int:
    """Run the command."""
    with EngineFile.open(args.engine, check=args.check) as file:
        report = describe(file, checked=args.check)
    if args.json:
        console.json(report)
    else:
        _show(report, console)
    return 0


def describe(file: EngineFile, *, checked: bool) -> dict[str, Any]:
    """What an engine file holds, as a JSON object; sizes are in bytes."""
    formats: dict[str, dict[str, int]] = {}
    for tensor in file.tensors.values():
        entry = formats.setdefault(str(tensor.format), {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.size_bytes + tensor.scales_size_bytes
    return {
        "path": os.fspath(file.path),
        "size_bytes": file.size_bytes,
        "model_id": file.model_id,
        "spec": file.spec.to_json(),
        "state_size_bytes": file.state_spec.size_bytes,
        "state_tensors": len(file.state_spec.tensors),
        "weights": file.n_weights,
        "bits_per_weight": file.bits_per_weight,
        "formats": formats,
        "sections": file.section_sizes,
        "tokenizer": file.tokenizer_kind,
        "chat": None if file.chat is None else file.chat.to_json(),
        "decoding": None if file.chat is None else _decoding(file.chat),
        "graph": dict(file.graph_info),
        "provenance": dict(file.provenance),
        "weights_checked": checked,
    }


def _decoding(chat: ChatTemplate) -> dict[str, str]:
    """The decoding parameters by what is written: text in general, and answers in each mode."""
    return {
        "text": readable_sampling(chat.sampling or FREE_TEXT),
        **{mode: readable_sampling(chat.decoding(mode)) for mode in chat.modes},
    }


def _chat_line(chat: Mapping[str, Any] | None) -> str:
    if chat is None:
        return "no template"
    return f"{json.dumps(chat['user'] + chat['end'] + chat['assistant'])}, modes {', '.join(chat['modes'])}"


def _decoding_lines(decoding: Mapping[str, str] | None) -> dict[str, str]:
    if decoding is None:
        return {}
    names: dict[str, list[str]] = {}
    for name, parameters in decoding.items():
        names.setdefault(parameters, []).append(name)
    return {f"  {', '.join(writing)}": parameters for parameters, writing in names.items()}


def _show(report: Mapping[str, Any], console: Console) -> None:
    spec = report["spec"]
    ranks = ", ".join(f"{name} {rank}" for name, rank in spec["ranks"].items())
    has_heads = spec["head_size"] > 1
    heads = f"heads of {spec['head_size']}, " if has_heads else ""
    norms = f"group norm eps {spec['norm_eps']:g}, " if has_heads else ""
    norms += f"layer norm eps {spec['layer_norm_eps']:g}"
    lines = {
        "engine": f"{report['path']}, {readable_size(report['size_bytes'])}",
        "model": f"RWKV-{spec['version']}, {spec['n_layer']} layers, width {spec['n_embd']}, ffn {spec['n_ffn']}, "
        f"{heads}vocabulary {spec['vocab_size']}",
        **({"ranks": ranks} if ranks else {}),
        "norms": norms,
        "model id": report["model_id"],
        "state": f"{readable_size(report['state_size_bytes'])} in {report['state_tensors']} tensors, float32",
        "weights": f"{report['weights']:,} at {report['bits_per_weight']:.2f} bits"
        + (", checksum right" if report["weights_checked"] else ""),
        "tokenizer": report["tokenizer"] or "none (takes and gives token ids)",
        "chat": _chat_line(report["chat"]),
        **_decoding_lines(report["decoding"]),
        "graph": ", ".join(f"{key} {value}" for key, value in report["graph"].items()),
    }
    for name, entry in report["formats"].items():
        lines[f"  {name}"] = f"{entry['tensors']} tensors, {readable_size(entry['bytes'])}"
    for name, size_bytes in report["sections"].items():
        lines[f"section {name}"] = readable_size(size_bytes)
    for name, value in report["provenance"].items():
        # A budget's recipe names a format for every tensor, which the formats above sum up; --json has it all.
        if name == "recipe" and isinstance(value, dict) and isinstance(value.get("name"), str):
            value = value["name"]
        lines[f"made with {one_line(name)}"] = value if isinstance(value, str) else json.dumps(value)
    width = max(map(len, lines))
    for name, value in lines.items():
        # What a file says, a terminal must not take for commands.
        console.line(f"{name:<{width}}  {one_line(value)}")
