"""bigtrain: a thin toolkit for distributed training of large models.

The names below are the whole Python API; each is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0.dev0"
__all__ = [
    "LoadedRecipe",
    "Run",
    "evaluate",
    "load_model",
    "load_recipe",
    "open_run",
    "train",
]

if TYPE_CHECKING:
    from bigtrain.api import (
        LoadedRecipe,
        Run,
        evaluate,
        load_model,
        load_recipe,
        open_run,
        train,
    )
else:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'bigtrain' has no attribute {name!r}")
        return getattr(import_module("bigtrain.api"), name)

    def __dir__() -> list[str]:
        return [*__all__, "__version__"]
