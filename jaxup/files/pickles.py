"""Weights in PyTorch's own format, read only when asked for: a pickle can hold more than tensors.

`torch.load(weights_only=True)` builds tensors and plain containers and nothing else; before torch
2.10 there were ways around it, so older ones are refused.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jaxup.errors import UserError, first_line
from jaxup.files.header import TensorInfo
from jaxup.files.storage import Local, Storage

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_NAMES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


def load(storage: Storage, file: str) -> tuple[dict[str, TensorInfo], dict[str, np.ndarray]]:
    """The tensors of one file: what they are, and the arrays, by `TensorInfo.file`, which is the tensor's name."""
    if not isinstance(storage, Local):
        raise UserError(f"{storage.name}: {file}: pickles are read from local directories and the Hub only")
    try:
        import torch
    except ImportError:
        raise UserError(f"{storage.name}: {file}: reading a pickle needs PyTorch: pip install torch") from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        raise UserError(f"{storage.name}: {file}: reading a pickle safely needs torch >= 2.10, not {torch.__version__}")
    path = storage.path(file)
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format of torch before 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, EOFError, RuntimeError, ...: whatever a hostile file provokes
        raise UserError(f"{storage.name}: {file} cannot be read as tensors only: {first_line(error)[:200]}") from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise UserError(f"{storage.name}: {file} is not a dict of tensors")
    infos, arrays = {}, {}
    for name, value in state.items():
        dtype = _NAMES.get(str(value.dtype), str(value.dtype))
        infos[name] = TensorInfo(name, dtype, tuple(value.shape), 0)
        if dtype == "BF16":
            arrays[name] = value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        elif dtype in _NAMES.values():
            arrays[name] = value.contiguous().numpy()
    return infos, arrays
