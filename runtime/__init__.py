"""Runs RWKV models compiled into one engine file: constant memory and constant time per token.

import goslet

with goslet.open("model.goslet") as engine:
    for piece in engine.generate("Once", max_tokens=64, temperature=0.8, top_p=0.9, seed=1):
        print(piece, end="")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import GosletError
    from .sampling import SamplingOptions
    from .session import Engine, Session
    from .session import open_engine as open

__version__ = "0.1.0"

__all__ = ["Engine", "GosletError", "SamplingOptions", "Session", "__version__", "open"]


def __getattr__(name: str) -> object:
    """Load the package when it is first used: the command must be able to say what Ctrl-C did before that."""
    if not name.startswith("__"):
        # Importing them puts the modules here too.
        session, errors = (importlib.import_module(module, __name__) for module in (".session", ".errors"))
        globals().update(
            Engine=session.Engine,
            Session=session.Session,
            SamplingOptions=session.SamplingOptions,
            GosletError=errors.GosletError,
            open=session.open_engine,
        )
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
