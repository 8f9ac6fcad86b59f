"""How long shipped configurations take on TPUs, and what it costs: the table of docs/machines.md, from that of pods.md.

    python benchmarks/machines.py

Nothing is compiled: `python benchmarks/targets.py --write` does that, and this is for after it.
"""

from __future__ import annotations

import math
from pathlib import Path

from jaxup.experiments.config import load

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- benchmarks/machines.py -->\n", "<!-- end -->\n"
HEALED = 0.3e9  # tokens of a healing: two epochs of 600 MB of chats, at 4 bytes a token


def table() -> str:
    text = (DOCS / "pods.md").read_text()
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.partition("<!-- benchmarks/targets.py -->")[2].partition(END)[0].splitlines()
        if line.startswith("|")
    ]
    lines = ["| configuration | machine | memory of a chip, GiB | hours at least | chip-hours |"]
    lines.append("|---|---|--:|--:|--:|")
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        if "does not fit" in cells["peak GiB"]:
            continue
        words = cells["configuration"].strip("`").split("` `")
        config = load(words[0], [(key, value) for key, _, value in (word.partition("=") for word in words[1:])])
        if config.experiment == "heal":
            seconds = HEALED / float(cells["tokens/s"].replace(",", ""))
        else:
            steps = config.steps or config.epochs * config.data.tokens // (config.batch_size * config.data.seq_len)
            seconds = steps * float(cells["s a step, at least"])
        chips = math.prod(map(int, cells["chips"].partition(":")[2].split("x")))
        memory = f"{float(cells['peak GiB']):.1f} of {float(cells['of']):.1f}"
        hours = f"{seconds / 3600:.1f} | {chips * seconds / 3600:,.0f}"
        lines.append(f"| {cells['configuration']} | {cells['chips']} | {memory} | {hours} |")
    return "\n".join(["", *lines, "", ""])


def main() -> None:
    page = DOCS / "machines.md"
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(before + BEGIN + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
