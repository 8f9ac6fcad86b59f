"""What a run's data is to be."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    files: str  # "a.jsonl*2,b.parquet": what `sources.py` knows, with weights; "docstrings": see docstrings.py
    tokenizer: str = ""  # a Hugging Face directory or id; of a corpus also bpe:N (trained on it), ids:N; "" = given
    layout: str = ""  # one of layouts.LAYOUTS; "" = text of a corpus, else detected, for each file
    format: str = ""  # one of chat_formats; "" = the tokenizer's own chat template
    history: str = ""  # of a template that rewrites earlier turns: "" = refuse, "last" | "each", see open_format
    strict: bool = False  # what is only warned of, of a format, is an error
    packing: str  # one of rows.PACKINGS: how examples become rows
    seq_len: int  # tokens of a row; what is packed and longer is dropped
    val_files: str = ""  # "" = a part of `files`: of a corpus the split it has, else val_fraction
    val_fraction: float  # of the examples of `files`; decides nothing beside val_files
    on_bad: str = "error"  # "error" | "skip": a row that is not of its layout, or that the format cannot express
    fraction: float = 1.0  # of the training rows, chosen at random; 1.0 = all
    tokens: int = 0  # training tokens, in whole rows chosen like those of a fraction; 0 = all
    isolate_documents: bool = True  # attention and loss do not cross from one example into the next
    store: str = ""  # directory of the rows, local or gs://; "" = one under `root` named after its contents
    seed: int = 0  # of weights' choice of rows, of a split drawn at random and of the order of packed rows
    phases: str = ""  # one of phases.PHASES: rows that are seen one kind after the other; "" = all mixed
    replay: float = 0.01  # of phases: the share of the rows of those before that is seen again in each pass over one
    passes: int = 1  # over a phase before the next
    tokenizer_files: str = ""  # where the files of `tokenizer` lie, if its name does not say

    @property
    def key(self) -> str:
        """What configurations call `files`."""
        return "source" if self.packing == "concatenated" else "files"
