"""Recipes against the orders of layers that papers and model cards give, and recipes in one line."""

import dataclasses
import itertools
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxup.depth import recipes
from jaxup.depth.plan import ENDS, ZEROED, DepthPlan, Row
from jaxup.errors import UserError
from jaxup.recipes.line import RECIPES, is_line, parse, usage


def order(plan):
    """(layer, zeroed) of each layer of the result; nothing else may be unusual about it."""
    for row in plan.rows:
        assert row.scales in ((), ZEROED)
    assert all(getattr(plan, end) == plan.sources[0][0] for end in ENDS)
    return [(row.layer, row.zeroed) for row in plan.rows]


def span(start, stop, zeroed=False):
    return [(layer, zeroed) for layer in range(start, stop)]


def refused(message, function, *args, **kwargs):
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# ---- what was published


def test_llama_3_15b_zeroed():
    plan = recipes.upscale("m", 32, range(8, 24), copies=2)
    assert order(plan) == span(0, 24) + span(8, 24, True) + span(8, 24, True) + span(24, 32)
    assert plan.num_layers == 64


def test_tunguska():
    """[0,41] + zeroed [19,41] twice + [41,55]: 99 layers, the source's last one left out."""
    plan = parse("upscale(inherit(m, 55), 19:41, copies=2)").plan(56)
    assert order(plan) == span(0, 41) + span(19, 41, True) + span(19, 41, True) + span(41, 55)
    assert plan.num_layers == 99
    assert plan.sources == (("m", 56),)
    assert recipes.upscale("m", 56, range(19, 41), copies=2).num_layers == 100  # without the slip


def test_interleave():
    expected = span(0, 19)
    for layer in range(19, 41):
        expected += [(layer, False), (layer, True), (layer, True)]
    expected += span(41, 56)
    plan = recipes.interleave("m", 56, range(19, 41), copies=2)
    assert order(plan) == expected
    assert plan.num_layers == 100
    assert order(parse("interleave(inherit(m, 55), 19:41, copies=2)").plan(56)) == expected[:-1]


def test_llama_pro():
    """github.com/TencentARC/LLaMA-Pro, block_expansion.py: a copy after layer i where (i + 1) % 4 == 0."""
    expected = []
    for layer in range(32):
        expected.append((layer, False))
        if (layer + 1) % 4 == 0:
            expected.append((layer, True))
    plan = recipes.expand("m", 32, 4)
    assert order(plan) == expected
    assert [i for i, row in enumerate(plan.rows) if row.role == "copy"] == list(range(4, 40, 5))


def test_solar():
    plan = recipes.solar("m", 32, 8)
    assert order(plan) == span(0, 24) + span(8, 32)
    assert plan.strip() == "=" * 24 + "X" * 16 + "=" * 8


def test_g_stack():
    plan = recipes.stack("m", 6, 4, noise=0.2)
    assert order(plan) == span(0, 6) * 4
    assert [row.noise for row in plan.rows] == [0.0] * 6 + [0.2] * 18
    assert recipes.stack("m", 6, 1) == recipes.identity("m", 6)


def test_inheritune():
    # arXiv 2404.08634: 13 of OpenLLaMA-3B's 26; GPT-2 medium's rounds of 12, 14, 16.
    assert order(recipes.inherit("m", 26, 13)) == span(0, 13)
    assert [recipes.inherit("m", 24, n).num_layers for n in (12, 14, 16)] == [12, 14, 16]


def test_rys():
    """(i, j) runs 0..j-1, then i..N-1."""
    assert order(recipes.duplicate("m", 80, range(45, 52))) == span(0, 52) + span(45, 80)
    two = recipes.duplicate("m", 32, [range(20, 24), range(10, 14)])
    assert order(two) == span(0, 14) + span(10, 24) + span(20, 32)
    thrice = recipes.duplicate("m", 8, [range(2, 4), 6], times=2)
    assert order(thrice) == span(0, 4) + span(2, 4) * 2 + span(4, 7) + span(6, 7) * 2 + span(7, 8)


def test_pruning():
    """PruneMe on Mistral-7B: [0,21] + [29,32]. ShortGPT deletes single layers."""
    assert order(recipes.drop("m", 32, range(21, 29))) == span(0, 21) + span(29, 32)
    assert order(recipes.drop("m", 32, [27, range(21, 26)])) == span(0, 21) + span(26, 27) + span(28, 32)
    assert order(recipes.drop("m", 32, 0)) == span(1, 32)
    assert recipes.drop("m", 32, [3, 3]).num_layers == 31
    assert order(recipes.drop("m", 32, layers=24)) == span(0, 23) + span(31, 32)  # the deepest but the last
    assert order(recipes.drop("m", 32, layers=1)) == span(31, 32)
    assert order(recipes.drop("m", 32, layers=32)) == span(0, 32)


# ---- any numbers


@settings(max_examples=60)
@given(st.data())
def test_repeats_are_a_loop(data):
    layers = data.draw(st.integers(1, 12))
    ends = sorted(data.draw(st.sets(st.integers(0, layers), min_size=2, max_size=6)))
    spans = [range(a, b) for a, b in zip(ends[::2], ends[1::2])]
    times = data.draw(st.integers(1, 3))
    expected, single = [], []
    for layer in range(layers):
        inside = next((s for s in spans if layer in s), None)
        expected.append((layer, "original"))
        single.append((layer, "original"))
        if inside is not None:
            single += [(layer, "copy")] * times
            if layer == inside[-1]:
                expected += [(copied, "copy") for copied in inside] * times
    shuffled = data.draw(st.permutations(spans))
    for plan, want in (
        (recipes.duplicate("m", layers, shuffled, times=times), expected),
        (recipes.upscale("m", layers, shuffled, copies=times), expected),
        (recipes.interleave("m", layers, shuffled, copies=times), single),
    ):
        assert [(row.layer, row.role) for row in plan.rows] == want
    silent = {row.zeroed for row in recipes.upscale("m", layers, spans).rows if row.role == "copy"}
    assert silent == {True}
    assert not any(row.zeroed for row in recipes.duplicate("m", layers, spans).rows)


@pytest.mark.parametrize(
    ("recipe", "args", "message"),
    [
        ("upscale", (range(19, 19),), "upscale: 19:19 is empty: ranges are half open; did you mean 19:20?"),
        ("upscale", (range(56, 56),), "did you mean 55:56?"),
        ("upscale", (range(41, 19),), "upscale: 41:19 is empty: ranges go up; did you mean 19:41?"),
        ("upscale", (range(19, 57),), "19:57 is too far: 'm' has layers 0-55, 0:56 as a range"),
        ("upscale", (range(-1, 4),), "-1:4 is too far"),
        ("upscale", ([],), "the list of layers is empty"),
        ("upscale", ([range(0, 9, 2)],), "0:9:2 has a step"),
        ("duplicate", ([range(1, 4), range(3, 6)],), "duplicate: 1:4 and 3:6 overlap"),
        ("interleave", ([5, 5],), "interleave: 5:6 and 5:6 overlap"),
        ("drop", (56,), "drop: layer 56 is not there: 'm' has layers 0-55"),
        ("drop", (range(0, 56),), "drop: nothing would be left of 'm', which has 56 layers"),
        ("expand", (0,), "expand: every=0 must be at least 1"),
        ("expand", (57,), "expand: every=57 adds nothing"),
        ("solar", (29,), "solar: m=29 would leave layers of 'm' out, which has 56: m is at most 28"),
        ("solar", (-1,), "m=-1 must be at least 0"),
        ("stack", (0,), "stack: times=0"),
        ("stack", (10**9,), "stack: the result would have 56000000000 layers; 10000 are the most"),
    ],
)
def test_refusals(recipe, args, message):
    refused(message, RECIPES[recipe], "m", 56, *args)


def test_more_refusals():
    refused("copies=0 must be at least 1", recipes.upscale, "m", 56, range(1, 2), copies=0)
    refused("10000 are the most", recipes.interleave, "m", 56, range(1, 2), copies=10**12)
    refused("noise=1.5 is not a share from 0 to 1", recipes.stack, "m", 56, 2, noise=1.5)
    refused("noise=nan", recipes.stack, "m", 56, 2, noise=float("nan"))
    refused("did you mean 'last'?", recipes.inherit, "m", 56, 2, which="lats")


# ---- in one line


@pytest.mark.parametrize(
    ("line", "model", "plan"),
    [
        ("identity(m)", "m", recipes.identity("m", 56)),
        ("interleave(model, 19:41, copies=2)", "model", recipes.interleave("model", 56, range(19, 41), copies=2)),
        (" upscale ( org/Name-7B , 8:24 , copies = 2 , ) ", "org/Name-7B",
         recipes.upscale("org/Name-7B", 56, range(8, 24), copies=2)),
        ("stack(./dir, times=4, noise=0.2)", "./dir", recipes.stack("./dir", 56, 4, noise=0.2)),
        ("stack(gs://bucket/a b, 4, noise=1)", "gs://bucket/a b", recipes.stack("gs://bucket/a b", 56, 4, noise=1.0)),
        ('drop("a path, with comma", [3, 21:29])', "a path, with comma",
         recipes.drop("a path, with comma", 56, [3, range(21, 29)])),
        (r"drop('it\'s \\ \"(', 3)", "it's \\ \"(", recipes.drop("it's \\ \"(", 56, 3)),
        ("inherit(m, 6, parts=[mlp, norms])", "m", recipes.inherit("m", 56, 6, parts=["mlp", "norms"])),
        ("inherit(m, every=2, which=last, parts=mlp)", "m",
         recipes.inherit("m", 56, every=2, which="last", parts=["mlp"])),
        ("duplicate(m@main, [10:14, 20:24])", "m@main",
         recipes.duplicate("m@main", 56, [range(10, 14), range(20, 24)])),
        ("drop(m, 50:)", "m", recipes.drop("m", 56, range(50, 56))),
        ("drop(m, layers=:4)", "m", recipes.drop("m", 56, range(4))),
        ("drop(m, layers=24)", "m", recipes.drop("m", 56, layers=24)),
        ("expand(m, every=4)", "m", recipes.expand("m", 56, 4)),
        ("solar(m, m=8)", "m", recipes.solar("m", 56, 8)),
    ],
)  # fmt: skip
def test_lines(line, model, plan):
    call = parse(line)
    assert call.sources == (model,)
    assert call.plan(56) == plan


def test_nested_lines():
    """Each recipe sees the layers that the one inside makes, by their places in its result."""
    plan = parse("drop(duplicate(stack(m, 2), 0:1), 3:)").plan(4)  # 0 0 | 1 2 3 0 1 2 3 -> 0 0 1
    assert [row.layer for row in plan.rows] == [0, 0, 1]
    assert plan.sources == (("m", 4),)
    assert parse("upscale(inherit(m, 55), 19:41, copies=2)").sources[0].text == "inherit(m, 55)"
    line = "m"
    for _ in range(8):
        line = f"identity({line})"
    assert parse(line).plan(3) == recipes.identity("m", 3)
    refused("recipe:1:73: recipes are nested more than 8 deep", parse, f"identity({line})")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("upscal(m, 2:3)", "recipe:1:1: unknown recipe 'upscal'; did you mean 'upscale'?"),
        ("identity(upscal(m, 2:3))", "recipe:1:10: unknown recipe 'upscal'"),
        ("upscale(m, 19:19)", "recipe:1:12: 19:19 is empty: ranges are half open; did you mean 19:20?"),
        ("upscale(m, 41:19)", "recipe:1:12: 41:19 is empty: ranges are half open and go up; did you mean 19:41?"),
        ("upscale(m, 19:57)", "recipe:1:12: 19:57 is too far: 'm' has layers 0-55, 0:56 as a range"),
        ("upscale(m, 56:)", "recipe:1:12: 56:56 is empty"),
        ("drop(m, [1:3, 99])", "recipe:1:9: layer 99 is not there"),
        ("drop(m, 99)", "recipe:1:1: drop: layer 99"),
        ("drop(m)", "recipe:1:1: drop: what goes is said in one way: [21:29], layers=24 or params=6e9"),
        ("drop(m, [3], layers=24)", "recipe:1:1: drop: what goes is said in one way"),
        ("drop(m, layers=57)", "recipe:1:1: drop: layers=57 are more than the 56 of 'm'"),
        ("drop(m, layers=0)", "recipe:1:1: drop: layers=0 must be at least 1"),
        ("drop(m, params=6e9)", "recipe:1:1: drop: params=6e+09 needs a model: of 'm' only the number of layers is"),
        ("drop(m, params=many)", "recipe:1:16: params must be a number, such as 6e9, not many"),
        ("upscale(m, 19)", "recipe:1:12: upscale needs a range or a list of layers; did you mean 19:20?"),
        ("upscale(m)", "recipe:1:10: upscale needs layers: upscale(MODEL, layers, copies=1)"),
        ("upscale(m 1:3)", "recipe:1:14: upscale needs layers"),
        ("upscale()", "recipe:1:9: upscale needs a model: upscale(MODEL, layers, copies=1)"),
        ("upscale", "recipe:1:1: a recipe looks like upscale("),
        ("", "recipe:1:1: a recipe looks like"),
        ("upscale(", "recipe:1:9: upscale needs a model"),
        ("upscale(m", "recipe:1:10: expected ')' at the end of upscale(...), and the recipe ends here"),
        ("upscale(m, 1:3", "recipe:1:15: expected ')'"),
        ("upscale(m, 1:3) x", "recipe:1:17: 'x' is left over"),
        ("upscale(m, 1:3, copise=2)", "recipe:1:17: upscale has no argument 'copise'; did you mean 'copies'? ("),
        ("upscale(m, 1:3, 2)", "recipe:1:17: upscale takes no more arguments without a name (upscale(MODEL"),
        ("upscale(m, copies=2, 1:3)", "recipe:1:22: '1:3)' has no name"),
        ("upscale(m, 1:3, layers=2:3)", "recipe:1:17: layers is given twice"),
        ("upscale(m, 19-40)", "recipe:1:12: 19-40 is not understood: layers 19 to 40 are written 19:41"),
        ("upscale(m, 3-1)", "recipe:1:12: 3-1 is not understood: layers 1 to 3 are written 1:4"),
        ("upscale(m, -3:)", "recipe:1:12: -3: is not understood: numbers and layers count from 0"),
        ("upscale(m, 1:5:2)", "no step"),
        ("upscale(m, 1:3, copies=1.5)", "recipe:1:24: copies must be a whole number, not 1.5"),
        ("upscale(m, 1:3, copies=[1])", "recipe:1:24"),
        ("upscale(m, 1:3, copies=)", "recipe:1:24"),
        ("upscale(m, 1:3, copies=0)", "recipe:1:1: upscale: copies=0 must be at least 1"),
        ("upscale(m, 1:3,, copies=1)", "recipe:1:16"),
        ("stack(m, 99999999999)", "recipe:1:1: stack: the result would have 5599999999944 layers"),
        ("stack(m, " + "9" * 100 + ")", "recipe:1:10: a number of 100 digits"),
        ("stack(m, 4, noise=abc)", "recipe:1:19: noise must be a number from 0 to 1, not abc"),
        ("stack(m, 4, noise=2)", "noise=2.0 is not a share"),
        ("stack(m, 4, noise=1e999)", "noise=inf is not a share"),
        ("stack(stack(m, 100), 100)", "recipe:1:1: stack: the result would have 560000 layers"),
        ("stack(stack(m, 1000), 1)", "recipe:1:7: stack: the result would have 56000 layers"),
        ("upscale(19:41)", "recipe:1:9: a model, or another recipe, comes here, not '19:41'"),
        ("stack(times=4)", "recipe:1:7: a model, or another recipe, comes here"),
        ("stack(, 4)", "recipe:1:7: the model's name is empty"),
        ("stack('', 4)", "recipe:1:7: the model's name is empty"),
        ("stack('m, 4)", "recipe:1:7: the quote ' is not closed"),
        ("stack(./a (b), 4)", "recipe:1:11: put the model in quotes: its name holds '('"),
        ("drop(m, [])", "recipe:1:9: the list is empty"),
        ("drop(m, [1 2])", "recipe:1:12: expected ','"),
        ("drop(m, [mlp])", "recipe:1:10: the list must hold layers"),
        ("inherit(m, parts=[mpl])", "recipe:1:1: inherit: unknown part 'mpl'; did you mean 'mlp'?"),
        ("inherit(m, 57)", "recipe:1:1: inherit: 57 layers asked of 'm', which has 56"),
        ("upscale(inherit(m, 40), 19:41)", "recipe:1:25: 19:41 is too far: 'inherit(m, 40)' has layers 0-39"),
        ("upscale(m,\n1:3)", r"recipe:1:11: a recipe in one line cannot hold '\n'"),
        ("identity(__import__('os').system('x'))", "recipe:1:10: unknown recipe '__import__'"),
        ("identity(" + "m" * 5000 + ")", "recipe:1:4096: "),
        ("drop(m, [" + "1," * 1500 + "])", "the list has more than 1000 items"),
    ],
)
def test_line_refusals(line, message):
    refused(message, lambda: parse(line).plan(56))


@pytest.mark.parametrize(
    ("line", "notes"),
    [
        ("upscale(m, [8, 24])", ("recipe:1:12: [8, 24] is layers 8 and 24 only; a range is 8:24",)),
        ("concat(drop(m, [0,2]), b)", ("recipe:1:16: [0, 2] is layers 0 and 2 only; a range is 0:2",)),
        ("upscale(drop(m, [2, 9]), [0, 5])", ("recipe:1:17: [2, 9] is", "recipe:1:26: [0, 5] is")),
        ("upscale(m, [8, 9])", ()),
        ("upscale(m, [24, 8])", ()),
        ("drop(m, [8, 9:24])", ()),
        ("drop(m, [8, 16, 24])", ()),
        ("inherit(m, parts=[mlp, norms])", ()),
    ],
)
def test_two_layers_that_look_like_a_range(line, notes):
    found = parse(line).notes
    assert len(found) == len(notes)
    assert all(note.startswith(start) for note, start in zip(found, notes))


@settings(max_examples=150)
@given(st.text("upscaleinheritdrop(),:=[]'\"\\ 0123456789.-mé\0", max_size=40) | st.text(max_size=20))
def test_any_line_is_a_recipe_or_refused(text):
    """Within a call too: what fails, fails with a place in the line."""
    for line in (text, f"upscale(m, {text})", f"drop({text}", f"inherit(m, parts=[{text}])"):
        try:
            parse(line).plan(8)
        except UserError as error:
            place, column = str(error).split(":")[1:3]
            assert place == "1"
            assert 1 <= int(column) <= len(line) + 1


def test_usage_names_every_argument():
    assert usage("stack") == "stack(MODEL, times, noise=0.0)"
    assert usage("inherit") == "inherit(MODEL, layers=..., which=first, every=1, parts=...)"


def test_a_recipe_is_registered_with_the_kinds_of_its_arguments():
    @recipes.recipe
    def tail(source: str, source_layers: int, count: int) -> DepthPlan:
        """The last layers."""
        if count > source_layers:
            raise UserError(f"count={count} is too many")
        return recipes.inherit(source, source_layers, count, which="last")

    try:
        assert parse("tail(m, 2)").plan(5) == recipes.inherit("m", 5, 2, which="last") == tail("m", 5, 2)
        assert usage("tail") == "tail(MODEL, count)"
        refused("tail: count=6 is too many", tail, "m", 5, 6)
        refused("recipe:1:1: tail: count=6 is too many", lambda: parse("tail(m, 6)").plan(5))
        refused("recipe:1:9: count must be a whole number, not x", parse, "tail(m, x)")
        refused("recipe:1:1: unknown recipe 'tial'; did you mean 'tail'?", parse, "tial(m, 2)")
    finally:
        del RECIPES["tail"]


# ---- described


def test_describe_groups_what_repeats():
    lines = recipes.interleave("m", 56, range(19, 41), copies=2).describe().splitlines()
    assert lines[2:] == [
        "= original  z zeroed copy",
        "  result  layers  role      scales",
        "  0-18    0-18    original",
        "  19      19      original",
        "  20      19      copy      o_proj x 0, down_proj x 0",
        "  21      19      copy      o_proj x 0, down_proj x 0",
        "  19-84: the 3 layers above, 22 times, each time 1 layer on",
        "  85-99   41-55   original",
        "embed_tokens, embed_positions, norm, lm_head: from 'm'",
        "44 of 100 layers add nothing to the residual stream as they are",
        "source layers 19-40 are used 3 times",
    ]
    lines = recipes.stack("m", 90, 3, noise=0.5).describe().splitlines()
    assert lines[1:4] == ["  0 " + "=" * 90 + "X" * 10, "100 " + "X" * 100, "200 " + "X" * 70]
    assert "  90-179   0-89    copy      noise 0.5" in lines
    # What is said in as few lines as it is shown in, is shown.
    few, many = (recipes.expand("m", 4 * times, 4).describe() for times in (3, 4))
    assert "  14      11      copy      o_proj x 0, down_proj x 0" in few.splitlines()
    assert ": the " not in few
    assert "  0-19: the 5 layers above, 4 times, each time 4 layers on" in many.splitlines()
    whole = recipes.drop("m", 20, [2, 4, 6, 8, 10]).describe().splitlines()  # ranges are not torn for it
    assert [line for line in whole if line.startswith(("  0-1 ", "  6-14 "))] == [
        "  0-1     0-1     original", "  6-14    11-19   original",
    ]  # fmt: skip
    assert "source layers 1, 3, ..., 55 are never used" in recipes.inherit("m", 56, every=2).describe()


def test_describe_nemoria():
    """Mistral-Nemo's 40 layers: [0,30] + zeroed [16,32] twice + [32,40]."""
    rows = [Row("m", i) for i in range(30)]
    rows += [Row("m", i, "copy", ZEROED) for i in range(16, 32)] * 2
    rows += [Row("m", i) for i in range(32, 40)]
    plan = DepthPlan(tuple(rows), *["m"] * 4, (("m", 40),))
    assert plan.num_layers == 70
    assert plan.describe().splitlines()[-4:] == [
        "source layers 30-31 are used as zeroed copies only: what they compute is lost",
        "source layers 30-31 are used 2 times",
        "source layers 16-29 are used 3 times",
        "the order goes back in the source: 29 -> 16 at layer 30, 31 -> 16 at layer 46",
    ]


@settings(max_examples=60)
@example([(0, "original"), (2, "copy"), (0, "zeroed")] * 6)
@example([*zip([3, 1, 2, 2, 3, 3, 1, 2, 2, 3, 3, 1, 2, 2, 3], ["original", "copy", "zeroed", "copy", "copy"] * 3)])
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["original", "copy", "zeroed"])), min_size=1, max_size=40))
def test_the_table_says_where_every_layer_comes_from(layers):
    """The table, unfolded by its own words, is the plan again."""
    rows = [Row("m", layer, "copy" if k == "zeroed" else k, ZEROED if k == "zeroed" else ()) for layer, k in layers]
    text = DepthPlan(tuple(rows), *["m"] * 4, (("m", 4),)).describe()
    table = [line for line in text.splitlines()[4:] if line.startswith("  ")]
    unfolded = []
    for line in table:
        if ":" in line:
            place, rest = line.strip().split(": the ")
            period = 1 if rest.startswith("layer above") else int(rest.split()[0])
            times = int(rest.split(", ")[1].split()[0])
            words = rest.split("each time ")[1].split() if "each time" in rest else ["0", "", "on"]
            shift = int(words[0]) * (1 if words[2] == "on" else -1)
            above = unfolded[-period:]
            for i in range(1, times):
                unfolded += [(layer + i * shift, *kind) for layer, *kind in above]
            assert place == f"{len(unfolded) - period * times}-{len(unfolded) - 1}"
            continue
        cells = line.split()
        first, _, last = cells[1].partition("-")
        assert cells[0].split("-")[0] == str(len(unfolded))
        unfolded += [(layer, cells[2], len(cells) > 3) for layer in range(int(first), int(last or first) + 1)]
    assert unfolded == [(row.layer, row.role, row.zeroed) for row in rows]


# ---- drawn


def test_picture():
    from PIL import Image

    from jaxup.depth.picture import COLORS, picture, png

    image = picture(recipes.upscale("m", 6, range(2, 4)), "a title")
    assert image.mode == "RGB"
    assert png(recipes.identity("m", 1), "a title")[:8] == b"\x89PNG\r\n\x1a\n"
    # From top to bottom what is coloured, at the top edge of each row of cells, from left to right.
    colors = {bytes.fromhex(color[1:]): kind for kind, color in COLORS.items()}
    pixels, rows = image.tobytes(), [""]
    for y in range(image.height):
        line = [pixels[i : i + 3] for i in range(y * image.width * 3, (y + 1) * image.width * 3, 6)]
        kinds = "".join(colors[color] for color, _ in itertools.groupby(line) if color in colors)
        if kinds and not rows[-1]:
            rows.append(kinds)
        elif not kinds and rows[-1]:
            rows.append("")
    legend, *layers, strip = filter(None, rows)
    assert (legend, layers, strip) == ("=z", ["=", "=", "=z", "=z", "=", "="], "====zz==")
    for other in (
        recipes.stack("m" * 300, 80, 5), recipes.inherit("\n\u4e2d", 56, every=2), recipes.identity("m", 1),
        DepthPlan((Row("a", 3), Row("b", 0, "new", parts=())), "a", None, "b", "a",
                                                (("a", 9000), ("b", 2), ("unused", 1))),
    ):  # fmt: skip
        drawn = picture(other, "t" * 500)
        assert isinstance(drawn, Image.Image)
        assert drawn.width < 5000
        assert drawn.height < 5000
    many = DepthPlan((Row("0", 0),), *"0000", tuple((str(i), 1) for i in range(5000)))
    refused("plan: 5000 sources are too many to draw", picture, many, "title")


def test_one_after_the_other():
    line = "concat(inherit(a, 0:3), b, upscale(inherit(a, 2:4), 0:1))"
    plan = parse(line).plan(lambda model: {"a": 4, "b": 2}[model])
    assert [(row.source, row.layer, row.role) for row in plan.rows] == [
        ("a", 0, "original"), ("a", 1, "original"), ("a", 2, "original"), ("b", 0, "original"), ("b", 1, "original"),
        ("a", 2, "copy"), ("a", 2, "copy"), ("a", 3, "original"),
    ]  # fmt: skip
    assert plan.strip() == "=====Xz="
    assert [getattr(plan, end) for end in ENDS] == ["a"] * 4
    assert plan.sources == (("a", 4), ("b", 2))
    two = recipes.concat(recipes.identity("a", 2), recipes.identity("b", 1))
    assert [getattr(two, end) for end in ENDS] == ["a", "a", "b", "b"]
    refused("concat: no plans", recipes.concat)
    refused("'a' has 2 layers in one plan and 3", recipes.concat, recipes.identity("a", 2), recipes.identity("a", 3))
    half = dataclasses.replace(two, dtype="float16")
    refused("is a whole model's", recipes.concat, half)
    refused("recipe:1:11: a model, or another recipe, comes here, not '3:4'", parse, "concat(a, 3:4)")
    assert len(parse("concat(a, b,)").sources) == 2


def test_the_recipes_of_docs_depth():
    docs = (Path(__file__).parent.parent / "docs" / "depth.md").read_text()
    lines = [line for line in docs.splitlines() if is_line(line) and "MODEL" in line]
    plans = [parse(re.split(r"  +", line)[0]).plan(60) for line in lines]
    assert [plan.num_layers for plan in plans] == [104, 104, 75, 71, 104, 240, 6, 30, 52, 24, 99, 48]
    (written,) = re.findall(r"```yaml\n(.*?)```", docs, re.S)
    assert DepthPlan.from_yaml(written).strip() == "=" * 24 + "z" * 16 + "=" * 8
