"""What everybody of a run begins with: the method, the first values, the optimiser."""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from idea_jax.config.reading import resolve as resolve_config
from idea_jax.config.settings import ConfigError, TrainConfig, reading
from idea_jax.data import text
from idea_jax.data.tokenizer import Tokenizer, name_token_ids, word_token_ids
from idea_jax.formats import enhancer as enhancers
from idea_jax.method import anchor, condition, shared
from idea_jax.models import hub, sd
from idea_jax.training.results import Base, check_finite
from idea_jax.training.step import make_optimizer, rate_over_steps

log = logging.getLogger(__name__)


def how_read(cfg: TrainConfig) -> dict[str, Any]:
    """What a run says of how its checkpoint is read, as `sd.read_configs` and `sd.load` take it.

    Raises:
      CheckpointNotFound: the autoencoder that it names is not there.
    """
    vae = hub.resolve_vae(cfg.vae) if cfg.vae else None
    return {"vae": vae, "clip_skip": cfg.clip_skip, **reading(cfg)}


def settle(
    cfg: TrainConfig, checkpoint_folder: Path
) -> tuple[TrainConfig, enhancers.Enhancer | None]:
    """The settings of a run once its checkpoint is here, and the shared ID-Enhancer that people
    begin with, if there is one.

    Raises:
      ConfigError: settings do not fit that there is one, or none.
      EnhancerError: its file cannot be used.
    """
    path = enhancers.find(cfg.enhancer, checkpoint_folder) if cfg.profile == "paper" else None
    if path is None:
        return resolve_config(cfg, None), None
    enhancer = enhancers.read(path)
    own = enhancer.config
    fixed: dict[str, Any] = {"n_pseudo_tokens": own.num_tokens, "beta": own.beta}
    if not own.basis:
        if cfg.token_basis == "names":
            raise ConfigError(
                f"--token_basis is names, and the shared ID-Enhancer {path} holds no basis: leave "
                "it out, or add one to a copy of that file with idea-train-enhancer "
                "--init_enhancer, and --data as for every training (--max_train_steps 0 changes "
                "nothing else)"
            )
        fixed["token_basis"] = "none"
    return resolve_config(cfg, fixed), enhancer


def method_of(cfg: TrainConfig, enhancer: enhancers.Enhancer | None = None) -> condition.Method:
    """The method that a config asks for.

    Args:
      enhancer: the shared one, if people begin with it.
    """
    if enhancer is not None:
        # Without a step nobody has anything of their own but what was predicted.
        own = cfg.own_parts() if cfg.max_train_steps else ()
        return shared.person_method(
            enhancer.config,
            kv=cfg.kv if "kv" in own else "none",
            kv_rank=cfg.kv_rank,
            own_adapter="adapter" in own,
            regulariser=cfg.regulariser,
            reg_weight=cfg.reg_weight,
            basis=enhancer.config.basis if own and cfg.token_basis == "names" else 0,
        )
    return condition.make_method(
        cfg.profile,
        regulariser=cfg.regulariser,
        kv=cfg.kv,
        kv_rank=cfg.kv_rank,
        num_tokens=cfg.n_pseudo_tokens,
        beta=cfg.beta,
        reg_weight=cfg.reg_weight,
    )


def known_names(checkpoint_folder: Path) -> list[str]:
    """Names that the text encoder knows: the checkpoint's own list, or the shipped one."""
    own = checkpoint_folder / "names.txt"
    return text.read_names(own) if own.is_file() else text.shipped_names()


def placeholder_of(cfg: TrainConfig) -> text.Placeholder:
    """The person's name in prompts, spelled as the tokenizer will see it."""
    token, notice = text.normalise_placeholder(cfg.placeholder_token)
    if notice:
        log.warning(notice)
    return text.Placeholder(token, cfg.n_pseudo_tokens)


def starting_ids(
    cfg: TrainConfig, method: condition.Method, tokenizer: Tokenizer, names: list[str]
) -> np.ndarray:
    """Token ids to start from: int32[N] of words, or int32[K, N] of names.

    One word stands for all pseudo tokens.
    """
    n, words = cfg.n_pseudo_tokens, cfg.initialize_tokens
    if words is None and method.cross_init:
        return name_token_ids(tokenizer, names, n)
    words = words or ["person"]
    return word_token_ids(tokenizer, words * n if len(words) == 1 else words, n)


def starting_tokens(cfg: TrainConfig, method: condition.Method, base: Base, ids: np.ndarray) -> Any:
    """The pseudo tokens' first value, float32[N, D]; it is the anchor, too. Of two text encoders a
    dict of that of each."""
    model, frozen, special = base.model, base.frozen, base.tokenizer
    if not method.cross_init:
        start = anchor.from_input_embeddings(model, frozen, ids)
    elif cfg.initialize_tokens is not None:
        start = anchor.from_words(model, frozen, ids, bos=special.bos, eos=special.eos)
    else:
        start = anchor.from_names(
            model, frozen, ids, bos=special.bos, eos=special.eos, pad=special.pad
        )
    check_finite(start, f"the text encoder of {base.name}")
    return start


def optimizer_settings(cfg: TrainConfig, method: condition.Method) -> dict:
    """All that the optimiser of a run is made of: the arguments of `make_optimizer`, with those of
    `rate_over_steps` for each part that the method trains."""
    rates, steps, warmup = cfg.rates(), cfg.max_train_steps, cfg.lr_warmup_steps
    return {
        "rates": {
            part: (rates[part], cfg.lr_scheduler, steps, warmup, cfg.lr_num_cycles)
            for part in method.parts()
        },
        "beta1": cfg.adam_beta1,
        "beta2": cfg.adam_beta2,
        "epsilon": cfg.adam_epsilon,
        "weight_decay": cfg.adam_weight_decay,
        "basis": method.basis,
    }


def optimizer_of(cfg: TrainConfig, method: condition.Method) -> optax.GradientTransformation:
    """AdamW over the parts that the method trains, at the config's rates."""
    settings = optimizer_settings(cfg, method)
    rates = {part: rate_over_steps(*given) for part, given in settings.pop("rates").items()}
    return make_optimizer(rates, **settings)


def first_values(
    model: sd.StableDiffusion,
    method: condition.Method,
    key: jax.Array,
    enhancer: enhancers.Enhancer | None,
    start: Any,
    id_embed: np.ndarray | None,
) -> tuple[condition.Trainable, condition.Given]:
    """What is trained of a person before the first step, and their constants.

    Args:
      key: the person's key.
      enhancer: the shared one, if the person begins with it.
      start: the pseudo tokens' first value without it, of `starting_tokens`.
      id_embed: float32[512] of unit norm; None where the method needs none.
    """
    if enhancer is not None:
        return shared.begin_person(enhancer.config, model, method, enhancer.shared, key, id_embed)
    given = condition.init_given(model, method, key, start, id_embed)
    return condition.init_trainable(model, method, key, start), given
