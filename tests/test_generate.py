"""Generation: tokens against transformers', their text against its tokenizers, and the command."""

import argparse
import importlib
import io
import itertools
import json
import logging
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax

from jaxup import chat
from jaxup.data.chat_formats import prompt_ids
from jaxup.data.tokenizer import train_bpe
from jaxup.depth.apply import apply
from jaxup.depth.recipes import duplicate
from jaxup.errors import UserError
from jaxup.hub import load as hub
from jaxup.hub import text_generation
from jaxup.hub.text_generation import Detokenizer, stop_ids
from jaxup.hub.writer import save
from jaxup.model import sampling
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import abstract, init
from jaxup.model.decoding import restrict
from jaxup.model.sampling import Session, generate
from jaxup.model.sharding import param_shardings
from jaxup.training.sharding import MeshConfig, make_mesh

command = importlib.import_module("jaxup.generate")  # in the package the name is the function's
UNASKED = argparse.Namespace(**dict.fromkeys(text_generation.OPTIONS))

GREEDY = dict(max_tokens=24, temperature=0.0, top_k=0, seed=0)
SAMPLED = dict(max_tokens=6, temperature=0.9, top_k=30, top_p=0.95, seed=3, vocab_size=60)
LLAMA = ModelConfig.llama(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=256
)


def rows(steps):
    return np.stack(list(steps), axis=1).tolist()


def ragged(lengths, vocab_size, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, vocab_size, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def params():
    noise = jax.jit(init, static_argnums=0)(LLAMA, 0)
    return jax.tree.map(lambda a: 8 * a if a.ndim > 2 else a, noise)  # or all contexts give nearly the same logits


@pytest.fixture
def compiled(caplog):
    """Names of the programs compiled since it was last called."""

    def names():
        found = [re.match(r"Compiling jit\((\w+)\)", r.getMessage()) for r in caplog.records]
        caplog.clear()
        return [match[1] for match in found if match]

    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        yield names


# ---- tokens


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        # 70 + 24 positions, though the padded rows are longer than the table.
        ("gpt2", {"n_positions": 100, "tie_word_embeddings": False}),
        ("mistral", {"num_key_value_heads": 1, "max_position_embeddings": 256}),  # a window of 5
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
                   "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}}),
    ],
    ids=["gpt2", "mistral", "llama"],
)  # fmt: skip
def test_greedy_ragged_batches_equal_transformers(model_type, changes, torch, hf_model, tmp_path):
    model = hf_model(model_type, **changes)
    with torch.no_grad():
        for name, p in model.named_parameters():  # or all contexts are followed by the same token
            p.mul_(3.0 if p.ndim > 1 else 0.2 if "bias" in name else 1.0)
    model.save_pretrained(tmp_path)
    ours = hub.load(tmp_path)
    params = nnx.to_pure_dict(nnx.state(ours))
    prompts = ragged([3, 70, 1, 19], 61)
    longest = max(map(len, prompts))
    tokens = torch.tensor([[1] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    expected = model.generate(tokens, attention_mask=mask, max_new_tokens=24, min_new_tokens=24, do_sample=False,
                              pad_token_id=1, eos_token_id=None)[:, longest:].tolist()  # fmt: skip
    assert min(len(set(row)) for row in expected) > 4
    assert len({tuple(row) for row in expected}) == 4
    assert rows(generate(ours.config, params, prompts, vocab_size=61, **GREEDY)) == expected
    for prompt, row in ((prompts[0], expected[0]), (prompts[3], expected[3])):
        assert rows(generate(ours.config, params, [prompt], vocab_size=61, **GREEDY)) == [row]


def test_two_programs_whatever_the_prompts_and_the_stops(params, compiled):
    first, second = ragged([5, 40], 60), ragged([64, 1], 60, seed=1)
    all_rows = rows(generate(LLAMA, params, first, **SAMPLED))
    names = compiled()
    assert [name for name in names if name in ("prefill", "decode")] == ["prefill", "decode"]
    rows(generate(LLAMA, params, second, **SAMPLED))
    again = rows(generate(LLAMA, params, first, **SAMPLED, eos_ids=(all_rows[0][2],)))
    other_seed = rows(generate(LLAMA, params, first, **{**SAMPLED, "seed": 4, "max_tokens": 9}))
    assert compiled() == []
    assert again[0] == [*all_rows[0][:3], -1, -1, -1]
    assert again[1] == all_rows[1]
    assert other_seed != all_rows
    # When all rows have ended, so has the iteration.
    ends = {all_rows[0][1], all_rows[1][2]}
    assert not ends & {*all_rows[0][:1], *all_rows[1][:2]}
    assert rows(generate(LLAMA, params, first, **SAMPLED, eos_ids=ends)) == [[*all_rows[0][:2], -1], all_rows[1][:3]]


def test_a_row_depends_on_its_prompt_index_and_seed_alone(params):
    a, b, c = ragged([5, 40, 70], 60)
    both = rows(generate(LLAMA, params, [a, b], **SAMPLED))
    assert rows(generate(LLAMA, params, [c, b], **SAMPLED))[1] == both[1]  # c takes a longer padding
    same = rows(generate(LLAMA, params, np.asarray([a, a]), **SAMPLED))
    assert same[0] == both[0] != same[1]


def test_sharded_params_give_the_same_tokens(params, compiled):
    prompts, how = ragged([5, 40, 2], 60), SAMPLED | {"top_k": 0, "top_p": 1.0}
    expected = rows(generate(LLAMA, params, prompts, **how))
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    placed = jax.device_put(params, param_shardings(LLAMA, mesh))
    assert not placed["blocks"]["self_attn"]["q_proj"]["kernel"].sharding.is_fully_replicated
    compiled()
    assert rows(generate(LLAMA, placed, prompts, **how)) == expected
    assert [name for name in compiled() if name in ("prefill", "decode")] == ["prefill", "decode"]
    assert rows(generate(LLAMA, placed, prompts, **how)) == expected
    assert compiled() == []


def test_a_text_by_turns_is_what_generate_draws_of_each_with_two_programs(params, compiled):
    how = {name: value for name, value in SAMPLED.items() if name != "max_tokens"}
    session = Session(LLAMA, params, context=140, **how)
    first, more, other = ragged([5, 64, 40], 60)
    drawn = list(session(first, max_tokens=6))
    turns = [[*first, *drawn, *more], [*first, *drawn], [*first, *other], first[:1]]
    compiled()
    replies = [list(session(turn, max_tokens=6)) for turn in turns]
    assert compiled() == []
    assert list(itertools.islice(session(turns[0], max_tokens=50), 3)) == replies[0][:3]
    next(iter(session(other, max_tokens=6)))  # broken off, here and above
    session._state[0].k_LBKTH.delete()  # as what is broken off inside of a step leaves it
    again = list(session(turns[0], max_tokens=6, eos_ids=replies[0][2:3]))
    assert again == replies[0][:3]
    assert list(session(turns[1], max_tokens=6)) == replies[1]
    for prompt, reply in zip([first, *turns], [drawn, *replies]):
        assert rows(generate(LLAMA, params, [prompt], **SAMPLED)) == [reply]
    assert len(list(session([1] * 139, max_tokens=1))) == 1
    with pytest.raises(UserError, match="139 tokens and 2 new ones, and the context holds 140"):
        next(session([1] * 139, max_tokens=2))
    with pytest.raises(UserError, match="the prompt has the token 64, the model those up to 63"):
        next(session([64], max_tokens=2))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.3), (0, 0.01), (7, 1.0), (20, 0.8), (99, 0.999)])
def test_restrictions_equal_transformers(top_k, top_p, torch):
    logits = np.random.default_rng(0).normal(scale=2.0, size=(40, 99)).astype(np.float32)
    logits[20:] = np.round(logits[20:] * 4) / 4  # many equal ones, as in bfloat16
    logits[5, :90] = -np.inf
    expected = transformers_warped(torch, logits, 1.0, top_k, top_p)
    assert 1 <= np.isfinite(expected).sum(axis=1).min() < 99
    got = np.asarray(jax.jit(restrict, static_argnums=(1, 2))(logits, top_k, top_p))
    np.testing.assert_array_equal(got[:20], expected[:20])
    # Which of several equal logits stay is up to torch's sort, which is not stable; how many is not.
    np.testing.assert_array_equal(np.sort(got[20:]), np.sort(expected[20:]))


def transformers_warped(torch, logits, temperature, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
    if top_k:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    return logits.numpy()


def test_draws_follow_the_distribution_of_transformers(params, torch):
    """1,024 draws after one prompt, against the probabilities that transformers would draw from."""
    from scipy import stats

    prompt = ragged([6], 60)
    forward = jax.jit(lambda params, tokens: nnx.merge(abstract(LLAMA)[0], params)(tokens))
    logits = np.asarray(forward(params, np.asarray(prompt)))[:, -1, :60]
    probabilities = softmax(transformers_warped(torch, logits, 1.7, 20, 0.8)[0].astype(np.float64))
    how = dict(max_tokens=1, temperature=1.7, top_k=20, top_p=0.8, vocab_size=60)
    drawn = [rows(generate(LLAMA, params, prompt * 256, seed=seed, **how)) for seed in range(4)]
    counts = np.bincount(np.ravel(drawn), minlength=60)
    kept = probabilities > 0
    assert 5 < kept.sum() < 20
    assert counts[~kept].sum() == 0
    assert stats.chisquare(counts[kept], counts.sum() * probabilities[kept]).pvalue > 0.01


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "the prompt has no tokens"),
        ([[3], []], {}, "the prompt has no tokens"),
        ([[3, 64]], {}, "has the token 64, the model those up to 63; is this another model's tokenizer?"),
        ([[3, -1]], {}, "has the token -1"),
        ([[3], [4] * 30], {"max_tokens": 3}, "30 tokens and 3 new ones exceed the model's 32 positions; at most 2 new"),
        ([[4] * 33], {}, "none fits"),
    ],
)
def test_prompts_that_do_not_fit(prompts, changes, message):
    config = ModelConfig.gpt2(vocab_size=64, hidden_size=16, num_layers=2, num_heads=4, max_positions=32, bias=True)
    with pytest.raises(UserError, match=re.escape(message)):  # at the call, before the first token is asked for
        generate(config, {}, prompts, **{**SAMPLED, **changes})


# ---- text


def sentencepiece(texts):
    """A tokenizer built as LLaMA's: blanks are part of words, bytes for characters it does not know, BOS before all."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special[:3], initial_alphabet=[], show_progress=False)
    backend.train_from_iterator(texts, trainer)
    state = json.loads(backend.to_str())
    words = [word for word in state["model"]["vocab"] if word not in special]
    state["model"]["vocab"] = {word: i for i, word in enumerate([*special, *words])}
    backend = Tokenizer.from_str(json.dumps(state))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)  # fmt: skip


def metaspace(texts):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "</s>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


KNOWN = ["the cat sat on the mat , and it sat  well .", "don't  you think so ?"]
TEXTS = [*KNOWN, " 猫 sat 🙂🙂 on naïve mats\n\tthe end €", "éé", "   "]


@pytest.mark.parametrize(
    "make", [lambda texts: train_bpe(texts, 300), sentencepiece, metaspace], ids=["bytes", "sentencepiece", "metaspace"]
)
def test_pieces_are_the_text_in_whole_characters(make):
    tokenizer = make(KNOWN)
    assert len(tokenizer(TEXTS[2])["input_ids"]) > 10
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # noqa: E731
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        for cut in (0, 1, len(ids) // 2):
            if "\N{REPLACEMENT CHARACTER}" in decode(ids[:cut]):
                continue  # the text of a prompt ends with a whole character
            detokenizer = Detokenizer(tokenizer, ids[:cut])
            pieces = [detokenizer.push(token) for token in ids[cut:]]
            assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
            assert decode(ids[:cut]) + "".join(pieces) + detokenizer.rest() == decode(ids)


def test_pieces_of_tokens_that_are_no_text():
    """What an untrained model writes: bytes in any order, special tokens, half a character at the end."""
    tokenizer = train_bpe(KNOWN, 300)
    for seed in range(20):
        ids = np.random.default_rng(seed).integers(0, len(tokenizer), 60).tolist()
        prompt = "the cat" if seed % 2 else ""
        detokenizer = Detokenizer(tokenizer, tokenizer(prompt)["input_ids"])
        text = "".join(map(detokenizer.push, ids)) + detokenizer.rest()
        assert prompt + text == tokenizer.decode(tokenizer(prompt)["input_ids"] + ids, skip_special_tokens=True)


def test_the_end_of_a_long_text_is_decoded_alone():
    tokenizer = train_bpe(KNOWN, 300)
    detokenizer, longest = Detokenizer(tokenizer, []), 0
    decode = detokenizer._decode

    def measured(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    detokenizer._decode = measured
    for token in tokenizer(KNOWN[0] * 20)["input_ids"]:
        detokenizer.push(token)
    assert longest < 8


# ---- chat

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['content'] == 'no' %}{{ raise_exception('System role not\nsupported') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_chat_is_spelt_by_the_template_with_one_bos():
    tokenizer = sentencepiece(KNOWN)
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        prompt_ids(tokenizer, "hello", None)
    tokenizer.chat_template = TEMPLATE
    ids = prompt_ids(tokenizer, "it", "sat well")
    text = "[system]sat well\n[user]it\n[assistant]"
    assert ids == tokenizer("<s>" + text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(prompt_ids(tokenizer, "it", None), skip_special_tokens=True) == text.partition("\n")[2]
    with pytest.raises(UserError, match=r"\Athe tokenizer's chat template: System role not\Z"):
        prompt_ids(tokenizer, "the cat", "no")
    tokenizer.chat_template = "{% for m in messages %}"
    with pytest.raises(UserError, match=r"\Athe tokenizer's chat template: [^\n]+\Z"):
        prompt_ids(tokenizer, "the cat", None)
    tokenizer.chat_template = "{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}"
    with pytest.raises(UserError, match="unsafe"):
        prompt_ids(tokenizer, "the cat", None)


# ---- the command


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A small model with a tokenizer like LLaMA's and a chat template."""
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("generate") / "model"
    tokenizer = sentencepiece(KNOWN)
    tokenizer.chat_template = TEMPLATE
    config = ModelConfig.llama(
        vocab_size=384, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1,
        max_positions=256,
    )  # fmt: skip
    params = jax.tree.map(lambda a: 8 * np.asarray(a), jax.jit(init, static_argnums=0)(config, 0))
    # Words only: bytes in any order, of which "byte fallback" makes no text, and no ends.
    params["lm_head"]["kernel"][:, : tokenizer.vocab["<0xFF>"] + 1] = 0
    save(directory, config, params, tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(directory)("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]
    return directory


def run(*args):
    command.main(["generate", *map(str, args)])


def test_the_command_writes_what_transformers_writes(model_dir, torch, capsys, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    padding = list(range(len(tokenizer), 384))  # rows of the table beyond the tokenizer's
    prompts, expected = ["the cat", "it sat on"], []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0, suppress_tokens=padding)[0]
        expected.append(tokenizer.decode(ids, skip_special_tokens=True))
        assert len(set(ids.tolist())) > 8
    run(model_dir, "--prompt", prompts[0], "--greedy", "--max-tokens", 12)
    out, err = capsys.readouterr()
    assert out == expected[0] + "\n"
    assert re.search(r"^12 tokens, [\d.]+ s to the first, [\d.]+ tokens/s$", err, re.M)

    (tmp_path / "prompts.txt").write_text("\r\nit sat on\r\n\n", newline="")
    run(model_dir, "--prompt", prompts[0], "--prompt-file", tmp_path / "prompts.txt", "--greedy", "--max-tokens", 12)
    out, err = capsys.readouterr()
    assert out == f"[1] {expected[0]}\n\n[2] {expected[1]}\n\n"
    assert re.search(r"^24 tokens, ", err, re.M)


def test_texts_and_chats_in_one_batch_from_python(model_dir, capsys):
    """What the command writes of each, and its pieces as they come."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(model_dir), hub.load(model_dir)
    chat = [{"role": "system", "content": "sat"}, {"role": "user", "content": "the cat"}]
    prompts, how = ["it sat on", chat], {"max_tokens": 9, "temperature": 0.0}
    texts = text_generation.generate(model, prompts, **how)
    run(model_dir, "--prompt", "it sat on", "--greedy", "--max-tokens", 9)
    run(model_dir, "--prompt", "the cat", "--system", "sat", "--chat", "--greedy", "--max-tokens", 9)
    assert capsys.readouterr().out == f"it sat on{texts[0]}\n{texts[1]}\n"
    writing = text_generation.Writing(model, prompts, tokenizer=tokenizer, top_k=0, top_p=1.0, seed=0, **how)
    pieces = list(writing)
    assert len(pieces) == len(writing.counts) == 9
    assert ["".join(row) + rest for row, rest in zip(zip(*pieces), writing.rest())] == texts
    # The directory that the model came from says what ends a text; a model without one ends with its tokenizer's.
    assert text_generation.generate(model, prompts, tokenizer=tokenizer, eos_ids=range(384), **how) == ["", ""]
    # A plan's order runs what its model is, and a model that was made of another has its tokenizer.
    twice = duplicate("model", model.config.num_layers, range(2))
    assert (by_order := text_generation.generate(model, prompts, order=twice.order(), **how)) != texts
    assert text_generation.generate(apply(twice, model), prompts, **how) == by_order
    with pytest.raises(UserError, match="layer 9 is not there"):
        text_generation.generate(model, prompts, order=[0, 9])
    with pytest.raises(UserError, match=r'generate: prompts are a list, not str; \["..."\]'):
        text_generation.generate(model, "it sat on")
    model.origin = None
    with pytest.raises(UserError, match="generate: the model came without a tokenizer; tokenizer="):
        text_generation.generate(model, prompts)
    assert text_generation.generate(model, prompts, tokenizer=tokenizer, **how) == texts
    with pytest.raises(UserError, match="generate: top_p must be above 0 and at most 1, not 0"):
        text_generation.generate(model, prompts, tokenizer=tokenizer, top_p=0.0)


def fake(tokens, seen, after=None):
    """In place of sampling.generate: these tokens for the first prompt, then `after`."""

    def generate(config, params, prompts, **how):
        seen.update(how, prompts=prompts)
        for token in tokens:
            yield np.asarray([token] * len(prompts), np.int32)
        if after:
            raise after

    return generate


def test_what_the_command_asks_for(model_dir, monkeypatch, capsys):
    from transformers import AutoTokenizer

    tokenizer, seen = AutoTokenizer.from_pretrained(model_dir), {}
    reply = tokenizer("sat well 猫", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(sampling, "generate", fake([*reply, tokenizer.eos_token_id], seen))
    run(model_dir, "--prompt", "the cat", "--top-p", "0.5", "--top-k", 4, "--seed", 9, "--dtype", "bfloat16")
    assert seen["prompts"] == [tokenizer("the cat")["input_ids"]]
    assert seen["prompts"][0][0] == tokenizer.bos_token_id
    assert seen["eos_ids"] == (tokenizer.eos_token_id,)
    assert {k: seen[k] for k in ("top_p", "top_k", "seed", "temperature", "dtype", "vocab_size", "max_tokens")} == dict(
        top_p=0.5, top_k=4, seed=9, temperature=0.8, dtype="bfloat16", vocab_size=len(tokenizer), max_tokens=100
    )
    assert capsys.readouterr().out == "the cat sat well 猫\n"

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("猫\nthe cat\n".encode())))
    run(model_dir, "--chat", "--system", "it", "--prompt-file", "-")
    assert seen["prompts"] == [prompt_ids(tokenizer, message, "it") for message in ("猫", "the cat")]
    out, err = capsys.readouterr()
    assert out == "[1] 猫\nsat well 猫\n\n[2] the cat\nsat well 猫\n\n"
    assert "blank" not in err
    run(model_dir, "--prompt", "the cat", "--prompt", "it ")
    assert "jaxup: 'it ': the prompt ends in a blank, after which" in capsys.readouterr().err


@pytest.mark.parametrize("several", [False, True])
def test_an_interrupted_command_shows_what_there_is(several, model_dir, monkeypatch, capsys):
    from transformers import AutoTokenizer

    half = AutoTokenizer.from_pretrained(model_dir)("sat 猫", add_special_tokens=False)["input_ids"][:-1]
    monkeypatch.setattr(sampling, "generate", fake(half, {}, after=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(model_dir, "--prompt", "the cat", *["--prompt", "it"] * several)
    shown = [text + "\N{REPLACEMENT CHARACTER}" * 2 for text in ("the cat sat ", "it sat ")]
    out, err = capsys.readouterr()
    assert out == (f"[1] {shown[0]}\n\n[2] {shown[1]}\n\n" if several else shown[0] + "\n")
    assert f"{len(half) * (1 + several)} tokens" in err


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 7]}, {"eos_token_id": 3}, (5, 7)),
        ({"eos_token_id": 0}, {"eos_token_id": 3}, (0,)),
        ({"eos_token_id": None}, {"eos_token_id": 3}, (3,)),
        (None, {"eos_token_id": [3]}, (3,)),
        ({}, {}, (2,)),
        ({"eos_token_id": "</s>"}, {}, "generation_config.json: eos_token_id="),
        ([], {}, "generation_config.json: not a JSON object"),
    ],
)
def test_what_ends_a_text(generation, config, expected, tmp_path):
    class Tokenizer:
        eos_token_id = 2

    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    if isinstance(expected, tuple):
        assert stop_ids(tmp_path, Tokenizer()) == expected
    else:
        with pytest.raises(UserError, match=re.escape(expected)):
            stop_ids(tmp_path, Tokenizer())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give --prompt or --prompt-file"),
        (["--prompt-file", "/nowhere.txt"], "/nowhere.txt: No such file"),
        (["--prompt", "a", "--greedy", "--temperature", "0.5"], "not allowed with argument"),
        (["--prompt", "a", "--top-p", "0"], "--top-p must be above 0 and at most 1, not 0.0"),
        (["--prompt", "a", "--top-p", "1.1"], "--top-p"),
        (["--prompt", "a", "--top-k", "-1"], "--top-k must be not negative"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature"),
        (["--prompt", "a", "--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["--prompt", "a", "--seed", "-3"], "--seed"),
        (["--prompt", "a", "--system", "b"], "--system goes with --chat"),
        (["--prompt", "a", "--greedy", "--top-k", "5"], "--top-k goes with a temperature above 0"),
        (["--prompt", "a", "--temperature", "0", "--top-p", "0.9"], "--top-p goes with a temperature above 0"),
        (["--prompt", "a", "--dtype", "float16"], "--dtype"),
        (["--prompt", "a\udcff"], "not text in UTF-8"),
        (["--prompt", "a", "--max-toknes", "3"], "--max-toknes"),
        (["--prompt", "a"], "nowhere/at-all"),
    ],
)
def test_mistakes_in_one_line(args, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        run("nowhere/at-all", *args)
    assert "\n" not in str(error.value)


def test_directories_that_cannot_write(model_dir, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="has no export yet"):
        run(tmp_path / "run", "--prompt", "a")
    with pytest.raises(UserError, match=r"config\.json"):
        run(tmp_path / "run" / "checkpoints", "--prompt", "a")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"\Atokenizer: no tokenizer in [^\n]*\Z"):
        run(tmp_path / "bare", "--prompt", "a")


@pytest.mark.parametrize(
    ("sample", "flags", "expected"),
    [
        ({"temperature": 0.5, "top_k": 7, "tokens": 9, "prompt": "a"}, {},
         {"temperature": 0.5, "top_k": 7, "max_tokens": 9}),
        ({"temperature": 0.5, "top_k": 7, "tokens": 9}, {"temperature": 1.5, "max_tokens": 3},
         {"temperature": 1.5, "top_k": 7, "max_tokens": 3}),
        ({"temperature": 0.5, "top_k": 7, "tokens": 0}, {"temperature": 0.0}, {"temperature": 0.0}),
        ({"temperature": 0, "top_k": 50}, {}, {"temperature": 0}),
        ({"temperature": 0, "top_k": 50}, {"top_p": 0.5}, {"top_p": 0.5, "top_k": 50}),
        (None, {}, {}),
        ({"temperature": -1.0}, {}, "config.json: sample: temperature must be a number and not negative, not -1.0"),
        ({"tokens": "9"}, {}, "config.json: damaged: sample.tokens must be int | None, not '9'; put it back"),
    ],
)  # fmt: skip
def test_a_run_is_drawn_from_as_its_own_samples_are(sample, flags, expected, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({} if sample is None else {"sample": sample}))
    args = argparse.Namespace(**{**vars(UNASKED), **flags})
    if isinstance(expected, str):
        with pytest.raises(UserError, match=re.escape(expected)):
            command.drawing(args, tmp_path, command.DEFAULTS)
        return
    assert command.drawing(args, tmp_path, command.DEFAULTS) == command.DEFAULTS | expected
    said = capsys.readouterr().err.strip().partition("own samples are: ")[2]
    own = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in expected.items() if name not in flags)
    assert said == own
    assert command.drawing(args, None, command.DEFAULTS) == command.DEFAULTS | flags


# ---- a conversation


def talk(*args):
    chat.main(["chat", *map(str, args)])


def test_a_conversation_is_what_generate_writes_of_all_that_was_said(model_dir, tmp_path, capsys, compiled):

    turns = ["the cat", "it sat on", "the mat " * 20, "/reset", "the cat"]
    (tmp_path / "turns.txt").write_text("\n\n".join(turns))
    talk(model_dir, "--prompts", tmp_path / "turns.txt", "--greedy", "--max-tokens", 9, "--system", "sat")
    assert [name for name in compiled() if name in ("prefill", "decode", "extend")] == ["extend", "extend"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6:2] == [f"> {turn}" for turn in turns[:3]]
    assert lines[6:] == ["> /reset", "> the cat", lines[1]]
    said, chats = [{"role": "system", "content": "sat"}], []
    for turn, reply in zip(turns[:3], lines[1:6:2]):
        said = [*said, {"role": "user", "content": turn}]
        chats.append(said)
        said = [*said, {"role": "assistant", "content": reply}]
    model = hub.load(model_dir)
    assert text_generation.generate(model, chats, max_tokens=9, temperature=0.0) == lines[1:6:2]


def test_the_example_of_docs_models_runs(model_dir, tmp_path, monkeypatch):
    docs = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", docs, re.S)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(block.replace("DIR", str(model_dir)), scope)
    assert [len(scope["texts"]), len(scope["other"])] == [2, 1]
    saved = hub.load("OUT")
    np.testing.assert_array_equal(saved.params["norm"]["scale"], scope["params"]["norm"]["scale"])
    assert text_generation.generate(saved, ["the cat"], max_tokens=2)


class Terminal:
    """In place of the session of a model, and of who types: what is written, typed, and seen."""

    def __init__(self, monkeypatch, tokenizer, typed, *replies):
        self.tokenizer, self.replies, self.prompts, self.typed = tokenizer, list(replies), [], iter(typed)
        monkeypatch.setattr(sampling, "Session", lambda *args, **how: self)
        monkeypatch.setattr("sys.stdin", self)
        monkeypatch.setattr("builtins.input", self.type)

    def __call__(self, ids, *, max_tokens, eos_ids):
        self.prompts.append(self.tokenizer.decode(ids, skip_special_tokens=True))
        reply = self.replies.pop(0)
        drawn = self.tokenizer(reply.strip("^"), add_special_tokens=False)["input_ids"]
        yield from [*drawn, self.tokenizer.eos_token_id][: len(drawn) if reply.endswith("^") else max_tokens]
        if reply.endswith("^"):
            raise KeyboardInterrupt

    def isatty(self):
        return True

    def type(self, prompt):
        line = next(self.typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line


def test_what_is_typed(model_dir, monkeypatch, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    typed = ["the cat", "", "it", "/rest", "a " * 300, "so", "/reset", "on", "/quit", "never"]
    terminal = Terminal(monkeypatch, tokenizer, typed, "sat well^", "^", "mat\x1b[2J", "")
    talk(model_dir)
    out, err = capsys.readouterr()
    assert terminal.prompts == [
        "[user]the cat\n[assistant]",
        "[user]the cat\n[assistant]sat well\n[user]it\n[assistant]",
        "[user]the cat\n[assistant]sat well\n[user]so\n[assistant]",  # what had no answer was not said
        "[user]on\n[assistant]",
    ]
    assert out == "sat well\n\nmat\x1b[2J\n\n"  # capsys is no terminal
    assert [line.removeprefix("jaxup: ") for line in err.splitlines() if line.startswith("jaxup: ")] == [
        "a context of 256 tokens; /reset begins anew, /quit leaves",
        *["the reply was ended; Ctrl-C again leaves"] * 2,
        "unknown command '/rest'; did you mean '/reset'?",
        f"{len(prompt_ids(tokenizer, 'a ' * 300))} tokens, and the context holds 256 with the reply",
        "the reply is empty: the model ended it at once",
    ]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    terminal = Terminal(monkeypatch, tokenizer, ["on", KeyboardInterrupt()], "mat\x1b[2J")
    with pytest.raises(KeyboardInterrupt):
        talk(model_dir)
    assert capsys.readouterr().out == "mat [2J\n\n"


def test_a_full_context_loses_its_oldest_questions(model_dir, monkeypatch, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    typed = ["the cat sat", "on the mat", "it sat well", "the " * 30]
    terminal = Terminal(monkeypatch, tokenizer, typed, "mat", "cat", "sat", "on " * 90)
    talk(model_dir, "--context", 96, "--system", "it")
    assert terminal.prompts == [
        "[system]it\n[user]the cat sat\n[assistant]",
        "[system]it\n[user]the cat sat\n[assistant]mat\n[user]on the mat\n[assistant]",
        "[system]it\n[user]on the mat\n[assistant]cat\n[user]it sat well\n[assistant]",
        f"[system]it\n[user]{'the ' * 30}\n[assistant]",
    ]
    err = capsys.readouterr().err
    assert "is full: the oldest question was left out, with what was answered" in err
    assert "is full: the oldest 2 questions were left out" in err
    assert "the reply was cut: the context of 96 tokens is full\n" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--format", "chatlm"], "--format: 'chatlm' is not known; did you mean 'chatml'?"),
        (["--context", "0"], "--context must be at least 1, not 0"),
        (["--context", "257"], "--context: context: 257 tokens, and the model takes from 1 to 256"),
        (["--prompts", "/nowhere.txt"], "--prompts: /nowhere.txt: No such file"),
        (["--greedy", "--top-p", "0.9"], "--top-p goes with a temperature above 0"),
    ],
)
def test_mistakes_of_a_conversation(args, message, model_dir, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the cat")))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        talk(model_dir, *args)
    assert "\n" not in str(error.value)


def test_a_format_in_place_of_a_template(model_dir, tmp_path, monkeypatch):
    import shutil

    from transformers import AutoTokenizer

    bare = shutil.copytree(model_dir, tmp_path / "bare")
    for file in ("jaxup_manifest.json", "chat_template.jinja"):
        (bare / file).unlink()
    tokenizer = AutoTokenizer.from_pretrained(bare)
    terminal = Terminal(monkeypatch, tokenizer, ["the cat"], "sat")
    with pytest.raises(UserError, match="bare: the tokenizer has no chat template; name one with --format: metharme"):
        talk(bare)
    talk(bare, "--format", "metharme")
    assert terminal.prompts == ["<|user|>the cat<|model|>"]
