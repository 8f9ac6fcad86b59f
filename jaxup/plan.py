"""See what a recipe makes before anything is built: `python -m jaxup.plan RECIPE`.

RECIPE is a mergekit or a plan file, or one line such as 'upscale(MODEL, 19:41, copies=2)'. Only
config.json of each model is read. What would be built is printed: the order of the layers, what is
unusual about it, sizes, and what the models disagree about; --png draws it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxup.errors import Parser, UserError, entry_point

if TYPE_CHECKING:
    from jaxup.model.config import ModelConfig
    from jaxup.recipes.open import Recipe

_STDOUT = "-"


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("plan", __doc__)
    parser.add_argument("recipe", metavar="RECIPE", help="file, or one line")
    parser.add_argument("--model", metavar="NAME=DIR", action="append", default=[],
                        help="where the model is that the recipe calls NAME: directory, Hub id or URL; "
                             "may be given several times")  # fmt: skip
    parser.add_argument("--config-from", metavar="DIR",
                        help="for models that are not at hand, take DIR's config.json; nothing is fetched")  # fmt: skip
    parser.add_argument("--revision", help="of the models that are Hub ids: branch, tag or commit")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        help="of the tensors (default: as the recipe says, else as they are)")  # fmt: skip
    parser.add_argument("--png", metavar="FILE", help="draw the plan; replaces a PNG that is there")
    for kind, what in (("mergekit", "a mergekit recipe"), ("plan", "a plan file")):
        parser.add_argument(f"--to-{kind}", metavar="FILE", nargs="?", const=_STDOUT,
                            help=f"write {what} of it; without FILE that is all that is printed")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    return parser.parse_args(argv[1:])


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    if args.to_mergekit == args.to_plan == _STDOUT:
        raise UserError("--to-mergekit and --to-plan cannot both be printed; give one a FILE")
    _check_outputs([args.png, args.to_mergekit, args.to_plan], args.png, args.force)

    from jaxup.depth.result import result_config
    from jaxup.recipes.open import open_recipe, parse_places

    recipe = open_recipe(
        args.recipe, models=parse_places(args.model), config_from=args.config_from, revision=args.revision
    )
    if args.dtype is not None:
        recipe = dataclasses.replace(recipe, plan=dataclasses.replace(recipe.plan, out_dtype=args.dtype))
    configs = {name: model.config for name, model in recipe.models.items()}
    quiet = _STDOUT in (args.to_mergekit, args.to_plan)
    if quiet:
        for note in recipe.notes:
            print(f"jaxup: note: {note}", file=sys.stderr)
    else:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        for line in report(recipe, color=color):
            print(line)
        sys.stdout.flush()
    # Printed first, all of it: this names only the first of what keeps the models apart.
    result_config(recipe.plan, configs, base=recipe.base, vocab_size=_vocab_size(recipe))
    for path, content in _contents(recipe, args):
        if path == _STDOUT:
            print(content.decode(), end="")
        else:
            _write(Path(path), content)
            print(f"wrote {path}", file=sys.stderr if quiet else sys.stdout)


# ---- what is printed


def report(recipe: Recipe, *, color: bool = False) -> Iterator[str]:
    """The lines that describe a recipe; those on what the models disagree about come last."""
    from jaxup.depth.draw import describe
    from jaxup.depth.result import caveats

    before = " + ".join(str(count) for _, count in recipe.plan.sources)
    yield f"{recipe.name}: {before} -> {recipe.plan.num_layers} layers"
    if recipe.notes:
        yield ""
        yield from (f"note: {note}" for note in recipe.notes)
    yield ""
    yield describe(recipe.plan, color=color)
    yield ""
    yield from _sizes(recipe)
    yield ""
    yield from _origins(recipe)
    yield from caveats(recipe.plan, {name: model.config for name, model in recipe.models.items()})
    yield from _disagreements(recipe)


def _sizes(recipe: Recipe) -> Iterator[str]:
    """Layers, parameters and bytes of each model and of the result, as a table."""
    from jaxup.depth.result import result_config
    from jaxup.model.shapes import count_params

    rows = []
    for name, model in recipe.models.items():
        dtype, size = _dtype(model.hf), count_params(model.config)
        rows.append((name, model.config.num_layers, size, size * _BYTES[dtype], dtype))
    try:
        configs = {name: model.config for name, model in recipe.models.items()}
        config = result_config(recipe.plan, configs, base=recipe.base, vocab_size=_vocab_size(recipe))
    except UserError:
        pass  # what it is that does not fit is said below
    else:
        nbytes, dtypes = _result_bytes(recipe, config)
        rows.append(("result", config.num_layers, count_params(config), nbytes, " and ".join(dtypes)))
    cells = [(_printable(name), f"{layers} layers", f"{size:,} parameters", f"{_gb(nbytes)} in {dtype}")
             for name, layers, size, nbytes, dtype in rows]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells)]
    for name, layers, size, nbytes in cells:
        yield f"{name:<{widths[0]}}  {layers:>{widths[1]}}  {size:>{widths[2]}}  {nbytes}"


_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def _dtype(hf: dict[str, Any]) -> str:
    """Of a model's tensors, as its config.json has it; transformers' default is float32."""
    named = hf.get("dtype", hf.get("torch_dtype"))
    return named if isinstance(named, str) and named in _BYTES else "float32"


def _result_bytes(recipe: Recipe, config: ModelConfig) -> tuple[int, list[str]]:
    """Bytes of the result's tensors and their dtypes, each as that of the model that the tensor comes from."""
    from jaxup.model.shapes import param_shapes

    plan, total, dtypes = recipe.plan, 0, {}
    head = plan.head({name: model.config.tie_embeddings for name, model in recipe.models.items()})
    ends = {"embed_tokens": plan.embed_tokens, "embed_positions": plan.embed_positions, "norm": plan.norm}
    ends["lm_head"] = head[1] if head else None
    for path, shape in param_shapes(config).items():
        name, _, inner = path.partition(".")
        size = math.prod(shape)
        if name == "blocks":
            origins = [row.source if row.inherits(inner) else None for row in plan.rows]
            size //= len(origins)
        else:
            origins = [ends[name]]
        for origin in origins:
            source = recipe.base if origin is None else origin
            dtype = plan.out_dtype or plan.dtype or _dtype(recipe.models[source].hf)
            total += size * _BYTES[dtype]
            dtypes[dtype] = None
    return total, list(dtypes)


def _origins(recipe: Recipe) -> Iterator[str]:
    """Where the models are, and which of them gives what is not tensors."""
    for name, model in recipe.models.items():
        if model.stand_in:
            yield f"{name!r} is not at hand: {model.path}'s config.json stands in for its own"
        elif model.path != name:
            yield f"{name!r} is {model.path!r}{f' at {model.revision}' if model.revision else ''}"
    tied = {name: model.config.tie_embeddings for name, model in recipe.models.items()}
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


# ---- what the models disagree about

_ABSENT = type("Absent", (), {"__repr__": lambda self: "absent"})()

# Keys of config.json that say nothing about a model.
_DULL = frozenset(("transformers_version", "architectures", "use_cache", "name_or_path", "dtype", "torch_dtype"))


def _disagreements(recipe: Recipe) -> Iterator[str]:
    """First what is a matter of choice, and what is chosen; then what makes the result impossible."""
    from jaxup.depth.result import disagreements
    from jaxup.families import family_of_hf

    models, plan = recipe.models, recipe.plan
    families = [family_of_hf(model.hf) for model in models.values()]
    configs = {name: model.config for name, model in models.items()}
    fatal: dict[str, dict[str, object]] = {}
    for field, (a, name_a), (b, name_b) in disagreements(plan, configs):
        if field != "vocab_size" or _vocab_size(recipe) is None:
            fatal.setdefault(field, {name_a: a})[name_b] = b

    followed = f"{recipe.base!r} is followed"
    differ = [(field, {name: getattr(config, field) for name, config in configs.items()}, followed)
              for field in ("max_positions", "init_std") if field not in fatal]  # fmt: skip
    dtype = f"the result has {plan.out_dtype or plan.dtype}" if plan.out_dtype or plan.dtype else "tensors keep theirs"
    differ.append(("dtype", {name: _dtype(model.hf) for name, model in models.items()}, dtype))
    # Keys that decide a field of the config are compared as that, whatever their defaults.
    decide = {name for family in families for key in (*family.keys, *family.fixed) for name in [_name(key)]}
    decide |= {name for family in families for rule in family.rules for name in rule.names}
    for key in dict.fromkeys(key for model in models.values() for key in model.hf):
        if key not in decide | _DULL and not key.startswith("_"):
            values = {name: model.hf.get(key, _ABSENT) for name, model in models.items()}
            differ.append((key, values, followed))
    known = {field: key.name for key in families[0].keys for field in key.fields}
    for field, values, taken in differ:
        if len(set(map(repr, values.values()))) > 1:
            yield f"the models differ: {known.get(field, field)} is {_values(values)}; {taken}"
    for field, values in fatal.items():
        yield f"the models do not go together: {known.get(field, field)} is {_values(values)}"


def _name(key: object) -> str:
    return key if isinstance(key, str) else key.name


def _values(values: dict[str, object]) -> str:
    """ "2 in 'a' and 'c', 3 in 'b'"."""
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(repr(value)[:200], []).append(repr(name))
    return ", ".join(f"{value} in {' and '.join(names)}" for value, names in groups.items())


def _vocab_size(recipe: Recipe) -> int | None:
    """Of the result where the recipe gives it another tokenizer: only the tokenizers would say exactly."""
    if recipe.tokenizer is None:
        return None
    if recipe.tokenizer == "union":
        return max(model.config.vocab_size for model in recipe.models.values())
    return recipe.models[recipe.base if recipe.tokenizer == "base" else recipe.tokenizer].config.vocab_size


def _gb(nbytes: int) -> str:
    unit, name = next(
        (u, n) for u, n in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "B")) if nbytes >= u or u == 1
    )
    return f"{nbytes / unit:.2f} {name}" if unit > 1 else f"{nbytes} B"


def _printable(name: str) -> str:
    return name if name.isprintable() else repr(name)


# ---- what is written


def _contents(recipe: Recipe, args: argparse.Namespace) -> list[tuple[str, bytes]]:
    """(path, content) of each file asked for, all of them made before the first is written."""
    contents = []
    if args.png is not None:
        from jaxup.depth.picture import png

        title = os.path.basename(recipe.name) if os.path.lexists(os.path.expanduser(recipe.name)) else recipe.name
        contents.append((args.png, png(recipe.plan, title)))
    if args.to_mergekit is not None:
        from jaxup.recipes import mergekit
        from jaxup.recipes.open import described

        names = {path: name for model in recipe.models.values() for path, name in described(model).names.items()}
        contents.append((args.to_mergekit, mergekit.dump(recipe.plan, base=recipe.base, names=names).encode()))
    if args.to_plan is not None:
        contents.append((args.to_plan, recipe.plan.to_yaml().encode()))
    if (args.to_mergekit or args.to_plan) and (recipe.tokenizer or recipe.chat_template):
        print(
            "jaxup: note: the plan does not hold what the recipe says of tokenizer and chat template", file=sys.stderr
        )
    return contents


def _check_outputs(paths: list[str | None], png: str | None, force: bool) -> None:
    """UserError for a file that cannot be written, or that holds something; a PNG gives way to a PNG."""
    files = [Path(path).expanduser() for path in paths if path not in (None, _STDOUT)]
    for path in files:
        if path.is_dir():
            raise UserError(f"{path}: is a directory; give the name of a file")
        if not path.absolute().parent.is_dir():
            raise UserError(f"{path}: its directory does not exist")
        if os.path.lexists(path):
            if not path.is_file():
                raise UserError(f"{path}: is not a regular file")
            if not force and not (str(png) and path == Path(str(png)).expanduser() and _is_png(path)):
                raise UserError(f"{path}: exists already; choose another name, or --force to replace it")
    if len({path.resolve() for path in files}) < len(files):
        raise UserError(f"{files[-1]}: is to be written twice")


def _is_png(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(8) in (b"\x89PNG\r\n\x1a\n", b"")


def _write(path: Path, content: bytes) -> None:
    """The file appears, or is replaced, whole."""
    path = path.expanduser().resolve()  # through a link
    new = path.with_name(f".{path.name}.jaxup-new-{os.getpid()}")
    try:
        try:
            new.write_bytes(content)
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def cli() -> None:
    entry_point(main)


if __name__ == "__main__":
    cli()
