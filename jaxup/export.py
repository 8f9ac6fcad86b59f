"""Write a model as a Hugging Face model directory: `python -m jaxup.export RUN OUT`, or put it on the Hub.

RUN is a run directory, finished or not, of which the newest checkpoint of the last target or the
healed model is taken, or another as RUN@NAME or RUN@NAME/STEP (or by --model and --step); or a Hugging
Face model, directory or id, which is written again in another dtype or other shards. Nothing is at OUT
until all of it is there. Without OUT, RUN@NAME/STEP is put into the run, as RUN/models/NAME/STEP: then all
that takes a model finds it by its name.

--push ORG/NAME puts it on the Hub then, in one commit. Without OUT it is what lies there already: the export of a
finished RUN, what was exported of RUN@NAME/STEP, or a directory that jaxup has written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxup import devices
from jaxup.errors import Parser, UserError, entry_point, within
from jaxup.progress import tell


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("export", __doc__)
    parser.add_argument("source", metavar="RUN", help="RUN, RUN@NAME[/STEP], or Hugging Face model directory or id")
    parser.add_argument("out", metavar="OUT", nargs="?", help="directory to be made (of RUN@NAME default: in the run)")
    parser.add_argument("--push", metavar="ORG/NAME", help="of the Hub, which gets the model; the token is that of "
                        "`hf auth login` or HF_TOKEN")  # fmt: skip
    parser.add_argument("--private", action="store_true", help="make it there for its owners only")
    parser.add_argument("--model", metavar="NAME", help="of the run: reference, target_3, before, healed, control, ... "
                        "(default: the last target, or what was healed)")  # fmt: skip
    parser.add_argument("--step", type=int, metavar="N", help="of the model's checkpoints (default: the newest)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the tensors (default: as is)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file (default: 5GB)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it holds a model, and what "
                        "is at ORG/NAME")  # fmt: skip
    parser.add_argument("--revision", help="of a Hub id: branch, tag or commit")
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin if there is nothing better")
    args = parser.parse_args(argv[1:])
    if args.private and args.push is None:
        parser.error("--private goes with --push")
    given = [flag for flag in _WRITING if getattr(args, flag) != parser.get_default(flag)]
    if given and args.push and args.out is None:
        parser.error(f"--{given[0].replace('_', '-')} goes with OUT: without it the files are pushed as they are")
    return args


_WRITING = ("model", "step", "dtype", "max_shard_size", "revision", "allow_pickle")


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    if args.push is None:
        return _write(args)

    from jaxup.files.bucket import place
    from jaxup.files.names import in_run
    from jaxup.hub.push import look, push
    from jaxup.text import remote

    directory = place(args.source if args.out is None else args.out)
    if remote(directory):
        raise UserError("only a directory of this machine is pushed", at=str(directory))
    if args.out is None:
        directory = in_run(args.source) or directory
    there = look(args.push, private=args.private, force=args.force)
    if args.out is not None:
        _write(args)
    push(directory, args.push, there, private=args.private)


def _write(args: argparse.Namespace) -> None:
    from jaxup.experiments import stored
    from jaxup.files.bucket import place
    from jaxup.files.shards import parse_size
    from jaxup.files.staging import check_replaceable
    from jaxup.hub.directory import MARKS
    from jaxup.hub.load import load
    from jaxup.hub.save import save
    from jaxup.training.stored import choose, parse

    # All that can be known to fail is looked at before the model is read.
    size = parse_size(args.max_shard_size)
    how = {"dtype": args.dtype, "max_shard_size": size, "force": args.force, "progress": True}
    name, step = args.model, args.step
    source, of_run = place(args.source), stored.find_run(args.source)
    if of_run is not None:
        source, named = of_run
        if args.revision is not None or args.allow_pickle:
            raise UserError(f"{args.source}: is a run directory: --revision and --allow-pickle go with a model")
        if named and (name is not None or step is not None):
            raise UserError("names the model itself: --model and --step go with a run alone", at=args.source)
        if named:
            with within(args.source):
                name, step = parse(named)
    elif name is not None or step is not None:
        raise UserError(f"{args.source}: is not a run directory, so it has no --model or --step to choose")
    if args.out is not None:
        out = place(args.out)
    elif of_run is not None and name is not None:
        name, step, _ = choose(source, name, step)
        out = source / "models" / name / str(step)
    else:
        raise UserError("OUT is needed, or --push", at=args.source)
    _check_apart(source, out)
    check_replaceable(out.absolute(), args.force, MARKS)
    if of_run is not None:
        if args.out is None:
            out.parent.mkdir(parents=True, exist_ok=True)
        stored.export(source, out, name=name, step=step, **how)
    else:
        where = str(source) if source.is_dir() else args.source
        with devices.host():  # it need not fit into an accelerator
            model = load(where, revision=args.revision, allow_pickle=args.allow_pickle, strict=True, progress=True)
        save(model, out, **how)
    tell(f"wrote {out}")


def _check_apart(source: Path, out: Path) -> None:
    """An output may lie in a run directory, but not over what is read or among its checkpoints."""
    here, there = source.resolve(), out.resolve()
    if source.exists() and (here.is_relative_to(there) or there.is_relative_to(here / "checkpoints")):
        raise UserError(f"{out}: would overwrite what is read, {source}; choose another place")


if __name__ == "__main__":
    entry_point(main)
