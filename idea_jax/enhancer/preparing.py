"""`idea-train-enhancer --prepare`: from settings to a prepared folder."""

import sys
from pathlib import Path

from idea_jax.data import people, text
from idea_jax.data.tokenizer import load_tokenizer
from idea_jax.enhancer import fit, shards, sources
from idea_jax.enhancer.beginning import open_model
from idea_jax.enhancer.prepare import Studio, prepare
from idea_jax.enhancer.settings import CELEBRITIES, PrepareConfig
from idea_jax.enhancer.sources import Casting, Source
from idea_jax.faces import finding, portraits
from idea_jax.faces import models as face_models
from idea_jax.models import sd
from idea_jax.sampling import programs
from idea_jax.training.results import Base
from idea_jax.training.start import known_names


def run(cfg: PrepareConfig) -> list[Path]:
    """Writes a prepared folder; returns its path.

    Raises:
      as `prepare`, and what is wrong with checkpoint and face model.
    """
    people.places(cfg.identities)
    face_models.check_select(cfg.face_select)
    names = text.read_names(cfg.celeb_path) if cfg.celeb_path else None
    found, model, loading = open_model(cfg)
    side, _ = programs.picture_size(model, cfg.resolution, cfg.resolution, ("resolution",) * 2)
    sizes = model.text.vocab_size, model.text.max_position_embeddings
    tokenizer = load_tokenizer(found.tokenizer, *sizes, found.padding).with_placeholder(
        fit.PLACEHOLDER, cfg.n_pseudo_tokens
    )
    path = portraits.find_face_model(
        cfg.face_model, found.folder, cfg.face_model_dir, accept_licence=cfg.accept_face_licence
    )
    finder = finding.open_finder(
        path,
        provider=cfg.face_provider,
        select=cfg.face_select,
        pre_aligned=cfg.pre_aligned,
        needs_detector=cfg.crop == "face" or cfg.face_select != "largest",
    )
    source = None if cfg.people == CELEBRITIES else read_source(cfg)
    _, frozen = sd.load(found.folder, **loading)
    base = Base(model, frozen, tokenizer, found.name, found.revision)
    if source is None:
        casting = Casting(
            pictures=cfg.celebrity_pictures,
            steps=cfg.celebrity_steps,
            guidance_scale=cfg.celebrity_guidance,
            likeness=cfg.celebrity_likeness,
            prompts=cfg.celebrity_prompt or sources.PROMPTS,
        )
        source = sources.celebrities(
            base,
            finder,
            names or known_names(found.folder),
            casting,
            side=side,
            seed=cfg.seed,
        )
    studio = Studio(
        base,
        finder,
        side,
        cfg.crop,
        cfg.crop_margin,
        seed=cfg.seed,
        shard_pictures=cfg.shard_pictures,
    )
    index = prepare(source, cfg.prepare, studio)
    print(
        f"{index.people} people, {index.pictures} pictures, {index.rejected} rejected, "
        f"{source.count - index.people} people left out; {shards.NOTICE}",
        file=sys.stderr,
    )
    return [Path(cfg.prepare)]


def read_source(cfg: PrepareConfig) -> Source:
    """The people of a folder or a data set."""
    if cfg.dataset is not None:
        return sources.from_celeb_a(cfg.dataset_dir, cfg.identities)
    return sources.from_folders(cfg.people, cfg.identities)
