"""See what was done to every layer: `python -m jaxup.diff A B [C ...] --out DIR`.

A, B, ... are models: directories, Hub ids, URLs, runs, and models of runs (RUN@before, RUN@healed/133), the base
first. Models of one depth are compared layer by layer; of different depths each layer with the one that it was made
from, as --plan says, the plan in a model's directory or run, or else their weights. Of three or more, those that
follow each other are compared, and each with the first. A table of medians over the layers is printed; --out makes a
page to look at, and keeps every number. Models of any size are read in small pieces.

`--claims RUN [RUN ...]`, of runs that healed an up-scaled model with different seeds, says by intervals which claims
on what healing does to copies and originals hold; a directory with differences.json, of the model before healing and
those after each epoch, is as good as a run.
"""

from __future__ import annotations

import argparse

from jaxup.errors import Parser, UserError, entry_point
from jaxup.progress import tell


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("diff", __doc__)
    parser.add_argument("models", metavar="MODEL", nargs="+", help="two or more, the base first; with --claims, runs")
    parser.add_argument("--out", metavar="DIR", help="directory to be made: a page, pictures, all numbers")
    parser.add_argument("--plan", metavar="RECIPE", help="file or one line: what made one of the models of another")
    parser.add_argument("--rank", action="store_true", help="the effective rank of each change too; takes far longer")
    parser.add_argument("--common", action="store_true", help="compare what both have, of models that do not fit")
    parser.add_argument("--as-built", action="store_true", help="compare a copy with its origin as the plan scales it: "
                        "a zeroed one with zeros")  # fmt: skip
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin if there is nothing better")
    parser.add_argument("--claims", action="store_true", help="what is said of healing, tested on runs of healing; "
                        "--out makes CLAIMS.md and claims.json")  # fmt: skip
    args = parser.parse_args(argv[1:])
    if args.claims and (args.plan or args.rank or args.common or args.as_built or args.allow_pickle):
        parser.error("--claims goes with --out only")
    if len(args.models) < 2 and not args.claims:
        parser.error("two models are needed")
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    from pathlib import Path

    from jaxup.files.staging import check_replaceable
    from jaxup.lens.differences import FILE, diff

    if args.out is not None:
        check_replaceable(Path(args.out), False, (FILE,))
        if not Path(args.out).absolute().parent.is_dir():
            raise UserError("its parent is not a directory", at=args.out)
    if args.claims:
        _claims(args)
        return
    found = diff(
        *args.models, plan=args.plan, rank=args.rank, common=args.common, as_built=args.as_built,
        allow_pickle=args.allow_pickle, progress=True,
    )  # fmt: skip
    for line in str(found).splitlines():
        tell(line)
    if args.out is not None:
        found.save(args.out)
        tell(f"\nwrote {args.out}/index.html, pictures, and all numbers in {FILE}")


def _claims(args: argparse.Namespace) -> None:
    from jaxup.lens.claims import JSON, MARKDOWN, claims, open_runs

    said = claims(*open_runs(args.models, progress=True))
    for line in str(said).splitlines():
        tell(line)
    if args.out is not None:
        said.save(args.out)
        tell(f"\nwrote {args.out}/{MARKDOWN} and {JSON}")


if __name__ == "__main__":
    entry_point(main)
