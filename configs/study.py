"""How many layers to inherit: a study of three sizes of the target, each with two seeds.

    python -m jaxup.train --config=study.py

Its six runs are those of `inherit_gpt2.py` with `inherit.layers` of 1, 2 and 3. The reference of each seed is trained
once, and so are the programs compiled. Any configuration is a study with other values of its own:

    python -m jaxup.train --config=inherit_gpt2.py:smoke \\
        --config.study.axes="inherit.which: first last; optimizer.learning_rate: 1e-3 2e-3" --config.study.seeds=0,1,2

Variants, after a colon and separated by commas:

    smoke      the same path in a minute, for CI
"""

from ml_collections import ConfigDict

from jaxup.experiments.config import load, variants


def get_config(arg: str = "") -> ConfigDict:
    v = variants(arg, size=("default", "smoke"))
    smoke = v["size"] == "smoke"
    c = load("inherit_gpt2.py:smoke" if smoke else "inherit_gpt2.py", shipped=True)
    c.steps = 10 if smoke else 100
    c.study.axes = "inherit.layers: 1 2 3"
    c.study.seeds = (0, 1)
    c.study.control = "layers=2"
    return c
