"""Job files: lines of JSONL or CSV to rows that can be drawn, each with the hash of what it is."""

import csv
import functools
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from idea_jax.config.settings import SCHEDULERS, check_seed, is_guided
from idea_jax.data import text
from idea_jax.errors import InputError
from idea_jax.formats.identity import IdentityError, check_identity, read_identity
from idea_jax.models import sd
from idea_jax.runtime.files import file_digest, json_digest
from idea_jax.sampling import programs
from idea_jax.sampling.engine import KnownPerson, PictureRow, Texts
from idea_jax.sampling.plan import is_for_each, placeholder_of
from idea_jax.sampling.settings import JOB_FILES, BatchConfig

# Columns of a job file, and the type of each. Those that are settings, too, take its value where a
# row has none.
COLUMNS: dict[str, type] = {
    "identity": str,
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "number": int,
    "height": int,
    "width": int,
    "num_inference_steps": int,
    "guidance_scale": float,
    "id_strength": float,
    "scheduler": str,
}
MOST = 2**31  # numbers of pictures lie below
LARGEST_SIDE = 8192  # pixels; a typing error should not ask for terabytes
RESULT = "identity.safetensors"
NO_TEXT = "no UTF-8 text: save the file as UTF-8"


class RowsError(InputError, ValueError):
    """A job file that cannot be used, or rows of it that could not be drawn."""


@dataclass(frozen=True)
class Job:
    """A row of a job file that can be drawn.

    Attributes:
      line: where it stands, from 1.
      digest: SHA-256 of all that the picture depends on: the row, the people's files, the model.
      about: the same in words, which go with the picture.
    """

    line: int
    row: PictureRow
    digest: str
    about: dict


def read_values(path: Path) -> tuple[dict[int, dict], dict[int, str]]:
    """The values of each line of a job file, and what is wrong with the lines that have none.

    Raises:
      RowsError: the file cannot be read, is of another type, or has columns that nobody knows.
    """
    readers = dict(zip(JOB_FILES, (_read_jsonl, _read_csv), strict=True))
    read = readers.get(path.suffix.lower())
    if read is None:
        raise RowsError(f"{path} is no job file: expected a name that ends with .jsonl or .csv")
    good: dict[int, dict] = {}
    bad: dict[int, str] = {}
    unknown: dict[str, int] = {}
    try:
        # A line that is no UTF-8 costs no other: what cannot be decoded is looked for in each.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for line, values in read(file):
                if isinstance(values, str):
                    bad[line] = values
                    continue
                for name in values.keys() - COLUMNS.keys():
                    unknown.setdefault(name, line)
                good[line] = values
    except OSError as error:
        raise RowsError(f"the job file {path} cannot be read: {error.strerror}") from error
    except csv.Error as error:
        raise RowsError(f"the job file {path} cannot be read as CSV ({error})") from error
    if unknown:
        names = ", ".join(f"{name!r} (line {line})" for name, line in sorted(unknown.items()))
        raise RowsError(
            f"{path} has columns that nobody knows: {names}; expected some of {', '.join(COLUMNS)}"
        )
    if not good and not bad:
        raise RowsError(f"the job file {path} has no row")
    return good, bad


def _read_jsonl(file: Any) -> Iterator[tuple[int, dict | str]]:
    """(number, values) of each line; or what is wrong with it."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        if not _is_text(line):
            yield number, NO_TEXT
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, f"no JSON: {error.msg}, at letter {error.colno}"
            continue
        except (ValueError, RecursionError) as error:
            yield number, f"no JSON: {error}"
            continue
        if not isinstance(values, dict):
            yield number, f"expected a JSON object, got {type(values).__name__}"
            continue
        yield number, {name: value for name, value in values.items() if value is not None}


def _read_csv(file: Any) -> Iterator[tuple[int, dict | str]]:
    """The same of a table whose first line names the columns; an empty cell says nothing."""
    reader = csv.DictReader(file, strict=True)
    names = [name.strip() for name in reader.fieldnames or ()]
    if not all(map(_is_text, names)):
        raise csv.Error(f"its first line is {NO_TEXT}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise csv.Error(f"the column {', '.join(twice)} stands there twice")
    reader.fieldnames = names
    if unknown := [name for name in names if name not in COLUMNS]:
        # Of these the caller complains, where there are no rows as well.
        yield reader.line_num, dict.fromkeys(unknown, "")
    for cells in _cells(reader):
        if not all(_is_text(cell) for cell in cells.values() if isinstance(cell, str)):
            yield reader.line_num, NO_TEXT
            continue
        if None in cells:
            yield reader.line_num, f"the row has more cells than the {len(names)} columns"
            continue
        values = {name: cell for name, cell in cells.items() if cell not in (None, "")}
        # A cell is text; a number that is none is told as such later.
        for name, cell in values.items():
            kind = COLUMNS.get(name, str)
            if kind is not str:
                with suppress(ValueError):
                    values[name] = kind(cell)
        yield reader.line_num, values


def _cells(reader: csv.DictReader) -> Iterator[dict]:
    """The rows of a table; where its quotes do not fit, the error says in which line."""
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # `line_num` is still that of the row before.
            where = f"in the row that begins with line {reader.line_num + 1}"
            raise csv.Error(f"{where}: {error}; look at its quotes") from error


def _is_text(text: str) -> bool:
    """Whether all of a text could be decoded."""
    return not any("\udc80" <= letter <= "\udcff" for letter in text)


def crossed(cfg: BatchConfig) -> dict[int, dict]:
    """The values of all --prompts with all people of --identities, numbered from 1.

    Raises:
      TextError, RowsError: the prompts cannot be read, or there is nobody.
    """
    prompts, folder = text.read_prompts(Path(cfg.prompts or "")), Path(cfg.identities or "")
    names = [path.parent.name for path in sorted(folder.glob(f"*/{RESULT}"))]
    names += [path.stem for path in sorted(folder.glob("*.safetensors"))]
    if not names:
        raise RowsError(
            f"{folder} has nobody: expected PERSON/{RESULT} or PERSON.safetensors, as training "
            "writes them"
        )
    alike = dict.fromkeys(names)
    rows = (
        {"identity": name, "prompt": prompt, "number": number}
        for name in alike
        for prompt in dict.fromkeys(prompts)
        for number in range(cfg.num_images_per_prompt)
    )
    return dict(enumerate(rows, 1))


def find_person(name: str, folder: str | None) -> Path:
    """The identity file of a row: of a person in --identities, else a file or a folder's.

    Raises:
      FileNotFoundError: there is none.
    """
    if not name:
        raise FileNotFoundError("identity names nobody: a name is empty")
    paths = []
    if folder is not None and name not in (".", "..") and Path(name).name == name:
        paths += [Path(folder) / name / RESULT, Path(folder) / f"{name}.safetensors"]
    paths += [Path(name) / RESULT, Path(name)]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        where = f" nor anybody of that name in {folder}" if folder else ""
        raise FileNotFoundError(f"identity: there is no file {name}{where}")
    return found


class Roster:
    """Finds the people whom rows name, and checks each file once.

    Args:
      enhancer: SHA-256 of the shared ID-Enhancer that is there; None if there is none.
    """

    def __init__(self, model: sd.StableDiffusion, folder: str | None, enhancer: str | None):
        self.model, self.folder, self.enhancer = model, folder, enhancer
        self.known: dict[str, KnownPerson | str] = {}

    def names(self, text: str) -> list[str]:
        """Whom a row names: one person, whose name may hold commas, or several between commas."""
        with suppress(OSError):  # also of names that are too long for a file
            find_person(text, self.folder)
            return [text]
        return [name.strip() for name in text.split(",")]

    def __call__(self, name: str) -> KnownPerson:
        """Whom a row calls so.

        Raises:
          RowsError: the file cannot be used; the same words for each row of theirs.
        """
        if name not in self.known:
            try:
                self.known[name] = self._read(find_person(name, self.folder))
            except (InputError, OSError) as error:
                self.known[name] = str(error)
        found = self.known[name]
        if isinstance(found, str):
            raise RowsError(found)
        return found

    def _read(self, path: Path) -> KnownPerson:
        identity = read_identity(path)
        check_identity(identity, self.model, path)
        if identity.needs_enhancer and identity.enhancer != self.enhancer:
            raise IdentityError(
                f"{path} needs the ID-Enhancer whose file has the SHA-256 {identity.enhancer}, "
                f"and {'there is none' if self.enhancer is None else 'this is another one'}; give "
                "it with --enhancer FILE"
            )
        load = functools.partial(read_identity, path)
        return KnownPerson(identity.method, placeholder_of(identity), file_digest(path), load)


def checked(values: Mapping[str, Any], cfg: Any) -> dict[str, Any]:
    """The values of a row with those of the settings that it leaves out.

    Args:
      cfg: a BatchConfig, or other settings that have the names in `COLUMNS`.

    Raises:
      RowsError: a value is missing, of the wrong type or out of its range.
    """
    found: dict[str, Any] = {name: getattr(cfg, name, None) for name in COLUMNS}
    found |= values
    if found["number"] is None:
        found["number"] = 0
    for name, kind in COLUMNS.items():
        value = found[name]
        if value is None and name in ("identity", "prompt"):
            raise RowsError(f"{name} is missing")
        if value is None:
            continue
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or isinstance(value, bool):
            raise RowsError(f"{name} must be {kind.__name__}, got {value!r}")
        # Compared as they are: a whole number may be too large to be made a float.
        if kind is float and not 0 <= found[name] <= sys.float_info.max:
            raise RowsError(f"{name} must be a number of at least 0, got {value}")
    check_seed(found["seed"])
    if not 0 <= found["number"] < MOST:
        raise RowsError(f"number must lie between 0 and {MOST - 1}, got {found['number']}")
    for name in ("height", "width"):
        if found[name] is not None and not 0 < found[name] <= LARGEST_SIDE:
            raise RowsError(f"{name} must lie between 1 and {LARGEST_SIDE}, got {found[name]}")
    if found["scheduler"] not in (None, *SCHEDULERS):
        raise RowsError(f"scheduler must be one of {', '.join(SCHEDULERS)}")
    if "{" in found["negative_prompt"] or "}" in found["negative_prompt"]:
        raise RowsError("negative_prompt says what a picture turns away from: no {}")
    if not is_guided(found["guidance_scale"]):
        if values.get("negative_prompt"):
            scale = found["guidance_scale"]
            raise RowsError(f"negative_prompt has no effect with guidance_scale {scale:g}")
        found["negative_prompt"] = ""
    return found


def sampling_of(found: Mapping[str, Any], cfg: Any, model: sd.StableDiffusion) -> programs.Sampling:
    """How a row is drawn.

    Args:
      cfg: as of `checked`; it also has `guidance_interval`.

    Raises:
      ConfigError: the VAE cannot make such a size, or as of `programs.choose_sampling`.
      ScheduleError: the steps are more than the sampler has.
    """
    return programs.choose_sampling(
        model,
        cfg,
        programs.picture_size(model, found["height"], found["width"]),
        scheduler=found["scheduler"],
        steps=found["num_inference_steps"],
        guidance=found["guidance_scale"],
    )


def make_job(
    line: int,
    found: Mapping[str, Any],
    sampling: programs.Sampling,
    people: tuple[Roster, Texts],
    of_model: Mapping[str, Any],
) -> Job:
    """A row that can be drawn; whom it names is added to the texts.

    `identity` is one person, or several with commas between them, whom the prompt names.

    Raises:
      RowsError, TextError, ConfigError: a person's file or the prompt cannot be used.
    """
    casting, texts = people
    cast = {name: casting(name) for name in casting.names(found["identity"].strip())}
    if len(cast) > 1 and is_for_each(found["prompt"], list(cast)):
        raise RowsError(
            f"the prompt has {{}} and the row {len(cast)} people: write "
            f"{' and '.join(f'{{{name}}}' for name in cast)} where they belong"
        )
    texts.people.update(cast)
    row = PictureRow(
        tuple(cast),
        found["prompt"],
        sampling,
        negative=found["negative_prompt"],
        seed=found["seed"],
        number=found["number"],
        guidance=float(found["guidance_scale"]),
        strength=float(found["id_strength"]),
    )
    texts.kind(row)
    if len(cast) > 1:  # whoever is not in the prompt is not in the picture
        row = replace(row, cast=tuple(name for name in cast if f"{{{name}}}" in row.prompt))
    about = {
        "prompt": row.prompt,
        "negative_prompt": row.negative,
        "seed": row.seed,
        "number": row.number,
        "height": sampling.size[0],
        "width": sampling.size[1],
        "num_inference_steps": sampling.steps,
        **({"eta": sampling.eta} if sampling.eta else {}),
        **({"guidance_rescale": sampling.rescale} if sampling.rescale else {}),
        **({"told_sizes": list(sampling.told)} if sampling.told else {}),
        "scheduler": sampling.scheduler,
        "guidance_scale": row.guidance,
        "guidance_interval": list(sampling.interval) if sampling.interval else None,
        "id_strength": row.strength,
        "identities": [cast[name].digest for name in row.cast],
        **of_model,
    }
    names_shown = [Path(name).name for name in row.cast]
    return Job(line, row, json_digest(about), {"people": names_shown, **about})


def make_jobs(
    cfg: BatchConfig,
    model: sd.StableDiffusion,
    people: tuple[Roster, Texts],
    of_model: Mapping[str, Any],
) -> tuple[list[Job], dict[int, str]]:
    """All rows of a batch that can be drawn, and what is wrong with the lines of the others.

    Raises:
      RowsError, TextError: the job file, or the prompts and the people, cannot be used at all.
    """
    bad: dict[int, str] = {}
    if cfg.identities is not None and not Path(cfg.identities).is_dir():
        raise RowsError(
            f"--identities {cfg.identities} is no folder: expected a folder of people, as training "
            "writes them"
        )
    good = crossed(cfg) if cfg.jobs is None else {}
    if cfg.jobs is not None:
        good, bad = read_values(Path(cfg.jobs))
    jobs = []
    for line, values in good.items():
        try:
            found = checked(values, cfg)
            jobs.append(make_job(line, found, sampling_of(found, cfg, model), people, of_model))
        except (InputError, ValueError) as error:
            bad[line] = str(error)
    return jobs, dict(sorted(bad.items()))
