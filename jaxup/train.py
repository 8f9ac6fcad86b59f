"""Train models as an experiment file describes: `python -m jaxup.train --config=inherit_gpt2.py`.

The same command again resumes the run in its directory, or does nothing if it is finished. Exit
codes: 0 done, 2 a mistake in the command, configuration or data, 3 a non-finite gradient,
130 or 143 stopped by Ctrl-C or SIGTERM, with the state saved.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxup.errors import Parser, UserError, entry_point, suggest
from jaxup.experiments.config import load
from jaxup.experiments.run import run_experiment


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    parser = Parser("train", __doc__)
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]",
                        help="experiment file, looked for here and in configs/; variants after a colon")  # fmt: skip
    parser.add_argument("--config.KEY", dest="_", metavar="VALUE",
                        help="override one value, for example --config.optimizer.learning_rate=3e-4")  # fmt: skip
    parser.add_argument("--workdir", metavar="DIR", help="run directory (default: runs/FILE-VARIANT)")
    args, rest = parser.parse_known_args(argv[1:])
    overrides, rest = [], list(rest)
    while rest:
        flag, given, text = rest.pop(0).partition("=")
        if not flag.startswith("--config."):
            raise UserError(f"unknown argument {flag!r}{suggest(flag, ['--config', '--workdir', '--help'])}")
        if not given:
            if not rest:
                raise UserError(f"{flag}: needs a value")
            text = rest.pop(0)
        overrides.append((flag.removeprefix("--config."), text))
    return args, overrides


def main(argv: list[str]) -> None:
    args, overrides = parse_args(argv)
    config = load(args.config, overrides)
    name, _, variant = args.config.partition(":")
    title = "-".join(filter(None, [Path(name).stem, variant.replace(",", "-").replace("/", "-")]))
    run_experiment(config, Path(args.workdir or Path("runs") / title).expanduser(), title)


if __name__ == "__main__":
    entry_point(main)
