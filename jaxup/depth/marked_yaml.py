"""YAML that knows where everything stands, so that a mistake in it can be named by line and column.

Reads with PyYAML's safe loader, event by event and without recursion: what a hostile file may cost
(nesting, aliases of aliases, merge keys, long numbers, sheer size) is bounded before it is spent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import yaml

from jaxup.errors import UserError, suggest

# Together under 2 s for the worst file, and more than ten times the longest recipe known.
MAX_CHARACTERS = 300_000
MAX_NODES = 20_000  # those that merge keys copy counted again
MAX_DEPTH = 50

_TAG = "tag:yaml.org,2002:"
_MERGE = object()  # the key `<<`


class Place(NamedTuple):
    """Where something stands in a file; lines and columns count from 1."""

    name: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.name}:{self.line}:{self.column}"

    def error(self, message: str) -> UserError:
        return UserError(message, at=str(self))


class Map(dict[Any, Any]):
    """A mapping, of scalars to anything, that knows the place of itself, of each key and of each value."""

    def __init__(self, place: Place):
        super().__init__()
        self.place = place
        self.keys_at: dict[Any, Place] = {}
        self.values_at: dict[Any, Place] = {}
        self.repeated: dict[Any, tuple[Place, Place]] = {}  # the first and last of a key given twice, which counts
        self.anchored: set[Any] = set()  # keys with an anchor in their values

    def need(self, key: str) -> Any:
        if key not in self:
            raise self.place.error(f"{key!r} is missing")
        return self[key]

    def refuse_repeated(self, key: Any) -> None:
        if key in self.repeated:
            first, last = self.repeated[key]
            raise last.error(f"{shown(key)} is given twice; first in line {first.line}")

    def only(self, known: Iterable[str]) -> None:
        """UserError for a key that is not known, or given twice."""
        for key, place in self.keys_at.items():
            if key not in known:
                raise place.error(f"unknown key {shown(key)}{suggest(str(key), known)}")
            self.refuse_repeated(key)

    def merge(self, other: Map) -> None:
        """Takes over what it lacks."""
        for key in other.keys() - self.keys():
            self[key] = other[key]
            self.keys_at[key], self.values_at[key] = other.keys_at[key], other.values_at[key]
            if key in other.repeated:
                self.repeated[key] = other.repeated[key]


class List(list[Any]):
    """A list that knows the place of itself and of each item."""

    def __init__(self, place: Place):
        super().__init__()
        self.place = place
        self.items_at: list[Place] = []


# ---- what is read from it


def shown(value: Any) -> str:
    """A value as a message shows it: short, whatever the file holds."""
    if isinstance(value, Map):
        return "a mapping"
    if isinstance(value, List):
        return "a list" if len(value) > 4 or any(map(_is_collection, value)) else f"[{', '.join(map(shown, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def mapping(value: Any, what: str, place: Place) -> Map:
    if not isinstance(value, Map):
        raise place.error(f"{what} must be a mapping of keys to values, not {shown(value)}")
    return value


def sequence(value: Any, what: str, place: Place) -> List:
    if not isinstance(value, List):
        raise place.error(f"{what} must be a list, not {shown(value)}")
    return value


def number(value: Any, what: str, place: Place) -> float:
    """A finite number; YAML 1.1 reads 1e-3, which lacks a point, as text."""
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise TypeError
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        raise place.error(f"{what} must be a number, not {shown(value)}") from None
    if not abs(result) < float("inf"):  # false of NaN
        raise place.error(f"{what} must be a finite number, not {shown(value)}")
    return result


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_collection(value: Any) -> bool:
    return isinstance(value, (dict, list))


# ---- reading


def load(text: str, name: str) -> Any:
    """The one document of `text` as Map, List and scalars; `name` is what its places are in.

    Dates stay text. UserError for what is not YAML, and for YAML that would cost too much.
    """
    start = Place(name, 1, 1)
    if len(text) > MAX_CHARACTERS:
        raise start.error(f"{len(text)} characters of YAML; at most {MAX_CHARACTERS} are read")
    try:
        return _Reader(yaml.SafeLoader(text), name).read()
    except UserError:
        raise
    except yaml.reader.ReaderError as error:
        before = text[: error.position].split("\n")
        place = Place(name, len(before), len(before[-1]) + 1)
        raise place.error(f"not YAML: the character {text[error.position]!r} is not allowed") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(name, mark.line + 1, mark.column + 1) if mark else start
        problem = " ".join((error.problem or error.context or "it cannot be read").split())
        if error.context and error.context_mark and error.context_mark.line < place.line - 1:
            problem += f" ({error.context} from line {error.context_mark.line + 1})"
        if "'\\t'" in problem:
            problem = "a tab; YAML is indented with spaces"
        raise place.error(f"not YAML: {problem}") from None
    except Exception as error:  # PyYAML lets through whatever its scanner runs into, such as ValueError
        raise start.error(f"not YAML: {' '.join(str(error).split())[:200]}") from None


class _Open:
    """A collection whose end is not read yet, and the key that waits for its value."""

    def __init__(self, value: Map | List, place: Place, anchor: str | None):
        self.value, self.place, self.anchor = value, place, anchor
        self.merges: list[Map] = []  # those that win first
        self.key: Any = None
        self.key_at: Place | None = None
        self.anchors_before_value = 0


class _Reader:
    def __init__(self, loader: yaml.SafeLoader, name: str):
        self.loader, self.name = loader, name
        self.stack: list[_Open] = []
        self.anchors: dict[str, tuple[Any, Place]] = {}
        self.anchors_seen = 0
        self.nodes = 0
        self.root: Any = None
        self.build = {
            f"{_TAG}null": loader.construct_yaml_null,
            f"{_TAG}bool": loader.construct_yaml_bool,
            f"{_TAG}int": loader.construct_yaml_int,
            f"{_TAG}float": loader.construct_yaml_float,
        }

    def read(self) -> Any:
        documents = 0
        while not isinstance(event := self.loader.get_event(), yaml.StreamEndEvent):
            place = Place(self.name, event.start_mark.line + 1, event.start_mark.column + 1)
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise place.error("a second document; a file holds one")
            elif isinstance(event, yaml.AliasEvent):
                self.take(self.anchored(event.anchor, place), place)
            elif isinstance(event, yaml.ScalarEvent):
                value = self.scalar(event, place)
                self.define(event.anchor, value, place)
                self.take(value, place)
            elif isinstance(event, yaml.CollectionStartEvent):
                self.open(event, place)
            elif isinstance(event, yaml.CollectionEndEvent):
                done = self.stack.pop()
                if isinstance(done.value, Map):
                    for other in done.merges:
                        done.value.merge(other)
                if done.anchor:
                    self.anchors[done.anchor] = done.value, done.place
                self.take(done.value, done.place)
        return self.root

    def open(self, event: yaml.CollectionStartEvent, place: Place) -> None:
        kind = Map if isinstance(event, yaml.MappingStartEvent) else List
        if event.tag not in (None, "!", f"{_TAG}{'map' if kind is Map else 'seq'}"):
            raise place.error(f"the tag {shown(event.tag)} is not read here")
        if len(self.stack) >= MAX_DEPTH:
            raise place.error(f"nested more than {MAX_DEPTH} deep")
        # It can be named only after its end: a value that contained itself could not be walked.
        self.define(event.anchor, _Open, place)
        self.stack.append(_Open(kind(place), place, event.anchor))

    def define(self, anchor: str | None, value: Any, place: Place) -> None:
        if anchor is None:
            return
        if anchor in self.anchors:
            first = self.anchors[anchor][1]
            raise place.error(f"the anchor &{anchor} is given twice; first in line {first.line}")
        self.anchors[anchor] = value, place
        self.anchors_seen += 1

    def anchored(self, anchor: str, place: Place) -> Any:
        if anchor not in self.anchors:
            known = suggest(anchor, self.anchors) if len(self.anchors) <= 20 else ""
            raise place.error(f"there is no anchor &{anchor} above{known}")
        value, first = self.anchors[anchor]
        if value is _Open:
            raise place.error(f"*{anchor} is inside of what it names, in line {first.line}")
        return value

    def scalar(self, event: yaml.ScalarEvent, place: Place) -> Any:
        tag, value = event.tag, event.value
        if tag in (None, "!"):
            tag = self.loader.resolve(yaml.ScalarNode, value, event.implicit)
        if tag == f"{_TAG}merge":
            return _MERGE
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise place.error("half of a surrogate pair is not text")
        if tag in self.build:
            if len(value) > 100:
                raise place.error(f"a number of {len(value)} characters")
            try:
                return self.build[tag](yaml.ScalarNode(tag, value))
            except Exception:  # PyYAML raises what int and float do, and KeyError
                raise place.error(f"{shown(value)} cannot be read as {tag.removeprefix(_TAG)}") from None
        if tag not in (f"{_TAG}str", f"{_TAG}timestamp", f"{_TAG}value"):
            raise place.error(f"the tag {shown(tag)} is not read here")
        return value

    def take(self, value: Any, place: Place) -> None:
        """Puts a value that is read whole where it belongs."""
        self.count(1, place)
        parent, plain = self.stack[-1] if self.stack else None, "<<" if value is _MERGE else value
        if parent is None:
            self.root = plain
        elif isinstance(parent.value, List):
            parent.value.append(plain)
            parent.value.items_at.append(place)
        elif parent.key_at is None:
            if _is_collection(value):
                raise place.error(f"a key must be text, not {shown(value)}")
            parent.key, parent.key_at, parent.anchors_before_value = value, place, self.anchors_seen
        else:
            self.fill(parent, parent.value, parent.key_at, plain, place)
            parent.key_at = None

    def fill(self, parent: _Open, result: Map, key_at: Place, value: Any, place: Place) -> None:
        key = parent.key
        if key is _MERGE:
            maps = value if isinstance(value, List) else [value]
            if not all(isinstance(other, Map) for other in maps):
                raise place.error(f"<< takes a mapping or a list of them, not {shown(value)}")
            self.count(sum(map(len, maps)), place)
            parent.merges[:0] = maps
            return
        if key in result:
            first = result.repeated[key][0] if key in result.repeated else result.keys_at[key]
            result.repeated[key] = first, key_at
        result[key], result.keys_at[key], result.values_at[key] = value, key_at, place
        if self.anchors_seen > parent.anchors_before_value:
            result.anchored.add(key)

    def count(self, nodes: int, place: Place) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise place.error(f"more than {MAX_NODES} keys and values, counting what aliases and << repeat")
