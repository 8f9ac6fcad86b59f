"""What is trained on, before a layout packs it: text, and the continuous tokens of an image or a clip.

Shape suffixes: P tokens of a prompt, A tokens of an answer, F frames, N continuous tokens of a frame, each of
C channels.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

Kind = Literal["draw", "tell", "text"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One example. What is learned is what comes last: the values of "draw", the answer of "tell" and "text".

    Args:
      kind: "draw": `prompt`, then the image; "tell": the image and the question `prompt`, then `answer`; "text":
        `answer` alone.
      prompt: int32 [P].
      values: float32 [N, C] of an image, [F, N, C] of a clip, of unit deviation; None of text.
      answer: int32 [A].
    """

    kind: Kind
    prompt: np.ndarray
    values: np.ndarray | None
    answer: np.ndarray
