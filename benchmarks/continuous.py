"""Continuous tokens: what training and drawing them cost, each beside the plain way.

    python benchmarks/continuous.py            # under four minutes on two cores
    python benchmarks/continuous.py --quick    # under one: smaller, fewer turns, and no `torch.compile`

1. A step of training on rows of `raster` beside one on as many tokens of text, by the same decoder, through the program
   that runs have. FLOPs say what the connector and the head cost; what is left is what feeding vectors costs. Aim:
   with the cosine head at least 0.9 of the tokens/s.
2. Drawing by a cache of keys and values, beside a loop that computes all positions anew for each step. They draw the
   same, up to rounding, which is checked.
3. A flow in three stages beside one of a single stage that takes as many steps, both by the same net.
4. MAR's diffusion head beside the same in PyTorch, by a process of its own: an update (forward, backward, clipped
   AdamW) and drawing. Both have the same parameters, and the same loss and drawn tokens, which is checked.
5. What packing a row takes of the thread that reads, while the devices are at work.

What is compared takes turns, in an order that is turned round each time; ratios are medians of those of all turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

AIM = 0.9  # of the tokens/s of text
QUICK = "--quick" in sys.argv
SIDE, CHANNELS, PROMPT, SEQ = 8, 16, 30, 128
ROWS, HEAD_STEPS = (4, 8) if QUICK else (8, 16)
WIDTH, DEPTH, DRAWS, TRAIN_STEPS, LIMIT = 384, 3, 4, 1000, 5.0  # of the diffusion head


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, help="turns of each; by default 7, of --quick 2")
    parser.add_argument("--parts", default="12345", help="which of the five")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def turns(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in each round; the first call, which compiles, is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            contestants[name]()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> float:
    """How many times as long as ours theirs took."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def table(title: str, *columns: str) -> Callable[..., None]:
    """Prints the head of it; the function prints a row."""
    print(f"\n## {title}\n\n| {' | '.join(columns)} |\n|---|{'--:|' * (len(columns) - 1)}", flush=True)
    return lambda *cells: print(f"| {' | '.join(map(str, cells))} |", flush=True)


# ---- what is trained and drawn


def grid(length: int = SEQ) -> dict[str, Any]:
    return {"rows": SIDE, "columns": SIDE, "channels": CHANNELS, "length": length, "drop": 0.1}


def examples(layout: Any, kinds: str, count: int = ROWS) -> list[Any]:
    """Of these kinds in turn; with the prompt they fill rows of `SEQ` positions."""
    from jaxup.continuous.examples import Example

    rng = np.random.default_rng(0)
    made = []
    for index in range(count):
        prompt = rng.integers(0, 4096, PROMPT, np.int32)
        answer = rng.integers(0, 4096, SEQ - SIDE * SIDE - 2 - PROMPT if layout.tells else 0, np.int32)
        values = rng.normal(size=layout.shape).astype(np.float32)
        kind = kinds.split()[index % len(kinds.split())]
        made.append(Example(kind=kind, prompt=prompt, values=values, answer=answer))
    return made


def base() -> Any:
    """Of few layers, of which all are compiled: what is done beside them weighs more than in a deep one."""
    from jaxup.model.config import ModelConfig

    return ModelConfig.llama(
        vocab_size=4096, hidden_size=384, intermediate_size=1024, num_layers=2, num_heads=6, num_kv_heads=6,
        max_positions=SEQ,
    )  # fmt: skip


def heads() -> dict[str, Any]:
    from jaxup.continuous.heads import Cosine, Diffusion, Flow
    from jaxup.continuous.nets import MLP, Spatial

    mlp, spatial = MLP(width=WIDTH, depth=DEPTH), Spatial(width=128, depth=4, heads=4)
    flow = {"channels": CHANNELS, "draws": 1, "times": "uniform"}
    return {
        "cosine": Cosine(channels=CHANNELS),
        "diffusion": Diffusion(channels=CHANNELS, net=mlp, draws=DRAWS, train_steps=TRAIN_STEPS, limit=LIMIT),
        **{f"{name} {n}": Flow(**flow, net=net, stages=n)
           for name, net in (("mlp", mlp), ("decoder", spatial)) for n in (1, 3)},
    }  # fmt: skip


def decoder_of(task: Any) -> Any:
    """With random values for all parameters: what begins as zeros would hide what it is multiplied by."""
    import jax

    from jaxup.model.decoder import Decoder, init

    model = dataclasses.replace(base(), beside=task.beside(base()))
    leaves, tree = jax.tree.flatten(jax.jit(init, static_argnums=0)(model, 0))
    rng = np.random.default_rng(1)
    return Decoder(model, tree.unflatten([leaf + rng.normal(0, 0.02, leaf.shape).astype("f4") for leaf in leaves]))


# ---- 1


def training(rounds: int) -> None:
    import jax

    from jaxup.continuous.layouts import Raster
    from jaxup.continuous.task import Task
    from jaxup.model.config import Compute
    from jaxup.model.decoder import init
    from jaxup.training.loop import make_program
    from jaxup.training.objective import TEXT
    from jaxup.training.optimizer import AdamW
    from jaxup.training.run import Update
    from jaxup.training.selection import EVERYTHING
    from jaxup.training.sharding import MeshConfig, make_mesh, place_batch
    from jaxup.training.step import StepConfig

    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, context=1, tensor=1), jax.devices()[:1])
    update = Update(
        AdamW(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0),
        StepConfig(accumulation=1, loss_chunk=128, z_loss=0.0), Compute(unroll=0),
    )  # fmt: skip
    layout = Raster(**grid())
    tokens = np.random.default_rng(0).integers(0, 4096, (ROWS, SEQ + 1), np.int32)
    text = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": np.ones((ROWS, SEQ), np.float32)}
    packed = layout.pack(examples(layout, "draw tell"), np.arange(ROWS))
    objectives = {"text": TEXT} | {
        f"raster, {name} head": Task(layout=layout, head=heads()[name]) for name in ("cosine", "diffusion")
    }

    def stepping(objective: Any) -> Callable[[], Any]:
        of_text = objective is TEXT
        model = base() if of_text else dataclasses.replace(base(), beside=objective.beside(base()))
        program = make_program(model, update, mesh, EVERYTHING, objective)
        state = program.init_state(jax.jit(init, static_argnums=0)(model, 0))
        batch = place_batch(text if of_text else packed, ROWS, mesh)

        def step() -> None:
            nonlocal state
            with jax.set_mesh(mesh):
                state, metrics = program.train_step(state, batch, np.float32(1e-4))
            assert np.isfinite(jax.block_until_ready(metrics)["loss"])

        return step

    seconds = turns({name: stepping(objective) for name, objective in objectives.items()}, rounds)
    row = table("Training", "", "tokens/s", "of text's", "FLOPs, of text's", "speed / what FLOPs leave")
    for name, objective in objectives.items():
        flops = objective.flops(base(), SEQ) / TEXT.flops(base(), SEQ)
        share = ratio(seconds[name], seconds["text"])
        rate = ROWS * SEQ / statistics.median(seconds[name])
        row(name, f"{rate:,.0f}", f"{share:.2f}", f"{flops:.2f}", f"{share * flops:.2f}")
        if "cosine" in name:
            said = f"raster / text: {share:.2f}; aim at least {AIM}: {'met' if share >= AIM else 'NOT met'}"
    print(f"\n{said}")


# ---- 2 and 3


def drawing(rounds: int) -> None:
    from jaxup.continuous.drawing import draw
    from jaxup.continuous.layouts import Raster, Scales, Sets
    from jaxup.continuous.task import Task

    flow = heads()["mlp 1"]
    tasks = {
        "raster, 64 steps": (Task(layout=Raster(**grid()), head=heads()["cosine"]), {}),
        "sets, 8 steps": (Task(layout=Sets(**grid()), head=flow), {"sets": 8}),
        "scales, 4 steps": (Task(layout=Scales(**grid(), scales=(1, 2, 4, 8)), head=flow), {}),
    }
    row = table("Drawing", "", "cache, s", "without, s", "without / cache", "apart")
    for name, (task, how) in tasks.items():
        decoder = decoder_of(task)
        prompts = [each.prompt for each in examples(task.layout, "draw", ROWS // 2)]
        found = {}

        def drawn(cached: bool, task=task, how=how, decoder=decoder, prompts=prompts, found=found) -> None:
            found[cached] = draw(
                decoder, task, prompts, seed=0, head_steps=HEAD_STEPS // 2, temperature=1.0, guidance=1.0,
                cached=cached, **how,
            )  # fmt: skip

        seconds = turns({"cache": lambda drawn=drawn: drawn(True), "not": lambda drawn=drawn: drawn(False)}, rounds)
        apart = np.abs(found[True] - found[False]).max()
        assert np.isfinite(found[True]).all()
        assert apart < 1e-2, apart
        medians = (f"{statistics.median(each):.3f}" for each in seconds.values())
        row(name, *medians, f"{ratio(*seconds.values()):.2f}", f"{apart:.0e}")


def staged(rounds: int) -> None:
    from jaxup.continuous.drawing import draw
    from jaxup.continuous.layouts import Scales
    from jaxup.continuous.task import Task

    sides = (4, 8, 16)
    size = grid() | {"rows": sides[-1], "columns": sides[-1], "length": 512}
    row = table("Three stages beside one", "net", "3 stages, s", "1 stage, s", "FLOPs of the net", "time")
    for name in ("mlp",) if QUICK else ("mlp", "decoder"):
        flops, contestants = [], {}
        for stages in (3, 1):
            # One stage has the whole image at once.
            head = heads()[f"{name} {stages}"]
            task = Task(layout=Scales(**size, scales=sides[-stages:]), head=head)
            decoder, steps = decoder_of(task), 3 * (HEAD_STEPS // 2) // stages
            counts = [span.stop - span.start for span in task.spans]
            flops.append(sum(steps * count * head.flops(base().hidden_size, count) for count in counts))
            prompts = [each.prompt for each in examples(task.layout, "draw", 2)]
            contestants[str(stages)] = lambda decoder=decoder, task=task, steps=steps, prompts=prompts: draw(
                decoder, task, prompts, seed=0, head_steps=steps, temperature=1.0, guidance=1.0
            )
        seconds = turns(contestants, rounds)
        medians = (f"{statistics.median(each):.3f}" for each in seconds.values())
        row(name, *medians, f"{flops[0] / flops[1]:.4f}", f"{1 / ratio(*seconds.values()):.2f}")


# ---- 4


class Peer:
    """A process that computes by PyTorch: each line that it is sent is a task, which it answers when it is done."""

    def __init__(self, given: Path):
        command = [sys.executable, __file__, f"--worker={given}", *["--quick"] * QUICK]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, what: str) -> dict[str, float]:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process of PyTorch ended at {what!r}")
        return json.loads(answer)


def beside_torch(rounds: int, ways: list[str]) -> None:
    import jax
    import jax.numpy as jnp

    from jaxup.continuous.heads import noise
    from jaxup.model.spec import flatten, unflatten
    from jaxup.training.optimizer import AdamW, make_optimizer

    head, hidden = heads()["diffusion"], base().hidden_size
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    params = unflatten({p.path: 0.04 * normal(*p.shape) for p in head.table(hidden)})
    z, x = normal(ROWS, SIDE * SIDE, hidden), normal(ROWS, SIDE * SIDE, CHANNELS)
    times, start = rng.integers(0, TRAIN_STEPS, x.shape[:2]), normal(*x.shape)
    weights, key_B = jnp.ones(x.shape[:2], jnp.float32), jax.random.split(jax.random.key(0), ROWS)

    @jax.jit
    def loss_of(params):
        run = lambda y, time: head.net(params["net"], y, time, z, None)  # noqa: E731
        return jnp.mean(head.terms(run, x, start, jnp.float32((times + 0.5) / TRAIN_STEPS), 0))

    @jax.jit
    def sampled(params, z, key_B, temperature):
        return head.sample(params, z, key_B, steps=HEAD_STEPS, temperature=temperature, guidance=1)

    optimizer = make_optimizer(AdamW(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.02, clip_norm=3.0))

    @jax.jit
    def updated(params, state, z, key):
        # The decoder wants the gradient of z.
        def mean(params, z):
            return head.loss(params, z, x, weights, jax.random.split(key, ROWS)) / (ROWS * SIDE * SIDE)

        loss, (grads, _) = jax.value_and_grad(mean, argnums=(0, 1))(params, z)
        updates, state = optimizer.update(grads, state, params, learning_rate=jnp.float32(1e-4))
        return jax.tree.map(jnp.add, params, updates), state, loss

    first = noise(key_B, SIDE * SIDE, CHANNELS)
    expected = {"loss": loss_of(params), "sample": sampled(params, z, key_B, 0.0)}
    with tempfile.TemporaryDirectory() as scratch:
        given = Path(scratch, "given.npz")
        arrays = {"z": z, "x": x, "times": times, "start": start, "first": first, **expected}
        np.savez(given, **{f"params.{path}": leaf for path, leaf in flatten(params).items()}, **arrays)
        peer = Peer(given)
        apart = peer("check eager")
        assert max(apart.values()) < 1e-3, apart  # of what is drawn the mean: where all is noise roundings grow
        state, count = optimizer.init(params), 0

        def update() -> None:
            nonlocal params, state, count
            params, state, loss = updated(params, state, z, jax.random.key(count))
            count += 1
            jax.block_until_ready(loss)

        ours = {"update": update, "draw": lambda: jax.block_until_ready(sampled(params, z, key_B, 1.0))}
        row = table(
            "MAR's head beside PyTorch", "", "ms", *[f"{way}, ms" for way in ways], *[f"jaxup / {w}" for w in ways]
        )
        for what, own in ours.items():
            told = {way: lambda what=what, way=way: peer(f"{what} {way}") for way in ways}
            seconds = turns({"jaxup": own, **told}, rounds)
            medians = [f"{1000 * statistics.median(each):,.0f}" for each in seconds.values()]
            row(what, *medians, *[f"{ratio(seconds['jaxup'], seconds[way]):.2f}" for way in ways])
        peer.process.stdin.close()
        peer.process.wait()
    tokens = f"{ROWS * SIDE * SIDE} tokens, of an update {DRAWS} draws each, {HEAD_STEPS} steps to draw"
    apart_by = ", ".join(f"{name} by {value:.0e}" for name, value in apart.items())
    print(f"\n{DEPTH} blocks of {WIDTH}, {tokens}. A ratio above 1: jaxup is faster. Apart: {apart_by}")


def worker(given: str) -> None:
    """The head in PyTorch, as MAR's code has it, without the scales of its norms, which modulation makes needless."""
    import torch
    from torch import nn
    from torch.nn.functional import layer_norm, silu

    from jaxup.continuous.schedules import cosine

    arrays = {name: torch.from_numpy(array) for name, array in np.load(given).items()}
    z, x = arrays["z"].flatten(0, 1), arrays["x"].flatten(0, 1)

    def linear(path: str, index: int | None = None) -> nn.Linear:
        kernel, bias = (arrays[f"params.net.{path}.{leaf}"] for leaf in ("kernel", "bias"))
        if index is not None:
            kernel, bias = kernel[index], bias[index]
        made = nn.Linear(*kernel.shape)
        with torch.no_grad():
            made.weight.copy_(kernel.T)
            made.bias.copy_(bias)
        return made

    def normed(x: Any, scale: Any, shift: Any) -> Any:
        return layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    class Block(nn.Module):
        def __init__(self, index: int):
            super().__init__()
            self.modulation, self.up, self.down = (
                linear(f"blocks.{name}", index) for name in ("modulation", "up", "down")
            )

        def forward(self, x: Any, condition: Any) -> Any:
            scale, shift, gate = self.modulation(condition).chunk(3, -1)
            return x + gate * self.down(silu(self.up(normed(x, scale, shift))))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.condition = linear("token"), linear("condition")
            self.time = nn.Sequential(linear("time.up"), nn.SiLU(), linear("time.down"))
            self.blocks = nn.ModuleList(Block(index) for index in range(DEPTH))
            self.modulation, self.output = linear("modulation"), linear("output")
            self.register_buffer("frequency", torch.exp(-math.log(10_000) * torch.arange(128) / 128))

        def forward(self, y: Any, time: Any, z: Any) -> Any:
            angle = time[:, None] * self.frequency
            condition = self.time(torch.cat([angle.cos(), angle.sin()], -1))
            # Of all draws of a token z is the same.
            condition = silu((condition.view(-1, *z.shape[:1], WIDTH) + self.condition(z)).view(-1, WIDTH))
            x = self.token(y)
            for block in self.blocks:
                x = block(x, condition)
            return self.output(normed(x, *self.modulation(condition).chunk(2, -1)))

    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, betas=(0.9, 0.95), weight_decay=0.02)
    column = lambda name, table: torch.from_numpy(getattr(table, name)).float()  # noqa: E731
    whole, respaced = cosine(TRAIN_STEPS, TRAIN_STEPS), cosine(TRAIN_STEPS, HEAD_STEPS)
    signal, clean, low, high = (column(name, whole) for name in ("signal", "clean", "log_posterior", "log_beta"))
    apart = clean**2 * (1 - signal) / signal

    def loss_of(z: Any, x: Any, index: Any, start: Any) -> Any:
        A = signal[index][:, None]
        said, mix = net(A.sqrt() * x + (1 - A).sqrt() * start, index.float(), z).chunk(2, -1)
        squared, least = (said - start) ** 2, low[index][:, None]
        own = least + (mix + 1) / 2 * (high[index][:, None] - least)
        spread = torch.where(index[:, None] == 0, math.log(2 * math.pi), (least - own).exp() - 1 - least)
        bound = own + spread + apart[index][:, None] * squared.detach() * (-own).exp()
        return (squared + bound / (2 * math.log(2))).mean()

    def sampled(net: Any, y: Any, temperature: float) -> Any:
        names = ("times", "signal", "clean", "noisy", "log_posterior", "log_beta")
        for step in reversed(range(HEAD_STEPS)):
            time, A, c, n, least, most = (torch.tensor(float(getattr(respaced, name)[step])) for name in names)
            said, mix = net(y, time.expand(len(y)), z).chunk(2, -1)
            at = ((y - (1 - A).sqrt() * said) / A.sqrt()).clamp(-LIMIT, LIMIT)
            deviation = ((least + (mix + 1) / 2 * (most - least)) / 2).exp()
            y = c * at + n * y + (temperature if step else 0.0) * deviation * torch.randn_like(y)
        return y

    ways: dict[str, tuple[Any, Any]] = {"eager": (loss_of, net)}
    for line in sys.stdin:
        what, way = line.split()
        if way == "compiled" and way not in ways:
            ways[way] = torch.compile(loss_of), torch.compile(net)
        loss_by, net_by = ways[way]
        answer = {}
        if what == "check":
            with torch.inference_mode():
                loss = loss_by(z, x, arrays["times"].flatten(), arrays["start"].flatten(0, 1))
                drawn = sampled(net_by, arrays["first"].flatten(0, 1), 0.0)
            answer["loss"] = abs(loss / arrays["loss"] - 1).item()
            answer["draw"] = (drawn - arrays["sample"].flatten(0, 1)).abs().mean().item()
        elif what == "update":
            optimizer.zero_grad(set_to_none=True)
            index, start = torch.randint(TRAIN_STEPS, (DRAWS * len(x),)), torch.randn(DRAWS * len(x), CHANNELS)
            loss_by(z.clone().requires_grad_(), x.repeat(DRAWS, 1), index, start).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 3.0)
            optimizer.step()
        else:
            with torch.inference_mode():
                sampled(net_by, torch.randn_like(x), 1.0)
        print(json.dumps(answer), flush=True)


# ---- 5


def packing() -> None:
    from jaxup.continuous.layouts import Frames, Raster, Scales, Sets

    clip = grid(PROMPT + 8 * SIDE * SIDE) | {"frames": 8}
    layouts = {
        "raster": Raster(**grid()), "scales": Scales(**grid(), scales=(1, 2, 4, 8)), "sets": Sets(**grid()),
        "frames, 8": Frames(**clip), "frames, 8, in sets": Frames(**clip, sets=True),
    }  # fmt: skip
    row = table("Packing", "", "values", "us a row, of one core")
    for name, layout in layouts.items():
        rows, draws = examples(layout, "draw", 64), np.arange(64, dtype=np.uint32)
        seconds = []
        for _ in range(20):
            began = time.thread_time()
            layout.pack(rows, draws)
            seconds.append(time.thread_time() - began)
        row(name, layout.predicted, f"{1e6 * statistics.median(seconds) / len(rows):.0f}")


def main() -> None:
    a = arguments()
    if a.worker:
        return worker(a.worker)
    import jax

    rounds = a.rounds or (2 if QUICK else 7)
    c = base()
    print(
        f"{c.num_layers} layers of {c.hidden_size}, {c.vocab_size} tokens, {ROWS} rows of {SEQ} positions, images of "
        f"{SIDE * SIDE} tokens of {CHANNELS} channels; {rounds} turns; {jax.devices()[0].device_kind}, "
        f"{os.cpu_count()} cores, float32, jax {jax.__version__}"
    )
    parts = {
        "1": lambda: training(rounds), "2": lambda: drawing(rounds), "3": lambda: staged(rounds),
        "4": lambda: beside_torch(rounds, ["eager"] if QUICK else ["eager", "compiled"]), "5": packing,
    }  # fmt: skip
    for part, measure in parts.items():
        if part in a.parts:
            measure()


if __name__ == "__main__":
    main()
