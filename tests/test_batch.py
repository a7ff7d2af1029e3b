"""`idea-batch`: job files, where pictures go, and that kills and damage change no result."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import chaos
import jax
import numpy as np
import pytest
from PIL import Image

from idea_jax import batch as command
from idea_jax.config import reading
from idea_jax.data import images
from idea_jax.formats.identity import Identity, write_identity
from idea_jax.method import condition
from idea_jax.sampling import batch, engine, rows, store
from idea_jax.sampling.settings import BatchConfig

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--num_inference_steps 2 --guidance_scale 3 --batch_size 2 --compile_cache off".split()
GOOD = [
    {"identity": "anna", "prompt": "a photo of {}"},
    {"identity": "bert", "prompt": "a photo of {}", "seed": 7, "number": 3},
    {"identity": "anna", "prompt": "a sketch of {}", "guidance_scale": 5, "id_strength": 0.5},
    {"identity": "bert", "prompt": "{} and a dog", "negative_prompt": "blurry"},
    {"identity": "anna", "prompt": "a photo of {}"},  # the first once more
    {"identity": "anna", "prompt": "{} at sea", "number": 1},
]


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Two people who draw with their tokens alone."""
    folder, method = tmp_path_factory.mktemp("people"), condition.make_method("cross_init")
    for number, name in enumerate(("anna", "bert")):
        tokens = np.random.default_rng(number).normal(size=(2, 8)).astype(np.float32)
        given = {"anchor": tokens}
        who = Identity(method, {"pseudo_tokens": tokens}, given, "<x>", "smallest", None, 0, 1)
        write_identity(folder / name / "identity.safetensors", who)
    return folder


@pytest.fixture
def run(smallest_checkpoint, people, tmp_path, monkeypatch):
    """Runs `idea-batch` on one device with rows; returns its exit code."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda *_, **__: one)

    def run(asked, out, *flags):
        path = asked if isinstance(asked, Path) else tmp_path / "jobs.jsonl"
        if path is not asked:
            path.write_text("".join(json.dumps(row) + "\n" for row in asked))
        return command.main(
            [
                str(path),
                "--out",
                str(out),
                "--identities",
                str(people),
                "--pretrained_model_name_or_path",
                str(smallest_checkpoint),
                *FLAGS,
                *flags,
            ]
        )

    return run


def index_of(out):
    return [json.loads(line) for line in (out / store.INDEX).read_text().splitlines()]


def contents(out):
    """Every file below a folder but for locks, by its name."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {str(p.relative_to(out)): p.read_bytes() for p in files if ".lock" not in p.name}


def test_rows_become_marked_pictures_and_bad_rows_cost_no_other(run, tmp_path, capsys):
    out = tmp_path / "out"
    bad = [
        {"identity": "carl", "prompt": "{}"},
        {"identity": "anna", "prompt": "nobody here"},
        {"identity": "anna", "prompt": "{}", "seed": -1},
        {"identity": "anna", "prompt": "{}", "height": 9},
        {"prompt": "{}"},
        {"identity": "anna", "prompt": "{}", "num_inference_steps": "many"},
        {"identity": "anna", "prompt": "{}", "num_inference_steps": 5000},
        {"identity": "anna", "prompt": "{}", "scheduler": "heun"},
        {"identity": "anna", "prompt": "{}", "guidance_scale": -1},
        {"identity": "anna", "prompt": "{}", "guidance_scale": 10**400},
        {"identity": "anna", "prompt": "{}", "number": False},
    ]
    jobs = tmp_path / "mixed.jsonl"
    lines = [json.dumps(row) for row in (*GOOD, *bad)]
    jobs.write_text("\n".join([*lines, "{no json", "[1]", ""]))
    assert run(jobs, out) == 1
    said = capsys.readouterr().err
    assert f"{len(bad) + 2} of {len(GOOD) + len(bad) + 2} rows could not be drawn" in said
    assert "line 7: identity: there is no file carl" in said

    index = index_of(out)
    assert [line["line"] for line in index] == list(range(1, len(GOOD) + len(bad) + 3))
    assert [line["line"] for line in index if "error" in line] == list(range(7, 20))
    assert index[0]["file"] == index[4]["file"]
    files = list((out / "pictures").rglob("*.png"))
    assert len(files) == 5 == len({path.read_bytes() for path in files})
    for row, line in zip(GOOD, index, strict=False):
        fields = images.read_png_text(out / line["file"])
        about = json.loads(fields["parameters"])
        assert fields["AIGenerated"] == "true" and "trainedAlgorithmicMedia" in str(fields)
        assert about["hash"] == line["hash"] and about["people"] == [row["identity"]]
        assert about["prompt"] == row["prompt"] and about["number"] == row.get("number", 0)
        assert Image.open(out / line["file"]).size == (8, 8)


def test_a_picture_of_a_batch_is_that_of_the_engine_and_depends_on_all_of_its_row(run, tmp_path):
    plain = {"identity": "anna", "prompt": "a photo of {}"}
    changes = [
        {"identity": "bert"},
        {"prompt": "a sketch of {}"},
        {"negative_prompt": "blurry"},
        {"seed": 1},
        {"number": 1},
        {"guidance_scale": 4.0},
    ]
    assert run([plain, *(plain | change for change in changes)], tmp_path / "out") == 0
    index = index_of(tmp_path / "out")
    assert len({line["hash"] for line in index}) == len({line["sha256"] for line in index}) == 7


def test_csv_says_the_same_as_jsonl_and_unknown_columns_are_refused(tmp_path):
    table = tmp_path / "jobs.csv"
    names = list(dict.fromkeys(name for row in GOOD for name in row))
    with open(table, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(GOOD)
    lines = tmp_path / "jobs.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    (of_table, bad), (of_lines, none) = rows.read_values(table), rows.read_values(lines)
    assert list(of_table.values()) == list(of_lines.values()) == GOOD and not bad and not none

    table.write_text('identity,prompt,sede\nanna,"a photo, of {}",\n')
    with pytest.raises(rows.RowsError, match=r"nobody knows: 'sede' \(line 1\)"):
        rows.read_values(table)
    lines.write_text('{"identity": "anna"}\n{"promt": "{}", "identity": "anna"}\n')
    with pytest.raises(rows.RowsError, match=r"'promt' \(line 2\); expected some of identity, "):
        rows.read_values(lines)
    table.write_text("identity,prompt\nanna,{},more\nbert,{}\n")
    good, bad = rows.read_values(table)
    assert list(good) == [3] and "more cells" in bad[2]
    table.write_bytes(b"identity,prompt\nanna,\xff\nbert,{}\n")
    lines.write_bytes(b'{"identity": "\xff"}\n{"identity": "bert", "prompt": "{}"}\n')
    for file, (first, second) in ((table, (2, 3)), (lines, (1, 2))):
        good, bad = rows.read_values(file)
        assert list(good) == [second] and "no UTF-8" in bad[first]
    table.write_text("identity,prompt\nanna,{}\n", "utf-16")
    with pytest.raises(rows.RowsError, match="first line is no UTF-8"):
        rows.read_values(table)
    with pytest.raises(rows.RowsError, match="cannot be read"):
        rows.read_values(tmp_path / "none.csv")
    for damaged in ('identity,prompt\nanna,"{}\n', "prompt,prompt\n{},{}\n"):
        table.write_text(damaged)
        with pytest.raises(rows.RowsError, match=r"cannot be read as CSV \(.*(line 2:|the column)"):
            rows.read_values(table)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_shards_hold_the_pictures_and_rows_of_files(run, tmp_path, kind):
    plain, out = tmp_path / "plain", tmp_path / kind
    assert run(GOOD, plain) == 0
    assert run(GOOD, out, "--format", kind, "--shard_pictures", "2") == 0
    expected = {line["hash"]: (plain / line["file"]).read_bytes() for line in index_of(plain)}
    index = index_of(out)
    shards = sorted(path.name for path in (out / "shards").iterdir())
    assert shards == [f"000-0000{n}.{kind}" for n in range(3)]
    found = {}
    for name in shards:
        path = out / "shards" / name
        if kind == "tar":
            with tarfile.open(path) as tar:
                members = {member.name: tar.extractfile(member).read() for member in tar}
            for member, content in members.items():
                if member.endswith(".json"):
                    about = json.loads(content)
                    picture = members[member.replace(".json", ".png")]
                    found[about["hash"]] = picture
        else:
            import pyarrow.parquet

            for row in pyarrow.parquet.read_table(path).to_pylist():
                assert row["prompt"] == json.loads(row["row"])["prompt"]
                found[row["hash"]] = row["image"]["bytes"]
    assert found == expected
    assert {line["file"] for line in index} == {f"shards/{name}" for name in shards}
    assert not list((out / ".waiting").iterdir())


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the program hears it."""


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_a_batch_that_was_killed_and_damaged_ends_as_the_quiet_one(
    run, tmp_path, monkeypatch, kind
):
    flags = ["--format", kind, "--shard_pictures", "2"]
    calm, wild = tmp_path / "calm", tmp_path / "wild"
    assert run(GOOD, calm, *flags) == 0
    put, pack, unlink = store.Store.put, store.Store.pack, Path.unlink

    def dying(function, after):
        calls = []

        def call(*args, **options):
            calls.append(args)
            if len(calls) > after:
                raise Killed
            return function(*args, **options)

        return call

    def killed(*flags):
        with pytest.raises(Killed):
            run(GOOD, wild, *flags)
        monkeypatch.setattr(store.Store, "put", put)
        monkeypatch.setattr(store.Store, "pack", pack)
        monkeypatch.setattr(Path, "unlink", unlink)

    monkeypatch.setattr(store.Store, "put", dying(put, 4))
    killed(*flags)
    assert run(GOOD, wild, *flags) == 1  # without --resume nothing is touched
    if kind != "folder":
        # Between the shard and the end of the files that it took in.
        monkeypatch.setattr(Path, "unlink", dying(unlink, 1))
        killed(*flags, "--resume")
        damaged = wild / "shards" / f"000-00000.{kind}"
        content = bytearray(damaged.read_bytes())
        content[600] ^= 1
        damaged.write_bytes(content)
    else:
        damaged = next((wild / "pictures").rglob("*.png"))
        damaged.write_bytes(damaged.read_bytes()[:-20])
    before = contents(wild)
    assert run(GOOD, wild, *flags, "--resume", "--dry_run") == 0 and contents(wild) == before
    assert run(GOOD, wild, *flags, "--resume") == 0
    # What is there is not drawn again, and what was set aside is left alone.
    monkeypatch.setattr(batch, "open_engine", None)
    assert run(GOOD, wild, *flags, "--resume") == 0
    aside = list(wild.glob("shards/damaged-*"))
    assert [path.name for path in aside] == [f"damaged-{damaged.name}"] * (kind != "folder")
    for path in aside:
        path.unlink()
    assert contents(wild) == contents(calm)


def test_a_picture_that_is_not_finite_costs_no_other(run, tmp_path, monkeypatch, capsys):
    drawing = engine.Engine.draw

    def broken(self, asked):
        for place, picture in drawing(self, asked):
            yield place, picture * np.nan if asked[place].number == 3 else picture

    monkeypatch.setattr(engine.Engine, "draw", broken)
    flags = ["--format", "tar", "--picture", "webp", "--shard_pictures", "3"]
    assert run(GOOD, tmp_path / "out", *flags) == 1
    assert "line 2: the pixels of (8, 8, 3) are not all finite" in capsys.readouterr().err
    index = index_of(tmp_path / "out")
    assert ["error" in line for line in index] == [False, True, *[False] * 4]


def test_pictures_of_rows_that_are_not_asked_for_any_more_stay_and_are_told(run, tmp_path, caplog):
    out = tmp_path / "out"
    assert run(GOOD[:2], out) == 0
    before = {path for path in out.rglob("*.png")}
    assert run(GOOD[1:3], out, "--resume") == 0
    assert "1 pictures of rows that are not asked for" in caplog.text
    assert len(index_of(out)) == 2 and before < {path for path in out.rglob("*.png")}


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_pictures_of_each_format_carry_the_mark_and_their_row(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    data = images.encode_picture(pixels, kind, {"parameters": "a row, {} ü"}, 90)
    assert b"trainedAlgorithmicMedia" in data
    found = images.read_text(data)
    assert found["parameters"] == "a row, {} ü" and found["AIGenerated"] == "true"
    with pytest.raises(images.ImageError, match="no whole picture"):
        images.read_text(data[: len(data) // 2])
    if kind == "png":
        with pytest.raises(images.ImageError, match="no whole picture"):
            images.read_text(data[:-20])


def test_a_dry_run_says_what_would_be_drawn_and_writes_nothing(run, tmp_path, capsys):
    out = tmp_path / "out"
    asked = [*GOOD, {"identity": "carl", "prompt": "{}"}, GOOD[0] | {"guidance_scale": 1}]
    assert run(asked, out, "--dry_run") == 0
    told = capsys.readouterr().out
    assert "7 rows can be drawn, 1 cannot; 6 different pictures of 2 people, 6 left" in told
    assert "5 pictures of 8 x 8, 2 steps of ddim, guided" in told and "3 calls" in told
    assert "1 pictures of 8 x 8, 2 steps of ddim, unguided" in told
    assert "on the disk" in told and "pictures/s" in told
    assert not out.exists()


def test_prompts_are_crossed_with_people(run, tmp_path, people, smallest_checkpoint):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of {}\n# not this\n{} at sea\n")
    arguments = ["--prompts", prompts, "--identities", people, "--num_images_per_prompt", "2"]
    arguments += ["--out", tmp_path / "out", "--pretrained_model_name_or_path"]
    assert command.main([*map(str, arguments), str(smallest_checkpoint), *FLAGS]) == 0
    told = [
        (*line["people"], line["prompt"], line["number"]) for line in index_of(tmp_path / "out")
    ]
    assert told == [
        (name, prompt, number)
        for name in ("anna", "bert")
        for prompt in ("a photo of {}", "{} at sea")
        for number in (0, 1)
    ]


def test_what_a_checkpoint_says_of_its_noise_and_words_is_part_of_a_rows_hash(
    tmp_path, smallest_checkpoint, people
):
    """Pictures of another noise schedule, or of other words, are not those that were asked for."""
    copy, digests = tmp_path / "checkpoint", set()
    shutil.copytree(smallest_checkpoint, copy)
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text(json.dumps(GOOD[0]))
    given = {"pretrained_model_name_or_path": str(copy), "identities": str(people)}
    cfg = reading.build(BatchConfig, {}, given | {"jobs": str(jobs), "out": "out"})
    for name in (None, "scheduler/scheduler_config.json", "tokenizer/vocab.json"):
        if name is not None:
            (copy / name).write_bytes((copy / name).read_bytes() + b"\n")
        digests |= {job.digest for job in batch.plan_batch(cfg).jobs}
    assert len(digests) == 3


def test_people_of_a_missing_folder_are_told_before_anything_is_drawn(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(GOOD, out, "--identities", str(tmp_path / "nobody")) == 1
    assert "nobody is no folder" in capsys.readouterr().err and not (out / store.INDEX).exists()


def test_a_name_may_hold_a_comma(people, tmp_path):
    shutil.copytree(people / "anna", tmp_path / "Doe, Anna")
    shutil.copytree(people / "bert", tmp_path / "bert")
    roster = rows.Roster(None, str(tmp_path), None)
    assert roster.names("Doe, Anna") == ["Doe, Anna"]
    assert roster.names("bert, carl") == ["bert", "carl"]
    with pytest.raises(FileNotFoundError, match="empty"):
        rows.find_person("", str(tmp_path))


def test_processes_take_neighbouring_ranges_that_cover_all(monkeypatch):
    whole = list(range(11))
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    taken = []
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        taken += batch.range_of(whole)
    assert taken == whole


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either a job file"),
        (["--jobs", "a.csv", "--prompts", "b"], "one of the two"),
        (["--prompts", "b"], "needs --identities"),
        (["--jobs", "a.csv", "--num_images_per_prompt", "2"], "has no effect on a job file"),
        (["--jobs", "a.csv", "--quality", "50"], "no effect on png"),
        (["--jobs", "a.csv", "--guidance_interval", "1", "0"], "the lower one first"),
        (["--jobs", "a.txt"], "is no job file"),
        (["a.txt"], "is no job file"),
    ],
)
def test_settings_that_do_not_fit_are_refused(flags, message, tmp_path, capsys):
    out = ["--pretrained_model_name_or_path", "mini", "--out", str(tmp_path / "out")]
    assert command.main([*flags, *out]) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "a.jsonl --out o --lora x y --resume",
        "--out o a.jsonl --lora x y --resume",
        "--lora x y a.jsonl --out o --resume",
        "--out o --resume a.jsonl --lora x y",
        "--lora x y --resume --save_dir=o a.jsonl",
        "--resume --lora x y --out o --jobs a.jsonl",
    ],
)
def test_the_job_file_may_stand_anywhere(words, monkeypatch):
    found = []
    monkeypatch.setattr(command, "drawing", lambda: lambda cfg: found.append(cfg) or [])
    assert command.main([*words.split(), "--pretrained_model_name_or_path", "mini"]) == 0
    (cfg,) = found
    assert (cfg.jobs, cfg.out, cfg.lora, cfg.resume) == ("a.jsonl", "o", ["x", "y"], True)


@pytest.mark.parametrize("words", ["a.jsonl b.csv", "a.jsonl --jobs b.csv", "--jobs=a.csv b.csv"])
def test_one_job_file_is_enough(words, capsys):
    assert command.main([*words.split(), "--out", "o", "--checkpoint", "mini"]) == 2
    assert capsys.readouterr().err.count(" and b.csv") == 1


@pytest.mark.chaos
@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_killed_at_random_moments_a_batch_ends_as_the_quiet_one(
    smallest_checkpoint, people, tmp_path, kind
):
    """Twenty SIGKILLs, then SIGTERM, then two processes: the same pictures, and the same shards."""
    dice = random.Random(kind)
    asked = [
        GOOD[0] | {"identity": name, "number": n} for n in range(150) for name in ("anna", "bert")
    ]
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("".join(json.dumps(row) + "\n" for row in asked))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": chaos.XLA.format(1)}
    flags = [*FLAGS[:-1], str(tmp_path / "cache"), "--format", kind, "--shard_pictures", "7"]

    def start(out, *more, **variables):
        arguments = [str(jobs), "--out", str(out), "--identities", str(people), *flags, *more]
        arguments += ["--pretrained_model_name_or_path", str(smallest_checkpoint)]
        return subprocess.Popen(
            [sys.executable, "-m", "idea_jax.batch", *arguments],
            env=environment | variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    calm, wild = tmp_path / "calm", tmp_path / "wild"
    process = start(calm)
    assert process.wait(chaos.PATIENCE) == 0, process.stderr.read()
    kills = 0
    for number in [signal.SIGKILL] * 20 + [signal.SIGTERM]:
        process = start(wild, "--resume")

        def count():
            return sum(1 for place in ("pictures", ".waiting") for _ in (wild / place).rglob("*"))

        before, until = count(), time.monotonic() + dice.uniform(5, 60)
        while process.poll() is None and count() == before and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.2))
        kills += process.poll() is None
        process.send_signal(number)
        process.communicate(timeout=chaos.PATIENCE)
    assert kills > 3
    # The rest is shared out by two processes; then their shards are others, and no picture is.
    both = [start(wild, "--resume", "--distributed", **v) for v in chaos.processes_of(2)]
    said = [process.communicate(timeout=chaos.PATIENCE)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    told = [{k: v for k, v in line.items() if k != "file"} for line in index_of(calm)]
    assert [{k: v for k, v in line.items() if k != "file"} for line in index_of(wild)] == told
    if kind == "folder":
        assert contents(wild) == contents(calm)
    else:
        assert packed(wild, kind) == packed(calm, kind)
        assert {path.parent.name for path in wild.rglob(f"*.{kind}")} == {"shards"}
    assert not list(wild.rglob(".tmp-*")) and not list(wild.rglob("damaged-*"))
    assert not (wild / ".waiting").exists() or not list((wild / ".waiting").iterdir())


def packed(out, kind):
    """Every picture of the shards in a folder by the hash of its row; each is in one of them, once,
    and the index says in which."""
    files = {line["hash"]: line["file"] for line in index_of(out)}
    shards, found = store.Store(out, kind, "png"), {}
    for path in sorted((out / "shards").iterdir()):
        for digest, held, data in shards.shard(path):
            assert digest not in found and files[digest] == held.file, path
            found[digest] = data
    assert found.keys() == files.keys()
    return found
