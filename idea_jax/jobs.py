"""What became of each person of a run for many: one record a person, and all of them in one file.

    python -m idea_jax.jobs OUT

`OUT/PERSON/job.json` is the record; it decides what a restarted run has left to do, and only the
process that trains the person writes it. `OUT/jobs.jsonl` repeats the records of everybody, one a
line; process 0 writes it when its groups begin and end, and while it waits for the others. The
command above shows what is newer in the records.
"""

import argparse
import dataclasses
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import filelock

from idea_jax import launch
from idea_jax.errors import InputError
from idea_jax.runtime.files import (
    absent,
    atomic_write,
    cannot_write,
    file_digest,
    make_in,
    remove_empty,
    say,
)

log = logging.getLogger(__name__)

RECORD, MANIFEST, RESULT = "job.json", "jobs.jsonl", "identity.safetensors"
SETTINGS = ".settings.json"  # whose name begins with a dot is no person
STATUSES = ("waiting", "running", "done", "failed")


class JobsError(InputError, ValueError):
    """A folder holds no run for many people, one of another kind, or one that is under way."""


@dataclass(frozen=True)
class Record:
    """What became of one person.

    Attributes:
      person: their name, which is that of their folder.
      status: one of `STATUSES`; after a crash it may still say running.
      why: of somebody who failed: the reason; otherwise None.
      attempts: times that their training was begun or resumed.
      steps: that were asked for when they were done; early stopping may have taken fewer.
      seconds: of all attempts but those that were killed, each from the photos to the result;
        people who are trained together each have the whole time.
      ended: when they were done or failed, in seconds since 1970; those who were trained
        together have the same moment.
      result: SHA-256 of the identity file.
      settings: digest of the settings and weights that decide the numbers.
      photos: digest of the photos that were there when they were done; None if not known.
    """

    person: str
    status: str = "waiting"
    why: str | None = None
    attempts: int = 0
    steps: int = 0
    seconds: float = 0.0
    ended: float | None = None
    result: str | None = None
    settings: str | None = None
    photos: str | None = None

    def __post_init__(self):
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            kind = spec.type | int if spec.type in (float, float | None) else spec.type
            if not isinstance(value, kind):
                raise JobsError(f"{spec.name} is {value!r}, expected {spec.type}")
        if self.status not in STATUSES:
            raise JobsError(f"status is {self.status!r}, expected one of {', '.join(STATUSES)}")


def to_line(record: Record) -> str:
    """One line of JSON, in ASCII: names that are no UTF-8 become escapes."""
    return json.dumps(dataclasses.asdict(record))


def from_line(line: str) -> Record:
    """Inverse of `to_line`.

    Raises:
      JobsError: it is no such line.
    """
    try:
        return Record(**json.loads(line))
    except (TypeError, ValueError) as error:
        raise JobsError(f"no record of a person: {error}") from error


@contextmanager
def only_run(out: Path, process: int, flag: str = "--output_dir") -> Iterator[None]:
    """Keeps a second run out of a folder while the block runs; a killed process keeps out nobody.

    A folder that is made here goes again if the block fails and has written nothing to it.

    Args:
      flag: that names the folder, for the message.

    Raises:
      JobsError: another run is using the folder.
      WriteError: it cannot be written to.
    """
    made, file = absent(out), out / f".lock-{process}"
    lock = filelock.FileLock(file)
    try:
        make_in(out, lambda: lock.acquire(timeout=0))
    except filelock.Timeout:
        raise JobsError(
            f"another run is using {out}; wait until it has ended, or choose another {flag}"
        ) from None
    except OSError as error:
        raise cannot_write(out, error) from error
    try:
        yield
    except BaseException:
        if made and list(out.iterdir()) == [file]:
            # While it is locked: whoever has opened it meanwhile sees that it is gone.
            with suppress(OSError):
                file.unlink()
        raise
    finally:
        lock.release()
        remove_empty(made)


class Board:
    """The records of a run, kept in memory and on disk.

    People of earlier runs into the same folder keep their records, as long as their folders are
    there; `gone` has the names of those who are not done.

    Args:
      out: the run's folder.
      names: everybody of this run, in order.
      own: those whose records this process writes.
      is_first: this process writes `jobs.jsonl`.
    """

    def __init__(self, out: Path, names: Sequence[str], own: Sequence[str], *, is_first: bool):
        self.out, self.is_first = out, is_first
        self.names, self.own = frozenset(names), frozenset(own)
        earlier = {path.parent.name for path in out.glob(f"*/{RECORD}")}
        if (out / MANIFEST).is_file():  # only there are those who were never begun
            earlier |= {r.person for r in read(out) if (out / r.person).is_dir()}
        others = sorted(earlier - self.names)
        self.records = {name: self._read(name) for name in (*names, *others)}
        self.gone = [name for name in others if self.records[name].status != "done"]
        if is_first:  # what a process that was killed left half-written
            for path in out.glob(f".tmp-*{Path(MANIFEST).suffix}"):
                path.unlink(missing_ok=True)

    def _read(self, name: str) -> Record:
        """A person's record; a new one where there is none, or a damaged one."""
        path = self.out / name / RECORD
        try:
            record = from_line(path.read_text(encoding="ascii"))
        except FileNotFoundError:
            return Record(name)
        except (JobsError, OSError, UnicodeDecodeError) as error:
            log.warning("%s cannot be used (%s); %s is taken as not done", path, error, name)
            return Record(name)
        return dataclasses.replace(record, person=name)

    def check(
        self,
        settings: str,
        steps: int,
        *,
        before: str | None = None,
        explain: Callable[[dict], str] = lambda marks: "",
    ) -> None:
        """Refuses to go on with other settings than those of anybody who was begun.

        Args:
          settings: digest of this run's.
          before: digest of other settings that people may have been begun with.
          explain: says what differs from what `keep` was given of other settings.

        Raises:
          JobsError: somebody's settings or weights are others, or somebody of this run is done
            with more steps.
        """
        for name, record in self.records.items():
            if record.attempts and record.settings not in (None, settings, before):
                known = self.kept().get(record.settings)
                what = explain(known) if isinstance(known, dict) else ""
                raise JobsError(
                    f"{self.out / name} was trained with other settings or weights than these"
                    f"{f' ({what})' if what else ''}; use "
                    "the same ones (the config.yaml of somebody who is done has them), choose "
                    "another --output_dir, or delete that folder"
                )
            if name in self.names and record.status == "done" and record.steps > steps:
                raise JobsError(
                    f"{self.out / name} was trained for {record.steps} steps; --max_train_steps "
                    "may only grow: use as many, choose another --output_dir, or delete that folder"
                )

    def keep(self, settings: str, marks: Mapping) -> None:
        """Remembers what settings are by whose digest people are known, for `check`."""
        kept = self.kept()
        if self.is_first and settings not in kept:
            with atomic_write(self.out / SETTINGS) as temporary:
                temporary.write_text(json.dumps({**kept, settings: marks}), encoding="ascii")

    def kept(self) -> dict:
        """What `keep` was given, by the digest."""
        try:
            kept = json.loads((self.out / SETTINGS).read_text(encoding="ascii"))
        except (OSError, ValueError, RecursionError):
            return {}
        return kept if isinstance(kept, dict) else {}

    def plan(self, names: Sequence[str], settings: str) -> None:
        """Lets people wait for a training with these settings; only `jobs.jsonl` says so yet.

        Each has a folder from now on: whoever deletes it has given that person up.

        Raises:
          WriteError: it cannot be made.
        """
        for name in names:
            try:
                (self.out / name).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise cannot_write(self.out / name, error) from error
            self.records[name] = dataclasses.replace(
                self.records[name], status="waiting", why=None, settings=settings
            )
        self.publish()

    def note(self, names: Sequence[str], **changes) -> None:
        """Changes the records of some people; `publish` tells the others.

        Raises:
          WriteError: the disk is full, or the place cannot be written to.
        """
        for name in names:
            self.records[name] = dataclasses.replace(self.records[name], **changes)
            with atomic_write(self.out / name / RECORD) as temporary:
                temporary.write_text(to_line(self.records[name]) + "\n", encoding="ascii")

    def publish(self) -> None:
        """Writes `jobs.jsonl`, with what other processes have noted meanwhile."""
        if not self.is_first:
            return
        for name in self.records.keys() - self.own:
            self.records[name] = self._read(name)
        with atomic_write(self.out / MANIFEST) as temporary:
            lines = [to_line(record) + "\n" for record in self.records.values()]
            temporary.write_text("".join(lines), encoding="ascii")

    def is_done(self, name: str, steps: int) -> bool:
        """Whether a person's result of that many steps is there, as it was written."""
        record = self.records[name]
        # Also of somebody who failed since because of other photos, which are gone again.
        if record.status not in ("done", "failed") or record.steps != steps or not record.result:
            return False
        path = self.out / name / RESULT
        if path.is_file() and file_digest(path) == record.result:
            return True
        log.warning("%s is gone or was changed since it was written: made again", path)
        return False

    def holds_another(self, name: str, photos: str | None) -> bool:
        """Whether a person's folder has a result that was learned from other photos than these.

        Args:
          photos: digest of those that are there now; None if it cannot be told.
        """
        known = self.records[name].photos
        is_known = known is not None and photos is not None
        return is_known and known != photos and (self.out / name / RESULT).is_file()

    def finished(self, name: str) -> str:
        """SHA-256 of the identity file of a person, hexadecimal."""
        return file_digest(self.out / name / RESULT)


def read(out: Path) -> list[Record]:
    """The newest records of the people of `OUT/jobs.jsonl`; a damaged line is skipped, and named.

    Raises:
      JobsError: there is no such file.
    """
    path = Path(out) / MANIFEST
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError as error:
        raise JobsError(
            f"no {MANIFEST} in {out} ({error.strerror}); expected the --output_dir of a training "
            "of several people"
        ) from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(latest(Path(out), from_line(line)))
        except JobsError as error:
            log.warning("line %d of %s is skipped: %s", number, path, error)
    return records


def latest(out: Path, line: Record) -> Record:
    """A line of the manifest; or the person's own record, where more has happened since."""
    try:
        own = from_line((out / line.person / RECORD).read_text(encoding="ascii"))
    except (JobsError, OSError, UnicodeDecodeError):
        return line
    # After as many attempts, a line that says waiting is newer: the same people, trained further.
    since = own.attempts - line.attempts
    is_newer = since > 0 or (since == 0 and line.status == "running")
    return dataclasses.replace(own, person=line.person) if is_newer else line


def people_per_hour(records: Sequence[Record]) -> float | None:
    """How fast people got done while somebody was trained; None where nobody is done.

    People who were trained side by side share their time, and pauses between starts do not count.
    """
    spans = sorted((r.ended - r.seconds, r.ended) for r in records if is_timed(r))
    busy, until = 0.0, -math.inf
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return 3600 * len(spans) / busy if busy else None


def is_timed(record: Record) -> bool:
    """Whether somebody is done, and it is known when."""
    return record.status == "done" and record.ended is not None


def duration(seconds: float) -> str:
    """Hours and minutes; minutes and seconds below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def summary(records: Sequence[Record], *, now: float) -> str:
    """Several lines: how many people are where, how fast it goes, who failed and why."""
    counts = {status: sum(r.status == status for r in records) for status in STATUSES}
    lines = [f"{len(records)} people: " + ", ".join(f"{n} {s}" for s, n in counts.items())]
    speed = people_per_hour(records)
    if speed is not None:
        left = counts["waiting"] + counts["running"]
        newest = max(r.ended for r in records if r.ended is not None)
        lines.append(
            f"{speed:.1f} people/hour, "
            + (f"about {duration(3600 * left / speed)} left, " if left else "")
            + f"the newest result is {duration(max(now - newest, 0))} old"
        )
    for status in ("running", "failed"):
        for record in records:
            if record.status == status:
                why = f": {record.why}" if record.why else ""
                lines.append(f"{status} {record.person} (attempt {record.attempts}){why}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 1 where there is no such run."""
    parser = argparse.ArgumentParser(
        prog="idea-jobs", description="Says how far a training of many people is."
    )
    parser.add_argument("out", metavar="OUT", help="its --output_dir")
    out = parser.parse_args(argv).out
    return launch.run(lambda: say(summary(read(out), now=time.time())), needs_jax=False)


if __name__ == "__main__":
    sys.exit(main())
