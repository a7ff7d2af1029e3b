"""What a resumed run must share with the run that it goes on with."""

from dataclasses import asdict
from typing import Any

from idea_jax.config.settings import TrainConfig, held_on_resume
from idea_jax.faces import finding
from idea_jax.faces import table as face_table
from idea_jax.formats import enhancer as enhancers
from idea_jax.method import condition
from idea_jax.models import lora
from idea_jax.pytrees import tree_digest
from idea_jax.runtime.files import file_digest, json_digest
from idea_jax.training.results import Base
from idea_jax.training.step import CONSTANT

# Settings that came later, with what they were for all who did not know them. A fingerprint has
# None for that, as one from before has for what it does not name: what was begun then can go on.
SINCE = {
    "train_parts": None,
    "self_contained": False,
    "enhanced_learning_rate": None,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "lr_num_cycles": 1,
    "gradient_accumulation_steps": 1,
    "prediction_type": None,
    "vae": None,
    "clip_skip": 0,
    "token_basis": "none",
}

LATER = (*SINCE, "regulariser", "enhancer_sha256", "original_config", "lora")

# What of a fingerprint decides the person that a shared ID-Enhancer predicts.
OF_PREDICTION = (
    "base_model",
    "revision",
    "enhancer_sha256",
    "placeholder_token",
    "self_contained",
    "seed",
    "pictures_per_person",
    "drop_outliers",
    "face_model",
    "detector",
    "face_select",
    "pre_aligned",
)


def fingerprint_of(
    cfg: TrainConfig,
    method: condition.Method,
    base: Base,
    eyes: finding.Finder | face_table.FaceTable | None,
    enhancer: enhancers.Enhancer | None = None,
) -> dict[str, Any]:
    """What a resumed run must share with the run that wrote the checkpoint, but for the photos."""
    # How faces were found is compared by what did it; of the shared ID-Enhancer its file's digest
    # counts. Who is trained beside whom, and on what, moves results by rounding alone.
    settings = held_on_resume(cfg)
    settings |= {name: None for name, value in SINCE.items() if settings[name] == value}
    # Otherwise the rate of every step depends on how many there are.
    if cfg.lr_scheduler not in CONSTANT:
        settings["max_train_steps"] = cfg.max_train_steps
    settings["enhancer_sha256"] = enhancer.sha256 if enhancer is not None else None
    if base.frozen is not None:
        settings["base_weights"] = tree_digest(base.frozen.cross_kv)
    names: dict[str, Any] = {"celeb_path": file_digest(cfg.celeb_path)} if cfg.celeb_path else {}
    if cfg.original_config:
        names["original_config"] = file_digest(cfg.original_config)
    if cfg.lora:  # by what they are, wherever they lie
        names["lora"] = [[file_digest(path), scale] for path, scale in lora.named(cfg.lora)]
    # By what it is, since `paper` had another one before it could be chosen. The others' own goes
    # without saying, as in the checkpoints from then; without a weight it does not matter.
    own = condition.make_method(cfg.profile).regulariser
    is_said = cfg.reg_weight and (cfg.profile == "paper" or method.regulariser != own)
    settings["regulariser"] = method.regulariser if is_said else None
    seen = asdict(eyes.about) if eyes is not None else {}
    if seen.get("looks") == 1:  # as in checkpoints from before there was a second look
        seen["looks"] = None
    if not method.uses_face:  # then a recogniser is not loaded, but precomputed faces had one
        seen.pop("face_model", None)
    return {
        **settings,
        **names,
        **seen,
        "base_model": base.name,
        "revision": base.revision,
    }


def digest_of_settings(about: dict[str, Any]) -> str:
    """One SHA-256 of a fingerprint, hexadecimal; what is None and came later does not count."""
    return json_digest({k: v for k, v in about.items() if k not in LATER or v is not None})
