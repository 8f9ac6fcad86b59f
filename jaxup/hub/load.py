"""`jaxup.load`: a Hugging Face model, from wherever it lies, through a plan, onto whatever devices."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from jaxup.depth.apply import add_noise
from jaxup.depth.materials import materials
from jaxup.depth.plan import DepthPlan
from jaxup.depth.recipes import identity
from jaxup.depth.result import result_config
from jaxup.errors import UserError, suggest
from jaxup.hub import reader
from jaxup.hub.directory import TOKEN_IDS
from jaxup.hub.transfer import transfer
from jaxup.model.config import Compute, ModelConfig
from jaxup.model.decoder import Decoder, abstract, init
from jaxup.model.sharding import param_shardings
from jaxup.model.spec import flatten, spec, unflatten

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a loaded model came from: what saving it again needs to know."""

    path: str  # directory, URL or hub id; of several sources, the one with the embedding
    revision: str | None
    model_type: str  # transformers' name of the family
    token_ids: tuple[tuple[str, Any], ...]  # bos_token_id, eos_token_id, pad_token_id of config.json
    plan: DepthPlan | None

    @property
    def place(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    def whole(self, config: ModelConfig) -> DepthPlan:
        """The plan that makes the model: that of loading it, or all its layers as they are."""
        return self.plan or identity(self.place, config.num_layers)


def check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} cannot be loaded{suggest(dtype, DTYPES)}")


def load(
    path_or_id: str | os.PathLike | DepthPlan | Mapping[str, str | os.PathLike],
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    plan: DepthPlan | None = None,
    revision: str | None = None,
    strict: bool = False,
    allow_pickle: bool = False,
    progress: bool = False,
) -> Decoder:
    """The model of a directory, a run, a Hub id, or a gs://, s3:// or https:// directory.

    Calling the result on int32 tokens [batch, seq] gives logits [batch, seq, vocab]. It computes in
    bfloat16 if its params are bfloat16, else in float32. Of one that was taught to see and draw,
    `jaxup.load` without a plan puts back what was left beside it: `model.beside` and `model.task`.

    Args:
      path_or_id: a local directory if there is one, or RUN, RUN@NAME or RUN@NAME/STEP (of a run the
        export, or what `jaxup export` has put there of another model), else a Hub id, fetched through
        huggingface_hub's cache (HF_TOKEN and HF_HUB_OFFLINE hold). With a plan of several sources: a
        mapping from their names, or a plan in their place whose sources are named by where they are,
        as those of `jaxup.open_plan`. No code that lies beside a model is ever run.
      dtype: of the params: "float32", "bfloat16" or "float16". None keeps what is stored (layers
        stored in several dtypes take the one that holds them all).
      mesh: the params are laid out by `jaxup.model.sharding.RULES` over its axes "fsdp",
        "context" and "tensor". Every process of the mesh must call this. None: one device, `jax.default_device`.
      plan: which layers of the sources make up the result, applied while loading: what it drops is
        not read, what it repeats is read once. What it does not inherit is `init(config, seed 0)`.
      revision: branch, tag or commit of a Hub id.
      strict: NaN or infinite weights are an error instead of a warning.
      allow_pickle: read pytorch_model.bin if there is no safetensors file; needs torch >= 2.10.
      progress: show it on stderr.

    Raises:
      UserError: before anything is allocated, if the files are not exactly the model that config.json
        describes, or that is none. After reading, if a file is not the one that its jaxup manifest
        describes (looked at where one process loads a local directory).
    """
    check_dtype(dtype)
    if isinstance(path_or_id, DepthPlan):
        if plan is not None:
            raise UserError("load: two plans; give the models of the second")
        plan, path_or_id = path_or_id, {name: name for name, _ in path_or_id.sources}
    paths = _paths(path_or_id, plan)
    checkpoints = {
        name: reader.open_checkpoint(path, revision=revision, allow_pickle=allow_pickle) for name, path in paths.items()
    }
    configs, recorded = {name: checkpoint.config for name, checkpoint in checkpoints.items()}, plan
    if plan is None:
        [(name, config)] = configs.items()
        plan = identity(name, config.num_layers)
    config = result_config(plan, configs)
    if mesh is None:
        default = jax.config.jax_default_device  # type: ignore[attr-defined]  # jax adds its options at run time
        device = SingleDeviceSharding(default if isinstance(default, jax.Device) else jax.local_devices()[0])
        shardings = dict.fromkeys(spec(config), device)
    else:
        shardings = flatten(param_shardings(config, mesh))
    tied = {name: config.tie_embeddings for name, config in configs.items()}
    # What is loaded in another dtype is cast before it is scaled.
    stored = reader.stored_dtypes(checkpoints) if dtype is None else lambda *_: dtype
    bill = materials(plan, spec(config), tied, stored)
    leaves = transfer(bill, config, checkpoints, shardings, dtype, strict=strict, progress=progress)
    if any(row.noise for row in plan.rows):
        mix = lambda leaves: add_noise(bill, leaves, flatten(init(config, 0)))  # noqa: E731
        leaves = jax.jit(mix, donate_argnums=0, out_shardings=shardings)(leaves)
    compute = Compute(dtype="bfloat16" if leaves["embed_tokens"].dtype == jnp.bfloat16 else "float32")
    model = nnx.merge(abstract(config, compute)[0], unflatten(leaves))
    main = plan.embed_tokens if plan.embed_tokens is not None else next(iter(checkpoints))
    hf = checkpoints[main].hf
    ids = {key: hf[key] for key in TOKEN_IDS if key in hf}
    # Hashable, as all is that a compiled program may depend on.
    token_ids = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in ids.items())
    model.origin = Origin(str(paths[main]), revision, hf["model_type"], token_ids, recorded)
    return model


def _paths(path_or_id: Any, plan: DepthPlan | None) -> dict[str, str | os.PathLike]:
    """Source name -> path."""
    if isinstance(path_or_id, Mapping):
        if plan is None:
            raise UserError("load: several models make one only by a plan")
        for name, _ in plan.sources:
            if name not in path_or_id:
                raise UserError(f"load: the plan's source {name!r} is not given{suggest(name, path_or_id)}")
        return {name: path_or_id[name] for name, _ in plan.sources}
    if plan is None:
        return {str(path_or_id): path_or_id}
    if len(plan.sources) != 1:
        names = ", ".join(repr(name) for name, _ in plan.sources)
        raise UserError(f"load: the plan takes from {names}; give a mapping from these names to models")
    return {plan.sources[0][0]: path_or_id}
