"""What several tests of the exporter read."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to calibrate on."""
    path = tmp_path_factory.mktemp("text") / "fables.txt"
    words = np.random.default_rng(3).choice(["the", "goose", "swam", "to", "an", "island", "and", "slept.\n"], 600)
    path.write_text(" ".join(words))
    return path
