"""Opening a recipe: a mergekit file, a plan file, one line or a plan, with the config.json of its models.

Of a model nothing but config.json is read, so that all that can be known to be wrong is known
before the first tensor is touched.
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxup.depth import marked_yaml, plan_yaml
from jaxup.depth.marked_yaml import Map, Place
from jaxup.depth.plan import DepthPlan
from jaxup.depth.recipes import identity
from jaxup.errors import UserError, first_line, nearest, suggest
from jaxup.families import family_of_hf
from jaxup.files.names import is_hub_name, is_place, split_revision
from jaxup.hub.reader import read_config
from jaxup.model.config import ModelConfig
from jaxup.model.spec import depth_params, spec
from jaxup.recipes import line as recipe_line
from jaxup.recipes import mergekit

_FLAG = "--model "

# At the top of a file, what tells its kind.
_MERGEKIT_KEYS = ("merge_method", "slices", "modules")
_PLAN_KEYS = ("rows", "sources")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of a recipe: its place, and its config.json as it is written and as it is understood."""

    path: str  # directory, Hub id or URL
    revision: str | None  # of a Hub id
    hf: dict[str, Any]
    config: ModelConfig
    stand_in: bool = False  # the model is not at hand: this is `config_from`

    @property
    def place(self) -> str:
        """Where `jaxup.load` finds it."""
        return self.path if self.revision is None else f"{self.path}@{self.revision}"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A plan, and the models it is for."""

    plan: DepthPlan
    models: Mapping[str, Model]  # by the plan's names of its sources
    base: str  # the source whose config.json, tokenizer and other files the result takes
    tokenizer: str | None  # mergekit's tokenizer_source: "base", "union" or a model's name
    pad_to_multiple_of: int | None  # the vocabulary
    chat_template: str | None
    text: str  # the recipe as given: the file's text or the line
    name: str  # the file's name or the line
    notes: tuple[str, ...]  # what the user should know, each with its place

    @property
    def configs(self) -> dict[str, ModelConfig]:
        return {name: model.config for name, model in self.models.items()}

    @property
    def beyond_plan(self) -> str:
        """What is lost where only the plan is kept, in words; "" if that is nothing."""
        lost = self.tokenizer is not None or self.chat_template is not None
        return "the plan does not hold what the recipe says of tokenizer and chat template" if lost else ""


def open_plan(recipe: str | os.PathLike[str] | DepthPlan, *, models: Mapping[str, str] | None = None) -> DepthPlan:
    """The plan of a recipe, its sources named by the places of their models, so that `jaxup.load(plan)` finds them.

    Args:
      recipe: one line such as "upscale(org/Name, 8:24, copies=2)", a mergekit or plan file, or a plan.
      models: where models are: the recipe's name for one -> a directory, Hub id or URL.

    Raises:
      UserError: what is wrong in the recipe, with its place; a model whose config.json is not at hand.
    """
    given = recipe if isinstance(recipe, DepthPlan) else os.fspath(recipe)
    opened = open_recipe(given, models=models, flag="models: ")
    for note in (*opened.notes, *filter(None, [opened.beyond_plan])):
        warnings.warn(note, stacklevel=2)
    return opened.plan.renamed({name: model.place for name, model in opened.models.items()})


def model_plan(place: str) -> DepthPlan:
    """The plan of a model as it is; UserError if its config.json is not at hand."""
    found = _Models({}, None, None, None, "")
    found.hint = "of a model that is not, give the number of layers after its name"
    model = found[place]
    return identity(model.place, model.config.num_layers)


def open_recipe(
    recipe: str | DepthPlan, *, models: Mapping[str, str] | None = None, default: str | None = None,
    config_from: str | None = None, revision: str | None = None, dtype: str | None = None, flag: str = _FLAG,
) -> Recipe:  # fmt: skip
    """The recipe that a file holds, a line is, or that is just a plan; UserError as `open_plan`.

    Args:
      recipe: a path to a mergekit file or a plan file, told apart by what they hold; one line, see
        `jaxup.recipes.line`; or a plan. The sources of plans are models.
      models: the name that the recipe has for one, with or without its "@revision" -> its place.
      default: where the recipe's one model is that is not in `models`, whatever its name.
      config_from: a directory whose config.json stands in for every model that is no directory and
        not in the Hub's cache. Nothing is then fetched.
      revision: of the models that are Hub ids and come without one.
      dtype: of the result's tensors, whatever the recipe says.
      flag: what the user says before NAME=DIR, for messages.
    """
    found = _Models(dict(models or {}), default, config_from, revision, flag)
    if isinstance(recipe, DepthPlan):
        opened = _of_plan(recipe, found, "a plan made in Python", "a plan made in Python")
    elif not os.path.lexists(os.path.expanduser(recipe)) and recipe_line.is_line(recipe):
        call = recipe_line.parse(recipe)
        plan = call.plan(lambda model: found[model].config.num_layers, lambda model: depth_params(found[model].config))
        opened = dataclasses.replace(_of_plan(plan, found, recipe, recipe), notes=call.notes)
    else:
        opened = _open_file(recipe, _read_text(recipe), found)
    if unknown := found.places.keys() - found.asked:
        name = min(unknown)
        raise UserError(f"the recipe has no such model{suggest(name, found.opened)}", at=f"{flag}{name}")
    if revision is not None and all(model.revision != revision for model in found.opened.values()) and not config_from:
        raise UserError("a revision goes with a hub id, and no model here is one of that", at=f"revision={revision}")
    if dtype is not None:
        opened = dataclasses.replace(opened, plan=dataclasses.replace(opened.plan, out_dtype=dtype))
    return opened


def parse_places(pairs: Sequence[str], flag: str = _FLAG) -> dict[str, str]:
    """The values of `flag`, each NAME=PLACE, as `open_recipe` takes them."""
    places: dict[str, str] = {}
    for pair in pairs:
        name, separator, place = pair.partition("=")
        if not separator or not name or not place:
            raise UserError("must be NAME=DIR", at=f"{flag}{pair}")
        if name in places:
            raise UserError("given twice", at=f"{flag}{name}")
        places[name] = place
    return places


def _of_plan(
    plan: DepthPlan, found: _Models, text: str, name: str, written: Mapping[str, Place] | None = None
) -> Recipe:
    """`written` says where in the text the depth of each source is."""
    for source, count in plan.sources:
        if (layers := found[source].config.num_layers) != count:
            where = f"{found[source].path}: config.json"
            at = str(written[source]) if written else "plan"
            raise UserError(f"source {source!r} has {count} layers here, but {layers} in {where}", at=at)
    return Recipe(plan, found.opened, plan.rows[0].source, None, None, None, text, name, ())


def _open_file(name: str, text: str, found: _Models) -> Recipe:
    data, place = marked_yaml.load(text, name), Place(name, 1, 1)
    if not isinstance(data, Map):
        raise place.error(f"a recipe is a mapping with slices or rows, not {marked_yaml.shown(data)}")
    if any(key in data for key in _PLAN_KEYS) and not any(key in data for key in _MERGEKIT_KEYS):
        return _of_plan(plan_yaml.load(text, name), found, text, name, data["sources"].values_at)
    if not any(key in data for key in _MERGEKIT_KEYS):
        hint = f"; a model's recipe is {_identity(str(Path(name).parent))}" if "model_type" in data else _nearest(data)
        raise place.error(f"neither a mergekit recipe (merge_method, slices) nor a plan (sources, rows){hint}")
    merge = mergekit.load(text, lambda model: described(found[model]), name)
    models = {source: found[source] for source in [*dict(merge.plan.sources), merge.base]}
    return Recipe(merge.plan, models, merge.base, merge.tokenizer, merge.pad_to_multiple_of, merge.chat_template,
                  text, name, merge.notes)  # fmt: skip


def _identity(model: str) -> str:
    """The recipe of a model as it is, for a shell."""
    quoted = f'"{model}"' if re.search("[,()']", model) else model
    return f"'identity({quoted})'"


def _nearest(data: Map) -> str:
    """What a misspelt key was probably meant to be."""
    for key in data:
        if hint := nearest(str(key), (*_MERGEKIT_KEYS, *_PLAN_KEYS)):
            return f": unknown key {marked_yaml.shown(key)}{hint}"
    return ""


def _read_text(name: str) -> str:
    """A file's text; UserError for what is no recipe file."""
    path = Path(name).expanduser()
    if not name:
        raise UserError("the recipe is empty; in one line one is like 'upscale(MODEL, 19:41, copies=2)'")
    try:
        if path.is_dir():
            raise UserError(f"a directory, not a recipe; did you mean {_identity(name)}?", at=name)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError("not a regular file", at=name)
        if status.st_size > 4 * marked_yaml.MAX_CHARACTERS:
            raise UserError(f"{status.st_size} bytes are too many for a recipe; is it a model's file?", at=name)
        data = path.read_bytes()
    except FileNotFoundError:
        others = sorted(other.name for other in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = nearest(path.name, others) or "; in one line a recipe is like 'upscale(MODEL, 19:41, copies=2)'"
        raise UserError(f"no such file{hint}", at=name) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(
            f"cannot be read: {getattr(error, 'strerror', None) or first_line(error)}", at=name[:200]
        ) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"not a text file (UTF-8): byte {data[error.start]:#04x} at {error.start}", at=name) from None
    if "\0" in text:
        raise UserError(f"not a text file: a zero byte at {text.index(chr(0))}", at=name)
    return text


class _Models:
    """The models of a recipe by the names that it has for them, each opened when first asked for."""

    def __init__(
        self, places: dict[str, str], default: str | None, config_from: str | None, revision: str | None, flag: str
    ):
        self.places, self.default, self.config_from, self.revision = places, default, config_from, revision
        self.hint = f"give its place with {flag}NAME=DIR"
        if flag == _FLAG:
            self.hint += ", or --config-from DIR to see the plan from a config.json alone"
        self.opened: dict[str, Model] = {}
        self.asked: set[str] = set()  # of the places

    def __getitem__(self, name: str) -> Model:
        if name not in self.opened:
            self.opened[name] = self._open(name)
        return self.opened[name]

    def _open(self, name: str) -> Model:
        path, revision = split_revision(name)
        self.asked |= {name, path}
        if name in self.places:
            path, revision = split_revision(self.places[name])
        elif self.default is not None and path not in self.places:
            if others := self.opened.keys() - self.places.keys():
                what = f"the recipe is of several models, {min(others)!r} and {name!r}: name the place of each"
                raise UserError(what)
            path, revision = self.default, None
        elif path in self.places:
            path, other = split_revision(self.places[path])
            # A directory has no revisions: it is the one that was asked for.
            revision = other or (None if is_place(path) else revision)
        if revision is None and not is_place(path):
            revision = self.revision
        if self.config_from is not None and not _at_hand(path, revision):
            try:
                return Model(self.config_from, None, *read_config(self.config_from), stand_in=True)
            except UserError as error:
                raise UserError(f"--config-from {error}") from None
        try:
            hf, config = read_config(path, revision=revision)
        except UserError as error:
            # What is at hand and wrong is not called absent.
            if len(error.at) != 1 or is_place(path):
                raise
            given = ", ".join(map(repr, self.places.keys() - self.asked))
            given = given and f" (what is given is for {given})"
            meant = error.hint and f" ({error.hint})"
            if path == split_revision(name)[0]:
                raise UserError(f"{name} is not at hand: {error.what}{meant}{given}", hint=self.hint) from None
            raise UserError(f"{path}, said to be {name!r}, is not at hand: {error.what}{meant}") from None
        return Model(path, revision, hf, config)


def _at_hand(path: str, revision: str | None) -> bool:
    """Whether config.json can be read without fetching anything."""
    if os.path.lexists(os.path.expanduser(path)):
        return True
    if not is_hub_name(path):
        return False
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str)


def described(model: Model) -> mergekit.Source:
    """The model's depth and the names of its tensors in the files."""
    family = family_of_hf(model.hf)
    return mergekit.Source(model.config.num_layers, {path: family.tensor_name(path) for path in spec(model.config)})
