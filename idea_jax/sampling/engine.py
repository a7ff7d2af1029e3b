"""Many pictures of many people: rows of different people and prompts in one compiled call."""

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from idea_jax.config.settings import is_guided
from idea_jax.data.text import Placeholder
from idea_jax.data.tokenizer import Tokenizer, Tokens
from idea_jax.formats.identity import Identity
from idea_jax.method import condition
from idea_jax.models import sd
from idea_jax.pytrees import abstract
from idea_jax.runtime import traces
from idea_jax.sampling import programs
from idea_jax.sampling.plan import (
    check_negative,
    padded,
    placeholder_of,
    tokens_of,
    weighted_tokens,
)

KEPT_BYTES = 2**29  # of keys and values that wait for the next row that needs them
KEPT_PEOPLE = 32  # whose arrays stay on a device
KEPT_TEXTS = 4096  # whose tokens are remembered


@dataclass(frozen=True)
class PictureRow:
    """All that one picture depends on, besides the model.

    Attributes:
      cast: names of the people in it, as `Engine.add` was given them.
      prompt: with {} for one person, or {NAME} for each of several.
      sampling: size, sampler and steps.
      negative: what the picture should not show; names nobody.
      seed, number: the picture's number within its seed.
      guidance: of 1 or less, it leaves the negative prompt out.
      strength: scales the ID-Adapter's and the K/V delta's effect.
    """

    cast: tuple[str, ...]
    prompt: str
    sampling: programs.Sampling
    negative: str = ""
    seed: int = 0
    number: int = 0
    guidance: float = 7.5
    strength: float = 1.0


class Kind(NamedTuple):
    """What the program of a row depends on: rows of one kind share calls."""

    sampling: programs.Sampling
    chunks: int  # of text, each as long as the encoder reads
    is_guided: bool


class Call(NamedTuple):
    """A call under way: its pictures float32[size, h, w, 3], of which the first `rows` count."""

    pictures: jax.Array
    rows: int


class KnownPerson(NamedTuple):
    """Somebody who can be drawn.

    Attributes:
      digest: hash of their file, which caches go by.
      load: their identity, from memory or from its file, whenever a device needs it again.
    """

    method: condition.Method
    placeholder: Placeholder
    digest: str
    load: Callable[[], Identity]


def sizes_on(devices: Sequence[jax.Device], each: int) -> tuple[int, ...]:
    """How many rows a call can have, ascending: on one of the devices, or `each` on all.

    On a CPU a device always has `each` rows: then a picture has the same bits alone and in any
    company, because rounding depends on the shape of a program (and, without AVX-512, on the place
    of a row: then it is the same to rounding). Elsewhere one device has 1, 2, 4, ... rows, so that
    few rows cost no more than they must.
    """
    sizes = [each]
    if devices[0].platform != "cpu":
        sizes = [*(2**n for n in range((each - 1).bit_length())), each]
    return tuple(sizes + [each * len(devices)] * (len(devices) > 1))


def size_for(rows: int, sizes: Sequence[int]) -> int:
    """The size of the calls for so many rows: the smallest that has room for all, or the largest:
    more calls than one are all of one size, so that one program serves them."""
    return next((size for size in sizes if size >= rows), sizes[-1])


def mesh_of(devices: Sequence[jax.Device]) -> Mesh:
    """Devices in a row, over which the rows of a call are spread."""
    return Mesh(np.array(devices), ("rows",), axis_types=(AxisType.Auto,))


def mesh_for(size: int, devices: Sequence[jax.Device], each: int) -> Mesh:
    """The devices of a call of one of `sizes_on`: one of them, or all."""
    return mesh_of(devices if size > each else devices[:1])


def rows_of_each(rows: int, devices: int, batch_size: int) -> int:
    """Rows that a device has in a call: as few as let all devices take part, `batch_size` at
    most."""
    return max(1, min(batch_size, math.ceil(rows / devices)))


def lower_call(
    model: sd.StableDiffusion, kind: Kind, size: int, devices: Sequence[jax.Device], each: int
) -> jax.stages.Lowered:
    """The program of a call, from shapes alone: weights may be missing."""
    mesh = mesh_for(size, devices, each)
    arguments = mesh, model, *call_shapes(model, kind, size, mesh), kind.sampling
    return traces.lower(programs.DRAWING, programs.draw_everywhere, arguments)


def call_shapes(model: sd.StableDiffusion, kind: Kind, size: int, mesh: Mesh) -> tuple:
    """Shapes, types and places of weights, keys and values, numbers and guidance of a call."""
    shapes, spread = sd.shapes(model), NamedSharding(mesh, P("rows"))
    T = kind.chunks * model.text.max_position_embeddings

    def of_row(kernel):
        return jax.ShapeDtypeStruct((size, 2, T, kernel.shape[1]), model.dtype)

    guidance = jax.ShapeDtypeStruct((size,), np.float32, sharding=spread)
    kv = jax.tree.map(of_row, shapes.cross_kv)
    if model.text_2 is not None:
        kv["pooled"] = jax.ShapeDtypeStruct((size, 2, model.unet.pooled_dim), np.float32)
    return (
        abstract(shapes, NamedSharding(mesh, P()), model.dtype),
        abstract(kv, spread),
        jax.ShapeDtypeStruct((size, 2), np.uint32, sharding=spread),
        guidance if kind.is_guided else None,
    )


class Kept:
    """What was used last, up to a number of bytes or entries; the oldest goes first."""

    def __init__(self, most: int, by_bytes: bool = False):
        self.most, self.by_bytes, self.size = most, by_bytes, 0
        self.entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable, make: Any) -> Any:
        """The entry of a key, made by `make()` where there is none."""
        if key in self.entries:
            self.entries.move_to_end(key)
            return self.entries[key][0]
        value = make()
        weight = sum(leaf.nbytes for leaf in jax.tree.leaves(value)) if self.by_bytes else 1
        self.entries[key] = value, weight
        self.size += weight
        while self.size > self.most and len(self.entries) > 1:
            self.size -= self.entries.popitem(last=False)[1][1]
        return value

    def remove(self, is_unwanted: Any) -> int:
        """Lets go of all entries whose key is unwanted; returns how many there were."""
        keys = [key for key in self.entries if is_unwanted(key)]
        for key in keys:
            self.size -= self.entries.pop(key)[1]
        return len(keys)


class Texts:
    """What rows say, in tokens; knows the people, and no weights.

    Args:
      plain: the checkpoint's tokenizer, without a person.
    """

    def __init__(self, plain: Tokenizer):
        self.plain, self.people = plain, dict[str, KnownPerson]()
        self.empty = plain.chunks([("", 1.0)])
        self.kept = Kept(KEPT_TEXTS)

    def tokens(self, row: PictureRow) -> tuple[Tokens, Tokens]:
        """Tokens of a row's prompt and of its negative prompt; errors as of `kind`."""

        def of_prompt():
            people = {name: self.people[name].placeholder for name in row.cast}
            check_negative(row.negative, people, self.plain)
            return tokens_of(row.prompt, people, self.plain)

        def of_negative():
            return weighted_tokens(self.plain, row.negative, {})

        prompt = self.kept.get((row.cast, row.prompt, row.negative), of_prompt)
        return prompt, self.kept.get(("plain", row.negative), of_negative)

    def remove(self, name: str) -> int:
        """Forgets somebody, if they are known; returns how many texts that show them went."""
        self.people.pop(name, None)
        return self.kept.remove(lambda key: key[0] != "plain" and name in key[0])

    def kind(self, row: PictureRow) -> Kind:
        """The kind of a row.

        Raises:
          KeyError: the cast has a name of nobody.
          TextError: the prompt names somebody else or nobody, or is far too long.
          ConfigError: the negative prompt names somebody.
        """
        prompt, negative = self.tokens(row)
        chunks = max(len(prompt.ids), len(negative.ids))
        return Kind(row.sampling, chunks, is_guided(row.guidance))


class Engine:
    """Draws rows on all devices of the process; for one thread at a time.

    A call has rows of one `Kind`. While it runs, the next one's keys and values are computed and
    it is queued, and the pictures of the one before are fetched by whoever iterates.

    Args:
      each: rows that a device has in a call, at most.
      shared: what a shared ID-Enhancer adds for everybody (`Frozen.shared`).
      devices: default: all of the process.
    """

    def __init__(
        self,
        model: sd.StableDiffusion,
        frozen: sd.Frozen,
        texts: Texts,
        *,
        each: int,
        shared: dict | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        self.model, self.texts, self.each = model, texts, each
        self.devices = list(devices or jax.local_devices())
        self.sizes = sizes_on(self.devices, each)
        everywhere = NamedSharding(mesh_of(self.devices), P())
        self.frozen = jax.device_put(frozen, everywhere)
        alone = NamedSharding(mesh_of(self.devices[:1]), P())
        # The same buffers once more, as arrays of the first device alone.
        own = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data, self.frozen)
        self.frozen_alone = jax.device_put(own, alone)
        self.shared = jax.device_put(shared or {}, alone)
        self.near = Kept(KEPT_PEOPLE)
        self.known = Kept(KEPT_BYTES, by_bytes=True)

    def add(self, name: str, person: KnownPerson) -> None:
        """Lets somebody be drawn by this name."""
        self.remove(name)
        self.texts.people[name] = person

    def remove(self, name: str) -> int:
        """Forgets somebody, if they are known; returns how many cache entries of theirs went.

        The entries stay where somebody of another name has the same digest.
        """
        people = self.texts.people
        person = people.get(name)
        if person is None:
            return 0
        gone = self.texts.remove(name)
        if all(other.digest != person.digest for other in people.values()):
            gone += self.near.remove(lambda digest: digest == person.digest)
            gone += self.known.remove(lambda key: key[0] != "plain" and person.digest in key[0])
        return gone

    def _keys_values(self, row: PictureRow, chunks: int) -> tuple[dict, dict]:
        """Keys and values of the negative prompt and of the prompt, leaves [1, T, inner] each."""
        prompt, negative = self.texts.tokens(row)
        cast = [self.texts.people[name] for name in row.cast]
        digests = tuple(person.digest for person in cast)
        methods = tuple(person.method for person in cast)

        def arrays(person):
            identity = person.load()
            return jax.device_put((identity.trainable, identity.given), self.devices[0])

        def trees():
            each = [self.near.get(who.digest, functools.partial(arrays, who)) for who in cast]
            return [tuple(part) for part in zip(*each, strict=True)]

        frozen, strength = self.frozen_alone._replace(shared=self.shared), np.float32(row.strength)
        # The negative prompt is one for everybody where nobody's keys and values change.
        changes = row.strength != 0 and any(method.changes_kv for method in methods)

        def of_prompt():
            tokens = padded(prompt, self.texts.empty, chunks)
            return programs.named_keys_values(
                self.model, methods, frozen, *trees(), tokens, strength
            )

        def of_negative():
            tokens = padded(negative, self.texts.empty, chunks)
            if not changes:
                return programs.plain_keys_values(self.model, self.frozen_alone, tokens)
            trainables, _ = trees()
            return programs.unguided_keys_values(
                self.model, methods, frozen, trainables, tokens, strength
            )

        named = self.known.get((digests, "prompt", row.prompt, row.strength, chunks), of_prompt)
        whose = (digests, "negative", row.strength) if changes else ("plain",)
        return self.known.get((*whose, row.negative, chunks), of_negative), named

    def launch(self, rows: Sequence[PictureRow], size: int | None = None) -> Call:
        """Starts to draw rows of one kind, and does not wait.

        Args:
          rows: `sizes[-1]` at most.
          size: of the call, one of `sizes`; default: the smallest that has room. The rest is
            filled with the last row, whose further pictures are never fetched.
        """
        kind = self.texts.kind(rows[0])
        size = size or size_for(len(rows), self.sizes)
        filled = [*rows, *[rows[-1]] * (size - len(rows))]
        mesh = mesh_for(size, self.devices, self.each)
        each = NamedSharding(mesh, P("rows"))
        pairs = [self._keys_values(row, kind.chunks) for row in filled]
        kv = programs.stacked(*zip(*pairs, strict=True))
        numbers = np.array([(row.seed, row.number) for row in filled], np.uint32)
        guidance = np.array([row.guidance for row in filled], np.float32)
        pictures = traces.call(
            programs.DRAWING,
            programs.draw_everywhere,
            mesh,
            self.model,
            self.frozen if mesh.size > 1 else self.frozen_alone,
            jax.device_put(kv, each),
            jax.device_put(numbers, each),
            jax.device_put(guidance, each) if kind.is_guided else None,
            kind.sampling,
        )
        return Call(pictures, len(rows))

    def calls(self, rows: Sequence[PictureRow]) -> Iterator[tuple[list[int], int]]:
        """Places of the rows of each call, and its size (`size_for`): kind by kind, in order."""
        groups: dict[Kind, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(self.texts.kind(row), []).append(place)
        for places in groups.values():
            size = size_for(len(places), self.sizes)
            for first in range(0, len(places), size):
                yield places[first : first + size], size

    def draw(self, rows: Sequence[PictureRow]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields each row's place and picture, float32[height, width, 3] in about [-1, 1]."""
        before: tuple[list[int], Call] | None = None
        for places, size in self.calls(rows):
            call = self.launch([rows[place] for place in places], size)
            if before:
                yield from fetch(*before)
            before = places, call
        if before:
            yield from fetch(*before)

    def warm_up(self, rows: Sequence[PictureRow]) -> None:
        """Compiles all that rows like these need, for calls of every size, and runs it once."""
        firsts = {self.texts.kind(row): row for row in reversed(rows)}
        for row in firsts.values():
            for size in self.sizes:
                fetch(range(1), self.launch([row], size))


def person_of(identity: Identity, digest: str) -> KnownPerson:
    """Somebody whose identity stays in memory."""
    return KnownPerson(identity.method, placeholder_of(identity), digest, lambda: identity)


def fetch(places: Sequence[int], call: Call) -> list[tuple[int, np.ndarray]]:
    """Waits for a call; returns its pictures with the places of its rows."""
    return list(zip(places, np.asarray(call.pictures)[: call.rows], strict=True))
