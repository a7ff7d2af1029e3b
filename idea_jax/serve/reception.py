"""Looks at the rows of a request before they wait: what is wrong is told at once."""

import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from idea_jax.data.tokenizer import Tokenizer
from idea_jax.errors import InputError
from idea_jax.models import sd
from idea_jax.sampling import rows as job_files
from idea_jax.sampling.engine import Kind, KnownPerson, PictureRow, Texts
from idea_jax.sampling.rows import Job, Roster, RowsError
from idea_jax.serve.problems import HttpProblem
from idea_jax.serve.settings import ServeConfig
from idea_jax.serve.shelf import NAME, Shelf


class Residents(Roster):
    """Finds those whom rows name on the shelf, and nowhere else: no path is ever opened."""

    def __init__(self, model: sd.StableDiffusion, shelf: Shelf):
        super().__init__(model, None, shelf.enhancer)
        self.shelf = shelf

    def names(self, text: str) -> list[str]:
        """Whom a row names: one person, or several between commas."""
        return [name.strip() for name in text.split(",")]

    def __call__(self, name: str) -> KnownPerson:
        """Somebody on the shelf.

        Raises:
          RowsError: there is nobody of this name.
        """
        if not NAME.fullmatch(name):
            raise RowsError(f"identity: {name[:80]!r} is no name of a person")
        try:
            return self.shelf.get(name).known
        except HttpProblem as problem:
            raise RowsError(f"identity: there is nobody called {name}") from problem


class Reception:
    """Makes rows that can be drawn of what clients ask; for any thread, one at a time.

    Args:
      of_model: what of the model decides a picture (`sampling.batch.about_model`).
    """

    def __init__(
        self,
        cfg: ServeConfig,
        model: sd.StableDiffusion,
        plain: Tokenizer,
        shelf: Shelf,
        of_model: Mapping[str, Any],
    ):
        self.cfg, self.model, self.of_model = cfg, model, of_model
        self.people, self.texts = Residents(model, shelf), Texts(plain)
        self.programs: set[Hashable] = set()
        self.lock = threading.Lock()

    def jobs(self, asked: Sequence[Mapping[str, Any]]) -> list[tuple[Job, Kind]]:
        """The rows of a request, each with its kind.

        Raises:
          HttpProblem: some of them cannot be drawn; it says which, and why.
        """
        if not 1 <= len(asked) <= self.cfg.max_rows:
            raise HttpProblem(
                "invalid", f"this server takes 1 to {self.cfg.max_rows} rows, got {len(asked)}"
            )
        found, errors, programs = [], [], set()
        with self.lock:
            for number, values in enumerate(asked):
                try:
                    job = self._job(number, values)
                    found.append((job, self.texts.kind(job.row)))
                    programs.add(self.program(job.row))
                except (InputError, ValueError) as error:
                    detail = error.plain if isinstance(error, InputError) else str(error)
                    errors.append({"where": f"rows[{number}]", "detail": detail})
            if errors:
                raise HttpProblem(
                    "invalid", f"{len(errors)} of {len(asked)} rows cannot be drawn", errors
                )
            fresh = programs - self.programs
            if len(self.programs) + len(fresh) > self.cfg.max_programs:
                raise HttpProblem(
                    "invalid",
                    f"this server has made its {self.cfg.max_programs} programs, one for each "
                    "size, number of steps, sampler and length of prompts: take usual ones",
                )
            self.programs |= fresh
        return found

    def _job(self, number: int, values: Mapping[str, Any]) -> Job:
        cfg = self.cfg
        found = job_files.checked(values, cfg)
        for name in ("prompt", "negative_prompt"):
            if len(found[name]) > cfg.max_prompt_letters:
                raise RowsError(
                    f"{name} has {len(found[name])} letters, and this server takes "
                    f"{cfg.max_prompt_letters} at most"
                )
        for name, most in (
            ("height", cfg.max_side),
            ("width", cfg.max_side),
            ("num_inference_steps", cfg.max_inference_steps),
        ):
            if found[name] is not None and found[name] > most:
                raise RowsError(f"{name} must be at most {most} on this server, got {found[name]}")
        if found["identity"].count(",") >= cfg.max_people_per_row:
            raise RowsError(
                f"identity names more than {cfg.max_people_per_row} people, this server's limit"
            )
        sampling = job_files.sampling_of(found, cfg, self.model)
        people = self.people, self.texts
        return job_files.make_job(number, found, sampling, people, self.of_model)

    def program(self, row: PictureRow) -> Hashable:
        """All that programs are compiled for, for a row: its kind, and what its people are."""
        methods = tuple(self.texts.people[name].method for name in row.cast)
        return self.texts.kind(row), methods

    def forget(self, name: str) -> int:
        """Forgets what somebody was called in; returns how many texts there were."""
        with self.lock:
            return self.texts.remove(name)
