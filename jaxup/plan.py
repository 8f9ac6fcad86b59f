"""See what a recipe makes before anything is built: `python -m jaxup.plan RECIPE`.

RECIPE is a mergekit or a plan file, or one line such as 'upscale(MODEL, 19:41, copies=2)'. Only
config.json of each model is read, and its tokenizer where the recipe changes that. What would be
built is printed: the order of the layers, what is unusual about it, sizes, and what the models
disagree about; --png draws it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from typing import TYPE_CHECKING

from jaxup.errors import Parser, UserError, entry_point
from jaxup.progress import say

if TYPE_CHECKING:
    from jaxup.recipes.open import Recipe


def recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that opens a recipe."""
    parser.add_argument("recipe", metavar="RECIPE", help="file, or one line")
    parser.add_argument("--model", metavar="NAME=DIR", action="append", default=[],
                        help="where the model is that the recipe calls NAME: directory, RUN, Hub id or URL; "
                             "may be given several times")  # fmt: skip
    parser.add_argument("--revision", help="of the models that are Hub ids: branch, tag or commit")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        help="of the tensors (default: as the recipe says, else as they are)")  # fmt: skip


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("plan", __doc__)
    recipe_arguments(parser)
    parser.add_argument("--config-from", metavar="DIR",
                        help="for models that are not at hand, take DIR's config.json; nothing is fetched")  # fmt: skip
    parser.add_argument("--png", metavar="FILE", help="draw the plan; replaces a PNG that is there")
    for kind, what in (("mergekit", "a mergekit recipe"), ("plan", "a plan file")):
        parser.add_argument(f"--to-{kind}", metavar="FILE", nargs="?", const="-",
                            help=f"write {what} of it; without FILE that is all that is printed")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    args = parser.parse_args(argv[1:])
    if args.to_mergekit == args.to_plan == "-":
        raise UserError("--to-mergekit and --to-plan cannot both be printed; give one a FILE")
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    from jaxup.recipes.open import open_recipe, parse_places
    from jaxup.recipes.report import check, report
    from jaxup.recipes.written import check_files, write, written

    wanted = {"png": args.png, "mergekit": args.to_mergekit, "plan": args.to_plan}
    files = {kind: file for kind, file in wanted.items() if file not in (None, "-")}
    check_files(files, force=args.force)
    recipe = open_recipe(
        args.recipe, models=parse_places(args.model), config_from=args.config_from, revision=args.revision,
        dtype=args.dtype,
    )  # fmt: skip
    recipe, vocab_size = _with_vocabulary(recipe)
    printed = next((kind for kind, file in wanted.items() if file == "-"), None)
    if printed:
        for note in recipe.notes:
            say(f"note: {note}")
    else:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        for line in report(recipe, vocab_size=vocab_size, color=color):
            print(line)
        sys.stdout.flush()
    check(recipe, vocab_size)  # printed first, all of it: this names only the first of what keeps the models apart
    if (args.to_mergekit or args.to_plan) and recipe.beyond_plan:
        say(f"note: {recipe.beyond_plan}")
    # All of them are made before the first is written.
    contents = {kind: written(recipe, kind) for kind, file in wanted.items() if file is not None}
    if printed:
        print(contents[printed].decode(), end="")
    for kind, file in files.items():
        write(file, contents[kind])
        print(f"wrote {file}", file=sys.stderr if printed else sys.stdout)


def _with_vocabulary(recipe: Recipe) -> tuple[Recipe, int | None]:
    """The recipe with notes on what becomes of the vocabulary, and the size of that of the result, where it changes."""
    from jaxup.recipes.report import guessed_vocab_size

    if recipe.tokenizer is None:
        return recipe, None
    from jaxup.building.vocabulary import NoTokenizer, open_vocabulary

    try:
        vocabulary = open_vocabulary(recipe)
        vocab_size, notes = vocabulary.size, vocabulary.notes
    except NoTokenizer as error:
        vocab_size = guessed_vocab_size(recipe)
        notes = (f"{error}; sizes are those of {vocab_size:,} rows, as config.json has them",)
    return dataclasses.replace(recipe, notes=recipe.notes + notes), vocab_size


if __name__ == "__main__":
    entry_point(main)
