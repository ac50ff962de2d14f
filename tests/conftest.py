import signal
from pathlib import Path

import pytest
from programs import execute, tool

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    # A shell starts its background jobs with Ctrl-C ignored, which they and their children keep: the tests of Ctrl-C
    # would fail there.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def csrc_build(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which CMake builds the C++ library and the C++ tests, each when `build_csrc` is asked for it."""
    folder = tmp_path_factory.mktemp("csrc")
    execute(
        tool("cmake"),
        *("-S", repository / "csrc", "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"),
        "-DGOSLET_BUILD_TESTS=ON",
        limit_s=120,
    )
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of other people's checkpoints, tokenizers and texts that lies beside the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here: it is no part of the repository")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random RWKV-7 of two layers, 256 tokens wide in vocabulary, so that its engines speak raw bytes."""
    pytest.importorskip("torch", reason="exporting needs torch")
    from random_checkpoint import random_rwkv7, save

    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pth"
    save(
        random_rwkv7(
            n_layer=2, n_embd=64, head_size=16, vocab_size=256, rank_w=8, rank_a=12, rank_v=16, rank_g=24, seed=11
        ),
        path,
    )
    return path


class _Engines(dict[str, Path]):
    """Engine files by quantization, each exported when it is first asked for."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        super().__init__()
        self._checkpoint = checkpoint
        self._folder = folder

    def __missing__(self, quant: str) -> Path:
        from goslet.export import export_engine

        self[quant] = self._folder / f"{quant}.goslet"
        export_engine(self._checkpoint, self[quant], quant=quant)
        return self[quant]


@pytest.fixture(scope="session")
def tiny_engines(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engines of `tiny_checkpoint` by quantization: ``tiny_engines["int4"]``."""
    return _Engines(tiny_checkpoint, tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="session")
def tiny_engine(tiny_engines: dict[str, Path]) -> Path:
    """The float32 engine of `tiny_checkpoint`."""
    return tiny_engines["f32"]
