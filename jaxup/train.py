"""Train models as an experiment file describes: `python -m jaxup.train --config=inherit_gpt2.py`.

A configuration with --config.study.axes="KEY: VALUE VALUE; KEY: ..." or --config.study.seeds=0,1,2 is a study: a run of
each combination with each seed in directories of its own, of which several processes may each take some.

With neither --config nor --resume the shipped files are listed; `--config=FILE --help` prints what one of them says of
itself, and every key with its value. `--dry-run` says what the run would do, and what memory and time it takes;
`--target=v5p:4x4x4` what it takes on such TPUs, which need not be here, and `--target=auto` on the fewest that fit;
`--preflight`, started on all machines as the run will be, whether it can begin there.

The same command again resumes the run in its directory, or does nothing if it is finished; so does `--resume=DIR`,
which has the configuration. What does not decide the numbers may change (mesh, log, eval, checkpoint, sample; and
steps or epochs may be more, if the rate is constant). Exit codes: 0 done, 2 a mistake in the command, configuration
or data, 3 a loss, gradient or update that is not finite, 5 another of several processes died or made no progress,
6 a disk is full, 130 or 143 stopped by Ctrl-C or SIGTERM, with the state saved.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from jaxup import devices
from jaxup.errors import Parser, UserError, entry_point
from jaxup.experiments.config import find, load, meant
from jaxup.experiments.resuming import load_run
from jaxup.experiments.run import run_experiment
from jaxup.files.bucket import place
from jaxup.training.corrections import RATE, SKIP, parse


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    parser = Parser("train", __doc__, add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="this text; with --config or --resume, what it says")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--config", metavar="FILE[:VARIANT]",
                       help="experiment file, looked for here and in configs/; variants after a colon")  # fmt: skip
    begin.add_argument("--resume", metavar="DIR", help="go on with the run in this directory, as it was configured")
    parser.add_argument("--config.KEY", dest="_", metavar="VALUE",
                        help="override one value, for example --config.optimizer.learning_rate=3e-4")  # fmt: skip
    parser.add_argument("--workdir", metavar="DIR", help="run directory, gs:// too (default: runs/FILE-VARIANT)")
    devices.add_flag(parser)
    parser.add_argument(
        SKIP, action="append", default=[], metavar="N",
        help="leave out the batch of step N of the model that is training; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        RATE, action="append", default=[], metavar="N:RATE",
        help="from step N on its learning rate has its peak at RATE; the run keeps both",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true",
                        help="say what would be done, with the memory and time that it takes, and leave")  # fmt: skip
    parser.add_argument("--preflight", action="store_true",
                        help="say whether all machines are ready: processes, devices, places to write")  # fmt: skip
    parser.add_argument("--target", metavar="TPU",
                        help="say what a step takes on TPUs such as v5p:4x4x4, which need not be here; "
                        "auto, or auto:v5p: on the smallest slice that fits")  # fmt: skip
    parser.add_argument("--target-compile", action="store_true",
                        help="with --target, go on to the programs' code, which takes minutes")  # fmt: skip
    parser.add_argument("--target-json", metavar="FILE", help="with --target, write the figures there as well")
    args, rest = parser.parse_known_args(argv[1:])
    overrides, rest = [], list(rest)
    while rest:
        flag, given, text = (word := rest.pop(0)).partition("=")
        if not flag.startswith("--config."):
            value = text if given else next((word for word in rest[:1] if not word.startswith("--")), "")
            raise parser.unknown(flag, _place_meant(word) or meant(flag, value))
        if not given:
            if not rest:
                raise UserError(f"{flag}: needs a value")
            text = rest.pop(0)
        overrides.append((flag.removeprefix("--config."), text))
    if args.config is args.resume is None:
        if args.help:
            parser.print_help()
            parser.exit()
        from jaxup.experiments.shown import listed

        print(listed(), flush=True)
        raise UserError("what to train is not said", hint="give --config=FILE, or --resume=RUN")
    if args.target_json and not args.target:
        raise UserError(f"--target-json={args.target_json}: goes with --target")
    if args.target_compile and (args.target or "auto").lower().startswith("auto"):
        raise UserError("--target-compile: goes with --target=SLICE, such as v5p:4x4x4")
    if args.target and args.config is None:
        raise UserError(f"--target={args.target}: goes with --config, and not with a run that is here")
    if args.preflight and args.dry_run:
        raise UserError("--preflight: goes without --dry-run")
    beside = {"--dry-run": args.dry_run, "--preflight": args.preflight, "--workdir": args.workdir,
              SKIP: args.skip_step, RATE: args.rate_from}  # fmt: skip
    if args.target and (needless := [flag for flag, value in beside.items() if value]):
        raise UserError(f"--target={args.target}: runs and writes nothing; leave {needless[0]} out")
    if args.resume is not None and args.workdir:
        raise UserError(f"--workdir={args.workdir}: --resume={args.resume} names the directory")
    return args, overrides


def _place_meant(word: str) -> str:
    """What a file or run that is given without its flag was to be."""
    if word.startswith("-"):
        return ""
    try:
        if Path(word, "config.json").is_file():
            return f"; did you mean --resume={word}?"
        find(word.partition(":")[0])
    except (UserError, OSError):  # a name that is too long
        return ""
    return f"; did you mean --config={word}?"


def main(argv: list[str]) -> None:
    args, overrides = parse_args(argv)
    if args.resume is not None:
        workdir = place(args.resume)
        config, title = load_run(workdir, overrides)
    else:
        config = load(args.config, overrides)
        name, _, variant = args.config.partition(":")
        title = "-".join(filter(None, [Path(name).stem, variant.replace(",", "-").replace("/", "-")]))
        workdir = place(args.workdir or f"runs/{title}")
    if args.help:
        from jaxup.experiments.shown import described

        print(described(config, args.config or ""))
        return
    if args.target:
        from jaxup.experiments.target import show

        if config.study.cells:
            hint = "give the keys of one cell instead"
            raise UserError("is of one run, and this is a study of several", at=f"--target={args.target}", hint=hint)
        show(config, args.target, args.config, args.target_json or "", overrides, whole=args.target_compile)
        return
    devices.choose(args.platform)
    command, dry = shlex.join(["python", "-m", "jaxup.train", *argv[1:]]), (args.config or "") if args.dry_run else None
    run_experiment(
        config, workdir, title, parse(args.skip_step, args.rate_from), command, dry=dry, preflight=args.preflight
    )


if __name__ == "__main__":
    entry_point(main)
