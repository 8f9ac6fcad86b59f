"""How often one of k samples is right: `python -m jaxup.passk MODEL --task countdown:3 -n 64 --out DIR`.

MODEL is as for `jaxup.generate`, the problems are those that the task tests with. Of n samples of each: pass@1, 2, 4,
... n without bias, what the majority says, and the best of so many by each guide; with intervals over problems.
With --out a second call goes on where the first one ended, and draws more where more are asked for.
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path

from jaxup.errors import Parser, UserError, entry_point, within
from jaxup.generate import drawing, open_model
from jaxup.progress import Progress, say, tell
from jaxup.solve import DEFAULTS, add_task_flags, check_task_flags, open_policy, open_problems, rated
from jaxup.text import escaped, write_atomically

_MARKED = ("task", "task_seed", "seed", "temperature", "top_k", "top_p", "max_tokens", "chat", "dtype", "revision")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("passk", __doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="directory, Hub id or URL of a model, RUN or RUN@NAME")
    add("-n", metavar="N", type=int, default=64, help="samples of each problem (64)")
    add("--guide", metavar="GUIDE", action="append", help="best of N by it (logp); may be given several times")
    add("--out", metavar="DIR", help="samples.jsonl, PASSK.md and passk.png")
    add_task_flags(parser, problems=100)
    args = parser.parse_args(argv[1:])
    check_task_flags(args)
    if args.n < 1:
        raise UserError(f"-n must be at least 1, not {args.n}")
    if args.task is None:
        raise UserError("whose problems? give --task", hint="--task countdown:3")
    if args.temperature == 0 and args.n > 1:
        raise UserError("greedily all samples are the same", hint="-n 1, or a temperature above 0")
    if args.out is not None and not Path(args.out).absolute().parent.is_dir():
        raise UserError(f"--out={args.out}: its parent is not a directory")
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    from jaxup.learning import curves, samples
    from jaxup.learning.guides import open_guide

    guides = []
    for spec in args.guide or ["logp"]:
        with within("--guide"):
            guide = open_guide(spec)
        if guide.samples or guide.among:
            why = "it draws samples of its own" if guide.samples else "the majority is it"
            raise UserError(f"--guide={spec}: {why}", hint="jaxup solve --guide" if guide.samples else "leave it out")
        guides.append(guide)
    task = open_problems(args)
    how = drawing(args, None, DEFAULTS, own=())
    settings = {"model": args.model} | {name: {**vars(args), **how}[name] for name in _MARKED}
    out = None if args.out is None else Path(args.out)
    there = {} if out is None else samples.kept(out, settings)

    opened = open_model(args)
    for guide in guides:
        with within("--guide"):
            guide.check(opened.tokenizer)
    policy = open_policy(opened, how, task.test, args)
    searches = samples.searches(task, task.test, policy, args.n, how["max_tokens"], how["seed"], there)
    if missing := sum(args.n - len(search.finished) for search in searches):
        if there:
            say(f"{args.out}: {args.n * len(searches) - missing} samples are there, {missing} are missing")
        if out is not None:
            samples.begin(out, settings)
        began = time.monotonic()
        with Progress("passk", total=len(searches), unit="problems") as progress:
            for done in samples.complete(searches, policy, args.n, out):
                progress.update(done, f"{policy.tokens_drawn:,} tokens")
        rated(policy, began)
    found = curves.curves(task, searches, guides, policy)
    if found.unread:
        say(f"of {found.unread} samples it cannot be said whether they are right: they count as wrong")
    title = f"{args.model} on {args.task}"
    about = (f"{len(searches)} problems, {args.n} samples of each at temperature {how['temperature']:g}, up to "
             f"{how['max_tokens']} tokens. In percent of problems, with 95% intervals over problems.")  # fmt: skip
    tell(f"{about}\n\n{curves.table(found)}")
    if out is not None:
        image = io.BytesIO()
        curves.drawn(found, title).savefig(image, dpi=140, format="png")
        write_atomically(out / "passk.png", image.getvalue())
        page = f"# {escaped(title)}\n\n{about}\n\n{curves.table(found)}\n\n![the curves](passk.png)\n"
        write_atomically(out / "PASSK.md", page)
        say(f"written: {out / 'PASSK.md'}")


if __name__ == "__main__":
    entry_point(main)
