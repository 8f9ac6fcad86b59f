"""A recipe in one line: `interleave(model, 19:41, copies=2)`.

    upscale(org/Name-7B, 8:24, copies=2)
    stack(./dir, times=4, noise=0.2)
    drop("a path, with comma", [3, 21:29])
    upscale(inherit(model, 55), 19:41, copies=2)      a recipe on what another makes
    concat(inherit(a, 0:24), inherit(b, 8:32))        one after the other

The names are those of `jaxup.depth.recipes`. The model is a directory, Hub id or URL, in quotes if it
holds a comma, a quote or parentheses; the other arguments are as the functions have them, with `19:41`,
`:8` and `24:` for half-open ranges of layers. Errors are `UserError("recipe:1:COLUMN: ...")`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxup.depth.compose import compose
from jaxup.depth.plan import DepthPlan
from jaxup.depth.recipes import RECIPES, Layers, as_range, check_layers, depth_within, hyphenated, identity, only_two
from jaxup.errors import UserError, suggest, within

_MAX_LENGTH, _MAX_DEPTH, _MAX_ITEMS = 4096, 8, 1000


class _Kind(NamedTuple):
    """How an argument is written."""

    form: str  # for messages
    types: tuple[type, ...]  # of its value, as the scanner reads it
    items: tuple[type, ...] = ()  # of the items, if it may be a list
    items_form: str = ""


_LAYERS = _Kind("layers: 8, 8:24 or [3, 8:24]", (int, slice, list), (int, slice), "layers and ranges of layers")
# By the annotation of the recipe's parameter.
_KINDS: dict[Any, _Kind] = {
    int: _Kind("a whole number", (int,)),
    float: _Kind("a number from 0 to 1", (int, float)),
    str: _Kind("a word", (str,)),
    Sequence[str]: _Kind("a list of words: [mlp, norms]", (str, list), (str,), "words"),
    Layers: _LAYERS._replace(types=(slice, list)),
    int | Layers: _LAYERS,
    int | Layers | None: _LAYERS,
    int | float | None: _Kind("a number, such as 6e9", (int, float)),
}


class Argument(NamedTuple):
    value: Any  # int, float, slice (a range of layers), str (a word), or a list of these
    column: int

    def resolved(self, source: str, num_layers: int) -> Any:
        """The value, with what a range leaves out; UserError with the column of layers that are not there."""
        many = isinstance(self.value, list)
        written = self.value if many else [self.value]
        items = [as_range(item, num_layers) if isinstance(item, slice) else item for item in written]
        # A number by itself may be a count, which the recipe itself checks.
        layers = [item for item in items if isinstance(item, range) or (many and isinstance(item, int))]
        with within(_place(self.column)):
            check_layers(layers, source, num_layers)
        return items if many else items[0]


@dataclasses.dataclass(frozen=True)
class Call:
    """One recipe as written. Columns count from 1."""

    recipe: str
    sources: tuple[Call | str, ...]  # other recipes, or models; only concat has several
    arguments: dict[str, Argument]
    column: int
    text: str

    @property
    def models(self) -> list[str]:
        """The names of all models, in the order they are written."""
        return [n for source in self.sources for n in ([source] if isinstance(source, str) else source.models)]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was perhaps not meant: a list of two layers that looks like a range's two ends."""
        found = [note for source in self.sources if isinstance(source, Call) for note in source.notes]
        for value, column in self.arguments.values():
            if note := only_two(value):
                found.append(f"{_place(column)}: {note}")
        return tuple(found)

    def plan(
        self, num_layers: int | Callable[[str], int], sizes: Callable[[str], Sequence[int]] | None = None
    ) -> DepthPlan:
        """The plan for models of so many layers, or by their names; UserError if it does not go with them.

        `sizes` are those of `depth_within`, of a model by its name.
        """
        count = (lambda _: num_layers) if isinstance(num_layers, int) else num_layers
        inner = [identity(s, count(s)) if isinstance(s, str) else s.plan(count, sizes) for s in self.sources]
        first, layers = self.sources[0], inner[0].num_layers
        name = first if isinstance(first, str) else first.text
        values = {key: argument.resolved(name, layers) for key, argument in self.arguments.items()}
        with within(_place(self.column)):
            if _takes_plans(self.recipe):
                return RECIPES[self.recipe](*inner)
            if values.keys() == {"params"} and sizes is not None:
                left = depth_within(layers, params=values["params"], sizes=sizes(self.models[0]), source=name)
                values = {"layers": left}
            plan = RECIPES[self.recipe](name, layers, **values)
            return plan if name in self.sources else compose(plan, {name: inner[0]})


def is_line(text: str) -> bool:
    """Whether `text` has the look of a recipe in one line, rather than of a path."""
    return re.match(r"\s*\w+\s*\(", text) is not None and "\n" not in text.strip()


def usage(recipe: str) -> str:
    """How a recipe is called: `upscale(MODEL, layers, copies=1)`."""
    if _takes_plans(recipe):
        return f"{recipe}(MODEL, MODEL, ...)"
    shown = ["MODEL"]
    for name, p in _parameters(recipe).items():
        default = p.default if isinstance(p.default, int | float | str) else "..."
        shown.append(name if p.default is p.empty else f"{name}={default}")
    return f"{recipe}({', '.join(shown)})"


def parse(line: str) -> Call:
    """The recipe that `line` is; UserError with the column of what is wrong. No model is looked at."""
    if len(line) > _MAX_LENGTH:
        what = f"a recipe in one line has at most {_MAX_LENGTH} characters; write a file"
        raise UserError(what, at=_place(_MAX_LENGTH))
    for i, character in enumerate(line):
        if not character.isprintable():
            raise UserError(f"a recipe in one line cannot hold {character!r}", at=_place(i + 1))
    scanner = _Scanner(line)
    call = scanner.call(1)
    if scanner.peek():
        raise scanner.error(f"{scanner.rest()!r} is left over after the recipe")
    return call


def _signature(recipe: str) -> list[inspect.Parameter]:
    return list(inspect.signature(RECIPES[recipe], eval_str=True).parameters.values())


def _takes_plans(recipe: str) -> bool:
    """Whether it is of any number of models, as `concat`."""
    return _signature(recipe)[0].kind is inspect.Parameter.VAR_POSITIONAL


def _parameters(recipe: str) -> dict[str, inspect.Parameter]:
    """Those after the source and its number of layers."""
    return {parameter.name: parameter for parameter in _signature(recipe)[2:]}


def _place(column: int) -> str:
    return f"recipe:1:{column}"


class _Scanner:
    """Reads from left to right, one token at a time; never evaluates anything."""

    def __init__(self, line: str):
        self.line, self.at = line, 0

    # ---- characters

    def peek(self) -> str:
        """The next character that is not a blank, "" at the end."""
        while self.line[self.at : self.at + 1] == " ":
            self.at += 1
        return self.line[self.at : self.at + 1]

    def rest(self) -> str:
        rest = self.line[self.at :].strip()
        return rest if len(rest) <= 30 else rest[:27] + "..."

    def error(self, message: str, at: int | None = None) -> UserError:
        return UserError(message, at=_place((self.at if at is None else at) + 1))

    def match(self, pattern: str) -> str | None:
        """What matches here, and goes past it."""
        self.peek()
        found = re.compile(pattern, re.ASCII).match(self.line, self.at)
        if found is None:
            return None
        self.at = found.end()
        return found.group()

    def expect(self, character: str, what: str) -> None:
        if self.peek() != character:
            found = f"not {self.rest()!r}" if self.rest() else "and the recipe ends here"
            raise self.error(f"expected {character!r} {what}, {found}")
        self.at += 1

    # ---- what a recipe is made of

    def call(self, depth: int) -> Call:
        if depth > _MAX_DEPTH:
            raise self.error(f"recipes are nested more than {_MAX_DEPTH} deep")
        self.peek()
        start = self.at
        name = self.match(r"[A-Za-z_]\w*")
        if name is None or self.peek() != "(":
            raise self.error("a recipe looks like upscale(MODEL, 19:41, copies=2)", start)
        if name not in RECIPES:
            raise self.error(f"unknown recipe {name!r}{suggest(name, RECIPES)}", start)
        self.expect("(", f"after {name}")
        if self.peek() in (")", ""):
            raise self.error(f"{name} needs a model: {usage(name)}")
        sources = [self.source(depth)]
        while _takes_plans(name) and self.peek() == ",":
            self.at += 1
            if self.peek() == ")":
                break
            sources.append(self.source(depth))
        arguments = {} if _takes_plans(name) else self.arguments(name)
        self.expect(")", f"at the end of {name}(...)")
        return Call(name, tuple(sources), arguments, start + 1, self.line[start : self.at])

    def source(self, depth: int) -> Call | str:
        start = self.at
        if self.peek() in ("'", '"'):
            return self.quoted()
        if self.match(r"[A-Za-z_]\w*\s*\("):
            self.at = start
            return self.call(depth + 1)
        model = (self.match(r"[^,()'\"]*") or "").strip()
        if self.peek() in ("(", "'", '"'):
            raise self.error(f"put the model in quotes: its name holds {self.peek()!r}")
        if not model:
            raise self.error("the model's name is empty", start)
        if re.fullmatch(r"[\d:]+|[a-z_]+\s*=.*", model):
            raise self.error(f"a model, or another recipe, comes here, not {model!r}", start)
        return model

    def quoted(self) -> str:
        start, quote = self.at, self.peek()
        text = self.match(r"""(?:"(?:[^"\\]|\\.)*")|(?:'(?:[^'\\]|\\.)*')""")
        if text is None:
            raise self.error(f"the quote {quote} is not closed", start)
        if not (model := re.sub(r"\\(.)", r"\1", text[1:-1])).strip():
            raise self.error("the model's name is empty", start)
        return model

    def arguments(self, recipe: str) -> dict[str, Argument]:
        """Checked against what the recipe takes."""
        parameters, found = _parameters(recipe), dict[str, Argument]()
        positional = [name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
        named = False
        while self.peek() == ",":
            self.at += 1
            if self.peek() == ")":
                break  # a comma at the end
            start = self.at
            if key := self.match(r"[A-Za-z_]\w*(?=\s*=)"):
                self.expect("=", "")
                named = True
                if key not in parameters:
                    raise self.error(
                        f"{recipe} has no argument {key!r}{suggest(key, parameters)} ({usage(recipe)})", start
                    )
            elif named:
                raise self.error(f"{self.rest()!r} has no name, and comes after an argument that has ({usage(recipe)})")
            elif len(found) == len(positional):
                raise self.error(f"{recipe} takes no more arguments without a name ({usage(recipe)})")
            else:
                key = positional[len(found)]
            if key in found:
                raise self.error(f"{key} is given twice", start)
            found[key] = Argument(self.value(recipe, key, _KINDS[parameters[key].annotation]), start + 1)
        for name, p in parameters.items():
            if p.default is p.empty and name not in found and self.peek() == ")":
                raise self.error(f"{recipe} needs {name}: {usage(recipe)}")
        return found

    def value(self, recipe: str, key: str, kind: _Kind) -> Any:
        self.peek()
        start = self.at
        value = self.items(kind) if self.peek() == "[" and kind.items else self.item()
        if isinstance(value, int) and slice in kind.types and int not in kind.types:
            raise self.error(f"{recipe} needs a range or a list of layers; did you mean {value}:{value + 1}?", start)
        if not isinstance(value, kind.types):
            raise self.error(f"{key} must be {kind.form}, not {self.line[start : self.at].strip()}", start)
        if isinstance(value, str) and list in kind.types:
            return [value]
        return float(value) if isinstance(value, int) and float in kind.types else value

    def items(self, kind: _Kind) -> list[Any]:
        self.at += 1
        items: list[Any] = []
        while self.peek() != "]":
            if items:
                self.expect(",", "between the items of a list, or ']' after them")
                if self.peek() == "]":
                    break
            start = self.at
            items.append(self.item())
            if len(items) > _MAX_ITEMS:
                raise self.error(f"the list has more than {_MAX_ITEMS} items", start)
            if not isinstance(items[-1], kind.items):
                raise self.error(f"the list must hold {kind.items_form}, not {self.line[start : self.at]}", start)
        self.at += 1
        if not items:
            raise self.error("the list is empty", self.at - 2)
        return items

    def item(self) -> int | float | slice | str:
        """A number, a range or a word; UserError if it is none, or a range that holds nothing."""
        self.peek()
        start = self.at
        text = self.match(r"[^\s,()\[\]=]+") or ""
        if re.fullmatch(r"\d+", text, re.ASCII):
            if len(text) > 18:
                raise self.error(f"a number of {len(text)} digits", start)
            return int(text)
        if span := re.fullmatch(r"(\d{0,18}):(\d{0,18})", text, re.ASCII):
            first, stop = (int(end) if end else None for end in span.groups())
            if first is not None and stop is not None and first >= stop:
                hint = f"half open; did you mean {first}:{first + 1}?" if first == stop else (
                    f"half open and go up; did you mean {stop}:{first}?")  # fmt: skip
                raise self.error(f"{text} is empty: ranges are {hint}", start)
            return slice(first, stop)
        if re.fullmatch(r"\d*\.?\d+(e-?\d{1,3})?|\d+\.", text, re.ASCII | re.IGNORECASE) and len(text) < 30:
            return float(text)
        if re.fullmatch(r"[A-Za-z_]\w*", text):
            return text
        if re.fullmatch(r"[\d:-]+", text):
            kind = "ranges of layers have no step: 8:24" if text.count(":") > 1 else "numbers and layers count from 0"
            raise self.error(f"{text[:30]} is not understood: {hyphenated(text) or kind}", start)
        what = f"{text[:30]!r} is neither a number, a range nor a word" if text else (
            f"{self.rest()!r} is not understood" if self.rest() else "the recipe ends here, in the middle")  # fmt: skip
        raise self.error(what, start)
