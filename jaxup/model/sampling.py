"""Generation with a key/value cache: many texts at once, each as if it were alone, or one text by turns.

Shape suffixes: as in `jaxup.model.decoding`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxup.errors import UserError
from jaxup.model.config import ModelConfig
from jaxup.model.decoder import KVCache, Params, check_numbers
from jaxup.model.decoding import keys, programs

# A cache is of so many positions, or a power of two times as many: lengths nearby share their programs.
_BUCKET = 64
# Prefixes are computed so many positions at once, several in a batch or one that is longer; padded to 16, 32, 64, ...
_PREFILL, _SHORTEST = 512, 16
# Tokens that each row draws before the host sees them, at most: it can be interrupted, and shows progress, in between.
_BLOCK = 32
# Of the rows so many are refilled at once: a block goes on until one in so many has ended.
_REFILL = 8


class Request(NamedTuple):
    """A text to go on with."""

    prefix: Sequence[int]  # its tokens, at least one
    key: tuple[int, ...]  # numbers below 2^32 that decide what is drawn
    max_tokens: int
    ends: frozenset[int] = frozenset()  # tokens of which the first that is drawn is the last


class Drawn(NamedTuple):
    tokens: np.ndarray  # int32 [n], with the one that ended it
    logp: np.ndarray  # float32 [n]: of each under the distribution that it was drawn from
    entropy: np.ndarray  # float32 [n], nats: of these distributions
    ended: bool  # by one of `ends`


class Sampler:
    """Draws what follows many texts, `slots` at a time; a text that has ended makes room for the next.

    Texts with the same prefix share its computation. The distribution is softmax(logits / temperature), of it the
    `top_k` likeliest tokens, and of these the fewest that hold `top_p`: `logp` and `entropy` are of what is left. At
    temperature 0 all of it is on the likeliest token: log-probability and entropy are 0.

    What is drawn is a function of (prefix, key, position): the key of a text is `fold_in` of its numbers in order, the
    first being the seed, and of a token that of the text with its position. So a text that is broken off, and gone on
    with under the same key, is the same text up to rounding. To the bit it depends on nothing else but `slots` and
    `length`: not on the texts beside it, their number, their order, or what its row held before.

    Args:
      slots: rows that are computed at once.
      length: positions of the longest text, prefix included.
      vocab_size: token ids from it on (a table padded beyond its tokenizer) are never drawn.
      order: which layer runs when; see `Decoder`.

    `params` may lie on a mesh, whose axes "data" and "fsdp" split the rows if they divide them; every process then
    gets all texts. `drawn` counts the tokens that were drawn, those that `cut` took away too.
    """

    def __init__(
        self, config: ModelConfig, params: Params, *, slots: int, length: int, temperature: float, top_k: int,
        top_p: float, vocab_size: int, order: Sequence[int] | np.ndarray | None = None, dtype: str = "float32",
    ):  # fmt: skip
        if config.positions == "learned" and length > config.max_positions:
            raise UserError(f"texts of {length} tokens, and the model has {config.max_positions} positions")
        self.config, self.slots, self.length, self.drawn = config, slots, length, 0
        self._order = None if order is None else np.asarray(order, np.int32)
        if self._order is not None:
            check_numbers("layer", self._order, config.num_layers, first=-1)
        self._refill = max(1, slots // _REFILL)
        self._how = (dtype, temperature, top_k, top_p, vocab_size)
        self._states: dict[int, Any] = {}  # of texts of up to so many tokens, while no call has them
        self._params, where = _placed(params)
        self._programs = programs(config, *self._how, slots, where)

    def with_params(self, params: Params) -> Sampler:
        """The same with other parameters of the same shapes and places, by the same programs; it goes on counting."""
        other = copy.copy(self)
        other._params, _ = _placed(params)
        return other

    def __call__(
        self,
        requests: Sequence[Request],
        *,
        cut: Callable[[int, np.ndarray], int | None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Drawn]:
        """What is drawn for each request, in their order.

        Every so many tokens `cut(index of the request, all its tokens so far)` may say how many of them to keep: it is
        over then. `progress(requests that are over, tokens drawn by this sampler)` is called as often. An exception of
        theirs, or Ctrl-C, ends it. UserError for a prefix without tokens or with some that the model does not have,
        and for more positions than `length`.
        """
        for request in requests:
            if len(request.prefix) + request.max_tokens > self.length:
                what = f"{len(request.prefix)} tokens and {request.max_tokens} new ones"
                raise UserError(f"{what} are more than the {self.length} of a text")
        _check_tokens([request.prefix for request in requests], self.config)
        nothing = np.zeros(0, np.float32)
        done = [Drawn(nothing.astype(np.int32), nothing, nothing, False)] * len(requests)
        wanted, over = [i for i, request in enumerate(requests) if request.max_tokens > 0], 0
        # What a request needs decides alone with which cache it is drawn, for that is a matter of rounding.
        for (room, _), numbers in _grouped(wanted, lambda i: (self._room(requests[i]), len(requests[i].key))):
            for block in self._run(room, {i: requests[i] for i in numbers}, cut):
                for number, drawn in block.items():
                    done[number] = drawn
                over += len(block)
                if progress is not None:
                    progress(over, self.drawn)
        return done

    def stream(self, requests: Sequence[Request]) -> Iterator[np.ndarray]:
        """As many requests as there are slots, token by token: int32 [slots], -1 for those that are over."""
        most = max(request.max_tokens for request in requests)
        ends_EV, which = self._ends(requests)
        state = self._empty(self.length)
        # Prefixes of one length in positions, so that few programs are made.
        shortest = _doubled(_BUCKET, max(len(request.prefix) for request in requests) - 1, self.length)
        for keys_values, places in self._queue(dict(enumerate(requests)), self.length, shortest):
            rows = [number for number, _ in places]
            state = self._place(state, keys_values, places, rows, requests, which)
        step = functools.partial(
            self._programs.decode, self._params, ends_EV=ends_EV, alive_B=np.ones(self.slots, bool), least=np.int32(0),
            order=self._order, most=1,
        )  # fmt: skip
        (tokens_1B, *_, left_B), state = step(state=state)
        for i in range(1, most + 1):
            # The next step is dispatched before this one's tokens are read.
            following = step(state=state) if i < most else None
            yield np.asarray(tokens_1B)[0]
            if following is None or not np.asarray(left_B).any():
                return
            (tokens_1B, *_, left_B), state = following

    def _room(self, request: Request) -> int:
        return _doubled(_BUCKET, len(request.prefix) + request.max_tokens, self.length)

    def _run(self, room: int, requests: dict[int, Request], cut: Any) -> Iterator[dict[int, Drawn]]:
        """Block by block, what is over. The cache is kept for the next call, unless this one is broken off."""
        ends_EV, which = self._ends(requests.values())
        state = self._states.pop(room, None) or self._empty(room)
        rows: list[int | None] = [None] * self.slots  # the request that each has
        pieces: dict[int, list[list[np.ndarray]]] = {}  # tokens, log-probabilities and entropies of those in rows
        queue = self._queue(requests, room, min(_SHORTEST, room))
        upcoming = next(queue, None)
        while upcoming or pieces:
            free = [row for row, number in enumerate(rows) if number is None]
            while upcoming and len(upcoming[1]) <= len(free):
                taken, free = free[: len(upcoming[1])], free[len(upcoming[1]) :]
                state = self._place(state, *upcoming, taken, requests, which)
                for row, (each, _) in zip(taken, upcoming[1]):
                    rows[row], pieces[each] = each, []
                upcoming = next(queue, None)
            block, state = self._programs.decode(
                self._params, state=state, ends_EV=ends_EV, alive_B=np.asarray([number is not None for number in rows]),
                least=np.int32(self.slots - len(upcoming[1]) if upcoming else 0), order=self._order, most=_BLOCK,
            )  # fmt: skip
            *drawn, left_B = map(np.asarray, block)
            count_B = (drawn[0] >= 0).sum(axis=0)
            self.drawn += int(count_B.sum())
            over = {}
            for row, number in enumerate(rows):
                if number is None:
                    continue
                pieces[number].append([x_NB[: count_B[row], row] for x_NB in drawn])
                kept = None if cut is None else cut(number, np.concatenate([piece[0] for piece in pieces[number]]))
                if kept is not None or not left_B[row]:
                    tokens, logp, entropy = (np.concatenate(x)[:kept] for x in zip(*pieces.pop(number), strict=True))
                    ended = bool(len(tokens)) and int(tokens[-1]) in requests[number].ends
                    over[number], rows[row] = Drawn(tokens, logp, entropy, ended), None
            yield over
        self._states[room] = state

    def _queue(
        self, requests: dict[int, Request], room: int, shortest: int
    ) -> Iterator[tuple[Any, list[tuple[int, int]]]]:
        """(keys and values of some prefixes, [(number of a request, which of these prefixes is its)]), few at a time.

        Each prefix is computed once, when the first of its requests is about to be drawn.
        """
        numbers: dict[tuple[int, ...], list[int]] = {}
        for number, request in requests.items():
            numbers.setdefault(tuple(request.prefix), []).append(number)
        # The last token of a prefix is the first that is decoded.
        for size, alike in _grouped(numbers, lambda prefix: _doubled(shortest, len(prefix) - 1, room)):
            for prefixes in _parts(alike, max(1, min(self.slots, _PREFILL // size))):
                tokens_PS = np.zeros((max(1, min(self.slots, _PREFILL // size)), size), np.int32)
                for row, prefix in zip(tokens_PS, prefixes):
                    row[: len(prefix) - 1] = prefix[:-1]
                keys_values = self._programs.prefill(self._params, tokens_PS, self._order)
                places = [(number, i) for i, prefix in enumerate(prefixes) for number in numbers[prefix]]
                for some in _parts(places, self._refill):
                    yield keys_values, some

    def _place(self, state: Any, keys_values: Any, places: Any, rows: Sequence[int], requests: Any, which: Any) -> Any:
        """The state with these requests in these rows."""
        numbers, own = [number for number, _ in places], [requests[number] for number, _ in places]
        missing = self._refill - len(own)
        pad = lambda x, fill=0: np.asarray([*x, *[fill] * missing], np.int32)  # noqa: E731
        keys_RK = np.asarray([request.key for request in own] + [own[0].key] * missing, np.uint32)
        return self._programs.place(
            state, *keys_values, rows_R=pad(rows, self.slots), sources_R=pad([source for _, source in places]),
            tokens_R=pad([request.prefix[-1] for request in own]), keys_RK=keys_RK,
            lengths_R=pad([len(request.prefix) - 1 for request in own]),
            left_R=pad([request.max_tokens for request in own]),
            ends_R=pad([which[requests[number].ends] for number in numbers]),
        )  # fmt: skip

    def _empty(self, room: int) -> Any:
        return self._programs.empty(room=room, layers=None if self._order is None else len(self._order))

    def _ends(self, requests: Iterable[Request]) -> tuple[np.ndarray, dict[frozenset[int], int]]:
        """bool [a power of two, vocab]: the tokens of each set of ends; and where each set is."""
        which = {ends: i for i, ends in enumerate(dict.fromkeys(request.ends for request in requests))}
        ends_EV = np.zeros((1 << (len(which) - 1).bit_length(), self._how[-1]), bool)
        for ends, i in which.items():
            ends_EV[i, [token for token in ends if 0 <= token < ends_EV.shape[1]]] = True
        return ends_EV, which


def generate(
    config: ModelConfig,
    params: Params,
    prompts: np.ndarray | Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    vocab_size: int,
    order: Sequence[int] | np.ndarray | None = None,
    top_p: float = 1.0,
    eos_ids: Collection[int] = (),
    dtype: str = "float32",
) -> Iterator[np.ndarray]:
    """Yields int32 [batch] next tokens, at most `max_tokens` times, after `prompts` of any lengths.

    A row ends with the first of `eos_ids` that it draws, and is -1 from there on; when all rows have
    ended, so does the iteration. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 sample from all
    tokens. Token ids from `vocab_size` on (a table padded beyond its tokenizer) are never drawn. `order` is
    which layer runs when; see `Decoder`.

    A row is what `Sampler` draws under the key (seed, its index in the batch): it depends on that, its prompt and the
    other keywords, not on the other rows, up to the rounding of their number and of the longest of them. `params`
    may lie on a mesh; every process then gets all tokens. UserError for an empty prompt, and tokens, positions or
    layers that the model does not have.
    """
    longest = max(map(len, prompts), default=0)
    if min(map(len, prompts), default=0) == 0:
        raise UserError("generate: the prompt has no tokens")
    if longest + max_tokens > config.max_positions and config.positions == "learned":
        room = config.max_positions - longest
        raise UserError(
            f"generate: a prompt of {longest} tokens and {max_tokens} new ones exceed the model's "
            f"{config.max_positions} positions; " + (f"at most {room} new tokens fit" if room > 0 else "none fits")
        )
    _check_tokens(prompts, config)
    length = sum(-(-count // _BUCKET) * _BUCKET for count in (longest, max_tokens))
    sampler = Sampler(
        config, params, slots=len(prompts), temperature=temperature, top_k=top_k, top_p=top_p, vocab_size=vocab_size,
        length=min(length, config.max_positions) if config.positions == "learned" else length, order=order, dtype=dtype,
    )  # fmt: skip
    ends = frozenset(eos_ids)
    requests = [Request([int(i) for i in prompt], (seed, row), max_tokens, ends) for row, prompt in enumerate(prompts)]
    return sampler.stream(requests) if max_tokens > 0 else iter(())


class Session:
    """One text that is added to and gone on from, by turns; two programs for all turns, whatever their lengths.

    Keys and values are kept: of each turn only what comes after that of the turn before is computed. The first reply
    is what `generate` draws for the same prompt, alone, up to rounding.

    Args:
      context: positions that there are for all of the text.
      others: as for `generate`.
    """

    def __init__(
        self, config: ModelConfig, params: Params, *, context: int, temperature: float, top_k: int, top_p: float,
        seed: int, vocab_size: int, dtype: str = "float32",
    ):  # fmt: skip
        self._config, self._context, self._seed, self._dtype = config, context, seed, dtype
        self._params, self._where = _placed(params)
        self._extend = programs(config, dtype, temperature, top_k, top_p, vocab_size, 1, self._where).extend
        self._fed: list[int] = []  # tokens of which the state has keys and values
        self._state: Any = None

    def __call__(self, ids: Sequence[int], *, max_tokens: int, eos_ids: Collection[int] = ()) -> Iterator[int]:
        """Yields what is drawn after the text `ids`, at most `max_tokens`, up to and with one of `eos_ids`.

        May be broken off at any point, by Ctrl-C too. UserError for no tokens, those that the model does not have, and
        more than the context holds.
        """
        if not 0 < len(ids) <= self._context - max_tokens:
            raise UserError(f"{len(ids)} tokens and {max_tokens} new ones, and the context holds {self._context}")
        _check_tokens([ids], self._config)
        if self._state is None or self._state[0].k_LBKTH.is_deleted():  # or a step was broken off
            self._fed, self._state = [], self._empty()
        pairs = enumerate(zip(self._fed, ids[:-1]))
        same = next((i for i, (old, new) in pairs if old != new), min(len(self._fed), len(ids) - 1))
        del self._fed[same:]
        # Chunks of one length: the last ends with the text, and repeats what it must. Before the first position there
        # are as many slots of padding, where a chunk may begin.
        for end in (*range(same + _BUCKET, len(ids), _BUCKET), len(ids)):
            chunk_BS = np.asarray([[0] * _BUCKET + list(ids[:end])], np.int32)[:, -_BUCKET:]
            next_B, self._state = self._extend(self._params, chunk_BS, self._state, np.int32(end))
            self._fed = list(ids[:end])
        for left in reversed(range(max_tokens)):
            drawn_B = next_B
            if left:  # the next step is dispatched before this one's token is read
                slot = np.int32(_BUCKET + len(self._fed))
                next_B, self._state = self._extend(self._params, drawn_B, self._state, slot)
            token = int(np.asarray(drawn_B)[0])
            self._fed += [token] * (left > 0)
            yield token
            if token in eos_ids:
                return

    def _empty(self) -> Any:
        cache = KVCache.empty(self._config, 1, _BUCKET + self._context, jnp.dtype(self._dtype))
        # Where the parameters are, as after each step: what may lie anywhere would be another program.
        return jax.device_put((cache, np.asarray([_BUCKET], np.int32), keys(np.asarray([[self._seed, 0]], np.uint32))),
                              self._where)  # fmt: skip


def _placed(params: Params) -> tuple[Params, Sharding]:
    """On devices: parameters in host memory would be sent there for every token. And where what is small lies then."""
    params = jax.tree.map(jnp.asarray, params)
    where = jax.tree.leaves(params)[0].sharding
    return params, NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else where


def _check_tokens(prompts: Iterable[Any], config: ModelConfig) -> None:
    for prompt in dict.fromkeys(map(tuple, prompts)):
        if not prompt:
            raise UserError("generate: the prompt has no tokens")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            wrong, last = min(prompt) if min(prompt) < 0 else max(prompt), config.vocab_size - 1
            what = f"the prompt has the token {wrong}, the model those up to {last}"
            raise UserError(what, at="generate", hint="is this another model's tokenizer?")


def _doubled(size: int, least: int, most: int) -> int:
    """`size` times the power of two that reaches `least`, but at most `most`."""
    while size < least:
        size *= 2
    return min(size, most)


def _parts(things: Sequence[Any], size: int) -> list[Any]:
    return [things[start : start + size] for start in range(0, len(things), size)]


def _grouped(things: Iterable[Any], by: Callable[[Any], Any]) -> list[tuple[Any, list[Any]]]:
    """(what `by` says, all of which it says so), the lowest first."""
    groups: dict[Any, list[Any]] = {}
    for thing in things:
        groups.setdefault(by(thing), []).append(thing)
    return sorted(groups.items())


def lowered(
    config: ModelConfig, params: Params, mesh: Mesh, *, length: int, temperature: float, top_k: int
) -> jax.stages.Lowered:
    """The program that `generate` draws each token of one text by, for params without arrays on a mesh."""
    where = NamedSharding(mesh, PartitionSpec())
    run: Any = programs(config, "float32", temperature, top_k, 1.0, config.vocab_size, 1, where)
    state = jax.eval_shape(functools.partial(run.empty, room=-(-length // _BUCKET) * _BUCKET, layers=None))
    return run.decode.lower(
        params, state=state, ends_EV=np.zeros((1, config.vocab_size), bool), alive_B=np.ones(1, bool),
        least=np.int32(0), order=None, most=1,
    )  # fmt: skip
