"""`goslet fetch`: which files it asks the hub for, and what it says where it cannot."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import filter_repo_objects

from goslet.cli import main


class Hub:
    """Stands for the hub: a repository of one's own, and a note of what was asked for."""

    def __init__(self, files: dict[str, int], error: Exception | None = None) -> None:
        self.files, self.error = files, error
        self.asked: list[tuple[str, ...]] = []

    def model_info(self, repository: str, files_metadata: bool) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in self.files.items()])

    def hf_hub_download(self, repository: str, name: str, local_dir: Path) -> str:
        self.asked.append((repository, name))
        path = Path(local_dir, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        return str(path)

    def snapshot_download(self, repository: str, local_dir: Path, allow_patterns: list[str]) -> str:
        self.asked.append((repository, *allow_patterns))
        Path(local_dir).mkdir(parents=True)
        return str(local_dir)


def stand_in(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Hub:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


TWO = {"rwkv7-g1-0.1b.pth": 382_000_000, "rwkv7-g1-0.4b.pth": 900_000_000, "README.md": 5}


@pytest.mark.parametrize("before", ["", "https://hub.example/"])
@pytest.mark.parametrize("between", ["", "blob/main/", "resolve/main/"])
def test_one_file_of_several(
    before: str, between: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = stand_in(monkeypatch, Hub(TWO))
    model = f"{before}BlinkDL/rwkv7-g1/{between}rwkv7-g1-0.1b.pth"
    assert main(["fetch", model, "-o", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}/rwkv7-g1-0.1b.pth\n"
    assert f"goslet export {tmp_path}/rwkv7-g1-0.1b.pth -o rwkv7-g1-0.1b.goslet" in err
    assert hub.asked == [("BlinkDL/rwkv7-g1", "rwkv7-g1-0.1b.pth")]


def test_several_files_are_named_and_none_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = stand_in(monkeypatch, Hub(TWO))
    assert main(["fetch", "BlinkDL/rwkv7-g1", "-o", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "rwkv7-g1-0.1b.pth (382 MB), rwkv7-g1-0.4b.pth (900 MB)" in said
    assert "goslet fetch BlinkDL/rwkv7-g1/FILE" in said
    assert main(["fetch", "BlinkDL/rwkv7-g1", "--list"]) == 0
    assert capsys.readouterr().out.split() == [
        *("382", "MB", "BlinkDL/rwkv7-g1/rwkv7-g1-0.1b.pth"),
        *("900", "MB", "BlinkDL/rwkv7-g1/rwkv7-g1-0.4b.pth"),
    ]
    assert main(["fetch", "BlinkDL/rwkv7-g1/rwkv7.pth"]) == 1
    assert "has no such file" in capsys.readouterr().err
    assert hub.asked == []


def test_a_folder_is_taken_whole_without_what_is_no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = ["config.json", "tokenizer.json", "rwkv_vocab_v20230424.txt"]
    wanted += ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    wanted += ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]
    unwanted = ["modeling_rwkv.py", "README.md", "optimizer.pt", "training_args.bin", "rwkv7.onnx", "model.gguf"]
    files = dict.fromkeys([*wanted, *unwanted], 1)
    hub = stand_in(monkeypatch, Hub(files))
    assert main(["--quiet", "fetch", "fla-hub/rwkv7-191M-world", "-o", str(tmp_path)]) == 0
    ((repository, *patterns),) = hub.asked
    assert repository == "fla-hub/rwkv7-191M-world"
    assert list(filter_repo_objects(files, allow_patterns=patterns)) == wanted
    assert (tmp_path / "rwkv7-191M-world").is_dir()


@pytest.mark.parametrize("model", ["rwkv7", "BlinkDL/", "/x", ""])
def test_what_is_no_name_of_a_model(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", model]) == 2
    assert "OWNER/NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("no route"), "download the file in a browser"),
        (HFValidationError("bad"), "is no name of a repository"),
    ],
)
def test_where_the_hub_cannot_be_asked(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, Hub({}, error))
    assert main(["fetch", "BlinkDL/rwkv7-g1"]) == 1
    assert said in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, Hub({"x.pth": 3}))
    (tmp_path / "file").write_text("")
    assert main(["fetch", "BlinkDL/x", "-o", str(tmp_path / "file")]) == 1
    assert "cannot be written" in capsys.readouterr().err
