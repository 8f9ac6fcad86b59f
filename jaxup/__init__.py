"""jaxup: change the depth of a language model and train the result, in JAX.

Importing the package imports nothing heavy; jax and friends load where they are used.
"""

from jaxup.errors import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "__version__"]
