"""Inputs of the training, written once: faces, texts, and pictures as the frozen VAE sees them."""

import functools
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from PIL import Image
from tqdm import tqdm

from idea_jax import jobs
from idea_jax.data import images, text
from idea_jax.enhancer import drawing, shards
from idea_jax.enhancer.shards import Faces, Index, Shard, ShardRecord, ShardsError
from idea_jax.enhancer.sources import NumberedPerson, Portrait, Source
from idea_jax.faces import finding
from idea_jax.faces import models as face_models
from idea_jax.faces.crops import alignment, training_square
from idea_jax.faces.table import Sight
from idea_jax.models import sd
from idea_jax.pytrees import cast, tree_digest
from idea_jax.runtime.files import check_writable
from idea_jax.training.photos import size_ids
from idea_jax.training.results import Base

log = logging.getLogger(__name__)

TURN = 50.0  # degrees, to either side
SMALL = (36, 160)  # pixels of the face's crop
ENCODED = 8  # pictures that a device encodes at once

# What can be wrong with one picture, and does not concern the others.
PICTURE_ERRORS = (face_models.FaceError, images.ImageError, OSError)


@dataclass(frozen=True)
class Studio:
    """What pictures are prepared with.

    Attributes:
      base: the checkpoint; its tokenizer knows the placeholder.
      finder: what finds and embeds faces; None if every picture brings its face along. A picture
        that does not bring that of its small or turned version is then not embedded so.
      side: of the training pictures, in pixels.
      crop, crop_margin: what of a picture is trained on; as in `TrainConfig`.
      seed: of the small and turned versions.
      shard_pictures: at least so many pictures make a shard.
    """

    base: Base
    finder: finding.Finder | None
    side: int
    crop: str = "face"
    crop_margin: float = 1.0
    seed: int = 0
    shard_pictures: int = 1024


def prepare(source: Source, out: str | Path, studio: Studio, *, quiet: bool = False) -> Index:
    """Writes the inputs of a source into a folder; the same call goes on after an interruption.

    Shards that are whole are kept, damaged ones are made again. Pictures that cannot be used are
    left out, and listed at the end.

    Args:
      quiet: no progress bar.

    Raises:
      ShardsError: the folder is of another preparation, or fewer than two people can be used.
      FaceError, ImageError, PeopleError, TextError: as the source.
      JobsError: another run is using the folder.
      WriteError: the disk is full; what was written is whole, and the same call goes on.
    """
    out = Path(out)
    check_writable(out)
    with jobs.only_run(out, 0, "--prepare"):
        index = begin(source, out, studio)
        rejected: list[tuple[Any, str]] = []
        try:
            for number, first, stop in todo(out, index):
                index = write_range(source, out, studio, index, (number, first, stop), rejected)
        finally:
            report(rejected, quiet)
        if index.people < 2:
            # Nobody keeps a face that is of no use, and other pictures may be prepared here then.
            shards.remove(out, [shard.number for shard in index.shards])
            (out / shards.INDEX).unlink(missing_ok=True)
            bad = max(index.rejected, len(rejected))
            raise ShardsError(
                f"of the {source.count} people only {index.people} can be used ({index.pictures} "
                f"pictures can, {bad} cannot); expected two people or more, with a face that is "
                "found"
            )
        index = replace(index, is_complete=True)
        shards.write_index(out, index)
    return index


def begin(source: Source, out: Path, studio: Studio) -> Index:
    """The index to go on from: that of the folder, or a new one.

    Raises:
      ShardsError: the folder is of another preparation.
    """
    fresh = describe(source, studio)
    if (out / shards.INDEX).exists():
        index = shards.read_index(out)
        before, now = index.made_of(), fresh.made_of()
        # What earlier versions have not noted cannot differ.
        before["facts"] = {**now["facts"], **before["facts"]}
        differs = [name for name in now if before[name] != now[name]]
        differs = ["the pictures" if name == "facts" else name for name in differs]
        if differs:
            raise ShardsError(
                f"{out} was prepared in another way ({', '.join(differs)} differ); choose another "
                "folder, or delete this one with --purge"
            )
        damaged = shards.verify(out, index)
        if damaged:
            log.warning("shards %s are damaged and are made again", damaged)
            shards.remove(out, damaged)
        return index
    shards.write_index(out, fresh)
    return fresh


def describe(source: Source, studio: Studio) -> Index:
    """The index of a preparation before there are shards."""
    base, finder = studio.base, studio.finder
    model, placeholder = base.model, base.tokenizer.placeholder
    scale = studio.side // model.vae.downscale
    face_model = finder.about.face_model if finder else source.face_model
    if face_model is None:
        raise ShardsError(
            f"nobody says which recogniser the faces of {source.kind} are of; give a finder with "
            "one, or the source its face_model"
        )
    return Index(
        base_model=base.name,
        revision=base.revision,
        base_weights=weights_digests(base.frozen),
        face_model=face_model,
        detector=finder.about.detector if finder else None,
        source=source.kind,
        licence=source.licence,
        facts=source.facts,
        settings={
            "crop": studio.crop,
            "crop_margin": studio.crop_margin,
            "side": studio.side,
            "seed": studio.seed,
            "shard_pictures": studio.shard_pictures,
            **({"has_sizes": True} if model.text_2 is not None else {}),
        },
        num_tokens=placeholder.n,
        vocab_size=model.text.vocab_size,
        length=base.tokenizer.length,
        texts=base.tokenizer(text.training_prompts(placeholder)).tolist(),
        latent=[scale, scale, model.vae.latent_channels],
    )


def weights_digests(frozen: sd.Frozen) -> dict[str, str]:
    """Digests of the weights by which checkpoints are told apart: as they are, and in bfloat16,
    in which those that are read in float32 and in bfloat16 agree."""
    trees = {str(jax.tree.leaves(frozen.cross_kv)[0].dtype): frozen.cross_kv}
    trees.setdefault("bfloat16", cast(frozen.cross_kv, jnp.bfloat16))
    return {name: tree_digest(tree) for name, tree in trees.items()}


def todo(out: Path, index: Index) -> list[tuple[int, int, int | None]]:
    """Shards that are missing: number, first place in the source, and the one behind the last;
    None for all that comes."""
    missing, first = [], 0
    for shard in index.shards:
        if not all(path.is_file() for path in shards.files_of(out, shard.number)):
            missing.append((shard.number, first, shard.until))
        first = shard.until
    if not index.is_complete:
        missing.append((len(index.shards), first, None))
    return missing


def write_range(
    source: Source,
    out: Path,
    studio: Studio,
    index: Index,
    span: tuple[int, int, int | None],
    rejected: list[tuple[Any, str]],
) -> Index:
    """Writes the shards of a part of the source; returns the index with them.

    Args:
      span: as `todo` says.
      rejected: gets the pictures that cannot be used.
    """
    shards.clean(out, index)
    number, first, stop = span
    last = source.count if stop is None else stop
    held: list[tuple[NumberedPerson, list[tuple[Portrait, Sight, np.ndarray]]]] = []
    bad: list[tuple[Any, str]] = []
    place = first

    def write(index):
        if not held and not bad:
            return index
        records, seen = encode(studio, held)
        about = shards.write_shard(out, number, records, seen) if records else None
        rejected.extend(bad)
        if about is None and number < len(index.shards):
            raise ShardsError(
                f"shard {number} of {out} is damaged, and its pictures can no longer be used; "
                "bring them back, or delete the folder with --purge and prepare it again"
            )
        if about is None:  # nobody is left who could be in a shard of their own
            return with_rejected(out, index, place, len(bad))
        shard = Shard(until=place, rejected=len(bad), **about)
        kept = [other for other in index.shards if other.number != number]
        index = replace(index, shards=sorted([*kept, shard], key=lambda shard: shard.number))
        shards.write_index(out, index)
        return index

    with tqdm(total=source.count, initial=first, desc="people", unit="person", disable=None) as bar:
        for person in source.people(first):
            if person.number >= last:
                break
            good, failed = look(studio, person)
            bad += failed
            if good:
                held.append((person, good))
            place = person.number + 1
            bar.update(place - bar.n)
            if stop is None and sum(len(g) for _, g in held) >= studio.shard_pictures:
                index = write(index)
                held, bad, number = [], [], number + 1
        place = last
        return write(index)


def with_rejected(out: Path, index: Index, until: int, count: int) -> Index:
    """The index once the rest of the source, up to a place, has only pictures that are bad."""
    if not index.shards:
        return index
    *earlier, last = index.shards
    last = replace(last, until=until, rejected=last.rejected + count)
    index = replace(index, shards=[*earlier, last])
    shards.write_index(out, index)
    return index


def look(studio: Studio, person: NumberedPerson) -> tuple[list, list[tuple[Any, str]]]:
    """The usable pictures of a person: (portrait, sight, turned face) each; and the others."""
    good, bad = [], list(person.rejected)
    for place, portrait in enumerate(person.portraits):
        picture = portrait.picture
        try:
            image = picture.read()
            sight = portrait.sight
            if sight is None:
                if studio.finder is None:
                    raise face_models.FaceError("its face is not known, and nothing finds faces")
                sight = studio.finder.look_at(image, picture)
            if studio.crop == "face" and sight.points is None:
                raise face_models.FaceError("nobody looked for its eyes, which --crop face needs")
            other = portrait.turned
            if other is None:
                rng = np.random.default_rng([studio.seed, person.number, place])
                other = turned(studio, image, sight, rng)
            good.append((portrait._replace(sight=sight), sight, other))
        except PICTURE_ERRORS as error:
            bad.append((picture, str(error)))
    return good, bad


def turned(
    studio: Studio, image: Image.Image, sight: Sight, rng: np.random.Generator
) -> np.ndarray:
    """The face float32[512] on a small or turned version of a picture; zeros if none is found."""
    angle, size = rng.uniform(-TURN, TURN), rng.uniform(*SMALL)
    if studio.finder is None:
        return np.zeros(shards.WIDTH, np.float32)
    side = float(max(sight.box[2:] - sight.box[:2]))
    if sight.points is not None:  # of what the recogniser is given, in pixels of the picture
        side = face_models.SIZE / float(np.hypot(*alignment(sight.points)[:, 0]))
    scale = min(1.0, size / max(side, 1.0))
    small = image.resize([max(images.MIN_SIDE, round(n * scale)) for n in image.size])
    try:
        found = replace(studio.finder, is_quiet=True).look_at(  # small and turned on purpose
            small.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor=(127,) * 3),
            "a small version",
        )
    except face_models.FaceError:
        return np.zeros(shards.WIDTH, np.float32)
    return np.asarray(found.embed, np.float32)


def pixels_of(
    studio: Studio, portrait: Portrait, sight: Sight
) -> tuple[np.ndarray, tuple[int, ...]]:
    """What of a picture is trained on, float32[side, side, 3] in [-1, 1], and its `size_ids`."""
    image = portrait.picture.read()
    if studio.crop == "face":
        centre, width, angle = training_square(sight.points, image.size, studio.crop_margin)
        image = images.crop_turned(image, centre, width, angle)
    is_cut = studio.crop == "center"
    sizes = size_ids(image.size, studio.side, center_crop=is_cut)
    return images.to_pixels(image, studio.side, center_crop=is_cut), sizes


def encode(studio: Studio, held: list) -> tuple[list[ShardRecord], Faces]:
    """Records and faces of people's pictures.

    Args:
      held: (person, [(portrait, sight, turned face)]) each.

    Raises:
      ImageError: the VAE gives values that are not finite.
      TextError: a text loses the person when it is cut to the text encoder's length.
    """
    tokenizer = studio.base.tokenizer
    N, length = tokenizer.placeholder.n, tokenizer.length
    flat = [(person, *entry) for person, good in held for entry in good]
    sizes: list[tuple[int, ...]] = []

    def pixels():
        for _, portrait, sight, _ in flat:
            found, own = pixels_of(studio, portrait, sight)
            sizes.append(own)
            yield found

    moments = encode_pixels(studio.base, pixels(), len(flat))
    records, nobody = [], np.full(N, -1, np.int32)
    for (person, portrait, _, _), (mean, std) in zip(flat, moments, strict=True):
        filled = [text.fill(said, tokenizer.placeholder) for said in portrait.texts]
        ids = tokenizer(filled) if filled else np.zeros((0, length), np.int32)
        records.append(ShardRecord(person.number, ids, mean, std))
    columns = [
        (
            person.number,
            sight.embed,
            other,
            sight.box,
            nobody if person.name_ids is None else person.name_ids,
        )
        for person, _, sight, other in flat
    ]
    kinds = (np.int32, np.float32, np.float32, np.float32, np.int32)
    if not columns:
        return [], None
    stacked = (np.array(c, kind) for c, kind in zip(zip(*columns, strict=True), kinds, strict=True))
    told = np.array(sizes, np.int32) if studio.base.model.text_2 is not None else None
    return records, Faces(*stacked)._replace(size_ids=told)


def encode_pixels(
    base: Base, pixels: Iterator[np.ndarray], count: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields mean and standard deviation, float16[2, h, w, C] each, of pictures and mirrors.

    Args:
      pixels: float32[side, side, 3] in [-1, 1] each, `count` of them.

    Raises:
      ImageError: one of them is not finite.
    """
    mesh = drawing.mesh_of(jax.local_devices())
    frozen = drawing.put(base.frozen, mesh)
    size = ENCODED * mesh.size
    for first in range(0, count, size):
        batch = [next(pixels) for _ in range(min(size, count - first))]
        filled = np.stack(batch + [batch[-1]] * (size - len(batch)))
        both = np.stack([filled, filled[:, :, ::-1]], axis=1)
        mean, std = jax.device_get(_encode(base.model, frozen, drawing.put(both, mesh, P("data"))))
        for row in range(len(batch)):
            with np.errstate(over="ignore"):
                found = mean[row].astype(np.float16), std[row].astype(np.float16)
            if not all(np.isfinite(leaf).all() for leaf in found):
                raise images.ImageError(
                    f"the VAE of {base.name} gives values that are not finite: check its weights, "
                    "and use --mixed_precision no"
                )
            yield found


@functools.partial(jax.jit, static_argnums=0)
def _encode(model, frozen, both):
    """Moments of float32[B, 2, side, side, 3]: mean and standard deviation [B, 2, h, w, C]."""
    mean, logvar = sd.encode_image(model, frozen, both.reshape(-1, *both.shape[2:]))
    shape = (*both.shape[:2], *mean.shape[1:])
    return mean.reshape(shape), jnp.exp(0.5 * logvar).reshape(shape)


def report(rejected: list[tuple[Any, str]], quiet: bool) -> None:
    """Prints the pictures that cannot be used, as a table."""
    if not rejected or quiet:
        return
    print(f"{len(rejected)} pictures cannot be used:", file=sys.stderr)
    named = [(getattr(p, "name", "a person"), why) for p, why in rejected]
    width = max(len(name) for name, _ in named)
    for name, why in named:
        print(f"  {name:{width}}  {why}", file=sys.stderr)
