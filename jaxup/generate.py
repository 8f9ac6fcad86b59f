"""Write text with a model: `python -m jaxup.generate MODEL --prompt "def main"`.

MODEL is a Hugging Face model directory, a Hub id, a gs://, s3:// or https:// directory, or a finished run directory,
of which the exported model is taken. One prompt is written as it comes, several are one batch and written at its end.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path

from jaxup.errors import Parser, UserError, entry_point, within
from jaxup.hub.text_generation import OPTIONS, Prompt, Writing, check_options, encode, stop_ids
from jaxup.progress import say


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("generate", __doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="directory, Hub id or URL of a model, or a run directory")
    add("--prompt", metavar="TEXT", action="append", help="the text to go on from; may be given several times")
    add("--prompt-file", metavar="FILE", help="a prompt per line, empty lines left out; - = standard input")
    add("--chat", action="store_true", help="the prompt is a message, put into the tokenizer's chat template")
    add("--system", metavar="TEXT", help="with --chat: the system's message before it")
    add("--max-tokens", metavar="N", type=int, default=100, help="new tokens at most (100)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--temperature", metavar="T", type=float, default=0.8, help="divides the logits (0.8); 0 = greedy")
    how.add_argument("--greedy", action="store_const", dest="temperature", const=0.0, help="always the likeliest token")
    add("--top-k", metavar="K", type=int, default=0, help="draw from the K likeliest tokens; 0 = from all (0)")
    add("--top-p", metavar="P", type=float, default=1.0, help="draw from the fewest tokens that hold P of it (1)")
    add("--seed", metavar="N", type=int, default=0, help="the same seed gives the same text (0)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of parameters and computation (float32)")
    add("--revision", metavar="REV", help="branch, tag or commit of a Hub id")
    add("--strict", action="store_true", help="refuse NaN and infinite parameters instead of warning")
    add("--allow-pickle", action="store_true", help="read pytorch_model.bin if there are no safetensors")
    args = parser.parse_args(argv[1:])
    check_options(vars(args), lambda name: f"--{name.replace('_', '-')}")
    if args.system is not None and not args.chat:
        raise UserError("--system goes with --chat")
    return args


def read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt or ())
    if args.prompt_file is not None:
        try:
            raw = sys.stdin.buffer.read() if args.prompt_file == "-" else Path(args.prompt_file).read_bytes()
            lines = raw.decode("utf-8-sig").split("\n")
        except OSError as error:
            raise UserError(f"--prompt-file: {args.prompt_file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"--prompt-file: {args.prompt_file}: not text in UTF-8") from None
        prompts += [line.removesuffix("\r") for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"--prompt-file: {args.prompt_file}: no prompt in it")
    if not prompts:
        raise UserError("nothing to go on from: give --prompt or --prompt-file")
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"--prompt: not text in UTF-8: {prompt!r}") from None
    if not args.chat and (blank := next((prompt for prompt in prompts if prompt.endswith((" ", "\t"))), None)):
        # A word's token has the blank before it: after one of its own no word that was learned can follow.
        say(f"{blank[-40:]!r}: the prompt ends in a blank, after which most models write badly; better without it")
    return prompts


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    texts = read_prompts(args)

    from jaxup.data.tokenizer import load_tokenizer
    from jaxup.files.bucket import place
    from jaxup.hub.directory import tokenizer_directory
    from jaxup.hub.load import load
    from jaxup.hub.reader import load_config
    from jaxup.progress import Progress, printable

    path = place(args.model)
    if (path / "checkpoints").is_dir():
        path = path / "export"
        if not path.is_dir():
            raise UserError(f"{args.model}: this run has no export yet; it is written when the run finishes")
        args.model = str(path)
    load_config(args.model, revision=args.revision)  # what is no model shall not be called one without tokenizer
    directory = tokenizer_directory(args.model, revision=args.revision)
    tokenizer = load_tokenizer(str(directory))
    ends = stop_ids(directory, tokenizer)
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    prompts: list[Prompt] = [[*system, {"role": "user", "content": text}] if args.chat else text for text in texts]
    with within("--chat" if args.chat else args.model):
        for prompt in prompts:  # what cannot be spelt is refused before the model is read
            encode(tokenizer, prompt)
    how = {name: getattr(args, name) for name in ("dtype", "revision", "strict", "allow_pickle")}
    model = load(args.model, progress=True, **how)

    began = time.monotonic()
    # Elsewhere than on a terminal the text is to the letter what the model writes.
    shown = functools.partial(printable, keep="\n\t") if sys.stdout.isatty() else str
    writing = Writing(model, tokenizer, prompts, eos_ids=ends, **{name: getattr(args, name) for name in OPTIONS})
    written = ["" if args.chat else text for text in texts]
    single = len(texts) == 1
    if single:
        print(shown(written[0]), end="", flush=True)
    interrupted = False
    with Progress("generate", total=args.max_tokens, unit="tokens of each prompt", shown=not single) as progress:
        try:
            for pieces in writing:
                if len(writing.counts) == 1:
                    first = time.monotonic()
                written = [text + piece for text, piece in zip(written, pieces, strict=True)]
                if single:
                    print(shown(pieces[0]), end="", flush=True)
                progress.update(len(writing.counts))
        except KeyboardInterrupt:
            interrupted = True
    last = time.monotonic()
    if single:
        print(shown(writing.rest()[0]), flush=True)
    else:
        for number, (prompt, text, rest) in enumerate(zip(texts, written, writing.rest(), strict=True), 1):
            heading = f"[{number}] {prompt}\n" if args.chat else f"[{number}] "
            print(shown(f"{heading}{text}{rest}\n"), flush=True)
    if counts := writing.counts:
        rate = f", {sum(counts[1:]) / (last - first):.1f} tokens/s" if len(counts) > 1 and last > first else ""
        print(f"{sum(counts)} tokens, {first - began:.1f} s to the first{rate}", file=sys.stderr)
    if interrupted:
        raise KeyboardInterrupt


if __name__ == "__main__":
    entry_point(main)
