"""Healing: train a model of another depth, or any part of it, on chat data, and compare with what it was made of."""

from __future__ import annotations

from collections.abc import Sequence

from jaxup.data.chat_formats import end_ids, prompt_ids
from jaxup.data.open import Data, check_config, check_files, no_data, open_data
from jaxup.experiments import report
from jaxup.experiments.common import chats
from jaxup.experiments.on_base import OnBase
from jaxup.training.run import Result

HEALED = "healed"


class Heal(OnBase):
    sections = ("base", "pretrain", "heal", "train", "lora", "export")
    scored = made = HEALED
    data: Data
    control = "heal.control"

    def _read_sections(self) -> None:
        self._chat = chats(self._config.data, epochs=self._config.epochs)
        check_config(self._chat)

    def open_data(self, root: str) -> None:
        c = self._config
        if self._recipe is None:
            check_files(self._chat, root)  # before a vocabulary is trained
        tokenizer = self._open_base(root)
        assert tokenizer is not None  # a base that is healed is never of random values
        self.data = open_data(self._chat, tokenizer=tokenizer, root=root, vocab_size=self._model.vocab_size)
        self._count_steps()
        tokenizer = self.data.tokenizer
        tokenizer.chat_template = self.data.chat_template or tokenizer.chat_template
        if tokenizer.chat_template:
            self._ends, prompt = end_ids(c.data.format or None, tokenizer), prompt_ids(tokenizer, c.sample.prompt)
        else:  # of plain text and segments
            self._ends, prompt = (tokenizer.eos_token_id,), tokenizer(c.sample.prompt)["input_ids"]
        self.sample = self._sampler(prompt, self._ends)
        self._vocabulary = self._vocabulary_files(self.data.chat_template if self._chat.format else None)
        self.inputs = self._read_inputs()

    def without_data(self) -> None:
        self._base_without_data()
        self.data = no_data(self._chat)
        self._assume_steps()

    def _finding(self, results: Sequence[Result], unit: str) -> str:
        return report.healed(results, unit)
