"""What a recipe comes to, for a person: the layers, sizes, where its models are, what they disagree about."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from jaxup.depth.draw import describe
from jaxup.depth.result import disagreements
from jaxup.errors import UserError
from jaxup.families import family_of_hf
from jaxup.model.spec import count_params
from jaxup.progress import printable
from jaxup.recipes.open import Recipe
from jaxup.recipes.outcome import Outcome, outcome
from jaxup.text import named, size

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Keys of config.json that say nothing about a model.
_DULL = frozenset(("transformers_version", "architectures", "use_cache", "name_or_path", "dtype", "torch_dtype"))


def report(recipe: Recipe, *, vocab_size: int | None, color: bool = False) -> Iterator[str]:
    """The lines that describe a recipe; those on what the models disagree about come last.

    `vocab_size` is that of the result, where the recipe gives it another tokenizer.
    """
    before = " + ".join(str(count) for _, count in recipe.plan.sources)
    yield printable(f"{recipe.name}: {before} -> {recipe.plan.num_layers} layers")
    if recipe.notes:
        yield ""
        yield from (printable(f"note: {note}") for note in recipe.notes)
    yield ""
    yield describe(recipe.plan, color=color)
    yield ""
    yield from _sizes(recipe, vocab_size)
    yield ""
    yield from map(printable, (*_origins(recipe), *_disagreements(recipe)))


def check(recipe: Recipe, vocab_size: int | None) -> Outcome:
    """What the recipe comes to, if tensors have the dtype that config.json names; UserError if nothing can be built."""
    stored = lambda source, path, layer: _dtype(recipe.models[source or recipe.base].hf)  # noqa: E731
    return outcome(recipe, stored, vocab_size=vocab_size)


def _sizes(recipe: Recipe, vocab_size: int | None) -> Iterator[str]:
    """Layers, parameters and bytes of each model and of the result, as a table."""
    rows = []
    for name, model in recipe.models.items():
        dtype, count = _dtype(model.hf), count_params(model.config)
        rows.append((named(name), model.config, count * _BYTES[dtype], dtype))
    with contextlib.suppress(UserError):  # what it is that does not fit is said below
        result = check(recipe, vocab_size)
        sizes = result.nbytes()
        rows.append(("result", result.config, sum(sizes.values()), " and ".join(sizes)))
    cells = [
        (name, f"{config.num_layers} layers", f"{count_params(config):,} parameters", f"{size(nbytes)} in {dtype}")
        for name, config, nbytes, dtype in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for name, layers, params, stored in cells:
        yield f"{name:<{widths[0]}}  {layers:>{widths[1]}}  {params:>{widths[2]}}  {stored}"


def _dtype(hf: Mapping[str, Any]) -> str:
    """Of a model's tensors, as its config.json has it; transformers' default is float32."""
    dtype = hf.get("dtype", hf.get("torch_dtype"))
    return dtype if isinstance(dtype, str) and dtype in _BYTES else "float32"


def _origins(recipe: Recipe) -> Iterator[str]:
    """Where the models are, and which of them gives what is not tensors."""
    for name, model in recipe.models.items():
        if model.stand_in:
            yield f"{name!r} is not at hand: {model.path}'s config.json stands in for its own"
        elif model.path != name:
            yield f"{name!r} is {model.path!r}{f' at {model.revision}' if model.revision else ''}"
    tied = {name: config.tie_embeddings for name, config in recipe.configs.items()}
    if any(tied.values()):
        head = recipe.plan.head(tied)
        if head is None:
            yield "the head is tied to the embedding"
        elif head[0] == "embed_tokens":
            yield f"the head is the embedding of {head[1]!r}, written as a head of its own"
    template = "" if recipe.chat_template is None else ", but for the chat template, which the recipe gives"
    if recipe.tokenizer in (None, "base", recipe.base):
        yield f"config.json, tokenizer and other files: from {recipe.base!r}{template}"
        return
    yield f"config.json and other files: from {recipe.base!r}"
    tokenizer = "the union of all models'" if recipe.tokenizer == "union" else f"from {recipe.tokenizer!r}"
    rows = "; embedding and head get its rows, zeros where a model lacks the token"
    yield f"tokenizer: {tokenizer}{template}{rows}"


def _disagreements(recipe: Recipe) -> Iterator[str]:
    """First what is a matter of choice, and what is chosen; then what makes the result impossible."""
    models, configs, plan = recipe.models, recipe.configs, recipe.plan
    families = [family_of_hf(model.hf) for model in models.values()]
    fatal: dict[str, dict[str, str]] = {}
    for field, (a, name_a), (b, name_b) in disagreements(plan, configs):
        if field != "vocab_size" or recipe.tokenizer is None:
            fatal.setdefault(field, {name_a: repr(a)})[name_b] = repr(b)

    followed = f"{recipe.base!r} is followed"
    differ = [(field, {name: repr(getattr(config, field)) for name, config in configs.items()}, followed)
              for field in ("max_positions", "init_std") if field not in fatal]  # fmt: skip
    dtype = f"the result has {plan.out_dtype or plan.dtype}" if plan.out_dtype or plan.dtype else "tensors keep theirs"
    differ.append(("dtype", {name: repr(_dtype(model.hf)) for name, model in models.items()}, dtype))
    # Keys that decide a field of the config are compared as that, whatever their defaults.
    dull = set(_DULL)
    for family in families:
        dull |= {key.name for key in family.keys} | family.fixed.keys()
        dull |= {name for rule in family.rules for name in rule.names}
    for key in dict.fromkeys(key for model in models.values() for key in model.hf):
        if key not in dull and not key.startswith("_"):
            values = {name: repr(model.hf[key]) if key in model.hf else "absent" for name, model in models.items()}
            differ.append((key, values, followed))
    known = {field: key.name for key in families[0].keys for field in key.fields}
    for field, values, taken in differ:
        if len(set(values.values())) > 1:
            yield f"the models differ: {known.get(field, field)} is {_shown(values)}; {taken}"
    for field, values in fatal.items():
        yield f"the models do not go together: {known.get(field, field)} is {_shown(values)}"


def _shown(values: Mapping[str, str]) -> str:
    """ "2 in 'a' and 'c', 3 in 'b'"."""
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value[:200], []).append(repr(name))
    return ", ".join(f"{value} in {' and '.join(names)}" for value, names in groups.items())


def guessed_vocab_size(recipe: Recipe) -> int:
    """Of the result where the recipe gives it another tokenizer, if that is not at hand, which would say exactly."""
    name = recipe.tokenizer or "base"
    if name == "union":
        return max(config.vocab_size for config in recipe.configs.values())
    return recipe.configs[recipe.base if name == "base" else name].vocab_size
