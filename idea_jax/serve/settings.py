"""What a server is; filled as `idea_jax.config.reading` says."""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from idea_jax.config.settings import (
    ConfigError,
    SampleConfig,
    is_guided,
    not_negative,
    positive,
    same_as,
    setting,
)
from idea_jax.sampling.settings import RowsConfig

TOKEN = "IDEA_SERVE_TOKEN"  # the variable of the environment that may hold the token
LEAST_TOKEN = 16  # letters
MEGA = 1_000_000
WARM_UPS = ("all", "drawing", "none")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(RowsConfig):
    """Everything that decides what `idea-serve` does."""

    pretrained_model_name_or_path: str = same_as(SampleConfig, "pretrained_model_name_or_path")
    data: str = setting("served", "folder that keeps people, and pictures that are to be kept")
    # Who may use it
    host: str = setting("127.0.0.1", "address to listen at; another than loopback needs a token")
    port: int = setting(8765, "port to listen at; 0 for any that is free")
    token_file: str | None = setting(
        None, f"file with the token that clients must show (or the variable {TOKEN})"
    )
    allowed_hosts: list[str] | None = setting(
        None, "names by which browsers may call the server, besides localhost and addresses"
    )
    log_prompts: bool = setting(False, "write prompts to the log")
    # What they may ask for
    max_photos: int = setting(20, "photos of a person, at most")
    max_photo_megabytes: int = setting(20, "size of a photo, at most")
    max_photo_megapixels: int = setting(40, "pixels of a photo, at most")
    max_body_megabytes: int = setting(64, "size of a request, at most")
    max_rows: int = setting(64, "pictures of a request, at most")
    max_people_per_row: int = setting(4, "people in one picture, at most")
    max_prompt_letters: int = setting(2000, "length of a prompt, at most")
    max_side: int = setting(1024, "height and width of a picture, at most")
    max_inference_steps: int = setting(100, "sampling steps, at most")
    max_learn_steps: int = setting(320, "steps of learning, at most")
    max_people: int = setting(10_000, "people that are kept, at most")
    max_pictures: int = setting(1000, "pictures that are kept; beyond that the oldest go")
    # How they share the devices
    max_queue: int = setting(256, "rows that wait to be drawn, at most; then clients are told 429")
    max_jobs: int = setting(8, "people that wait to be learned, at most")
    max_programs: int = setting(
        32, "kinds of rows (size, steps, sampler, ...) that are compiled for, at most"
    )
    max_learn_programs: int = setting(6, "numbers of learning steps that are compiled for, at most")
    deadline: float = setting(60.0, "seconds that a request may wait until its first row is drawn")
    grace: float = setting(20.0, "seconds for what is under way when the server is told to stop")
    warm_up: str = setting(
        "all", "what is compiled before the server is ready: also learning", choices=WARM_UPS
    )
    threads: int = setting(4, "that encode pictures")
    batch_size: int | None = setting(
        None, "rows that a device draws in one call (default: 1 on a CPU, else 8)"
    )
    # Learning
    train_config: str | None = setting(
        None,
        "YAML file of idea-train with which people are learned (default: the mini's own for mini, "
        "else its defaults)",
    )
    learn_steps: int = setting(25, "steps of learning that are compiled for at the start")
    score_model: str | None = setting(
        None,
        "recogniser, ONNX, that says how alike pictures are (default: face/scoring.onnx of the "
        "checkpoint, else the one that people are learned with)",
    )
    face_model_dir: str | None = same_as(SampleConfig, "face_model_dir")
    face_model: str | None = same_as(SampleConfig, "face_model")
    accept_face_licence: bool = same_as(SampleConfig, "accept_face_licence")
    face_provider: str = same_as(SampleConfig, "face_provider")

    def __post_init__(self):
        self.check_rows()
        positive(self, "max_photos", "max_photo_megabytes", "max_photo_megapixels")
        positive(self, "max_body_megabytes", "max_rows", "max_people_per_row", "max_side")
        positive(self, "max_prompt_letters", "max_inference_steps", "max_people", "max_pictures")
        positive(self, "max_queue", "max_jobs", "max_programs", "max_learn_programs", "deadline")
        positive(self, "threads", "batch_size")
        not_negative(self, "grace", "learn_steps", "max_learn_steps")
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port must lie between 0 and {2**16 - 1}, got {self.port}")
        if self.max_queue < self.max_rows:
            raise ConfigError(
                f"--max_queue {self.max_queue} has no room for a request of --max_rows "
                f"{self.max_rows}: take a larger one"
            )
        if self.num_inference_steps > self.max_inference_steps:
            raise ConfigError(
                f"--num_inference_steps {self.num_inference_steps} is beyond "
                f"--max_inference_steps {self.max_inference_steps}"
            )
        if self.learn_steps > self.max_learn_steps:
            raise ConfigError(
                f"--learn_steps {self.learn_steps} is beyond --max_learn_steps "
                f"{self.max_learn_steps}"
            )
        if self.negative_prompt and not is_guided(self.guidance_scale):
            scale = f"--guidance_scale {self.guidance_scale:g}"
            raise ConfigError(f"--negative_prompt has no effect with {scale}")
        if self.face_model is not None and self.face_model_dir is not None:
            raise ConfigError("give either --face_model or --face_model_dir, not both")

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine can reach the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone, as a name or as an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(cfg: ServeConfig) -> str | None:
    """The token that clients must show; None if they need none.

    Raises:
      ConfigError: there is none and the server can be reached from elsewhere; its file cannot be
        read; or it is too short to be safe.
    """
    token = os.environ.get(TOKEN)
    if cfg.token_file is not None:
        try:
            token = Path(cfg.token_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--token_file {cfg.token_file} cannot be read: {error}") from error
    if token is None:
        if not cfg.is_loopback:
            raise ConfigError(
                f"--host {cfg.host} can be reached from elsewhere: clients must show a token, "
                f"which --token_file FILE or the variable {TOKEN} has; or take --host 127.0.0.1"
            )
        return None
    token = token.strip()
    if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable():
        raise ConfigError(
            f"the token must have at least {LEAST_TOKEN} ASCII letters without line breaks, such "
            "as openssl rand -hex 32 makes"
        )
    return token
