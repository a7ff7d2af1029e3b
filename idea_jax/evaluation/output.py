"""Files of an evaluation: rows, summary, table and report."""

import contextlib
import csv
import io
import json
import logging
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import jax

from idea_jax.evaluation import report
from idea_jax.evaluation.scoring import Known, ScoredPicture
from idea_jax.runtime.files import atomic_write, write_json

log = logging.getLogger(__name__)

SUMMARY = "summary.json"


@dataclass(frozen=True, eq=False)
class Scored:
    """All that a report is made of.

    Attributes:
      people: by name; photos: their files, those that were learned from.
      paths: of each row's picture, in the order of rows.
      about: settings, versions and digests, for the report.
    """

    rows: list[ScoredPicture]
    paths: list[Path]
    people: dict[str, Known]
    photos: dict[str, list[Path]]
    summary: dict
    about: dict


def machine() -> dict[str, str]:
    """The devices, and the most memory that this process has had."""
    device = jax.devices()[0]
    found = {"devices": f"{len(jax.devices())} x {device.device_kind}"}
    with contextlib.suppress(ImportError):  # Windows has no such count
        import resource

        unit = 2**30 if sys.platform == "darwin" else 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        found["memory of the process, at most"] = f"{peak:.1f} GiB"
    used = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if used is not None:
        found["memory of the first device, at most"] = f"{used / 2**30:.1f} GiB"
    return found


def write(scored: Scored, out: Path, *, with_pictures: bool = True) -> list[Path]:
    """Writes rows, summary, table and report; returns the paths of report and summary.

    Args:
      with_pictures: whether the report shows photos and pictures.
    """
    names = [spec.name for spec in fields(ScoredPicture)]
    with atomic_write(out / "rows.jsonl") as path:
        lines = [json.dumps(asdict(row)) for row in scored.rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
    sheet = io.StringIO(newline="")
    table = csv.writer(sheet)
    table.writerow(names)
    table.writerows([cell(getattr(row, name)) for name in names] for row in scored.rows)
    with atomic_write(out / "rows.csv") as path:
        path.write_bytes(sheet.getvalue().encode("utf-8", "backslashreplace"))
    write_json(out / SUMMARY, scored.summary | {"about": scored.about})
    with atomic_write(out / "table.md") as path:
        path.write_bytes(
            report.markdown(scored.summary, scored.about).encode("utf-8", "backslashreplace")
        )
    shown = (scored.paths, scored.photos) if with_pictures else None
    page = report.page(scored.rows, shown, scored.summary, scored.about)
    with atomic_write(out / "report.html") as path:
        path.write_bytes(page.encode("utf-8", "backslashreplace"))
    if not scored.rows:
        log.warning("there is no picture to score: the report says where they were looked for")
    unscored = sum(row.error is not None for row in scored.rows)
    if unscored or scored.summary["problems"]:
        log.warning(
            "%d pictures and %d other things could not be scored, or not wholly: see the report",
            unscored,
            len(scored.summary["problems"]),
        )
    return [out / "report.html", out / SUMMARY]


def cell(value: object) -> object:
    """What a table has for a value; text that a spreadsheet would take for a formula is marked."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return "" if value is None else value
