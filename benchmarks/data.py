"""Preparing data: conversations to packed rows beside TRL's own preparation, and a corpus in bounded memory.

    python benchmarks/data.py [--chats 20000] [--corpus-mib 256] [--peer DIR]

Each contestant is a process of its own, which begins with a JSONL file and ends with packed rows on disk. TRL
(`pip install trl`, or unpacked in the directory --peer) does what `SFTTrainer` does before it trains: the chat template
with the mask of the assistant's tokens, and best-fit packing, by `datasets.map` with a process for each core. Ratios
are of what was measured in one run, times of the wall without imports; memory is the largest resident set of any of a
contestant's processes. The results of both are compared: the same tokens, and as many of them trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SEQ_LEN = 2048
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def words() -> list[str]:
    """Of the docstrings of Python's library, as often as they occur."""
    from jaxup.data.docstrings import question_answers
    from jaxup.data.sources import library

    return " ".join(answer for _, answer in question_answers(library())).split()


def write_chats(path: Path, count: int) -> None:
    """Of 2 to 8 turns, of a few to some hundred words each."""
    rng, vocabulary = random.Random(0), words()
    with path.open("w") as file:
        for _ in range(count):
            turns = [turn for _ in range(rng.randint(1, 4)) for turn in (("user", 3.0), ("assistant", 4.3))]
            lengths = [min(120, 1 + int(rng.lognormvariate(mu, 0.8))) for _, mu in turns]
            said = [
                {"role": role, "content": " ".join(rng.choices(vocabulary, k=length))}
                for (role, _), length in zip(turns, lengths)
            ]
            file.write(json.dumps({"messages": said}) + "\n")


def write_corpus(path: Path, mib: int) -> None:
    rng, vocabulary = random.Random(0), words()
    with path.open("w") as file:
        while file.tell() < mib << 20:
            for _ in range(200):
                file.write(json.dumps({"text": " ".join(rng.choices(vocabulary, k=rng.randint(50, 1500)))}) + "\n")


def tokenizer(directory: Path) -> Any:
    from jaxup.data.tokenizer import train_bpe

    made = train_bpe(words(), 8192)
    made.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = TEMPLATE
    made.save_pretrained(directory)


def jaxup_chats(a: argparse.Namespace) -> dict[str, Any]:
    from jaxup.data.config import DataConfig
    from jaxup.data.open import open_data
    from jaxup.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(f"{a.scratch}/tokenizer")
    started = time.monotonic()
    data = open_data(
        DataConfig(files=f"{a.scratch}/chats.jsonl", packing="best_fit", seq_len=SEQ_LEN, val_fraction=0.01),
        root=f"{a.scratch}/jaxup", tokenizer=tokenizer,
    )  # fmt: skip
    seconds, parts = time.monotonic() - started, [data.statistics[split] for split in ("train", "validation")]
    return {"seconds": seconds, **{of: sum(part[of] for part in parts) for of in ("tokens", "loss_tokens", "rows")}}


def trl_chats(a: argparse.Namespace) -> dict[str, Any]:
    sys.path.insert(0, a.peer)
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(f"{a.scratch}/tokenizer")
    config = SFTConfig(
        output_dir=f"{a.scratch}/trl", max_length=SEQ_LEN, packing=True, assistant_only_loss=True,
        dataset_num_proc=os.cpu_count(), use_cpu=True, bf16=False, report_to="none",
    )  # fmt: skip
    trainer = object.__new__(SFTTrainer)  # its preparation needs these of the trainer, and no model
    trainer._tokenizer, trainer.chat_template, trainer.completion_only_loss = tokenizer, TEMPLATE, False
    started = time.monotonic()
    data = datasets.load_dataset(
        "json", data_files=f"{a.scratch}/chats.jsonl", split="train", cache_dir=f"{a.scratch}/cache"
    )
    packed = trainer._prepare_dataset(data, tokenizer, config, True, None, "train")
    packed.save_to_disk(f"{a.scratch}/trl-packed")
    seconds = time.monotonic() - started
    tokens = sum(len(row) for row in packed["input_ids"])
    trained = sum(sum(label != -100 for label in row) for row in packed["labels"])
    return {"seconds": seconds, "tokens": tokens, "loss_tokens": trained, "rows": len(packed)}


def jaxup_corpus(a: argparse.Namespace) -> dict[str, Any]:
    from jaxup.data.config import DataConfig
    from jaxup.data.open import open_data

    started = time.monotonic()
    data = open_data(
        DataConfig(
            files=f"{a.scratch}/corpus.jsonl", tokenizer=f"{a.scratch}/tokenizer", packing="concatenated", seq_len=1024,
            val_fraction=0.01,
        ),
        root=f"{a.scratch}/jaxup",
    )  # fmt: skip
    return {"seconds": time.monotonic() - started, "tokens": data.statistics["train"]["tokens"]}


CONTESTANTS = {"jaxup": jaxup_chats, "TRL": trl_chats, "corpus": jaxup_corpus}


def contestant(a: argparse.Namespace, name: str) -> dict[str, Any]:
    """What it answers, and its "cpu" seconds and "mib"."""
    again = [f"--scratch={a.scratch}", f"--peer={a.peer}", f"--worker={name}"]
    done = subprocess.run([sys.executable, __file__, *again], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=20_000)
    parser.add_argument("--corpus-mib", type=int, default=256, help="0: no corpus")
    parser.add_argument("--peer", default="", help="a directory with trl and accelerate, if they are not installed")
    parser.add_argument("--scratch", default="", help=argparse.SUPPRESS)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        answer = CONTESTANTS[a.worker](a)
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        answer["cpu"], answer["mib"] = sum(u.ru_utime + u.ru_stime for u in used), max(u.ru_maxrss for u in used) >> 10
        print(json.dumps(answer))
        return
    with tempfile.TemporaryDirectory() as scratch:
        a.scratch = scratch
        tokenizer(Path(scratch, "tokenizer"))
        if a.chats:
            write_chats(Path(scratch, "chats.jsonl"), a.chats)
            results = {name: contestant(a, name) for name in ("TRL", "jaxup")}
            for name, of in results.items():
                print(
                    f"{name:>6}: {a.chats / of['seconds']:8,.0f} conversations/s  {of['mib']:6,} MiB  "
                    f"{of['tokens']:,} tokens, {of['loss_tokens']:,} with a loss, {of['rows']:,} rows of {SEQ_LEN}"
                )
            ratio = {of: results["TRL"][of] / results["jaxup"][of] for of in ("seconds", "mib")}
            print(f"jaxup is {ratio['seconds']:.2f} times as fast as TRL, in 1/{ratio['mib']:.1f} of its memory")
        if a.corpus_mib:
            write_corpus(Path(scratch, "corpus.jsonl"), a.corpus_mib)
            of = contestant(a, "corpus")
            print(
                f"corpus: {a.corpus_mib} MiB, {of['tokens']:,} tokens in {of['seconds']:.1f} s, on {os.cpu_count()} "
                f"cores ({of['cpu'] / of['seconds']:.1f} in use): {a.corpus_mib / of['seconds']:.1f} MiB/s, "
                f"{of['mib']:,} MiB of memory"
            )


if __name__ == "__main__":
    main()
