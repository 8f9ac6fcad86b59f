"""Compare what was written with its digests: `python -m jaxup.verify PLACE`.

PLACE is a run directory (its checkpoints, its export, its token store), a model directory that `build`, `export` or
`jaxup.save` has written, a token store, or a directory with any of these below it. All bytes are read and nothing is
changed. Each damaged file is a line, and any makes the exit code 2; what has no digests is said. What a built model
computes is another question, which `jaxup build --verify` answers.
"""

from __future__ import annotations

import argparse

from jaxup.errors import Parser, UserError, entry_point
from jaxup.progress import tell


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("verify", __doc__)
    parser.add_argument("places", metavar="PLACE", nargs="+", help="run, model or token store")
    return parser.parse_args(argv[1:])


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    from jaxup.experiments.verified import verified

    damaged = 0
    for place in args.places:
        for line, is_fault in verified(place):
            damaged += is_fault
            tell(line)
    if damaged:
        raise UserError(f"{damaged} of the files above {'is' if damaged == 1 else 'are'} not what was written")


if __name__ == "__main__":
    entry_point(main)
