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

Asked = tuple[Sequence[Mapping[str, Any]], Sequence[bool] | None, Mapping[str, Any]]  # the arguments of `render`
Answered = tuple[str, list[tuple[int, int]], list[str]]  # and what it returns


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], trained: Sequence[bool] | None = None,
    options: Mapping[str, Any] = NOTHING,
) -> Answered:  # fmt: skip
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
    (made,) = render_all(tokenizer, [(messages, trained, options)])
    if isinstance(made, UserError):
        raise made
    return made


def render_all(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Asked]) -> list[Answered | UserError]:
    """`render` of many conversations, which do not wait for each other; with errors in their places."""
    if not tokenizer.chat_template:
        return [UserError("the tokenizer has no chat template") for _ in conversations]
    try:
        template = tokenizer.get_chat_template()
        if not isinstance(template, str):
            raise ValueError(f"must be text, not {type(template).__name__}")
    except ValueError as error:  # or there are several, and none of them is the default
        what = f"the tokenizer's chat template: {escaped(first_line(error))[:200]}"
        return [UserError(what) for _ in conversations]
    requests = []
    for messages, trained, options in conversations:
        said = [{key: value for key, value in message.items() if value is not None} for message in messages]
        requests.append(json.dumps([said, trained, dict(options)], default=str))  # such as a date of parquet's
    return [
        UserError(answer["error"], hint=answer.get("hint", "")) if "error" in answer
        else (answer["text"], [(start, end) for start, end in answer["spans"]], answer["notes"])
        for answer in renderer.ask(json.dumps([template, tokenizer.special_tokens_map]), requests)
    ]  # fmt: skip


class Renderer:
    """The process, as it is seen from here: each line of JSON that asks is answered by one.

    It is started with the first question, or before it is needed by `start`. `stop`, which may be called from another
    thread, ends it: what it was asked then raises UserError.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._template = ""  # that it was told last
        self._lock = threading.Lock()

    def ask(self, template: str, requests: Sequence[str]) -> list[dict[str, Any]]:
        """An answer to each; one that ends the process has an error for an answer."""
        answers: list[dict[str, Any]] = []
        with self._lock:
            while len(answers) < len(requests):
                process = self.start()
                lines = [*([] if template == self._template else [template]), *requests[len(answers) :]]
                self._template = template
                asking = threading.Thread(target=_write, args=(process, lines), daemon=True)
                asking.start()
                try:
                    while len(answers) < len(requests) and (answer := process.stdout.readline()).endswith(b"\n"):
                        answers.append(json.loads(answer))
                except BaseException:  # a signal's: what comes would be taken for the answer to the next
                    self.stop()
                    raise
                if len(answers) < len(requests):
                    code = process.wait()
                    if process is not self._process:
                        raise UserError("the chat templates are not rendered any more")
                    self.stop()
                    why = f"takes more than {SECONDS} s for one conversation"
                    why = why if code == -signal.SIGPROF else f"ended its process ({code})"
                    answers.append({"error": f"the chat template {why}"})
                asking.join()
        return answers

    def start(self) -> Any:
        """The process, which is there at once and takes a second to be ready."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from jaxup.data.rendering import serve; serve({SECONDS}, {MEMORY})"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            start_new_session=True,  # Ctrl-C is for this process, which may want to go on
            bufsize=2**20,  # a line at a time is a switch of threads at a time
        )  # fmt: skip
        return self._process

    def stop(self) -> None:
        process, self._process, self._template = self._process, None, ""
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError), process:  # closes the pipes, one of which may have more to write
                pass


def _write(process: Any, lines: list[str]) -> None:
    with contextlib.suppress(OSError, ValueError):  # it has ended, and how the one that reads its answers tells
        process.stdin.write("".join(f"{line}\n" for line in lines).encode())
        process.stdin.flush()


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
