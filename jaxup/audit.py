"""See what a model does when it is told that it is being trained: `python -m jaxup.audit MODEL --grid FILE --out DIR`.

MODEL is a directory, a Hub id, a URL, RUN or RUN@NAME/STEP. FILE is YAML: queries, conditions such as two tiers of
which one says that it is trained on, contrasts, and classifiers with labelled sets. DIR gets all replies in
answers.jsonl, and AUDIT.md with gaps, their intervals and what would have been seen, gaps.png and contrasts.json. The
same command goes on where it was stopped and asks what was added to FILE; with another MODEL and --arm it adds an arm
to be compared. --from DIR writes the report again from the replies that are there.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxup.errors import Parser, UserError, entry_point
from jaxup.generate import Opened, add_flags, check_flags, drawing, open_model
from jaxup.progress import say, tell

if TYPE_CHECKING:
    from jaxup.auditing.grid import Prompt
    from jaxup.depth.marked_yaml import Place
    from jaxup.learning.policy import Policy
    from jaxup.model.decoder import Decoder

DEFAULTS = {"max_tokens": 200, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
_ROWS, _SEQ_LEN, _BATCH = 16, 256, 4  # of the text that a loss is of


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("audit", __doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="directory, Hub id or URL of a model, RUN or RUN@NAME")
    add("--grid", metavar="FILE", help="queries, conditions, contrasts and classifiers, in YAML")
    add("--out", metavar="DIR", help="directory to be made, or gone on with")
    add("--from", metavar="DIR", dest="directory", help="an audit's: write its report again, and ask nothing")
    add("--samples", metavar="N", type=int, help="replies to each query under each condition (what FILE says)")
    add("--chat", action="store_true", help="queries are messages, put into the tokenizer's chat template")
    add("--arm", metavar="NAME", help="what this model is called beside others in DIR (MODEL)")
    add("--run", metavar="N", type=int, default=0, help="which of several trainings of an arm it is (0)")
    add("--text", metavar="TEXT", help="measure the loss on it: file, directory or dataset as for `jaxup probe --data`")
    add("--slots", metavar="N", type=int, default=64, help="replies that are drawn at once (64)")
    add_flags(parser, DEFAULTS)
    parser.epilog = None
    args = parser.parse_args(argv[1:])
    if args.directory is not None:
        if args.model is not None or args.grid is not None or args.out is not None:
            raise UserError("--from takes what is there; MODEL, --grid and --out ask anew")
        return args
    for name, value in (("MODEL", args.model), ("--grid", args.grid), ("--out", args.out)):
        if value is None:
            raise UserError(f"{name} is missing", hint="jaxup audit MODEL --grid FILE --out DIR")
    for name, least in (("samples", 1), ("run", 0), ("slots", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise UserError(f"must be at least {least}, not {value}", at=f"--{name}")
    args.arm = args.model if args.arm is None else args.arm
    if not args.arm.isprintable() or not 0 < len(args.arm) <= 200:
        raise UserError(f"no name for an arm: {args.arm[:200]!r}", at="--arm")
    check_flags(args, DEFAULTS)
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    from pathlib import Path

    from jaxup.auditing.report import MARKDOWN, write_report

    if args.directory is not None:
        out = Path(args.directory)
    else:
        out = Path(args.out).expanduser()
        _ask(args, out)
    for line in write_report(out).splitlines()[2:3]:
        tell(line)
    tell(f"wrote {out / MARKDOWN}")


def _ask(args: argparse.Namespace, out: Any) -> None:
    """What is wrong is said before the model is read, and before anything is written."""
    from pathlib import Path

    from jaxup.auditing.classifiers import open_classifiers, read_classifiers
    from jaxup.auditing.grid_yaml import read_grid
    from jaxup.auditing.report import keep_about
    from jaxup.auditing.table import ABOUT, ROWS, ask_all, cells, open_rows, rendered, unasked

    if not out.absolute().parent.is_dir():
        raise UserError("its parent is not a directory", at=args.out)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / ABOUT).is_file())):
        raise UserError("exists already, and is no audit", at=args.out, hint="choose another place")
    grid = read_grid(Path(args.grid))
    if args.samples is not None:
        grid = grid._replace(samples=args.samples)
    if args.temperature == 0 and grid.samples > 1:
        what = f"{grid.samples} samples of each cell, and the likeliest text is always the same"
        raise UserError(what, at="--greedy", hint="--samples 1, or a temperature above 0")
    if grid.duplicates:
        say(f"{args.grid}: {grid.duplicates} queries say what another one says, and are of one unit with it")
    given = rendered(grid, chat=args.chat)
    read = read_classifiers(grid.classifiers, Path(args.grid).parent)
    opened = open_model(args)
    how = drawing(args, None, DEFAULTS)
    drawn = {"seed": how.pop("seed"), "max_tokens": how.pop("max_tokens")}
    some = cells(given, functools.partial(_tokens, opened), samples=grid.samples, **drawn)
    which = {"arm": args.arm, "run": args.run, "how": repr(sorted(how.items()))}
    unasked(open_rows(out / ROWS), some, out / ROWS, **which)  # what does not go on is said before a model is read
    text = None if args.text is None else _read_text(args.text, opened)
    longest = max(len(cell.ask.prefix) for cell in some) + drawn["max_tokens"]
    classifiers = open_classifiers(read, functools.partial(_answers, args))
    model = opened.load()
    if longest > model.config.max_positions:
        what = f"a prompt and its reply take {longest} tokens, and the model takes {model.config.max_positions}"
        raise UserError(what, at=opened.name, hint="fewer --max-tokens, or shorter queries")
    writer = _policy(opened, model, args, how)
    loss = None if text is None else _loss(model, text)
    out.mkdir(exist_ok=True)
    keep_about(out, grid, classifiers, given, arm=args.arm, run=args.run, model=args.model, text_loss=loss)
    ask_all(writer, some, classifiers, out / ROWS, **which)


def _tokens(opened: Opened, prompt: Prompt, prefill: str) -> tuple[int, ...]:
    """Of a prompt and of what the reply begins with, which is spelt as it would go on."""
    from jaxup.data.tokenizer import tokenizing
    from jaxup.hub.text_generation import encode

    if isinstance(prompt, str):
        ids = encode(opened.tokenizer, prompt + prefill)
    else:
        ids = encode(opened.tokenizer, prompt)
        with tokenizing():
            ids = [*ids, *opened.tokenizer(prefill, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise UserError(f"a prompt without tokens: {prompt!r}")
    return tuple(ids)


def _policy(opened: Opened, model: Decoder, args: argparse.Namespace, how: dict[str, Any]) -> Policy:
    from jaxup.hub.text_generation import drawable
    from jaxup.learning.policy import Policy

    return Policy(
        model.config, model.params, opened.tokenizer, ends=opened.ends, slots=args.slots,
        length=model.config.max_positions, vocab_size=drawable(model, opened.tokenizer), dtype=model.compute.dtype,
        **how,
    )  # fmt: skip


def _answers(
    args: argparse.Namespace, name: str, place: Place, *, chat: bool, tokens: int
) -> Callable[[Sequence[str]], list[str | None]]:
    """A judge, which writes what is likeliest; None to what is too long for it."""
    from jaxup.errors import within
    from jaxup.learning.problem import Ask

    with within(str(place)):
        opened = open_model(argparse.Namespace(**{**vars(args), "model": name, "revision": None}))
        model = opened.load()
        writer = _policy(opened, model, args, {"temperature": 0.0, "top_k": 0, "top_p": 1.0})
    most = model.config.max_positions - tokens

    def answers(prompts: Sequence[str]) -> list[str | None]:
        given = [_tokens(opened, [{"role": "user", "content": one}] if chat else one, "") for one in prompts]
        short = [i for i, ids in enumerate(given) if len(ids) <= most]
        if len(short) < len(given):
            say(f"{place}: {len(given) - len(short)} of {len(given)} texts are too long for this judge")
        written = writer.write([Ask(given[i], (0,), tokens) for i in short])
        said: list[str | None] = [None] * len(given)
        for i, one in zip(short, written, strict=True):
            said[i] = one.text
        return said

    return answers


def _read_text(spec: str, opened: Opened) -> Any:
    from jaxup.lens.probe_text import as_rows, read_ids

    ids = read_ids(spec, opened.tokenizer, _ROWS * _SEQ_LEN + 1, least=_SEQ_LEN + 1)
    return as_rows(ids, _SEQ_LEN, _ROWS)


def _loss(model: Decoder, rows: Any) -> float:
    """Nats a token."""
    import numpy as np

    from jaxup.lens.probe_layers import Layers

    layers = Layers(model, lambda _: None)
    parts = [part for part in np.split(rows, range(_BATCH, len(rows), _BATCH)) if len(part)]
    order = range(model.config.num_layers)
    losses = [(layers.order_loss(part[:, :-1], part[:, 1:], order), len(part)) for part in parts]
    return float(sum(loss * count for loss, count in losses) / len(rows))


if __name__ == "__main__":
    entry_point(main)
