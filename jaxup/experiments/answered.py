"""What a model that learned from its own answers comes to: test problems, answered by it and by what it was before.

answers.json has what each problem's answers are worth, so that runs can be paired problem by problem; tasks.json what a
study compares; plots/ the curves. Intervals are 95% percentile bootstraps over problems.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jaxup.depth.picture import BLUE, GREEN, ORANGE, PURPLE, RED, SKY
from jaxup.experiments.learned import FINAL, ROUNDS
from jaxup.experiments.measures import keep_tasks
from jaxup.experiments.report import ONE_SEED
from jaxup.learning import curves
from jaxup.learning.guides import noisy_verdict, open_guide
from jaxup.learning.problem import Task
from jaxup.learning.rewards import open_reward
from jaxup.learning.rounds import LOGP, Samples, described, sample
from jaxup.learning.search import open_method, run
from jaxup.learning.statistics import Band, auc, best_of, bootstrap, pass_at_k, vote
from jaxup.model.decoder import Params
from jaxup.text import write_atomically
from jaxup.together import told
from jaxup.training.run import Result, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ANSWERS = "answers.json"  # of a run: of the answers to each test problem how many are right, before and after
BEFORE, AFTER = "before", "after"
SIZES = (1, 4, 16, 64)  # k of what is told
TPR, FPR, LENGTH = 0.9, 0.2, 0.5  # of the noisy guide, and what a biased one adds for the longest answer
_DRAWS, _SEED, _ORDERS = 2000, 0, 4
BUDGETS = (4, 8, 16)  # of searches that are compared: times the longest answer
_COLORS = {BEFORE: SKY, AFTER: RED}
# Guides of best-of-N: in words, and as they are drawn.
GUIDES = {
    "perfect": ("the task's verifier", BLUE), "noisy": (f"a verifier with TPR {TPR:g} and FPR {FPR:g}", GREEN),
    "length": ("the same, which likes long answers", RED), "logp": ("the mean log-probability", PURPLE),
    "majority": ("the majority", ORANGE), "learned": ("the learned verifier", SKY),
}  # fmt: skip


class Answers(NamedTuple):
    """Of a model to the P test problems."""

    samples: Samples
    sizes: np.ndarray  # of subsets: 1, 2, 4, ... and all
    passed: np.ndarray  # float64 [P, sizes]: pass@k
    chosen: dict[str, np.ndarray]  # [P, sizes]: how right the best of so many is, by the name of a guide


class Judged(NamedTuple):
    """How well a verifier tells right answers from others; NaN where there are none of a kind."""

    auc: float  # of all answers to all problems
    auc_within: float  # the mean of that of each problem, which is what the best of N is chosen by
    accuracy: float  # on which side of 1/2 it is
    brier: float  # the mean squared error; saying to each the share of right ones, p, it is p * (1 - p)
    right: float  # that share


class Measured(NamedTuple):
    answers: dict[str, Answers]  # before and after; none where nothing was asked for. With a verifier before alone
    compared: dict[
        str, tuple[int, Band, float]
    ]  # of searches by name: budget, how right what they find is, tokens used
    judged: Judged | None = None


def measured(
    run_: Run, task: Task, settings: Any, policy: Callable[[Params], Any], params: Params, before: Callable[[], Params],
    *, max_tokens: int, judge: Callable[[Samples], np.ndarray] | None,
) -> Measured:  # fmt: skip
    """Asks both models the test problems, and keeps and draws what comes of it.

    `judge`: what a verifier, which the model became, says of each answer: only the model before is asked.
    """
    if not settings.final_samples:
        keep_tasks(run_, {})
        return Measured({}, {})
    problems = task.test[: settings.final_problems or None]
    reward, answers = open_reward("outcome", task), {}
    compared: dict[str, tuple[int, Band, float]] = {}
    judged: Judged | None = None
    models = ((BEFORE, before), (AFTER, lambda: params))
    for name, of in models if judge is None else models[:1]:
        path = run_.directory / ROUNDS / f"{name}.npz"
        there = told(path.exists, "look for answers")
        writer = None if there and not settings.compare else policy(of())
        if writer is None or there:
            samples = Samples.load(path)
        else:
            samples = sample(
                writer, task, reward, problems, np.arange(len(problems)), key=(run_.settings.seed, FINAL),
                count=settings.final_samples, max_tokens=max_tokens,
            )  # fmt: skip
            if jax.process_index() == 0:
                samples.save(path)
        said_PN = None if judge is None else samples.grouped(judge(samples))
        answers[name] = answered(task, samples, max_tokens, said_PN)
        judged = None if said_PN is None else judged_by(said_PN, samples.grouped(samples.right_N))
        if settings.compare:
            for method in ("best_of", "beam"):
                for times in BUDGETS:
                    budget, seed = times * max_tokens, run_.settings.seed
                    of_search = searched_by(task, problems, writer, method, budget, max_tokens, seed)
                    compared[f"{method} {times} {name}"] = budget, *of_search
    found = Measured(answers, compared, judged)
    keep_tasks(run_, _tasks(found))
    if jax.process_index() == 0:
        rights = {name: one.samples.grouped(one.samples.right_N) for name, one in answers.items()}
        kept = {name: np.nansum(right_PN, axis=1).tolist() for name, right_PN in rights.items()}
        about = {"samples": settings.final_samples, "problems": [problem.id for problem in problems], **kept}
        write_atomically(run_.directory / ANSWERS, json.dumps(about) + "\n")
        _draw(run_, found)
    return found


def judged_by(said_PN: np.ndarray, right_PN: np.ndarray) -> Judged:
    """What cannot be verified does not count."""
    known_PN, right_PN = np.isfinite(right_PN), right_PN >= 1
    each = [auc(said[known], right[known]) for said, right, known in zip(said_PN, right_PN, known_PN)]
    said_N, right_N = said_PN[known_PN], right_PN[known_PN]
    mean = lambda values: float(np.mean(values)) if len(values) else math.nan  # noqa: E731
    return Judged(
        auc(said_N, right_N), mean([one for one in each if math.isfinite(one)]), mean((said_N > 0.5) == right_N),
        mean((said_N - right_N) ** 2), mean(right_N),
    )  # fmt: skip


def answered(task: Task, samples: Samples, max_tokens: int, said_PN: np.ndarray | None) -> Answers:
    """What is said of the answers by their number; what cannot be verified is wrong. `said_PN`: by a verifier."""
    right_PN = np.nan_to_num(samples.grouped(samples.right_N))
    problems = [task.test[number] for number in samples.numbers_P]
    texts, count = samples.grouped(samples.texts), samples.count
    sizes = np.array(curves.sizes(count))
    passed = np.stack([pass_at_k(count, np.sum(right_PN >= 1, axis=1), int(size)) for size in sizes], axis=1)
    noisy = np.array([[noisy_verdict(task, p, text, TPR, FPR) for text in of] for p, of in zip(problems, texts)])
    lengths = samples.grouped(np.array([*map(len, samples.tokens)], float)) / max_tokens
    scores = {
        "perfect": right_PN, "noisy": noisy, "length": noisy + LENGTH * lengths,
        "logp": samples.grouped(np.array([float(np.mean(logp)) for logp in samples.known[LOGP]])),
    }  # fmt: skip
    scores |= {} if said_PN is None else {"learned": said_PN}
    chosen = {
        name: np.stack([best_of(of, right_PN, int(size)) for size in sizes], axis=1) for name, of in scores.items()
    }
    finals = [[task.final(problem, text) for text in of] for problem, of in zip(problems, texts)]
    ones = np.ones_like(right_PN)
    chosen["majority"] = vote(finals, ones, right_PN, [*map(int, sizes)], orders=_ORDERS, seed=_SEED)
    return Answers(samples, sizes, passed, chosen)


def searched_by(
    task: Task, problems: Sequence[Any], writer: Any, method: str, budget: int, max_tokens: int, seed: int
) -> tuple[Band, float]:
    """How right what a search chooses is, by values of a few rollouts each, and how many tokens it took a problem.

    The best of N is chosen by the same guide, which knows of whole answers whether they are right.
    """
    found = run(
        writer, task, problems, open_method(method), open_guide("rollouts:4"), budget=budget, max_tokens=max_tokens,
        seed=seed,
    )  # fmt: skip
    right = [task.verify(each.problem, each.answers[0].text) or 0.0 if each.answers else 0.0 for each in found]
    return banded(np.array(right)[:, None]), float(np.mean([each.tokens for each in found]))


def banded(values_PK: np.ndarray) -> Band:
    """Means over problems with their intervals."""
    return bootstrap(values_PK, draws=_DRAWS, seed=_SEED)


def _tasks(found: Measured) -> dict[str, float]:
    tasks: dict[str, float] = {}
    for name, of in found.answers.items():
        end = "" if name == AFTER else f"_{name}"
        tasks |= {f"pass_{k}{end}": float(of.passed[:, at].mean()) for at, k in enumerate(of.sizes) if k in SIZES}
    last = found.answers[AFTER if AFTER in found.answers else BEFORE]
    about = described(last.samples)
    tasks |= {key: about[key] for key in ("length", "ended", "unique", "entropy")}
    guided = {name: values for name, values in last.chosen.items() if name != "perfect"}  # which is pass@N
    tasks |= {f"best_of_{last.sizes[-1]}_{name}": float(values[:, -1].mean()) for name, values in guided.items()}
    if found.judged is not None:
        tasks |= {f"verifier_{name}": value for name, value in found.judged._asdict().items() if name != "right"}
        tasks |= {f"best_of_{k}_learned": float(v) for k, v in zip(last.sizes, guided["learned"].mean(0)) if k in SIZES}
    return tasks | {name.replace(" ", "_"): float(band.mean[0]) for name, (_, band, _) in found.compared.items()}


def table(found: Measured) -> list[str]:
    """Lines of markdown."""
    if not found.answers:
        return []
    sizes = next(iter(found.answers.values())).sizes
    shown = [at for at, size in enumerate(sizes) if size in SIZES or size == sizes[-1]]
    lines = ["", f"| test problems answered | {' | '.join(f'pass@{sizes[at]}' for at in shown)} |"]
    lines.append(f"|---|{'---:|' * len(shown)}")
    bands = {name: banded(of.passed) for name, of in found.answers.items()}
    if AFTER in found.answers:
        bands["difference"] = banded(found.answers[AFTER].passed - found.answers[BEFORE].passed)
    lines += [
        f"| {name} | {' | '.join(told_of(band, at, '+' * (name == 'difference')) for at in shown)} |"
        for name, band in bands.items()
    ]
    lines += ["", f"| best of N, chosen by | {' | '.join(f'N={sizes[at]}' for at in shown)} |"]
    lines.append(f"|---|{'---:|' * len(shown)}")
    for name, one in found.answers.items():
        for guide, values in one.chosen.items():
            cells = " | ".join(told_of(banded(values), at) for at in shown)
            lines.append(f"| {GUIDES[guide][0]}, {name} | {cells} |")
    if found.judged is not None:
        j, of = found.judged, found.answers[BEFORE]
        lines += ["", f"The verifier, of {len(of.samples.texts):,} answers of which {j.right:.1%} are right: AUC "
                  f"{_area(j.auc)}, within a problem {_area(j.auc_within)}; accuracy {j.accuracy:.1%}; "
                  f"Brier score {j.brier:.4f}, and {j.right * (1 - j.right):.4f} by that share alone."]  # fmt: skip
    if found.compared:
        lines += ["", "| search, with values of 4 rollouts | tokens a problem | right |", "|---|---:|---:|"]
        for name, (budget, band, tokens) in found.compared.items():
            lines.append(f"| {name.replace('_', ' ')} | {tokens:.0f} of {budget} | {told_of(band, 0)} |")
    lines += ["", *(f"![{name}](plots/{name}.png)" for name in ("pass_at_k", "best_of_n", "rounds"))]
    return lines


def told_of(band: Band, at: int, sign: str = "") -> str:
    """A mean with its interval, in percent; with a sign of "+" as a difference."""
    return f"{100 * band.mean[at]:{sign}.1f}% [{100 * band.low[at]:.1f}, {100 * band.high[at]:.1f}]"


def _area(auc: float) -> str:
    return f"{auc:.3f}" if math.isfinite(auc) else "unknown, as none is right or none wrong"


def said(results: Sequence[Result], found: Measured, method: str) -> str:
    """What learning gave, in words."""
    by_kind = {result.kind: result for result in results}
    before, after = by_kind["before"], by_kind["learned"]
    text = f"In {after.steps:,} steps of {method} the loss of solutions went from {before.val_loss:.4f} to "
    text += f"{after.val_loss:.4f}"
    if found.judged is not None:
        by, sizes = found.answers[BEFORE].chosen, found.answers[BEFORE].sizes
        learned, perfect = by["learned"].mean(0), by["perfect"].mean(0)
        best = int(np.argmax(learned))
        text = (
            f"After {after.steps:,} steps of {method} the AUC on answers to test problems is {_area(found.judged.auc)}"
        )
        text += f"; of the best of N by it most are right, {learned[best]:.1%}, for N={sizes[best]}, and "
        text += f"{learned[-1]:.1%} for N={sizes[-1]}; by the task's verifier {perfect[best]:.1%} and {perfect[-1]:.1%}"
    elif found.answers:
        sizes = found.answers[AFTER].sizes
        bands = [(name, banded(found.answers[name].passed)) for name in (BEFORE, AFTER)]
        for at in (0, len(sizes) - 1):
            first, last = (told_of(band, at) for _, band in bands)
            text += f"; pass@{sizes[at]} on test problems from {first} to {last}"
    return f"{text}. {ONE_SEED}"


# ---- pictures


def _draw(run_: Run, found: Measured) -> None:
    rows = [json.loads(line) for line in (run_.directory / f"{ROUNDS}.jsonl").read_bytes().splitlines()]
    draw(run_.directory, {"pass_at_k": passed(found), "best_of_n": best(found), "rounds": rounds(rows)})


def draw(directory: Path, figures: Mapping[str, Figure]) -> None:
    """Writes plots/NAME.png of each."""
    (directory / "plots").mkdir(exist_ok=True)
    for name, figure in figures.items():
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=140)
        write_atomically(directory / "plots" / f"{name}.png", drawn.getvalue())


def passed(found: Measured) -> Figure:
    """pass@k of the model before and after, with bands."""
    figure, (axes,) = panels(1)
    for name, of in found.answers.items():
        line(axes, of.sizes, banded(of.passed), _COLORS[name], name)
    axes.set(xlabel="k", ylabel="pass@k on test problems", ylim=(0, 1))
    axes.legend(frameon=False)
    return figure


def best(found: Measured) -> Figure:
    """The best of N by each guide, before and after."""
    figure, both = panels(len(found.answers))
    for axes, (name, of) in zip(both, found.answers.items()):
        for guide, values in of.chosen.items():
            line(axes, of.sizes, banded(values), GUIDES[guide][1], GUIDES[guide][0])
        axes.set(xlabel="N", title=name, ylim=(0, 1))
    both[0].set_ylabel("chosen answers that are right")
    both[-1].legend(frameon=False, fontsize=8)
    return figure


def rounds(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What was reported of the rounds."""
    first = {"reward": ("reward", GREEN), "right": ("right, training", BLUE), "test": ("pass@1, test", RED)}
    if all(row.get("reward") == row.get("right") for row in rows):
        del first["reward"]
    judges = any("auc" in row for row in rows)
    shown = {
        "": first,
        "AUC of the verifier": {"auc": ("training", BLUE), "test_auc": ("test", RED)} if judges else {},
        "KL to start, nats a token": {} if judges else {"kl": ("", PURPLE)},
        "entropy, nats a token": {"entropy": ("", ORANGE)}, "length, tokens": {"length": ("", BLUE)},
    }  # fmt: skip
    figure, all_axes = panels(4, wide=2)
    for axes, (label, lines) in zip(all_axes, filter(lambda panel: panel[1], shown.items()), strict=True):
        for name, (said, color) in lines.items():
            points = [(row["round"], row[name]) for row in rows if _finite(row.get(name))]
            if points:
                axes.plot(*zip(*points), color=color, label=said, marker="." if len(points) < 30 else "")
        axes.set(xlabel="round", ylabel=label)
        if len(lines) > 1 and axes.lines:
            axes.legend(frameon=False, fontsize=8)
    return figure


def _finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def line(axes: Any, sizes: np.ndarray, band: Band, color: str, label: str) -> None:
    """Means over sizes of subsets, with their band."""
    axes.fill_between(sizes, band.low, band.high, color=color, alpha=0.15, linewidth=0)
    axes.plot(sizes, band.mean, color=color, label=label, marker=".")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])


def panels(count: int, wide: int = 0) -> tuple[Figure, list[Any]]:
    """Without pyplot, whose figures and backend are a notebook's own."""
    from matplotlib.figure import Figure

    columns = wide or count
    rows = -(-count // columns)
    figure = Figure(figsize=(max(7, 5 * columns), 4.4 * rows if rows == 1 else 3.2 * rows), layout="constrained")
    all_axes = [*figure.subplots(rows, columns, squeeze=False).flat]
    for axes in all_axes:
        axes.grid(alpha=0.25)
    return figure, all_axes
