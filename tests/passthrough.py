"""mergekit's passthrough on numpy arrays, straight from its description: slow, short, trusting its input.

Shares no code with the package. `tests/oracles/mergekit_passthrough.py` compares it with mergekit.
"""

import re

import ml_dtypes  # noqa: F401  (numpy learns of bfloat16)
import numpy as np

LAYER = re.compile(r"^(.*\.(?:layers|h)\.)(\d+)(\..*)$")


def passthrough(recipe, models):
    """The tensors of the result, {name: array}.

    recipe: what YAML reads. models: {model as named in the recipe: {"tensors": {name: array}, "layers": n}}.
    The file of an untied model has a "lm_head.weight", that of a tied one has none.
    """
    module = {}
    if "modules" in recipe:
        module = recipe["modules"]["default"]
    body = module or recipe
    slices = body.get("slices")
    if not slices:
        model = body["models"][0]
        source = {**model, "layer_range": [0, models[name_of(model["model"])]["layers"]]}
        slices = [{"sources": [source]}]

    def scopes(slice):
        holders = [slice["sources"][0], slice, module, recipe]
        return [(holder.get("parameters") or {}).get("scale") for holder in holders]

    def tensors(slice):
        return models[name_of(slice["sources"][0]["model"])]["tensors"]

    def finished(array, name, scope, t):
        dtype, out_dtype = (recipe.get(key, "").removeprefix("torch.") for key in ("dtype", "out_dtype"))
        with np.errstate(over="ignore"):
            array = array.astype(dtype or array.dtype)
        factor = next((f for setting in scope if (f := factor_of(setting, name, t)) is not None), None)
        if factor is not None:
            with np.errstate(over="ignore"):
                array = (array.astype(np.float32) * np.float32(factor)).astype(array.dtype)
        with np.errstate(over="ignore"):
            return array.astype(out_dtype or array.dtype)

    out = {}
    count = 0
    for slice in slices:
        first, stop = slice["sources"][0]["layer_range"]
        for i in range(stop - first):
            t = i / (stop - first - 1) if stop - first > 1 else 1
            for name, array in tensors(slice).items():
                match = LAYER.match(name)
                if match and int(match[2]) == first + i:
                    out[f"{match[1]}{count}{match[3]}"] = finished(array, name, scopes(slice), t)
            count += 1
    for name, array in tensors(slices[0]).items():
        if is_embedding(name):
            out[name] = finished(array, name, scopes(slices[0]), 0)
    last = tensors(slices[-1])
    for name, array in last.items():
        if not is_embedding(name) and not LAYER.match(name):
            out[name] = finished(array, name, scopes(slices[-1]), 0)
    # mergekit writes no head here, and a model that lacks it: the head of a tied model is its embedding.
    if "lm_head.weight" in tensors(slices[0]) and "lm_head.weight" not in last:
        embedding = next(last[name] for name in last if is_embedding(name) and "wpe" not in name)
        out["lm_head.weight"] = finished(embedding, "lm_head.weight", scopes(slices[-1]), 0)
    return out


def name_of(model):
    """The text that names a model, whichever way a recipe writes it."""
    if isinstance(model, str):
        return model
    if "model" in model:
        return name_of(model["model"])
    return model["path"] + (f"@{model['revision']}" if model.get("revision") else "")


def factor_of(setting, name, t):
    """What one scope's `scale` says of a tensor; None if nothing."""
    if setting is None:
        return None
    if isinstance(setting, dict):
        setting = [setting]
    if isinstance(setting, list) and isinstance(setting[0], dict):
        for entry in setting:
            if entry.get("filter") in (None, "*") or entry["filter"] in name:
                return factor_of(entry["value"], name, t)
        return None
    if isinstance(setting, list):
        values = [float(value) for value in setting]
        place = t * (len(values) - 1)
        left = int(place)
        right = min(left + 1, len(values) - 1)
        return (1 - (place - left)) * values[left] + (place - left) * values[right]
    return float(setting)


def is_embedding(name):
    return any(part in name for part in ("embed_tokens", "wte", "wpe"))
