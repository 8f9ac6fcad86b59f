"""jaxup: change the depth of a language model and train the result, in JAX.

    plan = jaxup.open_plan("upscale(org/Name-7B, 8:24, copies=2)")      # or a file; print(plan) shows it
    plan = jaxup.upscale("org/Name-7B", "8:24", copies=2)               # the same
    model = jaxup.load(plan, dtype="bfloat16")                          # or a directory, Hub id or URL
    logits = jax.jit(lambda model, tokens: model(tokens))(model, tokens)   # int32 [batch, seq] -> [batch, seq, vocab]
    jaxup.save(model, "out")                                            # what transformers loads
    jaxup.build_model(plan, "out")                                      # the same from file to file, never loaded

Importing the package imports nothing heavy; jax and friends load where they are used.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING

from jaxup.errors import UserError

if TYPE_CHECKING:
    from jaxup.building.work import build as build_model
    from jaxup.continuous.load import load
    from jaxup.depth.apply import apply as apply_plan
    from jaxup.depth.plan import DepthPlan
    from jaxup.hub.save import save
    from jaxup.hub.text_generation import generate
    from jaxup.lens.differences import diff
    from jaxup.lens.explain import explain
    from jaxup.lens.probe import probe
    from jaxup.recipes.functions import (
        concat,
        drop,
        duplicate,
        expand,
        identity,
        inherit,
        interleave,
        solar,
        stack,
        upscale,
    )
    from jaxup.recipes.open import open_plan

__version__ = "0.1.0"
__all__ = [
    "DepthPlan", "UserError", "__version__", "apply_plan", "build_model", "concat", "diff", "drop", "duplicate",
    "expand", "explain", "generate", "identity", "inherit", "interleave", "load", "open_plan", "probe", "save", "solar",
    "stack", "upscale",
]  # fmt: skip

# Where each name is, and what it is called there if that is something else; the others are recipes.
_PLACES = {
    "DepthPlan": "depth.plan", "apply_plan": "depth.apply:apply", "build_model": "building.work:build",
    "diff": "lens.differences", "explain": "lens.explain", "generate": "hub.text_generation", "load": "continuous.load",
    "open_plan": "recipes.open", "probe": "lens.probe", "save": "hub.save",
}  # fmt: skip


class _Package(types.ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        """Importing the entry point `jaxup.generate` would put that module in the place of the function."""
        if name not in _PLACES or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


if not TYPE_CHECKING:  # a type checker knows the names from above, and that there are no others
    sys.modules[__name__].__class__ = _Package

    def __getattr__(name: str):
        if name not in __all__:
            meant = importlib.import_module(f"{__name__}.errors").nearest(name, __all__)
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}{meant}")
        module, _, attribute = _PLACES.get(name, "recipes.functions").partition(":")
        value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute or name)
        globals()[name] = value  # found at once from now on
        return value

    def __dir__():
        return __all__
