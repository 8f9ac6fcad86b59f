"""Search for answers: `python -m jaxup.solve MODEL --task countdown:3:steps --search beam --budget 2048`.

MODEL is as for `jaxup.generate`. The problems are those that the task tests with; or one of your own, with --prompt.
Each has a budget of generated tokens, whatever they are for. SEARCH is best_of, vote, majority, greedy, beam, dvts,
mcts or revise, and GUIDE verifier, noisy:TPR:FPR, logp, consistency, rollouts:K, steps or length:WEIGHT.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxup.errors import Parser, UserError, entry_point, within
from jaxup.generate import Opened, add_flags, check_flags, drawing, open_model
from jaxup.progress import Progress, printable, say, tell
from jaxup.text import escaped, write_atomically

if TYPE_CHECKING:
    from jaxup.learning.policy import Policy
    from jaxup.learning.problem import Problem, Task
    from jaxup.learning.search import Found

DEFAULTS = {"max_tokens": 64, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("solve", __doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="directory, Hub id or URL of a model, RUN or RUN@NAME")
    add("--prompt", metavar="TEXT", help="a problem of one's own, in place of a task; its steps are lines")
    add("--answer", metavar="TEXT", help="with --prompt: what is right")
    add("--search", metavar="SEARCH", default="best_of", help="beam:8:4 is beam with its numbers (best_of)")
    add("--guide", metavar="GUIDE", default="logp", help="what values answers and their beginnings (logp)")
    add("--budget", metavar="N", type=int, default=2048, help="tokens for each problem, at least --max-tokens (2048)")
    add("--template", metavar="TEXT", help="of revise the later prompts; has {prompt}, {answer}, {verdict}, {score}")
    add("--out", metavar="FILE", help="what was found, a line of JSON for each problem")
    add("--show-tree", metavar="N", type=int, nargs="?", const=1, help="print the tree of the N-th problem (1)")
    add_task_flags(parser, problems=20)
    args = parser.parse_args(argv[1:])
    check_task_flags(args)
    if (args.task is None) == (args.prompt is None):
        raise UserError("what is to be solved? give --task or --prompt", hint="--task countdown:3:steps")
    if args.answer is not None and args.prompt is None:
        raise UserError("--answer goes with --prompt")
    if args.show_tree is not None and not 1 <= args.show_tree <= (args.problems if args.task else 1):
        raise UserError(f"--show-tree: there is no problem {args.show_tree}")
    if args.out is not None:
        out = Path(args.out)
        if out.exists() or not out.parent.is_dir():
            raise UserError(f"--out={args.out}: {'it exists' if out.exists() else 'its parent is not a directory'}")
    return args


def add_task_flags(parser: Parser, *, problems: int) -> None:
    """Which problems, how answers are drawn, and how the model is read."""
    add = parser.add_argument
    add("--task", metavar="TASK", help="countdown:N[:steps], addition:DIGITS[:steps], brackets:LENGTH,"
        " FILE.jsonl[:MATCH] or package.module:function")  # fmt: skip
    add("--problems", metavar="N", type=int, default=problems, help=f"of the task's test so many ({problems})")
    add("--task-seed", metavar="N", type=int, default=0, help="which problems these are: that of the training (0)")
    add("--chat", action="store_true", help="the prompt is a message, put into the tokenizer's chat template")
    add("--slots", metavar="N", type=int, default=64, help="texts that are computed at once (64)")
    add_flags(parser, DEFAULTS)
    parser.epilog = "Answers are drawn as the flags say, not as a run draws its own samples."


def check_task_flags(args: argparse.Namespace) -> None:
    check_flags(args, DEFAULTS)
    for name in ("problems", "slots"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")


def open_problems(args: argparse.Namespace) -> Task:
    """The task that --task names, with the problems that are asked for."""
    from jaxup.learning.tasks import open_task

    with within("--task"):
        return open_task(args.task, train=0, test=args.problems, seed=args.task_seed)


def open_policy(opened: Opened, how: Mapping[str, Any], problems: Sequence[Problem], args: argparse.Namespace,
                more: int = 0) -> Policy:  # fmt: skip
    """The model as a writer of answers. UserError for a prompt that leaves no room for one; one that leaves less than
    `max_tokens` is said.

    Args:
      more: tokens that prompts may have beyond those of `problems`.
    """
    from jaxup.hub.text_generation import drawable
    from jaxup.learning.policy import Policy

    model, tokenizer = opened.load(), opened.tokenizer
    drawn = {name: how[name] for name in ("temperature", "top_k", "top_p")}

    def policy(length: int) -> Policy:
        return Policy(
            model.config, model.params, tokenizer, ends=opened.ends, vocab_size=drawable(model, tokenizer),
            slots=args.slots, length=length, chat=args.chat, dtype=model.compute.dtype, **drawn,
        )  # fmt: skip

    most = model.config.max_positions
    with within(args.model):
        prefixes = [policy(most).prefix(problem) for problem in problems]
    longest = max(map(len, prefixes))
    if strange := sum(tokenizer.unk_token_id in prefix for prefix in prefixes):
        say(f"{args.model}: {strange} of {len(prefixes)} prompts have characters that its tokenizer does not know")
    if longest + how["max_tokens"] > most:
        say(f"{args.model}: {most} positions, and prompts of up to {longest} tokens: their answers end before"
            f" {how['max_tokens']} tokens")  # fmt: skip
    if not opened.ends:
        say(f"{args.model}: no token ends a text: every answer is as long as it may be")
    return policy(min(most, longest + more + how["max_tokens"]))


def rated(policy: Policy, began: float) -> None:
    seconds = time.monotonic() - began
    if policy.tokens_drawn:
        rate = f"{policy.tokens_drawn / seconds:,.0f} tokens/s"
        print(f"{policy.tokens_drawn:,} tokens drawn in {seconds:.1f} s, {rate}", file=sys.stderr)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    from jaxup.learning.guides import open_guide
    from jaxup.learning.search import REVISION, check, open_method, run
    from jaxup.learning.tree import shown

    revises = args.search.partition(":")[0] == "revise"
    if args.template is not None and not revises:
        raise UserError("--template goes with --search=revise")
    with within("--search"):
        method = open_method(args.search, revision=REVISION if args.template is None else args.template)
    with within("--guide"):
        guide = open_guide(args.guide)
    task = open_problems(args) if args.task is not None else _own(args)
    problems, judged = task.test, args.task is not None or args.answer is not None
    if method.guided and guide.verifies and not judged:
        raise UserError(f"--guide={args.guide}: it asks what is right", hint="--answer says it, or --guide=logp")
    limit = int(DEFAULTS["max_tokens"] if args.max_tokens is None else args.max_tokens)
    with within("--budget" if args.budget < limit else "--search"):
        check(task, method, guide, args.budget, limit)

    opened = open_model(args)
    how = drawing(args, opened.run, DEFAULTS, own=())
    policy = open_policy(opened, how, problems, args, _longer(opened, problems, limit, args) if revises else 0)
    began = time.monotonic()
    with Progress("solve", total=len(problems), unit="problems") as progress:
        told = progress.update
        found = run(policy, task, problems, method, guide, budget=args.budget, max_tokens=limit, seed=how["seed"],
                    told=lambda done: told(done, f"{policy.tokens_drawn:,} tokens"))  # fmt: skip
    rated(policy, began)
    rows = [_row(task, one, judged) for one in found]
    for number, row in enumerate(rows, 1):
        verdict = {None: "", 1.0: "right  "}.get(row["right"], "wrong  ")
        about = f"score {row['score']:.3f}, {row['votes']} of {row['samples']} say so; {row['tokens']} tokens"
        tell(f"[{number}] {verdict}{escaped(row['prompt'])}  {escaped(row['answer'])}  ({about})")
    if args.show_tree is not None:
        tell(f"\n[{args.show_tree}] {escaped(found[args.show_tree - 1].problem.prompt)}")
        for line in shown(found[args.show_tree - 1].root):
            print(printable(line), flush=True)
    total = sum(row["tokens"] for row in rows)
    by = f"{args.search}{f' by {args.guide}' if method.guided else ''}, {args.budget} tokens each at most"
    solved = f"solved {sum(row['right'] == 1 for row in rows)} of {len(rows)}" if judged else f"{len(rows)} answered"
    tell(f"\n{solved}: {by}, {total:,} used")
    if args.out is not None:
        write_atomically(Path(args.out), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _own(args: argparse.Namespace) -> Task:
    from jaxup.learning.given import Given, exact
    from jaxup.learning.problem import Problem

    try:
        (args.prompt + (args.answer or "")).encode()
    except UnicodeEncodeError:
        raise UserError(f"--prompt: not text in UTF-8: {args.prompt!r}") from None
    problem = Problem(exact(args.prompt), args.prompt, answer=args.answer or "")
    return Given(name="prompt", match=exact, test=[problem], step="\n")


def _longer(opened: Opened, problems: Sequence[Problem], max_tokens: int, args: argparse.Namespace) -> int:
    """Tokens by which a revision's prompt may be longer: the template, the prompt again, and an answer, which may be
    spelt in twice as many tokens as it was written in."""
    from jaxup.hub.text_generation import encode
    from jaxup.learning.search import REVISION, revised

    template = REVISION if args.template is None else args.template
    texts = [
        encode(opened.tokenizer, revised(template, problem, "", value)) for problem in problems for value in (0.0, 1.0)
    ]
    if any(opened.tokenizer.unk_token_id in ids for ids in texts):
        say(f"{args.model}: its tokenizer does not know all characters of the template; --template is another")
    return max(map(len, texts)) + 2 * max_tokens


def _row(task: Task, found: Found, judged: bool) -> dict[str, Any]:
    best = found.answers[0]
    return {
        "id": found.problem.id, "prompt": found.problem.prompt, "answer": best.text,
        "right": task.verify(found.problem, best.text) if judged else None,
        "score": best.score, "votes": best.votes, "path": best.path, "tokens": found.tokens,
        "samples": sum(node.count for node in found.samples),
        "answers": [{"text": r.text, "score": r.score, "votes": r.votes} for r in found.answers],
    }  # fmt: skip


if __name__ == "__main__":
    entry_point(main)
