"""Reading a model by the plainest means, for tests to compare with: safetensors' own reader, numpy, a loop."""

from pathlib import Path

import numpy as np
import safetensors.numpy
from flax import traverse_util

from jaxup.families.layouts import from_file
from jaxup.hub.reader import open_checkpoint
from jaxup.model.decoder import abstract
from jaxup.model.spec import flatten


def load_params(path, config, *, dtype=None):
    """All params as numpy arrays, in the tree of `abstract(config)`; a stack takes the widest dtype of its layers."""
    stored = {}
    for file in Path(path).glob("*.safetensors"):
        stored |= safetensors.numpy.load_file(file)
    leaves = {p: np.zeros(leaf.shape, np.float32) for p, leaf in flatten(abstract(config)[1]).items()}
    dtypes = {}
    for tensor, _ in open_checkpoint(path).tensors:
        array = stored.get(tensor.name)
        if array is None:  # GPT-2's own files leave the prefix out
            array = stored[tensor.name.removeprefix("transformer.")]
        for p, part in zip(tensor.paths, from_file(tensor, array), strict=True):
            dtypes[p] = np.promote_types(dtypes.get(p, array.dtype), array.dtype)
            leaves[p][... if tensor.layer is None else tensor.layer] = part
    # float32 holds the other two exactly.
    return traverse_util.unflatten_dict({p: leaf.astype(dtype or dtypes[p]) for p, leaf in leaves.items()}, sep=".")
