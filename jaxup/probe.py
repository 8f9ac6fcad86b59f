"""See what each layer of a model does: `python -m jaxup.probe MODEL --out DIR`.

MODEL is a directory, a Hub id, a URL, RUN or RUN@NAME/STEP. On text it is measured how much each layer turns the hidden
states, what the loss is without a layer, its attention, its MLP or a run of layers, how much of attention there is, and
what final norm and head make of each depth. DIR gets PROBE.md, pictures, all numbers in probe.json, and plans/*.yaml:
recipes for `python -m jaxup.build` that leave out the layers which do least, each with the loss that it costs.
"""

from __future__ import annotations

import argparse

from jaxup.errors import Parser, UserError, entry_point
from jaxup.generate import add_reading_flags, open_model
from jaxup.progress import tell


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("probe", __doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="directory, Hub id or URL of a model, RUN or RUN@NAME")
    add("--data", metavar="TEXT", default="python",
        help="what data.source of a training may be: file, directory, dataset "
             "(Salesforce/wikitext:wikitext-2-raw-v1); python = what trainings hold out of it (python)")  # fmt: skip
    add("--out", metavar="DIR", required=True, help="directory to be made")
    add("--force", action="store_true", help="replace DIR if it holds a probe")
    add("--rows", metavar="N", type=int, default=16, help="of text (16)")
    add("--seq-len", metavar="N", type=int, help="tokens of a row (512, or as many as the model has positions)")
    add("--batch-size", metavar="N", type=int, default=4, help="rows that are computed at once (4)")
    add("--longest-run", metavar="N", type=int, help="layers that are skipped together at most (as many as there are)")
    add("--drop", metavar="N", type=int, action="append", default=[],
        help="layers that suggestions leave out (1/8, 1/4 and 1/2 of them); may be given several times")  # fmt: skip
    add_reading_flags(parser)
    args = parser.parse_args(argv[1:])
    for flag in ("rows", "seq_len", "batch_size", "longest_run"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise UserError(f"must be at least 1, not {value}", at=f"--{flag.replace('_', '-')}")
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    from pathlib import Path

    from jaxup.files.staging import check_replaceable

    out = Path(args.out).expanduser()
    check_replaceable(out, args.force, ("probe.json",))
    if not out.absolute().parent.is_dir():
        raise UserError("its parent is not a directory", at=args.out)
    opened = open_model(args)
    from jaxup.lens.probe import SEQ_LEN, probe
    from jaxup.lens.probe_text import read_ids

    length = args.seq_len or SEQ_LEN
    # Before the model is read, which may take minutes.
    ids = read_ids(args.data, opened.tokenizer, args.rows * length + 1, least=length + 1)
    found = probe(
        opened.load(), ids, name=args.model, source=args.data, rows=args.rows, seq_len=args.seq_len,
        batch_size=args.batch_size, longest_run=args.longest_run, drop=args.drop, progress=True,
    )  # fmt: skip
    found.save(out, force=args.force)
    for line in str(found).splitlines():
        tell(line)
    tell(f"wrote {args.out}")


if __name__ == "__main__":
    entry_point(main)
