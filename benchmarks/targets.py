"""What the shipped configurations take on TPU slices: the table of docs/pods.md, compiled here without a TPU.

    python benchmarks/targets.py                     # all of it, in a few minutes of CPU
    python benchmarks/targets.py tunguska v6e        # rows in which all of these words are
    python benchmarks/targets.py --write             # also into docs/pods.md, with date and versions

It needs libtpu (`pip install 'jaxup[tpu]'`). A row is the step of training that takes most memory. What the table
says is what the compiler planned, and a bound; nothing of it was run on a TPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import sys
from pathlib import Path

from jaxup.errors import UserError
from jaxup.experiments.config import load
from jaxup.experiments.target import Compiled, plan, stand_in
from jaxup.targets import chips

PAGE = Path(__file__).parent.parent / "docs" / "pods.md"
BEGIN, END = "<!-- benchmarks/targets.py -->\n", "<!-- end -->\n"
SOLAR = ("base.path=mistralai/Mistral-7B-v0.1", "plan=solar(base, 8)")
# What runs, with what is changed of it, and where.
ROWS = [
    ("heal_tunguska.py", (), "v5p:4x4x4"),
    ("heal_tunguska.py:freeze_originals", (), "v5p:4x4x4"),
    ("heal_tunguska.py:lora", (), "v5p:4x4x4"),
    ("heal_tunguska.py", (), "v6e:8x8"),
    ("heal_tunguska.py", (), "v4:4x4x4"),
    ("heal.py", SOLAR, "v6e:4x4"),
    ("heal.py", SOLAR, "v5p:2x2x4"),
    ("inherit_gpt2.py:medium", (), "v5e:4x4"),
    ("inherit_gpt2.py:medium", (), "v6e:2x4"),
    ("inherit_gpt2.py:large", (), "v5e:4x4"),
    ("inherit_gpt2.py:large", (), "v6e:2x4"),
    ("inherit_gpt2.py:xl", (), "v5e:4x4"),
    ("inherit_gpt2.py:xl", (), "v6e:2x4"),
    ("inherit_llama.py", (), "v5e:4x4"),
    ("inherit_llama.py", (), "v6e:2x4"),
]
COLUMNS = (
    "configuration", "chips", "state GiB", "peak GiB", "of", "TFLOP", "HBM TB", "received GB", "s a step, at least",
    "limit", "tokens/s", "MFU",
)  # fmt: skip


def compiled(name: str, changes: tuple[str, ...], target: str) -> Compiled:
    config = load(name, [(key, value) for key, _, value in (change.partition("=") for change in changes)])
    stand_in(config)
    return plan(config, chips.parse(target), "train_step")


def cells(one: Compiled) -> tuple[str, ...]:
    bound, memory, facts = one.bound, one.plan.memory, one.plan.facts
    received = ", ".join(
        f"{kind}{'*' * hidden} {size / 1e9:.3g}"
        for (kind, _, hidden), size in sorted(bound.received.items(), key=lambda item: -item[1])
        if size > 1e-3 * sum(bound.received.values())
    )
    tokens = facts["rows"] * facts["seq_len"] / bound.seconds
    return (
        f"{memory.arguments / 2**30:.2f}", f"{one.peak / 2**30:.2f}" + ("" if one.fits else " **does not fit**"),
        f"{one.topology.chip.room / 2**30:.2f}", f"{bound.flops / 1e12:,.0f}", f"{bound.bytes / 1e12:.2f}", received,
        f"{bound.seconds:.3g}", bound.limit, f"{tokens:,.0f}", "" if facts["partial"] else f"{one.mfu:.0%}",
    )  # fmt: skip


def row(name: str, changes: tuple[str, ...], target: str) -> str:
    what = " ".join([f"`{name}`", *(f"`{change}`" for change in changes)])
    try:
        found = cells(compiled(name, changes, target))
    except UserError as error:
        found = (str(error),)
    return f"| {' | '.join([what, target, *found, *[''] * (len(COLUMNS) - 2 - len(found))])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="of the rows to compile")
    parser.add_argument("--write", action="store_true", help="put the table into docs/pods.md")
    args = parser.parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    lines = [
        f"{datetime.date.today():%d %B %Y}, {versions}. * while computing.\n",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * 2}{'--:|' * 5}---|--:|---|--:|--:|",
    ]
    print(*lines, sep="\n", flush=True)
    for each in ROWS:
        if all(word in f"{each[0]} {' '.join(each[1])} {each[2]}" for word in args.words):
            lines.append(row(*each))
            print(lines[-1], flush=True)
    if args.write:
        text = PAGE.read_text()
        if BEGIN not in text or END not in text:
            sys.exit(f"{PAGE} has no place for the table")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        PAGE.write_text("\n".join([f"{before}{BEGIN}", *lines, f"\n{END}{after}"]))
        print("the hours that follow from it: `python tests/test_scripts.py` writes them into tpu_scripts/README.md")


if __name__ == "__main__":
    main()
