r"""Chat formats by name: what each puts around the turns of a conversation, and the same as a template in Jinja.

| name | a system, a user's and an assistant's turn |
|---|---|
| `metharme` | `<s><|system|>S<|user|>U<|model|>A</s>` (Pygmalion; plain text, not special tokens) |
| `mistral-v3`, `mistral` | `<s>[INST] S\n\nU[/INST] A</s>` |
| `mistral-v1` | `<s> [INST] S\n\nU [/INST] A</s>` |
| `mistral-v3-tekken` | `<s>[INST]S\n\nU[/INST]A</s>` (Nemo and others with a tekken tokenizer: no blanks) |
| `mistral-v7-tekken`, `mistral-tekken` | `<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]U[/INST]A</s>` (Small 3) |
| `llama-2` | `<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s>`, and `<s>[INST] ` again for the next user |
| `llama-3`, `llama3` | `<s>`, then for each `<|start_header_id|>role<|end_header_id|>\n\ntext<|eot_id|>` |
| `chatml` | for each `<|im_start|>role\ntext<|im_end|>\n` (OpenAI) |
| `alpaca` | `<s>`, preamble or S, `\n\n### Instruction:\nU[\n\n### Input:\nI]\n\n### Response:\nA</s>` (Stanford's) |

`<s>` and `</s>` are the tokenizer's own BOS (`<|begin_of_text|>`, or nothing if it has none) and EOS. A format is
added by a line of SPELLINGS: its template is made from that.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


class Spelling(NamedTuple):
    """What a named format puts around the turns' texts; {bos}, {eos} and {role} are filled in."""

    start: str
    system: tuple[str, str] | None  # before and after; None: it has no place of its own, see in_user
    user: tuple[str, str]
    header: str  # before an assistant's turn: not trained
    lead: str  # the blank a reply begins with: trained
    end: str  # of an assistant's turn: trained
    gap: str = ""  # after it: not trained
    in_user: tuple[str, str] = ("", "\n\n")  # around the system's text where it stands before the first user's
    default_system: str = ""  # for a system that has a place of its own
    default_with_input: str = ""  # the same where a turn has an input
    before_input: str = ""  # "": an input is joined to the text
    strips: bool = False  # the blanks around a turn's text go
    special: tuple[str, ...] = ()  # what a tokenizer made for the format has as single tokens


_LLAMA_3 = "<|start_header_id|>{role}<|end_header_id|>\n\n"
_CHATML = "<|im_start|>{role}\n"

SPELLINGS = {
    "metharme": Spelling("{bos}", ("<|system|>", ""), ("<|user|>", ""), "<|model|>", "", "{eos}"),
    "mistral-v3": Spelling("{bos}", None, ("[INST] ", "[/INST]"), "", " ", "{eos}", special=("[INST]", "[/INST]")),
    "mistral-v1": Spelling("{bos}", None, (" [INST] ", " [/INST]"), "", " ", "{eos}"),
    "mistral-v3-tekken": Spelling("{bos}", None, ("[INST]", "[/INST]"), "", "", "{eos}", special=("[INST]", "[/INST]")),
    "mistral-v7-tekken": Spelling("{bos}", ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), ("[INST]", "[/INST]"), "", "",
                                  "{eos}", special=("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]")),
    # Meta's code encodes each user's turn and its answer by themselves, with BOS and EOS.
    "llama-2": Spelling("", None, ("{bos}[INST] ", " [/INST]"), "", " ", " {eos}",
                        in_user=("<<SYS>>\n", "\n<</SYS>>\n\n"), strips=True),
    "llama-3": Spelling("{bos}", (_LLAMA_3, "<|eot_id|>"), (_LLAMA_3, "<|eot_id|>"), _LLAMA_3, "", "<|eot_id|>",
                        strips=True, special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "chatml": Spelling("", (_CHATML, "<|im_end|>\n"), (_CHATML, "<|im_end|>\n"), _CHATML, "", "<|im_end|>", "\n",
                       special=("<|im_start|>", "<|im_end|>")),
    "alpaca": Spelling("{bos}", ("", ""), ("\n\n### Instruction:\n", ""), "\n\n### Response:\n", "", "{eos}",
                       default_system=_ALPACA, default_with_input=_ALPACA_INPUT,
                       before_input="\n\n### Input:\n"),
}  # fmt: skip
ALIASES = {"mistral": "mistral-v3", "mistral-tekken": "mistral-v7-tekken", "llama3": "llama-3"}

# A system message stands before the loop over the turns where it is not one of them.
_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
)


def jinja(spelling: Spelling) -> str:
    """The `chat_template` with which a tokenizer spells conversations so; inputs, which messages lack, aside."""
    s, trim = spelling, " | trim" * spelling.strips
    values = {"bos": "bos_token", "eos": "eos_token", "role": "message['role']", "text": f"message['content']{trim}"}
    values["system"] = "system"
    values["first"] = f"({_sum('{system}'.join(s.in_user), values)} if loop.first and system else '')"
    template = _print(s.start, values)
    turns = {"user": "{text}".join(s.user), "assistant": f"{s.header}{s.lead}{{text}}{s.end}{s.gap}"}
    if s.system and not s.default_system:
        turns = {"system": "{text}".join(s.system), **turns}
    else:
        template += _SYSTEM + "{% set system = system | trim %}" * s.strips
    if not s.system:
        turns["user"] = "{first}{text}".join(s.user)
    elif s.default_system:
        default = f"system or {s.default_system!r}"
        values["system"] = f"({default})" if any(s.system) else default
        template += _print("{system}".join(s.system), values)
    if len(set(turns.values())) == 1:
        body = _print(turns["user"], values)
    else:
        tests = [f"if message['role'] == '{role}'" for role in turns]
        tests = [tests[0], *(f"el{test}" for test in tests[1:-1]), "else"]
        body = "".join("{% " + test + " %}" + _print(turn, values) for test, turn in zip(tests, turns.values()))
        body += "{% endif %}"
    template += "{% for message in messages %}" + body + "{% endfor %}"
    if s.header:
        asks = _print(s.header.replace("{role}", "assistant"), values)
        template += "{% if add_generation_prompt %}" + asks + "{% endif %}"
    return template


def _print(spelled: str, values: dict[str, str]) -> str:
    # A BOS that the tokenizer does not have prints as nothing by itself, and cannot be added to text.
    bos, spelled = ("{{ bos_token }}", spelled.removeprefix("{bos}")) if spelled.startswith("{bos}") else ("", spelled)
    return bos + ("{{ " + _sum(spelled, values) + " }}" if spelled else "")


def _sum(spelled: str, values: dict[str, str]) -> str:
    """ "[INST] {text}" -> "'[INST] ' + message['content']"."""
    parts = enumerate(re.split(r"\{(\w+)\}", spelled))  # text and names in turn
    return " + ".join(values[part] if i % 2 else repr(part) for i, part in parts if part)


TEMPLATES = {name: jinja(spelling) for name, spelling in SPELLINGS.items()}
TEMPLATES |= {alias: TEMPLATES[name] for alias, name in ALIASES.items()}
