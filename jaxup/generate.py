"""Write text with a model: `python -m jaxup.generate MODEL --prompt "def main"`.

MODEL is a Hugging Face model directory, a Hub id, a gs://, s3:// or https:// directory, or a finished
run directory, of which the exported model is taken. One prompt is written as it comes, several are
one batch and written at its end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxup.errors import Parser, UserError, entry_point


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m jaxup.generate", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("model", metavar="MODEL", help="directory, Hub id or URL of a model, or a run directory")
    add("--prompt", metavar="TEXT", action="append", help="the text to go on from; may be given several times")
    add("--prompt-file", metavar="FILE", help="a prompt per line, empty lines left out; - = standard input")
    add("--chat", action="store_true", help="the prompt is a message, put into the tokenizer's chat template")
    add("--system", metavar="TEXT", help="with --chat: the system's message before it")
    add("--max-tokens", metavar="N", type=int, default=100, help="new tokens at most (100)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--temperature", metavar="T", type=float, default=0.8, help="divides the logits (0.8); 0 = greedy")
    how.add_argument("--greedy", action="store_true", help="always the likeliest token")
    add("--top-k", metavar="K", type=int, default=0, help="draw from the K likeliest tokens; 0 = from all (0)")
    add("--top-p", metavar="P", type=float, default=1.0, help="draw from the fewest tokens that hold P of it (1)")
    add("--seed", metavar="N", type=int, default=0, help="the same seed gives the same text (0)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of parameters and computation (float32)")
    add("--revision", metavar="REV", help="branch, tag or commit of a Hub id")
    add("--strict", action="store_true", help="refuse NaN and infinite parameters instead of warning")
    add("--allow-pickle", action="store_true", help="read pytorch_model.bin if there are no safetensors")
    args = parser.parse_args(argv[1:])
    for flag, value, good, wanted in (
        ("--max-tokens", args.max_tokens, args.max_tokens >= 1, "at least 1"),
        ("--temperature", args.temperature, 0 <= args.temperature < math.inf, "a number and not negative"),
        ("--top-k", args.top_k, args.top_k >= 0, "not negative"),
        ("--top-p", args.top_p, 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("--seed", args.seed, 0 <= args.seed < 2**32, "between 0 and 2^32 - 1"),
    ):
        if not good:
            raise UserError(f"{flag} must be {wanted}, not {value}")
    if args.greedy:
        args.temperature = 0.0
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
    return prompts


def stop_ids(directory: Path, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a text: of generation_config.json, else config.json, else the tokenizer."""
    for file in (directory / "generation_config.json", directory / "config.json"):
        if not file.is_file():
            continue
        try:
            ids = json.loads(file.read_bytes()).get("eos_token_id")
        except (ValueError, AttributeError):
            raise UserError(f"{file}: not a JSON object") from None
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(i) is int for i in ids):
                raise UserError(f"{file}: eos_token_id={ids} is not a token id or a list of them")
            return tuple(ids)
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


class Detokenizer:
    """The text of tokens that come one by one, after those of `prompt`; in whole characters only.

    The pieces together are what `tokenizer.decode` of all tokens has after the prompt, save where a
    decoder takes back what it had (bytes that turn out to be no text). A token's text depends on its
    neighbours (bytes of one character, the blank before the first word), so each piece is the
    difference between two decoded ends of the tokens: from the piece before on.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]):
        self._tokenizer, self._ids = tokenizer, list(prompt)
        self._known = len(self._ids)  # of `_ids`, whose text has been returned

    def push(self, token: int) -> str:
        self._ids.append(token)
        piece = self.rest()
        if not piece or piece.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._ids = self._ids[self._known :]
        self._known = len(self._ids)
        return piece

    def rest(self) -> str:
        """What has not been returned yet: a last character may lack some of its bytes."""
        return self._decode(self._ids)[len(self._decode(self._ids[: self._known])) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    prompts = read_prompts(args)

    from flax import nnx

    from jaxup.data.chat_formats import prompt_ids
    from jaxup.data.tokenizer import load_tokenizer
    from jaxup.hub.directory import tokenizer_directory
    from jaxup.hub.load import load
    from jaxup.hub.reader import load_config
    from jaxup.model.sampling import generate
    from jaxup.progress import Progress

    path = Path(args.model).expanduser()
    if (path / "checkpoints").is_dir():
        path = path / "export"
        if not path.is_dir():
            raise UserError(f"{args.model}: this run has no export yet; it is written when the run finishes")
        args.model = str(path)
    load_config(args.model, revision=args.revision)  # what is no model shall not be called one without tokenizer
    directory = tokenizer_directory(args.model, revision=args.revision)
    tokenizer = load_tokenizer(str(directory))
    ends = stop_ids(directory, tokenizer)
    if args.chat:
        try:
            ids = [prompt_ids(tokenizer, prompt, args.system) for prompt in prompts]
        except UserError as error:
            raise UserError(f"--chat: {error}") from None
    else:
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    model = load(args.model, dtype=args.dtype, revision=args.revision, strict=args.strict,
                 allow_pickle=args.allow_pickle, progress=True)  # fmt: skip

    began = time.monotonic()
    steps = generate(
        model.config, nnx.to_pure_dict(nnx.state(model)), ids, max_tokens=args.max_tokens,
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed, dtype=args.dtype,
        vocab_size=min(max(tokenizer.get_vocab().values()) + 1, model.config.vocab_size), eos_ids=ends,
    )  # fmt: skip
    # The reply in a chat is a text of its own; otherwise the prompt's goes on.
    texts = [Detokenizer(tokenizer, [] if args.chat else row) for row in ids]
    written = ["" if args.chat else prompt for prompt in prompts]
    single = len(prompts) == 1
    if single:
        print(written[0], end="", flush=True)
    counts, interrupted = [], False
    progress = Progress("generate", total=args.max_tokens, unit="tokens of each prompt")
    with contextlib.nullcontext() if single else progress:
        try:
            for drawn in steps:
                if not counts:
                    first = time.monotonic()
                counts.append(int((drawn >= 0).sum()))
                for row, token in enumerate(drawn.tolist()):
                    piece = texts[row].push(token) if token >= 0 and token not in ends else ""
                    written[row] += piece
                    if single:
                        print(piece, end="", flush=True)
                if not single:
                    progress.update(len(counts))
        except KeyboardInterrupt:
            interrupted = True
    last = time.monotonic()
    if single:
        print(texts[0].rest(), flush=True)
    else:
        for number, (prompt, text, end) in enumerate(zip(prompts, written, texts, strict=True), 1):
            heading = f"[{number}] {prompt}\n" if args.chat else f"[{number}] "
            print(f"{heading}{text}{end.rest()}\n", flush=True)
    if counts:
        rate = f", {sum(counts[1:]) / (last - first):.1f} tokens/s" if len(counts) > 1 and last > first else ""
        print(f"{sum(counts)} tokens, {first - began:.1f} s to the first{rate}", file=sys.stderr)
    if interrupted:
        raise KeyboardInterrupt


def cli() -> None:
    entry_point(main)


if __name__ == "__main__":
    cli()
