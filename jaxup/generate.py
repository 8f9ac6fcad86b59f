"""Write text with a model: `python -m jaxup.generate MODEL --prompt "def main"`; or draw pictures, or ask of one.

MODEL is a Hugging Face model directory, a Hub id, a gs://, s3:// or https:// directory, or a finished run directory,
of which the exported model is taken; RUN@reference and RUN@healed/133 are others of a run, by name and step. One
prompt is written as it comes, several are one batch and written at its end.

A model that was taught to draw does with --image "draw 7" --out grid.png, of each --image a picture, and tells of one
that it is shown with --image-in FILE --prompt "which digit?".
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxup import devices
from jaxup.errors import Parser, UserError, entry_point, within
from jaxup.hub.text_generation import OPTIONS, Prompt, Writing, check_options, encode, stop_ids
from jaxup.progress import Progress, printable, say
from jaxup.text import misfit, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxup.model.decoder import Decoder


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("generate", __doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="directory, Hub id or URL of a model, RUN or RUN@NAME")
    add("--prompt", metavar="TEXT", action="append", help="the text to go on from; may be given several times")
    add("--prompt-file", metavar="FILE", help="a prompt per line, empty lines left out; - = standard input")
    add("--chat", action="store_true", help="the prompt is a message, put into the tokenizer's chat template")
    add("--system", metavar="TEXT", help="with --chat: the system's message before it")
    add("--image", metavar="TEXT", action="append", help="draw a picture for it; may be given several times")
    add("--out", metavar="FILE", help="with --image: PNG of all pictures, or .npy of their continuous tokens")
    add("--guidance", metavar="G", type=float, help="with --image: how much the text counts; 1 = as it was learned")
    add(
        "--head-steps", metavar="N", type=int, help="with --image: steps of a diffusion or flow, for each map of scales"
    )
    add("--sets", metavar="N", type=int, help="with --image: sets that the tokens of a picture or frame are drawn in")
    add("--image-in", metavar="FILE", help="with --prompt: the picture that it asks of")
    add_flags(parser, DEFAULTS)
    args = parser.parse_args(argv[1:])
    check_flags(args, DEFAULTS)
    if args.system is not None and not args.chat:
        raise UserError("--system goes with --chat")
    _check_pictures(args)
    return args


_TEXT = ("prompt", "prompt_file", "chat", "max_tokens", "top_k", "top_p")  # what is of text alone
_DRAWN = ("out", "guidance", "head_steps", "sets")  # and of pictures that are drawn


def _check_pictures(args: argparse.Namespace) -> None:
    """UserError for flags that do not go together."""

    def given(names: Collection[str]) -> list[str]:
        return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, False)]

    if args.image is None:
        if drawn := given(_DRAWN):
            raise UserError(f"{drawn[0]} goes with --image")
    else:
        if other := given(("image_in", *_TEXT)):
            raise UserError(f"{other[0]} goes with text, and --image draws")
        if args.out is None:
            raise UserError("--image: where to is not said", hint="--out=grid.png")
        if not args.out.lower().endswith((".png", ".npy")):
            raise UserError(f"--out={args.out}: a .png of the pictures, or a .npy of their continuous tokens")
    if args.image_in is not None:
        if not args.prompt or args.prompt_file is not None:
            raise UserError("--image-in goes with --prompt, which asks of the picture")
        if other := given(("chat", "temperature", "top_k", "top_p", "seed")):
            raise UserError(f"{other[0]}: what is told of a picture is the likeliest text")
    for name, least in (("guidance", 0.0), ("head_steps", 1), ("sets", 1)):
        value = getattr(args, name)
        if value is not None and not least <= value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be at least {least:g}, not {value}")


_OWN = {"temperature": "temperature", "top_k": "top_k", "tokens": "max_tokens"}  # of a run's section `sample`
DEFAULTS = {"max_tokens": 100, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 0}


def add_flags(parser: Parser, defaults: Mapping[str, Any]) -> None:
    """How text is drawn and the model is read. What is not given is None: see `drawing`."""
    add, usual = parser.add_argument, "({})".format
    add("--max-tokens", metavar="N", type=int, help=f"new tokens at most {usual(defaults['max_tokens'])}")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--temperature", metavar="T", type=float,
                     help=f"divides the logits {usual(defaults['temperature'])}; 0 = greedy")  # fmt: skip
    how.add_argument("--greedy", action="store_const", dest="temperature", const=0.0, help="always the likeliest token")
    add("--top-k", metavar="K", type=int, help="draw from the K likeliest tokens; 0 = from all (0)")
    add("--top-p", metavar="P", type=float, help="draw from the fewest tokens that hold P of it (1)")
    add("--seed", metavar="N", type=int, help="the same seed gives the same text (0)")
    add_reading_flags(parser)
    parser.epilog = "What is not given of how text is drawn is, of a run, that of its own samples (config.sample)."


def add_reading_flags(parser: Parser) -> None:
    """How the model is read, for `open_model`."""
    add = parser.add_argument
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of parameters and computation (float32)")
    devices.add_flag(parser)
    add("--revision", metavar="REV", help="branch, tag or commit of a Hub id")
    add("--strict", action="store_true", help="refuse NaN and infinite parameters instead of warning")
    add("--allow-pickle", action="store_true", help="read pytorch_model.bin if there are no safetensors")


def check_flags(args: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    check_options({**defaults, **_given(args)}, lambda name: f"--{name.replace('_', '-')}")


def _given(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}


def drawing(
    args: argparse.Namespace,
    run: Path | None,
    defaults: Mapping[str, Any],
    *,
    own: Collection[str] = tuple(_OWN.values()),
) -> dict[str, Any]:
    """How text is drawn: as flags say, else (of what `own` names) as a run draws its samples, else by default."""
    given, settings = _given(args), dict[str, Any]()
    if run is not None:
        file, hint = run / "config.json", "put it back"
        sample = (read_json(file, {"sample": dict[str, Any] | None}, hint) or {}).get("sample") or {}
        if wrong := misfit(sample, {"temperature": float | None, "top_k": int | None, "tokens": int | None}):
            raise UserError(f"damaged: sample.{wrong}", at=str(file), hint=hint)
        settings = {_OWN[key]: value for key, value in sample.items() if _OWN.get(key) in {*own} - given.keys()}
        # What a run does not write is no text of none; and greedily there is nothing that is drawn.
        if settings.get("max_tokens") == 0:
            del settings["max_tokens"]
        if settings.get("temperature") == 0 and given.keys() & {"top_k", "top_p"}:
            del settings["temperature"]
        if {**settings, **given}.get("temperature") == 0:
            settings.pop("top_k", None)
        with within(str(file)):
            check_options({**defaults, **given, **settings}, "sample: {}".format)
        if settings:
            said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
            say(f"drawn as the run's own samples are: {said}")
    return {**defaults, **settings, **given}


def read_lines(flag: str, file: str) -> list[str]:
    """The lines of a file, or with - of standard input, that are not empty."""
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        lines = raw.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{flag}: {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{flag}: {file}: not text in UTF-8") from None
    if not (found := [line.removesuffix("\r") for line in lines if line.strip()]):
        raise UserError(f"{flag}: {file}: no prompt in it")
    return found


def read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt or ())
    if args.prompt_file is not None:
        prompts += read_lines("--prompt-file", args.prompt_file)
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


class Opened(NamedTuple):
    """A model of which all is known but its parameters."""

    name: str  # of its directory
    run: Path | None  # that it is of
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]  # tokens that end a text
    load: Callable[[], Decoder]


def open_model(args: argparse.Namespace) -> Opened:
    """The model that a command is told with `add_reading_flags`: a directory's, or RUN@MODEL, or RUN@MODEL/STEP."""
    devices.choose(args.platform)

    from jaxup.continuous.load import load
    from jaxup.data.tokenizer import load_tokenizer
    from jaxup.files.names import in_run, split_run
    from jaxup.hub.directory import tokenizer_directory
    from jaxup.hub.reader import load_config

    name, run = args.model, None
    if found := split_run(name):
        run, model = found
        if model:
            return _of_run(args, run, model)
        name = str(in_run(name))
    load_config(name, revision=args.revision)  # what is no model shall not be called one without tokenizer
    directory = tokenizer_directory(name, revision=args.revision)
    tokenizer = load_tokenizer(str(directory))
    how = {flag: getattr(args, flag) for flag in ("dtype", "revision", "strict", "allow_pickle")}
    reading = functools.partial(load, name, progress=True, **how)
    devices.ready()  # what is wrong with the model is said without them
    return Opened(name, run, tokenizer, stop_ids(directory, tokenizer), reading)


def _of_run(args: argparse.Namespace, run: Path, what: str) -> Opened:
    """MODEL or MODEL/STEP of a run, from its checkpoint."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxup.data.tokenizer import load_tokenizer
    from jaxup.experiments import stored
    from jaxup.hub.directory import tokenizer_directory
    from jaxup.model.config import Compute
    from jaxup.model.decoder import abstract
    from jaxup.training.stored import choose, parse, restore

    if args.revision is not None or args.allow_pickle:
        raise UserError("a model of a run: --revision and --allow-pickle go with others", at=args.model)
    with within(args.model):
        which = parse(what)
    name, number, about = choose(run, *which)
    directory = None
    if (exported := run / "export").is_dir():
        directory = tokenizer_directory(str(exported))
        tokenizer = load_tokenizer(str(directory))
    else:
        tokenizer = stored.vocabulary(run, about.store)["tokenizer"]

    devices.ready()

    def load() -> Decoder:
        say(f"{name} at step {number}")
        params = restore(run, name, number, about)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.dtype(args.dtype)), params)
        return nnx.merge(abstract(about.model, Compute(dtype=args.dtype))[0], params)

    return Opened(args.model, run, tokenizer, stop_ids(directory, tokenizer), load)


def _pictures(args: argparse.Namespace) -> None:
    """Draws, or tells of a picture."""
    from jaxup.continuous.asking import draw_to, tell_of, told_by

    opened = open_model(args)
    taught = told_by(args.model, revision=args.revision)
    if args.image is not None:
        own = {"temperature": args.temperature, "guidance": args.guidance}
        how = own | {"head_steps": args.head_steps, "sets": args.sets}
        draw_to(args.out, taught, opened.tokenizer, opened.load, args.image, how, seed=args.seed or 0)
        return
    limit = int(DEFAULTS["max_tokens"] if args.max_tokens is None else args.max_tokens)
    given = opened.tokenizer, opened.ends, opened.load, args.prompt
    answers = tell_of(args.image_in, taught, *given, max_tokens=limit)
    for prompt, answer in zip(args.prompt, answers, strict=True):
        print(printable(f"{prompt}{answer}" if len(answers) > 1 else answer.strip(), keep="\n\t"), flush=True)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    if args.image is not None or args.image_in is not None:
        return _pictures(args)
    texts = read_prompts(args)
    opened = open_model(args)
    how, tokenizer = drawing(args, opened.run, DEFAULTS), opened.tokenizer
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    prompts: list[Prompt] = [[*system, {"role": "user", "content": text}] if args.chat else text for text in texts]
    with within("--chat" if args.chat else args.model):
        for prompt in prompts:  # what cannot be spelt is refused before the model is read
            encode(tokenizer, prompt)
    model = opened.load()

    began = time.monotonic()
    # Elsewhere than on a terminal the text is to the letter what the model writes.
    shown = functools.partial(printable, keep="\n\t") if sys.stdout.isatty() else str
    writing = Writing(model, prompts, tokenizer=tokenizer, eos_ids=opened.ends, **how)
    written = ["" if args.chat else text for text in texts]
    single = len(texts) == 1
    if single:
        print(shown(written[0]), end="", flush=True)
    interrupted = False
    with Progress("generate", total=how["max_tokens"], unit="tokens of each prompt", shown=not single) as progress:
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
