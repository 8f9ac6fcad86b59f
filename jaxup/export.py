"""Write a model as a Hugging Face model directory: `python -m jaxup.export RUN OUT`.

RUN is a run directory, finished or not, of which the newest checkpoint of the last target or the
healed model is taken (or another: --model, --step); or a Hugging Face model, directory or id, which is written again in
another dtype or other shards. Nothing is at OUT until all of it is there.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxup.errors import Parser, UserError, entry_point, suggest

if TYPE_CHECKING:
    from jaxup.depth.plan import DepthPlan
    from jaxup.model.config import ModelConfig
    from jaxup.model.decoder import Params


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m jaxup.export", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("source", metavar="RUN", help="run directory, or Hugging Face model directory or id")
    parser.add_argument("out", metavar="OUT", help="directory to be made")
    parser.add_argument("--model", metavar="NAME", help="of the run: reference, target_3, before, healed, control, ... "
                        "(default: the last target, or what was healed)")  # fmt: skip
    parser.add_argument("--step", type=int, metavar="N", help="of the model's checkpoints (default: the newest)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the tensors (default: as is)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file (default: 5GB)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it holds a model")
    parser.add_argument("--revision", help="of a Hub id: branch, tag or commit")
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin if there is nothing better")
    return parser.parse_args(argv[1:])


def main(argv: list[str]) -> None:
    args = parse_args(argv)

    from jaxup.files.shards import parse_size
    from jaxup.files.staging import check_replaceable
    from jaxup.hub.directory import MARKS

    # All that can be known to fail is looked at before the model is read.
    size = parse_size(args.max_shard_size)
    source, out = Path(args.source).expanduser(), Path(args.out).expanduser()
    _check_apart(source, out)
    check_replaceable(Path(os.path.abspath(out)), args.force, MARKS)
    options = {"dtype": args.dtype, "max_shard_size": size, "force": args.force, "progress": True}
    if _is_run(source):
        export_run(source, out, name=args.model, step=args.step, **options)
    elif args.model is not None or args.step is not None:
        raise UserError(f"{args.source}: is not a run directory, so it has no --model or --step to choose")
    else:
        where = str(source) if source.is_dir() else args.source
        rewrite(where, out, revision=args.revision, allow_pickle=args.allow_pickle, **options)
    print(f"wrote {out}", flush=True)


def _check_apart(source: Path, out: Path) -> None:
    """An output may lie in a run directory, but not over what is read or among its checkpoints."""
    here, there = source.resolve(), out.resolve()
    if not source.exists():
        return
    if here.is_relative_to(there) or there.is_relative_to(here / "checkpoints"):
        raise UserError(f"{out}: would overwrite what is read, {source}; choose another place")


def _is_run(source: Path) -> bool:
    if (source / "checkpoints").is_dir():
        return True
    if source.is_dir() and not (source / "config.json").exists():
        raise UserError(f"{source}: neither a run directory nor a model: it has no config.json")
    if not source.exists() and re.match(r"[/.~]", str(source)):
        raise UserError(f"{source}: no such run or model directory")
    from jaxup.text import read_json

    config = read_json(source / "config.json") if source.is_dir() else None
    if isinstance(config, dict) and "model_type" not in config:
        raise UserError(f"{source}: this run has no checkpoints yet")
    return False


# ---- a run's checkpoint


class _Trained(NamedTuple):
    """What `checkpoints/NAME/model.json` holds."""

    model: ModelConfig
    store: str  # of the tokens, with the tokenizer
    plan: DepthPlan | None
    dtypes: dict[str, str] | None  # by path; None: all are float32
    healed: dict[str, Any] | None  # of a model of whose parameters some trained: the rest, and which


def export_run(run: Path, out: Path, *, name: str | None, step: int | None, dtype: str | None, **options: Any) -> None:
    from jaxup.hub import writer
    from jaxup.hub.card import model_card
    from jaxup.hub.directory import PLAN

    steps = _checkpoints(run)
    if name is None:
        targets = sorted((n for n in steps if re.fullmatch(r"target_\d+", n)), key=lambda n: int(n[7:]))
        name = next(iter([*targets[-1:], *(n for n in steps if n == "healed")]), None)
        if name is None:
            raise UserError(f"{run}: no target yet; choose with --model among {', '.join(steps)}")
    elif name not in steps:
        raise UserError(f"{run}: no checkpoints of a model {name!r}{suggest(name, steps)}")
    if step is None:
        step = max(steps[name])
    elif step not in steps[name]:
        raise UserError(f"{run}: no checkpoint of {name} at step {step}; there are {', '.join(map(str, steps[name]))}")
    trained = _read_about(run, name)
    if trained.healed is None:
        params = _restore(run / "checkpoints" / name / str(step), _abstract(trained))
    else:
        params = _restore_healed(run, name, step, trained)
    source = f"{name} at step {step} of the run {run.resolve().name}"
    card = model_card(
        trained.model, title=out.name, dtype=dtype or writer.main_dtype(params), plan=trained.plan, source=source
    )
    extra = {} if trained.plan is None else {PLAN: trained.plan.to_yaml()}
    writer.save(
        out,
        trained.model,
        params,
        dtype=dtype,
        card=card,
        extra_files=extra,
        **_vocabulary(run, trained.store),
        **options,
    )


def _restore_healed(run: Path, name: str, step: int, trained: _Trained) -> Params:
    """What trained, in the place it has in the model before healing."""
    import jax
    import numpy as np

    from jaxup.model.config import Compute
    from jaxup.model.decoder import abstract
    from jaxup.training.heal import TrainConfig, put_together, select
    from jaxup.training.lora import LoraConfig

    about = trained.healed
    selection = select(
        trained.model, trained.plan, TrainConfig(**about["train"]), LoraConfig(**about["lora"]), compute=Compute(),
        seed=about["seed"],
    )  # fmt: skip
    wanted = abstract(trained.model)[1]
    if selection.partition is not None:
        wanted = jax.eval_shape(selection.partition.split, wanted)[0]
    before = about["before"]
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # it need not fit into an accelerator
        params = put_together(
            selection,
            _restore(run / "checkpoints" / name / str(step), wanted),
            _restore(run / "checkpoints" / before / "0", _abstract(_read_about(run, before))),
        )
        return jax.tree.map(np.asarray, params)


def _checkpoints(run: Path) -> dict[str, list[int]]:
    """The steps of every model that has a checkpoint. What Orbax has not finished has another name."""
    found = {}
    for directory in sorted((run / "checkpoints").iterdir()):
        steps = sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal() and path.is_dir())
        if steps:
            found[directory.name] = steps
    if not found:
        raise UserError(f"{run}: this run has no checkpoints yet")
    return found


def _read_about(run: Path, name: str) -> _Trained:
    from jaxup.depth.plan import DepthPlan
    from jaxup.model.config import ModelConfig
    from jaxup.text import read_json

    path = run / "checkpoints" / name / "model.json"
    about = read_json(path)
    if about is None:
        raise UserError(f"{path}: is not there; the command that made the run writes it when it is given again")
    try:
        model = ModelConfig.from_dict(about["model"])
        plan = DepthPlan.from_yaml(about["plan"]) if about["plan"] else None
        healed = about if "before" in about else None
        return _Trained(model, str(about["store"]), plan, about.get("dtypes"), healed)
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{path}: not what this version of jaxup writes: {error}") from None


def _abstract(trained: _Trained) -> Params:
    """The model's params as ShapeDtypeStructs, in the dtypes they are stored in."""
    import jax

    from jaxup.model.decoder import abstract
    from jaxup.model.spec import flatten, unflatten

    shapes = flatten(abstract(trained.model)[1])
    dtypes = trained.dtypes or {}
    return unflatten(
        {path: jax.ShapeDtypeStruct(leaf.shape, dtypes.get(path, "float32")) for path, leaf in shapes.items()}
    )


def _restore(path: Path, wanted: Params) -> Params:
    """Params like `wanted` as numpy arrays: no device is needed, however many the run had. The run may be going on."""
    import logging

    import jax
    import numpy as np
    from orbax.checkpoint import v1 as ocp

    from jaxup.training.checkpoint import restoring

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports its internals
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    arrays = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), wanted)
    with context, restoring(str(path), "choose another --step"):
        return ocp.load(path.resolve(), {"params": arrays})["params"]


def _vocabulary(run: Path, store: str) -> dict[str, Any]:
    """What `writer.save` needs of the finished run's export, which moves with it; else of the store that it reads."""
    from jaxup.data.store import META, Store
    from jaxup.hub.directory import carried_files
    from jaxup.text import read_json

    if (config := read_json(run / "export" / "config.json")) is not None:
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
        return {"carried": carried_files(run / "export"), "hf_extra": ids, "model_type": config["model_type"]}
    if "://" not in store and not Path(store).is_dir():
        raise UserError(f"{run}: its tokenizer is gone with its token store {store}")
    opened = Store(store)
    meta = opened.read_json(META)
    if meta is None:
        raise UserError(f"{run}: its token store {store} is not complete, so there is no tokenizer")
    return {"tokenizer": opened.load_tokenizer(meta["tokenizer"]["hash"])}


# ---- a Hugging Face model


def rewrite(source: str, out: Path, *, revision: str | None, allow_pickle: bool, **options: Any) -> None:
    import jax

    from jaxup.hub.load import load
    from jaxup.hub.save import save

    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # it need not fit into an accelerator
        model = load(source, revision=revision, allow_pickle=allow_pickle, strict=True, progress=True)
    save(model, out, **options)


def cli() -> None:
    entry_point(main)


if __name__ == "__main__":
    cli()
