"""Chat templates, rendered under limits of time and memory.

A template is a program that comes with a model from anywhere. transformers' sandbox keeps it from files and from
Python's insides, but lets it loop for ever and fill the memory, often in one call (`'a' * 10**12`, `'%999999999d'`)
that no signal handler of Python interrupts. So templates run in a process of their own, whose limits the kernel keeps.
One process serves all templates and conversations; after one that ended it, the next starts another.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxup.data.turns import NOTHING
from jaxup.errors import UserError, first_line
from jaxup.text import escaped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 5  # of processor time for one conversation
MEMORY = 2**29  # bytes, beside what the process has when it starts
TEXT = 2**20  # characters that a template may add, beside saying everything twice


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], trained: Sequence[bool] | None = None,
    options: Mapping[str, Any] = NOTHING,
) -> tuple[str, list[tuple[int, int]], list[str]]:  # fmt: skip
    """The conversation as the tokenizer's chat template spells it.

    Args:
      trained: of each message whether it is trained on; None: a reply is asked for (`add_generation_prompt`).
      options: what it is given besides: `tools`, `documents`, `chat_template_kwargs`.

    Returns:
      (the text, [start, end) of what is trained on in each of the messages that are, what is to be known of the
      template).

    Raises:
      UserError: there is no template, it refuses the messages, loses a part of what they say or goes beyond a limit,
        or what is trained on is unclear.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template")
    try:
        template = tokenizer.get_chat_template()
        if not isinstance(template, str):
            raise ValueError(f"must be text, not {type(template).__name__}")
    except ValueError as error:  # or there are several, and none of them is the default
        raise UserError(f"the tokenizer's chat template: {escaped(first_line(error))[:200]}") from None
    said = [{key: value for key, value in message.items() if value is not None} for message in messages]
    request = json.dumps([said, trained, dict(options)], default=str)  # such as a date of parquet's
    answer = renderer.ask(json.dumps([template, tokenizer.special_tokens_map]), request)
    if "error" in answer:
        raise UserError(answer["error"], hint=answer.get("hint", ""))
    return answer["text"], [(start, end) for start, end in answer["spans"]], answer["notes"]


class Renderer:
    """The process, as it is seen from here: each line of JSON that asks is answered by one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._template = ""  # that it was told last
        self._lock = threading.Lock()

    def ask(self, template: str, request: str) -> dict[str, Any]:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            process = self._process
            assert process is not None
            assert process.stdin is not None
            assert process.stdout is not None
            lines = [request] if template == self._template else [template, request]
            self._template = template
            try:
                with contextlib.suppress(BrokenPipeError):  # it has ended, and how is told below
                    process.stdin.write("".join(f"{line}\n" for line in lines).encode())
                    process.stdin.flush()
                answer = process.stdout.readline()
            except BaseException:  # a signal's: what comes would be taken for the answer to the next
                self.stop()
                raise
            if answer.endswith(b"\n"):
                return json.loads(answer)
            code = process.wait()
            self.stop()
        many = f"takes more than {SECONDS} s for one conversation"
        return {"error": f"the chat template {many if code == -signal.SIGPROF else f'ended its process ({code})'}"}

    def _start(self) -> None:
        self.stop()
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from jaxup.data.rendering import serve; serve({SECONDS}, {MEMORY})"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            start_new_session=True,  # Ctrl-C is for this process, which may want to go on
        )  # fmt: skip

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            with self._process:  # closes the pipes and waits
                self._process = None
        self._template = ""


renderer = Renderer()
atexit.register(renderer.stop)


def serve(seconds: float, memory: int) -> None:
    """The process itself, under these limits; it ends with the one that asks."""
    from jaxup.data.template_spans import Template, Unclear

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nobody else writes there
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    template = Template("", {})
    for line in sys.stdin.buffer:
        messages, *how = json.loads(line)
        if isinstance(messages, str):
            template = Template(messages, how[0])
            continue
        trained, options = how
        signal.setitimer(signal.ITIMER_PROF, seconds)  # the kernel ends the process by SIGPROF
        answer: dict[str, Any]
        try:
            if trained is None:
                answer = {"text": template.render(messages, options, asks=True), "spans": [], "notes": []}
            else:
                answer = dict(zip(("text", "spans"), template.spans(messages, trained, options)))
                answer["notes"] = template.notes
            if (length := len(answer["text"])) > TEXT + 2 * len(line):
                answer = {"error": f"the chat template makes {length:,} characters of {len(line):,}"}
        except Unclear as error:
            answer = {"error": str(error), "hint": error.hint}
        except MemoryError:
            answer = {"error": f"the chat template takes more than {memory >> 20:,} MiB for one conversation"}
        except Exception as error:  # whatever jinja raises, or the template itself
            says = "the tokenizer's chat template" if trained is None else "the chat template refuses the conversation"
            answer = {"error": f"{says}: {escaped(first_line(error)[:1000])[:200]}"}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
