"""A plan carried out on files: a model directory made from others, out of core and without jax.

A tensor that nothing changes is copied as bytes; one that is scaled or cast is computed a few MB at a
time; zeros are not even written. Only a plan that needs newly initialised values imports jax.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxup import devices
from jaxup.building import copying
from jaxup.building.origins import Origin, tensor_origins
from jaxup.building.vocabulary import Vocabulary, open_vocabulary
from jaxup.depth import picture
from jaxup.depth.plan import DepthPlan
from jaxup.errors import UserError
from jaxup.families import family_of_hf
from jaxup.families.layouts import Tensor, to_file
from jaxup.files import manifest
from jaxup.files.names import in_run
from jaxup.files.shards import INDEX, Stored, index, json_bytes, parse_size, split
from jaxup.files.staging import check_replaceable, check_space, staged_directory
from jaxup.files.storage import Local
from jaxup.hub.card import model_card
from jaxup.hub.directory import CARD, MARKS, PLAN, carried_files
from jaxup.hub.reader import Checkpoint, check_tied, open_checkpoint, stored_dtypes
from jaxup.model.spec import STACK, flatten
from jaxup.progress import printable
from jaxup.recipes.open import Recipe, open_recipe
from jaxup.recipes.outcome import Outcome, outcome
from jaxup.text import size

PICTURE = "plan.png"


class Built(NamedTuple):
    """What a build has written."""

    nbytes: int  # of all tensors
    zero_bytes: int  # of them zeros that were not written
    sparse: bool  # and take no space
    seconds: float
    report: str  # of the verification, if it was asked for

    def __str__(self) -> str:
        text = f"{size(self.nbytes)} in {self.seconds:.1f} s, {size(int(self.nbytes / self.seconds))}/s"
        if self.zero_bytes:
            text += f", {size(self.zero_bytes)} of it zeros" + " that take no space" * self.sparse
        return text


@dataclasses.dataclass(frozen=True)
class Work:
    """All that is known of a build before its first byte is written."""

    recipe: Recipe
    made: Outcome
    checkpoints: Mapping[str, Checkpoint]  # by the plan's source names
    shards: Mapping[str, list[tuple[Stored, Origin]]]
    texts: Mapping[str, bytes]  # the files that hold no tensors
    rows: Mapping[str, np.ndarray]  # see `Vocabulary`
    notes: tuple[str, ...]  # on the vocabulary

    @property
    def tensors(self) -> list[tuple[Stored, Origin]]:
        return [pair for shard in self.shards.values() for pair in shard]

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored, _ in self.tensors)

    @property
    def zero_bytes(self) -> int:
        return sum(stored.nbytes for stored, origin in self.tensors if origin.is_zero)

    def needed(self, sparse: bool) -> int:
        """Bytes of disk."""
        return self.nbytes + sum(map(len, self.texts.values())) - (self.zero_bytes if sparse else 0)

    def describe(self, out: Path, sparse: bool) -> str:
        """What `build` would do, in a few lines."""
        counts, sizes = collections.Counter[str](), collections.Counter[str]()
        for stored, origin in self.tensors:
            kind = "zero" if origin.is_zero else "copied" if origin.copied else "computed" if origin.found else "new"
            counts[kind] += 1
            sizes[kind] += stored.nbytes
        lines = [f"{out}: {self.recipe.plan.num_layers} layers, {len(self.tensors)} tensors, {size(self.nbytes)}"]
        lines += [
            f"  {name}: {len(shard)} tensors, {size(sum(stored.nbytes for stored, _ in shard))}"
            for name, shard in self.shards.items()
        ]
        lines.append(f"  also {', '.join(sorted({*self.texts, CARD, PICTURE, manifest.NAME}))}")
        how = {"zero": "holes of the files" if sparse else "allocated, not written", "computed": "scaled or cast",
               "new": "newly initialised", "copied": f"as bytes, {size(self._read())} of them read"}  # fmt: skip
        for kind in ("copied", "computed", "new", "zero"):
            if counts[kind]:
                lines.append(f"{kind}: {counts[kind]} tensors, {size(sizes[kind])} ({how[kind]})")
        free = shutil.disk_usage(out.parent).free
        lines.append(f"disk: {size(self.needed(sparse))} needed, {size(free)} free")
        return "\n".join(lines)

    def _read(self) -> int:
        """Bytes that are copied, each counted once."""
        return sum({origin: stored.nbytes for stored, origin in self.tensors if origin.copied}.values())


def prepare(
    recipe: Recipe,
    *,
    max_shard_size: int | str = "5GB",
    allow_pickle: bool = False,
    vocabulary: Vocabulary | None = None,
) -> Work:
    """Reads configs and headers, and decides what every tensor of the result is made from.

    UserError for a model that is not at hand or not what its config.json says, for models that do not
    fit each other, and for a result that the family of the base model cannot express.
    """
    largest, plan = parse_size(max_shard_size), recipe.plan
    if vocabulary is None and (recipe.tokenizer is not None or recipe.chat_template is not None):
        vocabulary = open_vocabulary(recipe)
    vocabulary = vocabulary or Vocabulary()
    checkpoints = {}
    for name, _ in plan.sources:
        model = recipe.models[name]
        if model.stand_in:
            raise UserError(f"{name} is not at hand; give its place with --model NAME=DIR")
        checkpoints[name] = open_checkpoint(model.path, revision=model.revision, allow_pickle=allow_pickle)
        if isinstance(storage := checkpoints[name].storage, Local):
            manifest.check_manifest(storage.root, ["config.json", INDEX])
    made = outcome(recipe, stored_dtypes(checkpoints), vocab_size=vocabulary.size)
    # Where every token keeps its row, the bytes are copied.
    rows = {
        end: rows
        for end, rows in vocabulary.rows.items()
        if (name := getattr(plan, end)) and not np.array_equal(rows, np.arange(checkpoints[name].config.vocab_size))
    }
    family = family_of_hf(made.hf)
    origins = {
        stored.tensor.name: (stored, origin)
        for stored, origin in tensor_origins(made.bill, family, made.exported, checkpoints, frozenset(rows))
    }
    shards = split([stored for stored, _ in origins.values()], largest)
    base = recipe.models[recipe.base]
    texts = dict(carried_files(base.path, base.revision) if vocabulary.files is None else vocabulary.files)
    texts["config.json"] = json_bytes(made.hf | vocabulary.token_ids)
    if len(shards) > 1:
        texts[INDEX] = index(shards)
    texts[PLAN] = _plan_text(recipe).encode()
    parts = {file: [origins[stored.tensor.name] for stored in shard] for file, shard in shards.items()}
    return Work(recipe, made, checkpoints, parts, texts, rows, vocabulary.notes)


def build(
    recipe: Recipe | DepthPlan | str,
    out: str | os.PathLike,
    *,
    models: Mapping[str, str] | None = None,
    max_shard_size: int | str = "5GB",
    sparse: bool = True,
    force: bool = False,
    allow_pickle: bool = False,
    vocabulary: Vocabulary | None = None,
    verify: bool = False,
    progress: bool = False,
) -> Built:
    """Writes the directory `out`: what the recipe's plan makes of its models.

    Args:
      recipe: opened, or a plan whose sources are named by where they are, or what `open_recipe` takes.
      models: where models are that the recipe names otherwise; see `open_recipe`.
      max_shard_size: of a file: bytes, or such as "5GB" (10^9) or "2GiB" (2^30).
      sparse: zeros take no space on the disk; else they have blocks, which are not written either.
      force: replaces `out` if it is empty or holds a model.
      allow_pickle: read pytorch_model.bin where there is no safetensors file.
      vocabulary: None: as the recipe says.
      verify: before `out` appears, run what was built; see `jaxup.building.verify`. Imports jax.
      progress: show it on stderr.

    Raises:
      UserError: and `out` is as it was: as `prepare`, or `out` cannot be written, a source is damaged,
        or what was built is not what the plan makes.
    """
    if not isinstance(recipe, Recipe):
        recipe = open_recipe(recipe, models=models, flag="models: ")
        for note in recipe.notes:
            warnings.warn(note, stacklevel=2)
    work = prepare(recipe, max_shard_size=max_shard_size, allow_pickle=allow_pickle, vocabulary=vocabulary)
    for note in work.notes:
        warnings.warn(note, stacklevel=2)
    return carry_out(work, Path(out), sparse=sparse, force=force, verify=verify, progress=progress)


def check_place(work: Work, out: Path, *, force: bool) -> None:
    """UserError if nothing can be written at `out`: it overlaps with a source, exists, or has no parent."""
    there = out.resolve()
    for model in work.recipe.models.values():
        here = in_run(model.path) or Path(model.path).expanduser()
        if here.is_dir() and (there.is_relative_to(here.resolve()) or here.resolve().is_relative_to(there)):
            raise UserError(f"{out}: overlaps with what is read, {model.path}; choose another place")
    check_replaceable(Path(os.path.abspath(out)), force, MARKS)
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: its parent is not a directory")


def carry_out(
    work: Work, out: Path, *, sparse: bool = True, force: bool = False, verify: bool = False, progress: bool = False
) -> Built:
    """The second half of `build`."""
    began, plan = time.monotonic(), work.recipe.plan
    check_place(work, out, force=force)
    check_space(out.absolute().parent, out, work.needed(sparse))
    for name, checkpoint in work.checkpoints.items():
        if name in (plan.embed_tokens, plan.lm_head):
            _check_tied(checkpoint)
    new = functools.partial(_new_tensor, _new_leaves(work))
    with staged_directory(out, force=force, marks=MARKS) as directory:
        for name, content in work.texts.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
        (directory / PICTURE).write_bytes(picture.png(plan, out.name))
        (directory / CARD).write_text(_card(work, out.name))
        spans = copying.write_tensors(
            directory, work.shards, work.checkpoints, gather=work.rows, new=new, sparse=sparse, progress=progress
        )
        manifest.write_manifest(directory, spans)
        seconds, report = time.monotonic() - began, ""
        if verify:
            from jaxup.building.verify import verify as run

            report = run(work.made.bill, work.checkpoints, directory, own_vocabulary=bool(work.rows), progress=progress)
    return Built(work.nbytes, work.zero_bytes, sparse, seconds, report)


def _check_tied(checkpoint: Checkpoint) -> None:
    """UserError if a model's head ought to be its embedding, and is stored and differs."""
    if checkpoint.tied is None:
        return
    info = next(info for tensor, info in checkpoint.tensors if tensor.paths == ("embed_tokens",))
    for start in range(0, info.shape[0], 1024):
        rows = slice(start, min(info.shape[0], start + 1024))
        check_tied(checkpoint, checkpoint.read(info, rows), rows)


# ---- what is written about the plan


def _plan_text(recipe: Recipe) -> str:
    """The plan, below the recipe as it was given and the places of its models."""
    text = [] if recipe.text == recipe.name else ["", *recipe.text.splitlines()]
    lines = [f"Made by jaxup from {recipe.name}", *text, "", "Models:"]
    for name, model in recipe.models.items():
        revision = f" at {model.revision}" if model.revision else ""
        lines.append(f"{name}: {model.path}{revision}")
    comments = "".join(f"# {printable(line)}".rstrip() + "\n" for line in lines)
    return f"{comments}\n{recipe.plan.to_yaml()}"


def _card(work: Work, title: str) -> str:
    recipe = work.recipe
    names = {model.path: None for model in (recipe.models[recipe.base], *recipe.models.values())}
    dtypes = {stored.dtype.name: None for stored, _ in work.tensors}
    return model_card(
        work.made.config, title=title, dtype=", ".join(dtypes), source=recipe.name, plan=recipe.plan, picture=PICTURE,
        base_models=names,
    )  # fmt: skip


# ---- newly initialised values


def _new_leaves(work: Work) -> dict[tuple[str, int], np.ndarray]:
    """The newly initialised params that the result needs, by path and layer: `init` with seed 0, as jaxup.load."""
    needed: dict[str, list[int]] = {}
    for path, rows in work.made.bill.items():
        new = [i for i, made in enumerate(rows) if not made.is_zero and (made.source is None or made.noise)]
        needed |= {path: new} if new else {}
    if not needed:
        return {}
    import jax

    from jaxup.model.decoder import init

    def make() -> dict[str, Any]:
        leaves = flatten(init(work.made.config, 0))
        return {
            path: leaves[path][np.array(layers)] if path.startswith(STACK) else leaves[path][None]
            for path, layers in needed.items()
        }

    with devices.host():
        made = jax.tree.map(np.asarray, jax.jit(make)())
    return {(path, layer): made[path][i] for path, layers in needed.items() for i, layer in enumerate(layers)}


def _new_tensor(leaves: Mapping[tuple[str, int], np.ndarray], tensor: Tensor) -> np.ndarray:
    """The new values of a tensor, in the layout of the file, float32."""
    shapes = zip(tensor.paths, tensor.part_shapes, strict=True)
    parts = [leaves.get((path, tensor.layer or 0), np.zeros(shape, np.float32)) for path, shape in shapes]
    return to_file(tensor, parts, np.dtype(np.float32))
