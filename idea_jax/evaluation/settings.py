"""What an evaluation is; filled as `idea_jax.config.reading` says."""

from dataclasses import dataclass

from idea_jax.config.settings import (
    ATTENTION,
    ATTENTIONS,
    CLIP_SKIP,
    COMPILE_CACHE,
    COMPUTE_DTYPES,
    ENHANCER,
    FACE,
    FACE_PROVIDERS,
    SAMPLER,
    SCHEDULERS,
    SPACINGS,
    VAE,
    ConfigError,
    check_compile_cache,
    check_finding,
    check_seed,
    not_negative,
    positive,
    setting,
)
from idea_jax.evaluation.asked import SETS
from idea_jax.evaluation.modes import MODES

# Settings of the drawing that have no effect on pictures that are there already.
OF_DRAWING = "pictures num_inference_steps guidance_scale negative_prompt".split()
OF_DRAWING += "vae clip_skip guidance_rescale scheduler karras_sigmas timestep_spacing".split()
OF_DRAWING += "id_strength batch_size variant mixed_precision".split()


@dataclass(frozen=True)
class EvaluateConfig:
    """Everything that decides what `idea_jax.evaluate` does."""

    photos: str = setting(
        ..., "the people's true photos that were learned from: a folder per person, or one person's"
    )
    held_out: str | None = setting(
        None, "other true photos of the same people, in folders of the same names"
    )
    output_dir: str = setting("evaluation", "folder that receives all results; the same goes on")
    # What is scored
    images: list[str] | None = setting(
        None,
        "pictures that any program drew, as DIR or METHOD=DIR: a folder per person, in it one per "
        "prompt (may be repeated)",
    )
    identity: list[str] | None = setting(
        None,
        "identity files, or folders that hold them, whose people are drawn (may be repeated)",
    )
    compare: str | None = setting(
        None,
        "methods that are trained on --photos, drawn and scored: profiles with a comma between "
        "them, each perhaps with settings, as in paper,paper@steps=0;id_strength=0.5",
    )
    mode: str = setting(
        "strict", "whose way to draw and to average: docs/evaluation.md", choices=tuple(MODES)
    )
    prompts: str | None = setting(
        None, f"set of prompts ({', '.join(SETS)}), or a file (default: the mode's set)"
    )
    # What scores
    score_model: str | None = setting(
        None,
        "recogniser that scores, ONNX, or the folder of a pack; not the one that training sees "
        "(default: face/scoring.onnx of the checkpoint, if it is there)",
    )
    score_crop: str = setting(
        "face",
        "what of a picture it sees: the aligned face, or the central square of pictures that are "
        "faces already",
        choices=("face", "center"),
    )
    same_recogniser: bool = setting(
        False, "score with the recogniser that training sees all the same"
    )
    clip: str = setting(
        "auto",
        "CLIP that compares prompts and pictures: a folder, a Hub id, auto (the checkpoint's own, "
        "or the mode's) or none",
    )
    # How people are drawn, where they are
    pretrained_model_name_or_path: str | None = setting(
        None, "Stable Diffusion checkpoint in diffusers layout: a folder, a Hub id, or mini"
    )
    revision: str | None = setting(None, "branch, tag or commit of a Hub checkpoint")
    variant: str | None = setting(None, "file variant of the weights, such as fp16")
    vae: str | None = setting(None, VAE)
    clip_skip: int = setting(0, CLIP_SKIP)
    enhancer: str = setting("auto", ENHANCER)
    pictures: int | None = setting(None, "pictures of each prompt (default: the mode's)")
    num_inference_steps: int | None = setting(None, "sampling steps (default: the mode's)")
    guidance_scale: float | None = setting(None, "guidance (default: the mode's)")
    guidance_rescale: float = setting(0.0, SAMPLER["guidance_rescale"])
    scheduler: str | None = setting(None, "sampler (default: the mode's, ddim)", choices=SCHEDULERS)
    karras_sigmas: bool | None = setting(None, SAMPLER["karras_sigmas"])
    timestep_spacing: str | None = setting(None, SAMPLER["timestep_spacing"], choices=SPACINGS)
    negative_prompt: str | None = setting(None, "what they should not show (default: the mode's)")
    id_strength: float = setting(1.0, "scales the effect of ID-Adapter and K/V delta")
    batch_size: int = setting(8, "pictures that are drawn in one call, on each device")
    # How people are learned, with compare
    face_model_dir: str | None = setting(None, FACE["face_model_dir"])
    face_model: str | None = setting(None, f"of training: {FACE['face_model']}")
    accept_face_licence: bool = setting(False, FACE["accept_face_licence"])
    identities_per_step: int | None = setting(
        None, "people who are trained in one step (default: as training)"
    )
    # The machine
    face_provider: str = setting("cpu", "where the face models run", choices=FACE_PROVIDERS)
    mixed_precision: str = setting(
        "no", "compute type of the frozen networks", choices=tuple(COMPUTE_DTYPES)
    )
    attention: str = setting("auto", ATTENTION, choices=ATTENTIONS)
    compile_cache: str | None = setting(None, COMPILE_CACHE)
    seed: int | None = setting(
        None, "of the pictures, of training and of the intervals (default: the mode's)"
    )

    def __post_init__(self):
        positive(self, "pictures", "num_inference_steps", "batch_size", "identities_per_step")
        not_negative(self, "guidance_scale", "id_strength", "clip_skip")
        check_compile_cache(self.compile_cache)
        check_finding(_Finding(self.face_model, self.face_model_dir))
        if self.seed is not None:
            check_seed(self.seed)
        sources = [self.images, self.identity, self.compare]
        if sum(source is not None for source in sources) != 1:
            raise ConfigError("give exactly one of --images, --identity and --compare")
        draws = self.images is None
        if draws and self.pretrained_model_name_or_path is None:
            raise ConfigError("--identity and --compare need --pretrained_model_name_or_path")
        defaults = type(self).__dataclass_fields__
        for name in () if draws else OF_DRAWING:
            if getattr(self, name) != defaults[name].default:
                raise ConfigError(f"--{name} has no effect on --images, which are drawn already")
        if self.identities_per_step is not None and self.compare is None:
            raise ConfigError("--identities_per_step has no effect without --compare")


@dataclass(frozen=True)
class _Finding:
    """What `check_finding` looks at."""

    face_model: str | None
    face_model_dir: str | None
    pre_aligned: bool = False
    face_select: str = "largest"
