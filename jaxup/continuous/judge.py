"""What drawn pictures are worth, by what is known of real ones. Nothing here is trained on what a model drew.

Shape suffixes: N pictures, D features, F frames, K samples of one prompt.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxup.continuous.builtin import CELL
from jaxup.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """A classifier of real pictures. What it says of drawn ones is worth no more than `accuracy` on real ones.

    Attributes:
      accuracy: the share of unseen real pictures whose class it finds; reported beside whatever it says.
    """

    _classifier: Any
    accuracy: float

    def classify(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W] or [N, H, W, 3] -> int [N]."""
        return self._classifier.predict(_flat(pictures))

    def share(self, pictures: np.ndarray, labels: np.ndarray) -> float:
        """Of pictures that it takes for what they were drawn for, int [N]."""
        return float((self.classify(pictures) == labels).mean())

    def features(self, pictures: np.ndarray) -> np.ndarray:
        """float64 [N, D]: for each class how far inside of its boundary a picture lies."""
        return np.asarray(self._classifier.decision_function(_flat(pictures)), np.float64).reshape(len(pictures), -1)


def judge(seen: np.ndarray, labels: np.ndarray, unseen: np.ndarray, unseen_labels: np.ndarray) -> Judge:
    """A support vector machine (scikit-learn's SVC) of real pictures, uint8 [N, H, W] or [N, H, W, 3]; int [N].

    UserError if scikit-learn is missing, or if there is but one class.
    """
    try:
        from sklearn.svm import SVC
    except ImportError:
        raise UserError('judging needs scikit-learn; pip install "jaxup[vision]"') from None
    if len(np.unique(labels)) < 2:
        raise UserError("pictures of one class: there is nothing to tell apart")
    classifier = SVC(C=10.0, gamma="scale", decision_function_shape="ovr").fit(_flat(seen), labels)
    return Judge(classifier, float((classifier.predict(_flat(unseen)) == unseen_labels).mean()))


def _flat(pictures: np.ndarray) -> np.ndarray:
    return np.asarray(pictures, np.float64).reshape(len(pictures), -1) / 255


def frechet(first_ND: np.ndarray, second_ND: np.ndarray) -> float:
    """The Frechet distance of two Gaussians with the means and covariances of features (Heusel et al. 2017).

    It depends on how many there are: compare only what has been measured with as many, and the real pictures' own,
    one half against the other, is the least that can be expected.
    """
    first, second = (np.asarray(x, np.float64) for x in (first_ND, second_ND))
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise UserError(f"features of {list(first.shape)} and {list(second.shape)} have no such distance")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise UserError("features that are not finite have no such distance")
    one, two = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (first, second))
    # The roots of the eigenvalues of one @ two, which sqrt(one) @ two @ sqrt(one) has too, and that is symmetric.
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ two @ root), 0)).sum()
    apart = first.mean(0) - second.mean(0)
    return float(max(0.0, apart @ apart + np.trace(one) + np.trace(two) - 2 * shared))


def alike(labels: np.ndarray, among: np.ndarray) -> np.ndarray:
    """int [N], int [M] -> int [N]: for each label the place of one in `among` that is the same, each time another one.

    A distance between sets of which one has other classes is that of the classes, too.
    """
    index = np.zeros(len(labels), int)
    for label in np.unique(labels):
        index[labels == label] = np.resize(np.flatnonzero(among == label), int((labels == label).sum()))
    return index


def cosine(values: np.ndarray, real: np.ndarray, which: np.ndarray) -> float:
    """The mean cosine of drawn tokens to those at the same places of real pictures; NaN of no pairs.

    Args:
      values: [N, ..., C].
      real: [M, ..., C].
      which: bool [N, M], the pairs that count.
    """
    shares = []
    for each in (values, real):
        tokens = np.asarray(each, np.float64).reshape(len(each), -1, np.shape(each)[-1])
        lengths = np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), 1e-9)
        shares.append((tokens / lengths).reshape(len(each), -1))
    cosines = shares[0] @ shares[1].T / (values[0].size // values.shape[-1])
    return float(cosines[which].mean()) if which.any() else float("nan")


def diversity(samples: np.ndarray) -> float:
    """The mean distance of two samples of one prompt, [K, ...], as the root of the mean squared difference; 0: one."""
    flat = np.asarray(samples, np.float64).reshape(len(samples), -1)
    if len(flat) < 2:
        raise UserError(f"{len(flat)} samples of a prompt cannot differ")
    pairs = [np.sqrt(((a - b) ** 2).mean()) for n, a in enumerate(flat) for b in flat[n + 1 :]]
    return float(np.mean(pairs))


def position_error(clips: np.ndarray, paths: np.ndarray) -> np.ndarray:
    """How many pixels each frame of a clip is from where its first frame and the prompt say.

    Args:
      clips: uint8 [N, F, H, W].
      paths: [N, F, 2], (rows, columns) that a frame should be from the first, as `Pictures.paths`.

    Returns: float64 [N, F], of which the first is 0. A frame that is black is at no place: it counts as half the
    diagonal, which is how far the middle is from a corner.
    """
    clips = np.asarray(clips, np.float64)
    height, width = clips.shape[-2:]
    mass = clips.sum((-1, -2))
    with np.errstate(invalid="ignore", divide="ignore"):
        rows = (clips.sum(-1) @ np.arange(height)) / mass
        columns = (clips.sum(-2) @ np.arange(width)) / mass
    places = np.stack([rows, columns], -1)
    error = np.linalg.norm(places - places[:, :1] - paths, axis=-1)
    return np.where(np.isnan(error), np.hypot(height, width) / 2, error)


def valid_textures(pictures: np.ndarray) -> tuple[float, float]:
    """Of textures as `xor` has them, uint8 [N, H, W]: the share of pairs of cells of which exactly one is bright, and
    the share of pictures in which all are. Cells drawn independently come to a half, and to 2 ** -(number of pairs)."""
    count, height, width = pictures.shape
    cells = np.asarray(pictures, np.float64).reshape(count, height // CELL, CELL, width // CELL, CELL).mean((2, 4))
    bright = cells > 127.5
    valid = bright[:, :, 0::2] != bright[:, :, 1::2]
    return float(valid.mean()), float(valid.all((1, 2)).mean())
