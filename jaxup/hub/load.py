"""`jaxup.load`: a Hugging Face model, from wherever it lies, as a Decoder on whatever devices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flax import nnx

from jaxup.hub import reader
from jaxup.model.config import Compute
from jaxup.model.decoder import Decoder, abstract


def load(path_or_id: str, *, dtype: str | None = None, strict: bool = False, progress: bool = False) -> Decoder:
    config = reader.load_config(path_or_id)
    params = reader.load_params(path_or_id, config, dtype=None if dtype is None else np.dtype(dtype))
    return nnx.merge(abstract(config, Compute())[0], params)


def tokenizer_directory(path_or_id: str, *, revision: str | None = None) -> Path:
    """A local directory with the model's tokenizer and chat template files."""
    return Path(path_or_id)
