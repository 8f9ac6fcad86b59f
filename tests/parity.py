"""How far a model is from transformers on torch, by every road: `python tests/parity.py` prints the table."""

import functools
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from plain import load_params

from jaxup.families import FAMILIES, config_from_hf, family_of_hf
from jaxup.families.layouts import expected_tensors, to_file
from jaxup.hub.reader import load_config
from jaxup.hub.writer import save
from jaxup.model.config import Compute
from jaxup.model.decoder import KVCache, abstract
from jaxup.model.spec import flatten, spec
from jaxup.training.loss import cross_entropy

SEQ = 17  # odd, longer than the sliding windows and than what rotary scaling starts from
PROMPT, STEPS = 7, 64

# The largest difference that may be seen. Float32 rounds to 6e-8; logits are of order one and some
# hundred roundings deep. "bfloat16" is of the logits, relative, ours to ours in float32: 8 bits make
# one rounding a relative 2^-9 = 0.2%, and some ten of them lie between two points of the residual
# stream, per layer two; independent, they add up to 0.002 * sqrt(20 * layers), 1.5% for three
# layers. 5% leaves room for what attention amplifies.
LIMITS = {
    "logits": 1e-4,  # absolute
    "loss": 1e-4,  # relative
    "gradients": 1e-4,  # relative, of the worst parameter
    "greedy tokens": 0,  # how many of 2 x 64 differ
    "cached logits": 1e-5,  # absolute, to our full forward pass
    "saved tensors": 0,  # how many differ in name or bytes after loading and saving
    "exported logits": 0,  # absolute: the same weights in the same program
    "bfloat16": 0.05,
}


def rope(kind, **parameters):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **parameters}}


LLAMA3 = rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8)
YARN = rope("yarn", factor=8.0, original_max_position_embeddings=4, beta_fast=2.0, beta_slow=0.2)
MIXED = {"use_sliding_window": True, "sliding_window": 4,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}  # fmt: skip
LAST_WINDOWED = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}

# By name: the family, and what its config has besides `SIZES`. Those in OLD are read from a config.json as
# transformers 4 writes it.
CASES = {
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": 28, "layer_norm_epsilon": 1e-3}),
    "gpt2-depth-scaled": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"}),
    "gpt2-upcast": ("gpt2", {"reorder_and_upcast_attn": True, "activation_function": "gelu"}),
    "llama-mha": ("llama", {}),
    "llama-gqa-tied": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-mqa-wide-heads": ("llama", {"num_key_value_heads": 1, "head_dim": 10}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-2}),
    "llama-heads-of-100": ("llama", {"hidden_size": 200, "num_attention_heads": 2, "num_key_value_heads": 2}),
    "llama-linear": ("llama", rope("linear", factor=2.5)),
    "llama-llama3": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, **LLAMA3}),
    "llama-yarn": ("llama", {"head_dim": 12, **rope("yarn", factor=4.0, truncate=False, mscale=0.7, mscale_all_dim=1.3,
                                                    original_max_position_embeddings=8)}),
    "mistral-window": ("mistral", {"num_key_value_heads": 1}),
    "mistral-no-window": ("mistral", {"sliding_window": None, "head_dim": 6}),
    "qwen2": ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", YARN),
    "qwen2-mixed": ("qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2, **MIXED}),
    "qwen3": ("qwen3", {"head_dim": 6, "num_key_value_heads": 1}),
    "qwen3-last-windowed": ("qwen3", {"tie_word_embeddings": True, "rms_norm_eps": 1e-2, **LAST_WINDOWED}),
    "qwen3-biases-mixed-yarn": ("qwen3", {"attention_bias": True, **MIXED, **YARN}),
    "gemma": ("gemma", {"num_key_value_heads": 1}),
    "gemma-untied-biases": ("gemma", {"tie_word_embeddings": False, "attention_bias": True, **LLAMA3}),
}  # fmt: skip
OLD = {"gpt2", "llama-llama3", "mistral-window", "qwen2-yarn", "qwen3-last-windowed", "gemma"}

SIZES = {
    "gpt2": dict(vocab_size=61, n_embd=24, n_layer=3, n_head=3, n_positions=96),
    "llama": dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
                  num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=64),
}  # fmt: skip
SIZES["mistral"] = SIZES["llama"] | {"sliding_window": 5}
SIZES["qwen2"] = SIZES["llama"]
SIZES["qwen3"] = SIZES["llama"] | {"head_dim": 8}
# torch gives the embedding of a padding token no gradient.
SIZES["gemma"] = SIZES["llama"] | {"head_dim": 10, "pad_token_id": None}


def hf_model(model_type, seed=0, **config):
    """A small transformers model with far from trivial weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    hf = AutoConfig.for_model(model_type, **json.loads(json.dumps({**SIZES[model_type], **ids, **config})))
    hf._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(hf).eval()
    std = 0.15 * min(1, 24 / hf.hidden_size) ** 0.5  # logits stay of order one
    norms = 0.0 if model_type == "gemma" else 1.0  # there they multiply by one more
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Norms around one and not at one; biases not at zero: a mix-up must show.
            p.normal_(norms if "ln_" in name or "norm" in name else 0.0, std)
    return model


def tokens_for(config, seed=0, batch=2, seq=SEQ):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, seq), dtype=np.int32)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
@functools.partial(jax.value_and_grad, argnums=2, has_aux=True)
def loss_and_grad(config, compute, params, tokens, segment_ids=None, chunk=8):
    """((mean loss, logits), gradients), compiled as one."""
    graphdef, _ = abstract(config, compute)
    model = nnx.merge(graphdef, params)
    targets = jnp.roll(tokens, -1, axis=1)
    weights = jnp.ones(tokens.shape).at[:, -1].set(0)
    hidden = model.hidden(tokens, segment_ids_BS=segment_ids)
    loss, _ = cross_entropy(hidden, model.head_kernel(), targets, weights, chunk=chunk, z_loss=0.0)
    return loss / weights.sum(), hidden @ model.head_kernel().astype(hidden.dtype)


@functools.partial(jax.jit, static_argnums=0)
def greedy(config, params, prompt_BS):
    """STEPS tokens [batch, STEPS] after the prompt, and the logits that chose them, three times: decoded with a
    cache, by one pass over the whole sequence, and by one in bfloat16."""
    (model, _), (low, _) = abstract(config), abstract(config, Compute(dtype="bfloat16"))

    def step(carry, _):
        logits_BV, cache = carry
        tokens_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return nnx.merge(model, params).decode(tokens_B[:, None], cache), (tokens_B, logits_BV)

    batch, length = prompt_BS.shape
    cache = KVCache.empty(config, batch, length + STEPS, jnp.float32)
    start = nnx.merge(model, params).decode(prompt_BS, cache)
    _, (tokens, cached) = jax.lax.scan(step, start, length=STEPS)
    tokens, cached = jnp.swapaxes(tokens, 0, 1), jnp.swapaxes(cached, 0, 1)
    sequence = jnp.concatenate([prompt_BS, tokens], axis=1)
    full, rounded = (nnx.merge(graphdef, params)(sequence)[:, length - 1 : -1] for graphdef in (model, low))
    return tokens, cached, full, rounded


def spell_as_transformers_4(directory):
    path = Path(directory) / "config.json"
    hf = json.loads(path.read_text())
    hf["torch_dtype"] = hf.pop("dtype", None)
    if parameters := hf.pop("rope_parameters", None):
        hf["rope_theta"] = parameters.pop("rope_theta")
        hf["rope_scaling"] = None if parameters["rope_type"] == "default" else parameters
    if hf.get("use_sliding_window"):
        hf.pop("layer_types")  # what `max_window_layers` says, until 4.53
    path.write_text(json.dumps(hf))


def differences(model, directory, *, old=False):
    """Keys of LIMITS -> how far a transformers model and ours, read from what it saved, are apart."""
    import torch
    from transformers import AutoModelForCausalLM

    directory = Path(directory)
    theirs, ours = directory / "theirs", directory / "ours"
    model.save_pretrained(theirs)
    if old:
        spell_as_transformers_4(theirs)
    config = load_config(theirs)
    params = load_params(theirs, config)

    # Compiled in the background: two programs on two cores.
    prompt = tokens_for(config, seed=1, seq=PROMPT)
    decoding = ThreadPoolExecutor(1).submit(greedy, config, params, prompt)

    tokens = tokens_for(config)
    batch = torch.tensor(tokens, dtype=torch.long)
    output = model(batch, labels=batch)
    output.loss.backward()
    expected = output.logits.detach().numpy()
    (loss, logits), grads = loss_and_grad(config, Compute(), params, tokens)
    assert np.abs(expected).max() > 0.3  # small logits would agree whatever the weights

    model.generation_config.eos_token_id = None
    # A window of one token leaves nothing to cache, and transformers' slice [-0:] then keeps everything.
    use_cache = getattr(model.config, "sliding_window", None) != 1
    generated = model.generate(
        torch.tensor(prompt, dtype=torch.long), attention_mask=torch.ones(prompt.shape, dtype=torch.long),
        max_new_tokens=STEPS, do_sample=False, pad_token_id=1, use_cache=use_cache,
    ).numpy()[:, PROMPT:]  # fmt: skip
    assert generated.shape == (2, STEPS)
    chosen, cached, full, rounded = decoding.result()

    save(ours, config, params, model_type=model.config.model_type)
    a, b = (safetensors.numpy.load_file(d / "model.safetensors") for d in (theirs, ours))
    # Not the function but its rounding, so our config.json has nothing of it.
    upcast = {"reorder_and_upcast_attn": True} if getattr(model.config, "reorder_and_upcast_attn", False) else {}
    again, report = AutoModelForCausalLM.from_pretrained(
        ours, attn_implementation="eager", output_loading_info=True, **upcast
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(model)
    with torch.no_grad():
        exported = again(batch).logits.numpy()

    return {
        "logits": float(np.abs(logits - expected).max()),
        "loss": abs(float(loss) - output.loss.item()) / output.loss.item(),
        "gradients": gradient_difference(model, grads),
        "greedy tokens": int((chosen != generated).sum()),
        "cached logits": float(np.abs(cached - full).max()),
        "saved tensors": sum(k not in a or k not in b or a[k].tobytes() != b[k].tobytes() for k in {*a, *b}),
        "exported logits": float(np.abs(exported - expected).max()),
        "bfloat16": float(relative(rounded.astype(jnp.float32), full)),
    }


def gradient_difference(model, grads):
    """The worst parameter's, relative to its own gradient, in the layout of the file.

    Some gradients are zero in exact arithmetic (softmax ignores what is added to all keys, and all
    of q and k where the window is one token) and others nearly: float32 cannot tell them from 1e-7,
    its epsilon, of the whole gradient, so that much is granted to every parameter.
    """
    flat = flatten(jax.tree.map(np.asarray, grads))
    hf = json.loads(model.config.to_json_string())
    table = spec(config_from_hf(hf))
    ours = {
        t.name: to_file(t, [flat[p] if t.layer is None else flat[p][t.layer] for p in t.paths])
        for t in expected_tensors(family_of_hf(hf).rows(table), table)
    }
    theirs = {name: p.grad.numpy().astype(np.float64) for name, p in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    floor = 1e-7 / LIMITS["gradients"] * np.sqrt(sum(np.sum(g**2) for g in theirs.values()))
    return float(np.max([np.linalg.norm(ours[k] - g) / max(np.linalg.norm(g), floor) for k, g in theirs.items()]))


def beyond_limits(found):
    return {check: value for check, value in found.items() if not value <= LIMITS[check]}


def table(found):
    """Markdown: (family, differences) pairs -> a row per family with the largest of each check."""
    rows = [["family", "models", *LIMITS], ["---", *["---:"] * (len(LIMITS) + 1)]]
    for family in FAMILIES:
        models = [values for name, values in found if name == family]
        worst = [max(values[check] for values in models) for check in LIMITS] if models else []
        rows.append([family, str(len(models)), *(f"{w:.1e}" if isinstance(w, float) else str(w) for w in worst)])
    rows.append(["limit", "", *map(str, LIMITS.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main():
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)  # tiny models: several threads only wait for each other
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found, failed = [], []
    for name, (model_type, config) in CASES.items():
        with tempfile.TemporaryDirectory() as directory:
            values = differences(hf_model(model_type, **config), directory, old=name in OLD)
        found.append((model_type, values))
        failed += [f"{name}: {check} {value}" for check, value in beyond_limits(values).items()]
    print(table(found))
    print(*failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
