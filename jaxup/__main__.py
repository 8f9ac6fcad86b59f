"""`jaxup NAME ...` is `python -m jaxup.NAME ...`."""

from __future__ import annotations

import importlib

from jaxup.errors import UserError, entry_point, suggest

COMMANDS = {
    "plan": "see what a recipe makes: the order of the layers, sizes, what is unusual about it; draw it",
    "build": "carry a recipe out: a model directory made of the layers of others",
    "train": "train models as an experiment file describes, for example inherit and grow a GPT-2",
    "generate": "write text with a Hugging Face model directory or a finished run",
    "export": "write a model of a run, or a model in another dtype, as a Hugging Face model directory",
}


def main(argv: list[str]) -> int | None:
    if len(argv) < 2 or argv[1] in ("-h", "--help"):
        print("usage: jaxup COMMAND ...\n")
        for name, text in COMMANDS.items():
            print(f"  {name:<10}{text}")
        print("\n`jaxup COMMAND --help` says more; `python -m jaxup.COMMAND` is the same.")
        return 0
    name = argv[1]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{suggest(name, COMMANDS)}")
    return importlib.import_module(f"jaxup.{name}").main(argv[1:])


def cli() -> None:
    entry_point(main)


if __name__ == "__main__":
    cli()
