"""Chat formats by name, as Jinja templates for a tokenizer's `apply_chat_template`."""

from __future__ import annotations

_LOOP = "{% for message in messages %}"

# A system message goes before the first user's text, where a format has no place of its own for it.
_WITH_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
)

ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_INPUT_PREAMBLE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)

TEMPLATES = {
    # OpenAI's: <|im_start|>role\ntext<|im_end|>\n
    "chatml": _LOOP + "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    # Meta's, of Llama 3 Instruct
    "llama-3": "{{ bos_token }}" + _LOOP + "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    # Mistral's: v3 <s>[INST] U[/INST] A</s>, v1 <s> [INST] U [/INST] A</s>
    "mistral-v3": "{{ bos_token }}" + _WITH_SYSTEM + _LOOP + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system + '\\n\\n' if loop.first and system else '') + message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}",
    "mistral-v1": "{{ bos_token }}" + _WITH_SYSTEM + _LOOP + "{% if message['role'] == 'user' %}"
    "{{ ' [INST] ' + (system + '\\n\\n' if loop.first and system else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}",
    # Meta's, of Llama 2 Chat: each user's turn and its answer have a BOS and an EOS
    "llama-2": _WITH_SYSTEM + "{% set system = system | trim %}" + _LOOP + "{% if message['role'] == 'user' %}"
    "{{ bos_token }}{{ '[INST] ' + ('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system else '')"
    " + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
    # Taori et al. 2023
    "alpaca": "{{ bos_token }}" + _WITH_SYSTEM + "{{ system or '" + ALPACA_PREAMBLE + "' }}" + _LOOP
    + "{% if message['role'] == 'user' %}"
    "{{ '\\n\\n### Instruction:\\n' + message['content'] }}{% else %}"
    "{{ '\\n\\n### Response:\\n' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}",
    # Pygmalion's: plain text, no separators
    "metharme": "{{ bos_token }}" + _LOOP + "{% if message['role'] == 'system' %}"
    "{{ '<|system|>' + message['content'] }}{% elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% else %}{{ '<|model|>' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|model|>' }}{% endif %}",
}  # fmt: skip
TEMPLATES |= {"mistral": TEMPLATES["mistral-v3"], "llama3": TEMPLATES["llama-3"]}
