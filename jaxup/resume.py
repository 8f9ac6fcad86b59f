"""Go on with a run as it was configured: `python -m jaxup.resume RUN`.

The same as `python -m jaxup.train --resume=RUN`, and takes what goes with it: --config.KEY=VALUE for what may change
under a run, --skip-step and --rate-from. A finished run is left as it is.
"""

from __future__ import annotations

from jaxup import train
from jaxup.errors import Parser, entry_point


def as_train(argv: list[str]) -> list[str]:
    """The arguments of `jaxup.train` that say the same."""
    parser = Parser("resume", __doc__)
    parser.add_argument("run", metavar="RUN", help="its directory, gs:// too")
    args, rest = parser.parse_known_args(argv[1:])
    return ["train", f"--resume={args.run}", *rest]


def main(argv: list[str]) -> None:
    train.main(as_train(argv))


if __name__ == "__main__":
    entry_point(main)
