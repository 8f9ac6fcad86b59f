"""mergekit's YAML recipes as plans: `load` reads one, `dump` writes one.

Only passthrough, the method that lays out layers. What a recipe says means here what it means to
mergekit 0.1.5, tensor for tensor; what mergekit would silently ignore, misread or fail on late is
refused or noted, with the line and column.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxup.depth import marked_yaml
from jaxup.depth.marked_yaml import List, Map, Place, is_int, mapping, sequence, shown
from jaxup.depth.plan import DepthPlan, Row, Scales
from jaxup.errors import suggest, within
from jaxup.model.config import MAX_LAYERS
from jaxup.recipes.mergekit_dump import dump
from jaxup.recipes.mergekit_keys import LAYERS, Keys
from jaxup.recipes.mergekit_scale import Scale, Scaling, spelled

__all__ = ["Merge", "Source", "dump", "load"]


class Source(NamedTuple):
    """What a recipe needs to know of a model."""

    num_layers: int
    names: Mapping[str, str]  # path of each parameter -> its tensor's name in the files, with "{layer}"


class Merge(NamedTuple):
    """A recipe that has been read."""

    plan: DepthPlan  # its sources are the models as the recipe names them
    base: str  # the source whose config.json, tokenizer and other files the result takes
    tokenizer: str | None  # None: as it is; "base", "union" or a source
    pad_to_multiple_of: int | None
    chat_template: str | None
    notes: tuple[str, ...]  # warnings, each "name:line:column: ..."


_DTYPES = {
    spelling: dtype
    for dtype, spellings in {
        "bfloat16": ("bfloat16", "bf16"),
        "float16": ("float16", "fp16", "f16", "half"),
        "float32": ("float32", "fp32", "f32", "float"),
    }.items()
    for spelling in spellings
}


class _Slice(NamedTuple):
    source: str
    first: int
    stop: int
    scopes: tuple[Scale, ...]  # the nearest first
    place: Place  # of its range


def load(text: str, describe: Callable[[str], Source], name: str) -> Merge:
    """Reads a recipe, which is untrusted.

    `describe` is asked once about each model, named as the recipe does: "path" or "path@revision".
    UserError, "name:line:column: ...", for anything that cannot be built, or that mergekit would ignore
    although it was probably meant to do something.
    """
    recipe = mapping(marked_yaml.load(text, name), "a recipe", Place(name, 1, 1))
    return _Reader(describe).read(recipe)


class _Reader:
    def __init__(self, describe: Callable[[str], Source]):
        self.ask = describe
        self.sources: dict[str, Source] = {}
        self.keys = Keys()
        self.scaling = Scaling(self.keys)

    def read(self, recipe: Map) -> Merge:
        self.keys.check(recipe, "recipe")
        method = recipe.need("merge_method")
        if method != "passthrough":
            raise recipe.values_at["merge_method"].error(
                f"merge_method {shown(method)}: only passthrough recipes, which lay out layers, are built here"
            )
        slices = self.layers(recipe, (self.scaling.of(recipe),))
        rows = self.rows(slices)
        base = self.base(recipe, slices)
        tokenizer, multiple = self.tokenizer(recipe)
        first, last = slices[0], slices[-1]
        self.note_empty(slices)
        sources = tuple((name, source.num_layers) for name, source in self.sources.items())
        scales, dtypes = self.scales_of_ends(first, last), (self.dtype(recipe, key) for key in ("dtype", "out_dtype"))
        plan = DepthPlan(rows, first.source, first.source, last.source, last.source, sources, scales, *dtypes)
        self.scaling.refuse_unused(self.sources)
        template = recipe.get("chat_template")
        if not (template is None or isinstance(template, str)):
            raise recipe.values_at["chat_template"].error(f"chat_template must be text, not {shown(template)}")
        return Merge(plan, base, tokenizer, multiple, template or None, self.keys.lines())

    # ---- models

    def model(self, data: Map, key: str) -> str:
        """The name of the model given under `key`, of which the layers are now known."""
        value, place = data[key], data.values_at[key]
        name = self.model_name(value, place)
        if name not in self.sources:
            with within(str(place)):
                self.sources[name] = self.ask(name)
        return name

    def model_name(self, value: Any, place: Place) -> str:
        if isinstance(value, Map):
            self.keys.check(value, "model")
            for key in ("lora", "override_architecture"):
                if value.get(key) is not None:
                    hint = "; merge the adapter into its model first and name the result" if key == "lora" else ""
                    raise value.keys_at[key].error(f"{key!r} is not supported{hint}")
            if "model" in value:
                return self.model_name(value["model"], value.values_at["model"])
            path, revision = value.need("path"), value.get("revision")
            for key, part in (("path", path), ("revision", revision or "main")):
                if not isinstance(part, str) or not part.strip():
                    raise value.values_at[key].error(f"a model's {key} must be text, not {shown(part)}")
            return f"{path}@{revision}" if revision else path
        if not isinstance(value, str) or not value.strip():
            raise place.error(f"a model must be text or {{path, revision}}, not {shown(value)}")
        if "+" in value:
            raise place.error(
                f"{shown(value)}: adapters are not supported; merge it into {shown(value.split('+')[0])} first and "
                "name the result (a + in a directory's name needs {model: {path: NAME}})"
            )
        path, at, revision = value.partition("@")
        if not path or "@" in revision or (at and not revision):
            raise place.error(f"{shown(value)} is not a model's path, nor path@revision")
        return value

    def base(self, recipe: Map, slices: list[_Slice]) -> str:
        models = {s.source for s in slices}
        if recipe.get("base_model") is not None:
            base, place = self.model(recipe, "base_model"), recipe.values_at["base_model"]
            if "models" in recipe and base not in models:
                raise place.error("with 'models', passthrough takes one: that is the base_model")
            return base
        first = slices[0].source
        if len(models) > 1:
            text = f"no base_model among {len(models)} models: config and tokenizer are those of the first slice's"
            self.keys.note("", f"{text}, {shown(first)}", recipe.place)
        return first

    def tokenizer(self, recipe: Map) -> tuple[str | None, int | None]:
        if recipe.get("tokenizer") is None:
            return (self.tokenizer_source(recipe, "tokenizer_source") if recipe.get("tokenizer_source") else None), None
        place = recipe.values_at["tokenizer"]
        if recipe.get("tokenizer_source"):
            raise place.error("'tokenizer' and 'tokenizer_source' say the same; give one of them")
        options = mapping(recipe["tokenizer"], "tokenizer", place)
        self.keys.check(options, "tokenizer")
        if options.get("tokens"):
            raise options.keys_at["tokens"].error("'tokens', which picks embeddings token by token, is not supported")
        multiple = options.get("pad_to_multiple_of")
        if not (multiple is None or (is_int(multiple) and 0 <= multiple <= 2**20)):
            raise options.values_at["pad_to_multiple_of"].error(
                f"pad_to_multiple_of must be a number of tokens, not {shown(multiple)}"
            )
        source = self.tokenizer_source(options, "source") if options.get("source") is not None else "union"
        return source, multiple or None

    def tokenizer_source(self, data: Map, key: str) -> str:
        return data[key] if data[key] in ("base", "union") else self.model(data, key)

    def dtype(self, recipe: Map, key: str) -> str | None:
        value = recipe.get(key)
        if value is None:
            return None
        spelling = value.lower().removeprefix("torch.") if isinstance(value, str) else None
        if spelling not in _DTYPES:
            raise recipe.values_at[key].error(f"unknown {key} {shown(value)}{suggest(str(spelling), _DTYPES)}")
        return _DTYPES[spelling]

    # ---- slices

    def layers(self, data: Map, outer: tuple[Scale | None, ...]) -> list[_Slice]:
        """The slices of a recipe or of its module, however they are given."""
        given = [key for key in LAYERS if data.get(key)]
        for key in LAYERS:
            if not given and key in data:
                raise data.keys_at[key].error(f"{key!r} is empty")
        if len(given) != 1:
            what = f"{' and '.join(given)}: give one of them" if given else "'slices' is missing"
            raise data.place.error(what)
        key, place = given[0], data.values_at[given[0]]
        if key == "modules":
            modules = mapping(data[key], key, place)
            for name, at in modules.keys_at.items():
                if name != "default" or len(modules) > 1:
                    raise at.error(f"module {shown(name)}: the models built here have one, called 'default'")
            module = mapping(modules["default"], "a module", modules.values_at["default"])
            self.keys.check(module, "module")
            return self.layers(module, (self.scaling.of(module), *outer))
        items = sequence(data[key], key, place)
        if key == "models" and len(items) > 1:
            raise items.items_at[1].error("passthrough takes one of 'models'; to lay one after the other, use 'slices'")
        read = self.slice if key == "slices" else self.whole_model
        result: list[_Slice] = []
        total = 0
        for item, at in zip(items, items.items_at, strict=True):
            result.append(read(mapping(item, f"an item of {key}", at), outer))
            total += result[-1].stop - result[-1].first
            if total > MAX_LAYERS:
                raise at.error(f"with this slice the result has more than {MAX_LAYERS} layers")
        if not total:
            first = result[0].first
            hint = f"ranges are half open; did you mean [{first}, {first + 1}]?"
            raise result[0].place.error(f"[{first}, {first}] is empty, as is every slice: {hint}")
        return result

    def slice(self, data: Map, outer: tuple[Scale | None, ...]) -> _Slice:
        self.keys.check(data, "slice")
        for key in ("base_model", "residual_weight"):
            if data.get(key) is not None:
                self.keys.note("means nothing to passthrough and is ignored", shown(key), data.keys_at[key])
        items = sequence(data.need("sources"), "sources", data.values_at["sources"])
        if len(items) != 1:
            raise data.values_at["sources"].error(f"a slice of a passthrough has one source, not {len(items)}")
        source = mapping(items[0], "a source", items.items_at[0])
        self.keys.check(source, "source")
        source.need("model")
        name, written = self.model(source, "model"), source.need("layer_range")
        place = source.values_at["layer_range"]
        first, stop = _layer_range(written, place, name, self.sources[name].num_layers)
        scopes = (self.scaling.of(source), self.scaling.of(data), *outer)
        return _Slice(name, first, stop, tuple(filter(None, scopes)), place)

    def whole_model(self, data: Map, outer: tuple[Scale | None, ...]) -> _Slice:
        self.keys.check(data, "models")
        data.need("model")
        name = self.model(data, "model")
        scopes = tuple(filter(None, (self.scaling.of(data), *outer)))
        return _Slice(name, 0, self.sources[name].num_layers, scopes, data.values_at["model"])

    def note_empty(self, slices: list[_Slice]) -> None:
        """Says what slices of no layers do, and what was probably meant."""
        layers = {name: source.num_layers for name, source in self.sources.items()}
        empty = [s for s in slices if s.first == s.stop]
        for outmost, gives in ((slices[:2], "embedding"), (slices[:-3:-1], "final norm and head")):
            at_end, beside = outmost[0], outmost[-1]
            # Another model, or other scales: it is there on purpose.
            if at_end in empty and (at_end.source, at_end.scopes) != (beside.source, beside.scopes):
                empty.remove(at_end)
                text = f"a slice of no layers: gives only the {gives}, of {shown(at_end.source)}"
                self.keys.note("", text, at_end.place)
        pairs = list(dict.fromkeys((s.first, s.stop) for s in empty))
        meant = _some([f"[{first}, {stop + 1}]" for first, stop in pairs], 4)
        kept = [s for s in slices if s.first < s.stop or s in empty]
        seams = [
            a.source == b.source and b.first == a.stop + 1 for a, b in itertools.pairwise(kept) if a.stop > a.first
        ]
        # Whoever drops single layers on purpose still ends with the last one.
        inclusive = any(seams) if empty else all(seams) and seams and kept[-1].stop == layers[kept[-1].source] - 1
        if inclusive and all(s.stop < layers[s.source] for s in kept):
            ranges = itertools.groupby(f"[{s.first}, {s.stop + 1}]" for s in kept)
            runs = [(text, len([*same])) for text, same in ranges]
            meant = _some([text if n == 1 else f"{text} ({n} times)" for text, n in runs], 12) + " throughout"
            if not empty:
                skipped = f"layers {_some([str(s.stop) for s in kept], 4)}"
                self.keys.note(f"are left out: ranges are half open; did you mean {meant}?", skipped, kept[0].place)
        for s in empty:
            self.keys.note(f"empty: ranges are half open; did you mean {meant}?", f"[{s.first}, {s.stop}]", s.place)

    def rows(self, slices: list[_Slice]) -> tuple[Row, ...]:
        rows, seen = list[Row](), set[tuple[str, int]]()
        for s in slices:
            blocks = {p.removeprefix("blocks."): n for p, n in self.sources[s.source].names.items() if "{layer}" in n}
            for i, layer in enumerate(range(s.first, s.stop)):
                t = i / (s.stop - s.first - 1) if s.stop - s.first > 1 else 1.0
                names = {path: name.replace("{layer}", str(layer)) for path, name in blocks.items()}
                factors, written = self.scaling.factors(s.scopes, s.source, layer, names, t)
                row = Row(s.source, layer, "copy", spelled(tuple(factors.items()), tuple(written.items())))
                if not row.zeroed and (s.source, layer) not in seen:
                    seen.add((s.source, layer))
                    row = Row(s.source, layer, "original", row.scales)
                rows.append(row)
        return tuple(rows)

    def scales_of_ends(self, first: _Slice, last: _Slice) -> Scales:
        embedding = {p: n for p, n in self.sources[first.source].names.items() if p.startswith("embed_")}
        head = {p: n for p, n in self.sources[last.source].names.items() if p.startswith(("norm.", "lm_head."))}
        if first.source != last.source:  # where only one of them is tied, a head is written after all
            untied = self.sources[first.source].names.get("lm_head.kernel")
            head |= {"lm_head.kernel": untied} if untied and "lm_head.kernel" not in head else {}
        factors, written = self.scaling.factors(first.scopes, first.source, None, embedding, 0.0)
        of_head, written_of_head = self.scaling.factors(last.scopes, last.source, None, head, 0.0)
        return spelled(tuple((factors | of_head).items()), tuple((written_of_head | written).items()))


def _some(items: list[str], most: int) -> str:
    return ", ".join(items[:most]) + (", ..." if len(items) > most else "")


def _layer_range(value: Any, place: Place, model: str, count: int) -> tuple[int, int]:
    if not isinstance(value, List) or len(value) != 2 or not all(map(is_int, value)):
        numbers = re.findall(r"\d{1,9}", value) if isinstance(value, str) else []
        hint = f"; did you mean [{', '.join(numbers)}]?" if len(numbers) == 2 else ""
        raise place.error(f"layer_range must be two whole numbers, [first, last + 1], not {shown(value)}{hint}")
    first, stop = value
    what = f"layer_range {shown(value)}"
    has = f"{shown(model)} has {count} layers, 0 to {count - 1}"
    if first < 0 or stop < 0:
        raise place.error(f"{what} is negative: {has}")
    if first > stop:
        raise place.error(f"{what} goes backwards; did you mean [{stop}, {first}]?")
    if stop > count:
        hint = f"; did you mean [{first}, {count}]?" if first < count else ""
        raise place.error(f"{what} is out of range: {has}{hint}")
    return first, stop
