"""Another tokenizer for a result: which row goes where, and chat formats to the letter."""

import json
from dataclasses import replace

import numpy as np
import pytest

from jaxup.building.vocabulary import open_vocabulary
from jaxup.data.chat_templates import TEMPLATES
from jaxup.depth.plan import DepthPlan, Row
from jaxup.errors import UserError
from jaxup.model.config import ModelConfig
from jaxup.recipes.open import Model, Recipe

A, B = ["<s>", "</s>", "sun", "moon", "sea"], ["</s>", "<s>", "sea", "rain", "sun", "ice"]


def tokenizer(directory, words, added=(), template=None):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="sun"))
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=template)
    fast.add_tokens(list(added), special_tokens=True)
    fast.save_pretrained(directory)
    return fast


@pytest.fixture
def recipe(tmp_path):
    plan = DepthPlan((Row("a", 0), Row("b", 0)), "a", "a", "b", "b", (("a", 1), ("b", 1)))
    models = {}
    for name, words, size in (("a", A, 8), ("b", B, 7)):
        tokenizer(tmp_path / name, words, ["<|b|>"] if name == "b" else [])
        hf = {"bos_token_id": words.index("<s>"), "eos_token_id": [words.index("</s>")]}
        (tmp_path / name / "generation_config.json").write_text(json.dumps({**hf, "top_p": 0.9}))
        config = ModelConfig.gpt2(vocab_size=size, hidden_size=4, num_layers=1, num_heads=1, max_positions=4, bias=True)
        models[name] = Model(str(tmp_path / name), None, hf, config)
    return Recipe(plan, models, "a", None, None, None, text="", name="r.yaml", notes=())


def reload(vocabulary, directory):
    from transformers import AutoTokenizer

    directory.mkdir()
    for name, text in vocabulary.files.items():
        (directory / name).write_bytes(text)
    return AutoTokenizer.from_pretrained(str(directory))


@pytest.mark.parametrize("source", ["base", "union", "b"])
def test_a_row_goes_where_its_token_is(recipe, source, tmp_path):
    vocabulary = open_vocabulary(replace(recipe, tokenizer=source))
    result = reload(vocabulary, tmp_path / "out")
    words = {"base": A, "union": [*A, "rain", "ice", "<|b|>"], "b": [*B, "<|b|>"]}[source]
    assert result.get_vocab() == {word: i for i, word in enumerate(words)}
    assert vocabulary.size == len(words)
    for end, donor in (("embed_tokens", A), ("lm_head", [*B, "<|b|>"])):
        expected = [donor.index(word) if word in donor else -1 for word in words]
        np.testing.assert_array_equal(vocabulary.rows[end], expected)
    ids = {"bos_token_id": words.index("<s>"), "eos_token_id": [words.index("</s>")]}
    assert vocabulary.token_ids == ids
    assert json.loads(vocabulary.files["generation_config.json"]) == {**ids, "top_p": 0.9}


@pytest.mark.parametrize(
    ("source", "notes"),
    [
        ("base", ["embedding of 'a': 8 rows become 5, as the tokenizer has tokens",
                  "embedding of 'a': 3 rows cut (3 of no token)",
                  "head of 'b': 7 rows become 5, as the tokenizer has tokens",
                  "head of 'b': 3 rows cut ('rain', 'ice', '<|b|>')",
                  "head of 'b': 4 rows moved ('<s>', '</s>', 'sun', 'sea')",
                  "head of 'b': 1 row of zeros ('moon')",
                  "config.json: pad_token_id 7 becomes null: the result's tokenizer has no such token"]),
        ("union", ["embedding of 'a': 3 rows of zeros ('rain', 'ice', '<|b|>')"]),
        ("b", ["embedding of 'a': 4 rows cut ('moon', 3 of no token)", "config.json: bos_token_id 0 becomes 1",
               "generation_config.json: eos_token_id [1] becomes [0]"]),
    ],
)  # fmt: skip
def test_what_becomes_of_rows_and_ids_is_said(recipe, source, notes):
    """Of an embedding and of a head that is another's; a head that is tied is none."""
    models = {}
    for name, model in recipe.models.items():
        config = replace(model.config, tie_embeddings=False)
        models[name] = replace(model, config=config, hf=model.hf | {"pad_token_id": 7})
    said = open_vocabulary(replace(recipe, tokenizer=source, models=models)).notes
    assert set(notes) <= set(said)
    assert len(notes) == len(said) or source != "base"
    tied = open_vocabulary(replace(recipe, tokenizer=source)).notes
    assert not any("head" in note for note in tied)


CHAT = [
    {"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
]  # fmt: skip
EXPECTED = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "U<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nV<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] S\n\nU[/INST] A</s>[INST] V[/INST]",
    "mistral-v1": "<s> [INST] S\n\nU [/INST] A</s> [INST] V [/INST]",
    "llama-2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s><s>[INST] V [/INST]",
    "alpaca": "<s>S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n### Instruction:\nV\n\n### Response:\n",
    "metharme": "<s><|system|>S<|user|>U<|model|>A</s><|user|>V<|model|>",
}
EXPECTED |= {
    "mistral-v3": EXPECTED["mistral"], "llama-3": EXPECTED["llama3"],
    "mistral-v3-tekken": "<s>[INST]S\n\nU[/INST]A</s>[INST]V[/INST]",
    "mistral-tekken": "<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]U[/INST]A</s>[INST]V[/INST]",
}  # fmt: skip
EXPECTED["mistral-v7-tekken"] = EXPECTED["mistral-tekken"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_by_name(recipe, name, tmp_path):
    vocabulary = open_vocabulary(replace(recipe, chat_template=name))
    assert (vocabulary.size, vocabulary.rows) == (None, {})
    text = reload(vocabulary, tmp_path / "out").apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == EXPECTED[name]


def test_a_template_of_its_own_and_the_most_common_one(recipe, tmp_path):
    own = open_vocabulary(replace(recipe, chat_template="{{ messages[0]['content'] }}!"))
    assert reload(own, tmp_path / "out").apply_chat_template(CHAT, tokenize=False) == "S!"
    auto = replace(recipe, chat_template="auto")
    refused(r"r\.yaml: chat_template: auto: no model has one", auto)
    tokenizer(tmp_path / "b", B, template="{{ 'of b' }}")
    assert open_vocabulary(auto).files["chat_template.jinja"] == b"{{ 'of b' }}"


def refused(message, recipe):
    with pytest.raises(UserError, match=message):
        open_vocabulary(recipe)


def test_refusals(recipe, tmp_path):
    refused("did you mean 'chatml'", replace(recipe, chat_template="chatlm"))
    base = replace(recipe, tokenizer="base")
    refused("pad_to_multiple_of=4", replace(base, pad_to_multiple_of=4))
    small = replace(recipe.models["a"].config, vocab_size=3)
    models = recipe.models | {"a": replace(recipe.models["a"], config=small)}
    refused("tokens beyond its vocab_size=3", replace(base, models=models))
    (tmp_path / "b" / "tokenizer.json").write_text("{")
    refused("b: its tokenizer cannot be read", base)
    for name in "ab":
        for file in (tmp_path / name).glob("*token*"):
            file.unlink()
    refused("needs the tokenizer of 'a', which has none", base)
    refused("no tokenizer to give it to", replace(recipe, chat_template="chatml"))


def test_a_model_without_a_tokenizer_has_the_base_models(recipe, tmp_path):
    for file in (tmp_path / "b").glob("*token*"):
        file.unlink()
    with pytest.warns(UserWarning, match="b: no tokenizer; taken to be that of a"):
        vocabulary = open_vocabulary(replace(recipe, tokenizer="union"))
    np.testing.assert_array_equal(vocabulary.rows["lm_head"], np.arange(5))
