"""Write text with a model: `python -m jaxup.generate MODEL --prompt "def main"`.

MODEL is a Hugging Face model directory or a finished run directory, of which the exported model is
taken.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from jaxup.errors import Parser, UserError, entry_point


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m jaxup.generate", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help="model directory or run directory")
    parser.add_argument("--prompt", required=True, help="the text to go on from")
    parser.add_argument("--max-tokens", type=int, default=100, help="new tokens at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0 = from all")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    args = parser.parse_args(argv[1:])
    if args.max_tokens < 1 or args.temperature < 0 or args.top_k < 0:
        raise UserError("--max-tokens must be at least 1, --temperature and --top-k not negative")

    import numpy as np

    from jaxup.data.tokenizer import load_tokenizer
    from jaxup.hub import reader
    from jaxup.model.sampling import generate

    path = Path(args.model).expanduser()
    if (path / "checkpoints").is_dir():
        path = path / "export"
        if not path.is_dir():
            raise UserError(f"{args.model}: this run has no export yet; it is written when the run finishes")
    config = reader.load_config(path)
    tokenizer = load_tokenizer(str(path))
    prompt = tokenizer(args.prompt, add_special_tokens=False)["input_ids"]
    params = reader.load_params(path, config, dtype=np.dtype(np.float32))

    began, ids, shown = time.monotonic(), list(prompt), ""
    steps = generate(
        config, params, np.asarray([prompt], np.int32).reshape(1, -1), max_tokens=args.max_tokens,
        temperature=args.temperature, top_k=args.top_k, seed=args.seed, dtype=args.dtype,
        vocab_size=min(len(tokenizer), config.vocab_size),
    )  # fmt: skip
    count = 0
    for token in steps:
        if count == 0:
            compiled = time.monotonic()
        count += 1
        if int(token[0]) == tokenizer.eos_token_id:
            break
        ids.append(int(token[0]))
        text = tokenizer.decode(ids)
        # A character that is spelt with several tokens is shown when its last one is there.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(flush=True)
    seconds = time.monotonic() - compiled
    rate = f", {(count - 1) / seconds:.1f} tokens/s" if count > 1 and seconds > 0 else ""
    print(f"{count} tokens, {compiled - began:.1f} s to the first{rate}", file=sys.stderr)


def cli() -> None:
    entry_point(main)


if __name__ == "__main__":
    cli()
