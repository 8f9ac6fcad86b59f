"""The recipes as `import jaxup` offers them: on models as well as on a name and a number of layers.

jaxup.upscale("base", 32, "8:24")          a source's name, and its number of layers
jaxup.upscale("org/Name", "8:24")          the place of a model: directory, Hub id or URL
jaxup.upscale(model, "8:24")               a loaded model
jaxup.upscale(plan, "8:24")                what a plan makes, or another recipe's line or file
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, cast, overload, runtime_checkable

from jaxup.depth import recipes
from jaxup.depth.compose import compose
from jaxup.depth.plan import DepthPlan
from jaxup.errors import UserError, within
from jaxup.model.config import ModelConfig
from jaxup.model.spec import depth_params
from jaxup.recipes.line import is_line
from jaxup.recipes.open import model_plan, open_plan, open_recipe

if TYPE_CHECKING:
    from jaxup.model.decoder import Decoder

_P = ParamSpec("_P")


@runtime_checkable
class _Function(Protocol[_P]):
    @overload
    def __call__(self, source: str, source_layers: int, /, *args: _P.args, **kwargs: _P.kwargs) -> DepthPlan: ...

    @overload
    def __call__(
        self, source: str | os.PathLike[str] | DepthPlan | Decoder, /, *args: _P.args, **kwargs: _P.kwargs
    ) -> DepthPlan: ...


_NOTE = """

    In the place of `source` and `source_layers` there may be a model: its directory, Hub id or URL, a
    loaded one, or what a plan or another recipe makes.
    """


def _plan(source: Any) -> DepthPlan:
    """The plan of a model as it is, or the plan that makes it; sources are named by their places."""
    if isinstance(source, DepthPlan):
        return source
    if isinstance(source, str | os.PathLike):
        place = os.fspath(source)
        here = os.path.expanduser(place)
        is_recipe = os.path.isfile(here) or (is_line(place) and not os.path.lexists(here))
        return open_plan(place) if is_recipe else model_plan(place)
    if not isinstance(config := getattr(source, "config", None), ModelConfig):
        raise UserError(f"a model comes here, by its place, loaded or as a plan, not {type(source).__name__}")
    origin = source.origin
    if origin is None or origin.plan is not None:
        return recipes.identity("model", config.num_layers)
    return origin.whole(config)


def _sizes(source: Any, plan: DepthPlan) -> tuple[int, int]:
    config = getattr(source, "config", None) or next(iter(open_recipe(plan, flag="models: ").configs.values()))
    return depth_params(config)


def _on_models(function: Callable[Concatenate[str, int, _P], DepthPlan]) -> _Function[_P]:
    signature, name = inspect.signature(function), function.__name__

    def binds(*args: Any, **kwargs: Any) -> bool:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return False
        # drop(model, 4) is of a model: each of its arguments may be missing, but not all.
        return function is not recipes.drop or len(bound.arguments) > 2

    @functools.wraps(function)
    def call(source: Any, *args: Any, **kwargs: Any) -> DepthPlan:
        for note in filter(None, map(recipes.only_two, (*args, *kwargs.values()))):
            warnings.warn(f"{name}: {note}", stacklevel=2)
        counted = hasattr(args[0] if args else kwargs.get("source_layers"), "__index__")
        if isinstance(source, str) and counted and binds(source, *args, **kwargs):
            # What could be read as a model and a number of its layers, too.
            if args and binds(source, 1, *args, **kwargs) and os.path.isfile(os.path.join(source, "config.json")):
                count = len(model_plan(source))
                if count != args[0]:
                    hint = f"{list(signature.parameters)[2]}={args[0]} says how many of them"
                    raise UserError(f"{source!r} has {count} layers, not {args[0]}", at=name, hint=hint)
            return function(source, *args, **kwargs)
        with within(name):
            plan = _plan(source)
            if not args and kwargs.keys() == {"params"}:
                left = recipes.depth_within(len(plan), **kwargs, sizes=_sizes(source, plan), source=plan.sources[0][0])
                kwargs = {"layers": left}
        if plan == recipes.identity(*plan.sources[0]):
            return function(*plan.sources[0], *args, **kwargs)
        return compose(function("plan", len(plan), *args, **kwargs), {"plan": plan})

    call.__doc__ = (function.__doc__ or "").rstrip() + _NOTE
    return cast("_Function[_P]", call)


def concat(*sources: str | os.PathLike[str] | DepthPlan | Decoder) -> DepthPlan:
    """What models or plans make, one after the other: embeddings of the first, final norm and head of the last.

    This is how one model is made of several ("frankenmerges"). UserError if two have different numbers of
    layers for a source, and for a plan that casts or scales ends, as only the whole may.
    """
    with within("concat"):
        plans = [_plan(source) for source in sources]
    return recipes.concat(*plans)


drop = _on_models(recipes.drop)
duplicate = _on_models(recipes.duplicate)
expand = _on_models(recipes.expand)
identity = _on_models(recipes.identity)
inherit = _on_models(recipes.inherit)
interleave = _on_models(recipes.interleave)
solar = _on_models(recipes.solar)
stack = _on_models(recipes.stack)
upscale = _on_models(recipes.upscale)
