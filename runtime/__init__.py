"""Runs RWKV models compiled into one engine file: constant memory and constant time per token.

import goslet

with goslet.open("model.goslet") as engine:
    for piece in engine.generate("Once", max_tokens=64, temperature=0.8, top_p=0.9, seed=1):
        print(piece, end="")
"""

from .errors import GosletError
from .sampling import SamplingOptions
from .session import Engine, Session
from .session import open_engine as open

__version__ = "0.1.0"

__all__ = ["Engine", "GosletError", "SamplingOptions", "Session", "__version__", "open"]
