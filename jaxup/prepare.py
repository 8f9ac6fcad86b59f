"""Make a store of data, and show what is trained on: `python -m jaxup.prepare chats.jsonl --tokenizer DIR_OR_ID`.

FILES are chats, or with --packing concatenated a corpus: files, directories and datasets with weights, as in
"a.jsonl*2,org/name:train_sft". The store is made once. Training with the same settings finds it in `data` beside its
run directory, which is where it is made unless --out says otherwise, or where data.store says.
"""

from __future__ import annotations

import argparse
import itertools
import sys

from jaxup.errors import Parser, UserError, entry_point
from jaxup.progress import printable

ROOT = "runs/data"  # where training in runs/ looks for it


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("prepare", __doc__)
    add = parser.add_argument
    add("files", metavar="FILES", help="what to read; docstrings and python are data that every machine has")
    add("--tokenizer", metavar="DIR_OR_ID", required=True, help="a Hugging Face tokenizer; of a corpus also bpe:N")
    add("--format", metavar="F", default="", help="a chat format by name (the tokenizer's own template)")
    add("--history", choices=["last", "each"], default="", help="where a template rewrites earlier turns: train on the "
        "last answer, or make the last of each prefix an example of its own")  # fmt: skip
    add("--strict", action="store_true", help="refuse what is warned of, of a format")
    add("--layout", metavar="L", default="", help="what rows look like (detected, for each file)")
    add("--seq-len", metavar="N", type=int, default=4096, help="tokens of a row (4096)")
    add("--val-files", metavar="V", default="", help="read for validation alone (a part of FILES)")
    add("--val-fraction", metavar="P", type=float, default=0.01, help="that part, without --val-files (0.01)")
    add("--on-bad", choices=["error", "skip"], default="error", help="what to do with bad rows (error)")
    add("--packing", choices=["best_fit", "one", "concatenated"], default="best_fit",
        help="several chats a row, one a row, or a stream of text cut into rows (best_fit)")  # fmt: skip
    add("--phases", choices=["files", "difficulty"], default="", help="rows to be seen in phases: each entry of FILES"
        " is one, or first the half of the chats of which less is trained on (all mixed)")  # fmt: skip
    add("--seed", metavar="N", type=int, default=2357, help="of what is drawn at random (2357)")
    add("--out", metavar="STORE", default="", help="directory of the store, local or gs:// (in runs/data)")
    add("--show", metavar="N|all", default="3", help="how many training examples to show, all of a row (3)")
    args = parser.parse_args(argv[1:])
    if args.show != "all" and not args.show.isdecimal():
        raise UserError(f"--show={args.show}: a number, or all")
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)

    from jaxup.data.config import DataConfig
    from jaxup.data.open import marked, open_data
    from jaxup.data.rows import CONCATENATED
    from jaxup.data.tokenizer import bpe_vocab_size, load_tokenizer

    values, count = vars(args), None if args.show == "all" else int(args.show)
    values["store"] = values.pop("out")
    del values["show"]
    tokenizer = None
    if args.packing != CONCATENATED:
        if bpe_vocab_size(args.tokenizer):
            what = "chats need one that is there; bpe:N is trained on a corpus, which goes with --packing concatenated"
            raise UserError(what, at=f"--tokenizer={args.tokenizer}")
        tokenizer = load_tokenizer(values.pop("tokenizer"))
    data = open_data(DataConfig(**values), root=ROOT, tokenizer=tokenizer)
    if data.format is None:
        print(printable(f"{data}"))
        return
    color = sys.stdout.isatty()
    stops = data.tokenizer.convert_ids_to_tokens(list(data.format.stops))
    print(f"{data.report()}\n{printable(f'  a reply ends with: {chr(32).join(stops)}')}")
    if count != 0:
        print(f"  examples; {marked(color)}")
    for text in itertools.islice(data.examples(color), count):
        print(f"\n{text}")


if __name__ == "__main__":
    entry_point(main)
