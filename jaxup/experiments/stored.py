"""The models of a run, or a model, as a name says; and a model of a run exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxup.continuous import files
from jaxup.data.store import Store
from jaxup.data.tokenizer import load_tokenizer
from jaxup.errors import UserError
from jaxup.experiments.lineage import lineage
from jaxup.files.bucket import place
from jaxup.files.names import split_run
from jaxup.hub.directory import TOKEN_IDS, carried_files
from jaxup.hub.save import write_model
from jaxup.learning.verifier import left_out
from jaxup.model.spec import without_beside
from jaxup.progress import say
from jaxup.text import read_json
from jaxup.training.rundir import TOKENIZER
from jaxup.training.stored import choose, restore


def find_run(source: str) -> tuple[Path, str] | None:
    """The run that RUN or RUN@NAME/STEP names, and NAME/STEP; None for a model. UserError if it can be neither."""
    if found := split_run(source):
        return found
    path = place(source)
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"{source}: neither a run directory nor a model: it has no config.json")
    config = read_json(path / "config.json", {}, "put it back") if path.is_dir() else None
    if config is not None and "model_type" not in config:
        raise UserError(f"{source}: this run has no checkpoints yet")
    return None


def export(
    run: Path, out: Path, *, name: str | None = None, step: int | None = None, dtype: str | None = None, **how: Any
) -> None:
    """Writes a model of the run as a Hugging Face directory; see `jaxup.hub.writer.save` for `how`.

    Args:
      name: of the model; None = the one that the run is for.
      step: of its checkpoint; None = the newest.
      dtype: of the tensors; None = as they are.
    """
    name, step, stored = choose(run, name, step)
    params, beside = restore(run, name, step, stored), {}
    if said := left_out(stored.model):
        say(said)
    elif stored.model.beside:
        beside = files.contents(files.of_run(run), params["beside"])
    write_model(
        out, stored.model.alone(), without_beside(params), title=out.name, plan=stored.plan, dtype=dtype,
        falls_back=True, extra_files=beside, source=f"{name} at step {step} of the run {run.resolve().name}",
        **vocabulary(run, stored.store), **how,
        **lineage(run, name, step, kind=stored.kind, plan=stored.plan, healed=stored.healed and _part(stored.healed)),
    )  # fmt: skip


def vocabulary(run: Path, store: str) -> dict[str, Any]:
    """What `writer.save` needs of the finished run's export, which moves with it; else of the store that it reads."""
    exported = run / "export"
    if (config := read_json(exported / "config.json", {"model_type": str}, f"remove {exported}")) is not None:
        ids = {key: config[key] for key in TOKEN_IDS if key in config}
        return {"carried": carried_files(exported), "hf_extra": ids, "model_type": config["model_type"]}
    if (run / TOKENIZER).is_dir():
        return {"tokenizer": load_tokenizer(str(run / TOKENIZER))}
    if "://" not in store and not Path(store).is_dir():
        raise UserError(f"{run}: its tokenizer is gone with its token store {store}")
    opened = Store(store)
    meta = opened.complete_meta()
    if meta is None:
        raise UserError(f"{run}: its token store {store} is not complete, so there is no tokenizer")
    return {"tokenizer": opened.load_tokenizer(meta["tokenizer"]["hash"])}


def _part(healed: dict[str, Any]) -> dict[str, Any]:
    return {key: healed[key] for key in ("train", "lora")}
