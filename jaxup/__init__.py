"""jaxup: change the depth of a language model and train the result, in JAX.

Importing the package imports nothing heavy; jax and friends load where they are used.

    model = jaxup.load("mistralai/Mistral-7B-v0.3", dtype="bfloat16")   # a directory, Hub id or URL
    logits = jax.jit(lambda model, tokens: model(tokens))(model, tokens)   # int32 [batch, seq] -> [batch, seq, vocab]
    jaxup.save(model, "out")                                            # what transformers loads
"""

from typing import TYPE_CHECKING

from jaxup.errors import UserError

if TYPE_CHECKING:
    from jaxup.hub.load import load
    from jaxup.hub.save import save

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "load", "save"]


def __getattr__(name: str):
    if name == "load":
        from jaxup.hub.load import load

        return load
    if name == "save":
        from jaxup.hub.save import save

        return save
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
