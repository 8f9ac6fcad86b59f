"""What a study says to people: STUDY.md, which begins with what was found; and study.json, which has all numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxup.experiments import stopping_tested, study_pictures
from jaxup.experiments.comparison import (
    BETTER,
    HIGHER,
    LOWER,
    OPEN,
    SAME,
    WORSE,
    Cell,
    Difference,
    cost,
    difference,
    scores,
    summarise,
)
from jaxup.experiments.outcomes import Outcome
from jaxup.experiments.stopping import DIVERGED, Rule
from jaxup.experiments.stopping_tested import LOSS, NORM, Tested, examine
from jaxup.lens.bootstrap import LEVEL, Interval
from jaxup.text import escaped, write_atomically

MARKDOWN, JSON, FORMAT = "STUDY.md", "study.json", 1
_MANY = 5  # comparisons: of more some are said by chance
_NAMED = 6  # cells in a sentence


def write_study(
    directory: Path, title: str, outcomes: Sequence[Outcome], control: str, how: Sequence[str], *,
    notes: Sequence[str] = (), unit: str = "token", rule: Rule | None = None,
    changes: Mapping[str, Mapping[str, Any]] = MappingProxyType({}), also: Sequence[tuple[str, str]] = (),
    of: Sequence[str] = (), more: Sequence[str] = (),
) -> str:  # fmt: skip
    """Writes STUDY.md, study.json and plots/ into `directory`, and returns the text.

    Args:
      outcomes: of all runs, in the order of the study.
      control: the cell that the others are compared with.
      how: lines that say how the study was made: commands, versions.
      notes: lines on data and what all runs have in common.
      unit: what a loss is the mean over.
      rule: that by which runs are stopped; one that stops nobody is tested as well. None: nothing is said of it.
      changes: what each cell changes of the configuration, by key.
      also: cells that are compared with another one than the control.
      of: tasks that it begins with; none: it begins with the loss.
      more: lines of what only runs of this kind can be compared by.
    """
    cells = sorted(summarise(outcomes), key=lambda cell: (not cell.seeds, cell.mean))
    differences = {c.name: difference(outcomes, c.name, control) for c in cells if c.name != control}
    # Runs that a rule has left were chosen by it: of those nobody learns whether it is right.
    chosen = any(o.stopped and not o.stopped.startswith(DIVERGED) for o in outcomes)
    tested = None if rule is None or chosen else examine(outcomes, rule)
    drawn = study_pictures.write(
        directory, title, outcomes, cells, [*differences.values()], control, unit, changes
    )  # fmt: skip
    names, seeds = [cell.name for cell in cells], sorted({o.seed for o in outcomes})
    tasks = {task: _task(outcomes, names, control, task) for o in outcomes for task in o.tasks}
    found = finding_of_tasks(of, tasks, control) if of else finding(cells, differences, control, unit)
    lines = [f"# {_plain(title)}", "", found, "", *how, "", *notes, ""]
    lines += [*_table(cells, differences, control), "", *_explained(cells, differences, unit)]
    for name in drawn:
        lines += ["", f"![{name.replace('_', ' ')}](plots/{name}.png)"]
    lines += [*more, *_tasks(tasks, control)]
    pairs = [
        {"less": other, "task": task, **difference(outcomes, cell, other, task)._asdict()}
        for cell, other in also for task in ("", *tasks)
    ]  # fmt: skip
    lines += _also(pairs)
    lines += ["", "## What it cost", "", *_cost(outcomes, cells)]
    lines += _ended(outcomes)
    if rule is not None:
        lines += ["", "## Is it right to stop poor runs?", "", *_tested(tested)]
    more = ",".join(map(str, [*seeds, *range(seeds[-1] + 1, seeds[-1] + 1 + max(2, len(seeds)))])) if seeds else ""
    lines += ["", "## More seeds", ""]
    lines += [
        "A t interval of three seeds reaches 2.5 of their standard deviations to both sides, and one of six 1.05. The "
        f"same command with `--config.study.seeds={more}` runs what is not there yet, and writes this anew.", ""
    ]  # fmt: skip
    text = "\n".join(lines)
    numbers = {
        "format": FORMAT, "title": title, "control": control, "level": LEVEL, "unit": unit,
        "cells": [cell._asdict() | {"stopped": [o.seed for o in cell.stopped]} for cell in cells],
        "differences": [*differences.values()], "tasks": tasks, "also": pairs, "runs": [_run(o) for o in outcomes],
        "cost": dict(zip(("tokens", "flops"), cost(outcomes))), "stopping": tested, "changes": changes,
    }  # fmt: skip
    write_atomically(directory / JSON, json.dumps(_json(numbers), indent=1, allow_nan=False) + "\n")
    write_atomically(directory / MARKDOWN, text)
    return text


def finding(cells: Sequence[Cell], differences: Mapping[str, Difference], control: str, unit: str) -> str:
    """What the study found, in words. `cells`: the best first."""
    most = max((len(cell.seeds) for cell in cells), default=0)
    if not most:
        return "No run came to its end: there is nothing to compare."
    best = next(cell for cell in cells if len(cell.seeds) == most)  # the mean of fewer seeds may be good by chance
    runs = len({seed for cell in cells for seed in cell.seeds})
    spread = "" if math.isnan(best.spread) else f", with a standard deviation of {best.spread:.4f} over {most} seeds"
    lowest = "has the lowest mean validation loss" if len(cells) > 1 else "has a mean validation loss"
    text = f"{_name(best.name)} {lowest}: {best.mean:.4f} nats per {unit}{spread}."
    said = {verdict: [d for d in differences.values() if d.verdict == verdict] for verdict in (BETTER, WORSE, SAME)}
    against = f"the control {_name(control)}"
    base = next((cell for cell in cells if cell.name == control), None)
    if base is None or not base.seeds:
        return f"{text} The control {_name(control)} did not come to its end, so that nothing can be said against it."
    if differences:
        against += f" ({base.mean:.4f})"
    parts = []
    for verdict, words in ((BETTER, "lower loss than it"), (WORSE, "higher loss than it")):
        if found := sorted(said[verdict], key=lambda d: d.mean):
            listed = [f"{_name(d.cell)} ({d.mean:+.4f})" for d in found[:_NAMED]]
            more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
            parts.append(f"{', '.join(listed)}{more} {'have' if len(found) > 1 else 'has'} a {words}")
    if said[SAME]:
        names = ", ".join(_name(d.cell) for d in said[SAME][:_NAMED])
        more = f" and {len(said[SAME]) - _NAMED} more" if len(said[SAME]) > _NAMED else ""
        parts.append(f"no difference to it is shown for {names}{more}")
    if parts:
        text += f" Of the cells compared with {against}, seed by seed: {'; '.join(parts)}."
    if differences and all(d.verdict == OPEN for d in differences.values()):
        least = min(differences.values(), key=lambda d: d.mean)
        text += f" Compared with {against}, {_name(least.cell)} is {abs(least.mean):.4f} "
        text += f"{'below' if least.mean < 0 else 'above'} it."
    if runs == 1:
        text += " One seed: by how much another one's numbers differ is not measured, and no difference can be told."
    return text


def finding_of_tasks(of: Sequence[str], tasks: Mapping[str, Mapping[str, Any]], control: str) -> str:
    """The same of tasks, for cells whose losses are of different things."""
    said = []
    for task in of:
        means = {c["name"]: c["mean"] for c in tasks.get(task, {}).get("cells", ()) if c["seeds"]}
        if not means:
            said.append(f"No run says what it reaches on {_name(task)}.")
            continue
        listed = ", ".join(f"{_name(cell)} {mean:.4g}" for cell, mean in sorted(means.items(), key=lambda c: -c[1]))
        said.append(f"{_name(task)}: {listed}.")
        found: dict[str, list[str]] = {}
        for d in tasks[task]["differences"]:
            shown = _name(d.cell) if d.verdict == SAME else f"{_name(d.cell)} ({d.mean:+.3g})"
            found.setdefault(d.verdict, []).append(shown)
        words = {HIGHER: "higher", LOWER: "lower", SAME: "no difference shown for", OPEN: "of one seed"}
        parts = [f"{words[verdict]} {', '.join(names)}" for verdict, names in found.items() if verdict]
        if parts:
            said.append(f"Than the control {_name(control)}, seed by seed: {'; '.join(parts)}.")
    return " ".join([*said, "Losses are below: those of cells that learn different things say nothing of each other."])


def _table(cells: Sequence[Cell], differences: Mapping[str, Difference], control: str) -> Iterator[str]:
    """The best cell first."""
    flops = [cell.flops / max(1, len(cell.seeds) + len(cell.stopped)) for cell in cells]
    equal = any(math.isfinite(c.equal) and abs(c.equal - c.mean) > 5e-5 for c in cells) and len(cells) > 1
    heads = ["cell", "seeds", "validation loss", "spread", f"to {_name(control)}", "bootstrap 95%", "t 95%", "",
             "steps", *["at equal FLOPs"] * equal, "FLOPs of a run"]  # fmt: skip
    yield f"| {' | '.join(heads)} |"
    yield "|---|---:|---:|---:|---:|---|---|---|---:|" + "---:|" * equal + "---:|"
    for cell, each in zip(cells, flops):
        d = differences.get(cell.name)
        intervals = ["control", "", "", ""]
        if d is not None:
            intervals = _compared(d, "+.4f")
        row = [
            _name(cell.name), str(len(cell.seeds)), _number(cell.mean, ".4f"), _number(cell.spread, ".4f"), *intervals,
            ", ".join(f"{steps:,}" for steps in cell.steps), *[_number(cell.equal, ".4f")] * equal, f"{each:.3g}",
        ]  # fmt: skip
        yield f"| {' | '.join(row)} |"


def _compared(d: Difference, how: str) -> list[str]:
    few = f" ({len(d.seeds)} pairs)" if d.alone and len(d.seeds) > 1 else ""
    return [_number(d.mean, how), _ends(d.bootstrap, how), _ends(d.student, how), f"{d.verdict or 'no pair'}{few}"]


def _task(outcomes: Sequence[Outcome], cells: Sequence[str], control: str, task: str) -> dict[str, Any]:
    """What cells reach on a task, and how far they are from the control."""
    found = {cell: scores(outcomes, cell, task) for cell in cells}
    values = {cell: np.array([*of.values()]) for cell, of in found.items()}
    return {
        "cells": [
            {
                "name": cell, "seeds": [*of], "values": [*of.values()],
                "mean": float(values[cell].mean()) if of else math.nan,
                "spread": float(values[cell].std(ddof=1)) if len(of) > 1 else math.nan,
            }
            for cell, of in found.items()
        ],
        "differences": [difference(outcomes, cell, control, task) for cell in cells if cell != control],
        "missing": [o.name for o in outcomes if o.finished and o.seed not in found[o.cell]],
    }  # fmt: skip


def _tasks(tasks: Mapping[str, Mapping[str, Any]], control: str) -> Iterator[str]:
    """A table for each; cells in the order of their losses."""
    for place, (task, found) in enumerate(tasks.items()):
        yield from ("", f"## {_name(task)}", "")
        if not place:
            yield (
                "What the models of the runs reach on this task, beside the loss: means over seeds, and differences to "
                f'the control with the intervals of the table above. A cell is "{LOWER}" or "{HIGHER}" where neither '
                "holds 0."
            )
            yield ""
        yield f"| cell | seeds | mean | spread | to {_name(control)} | bootstrap 95% | t 95% |  |"
        yield "|---|---:|---:|---:|---:|---|---|---|"
        differences = {d.cell: d for d in found["differences"]}
        for cell in found["cells"]:
            d = differences.get(cell["name"])
            compared = ["control", "", "", ""] if d is None else _compared(d, "+.4g")
            numbers = [str(len(cell["seeds"])), *(_number(cell[key], ".4g") for key in ("mean", "spread"))]
            yield f"| {' | '.join([_name(cell['name']), *numbers, *compared])} |"
        if found["missing"]:
            yield from ("", f"Without a value, and left out: {', '.join(map(_name, found['missing']))}.")


def _also(pairs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if pairs:
        yield from ("", "## Other pairs of cells", "", "What the first has more than the second, seed by seed.", "")
        yield "| cell | less | of | mean | bootstrap 95% | t 95% |  |"
        yield "|---|---|---|---:|---|---|---|"
    for pair in pairs:
        d = Difference(**{name: pair[name] for name in Difference._fields})
        what = _name(pair["task"]) if pair["task"] else "validation loss"
        yield f"| {' | '.join([_name(d.cell), _name(pair['less']), what, *_compared(d, '+.4g')])} |"


def _explained(cells: Sequence[Cell], differences: Mapping[str, Difference], unit: str) -> Iterator[str]:
    yield (
        f"Losses are nats per {unit}. The spread is the standard deviation over seeds. A difference is the mean, over "
        "the seeds that both have, of the cell's loss less the control's. Its intervals are at 95%: percentiles of all "
        "bootstrap resamples of these differences, and Student's t. Of few seeds the first is too narrow (of three it "
        "is from the least to the largest, and leaves 0 out for one in four pairs of equal cells), and the second "
        f"assumes that differences are normal: a cell is {BETTER} or {WORSE} where neither holds 0, and there is "
        f'"{SAME}" where one does, which means that these seeds do not show one.'
    )
    compared = [d for d in differences.values() if d.verdict not in ("", OPEN)]
    if len(compared) >= _MANY:
        yield ""
        yield (
            f"Of {len(compared)} comparisons at 95% about {len(compared) * (1 - LEVEL):.1f} are said to differ where "
            "nothing does."
        )
    if alone := [d for d in differences.values() if d.alone and d.values]:
        yield ""
        left = (f"{_name(d.cell)} (seed{'s' * (len(d.alone) > 1)} {', '.join(map(str, d.alone))})" for d in alone)
        yield f"Left out, since only the cell or only the control came to its end: {', '.join(left)}."
    if any(math.isfinite(c.equal) and abs(c.equal - c.mean) > 5e-5 for c in cells) and len(cells) > 1:
        yield ""
        yield (
            "At equal FLOPs is the loss on the line between two evaluations where a run had taken as many as the "
            "cheapest did in all. A run whose learning rate falls until its end would be better if it ended there."
        )


def _cost(outcomes: Sequence[Outcome], cells: Sequence[Cell]) -> Iterator[str]:
    tokens, flops = cost(outcomes)
    yield (
        f"{len(outcomes)} run{'s' * (len(outcomes) != 1)} took {tokens:,} tokens and {flops:.3g} FLOPs, with all the "
        "models that they trained, those that were stopped included. What several runs have in common counts once, "
        "and once for each of their cells. FLOPs are those of a token, forward and backward, times tokens, as if all "
        "of a model trained; tokens are rows times their length, each time they are seen."
    )
    yield ""
    yield "| cell | tokens | FLOPs |"
    yield "|---|---:|---:|"
    for cell in cells:
        yield f"| {_name(cell.name)} | {cell.tokens:,} | {cell.flops:.3g} |"


def _ended(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """What did not come to its end."""
    for title, some in (
        ("What diverged", [o for o in outcomes if o.stopped.startswith(DIVERGED)]),
        ("What was stopped", [o for o in outcomes if o.stopped and not o.stopped.startswith(DIVERGED)]),
    ):
        if not some:
            continue
        yield from ("", f"## {title}", "")
        for o in some:
            yield f"- {_name(o.name)} at step {o.steps:,} of {o.planned:,}: {_plain(o.stopped)}"
        saved = sum(_whole(o) - o.flops for o in some)
        if saved > 0:
            share = saved / sum(map(_whole, outcomes))
            yield from ("", f"That saved {saved:.3g} FLOPs, {share:.0%} of what all runs would have taken.")
    if unfinished := [o for o in outcomes if not o.finished and not o.stopped]:
        yield from ("", "## What is not at its end", "")
        yield from (f"- {_name(o.name)}: step {o.steps:,} of {o.planned:,}" for o in unfinished)


def _whole(outcome: Outcome) -> float:
    """The FLOPs that it would have taken."""
    return outcome.flops * outcome.planned / outcome.steps if outcome.steps else 0.0


def _tested(tested: Tested | None) -> Iterator[str]:
    """The rules on the runs that finished."""
    if tested is None:
        yield (
            "Not tested here: that takes groups of which all runs come to their ends, and of those that were stopped "
            "nobody knows it. The same study with `--config.study.stop=` in another directory tests the rules."
        )
        return
    yield (
        "arXiv 2412.13337 finds that runs which end well have lower gradient norms and higher losses early on. Here "
        f"{_verdict(tested)}"
    )
    yield ""
    yield "| early signal | ranks | after 10% | after 20% | after 30% |"
    yield "|---|---|---|---|---|"
    rows: dict[tuple[str, bool], list[Interval]] = {}
    for c in tested.correlations:
        rows.setdefault((c.signal, c.across), []).append(c.rho)
    for (signal, across), found in rows.items():
        where = "across batch sizes" if across else "within groups"
        yield f"| {signal} | {where} | {' | '.join(_rho(rho) for rho in found)} |"
    yield ""
    yield (
        "These are Spearman's rank correlations with the loss at the end. Groups are runs of one batch size and seed. "
        "Intervals are 95% percentiles of bootstrap draws of cells, of which less than five have none. As published "
        f"would be: {NORM} above 0, {LOSS} below 0."
    )
    yield ""
    yield "| rule | stops | of them poor | of the poor | best run of a seed | regret (nats) | FLOPs saved |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for p in tested.prunings:
        share = lambda value: "-" if math.isnan(value) else f"{value:.0%}"  # noqa: E731
        yield (
            f"| {p.rule} | {p.stopped:g} of {p.runs} | {share(p.precision)} | {share(p.recall)} | {p.won:.3g} of "
            f"{p.seeds} | {p.regret:.4f} | {p.saved:.0%} |"
        )
    yield ""
    yield (
        "What each rule would have stopped of runs that came to their ends. Poor is what ends worse than the median of "
        "its group. Regret is by how much the best run that is left is worse than the best of all, the mean over "
        f"seeds. {stopping_tested.RANDOM.capitalize()}: as many of each group as by the first rule, at the same "
        "moments, whoever they are."
    )


def _verdict(tested: Tested) -> str:
    covers = [
        f"{c.signal} after {c.at:.0%}" for c in tested.correlations
        if not c.across and c.signal in (NORM, LOSS) and c.rho.low <= 0 <= c.rho.high
    ]  # fmt: skip
    if tested.reproduced:
        return "the same is found within groups, at each moment."
    if covers:
        return (
            f"the published indicator is not reproduced: within groups the interval of its correlation holds 0 for "
            f"{', '.join(covers)}."
        )
    if tested.reproduced is None:
        return "there are too few cells to tell."
    return "the published indicator is not reproduced: within groups a signal goes the other way."


def _rho(rho: Interval) -> str:
    return f"{_number(rho.value, '+.2f')}{'' if math.isnan(rho.low) else f' [{rho.low:+.2f}, {rho.high:+.2f}]'}"


def _ends(interval: Interval, how: str) -> str:
    return "" if math.isnan(interval.low) else f"[{interval.low:{how}}, {interval.high:{how}}]"


def _number(value: float, how: str) -> str:
    return "-" if math.isnan(value) else f"{value:{how}}"


def _plain(text: str) -> str:
    """On one line, and so that Markdown takes none of it as its own."""
    return "".join(f"\\{c}" if c in "\\`*<>[]|!&#" else c for c in escaped(text))


def _name(name: str) -> str:
    return f"`{name}`" if name.isprintable() and not {*"`|"} & {*name} else _plain(name)


def _run(o: Outcome) -> dict[str, Any]:
    kept = ("cell", "seed", "group", "score", "steps", "planned", "batch_size", "tokens", "flops", "seconds", "curve",
            "stopped", "costs", "measures", "tasks")  # fmt: skip
    return {key: getattr(o, key) for key in kept}


def _json(value: Any) -> Any:
    """With null for what is no number, and names for the fields of tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, np.ndarray):
        return _json(value.tolist())
    if hasattr(value, "_asdict"):
        return _json(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): _json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_json(one) for one in value]
    return value
