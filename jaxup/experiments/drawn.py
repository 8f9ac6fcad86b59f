"""What a model that was taught to see and draw comes to, besides its loss: tasks.json, and a sheet of what it draws."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxup.continuous import judge as judges
from jaxup.continuous.drawing import draw, tell
from jaxup.continuous.files import Side
from jaxup.continuous.layouts import Sets
from jaxup.continuous.pairs import Examples, Pairs
from jaxup.continuous.sets import drawn_together
from jaxup.continuous.showing import sheet
from jaxup.data.open import Data
from jaxup.experiments.measures import keep_tasks
from jaxup.experiments.report import ONE_SEED
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import Decoder, Params, abstract
from jaxup.model.spec import without_beside
from jaxup.progress import say
from jaxup.text import write_atomically
from jaxup.training.loop import evaluate
from jaxup.training.run import Result, Run

_AT_ONCE = 64  # pictures that are drawn
_PROMPTS, _SAMPLES = 12, 8  # of the sheet, and pictures of each of them
_SETS = (1, 2, 4, 8, 16)  # that textures are drawn in
_JUDGED_BY = 2000  # real pictures at most that the judge is made of
# What each is, in words.
_WORDS = {
    "val_values": "loss of a value of unseen pictures, each predicted from the real ones before it",
    "val_text": "loss of answers about unseen pictures, nats per token",
    "cosine": "cosine of drawn values to those of unseen real pictures of the same prompt",
    "cosine_shuffled": "the same, to pictures of another prompt",
    "cosine_real": "the same, of the unseen real pictures of a prompt among themselves",
    "judged": "drawn pictures that the judge takes for what was asked",
    "judged_shuffled": "the same, of pictures drawn for another prompt",
    "judge": "unseen real pictures whose class the judge finds",
    "frechet": "Fréchet distance of drawn to unseen real pictures, in what the judge sees",
    "frechet_real": "the same of as many real pictures of the same classes that the judge was made of",
    "diversity": "distance of two pictures of one prompt",
    "diversity_real": "the same of real pictures",
    "position_error_late": "the same, over the second half of the frames",
    "position_error_late_shuffled": "the same, by the places that another prompt says",
    "valid_pairs": "pairs of cells in drawn textures of which one is bright",
    "valid": "textures of which all pairs are such",
    "told": "questions about unseen pictures answered as they should be",
    "told_shuffled": "the same, about another picture than the one shown",
    "text_before": "loss of text before, nats per token",
    "text_after": "loss of text after",
    "draw_seconds": "seconds to draw a picture, of many at once",
    "head_flops": "FLOPs of the head to draw a picture",
}


def measured(
    run: Run, side: Side, pairs: Pairs, validation: Examples, made: str, model: ModelConfig, params: Params,
    before: Callable[[], Params], *, texts: Data | None, count: int, ends: tuple[int, ...], textures: bool,
) -> dict[str, float]:  # fmt: skip
    """Measures what the model comes to, draws `plots/samples.png`, and keeps all that is found by its name.

    `made`: its name in the log, which has the parts of its loss. `count`: of validation as many pictures are drawn, and
    asked of. `before` gives the model before training, `ends` are the tokens that end an answer, and `textures` says
    that pictures are those of the source xor.
    """
    losses = [record for record in run.log.read() if record["model"] == made and "val_loss" in record][-1:]
    found: dict[str, float] = {}
    for record in losses:
        found |= {name: record[name] for name in ("val_values", "val_text") if name in record}
    if texts is not None:
        on_text = dataclasses.replace(run, data=texts)
        for name, of in (("text_before", before), ("text_after", lambda: params)):
            found[name] = evaluate(on_text, name, model.alone(), without_beside(of()))
    if count and jax.process_count() > 1:
        say("what several processes have of a model is not drawn from: `jaxup generate` takes the run's export")
    elif count:
        decoder = nnx.merge(abstract(model, run.settings.compute)[0], params)
        with jax.set_mesh(run.mesh):
            found |= _Drawing(run, side, pairs, validation, decoder, count, ends, textures).measured()
    keep_tasks(run, found)
    return found


class _Drawing:
    def __init__(
        self, run: Run, side: Side, pairs: Pairs, validation: Examples, decoder: Decoder, count: int,
        ends: tuple[int, ...], textures: bool,
    ):  # fmt: skip
        self._run, self._side, self._pairs, self._decoder = run, side, pairs, decoder
        self._ends, self._textures = ends, textures
        self._tokens = min(len(pairs.tokenizer), decoder.config.vocab_size)
        self._draw, self._tell = validation.of("draw")[:count], validation.of("tell")[:count]

    def measured(self) -> dict[str, float]:
        found: dict[str, float] = {}
        if len(self._draw):
            samples = self._sheet()
            began = time.monotonic()
            values = self._drawn([example.prompt for example in self._draw])
            found["draw_seconds"] = (time.monotonic() - began) / len(values)
            found["head_flops"] = self._side.task.head_flops(self._decoder.config, self._side.drawing["head_steps"])
            found |= self._diversity(samples) | self._cosines(values)
            if self._side.encoder.decodes:
                found |= self._judged(self._side.pictures(values))
        return found | self._told()

    def _drawn(self, prompts: Sequence[np.ndarray], **other: int) -> np.ndarray:
        """[n, N, C], or of clips [n, F, N, C]."""
        how: Any = {**self._side.drawing, "batch": self._size, **other}
        return draw(self._decoder, self._side.task, prompts, seed=self._run.settings.seed, **how)

    def _sheet(self) -> dict[bytes, np.ndarray]:
        """Some pictures for each of the first prompts, [samples, ...]: a sheet beside real ones, if they are pictures;
        of clips one for each."""
        prompts, numbers = dict[bytes, np.ndarray](), dict[bytes, int]()
        for example, (_, number) in zip(self._draw, self._draw.chosen):
            prompts.setdefault(example.prompt.tobytes(), example.prompt)
            numbers.setdefault(example.prompt.tobytes(), number)
        shown = dict(sorted(prompts.items(), key=lambda item: self._said(item[1]))[:_PROMPTS])
        clips = bool(self._side.task.layout.frames)
        each = [prompt for prompt in shown.values() for _ in range(_SAMPLES)]
        # So many at once, here and for all others: of one program.
        self._size = min(_AT_ONCE, len(each), len(self._draw))
        values = self._drawn(each)
        by_prompt = values.reshape(len(shown), _SAMPLES, *values.shape[1:])
        if self._side.encoder.decodes:
            real = self._pairs.look([numbers[prompt] for prompt in shown])
            drawn = self._side.pictures(by_prompt[:, 0] if clips else by_prompt)
            texts = [self._said(prompt) for prompt in shown.values()]
            content = sheet(texts, real if clips else real[:, None], drawn)
            write_atomically(self._run.directory / "plots" / "samples.png", content)
        return dict(zip(shown, by_prompt))

    def _said(self, prompt: np.ndarray) -> str:
        return str(self._pairs.tokenizer.decode(prompt))

    def _diversity(self, drawn: Mapping[bytes, np.ndarray]) -> dict[str, float]:
        """Of values: pictures may have more of it by what an encoder leaves out."""
        real: dict[bytes, list[np.ndarray]] = {}
        for example in self._draw:
            if len(some := real.setdefault(example.prompt.tobytes(), [])) < _SAMPLES:
                some.append(np.asarray(example.values))
        apart = [judges.diversity(np.stack(some)) for some in real.values() if len(some) > 1]
        found = {"diversity": float(np.mean([judges.diversity(samples) for samples in drawn.values()]))}
        return found | ({"diversity_real": float(np.mean(apart))} if apart else {})

    def _cosines(self, values: np.ndarray) -> dict[str, float]:
        """Finer than what a judge says of a few prompts, for each of which a head without noise has one picture."""
        real = np.stack([np.asarray(example.values) for example in self._draw])
        _, prompts = np.unique([example.prompt.tobytes() for example in self._draw], return_inverse=True)
        same, others = prompts[:, None] == prompts, prompts[_shuffled(len(prompts)), None] == prompts
        found = {"cosine": judges.cosine(values, real, same), "cosine_shuffled": judges.cosine(values, real, others)}
        return found | {"cosine_real": judges.cosine(real, real, same & ~np.eye(len(real), dtype=bool))}

    def _judged(self, pictures: np.ndarray) -> dict[str, float]:
        known, pairs = self._pairs.pictures, self._pairs
        numbers = np.array([number for _, number in self._draw.chosen])
        found: dict[str, float] = {}
        if known.paths is not None:
            errors = judges.position_error(pictures, known.paths[numbers]).mean(0)
            found |= {f"position_error_{frame}": float(error) for frame, error in enumerate(errors) if frame}
            late = slice(len(errors) // 2, None)
            others = judges.position_error(pictures, known.paths[numbers][_shuffled(len(numbers))]).mean(0)
            found["position_error_late"] = float(errors[late].mean())
            found["position_error_late_shuffled"] = float(others[late].mean())
        if self._textures:
            found["valid_pairs"], found["valid"] = judges.valid_textures(pictures)
            found |= self._by_sets()
        if known.labels is None:
            return found
        # Of a clip its last frame is judged, by others' last frames.
        last = (lambda clips: clips[:, -1]) if self._side.task.layout.frames else lambda these: these
        seen = pairs.seen[:: -(-len(pairs.seen) // _JUDGED_BY)]
        unseen = pairs.unseen[:: -(-len(pairs.unseen) // _JUDGED_BY)]
        judge = judges.judge(
            last(pairs.look(seen)), known.labels[seen], last(pairs.look(unseen)), known.labels[unseen]
        )  # fmt: skip
        labels, shown = known.labels[numbers], last(pictures)
        found["judged"] = judge.share(shown, labels)
        found["judged_shuffled"] = judge.share(shown, labels[_shuffled(len(labels))])
        found["judge"] = judge.accuracy
        real = judge.features(last(pairs.look(numbers)))
        if len(numbers) > real.shape[1]:  # else its covariance has no full rank
            found["frechet"] = judges.frechet(judge.features(shown), real)
            others = judge.features(last(pairs.look(seen[judges.alike(labels, known.labels[seen])])))
            found["frechet_real"] = judges.frechet(others, real)
        return found

    def _by_sets(self) -> dict[str, float]:
        """Pairs that are valid in other numbers of sets, of tokens of a cell each. Those of one set are drawn
        independently of each other, so a pair that is in one set is valid half of the time."""
        task, found = self._side.task, dict[str, float]()
        if not (isinstance(task.layout, Sets) or task.spatial is not None):
            return found
        for sets in (number for number in _SETS if number <= task.layout.count):
            values = self._drawn([example.prompt for example in self._draw], sets=sets)
            found[f"valid_pairs_in_{sets}"] = judges.valid_textures(self._side.pictures(values))[0]
            together = drawn_together(task.layout.count, sets, self._side.drawing["schedule"])
            found[f"valid_pairs_in_{sets}_at_best"] = 1 - together / 2
        return found

    def _told(self) -> dict[str, float]:
        if not len(self._tell):
            return {}
        examples = [*self._tell]
        values = np.stack([example.values for example in examples])
        wanted = [[token for token in example.answer.tolist() if token not in self._ends] for example in examples]
        found = {}
        for name, shown in (("told", values), ("told_shuffled", values[_shuffled(len(values))])):
            told = tell(
                self._decoder, self._side.task, shown, [example.prompt for example in examples],
                max_tokens=max(map(len, wanted)) + 1, eos_ids=self._ends, vocab_size=self._tokens,
            )  # fmt: skip
            found[name] = float(np.mean([a == b for a, b in zip(told, wanted, strict=True)]))
        return found


def _shuffled(count: int) -> np.ndarray:
    """Another one for each, always the same."""
    order = np.argsort(np.random.Philox(key=0).random_raw(count), kind="stable")
    other = np.empty(count, int)
    other[order] = np.roll(order, 1)
    return other


def table(found: Mapping[str, float]) -> list[str]:
    """Lines of markdown."""
    if not found:
        return []

    def words(name: str) -> str:
        kind, _, which = name.removesuffix("_at_best").rpartition("_")
        if kind == "valid_pairs_in":
            best = ", if what is drawn before is heeded" if name.endswith("_at_best") else ""
            return f"pairs of which one is bright, drawn in {which} set{'s' * (which != '1')}{best}"
        return f"pixels that frame {which} is from its place" if which.isdecimal() else _WORDS[name]

    lines = [f"| {words(name)} | {value:.4g} |" for name, value in found.items()]
    return ["", "| what is measured | |", "|---|---:|", *lines]


def said(results: Sequence[Result], made: str, found: Mapping[str, float]) -> str:
    """What training gave, in words."""
    by_kind = {result.kind: result for result in results}
    after = by_kind[made]
    text = f"In {after.steps:,} steps the validation loss went from {by_kind['before'].val_loss:.4f} to "
    text += f"{after.val_loss:.4f}"
    if control := by_kind.get("control"):
        text += f", that of the control, the base trained on the same batches, to {control.val_loss:.4f}"
    parts = []
    if "judged" in found:
        chance = f"{found['judged_shuffled']:.1%} where prompts are shuffled"
        parts.append(f"of pictures drawn for unseen ones' prompts the judge takes {found['judged']:.1%} for what was "
                     f"asked ({chance}; it finds the class of {found['judge']:.1%} of real ones)")  # fmt: skip
    if "valid" in found:
        parts.append(f"of the textures that it draws {found['valid']:.1%} are valid")
    if "position_error_late" in found:
        late, shuffled = found["position_error_late"], found["position_error_late_shuffled"]
        parts.append(f"late frames of a clip are {late:.2f} pixels from their places ({shuffled:.2f} from those that "
                     "another prompt says)")  # fmt: skip
    if "told" in found:
        parts.append(f"it answers {found['told']:.1%} of the questions about unseen pictures "
                     f"({found['told_shuffled']:.1%} about another one)")  # fmt: skip
    if "text_after" in found:
        parts.append(f"the loss of text went from {found['text_before']:.4f} to {found['text_after']:.4f}")
    return f"{'; '.join([text, *parts])}. {ONE_SEED}"
