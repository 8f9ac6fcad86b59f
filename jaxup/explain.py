"""Infer what a finished model was made of: `python -m jaxup.explain MODEL --against A [B ...] --out plan.yaml`.

Which layer of which model each of its layers came from, what was scaled or zeroed, and what was trained
since and how far. A few rows of each tensor are read, by byte range where a model is at a URL. The plan
is a recipe for `python -m jaxup.build`, whose models are named as they are given here.
"""

from __future__ import annotations

import argparse

from jaxup.errors import Parser, entry_point
from jaxup.progress import tell


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("explain", __doc__)
    parser.add_argument("model", metavar="MODEL", help="directory, RUN, Hub id or URL")
    parser.add_argument("--against", metavar="MODEL", nargs="+", required=True, help="what it may be made of")
    parser.add_argument("--out", metavar="FILE", help="write the plan")
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin if there is nothing better")
    return parser.parse_args(argv[1:])


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    from jaxup.lens.explain import explain
    from jaxup.recipes.written import check_files, write

    if args.out is not None:
        check_files({"plan": args.out}, force=args.force)
    found = explain(args.model, against=args.against, allow_pickle=args.allow_pickle, progress=True)
    tell(found.describe())
    if args.out is not None:
        write(args.out, found.to_yaml().encode())
        tell(f"wrote {args.out}")


if __name__ == "__main__":
    entry_point(main)
