"""Kinds of experiments: one file each, which `experiment` in a configuration names.

To add a kind: a file here with an `Experiment`, a line in KINDS, and a configuration that begins with
`defaults("KIND")`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from jaxup.errors import UserError, suggest

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from jaxup.experiments.common import Experiment

KINDS = {  # where the class is: naming the kinds imports none of them
    "audit": "audit.Audit",
    "continuous": "continuous.Continuous",
    "heal": "heal.Heal",
    "inherit": "inherit.Inherit",
    "learn": "learn.Learn",
    "pretrain": "pretrain.Pretrain",
}

# What a loss is the mean over.
UNITS = {
    "audit": "token of neutral documents", "continuous": "token of text, and the head's loss of a value",
    "heal": "loss token", "inherit": "token", "learn": "token of the test problems' solutions", "pretrain": "token",
}  # fmt: skip


def kind_of(config: ConfigDict) -> type[Experiment]:
    """The class that carries the configuration out; UserError if it names none, or lacks a section that it needs."""
    kind = config.get("experiment", "")
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}{suggest(kind, KINDS)}", at="experiment")
    module, _, name = KINDS[kind].partition(".")
    found = getattr(importlib.import_module(f"jaxup.experiments.{module}"), name)
    for section in found.sections:
        if section not in config:
            raise UserError(f"{kind!r} needs the section {section!r}, which is not there", at="experiment")
    return found
