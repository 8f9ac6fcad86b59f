"""`jaxup NAME ...` is `python -m jaxup.NAME ...`."""

from __future__ import annotations

import importlib

from jaxup import __version__
from jaxup.errors import UserError, entry_point, suggest

COMMANDS = ("plan", "build", "prepare", "features", "train", "resume", "generate", "chat", "export", "diff", "explain",
            "probe", "verify", "solve", "passk", "audit")  # fmt: skip


def main(argv: list[str]) -> int | None:
    name = argv[1] if len(argv) > 1 else "--help"
    if name == "--version":
        print(f"jaxup {__version__}")
    elif name in ("-h", "--help"):
        print("usage: jaxup COMMAND ...\n       jaxup --version\n")
        for command in COMMANDS:
            what, _, _ = str(importlib.import_module(f"jaxup.{command}").__doc__).partition(":")
            print(f"  {command:<10}{what}")
        print("\n`jaxup COMMAND --help` says more; `python -m jaxup.COMMAND` is the same.")
    elif name in COMMANDS:
        return importlib.import_module(f"jaxup.{name}").main(argv[1:])
    else:
        raise UserError(f"unknown command {name!r}{suggest(name, COMMANDS)}")
    return None


def cli() -> None:
    entry_point(main)


if __name__ == "__main__":
    cli()
