"""All stages of a pretraining, in order, and what each needs."""

from collections.abc import Callable

from idea_jax.mini import (
    enhancer,
    people,
)
from idea_jax.mini.pretrain.autoencoder import train_decoder, train_vae
from idea_jax.mini.pretrain.faces import train_detector, train_recogniser
from idea_jax.mini.pretrain.judge import train_own_judge, train_scoring_judge
from idea_jax.mini.pretrain.run import RECORD, SUMS, Run
from idea_jax.mini.pretrain.start import prepare
from idea_jax.mini.pretrain.text import make_drawings, train_clip
from idea_jax.mini.pretrain.unet import train_unet
from idea_jax.runtime.files import atomic_write, file_digest


def train_enhancer(run: Run) -> dict:
    """Trains the shared ID-Enhancer on drawn people of a split of their own."""
    drawn = enhancer.World(run.budget.enhancer_people, run.budget.enhancer_each, run.seed)
    course = enhancer.Schooling(*run.budget.enhancer)
    found = enhancer.train(run.folder, run.work, drawn, course)
    kept = ("people", "pictures", "loss_curve", "likeness_of_drawings", "share_waited", "seconds")
    return {stage: {name: of[name] for name in kept} for stage, of in found.items()}


_CARD = """\
# The mini

A Stable Diffusion of a drawn world, trained from nothing by `python -m idea_jax.mini.pretrain`
(seed {seed}; `pretraining.json` has the sizes, steps, losses and seconds). It knows {names} people
by name, nine colours, three hats, four expressions, four styles, and words for light and framing,
and nothing else. All of its people are made up. docs/mini.md of idea_jax says how good it is.
Licence: MIT, as the code.
"""


def finish(run: Run) -> dict:
    """Writes the model card and the check sums of all files."""
    card = _CARD.format(seed=run.seed, names=people.NAMES)
    with atomic_write(run.folder / "README.md") as path:
        path.write_text(card, encoding="utf-8")
    files = {
        str(path.relative_to(run.folder)): file_digest(path)
        for path in sorted(run.folder.rglob("*"))
        if path.is_file() and path.name not in (RECORD, SUMS) and not path.name.startswith(".tmp-")
    }
    with atomic_write(run.folder / SUMS) as path:
        path.write_text("".join(f"{digest}  {name}\n" for name, digest in files.items()))
    return {"megabytes": round(sum((run.folder / n).stat().st_size for n in files) / 1e6, 2)}


# Of the later parts of the UNet. The last tenth of the way, where little noise is left, decides who
# is recognised.
WITH_NAMES = {"listed": 0.5, "rate": 0.006, "max_snr": 40.0}


# In the order in which they are begun: what others wait for longest, then what takes long.
STAGES: dict[str, Callable[[Run], dict]] = {
    "prepare": prepare,
    "drawings": make_drawings,
    "judge": train_own_judge,
    "vae": train_vae,
    "clip": train_clip,
    "unet": lambda run: train_unet(run, "unet", listed=0.0, rate=0.01, max_snr=5.0),
    "unet_names": lambda run: train_unet(run, "unet_names", **WITH_NAMES),
    "unet_again": lambda run: train_unet(run, "unet_again", **WITH_NAMES),  # rate rises anew
    "detector": train_detector,
    "recogniser": lambda run: train_recogniser(run, "recognition", "recogniser", aligned=True),
    "decoder": train_decoder,
    # It sees whole pictures, so that no score depends on a detector.
    "scoring": lambda run: train_recogniser(run, "scoring", "scoring", aligned=False),
    "scoring_judge": train_scoring_judge,
    "enhancer": train_enhancer,
    "finish": finish,
}

NEEDS = {
    "drawings": ["prepare"],
    "judge": ["drawings"],
    "vae": ["drawings", "judge"],
    "clip": ["drawings"],
    "unet": ["vae", "clip"],
    "unet_names": ["unet"],
    "unet_again": ["unet_names"],
    "detector": ["drawings"],
    "recogniser": ["drawings"],
    "decoder": ["vae", "recogniser"],
    "scoring": ["drawings"],
    "scoring_judge": ["drawings"],
    "enhancer": ["decoder", "recogniser", "detector", "unet_again"],
    "finish": ["scoring", "detector", "scoring_judge", "clip", "enhancer"],
}
