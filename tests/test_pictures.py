"""What is drawn of differences: the shades against NumPy and SciPy, the pictures, and the page in a browser."""

import base64
import hashlib
import importlib.util
import json
import re
import shutil

import numpy as np
import pytest
import scipy.stats

from jaxup.depth.picture import COLORS
from jaxup.errors import UserError
from jaxup.lens import heatmap
from jaxup.lens.alignment import Origin
from jaxup.lens.differences import Differences
from jaxup.lens.metrics import METRICS
from jaxup.lens.page import page

MODULES = ("input_layernorm", "q_proj", "o_proj", "down_proj")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> $x_1$ \x1b[31m\u202e 大"


def made_up(base=4, copies=2, models=3, modules=MODULES, name="base"):
    """`base` layers, after which copies of the last ones follow; layer 0 changes a hundred times as much."""
    origins = [Origin(i, "=", name) for i in range(base)] + [
        Origin(base - copies + i, "z", name) for i in range(copies)
    ]
    pairs = [(i, i + 1) for i in range(models - 1)] + [(0, i) for i in range(2, models)]
    rng = np.random.default_rng(0)
    values = {m: rng.uniform(1e-4, 2e-4, (len(pairs), len(origins), len(modules))) for m in METRICS}
    for each in values.values():
        each[:, 0] *= 100
        each[:, base:] *= 3
    ends = {m: {"norm": rng.random(len(pairs)), "lm_head": np.full(len(pairs), np.nan)} for m in METRICS}
    names = (name, *(f"healed/{i}" for i in range(1, models)))
    return Differences(names, tuple(pairs), modules, tuple(origins), values, ends, (f"a note of {name}",))


def cases():
    rng = np.random.default_rng(1)
    values = rng.lognormal(-9, 1, (2, 30, 6))
    values[0, 3] *= 1000
    values[1, 4, 1], values[:, 5, 2], values[0, 6, 3] = np.inf, np.nan, 0
    values[..., 4], values[..., 5] = 0.5, np.inf
    values[0, 7, 0] = values[1, 8, 0]
    return values


def test_shades_are_those_of_the_scale():
    values = cases()
    there, finite = ~np.isnan(values), np.isfinite(values)
    for scale in heatmap.SCALES:
        found = heatmap.shades(values, scale)
        assert (np.isnan(found.shade) == ~there).all()
        assert (found.outlier >= np.isinf(values)).all()
        assert scale == "rank" or (found.shade[..., 5] == 1).all()
        for column in range(5):
            of, drawn, shade = values[..., column], finite[..., column], found.shade[..., column]
            if scale == "rank":
                ranks = scipy.stats.rankdata(of[there[..., column]])
                wanted = (ranks - 1) / (len(ranks) - 1)
                np.testing.assert_allclose(shade[there[..., column]], wanted)
                continue
            if scale == "robust":
                first, third = np.percentile(of[drawn], [25, 75])
                fence = 1.5 * scipy.stats.iqr(of[drawn])
                drawn = drawn & ((of >= first - fence) & (of <= third + fence))
                assert (found.outlier[..., column] == there[..., column] & ~drawn).all()
                assert found.outlier[0, 3, column] == (column != 4)
            if scale in ("global", "log"):
                of, drawn, shade = values, finite & ((values > 0) | (scale != "log")), found.shade
            low, high = of[drawn].min(), of[drawn].max()
            assert (found.low[column], found.high[column]) == (low, high)
            to = np.log if scale == "log" else np.asarray
            wanted = (to(of[drawn]) - to(low)) / max(to(high) - to(low), 1e-300)
            np.testing.assert_allclose(shade[drawn], wanted, atol=1e-12)
    assert (heatmap.shades(values, "log").shade[0, 6, 3], heatmap.shades(values, "column").shade[1, 4, 1]) == (0, 1)
    # One layer hides the rest: nearly all are of one shade, unless it is clipped.
    q = [np.nanpercentile(heatmap.shades(made_up().values["rms"], s).shade, 60) for s in ("global", "robust")]
    assert q[0] < 0.05 < 0.2 < q[1]
    with pytest.raises(UserError, match="'logarithm' is no scale"):
        heatmap.shades(values, "logarithm")


def test_a_picture_has_layer_0_at_the_bottom_and_says_what_is_what():
    found = made_up(name=HOSTILE)
    figure = heatmap.differences(found, pairs=[1, 0])
    first, strip = figure.axes[:2]
    np.testing.assert_array_equal(
        first.images[0].get_array(), heatmap.shades(found.values["mean_abs"][[1, 0]], "robust").shade[0]
    )
    assert first.images[0].origin == "lower"
    assert [label.get_text() for label in strip.get_yticklabels()] == ["0", "1", "2", "3", "4 ← 2", "5 ← 3"]
    colors = np.asarray(strip.images[0].get_array())[:, 0]
    assert ["#" + bytes(np.round(255 * c).astype(np.uint8)).hex().upper() for c in colors] == [
        COLORS[r] for r in "====zz"
    ]
    said = "\n".join(text.get_text() for text in figure.texts)
    assert "= original (4)" in said
    assert "mean |difference|, in units of the weights" in said
    largest = found.values["mean_abs"][1, 0].max()
    assert re.search(rf"layer 0 of .*{largest:.3g}", said)
    assert "\x1b" not in said
    assert [label.get_text().split("\n")[0] for label in first.get_xticklabels()] == list(MODULES)
    drawn = heatmap.png(figure, dpi=50)
    assert drawn[:4] == b"\x89PNG"
    deep = made_up(3000, 10, models=2)
    figure = heatmap.differences(deep)
    assert figure.get_size_inches().max() < 70
    assert len(figure.axes[1].get_yticks()) < 700
    with pytest.raises(UserError, match="'rank' was not measured"):
        heatmap.differences(found, "rank")


def test_where_layers_came_from():
    origins = [Origin(0, "=", "m"), Origin(3, "X", "other"), Origin(None, "n", "?")]
    assert heatmap.labels(origins) == ["0 ← a0", "1 ← b3", "2"]
    assert heatmap.labels(origins[1:]) == ["0 ← 3", "1"]


def test_the_page_has_every_number_and_nothing_that_runs_but_its_own():
    found = made_up(name=HOSTILE, modules=(*MODULES, "<i>x"))
    found.values["rms"][0, 1, :2] = np.nan, np.inf
    text = page(found)
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "<i>x" not in text
    assert not {"\x1b", "\u202e"} & set(text)
    assert set(re.findall(r"https?:[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    for metric, values in found.values.items():
        np.testing.assert_allclose(np.array(data["values"][metric], float), values, 1e-5)  # null is NaN, "inf" inf
    assert data["ends"]["rms"]["lm_head"] == [None] * 3
    policy = re.search(r'Security-Policy" content="(.*?)"', text)[1]
    assert policy.startswith("default-src 'none'; ")
    for tag in ("style", "script"):
        own = re.search(f"<{tag}>(.*?)</{tag}>", text, re.S)[1]
        assert base64.b64encode(hashlib.sha256(own.encode()).digest()).decode() in policy
    table = re.search("<noscript>(.*?)</noscript>", text, re.S)[1]
    assert table.count("<td>") == 3 * 6 * 5
    large = made_up(55, 44, models=6, modules=tuple(f"module_{i}" for i in range(18)))
    assert len(page(large).encode()) < 2_000_000


# ---- in a browser


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium here")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, tmp_path):
    """Opens the page of differences; nothing may be asked of a network, and nothing be said to the console."""
    said, contexts = [], []

    def open_page(found, **how):
        (tmp_path / "index.html").write_text(page(found), "utf-8")
        contexts.append(chromium.new_context(viewport={"width": 1400, "height": 900}, **how))
        shown = contexts[-1].new_page()
        shown.on("console", lambda message: said.append(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.on("dialog", lambda dialog: said.append(dialog.message))
        shown.on("request", lambda request: said.append(request.url) if not request.url.startswith("file:") else None)
        shown.goto(f"file://{tmp_path}/index.html")
        return shown

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


@pytest.mark.slow
def test_the_browser_has_the_shades_of_the_pictures(opened):
    shown, values = opened(made_up()), cases()
    nested = [[[None if np.isnan(v) else "inf" if np.isinf(v) else v for v in row] for row in p] for p in values]
    for scale in heatmap.SCALES:
        made = shown.evaluate(
            "([v, scale]) => shades(v.map(p => p.map(r => r.map(x => x === 'inf' ? Infinity : x))), scale)",
            [nested, scale],
        )
        wanted = heatmap.shades(values, scale)
        for name, array in wanted._asdict().items():
            np.testing.assert_allclose(np.array(made[name], float), array.astype(float), 1e-9, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("base", "copies", "scheme"), [(4, 2, "light"), (30, 10, "dark"), (55, 44, "light")])
def test_the_page_is_walked_and_switched(opened, base, copies, scheme):
    found = made_up(base, copies, name=HOSTILE)
    shown = opened(found, color_scheme=scheme)
    last = base + copies - 1
    rows = shown.locator(".map tbody tr")
    assert rows.count() == last + 1
    assert rows.last.locator("th").get_attribute("aria-label").startswith("layer 0, original, layer 0 of ")
    dark = shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    assert dark == (scheme == "dark")

    shown.locator("td[tabindex='0']").focus()
    for key, row, column in [("ArrowDown", 1, 0), ("ArrowRight", 1, 1), ("End", 1, 3), ("ArrowRight", 1, 3),
                             ("Control+End", last, 3), ("ArrowLeft", last, 2), ("ArrowUp", last - 1, 2),
                             ("PageUp", max(last - 11, 0), 2), ("Control+Home", 0, 0)]:  # fmt: skip
        shown.keyboard.press(key)
        value = found.values["mean_abs"][1, last - row, column]
        spoken = shown.inner_text("[role=status]")
        assert spoken.startswith(f"layer {last - row}, ")
        assert f", {MODULES[column]}: " in spoken
        assert float(re.search(rf"{MODULES[column]}: ([\d.e-]+)", spoken)[1]) == pytest.approx(value, rel=0.006)
        assert shown.locator("td[tabindex='0']").count() == 1
    rows.last.locator("td").nth(1).hover()
    assert ", clipped" in shown.inner_text("[role=status]")
    assert "relative" in shown.inner_text("#more")
    assert "outliers, clipped" in shown.inner_text("aside")

    shown.select_option("[name=order]", "origin")
    labels = [label.split()[1].rstrip(",") for label in shown.eval_on_selector_all(
        ".map tbody th", "all => all.map(th => th.getAttribute('aria-label'))")]  # fmt: skip
    assert labels[:2] == [str(last), str(base - 1)]  # a copy beside its origin
    assert shown.locator("aside th[scope=col]").all_inner_texts() == ["norm"]
    assert shown.inner_text("aside tr:last-child td") == f"{found.ends['mean_abs']['norm'][1]:.3g}"
    shown.select_option("[name=pair]", "all")
    assert shown.locator(".map").count() == 3
    tops = {round(shown.locator(".map").nth(i).locator("tbody").bounding_box()["y"]) for i in range(3)}
    assert len(tops) == 1
    for metric in METRICS:
        shown.select_option("[name=metric]", metric)
        assert f"{metric}, " in shown.locator(".map").first.get_attribute("aria-label")
    shown.check("[name=numbers]")
    shown.select_option("[name=view]", "lines")
    assert shown.locator("svg").count() == len(MODULES)
    shown.locator("svg").first.focus()
    shown.keyboard.press("End")
    shown.keyboard.press("ArrowLeft")
    assert shown.inner_text("[role=status]").startswith(f"layer {base - 1}, original")


@pytest.mark.slow
def test_the_page_without_javascript_is_a_table(opened):
    shown = opened(made_up(), java_script_enabled=False)
    assert shown.locator("table").count() == 3
    assert "5 ← 3" in shown.inner_text("main")
