"""Talk with a model: `python -m jaxup.chat MODEL`.

MODEL is a Hugging Face model directory, a Hub id, a gs://, s3:// or https:// directory, or a finished run directory,
of which the exported model is taken; RUN@NAME and RUN@NAME/STEP are others of a run. What is said is spelt by the
tokenizer's chat template, or by --format, and remembered. /reset begins anew, /quit or Ctrl-D leaves, and Ctrl-C ends
a reply. The lines of --prompts, or of a pipe, are turns: each is written with its reply. A context that is full loses
its oldest questions with their answers.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterator

from jaxup.data.chat_templates import TEMPLATES
from jaxup.errors import Parser, UserError, entry_point, suggest, within
from jaxup.generate import add_flags, check_flags, drawing, open_model, read_lines
from jaxup.hub.text_generation import Chat, encode
from jaxup.progress import printable, say

DEFAULTS = {"max_tokens": 512, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 0}
_COMMANDS = ("/reset", "/quit")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("chat", __doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="directory, Hub id or URL of a model, RUN or RUN@NAME")
    add("--format", metavar="NAME", help=f"in place of the tokenizer's chat template: {', '.join(TEMPLATES)}")
    add("--system", metavar="TEXT", help="the system's message, before all else")
    add("--prompts", metavar="FILE", help="a turn per line, empty lines left out; - = standard input")
    add("--context", metavar="N", type=int, help="tokens of all that is said (those of the model, at most 4096)")
    add_flags(parser, DEFAULTS)
    args = parser.parse_args(argv[1:])
    check_flags(args, DEFAULTS)
    if args.format is not None and args.format not in TEMPLATES:
        raise UserError(f"--format: {args.format!r} is not known{suggest(args.format, TEMPLATES)}")
    if args.context is not None and args.context < 1:
        raise UserError(f"--context must be at least 1, not {args.context}")
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    asks = args.prompts is None and sys.stdin.isatty()
    turns = None if asks else read_lines("--prompts", "-" if args.prompts is None else args.prompts)
    chat = _open(args)
    # Elsewhere than on a terminal the text is to the letter what the model writes.
    shown = functools.partial(printable, keep="\n\t") if sys.stdout.isatty() else str
    if turns is None:
        say(f"a context of {chat.context} tokens; /reset begins anew, /quit leaves")
    for text in _asked() if turns is None else turns:
        if turns is not None:
            print(shown(f"> {text}"), flush=True)
        try:
            if text.strip() == "/quit":
                return
            if text.strip() == "/reset":
                chat.messages = []
            elif text.strip():
                _answer(chat, text, shown)
        except KeyboardInterrupt:
            if turns is not None:
                raise
            say("the reply was ended; Ctrl-C again leaves")
        except UserError as error:
            if turns is not None:
                raise
            say(error)


def _open(args: argparse.Namespace) -> Chat:
    """All that can be known to fail is looked at before the model is read."""
    from jaxup.data.chat_formats import open_format

    opened = open_model(args)
    tokenizer = opened.tokenizer
    if not (args.format or tokenizer.chat_template):
        hint = f"name one with --format: {', '.join(TEMPLATES)}"
        raise UserError("the tokenizer has no chat template", at=args.model, hint=hint)
    how = drawing(args, opened.run, DEFAULTS, own=("temperature", "top_k"))
    with within(args.model):
        ends = {*opened.ends, *open_format(args.format, tokenizer).stops}
        if args.format:
            tokenizer.chat_template = TEMPLATES[args.format]
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        encode(tokenizer, [*system, {"role": "user", "content": "a"}])
    model = opened.load()
    with within("--context") if args.context else contextlib.nullcontext():
        return Chat(model, tokenizer, eos_ids=ends, context=args.context or 0, system=args.system, **how)


def _asked() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited, and those of before come again
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt) as left:
            print()  # the shell's prompt is not to stand beside this one
            if isinstance(left, EOFError):
                return
            raise


def _answer(chat: Chat, text: str, shown: Callable[[str], str]) -> None:
    if re.fullmatch(r"\s*/\w+\s*", text):
        raise UserError(f"unknown command {text.strip()!r}{suggest(text.strip(), _COMMANDS)}")
    try:
        with contextlib.closing(chat.reply(text)) as pieces:
            for piece in pieces:
                print(shown(piece), end="", flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        raise
    print(flush=True)
    if chat.dropped:
        what = "question was" if chat.dropped == 1 else f"{chat.dropped} questions were"
        say(f"the context of {chat.context} tokens is full: the oldest {what} left out, with what was answered")
    if chat.cut:
        say(f"the reply was cut: {chat.cut}")
    elif not chat.messages[-1]["content"]:
        say("the reply is empty: the model ended it at once")


if __name__ == "__main__":
    entry_point(main)
