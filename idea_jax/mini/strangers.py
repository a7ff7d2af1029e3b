"""People of the drawn world whom no network has seen: their photos, and other drawings of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from idea_jax.data.images import save_png
from idea_jax.mini import captions, drawings, people, traits
from idea_jax.pytrees import stream

REFERENCES = 8  # true drawings of a person that pictures of them are compared with
MADE = {"about": "somebody of the drawn world of idea_jax, who does not exist"}


def draw_people(
    split: str,
    numbers: Sequence[int],
    pictures: int,
    seed: int = 0,
    prompts: Sequence[captions.Prompt] = captions.PROMPTS,
    photos: int = 1,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Returns people of a split by their numbers: of each what is learned from, what pictures of
    them are compared with, and what each prompt asks for.

    A photo is a plain one, without a hat. A person's drawings depend on the seed and their number,
    not on who else is asked for, and the first photo not on how many there are.

    Returns:
      uint8[photos, 64, 64, 3], uint8[REFERENCES, 64, 64, 3] and uint8[prompts, pictures, 64, 64, 3]
      of each.
    """
    everybody = people.unnamed(split, max(numbers) + 1)
    drawn = []
    for number in numbers:
        key = jax.random.fold_in(stream(jax.random.key(seed), f"lab {split}"), number)
        plain = {"hat": "none", "expression": "neutral"}
        wanted: list[Mapping[str, str]] = [plain, *({},) * REFERENCES]
        wanted += [prompt.asks for prompt in prompts for _ in range(pictures)]
        scenes = _scenes(stream(key, "scenes"), wanted)
        rows = np.full(len(wanted), number)
        who = jax.tree.map(lambda leaf, rows=rows: leaf[rows], everybody)
        images = drawings.draw(who, scenes, jax.random.split(stream(key, "drawings"), len(wanted)))
        first, references, true = np.split(images, [1, 1 + REFERENCES])
        true = true.reshape(len(prompts), pictures, *true.shape[1:])
        if photos > 1:
            more = stream(key, "more photos")
            rows = np.full(photos - 1, number)
            who = jax.tree.map(lambda leaf, rows=rows: leaf[rows], everybody)
            scenes = _scenes(stream(more, "scenes"), [plain] * (photos - 1))
            keys = jax.random.split(stream(more, "drawings"), photos - 1)
            first = np.concatenate([first, drawings.draw(who, scenes, keys)])
        drawn.append((first, references, true))
    return drawn


def _scenes(key: jax.Array, wanted: Sequence[Mapping[str, str]]) -> traits.Scene:
    """Returns random scenes (leaves [N]), but plain photos, and where something is wanted, that."""
    columns = drawings.random_scenes(key, (len(wanted),))._asdict()
    for row, kinds in enumerate(wanted):
        for field, kind in {
            "style": "photo",
            "light": "plain",
            "framing": "plain",
            **kinds,
        }.items():
            columns[field][row] = captions.KINDS[field].index(kind)
    return traits.Scene(**columns)


def write(folder: Path, split: str, count: int, photos: int, seed: int) -> list[Path]:
    """Writes `photos/PERSON/N.png` and `held_out/PERSON/N.png`; returns both folders.

    They are the photos and the references of the people whom `python -m idea_jax.mini.lab` meets.
    """
    drawn = draw_people(split, range(count), 2, seed, photos=photos)
    for number, (learned, references, _) in enumerate(drawn):
        for kind, pictures in (("photos", learned), ("held_out", references)):
            for place, pixels in enumerate(pictures):
                path = folder / kind / f"person-{number:03d}" / f"{place:02d}.png"
                save_png(path, pixels, MADE)
    return [folder / "photos", folder / "held_out"]
