"""The evaluation as a whole: folders in, rows, summary and report out; bad input is reported."""

import csv
import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from idea_jax import evaluate, jobs
from idea_jax.data.text import TextError
from idea_jax.evaluation import asked, compare, draw, gallery, looking, output, page, scoring
from idea_jax.evaluation.modes import MODES, of_person, prompt_value
from idea_jax.evaluation.settings import EvaluateConfig
from idea_jax.faces import random_model
from idea_jax.mini import captions, measures, strangers, trials
from idea_jax.models import hub

FACE = hub.MINI_FOLDER / "face"
HOSTILE = "<img src=x onerror=alert(1)>\"'& \u202e"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three people of the drawn world: photos, other true drawings, and pictures of two methods."""
    folder = tmp_path_factory.mktemp("world")
    strangers.write(folder, "test", 3, 1, 0)
    names = sorted(path.name for path in (folder / "photos").iterdir())
    for number, name in enumerate(names):
        for prompt, places in (("a_photo_of_{}", (0, 1)), ("a_cartoon_of_{}", (2,))):
            for method, other in (("true", name), ("shuffled", names[number - 1])):
                target = folder / method / name / prompt
                target.mkdir(parents=True)
                for place in places:
                    source = folder / "held_out" / other / f"{place:02d}.png"
                    shutil.copy(source, target / source.name)
    for name in names:  # what the pictures above are is not held out
        for place in (0, 1, 2):
            (folder / "held_out" / name / f"{place:02d}.png").unlink()
    return folder


def arguments(world, out, *methods, **more):
    given = {"photos": world / "photos", "held_out": world / "held_out", "output_dir": out}
    given |= {"score_model": FACE / "scoring.onnx", "clip": hub.MINI_FOLDER, "prompts": "mini"}
    given |= more
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return [*flags, "--images", *(str(world / method) for method in methods)]


def rows_of(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


class Tags(HTMLParser):
    """The elements of a page with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_pictures_of_any_program_are_scored(world, tmp_path, monkeypatch, capsys):
    """True pictures score at the ceiling, those of somebody else at the floor; a second run looks
    at nothing again and writes the same."""
    command = arguments(world, tmp_path, "true", "shuffled")
    assert evaluate.main(command) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "report.html"),
        str(tmp_path / "summary.json"),
    ]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["problems"] == []
    true, shuffled = (summary["methods"][name][scoring.ALL] for name in ("true", "shuffled"))
    assert true["identity"]["people"] == 3 and true["pictures"] == 6
    assert true["identity"]["mean"] > 0.8 and summary["ceiling"]["mean"] > 0.8
    # Each of three people has the next one's pictures.
    assert abs(shuffled["identity"]["mean"] - summary["floor"]["mean"]) < 0.1
    (apart,) = summary["differences"]
    assert apart["methods"] == ["true", "shuffled"] and apart["identity"]["low"] > 0
    style = summary["methods"]["true"]["style"]
    assert style["pictures"] == 3 and style["diversity"] is None
    assert summary["methods"]["true"]["reconstruction"]["diversity"]["mean"] > 0
    rows = rows_of(tmp_path)
    assert len(rows) == 18 and {row["error"] for row in rows} == {None}
    assert {row["prompt"] for row in rows} == {"a photo of {}", "a cartoon of {}"}
    for row in rows:
        assert row["faces"] >= 1 and -1 <= row["copy_paste"] <= 1 and row["held_out"] is not None
    with open(tmp_path / "rows.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["sha256"] for row in table] == [row["sha256"] for row in rows]
    for path in (tmp_path / "seen").rglob("*.safetensors"):
        assert path.stat().st_mode & 0o077 == 0

    def never(*_):
        raise AssertionError("looked at again")

    monkeypatch.setattr(looking.Eyes, "faces_on", never)
    before = (tmp_path / "rows.jsonl").read_bytes()
    assert evaluate.main(command) == 0
    assert (tmp_path / "rows.jsonl").read_bytes() == before
    # Another setting, and the pictures of two settings would meet in one report.
    assert evaluate.main([*command, "--mode", "fastcomposer"]) == 1
    assert "mode: strict -> fastcomposer" in capsys.readouterr().err


def test_a_run_that_ends_while_it_looks_goes_on_there(world, tmp_path, monkeypatch):
    """What was looked at before is neither looked at again nor lost."""
    monkeypatch.setattr(looking, "CHUNK", 4)
    names, see = [], looking.Eyes.faces_on

    def until_the_tenth(eyes, image, name):
        names.append(name)
        if len(names) == 10:
            raise MemoryError
        return see(eyes, image, name)

    monkeypatch.setattr(looking.Eyes, "faces_on", until_the_tenth)
    command = arguments(world, tmp_path, "true", clip="none")
    assert evaluate.main(command) == 1
    assert len(list((tmp_path / "seen").rglob("*.safetensors"))) == 2
    assert evaluate.main(command) == 0
    found = [*world.glob("photos/*/*"), *world.glob("held_out/*/*"), *world.glob("true/*/*/*")]
    pictures = {path.read_bytes() for path in found}
    assert len(names) == 10 + len(pictures) - 8
    assert len(rows_of(tmp_path)) == 9 and {row["error"] for row in rows_of(tmp_path)} == {None}


def test_a_folder_without_a_picture_is_said_so(world, tmp_path, caplog):
    (tmp_path / "empty").mkdir()
    command = arguments(world, tmp_path / "out", clip="none")
    assert evaluate.main([*command, str(tmp_path / "empty")]) == 0
    assert "there is no picture to score" in caplog.text
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "the folder holds no picture" in {problem["why"] for problem in summary["problems"]}


def test_what_is_wrong_with_one_picture_or_person_stands_in_the_report(world, tmp_path, caplog):
    """No face, no picture at all, a damaged one, no photo, nobody's folder, and names that are
    meant to do harm."""
    mine = tmp_path / "world"
    shutil.copytree(world, mine)
    names = sorted(path.name for path in (mine / "photos").iterdir())
    prompt = mine / "true" / names[0] / "a_photo_of_{}"
    Image.new("RGB", (64, 64), "blue").save(prompt / "blank.png")
    (prompt / "damaged.png").write_bytes(b"\x89PNG")
    shutil.rmtree(mine / "true" / names[1])  # of whom there is no picture
    stranger = mine / "true" / HOSTILE.replace("/", "") / "=1+1"
    shutil.copytree(prompt, stranger)
    lost = mine / "true" / "lost.d"
    shutil.copytree(prompt, lost)
    blank = mine / "photos" / "zoe"
    blank.mkdir()
    Image.new("RGB", (64, 64), "red").save(blank / "a.png")
    (mine / "photos" / "zoe empty").mkdir()
    cut = mine / "photos" / "yan"
    cut.mkdir()
    (cut / "a.png").write_bytes(b"")
    shutil.copytree(prompt, mine / "true" / "yan" / os.fsdecode(b"no unicode \xff"))
    out = tmp_path / "out"
    assert evaluate.main(arguments(mine, out, "true")) == 0
    assert "9 pictures and 9 other things could not be scored" in caplog.text
    summary = json.loads((out / "summary.json").read_text())
    said = {(p["person"], p["what"]) for p in summary["problems"]}
    assert said == {
        (names[1], "pictures"),
        ("zoe", "pictures"),
        ("zoe", "photos"),
        ("yan", "photos"),
        ("", "lost.d"),
        ("yan", "photos: a.png"),
        ("zoe empty", "photos"),
        ("zoe", "held out"),
        ("yan", "held out"),
    }
    rows = {(row["person"], row["picture"].rpartition("/")[2]): row for row in rows_of(out)}
    missed = rows[names[0], "blank.png"]
    assert (missed["faces"], missed["identity"], missed["error"]) == (0, None, None)
    assert missed["prompt_score"] is not None
    damaged = rows[names[0], "damaged.png"]["error"]
    assert "seems to be a damaged PNG" in damaged and str(tmp_path) not in damaged
    assert rows[names[0], "damaged.png"]["faces"] is None
    nobody = rows[HOSTILE, "00.png"]
    assert nobody["identity"] is None and "no photo of this person" in nobody["error"]
    own = summary["people"]["true"][names[0]]
    assert own["detected"] == pytest.approx(2 / 3)
    assert own["identity_zero"] == pytest.approx(own["identity"] * 2 / 3)
    assert summary["people"]["true"][HOSTILE]["detected"] is None
    # The page shows the name as text, and loads nothing.
    text = (out / "report.html").read_text()
    tags = Tags(text).found
    assert not [a for tag, a in tags if "onerror" in a or "href" in a]
    assert {a["src"].partition(":")[0] for _, a in tags if "src" in a} == {"data"}
    assert sum(tag == "script" for tag, _ in tags) == 1 and "\u202e" not in text
    with open(out / "rows.csv", newline="", encoding="utf-8") as file:
        assert any(row["prompt"] == "'=1+1" for row in csv.DictReader(file))


def problems_of(out):
    found = json.loads((out / "summary.json").read_text())["problems"]
    return {(p["person"], p["what"]): p["why"] for p in found}


def test_no_picture_and_no_photo_is_left_out_without_a_word(world, tmp_path):
    """Kinds that are not read, links into nothing, and pictures that lie too high or too deep."""
    mine = tmp_path / "world"
    shutil.copytree(world, mine)
    name = sorted(path.name for path in (mine / "photos").iterdir())[0]
    prompt = mine / "true" / name / "a_photo_of_{}"
    Image.new("RGB", (64, 64)).save(prompt / "a.bmp")
    (prompt / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (prompt / "notes.json").write_text("{}")  # no picture: nobody asks for it
    (prompt / "deep").mkdir()
    for place in (prompt / "deep" / "a.png", mine / "true" / "b.png", prompt / ".hidden.png"):
        shutil.copy(prompt / "00.png", place)
    Image.new("RGB", (64, 64)).save(mine / "photos" / name / "c.tif")
    out = tmp_path / "out"
    assert evaluate.main(arguments(mine, out, "true", clip="none")) == 0
    said = problems_of(out)
    place = f"{name}/a_photo_of_{{}}"
    assert set(said) == {
        ("", f"{place}/a.bmp"),
        ("", f"{place}/gone.png"),
        ("", f"{place}/deep"),
        ("", "true"),
        (name, "photos: c.tif"),
    }
    assert "suffix .bmp" in said["", f"{place}/a.bmp"] and len(rows_of(out)) == 9


def test_a_folder_that_cannot_be_read_is_reported_and_the_others_go_on(
    world, tmp_path, monkeypatch
):
    names = sorted(path.name for path in (world / "true").iterdir())
    closed = [world / "true" / names[0], world / "true" / names[1] / "a_photo_of_{}"]
    listed = Path.iterdir

    def iterdir(path):
        if path in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert evaluate.main(arguments(world, tmp_path, "true", clip="none")) == 0
    said = problems_of(tmp_path)
    for what in (names[0], f"{names[1]}/a_photo_of_{{}}"):
        assert "Permission denied" in said["", what] and str(world) not in said["", what]
    assert len(rows_of(tmp_path)) == 4


def test_photos_that_say_nothing_are_named(world, tmp_path):
    """Of several photos one shows no face; a held-out photo was learned from; nobody else's is
    touched by that."""
    mine = tmp_path / "world"
    shutil.copytree(world, mine)
    anna, bo, cleo = sorted(path.name for path in (mine / "photos").iterdir())
    Image.new("RGB", (64, 64), "red").save(mine / "photos" / anna / "blank.png")
    Image.new("RGB", (64, 64), "red").save(mine / "held_out" / anna / "blank.png")
    (learned,) = (mine / "photos" / bo).iterdir()
    shutil.copy(learned, mine / "held_out" / bo / "same.png")
    shutil.rmtree(mine / "held_out" / cleo)
    assert evaluate.main(arguments(world, tmp_path / "whole", "true", clip="none")) == 0
    command = arguments(mine, tmp_path / "out", "true", clip="none")
    assert evaluate.main(command) == 0
    said = problems_of(tmp_path / "out")
    assert set(said) == {
        (anna, "photos: blank.png"),
        (anna, "held out: blank.png"),
        (bo, "held out: same.png"),
        (cleo, "held out"),
    }
    assert "learned from" in said[bo, "held out: same.png"]
    assert rows_of(tmp_path / "out")[:6] == rows_of(tmp_path / "whole")[:6]


def test_a_method_without_any_picture_is_a_row_without_numbers(world, tmp_path):
    (tmp_path / "drew nothing").mkdir()
    command = arguments(world, tmp_path / "out", "true", clip="none")
    assert evaluate.main([*command, str(tmp_path / "drew nothing")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["methods"]) == ["true", "drew nothing"]
    row = summary["methods"]["drew nothing"][scoring.ALL]
    assert row["pictures"] == 0 and row["identity_zero"] is None
    assert "| drew nothing |" in (tmp_path / "out" / "table.md").read_text()
    people = [p["person"] for p in summary["problems"] if p["what"] == "pictures"]
    assert people == sorted(people) and len(people) == 3


def test_damaged_notes_of_an_earlier_run_end_in_no_crash(world, tmp_path, capsys, caplog):
    """Seconds that nobody can read are lost; settings that nobody can read are refused."""
    command = arguments(world, tmp_path, "true", clip="none")
    assert evaluate.main(command) == 0
    rows = rows_of(tmp_path)
    for damaged in ("[]", '{"true": 3}', '{"true": {"drawn": "x"}}', "{", "[" * 100_000):
        (tmp_path / "seconds.json").write_text(damaged)
        assert evaluate.main(command) == 0 and rows_of(tmp_path) == rows
        assert "seconds are lost" in caplog.text
        caplog.clear()
    (tmp_path / "settings.json").write_text('{"mode": "st')
    assert evaluate.main(command) == 1
    assert "settings.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "code", "problem"),
    [
        ({"photos": "nowhere"}, 1, "nowhere does not exist"),
        ({"prompts": "nowhere"}, 1, "neither a file nor one of the sets"),
        ({"score_model": "nowhere.onnx"}, 1, "nowhere.onnx does not exist"),
        ({"clip": "nowhere"}, 1, "there is no folder nowhere"),
        ({"pictures": 3}, 2, "--pictures has no effect on --images"),
        ({"vae": "other"}, 2, "--vae has no effect on --images"),
        ({"compare": "paper"}, 2, "exactly one of"),
        ({"images": "nowhere"}, 1, "nowhere is no folder"),
        ({"face_model": FACE / "scoring.onnx"}, 1, "is the recogniser that people are learned"),
    ],
)
def test_what_concerns_everybody_is_one_message(world, tmp_path, capsys, change, code, problem):
    assert evaluate.main(arguments(world, tmp_path / "out", "true", **change)) == code
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # a command that is put right is not held to this one


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("steps=x", "must be int"),
        ("id_strength=x", "must be float"),
        ("id_strength=-1", "id_str"),
        ("n_pseudo_tokens=4", "the shared ID-Enhancer is for 2"),
        ("n_pseudo_tokens=4", "none of the 1000 names has 3 tokens"),
        ("output_dir=elsewhere", "'output_dir' is the same for all methods"),
        ("push_to_hub=true", "'push_to_hub' is the same for all methods"),
        ("prompt_file=other.txt", "'prompt_file' is the same for all methods"),
    ],
)
def test_settings_of_a_method_are_looked_at_before_it_is_trained(
    world, tmp_path, capsys, monkeypatch, given, problem
):
    monkeypatch.setattr(compare.training, "run", None)
    command = ["--photos", str(world / "photos"), "--output_dir", str(tmp_path / "out")]
    method = f"paper_alone@{given}" if "names" in problem else f"paper@{given}"
    command += ["--pretrained_model_name_or_path", "mini", "--compare", method]
    assert evaluate.main(command) == 1
    assert problem in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_numbers_of_the_mini_are_the_labs(world, tmp_path):
    """The same pictures, references and recogniser: the same likeness, to rounding."""
    out = tmp_path / "out"
    command = arguments(world, out, "true", score_crop="center", clip="none", seed=3)
    assert evaluate.main(command) == 0
    rows, scorer = rows_of(out), measures.Mini(None, None, None, hub.MINI_FOLDER).scoring()
    for name in sorted(path.name for path in (world / "photos").iterdir()):
        own = [row for row in rows if row["person"] == name]
        read = [np.asarray(Image.open(world / "true" / row["picture"])) for row in own]
        held = [np.asarray(Image.open(p)) for p in sorted((world / "held_out" / name).glob("*"))]
        references = measures.embed(scorer, np.stack(held))
        expected = (measures.embed(scorer, np.stack(read)) @ references.T).mean()
        person = trials.Acquaintance(None, references, None)
        assert expected == pytest.approx(np.mean([row["held_out"] for row in own]), abs=1e-6)
        judged, _ = trials.judge_pictures(
            measures.Mini(None, None, None, hub.MINI_FOLDER),
            scorer,
            person,
            np.stack(read)[None],
            prompts=captions.PROMPTS[:1],
        )
        assert judged == pytest.approx(expected, abs=1e-6)


def test_intervals_are_drawn_with_the_seed_of_the_mode(world, tmp_path, monkeypatch):
    seeds, estimate = [], scoring.metrics.estimate

    def noted(*values, seed):
        seeds.append(seed)
        return estimate(*values, seed=seed)

    monkeypatch.setattr(scoring.metrics, "estimate", noted)
    for seed, given in ((42, {}), (7, {"seed": 7})):
        seeds.clear()
        command = arguments(world, tmp_path / str(seed), "true", mode="celeb_basis", **given)
        assert evaluate.main([*command, "--clip", "none"]) == 0
        assert set(seeds) == {seed}


def test_values_of_a_prompt_and_of_a_person_by_mode():
    """Two prompts of 2 and 3 pictures, with misses; by hand."""
    first, second = [0.8, None], [0.2, 0.4, None]
    expected = {
        # (first, second): identity, identity_zero, detected
        "strict": ((0.8, 0.4, 1 / 2), (0.3, 0.2, 2 / 3)),
        "fastcomposer": ((0.8, 0.4, 1 / 2), (0.3, 0.2, 2 / 3)),
        "celeb_basis": ((0.8, 0.4, 2 / 3), (0.3, 0.2, 3 / 4)),
    }
    for name, values in expected.items():
        for pictures, right in zip((first, second), values, strict=True):
            for score, value in zip(("identity", "identity_zero", "detected"), right, strict=True):
                assert prompt_value(MODES[name], score, pictures)[0] == pytest.approx(value)
    prompts = [(0.8, 1), (0.3, 2), (None, 0)]
    assert of_person(MODES["strict"], prompts) == (pytest.approx(0.55), 1)
    assert of_person(MODES["celeb_basis"], prompts) == (pytest.approx(1.1), 2)
    assert of_person(MODES["fastcomposer"], prompts) == (pytest.approx(1.4), 3)
    assert of_person(MODES["strict"], [(None, 0)]) == (0, 0)
    # A prompt with a mean of zero or less is dropped by the protocol, and by it alone.
    assert prompt_value(MODES["celeb_basis"], "identity", [-0.1, 0.1]) == (None, 0)
    assert prompt_value(MODES["strict"], "identity", [-0.1, 0.1]) == (pytest.approx(0), 2)
    assert prompt_value(MODES["strict"], "identity", [None]) == (None, 0)


def test_where_several_faces_are_asked_for_the_persons_is_the_most_alike():
    faces = np.eye(4, dtype=np.float32)
    known = scoring.Known(faces[1:2], faces[2:3], np.zeros((1, 0), np.float32))
    row, nothing = scoring.ScoredPicture("m", "p", "{}", "g", "a.png"), np.zeros(0, np.float32)
    alone, both = asked.Asked("{}", "g"), asked.Asked("{} and {other}", "g")
    assert scoring.score(row, alone, faces[:2], nothing, known, None).identity == 0
    found = scoring.score(row, both, faces[:2], nothing, known, None)
    assert found.identity == 1 and found.copy_paste == pytest.approx(1)
    celebrity = asked.Asked("{} with somebody", "with a celebrity")
    assert scoring.score(row, celebrity, faces[:2], nothing, known, None).identity == 1


def test_folders_say_whom_they_show_and_what_was_asked(tmp_path):
    def make(where, **about):
        folder = tmp_path / where
        folder.mkdir(parents=True)
        for name in ("00000.png", "grid.png"):
            Image.new("RGB", (16, 16)).save(folder / name)
        for name, text in about.items():
            (folder / f"{name}.{'json' if name == 'run' else 'txt'}").write_text(text)

    make("anna/as_it_is_called")
    make("anna/x", prompt="a photo of {}\n")
    make("anna/y", run=json.dumps({"prompt": "{anna} smiling", "identity": {}}))
    make("z", run=json.dumps({"prompt": "{bo} and {anna}", "identities": {"anna": 1, "bo": 2}}))
    make("nobody", run="{")
    make("bo/deep", run="[" * 100_000)
    make(f"{draw.safe_name('jörg')}/{{}}")
    make(".hidden/x")
    shown, problems = gallery.scan("m", tmp_path, ["anna", "bo", "jörg"])
    found = sorted((s.person, s.prompt, s.path.name) for s in shown)
    assert found == [
        ("anna", "a photo of {}", "00000.png"),
        ("anna", "a photo of {}", "grid.png"),
        ("anna", "as it is called", "00000.png"),
        ("anna", "as it is called", "grid.png"),
        ("anna", "{} smiling", "00000.png"),
        ("bo", "deep", "00000.png"),
        ("bo", "{} and {other}", "00000.png"),
        ("jörg", "{}", "00000.png"),
        ("jörg", "{}", "grid.png"),
    ]
    assert [(p.what, "PERSON/PROMPT" in p.why) for p in problems] == [("nobody", True)]
    (alone,) = gallery.scan("m", tmp_path / "anna", ["anna"])[0][:1]
    assert (alone.person, alone.prompt) == ("anna", "as it is called")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert gallery.scan("m", empty, ["anna"]) == (
        [],
        [gallery.Problem("m", "", "empty", "the folder holds no picture")],
    )


def test_prompt_sets_are_whole(tmp_path):
    sets = {name: asked.read(name) for name in asked.SETS}
    assert len(sets["celeb_basis"]) >= 60 and len(sets["fastcomposer"]) == 40
    groups = {prompt.group for prompt in sets["celeb_basis"]}
    several = {*asked.SEVERAL}
    assert groups == {"action", "style", "expression", "reconstruction"} | several
    assert all((asked.OTHER in p.text) == (p.group == "two people") for p in sets["celeb_basis"])
    for prompts in sets.values():
        assert asked.STYLE in {prompt.group for prompt in prompts}
    own = tmp_path / "own.txt"
    own.write_text("# mine\n{} at sea\n[ Style ]\na sketch of {}\n")
    assert asked.read(str(own)) == [("{} at sea", "prompts"), ("a sketch of {}", "style")]
    for text, problem in (
        ("[style]\n", "holds groups and no prompt"),
        ("{} a\n{} a\n", "twice"),
        ("a dog\n", "does not mention the person"),
        ("{} and {bo}\n", "other braces"),
    ):
        own.write_text(text)
        with pytest.raises(TextError, match=problem):
            asked.read(str(own))


def test_methods_of_a_comparison_are_read():
    found = compare.read_contenders("paper, cross_init@steps=4;id_strength=0.5", "mini")
    assert [c.name for c in found] == ["paper", "cross_init@steps=4;id_strength=0.5"]
    assert found[1].config.name == "mini_cross_init.yaml"
    assert found[1].training == {"max_train_steps": 4} and found[1].drawing == {"id_strength": 0.5}
    assert found[0].uses_face and not found[1].uses_face
    (read,) = compare.read_contenders("paper@clip_skip=1", "mini")  # trained and drawn with it
    assert read.training == read.drawing == {"clip_skip": 1}
    assert compare.read_contenders("paper", "some/model")[0].config.name == "paper.yaml"
    for given, problem in (
        ("paper,paper", "twice"),
        ("nothing", "unknown; there are cross_init, official, paper"),
        ("../paper", "unknown"),
        ("", "unknown"),
        ("paper@steps", "no SETTING=VALUE"),
        ("paper@no_such=1", "'no_such' is no setting"),
        ("paper@steps=[", "no readable value"),
    ):
        with pytest.raises(compare.ConfigError, match=problem):
            compare.read_contenders(given, "mini")


def test_how_a_checkpoint_is_read_holds_for_training_and_drawing(tmp_path):
    given = {"prediction_type": "v_prediction", "tokenizer_name": "words", "variant": "fp16"}
    given |= {"original_config": "v2.yaml", "lora": ["style.safetensors:0.5"]}
    of_drawing = {"vae": "other", "clip_skip": 1}
    cfg = EvaluateConfig(
        photos="p",
        compare="textual_inversion,cross_init@lora=[own];vae=third",
        pretrained_model_name_or_path="model",
        **given,
        **of_drawing,
    )
    first, second = compare.read_contenders(cfg.compare, "model")
    settings = draw.settings_of(cfg, MODES["strict"])
    trained, drawn = compare.train_config(first, cfg, tmp_path, 0), draw.sample_config(settings)
    assert {name: getattr(trained, name) for name in given} == given
    assert {name: getattr(drawn, name) for name in given | of_drawing} == given | of_drawing
    # One method's own LoRA is in the weights that it is trained with, and drawn with.
    assert compare.train_config(second, cfg, tmp_path, 0).lora == ["own"]
    own = draw.sample_config(settings | second.drawing)
    assert (own.lora, own.vae, own.variant) == (["own"], "third", "fp16")


@pytest.mark.parametrize("given", ["lora", "vae", "tokenizer_name"])
def test_parts_of_a_model_that_are_missing_are_said_first(
    smallest_checkpoint, world, tmp_path, capsys, given
):
    command = ["--photos", str(world / "photos"), "--output_dir", str(tmp_path / "out")]
    command += ["--pretrained_model_name_or_path", str(smallest_checkpoint)]
    command += ["--compare", "textual_inversion", f"--{given}", str(tmp_path / "nowhere")]
    assert evaluate.main(command) == 1
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_evaluation_of_an_earlier_version_goes_on_where_nothing_new_is_asked_for(
    world, tmp_path, capsys
):
    command = arguments(world, tmp_path, "true", clip="none")
    assert evaluate.main(command) == 0
    held = json.loads((tmp_path / "settings.json").read_text())
    for name in ("vae", "clip_skip", "guidance_rescale", "scheduler"):
        del held[name]
    (tmp_path / "settings.json").write_text(json.dumps(held))
    assert evaluate.main(command) == 0
    capsys.readouterr()
    assert evaluate.main([*command, "--mode", "celeb_basis"]) == 1
    assert "--mode: strict -> celeb_basis" in capsys.readouterr().err


def test_a_comparison_trains_draws_and_scores(
    smallest_checkpoint, photo_folder, tmp_path, monkeypatch, capsys
):
    """Two people, two methods, one step; what is there is neither trained nor drawn again."""
    photos = tmp_path / "photos"
    (source,) = Path(photo_folder).iterdir()
    for name, turn in (("anna", 0), ("bo", 10)):
        (photos / name).mkdir(parents=True)
        Image.open(source).rotate(turn).save(photos / name / "photo.png")
    random_model.write_random_recogniser(tmp_path / "scoring.onnx", seed=5)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of {}\n{} and {other}\n")
    small = "steps=1;train_batch_size=1;crop=center"
    first, second = f"textual_inversion@{small}", f"textual_inversion@{small};seed=1"
    third = f"textual_inversion@{small};num_inference_steps=2"  # of the first one's people
    command = ["--compare", f"{first},{second},{third}"]
    command += ["--pretrained_model_name_or_path", str(smallest_checkpoint)]
    command += ["--photos", str(photos), "--prompts", str(prompts), "--clip", "none"]
    command += ["--score_model", str(tmp_path / "scoring.onnx"), "--score_crop", "center"]
    command += ["--pictures", "2", "--num_inference_steps", "1", "--guidance_scale", "1"]
    command += ["--negative_prompt", "", "--output_dir", str(tmp_path / "out")]
    assert evaluate.main(command) == 0, capsys.readouterr().err
    out = tmp_path / "out"
    rows = rows_of(out)
    assert len(rows) == 3 * 2 * 2 * 2
    assert {(row["method"], row["person"]) for row in rows} == {
        (method, person) for method in (first, second, third) for person in ("anna", "bo")
    }
    assert {row["prompt"] for row in rows} == {"a photo of {}", "{} and {other}"}
    times = json.loads((out / "seconds.json").read_text())
    assert [own.get("learned") for own in times.values()] == [2, 2, None]
    assert [own["drawn"] for own in times.values()] == [8, 8, 8]
    assert len(list(out.glob("people/*"))) == 2
    assert "seconds to learn a person" in (out / "table.md").read_text()
    # What is missing of the pictures is drawn again, and nothing else.
    pictures = sorted(out.glob("pictures/*/anna/*/00001.png"))
    pictures[0].unlink()
    calls, run = [], draw.sampling.run
    monkeypatch.setattr(draw.sampling, "run", lambda cfg: calls.append(cfg) or run(cfg))
    assert evaluate.main(command) == 0
    assert [(len(cfg.identity), cfg.prompt) for cfg in calls] == [(1, ["a photo of {}"])]
    assert rows_of(out) == rows
    # Methods may come and go; what is there of the others stays as it is.
    command[1] = f"{first},{third}"
    assert evaluate.main(command) == 0 and len(calls) == 1
    assert rows_of(out) == [row for row in rows if row["method"] != second]
    command[1] = f"{first},{second},{third}"
    assert evaluate.main(command) == 0 and len(calls) == 1
    assert rows_of(out) == rows
    # Pictures of a prompt that the file has no more are in no number, and are reported.
    prompts.write_text("a photo of {}\n")
    assert evaluate.main(command) == 0 and len(calls) == 1
    assert rows_of(out) == [row for row in rows if row["prompt"] == "a photo of {}"]
    assert "no more" in problems_of(out)["", "pictures"]
    again = json.loads((out / "seconds.json").read_text())
    assert [own.get("learned") for own in again.values()] == [2, 2, None]


def test_pictures_of_an_earlier_identity_are_drawn_again(tmp_path, monkeypatch):
    file, calls = tmp_path / "anna.safetensors", []
    file.write_bytes(b"one")
    settings = {"num_images_per_prompt": 1, "pretrained_model_name_or_path": "mini"}
    prompt = asked.Asked("{} at sea", "g")

    def run(cfg):
        calls.append(cfg)
        folder = Path(cfg.save_dir) / draw.slug(cfg.prompt[0])
        folder.mkdir(parents=True)
        (folder / "00000.png").touch()
        about = {"prompt": cfg.prompt[0], "identity": {"sha256": draw.file_digest(file)}}
        (folder / "run.json").write_text(json.dumps(about))
        return [folder]

    monkeypatch.setattr(draw.sampling, "run", run)

    def drawn():
        spent, problems = draw.draw("m", {"anna": file}, [prompt], settings, tmp_path / "out")
        assert problems == []
        return spent["drawn"]

    assert [drawn(), drawn()] == [1, 0]
    file.write_bytes(b"two")
    assert [drawn(), drawn()] == [1, 0] and len(calls) == 2
    # A prompt with two people cannot be drawn of one.
    both = asked.Asked("{} and {other}", "g")
    _, (problem,) = draw.draw("m", {"anna": file}, [both], settings, tmp_path / "out")
    assert "there is one" in problem.why


def test_who_cannot_be_learned_is_reported_and_the_others_go_on(tmp_path, monkeypatch):
    (contender,) = compare.read_contenders("textual_inversion", "mini")
    cfg = EvaluateConfig(
        photos="home/p", compare="textual_inversion", pretrained_model_name_or_path="mini"
    )

    def run(_):
        (tmp_path / "anna").mkdir()
        (tmp_path / "anna" / draw.FILE).touch()
        why = "home/p/bo/1.jpg: no face"
        records = [jobs.Record("anna", "done"), jobs.Record("bo", "failed", why)]
        lines = "".join(f"{jobs.to_line(record)}\n" for record in records)
        (tmp_path / jobs.MANIFEST).write_text(lines)
        raise compare.TrainingError("1 of 2 failed")

    monkeypatch.setattr(compare.training, "run", run)
    files, spent, problems = compare.train(contender, cfg, tmp_path, ["anna", "bo"], 0)
    assert list(files) == ["anna"] and spent["learned"] == 1
    assert problems == [
        gallery.Problem("textual_inversion", "bo", "training", "p/bo/1.jpg: no face")
    ]
    monkeypatch.undo()

    def nobody(_):
        raise compare.TrainingError("all failed")

    monkeypatch.setattr(compare.training, "run", nobody)
    with pytest.raises(compare.TrainingError):
        compare.train(contender, cfg, tmp_path, ["bo"], 0)


def test_the_recogniser_of_training_is_refused(tmp_path, photo_folder, capsys):
    model = tmp_path / "arcface.onnx"
    random_model.write_random_recogniser(model)
    command = ["--images", str(photo_folder), "--photos", str(photo_folder), "--clip", "none"]
    command += ["--score_model", str(model), "--face_model", str(model)]
    command += ["--score_crop", "center", "--output_dir", str(tmp_path / "out")]
    assert evaluate.main(command) == 1
    assert "--same_recogniser" in capsys.readouterr().err
    assert evaluate.main([*command, "--same_recogniser"]) == 0


def test_ticks_are_round_and_around_the_values():
    for low, high in ((0.1, 0.93), (0.5, 0.5), (-0.2, 1.0), (0.221, 0.2214)):
        found = page.ticks(low, high)
        assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 9
    assert page.ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert output.cell("=1") == "'=1" and output.cell(-1.5) == -1.5


def test_of_many_methods_the_table_has_the_differences_to_the_first(world, tmp_path):
    """The page has all of them."""
    names = [f"m{number}" for number in range(7)]
    flags = arguments(world, tmp_path / "out", clip="none")
    assert evaluate.main([*flags, *(f"{name}={world / 'true'}" for name in names)]) == 0
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    pairs = [line.split("|")[1].strip() for line in lines if line.startswith("| m")]
    assert [pair for pair in pairs if " - " in pair] == [f"m0 - {name}" for name in names[1:]]
    assert "m1 - m2" in (tmp_path / "out" / "report.html").read_text()
