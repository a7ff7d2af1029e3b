"""A card: from people and a checkpoint to a folder that can be passed on; it can be stopped."""

import json
import shutil

import numpy as np
import pytest
import test_people
from PIL import Image

from idea_jax import evaluate, random_sd
from idea_jax.card import forecast, people, run, settings
from idea_jax.config.settings import ConfigError
from idea_jax.enhancer import fit
from idea_jax.evaluation import compare, draw
from idea_jax.faces import random_model
from idea_jax.mini import strangers
from idea_jax.models import hub
from idea_jax.runtime import chips
from idea_jax.runtime.signals import Interrupted

SMALL = "train_batch_size: 8\nmax_train_steps: 1\nwarmup_steps: 0\nvalidation_steps: 0\nwidth: 8\n"
NAMES = ("Anna Secret", "Bo Secret", "Cleo Secret", "Dan Secret", "Eve Secret")


@pytest.fixture(scope="module")
def world(tmp_path_factory, smallest_checkpoint):
    """A checkpoint with a recogniser, five people of whom one has a damaged photo, prompts, a
    recogniser that scores, and the settings of a small training."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(smallest_checkpoint, folder / "model")
    random_model.write_random_recogniser(folder / "model" / "face" / "arcface.onnx")
    random_model.write_random_recogniser(folder / "scoring.onnx", seed=5)
    rng = np.random.default_rng(0)
    for name in NAMES:
        (folder / "people" / name).mkdir(parents=True)
        for place in range(3):
            pixels = rng.integers(0, 256, (24, 24, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "people" / name / f"{name} {place}.jpg")
    (folder / "people" / NAMES[0] / "0 damaged.jpg").write_bytes(b"\xff\xd8")
    (folder / "prompts.txt").write_text("a photo of {}\n[style]\na sketch of {}\n")
    (folder / "small.yaml").write_text(SMALL)
    return folder


def arguments(world, out, **more):
    given = {"card": out, "pretrained_model_name_or_path": world / "model"}
    given |= {"people": world / "people", "test_people": 2, "enhancer_people": "rest"}
    given |= {"enhancer_config": world / "small.yaml", "score_model": world / "scoring.onnx"}
    given |= {"score_crop": "center", "clip": "none", "prompts": world / "prompts.txt"}
    given |= {"compare": "paper@steps=0,textual_inversion@steps=1;train_batch_size=1"}
    given |= {"pictures": 1, "num_inference_steps": 1, "guidance_scale": 1}
    given |= more
    words = [(f"--{name}", str(value)) for name, value in given.items() if value is not None]
    return [word for pair in words for word in pair]


def test_a_card_goes_on_where_it_stopped_and_names_nobody(world, tmp_path, monkeypatch, caplog):
    """Stopped in the enhancer's training, it keeps what was prepared; the card has numbers, hashes,
    seconds, and neither a name, nor a path, nor a picture."""
    caplog.set_level("INFO")
    out, train = tmp_path / "out", fit.run
    command = arguments(world, out)

    def stopped(cfg):
        raise Interrupted(15, "stopped")

    monkeypatch.setattr(run.fit, "run", stopped)
    assert evaluate.main(command) == 143
    assert "how long it takes" in caplog.text and "in all" in caplog.text
    assert (out / "prepared" / "index.json").is_file()
    monkeypatch.setattr(run.fit, "run", train)
    monkeypatch.setattr(run.preparing, "run", None)  # was done, and is not done again
    assert evaluate.main(command) == 0
    card = out / "card"
    about = json.loads((card / "card.json").read_text())
    assert about["people"] | {"until": 2} == about["people"]
    assert (about["people"]["test"], about["people"]["rest_people"]) == (2, 3)
    assert about["enhancer"]["was_trained_here"] and about["enhancer"]["people"] == 3
    assert {*about["seconds"]} >= {"preparing", "training the ID-Enhancer"}
    assert len(about["forecast"]) == 5 and min(about["forecast"].values()) > 0
    assert any("ID-Enhancer" in name for name in about["forecast"])  # of the first run
    assert all(len(digest) == 64 for digest in about["checkpoint"]["sha256"].values())
    summary = json.loads((card / "summary.json").read_text())
    assert len(summary["methods"]) == 2 and {*summary["floors"]} == {"person-000", "person-001"}
    assert summary["ceiling"] is not None and summary["problems"] == []
    for path in card.iterdir():
        text = path.read_text()
        assert "Secret" not in text and str(tmp_path) not in text and str(world) not in text
    assert "<img" not in (card / "report.html").read_text()
    assert "<img" in (out / "evaluation" / "report.html").read_text()
    # Everything is there: nothing is trained or drawn again, and pictures come if asked for.
    monkeypatch.setattr(run.fit, "run", None)
    monkeypatch.setattr(draw.sampling, "run", None)
    monkeypatch.setattr(people, "choose", None)
    assert evaluate.main([*command, "--with_pictures"]) == 0
    assert "<img" in (card / "report.html").read_text()
    assert json.loads((card / "card.json").read_text())["seconds"].keys() == about["seconds"].keys()
    assert evaluate.main([*command, "--pictures", "2"]) == 1  # another card


def test_a_card_of_celeb_a(world, tmp_path, monkeypatch):
    """Two people are scored, the other two train the ID-Enhancer; no name is of the data set."""
    monkeypatch.setattr(test_people, "IDENTITIES", [11, 12, 13, 14] * 3)
    monkeypatch.setattr(test_people, "PARTITION", [0] * 11 + [1])
    for name in ("raw", "data"):
        (tmp_path / name).mkdir()
    test_people.write_celeb_a(tmp_path / "data", tmp_path / "raw")
    source = {"people": None, "dataset": "celeb_a", "dataset_dir": tmp_path / "data"}
    source["compare"] = "paper@steps=0"
    assert evaluate.main(arguments(world, tmp_path / "out", **source)) == 0
    card = tmp_path / "out" / "card"
    about = json.loads((card / "card.json").read_text())
    assert about["people"] | {"test": 2, "held_out": 2, "rest_people": 2} == about["people"]
    assert about["enhancer"]["was_trained_here"] and about["enhancer"]["people"] == 2
    assert "non-commercial" in json.dumps(about["enhancer"]).lower()
    summary = json.loads((card / "summary.json").read_text())
    assert {*summary["floors"]} == {"person-000", "person-001"} and summary["problems"] == []
    assert not any(str(tmp_path) in path.read_text() for path in card.iterdir())


@pytest.mark.parametrize(
    ("change", "code", "problem"),
    [
        ({"people": "nowhere"}, 1, "nowhere does not exist"),
        ({"people": None}, 2, "missing: --people"),
        ({"test_people": 1}, 2, "2 or more"),
        ({"test_people": 5}, 1, "0 are left to train"),
        ({"photos_per_person": 4}, 1, "needs two people at least"),
        ({"score_model": "nowhere.onnx"}, 1, "nowhere.onnx does not exist"),
        ({"enhancer_config": "nowhere"}, 1, "cannot read the config file nowhere"),
        ({"enhancer": "nowhere"}, 1, "nowhere"),
        ({"compare": "nothing"}, 1, "unknown; there are"),
        ({"prompts": "nowhere"}, 1, "neither a file nor one of the sets"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(
    world, tmp_path, monkeypatch, capsys, change, code, problem
):
    monkeypatch.setattr(run.preparing, "run", None)
    assert evaluate.main(arguments(world, tmp_path / "out", **change)) == code
    assert problem in capsys.readouterr().err
    # The command that is put right is not held to this one.
    assert not (tmp_path / "out" / run.SETTINGS).exists()


def test_the_recogniser_of_training_is_refused_and_a_dry_run_writes_nothing(
    world, tmp_path, monkeypatch, capsys
):
    own = world / "model" / "face" / "arcface.onnx"
    for count in (3, 2):  # the people of a refused command are not the next one's
        command = arguments(world, tmp_path / "out", score_model=own, test_people=count)
        assert evaluate.main(command) == 1
        assert "--same_recogniser" in capsys.readouterr().err
        assert len(list((tmp_path / "out" / "people" / "photos").iterdir())) == count
    out = tmp_path / "dry"
    assert evaluate.main([*arguments(world, out), "--dry_run"]) == 0 and not out.exists()


def test_people_without_readable_photos_are_passed_over(world, caplog):
    folder = world / "few"
    shutil.copytree(world / "people", folder)
    for path in (folder / NAMES[1]).iterdir():
        path.write_bytes(b"")
    cfg = settings.CardConfig(
        card="c", pretrained_model_name_or_path="m", people=str(folder), test_people=2
    )
    invited, chosen = people.choose(cfg)
    assert (invited.test, invited.until, invited.rest_people, invited.rest_pictures) == (2, 3, 2, 6)
    assert [len(own) for own in chosen] == [3, 3]
    assert "person 2 of --people is passed over: 0 photos" in caplog.text


def test_steps_with_an_enhancer_and_without(tmp_path):
    cfg = settings.CardConfig(card="c", pretrained_model_name_or_path="m", people="p")
    comparison = cfg.evaluation("p", None, "o", "paper,paper@enhancer=none,paper@steps=3", "auto")
    trained = [
        compare.train_config(contender, comparison, tmp_path, 0)
        for contender in compare.read_contenders(comparison.compare, "m")
    ]
    assert [forecast.steps_of(each, True) for each in trained] == [25, 320, 3]
    assert [forecast.steps_of(each, False) for each in trained] == [320, 320, 3]
    assert cfg.trains_on == "celebrities"
    with pytest.raises(ConfigError, match="belong together"):
        settings.CardConfig(card="c", pretrained_model_name_or_path="m", dataset="celeb_a")


def test_devices_are_known_by_what_jax_calls_them():
    class Device:
        platform = "gpu"

        def __init__(self, kind):
            self.device_kind = kind

        def memory_stats(self):
            return {"bytes_limit": 5}

    for kind, name in (
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H200", "h200"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5p", "v5p"),
        ("TPU v4", "v4"),
        ("TPU v6 lite", "v6e"),
    ):
        assert chips.of_device(Device(kind)).name == name
    unknown = chips.of_device(Device("NVIDIA T4"))
    assert (unknown.name, unknown.bf16, unknown.room()) == ("gpu", 0, 5)


@pytest.mark.slow
def test_a_card_is_rehearsed_at_the_width_of_sd21(tmp_path):
    """All profiles on random weights with SD 2.1's text encoder, with people of the drawn world and
    the mini's face models: prepared, trained, drawn, scored."""
    random_sd.write(tmp_path / "model", size="sd21_text")
    strangers.write(tmp_path / "people", "test", 5, 1, 0)
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "prompts.txt").write_text("a photo of {}\n")
    shutil.copytree(tmp_path / "people" / "held_out", tmp_path / "people of mine")
    face = hub.MINI_FOLDER / "face"
    profiles = ("paper", "paper@enhancer=none", "official", "cross_init", "textual_inversion")
    methods = [f"{name}{';' if '@' in name else '@'}steps=1" for name in profiles]
    command = arguments(
        tmp_path,
        tmp_path / "out",
        people=tmp_path / "people of mine",
        face_model=face / "recogniser.onnx",
        score_model=face / "scoring.onnx",
        compare=",".join([*methods, "paper@steps=0"]),
        num_inference_steps=2,
        guidance_scale=7.5,
    )
    assert evaluate.main(command) == 0
    about = json.loads((tmp_path / "out" / "card" / "card.json").read_text())
    assert (about["people"]["test"], about["enhancer"]["people"]) == (2, 3)
    summary = json.loads((tmp_path / "out" / "card" / "summary.json").read_text())
    assert {*summary["methods"]} == {*methods, "paper@steps=0"} and summary["problems"] == []
    assert summary["floor"]["mean"] < summary["ceiling"]["mean"]
