"""Build the model that a recipe describes: `python -m jaxup.build RECIPE OUT`.

RECIPE is a mergekit or a plan file, or one line such as 'upscale(MODEL, 19:41, copies=2)'. Tensors
that nothing changes are copied as bytes. OUT appears when all of it is there.
"""

from __future__ import annotations

import argparse
import signal
import warnings
from pathlib import Path
from typing import Any

from jaxup.errors import Parser, Stopped, entry_point
from jaxup.plan import recipe_arguments
from jaxup.progress import tell


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("build", __doc__)
    recipe_arguments(parser)
    parser.add_argument("out", metavar="OUT", help="directory to be made")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file (default: 5GB)")
    parser.add_argument("--no-sparse", dest="sparse", action="store_false",
                        help="give zeros blocks on the disk, for storage that does not keep holes")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace OUT if it holds a model")
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin if there is nothing better")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    parser.add_argument("--verify", action="store_true", help="run what was built against its models")
    return parser.parse_args(argv[1:])


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    from jaxup.building.work import carry_out, check_place, prepare
    from jaxup.files.staging import check_space
    from jaxup.recipes.open import open_recipe, parse_places

    signal.signal(signal.SIGTERM, _stop)
    out = Path(args.out).expanduser()
    recipe = open_recipe(args.recipe, models=parse_places(args.model), revision=args.revision, dtype=args.dtype)
    for note in recipe.notes:
        warnings.warn(note, stacklevel=1)
    work = prepare(recipe, max_shard_size=args.max_shard_size, allow_pickle=args.allow_pickle)
    check_place(work, out, force=args.force)
    tell(recipe.plan.describe())
    for note in work.notes:
        tell(note)
    if args.dry_run:
        tell(f"\n{work.describe(out, args.sparse)}")
        check_space(out.absolute().parent, out, work.needed(args.sparse))
        return
    built = carry_out(work, out, sparse=args.sparse, force=args.force, verify=args.verify, progress=True)
    tell(f"\nwrote {out}: {built}")
    if args.verify:
        tell(built.report)


def _stop(signum: int, frame: Any) -> None:
    """The first SIGTERM ends the program in order; more of them do not keep it from cleaning up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped("stopped by SIGTERM; nothing was written", 143)


if __name__ == "__main__":
    entry_point(main)
