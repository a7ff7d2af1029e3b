"""Faces and people through `train_jax.py`: what reaches the networks, and where results go."""

import json
import shutil
import sys

import numpy as np
import pytest
import scrfd
from PIL import Image
from safetensors import safe_open
from test_people import celeb_a  # noqa: F401  (a fixture)

import train_jax
from idea_jax import jobs
from idea_jax.config.settings import TrainConfig
from idea_jax.data import images, people
from idea_jax.faces import __main__, embedding, finding, random_model
from idea_jax.faces import models as face_models
from idea_jax.faces import table as face_table
from idea_jax.faces.crops import training_square
from idea_jax.faces.portraits import Portraits
from idea_jax.formats.identity import read_identity
from idea_jax.models import hub
from idea_jax.training import group
from idea_jax.training import learner as learners
from idea_jax.training import run as command
from idea_jax.training.photos import training_pixels

QUICK = "--max_train_steps 1 --train_batch_size 1 --report_to none".split()
CROSS = ["--profile", "cross_init", *QUICK]
# Beside the people's folders.
OF_MANY = (".lock-0", jobs.SETTINGS, jobs.MANIFEST)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """Its detector sees one face, 100 pixels large in the middle of the left half."""
    folder = tmp_path_factory.mktemp("pack")
    scrfd.write_detector(folder / "det.onnx", [scrfd.face(160, 160, 100)])
    random_model.write_random_recogniser(folder / "rec.onnx")
    return folder


@pytest.fixture
def run(random_checkpoint, tmp_path):
    def command(photos, *flags, out="out"):
        common = ["--pretrained_model_name_or_path", random_checkpoint]
        data = ["--train_data_dir", photos] if photos else []
        everything = (*common, *data, "--output_dir", tmp_path / out, *flags)
        return train_jax.main([str(flag) for flag in everything])

    return command


@pytest.fixture
def seen(monkeypatch):
    """Leaves the steps out, and keeps what they would have been given."""
    kept = {"pixels": []}

    def train_together(work, learners, finish):
        for learner in learners:
            about = learner.checkpoints.fingerprint
            kept.update(state=learner.state, photos=learner.photos, fingerprint=about)
            finish(learner)
            learner.results.close()

    encode = learners.encode_pixels

    def encode_pixels(base, pictures):
        given = list(pictures)
        kept["pixels"] = [(name, pixels) for name, pixels, _ in given]
        return encode(base, given)

    monkeypatch.setattr(group, "train_together", train_together)
    monkeypatch.setattr(learners, "encode_pixels", encode_pixels)
    return kept


def write_photos(folder, *colours, size=(640, 320)):
    """Photos of smooth noise, each tinted by a colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, colour in enumerate(colours):
        rng = np.random.default_rng(index)
        noise = Image.fromarray(rng.integers(0, 256, (8, 16, 3), np.uint8))
        tint = Image.new("RGB", size, colour)
        Image.blend(noise.resize(size, Image.Resampling.BICUBIC), tint, 0.6).save(
            folder / f"{index}.png"
        )
    return folder


# --- the square around the face -------------------------------------------------------------------


def test_crop_face_trains_on_the_square_around_it(run, seen, pack, tmp_path):
    photos = write_photos(tmp_path / "photos", "red")
    # Of a profile without a face embedding only the detector is used.
    assert run(photos, *CROSS, "--crop", "face", "--face_model_dir", pack) == 0
    ((name, pixels),) = seen["pixels"]
    image = images.read_image(photos / "0.png")
    points = (scrfd.TEMPLATE - 56) * 100 / 112 + 160  # the detector's 640 are the photo's width
    centre, side, angle = training_square(points.astype(np.float32), image.size)
    assert 100 < side < 250 and abs(angle) < 0.01 and name == "0.png"
    expected = images.crop_turned(image, centre, side, angle)
    np.testing.assert_array_equal(pixels, images.to_pixels(expected, 32, center_crop=False))
    for crop in ("center", "none"):
        assert run(photos, *CROSS, "--crop", crop) == 0
        expected = images.to_pixels(image, 32, center_crop=crop == "center")
        np.testing.assert_array_equal(seen["pixels"][0][1], expected)


def test_a_face_that_is_too_small_to_train_on_is_reported(tmp_path, caplog):
    photos = write_photos(tmp_path / "photos", "red", "blue")
    pictures = [images.PictureFile(photos / name) for name in ("0.png", "1.png")]
    points = [((scrfd.TEMPLATE - 56) * side / 112 + 160).astype(np.float32) for side in (20, 100)]
    sights = [face_table.Sight(None, five, 1.0, "", None) for five in points]
    cfg = TrainConfig("mini", "photos", profile="cross_init", crop="face")
    portraits = Portraits(pictures, sights, None)
    widths = [training_square(five, (640, 320))[1] for five in points]
    list(training_pixels(cfg, portraits, 2 * widths[0]))
    assert caplog.text == ""
    ((name, pixels, sizes), _) = training_pixels(cfg, portraits, 2 * widths[0] + 1)
    assert sizes == (widths[0], widths[0], 0, 0, 2 * widths[0] + 1, 2 * widths[0] + 1)
    assert name == "0.png" and pixels.shape == (2 * widths[0] + 1,) * 2 + (3,)
    assert "on 1 of 2 photos the square around the face is smaller than half" in caplog.text
    assert f"0.png ({widths[0]} pixels)" in caplog.text and "1.png" not in caplog.text


# --- precomputed faces ----------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["cross_init", "official"])
def test_a_run_on_precomputed_faces_resumes_a_direct_one(
    run, seen, pack, tmp_path, monkeypatch, profile
):
    """Also without an embedding, and where the direct one looked for faces on a GPU."""
    monkeypatch.setitem(face_models.PROVIDERS, "cuda", face_models.PROVIDERS["cpu"])
    photos, table = write_photos(tmp_path / "photos", "red"), tmp_path / "faces.safetensors"
    flags = ["--profile", profile, *QUICK, "--crop", "face"]
    assert run(photos, *flags, "--face_model_dir", pack, "--face_provider", "cuda") == 0
    direct = seen["fingerprint"]
    assert __main__.main([str(x) for x in (photos, "--out", table, "--face_model_dir", pack)]) == 0
    assert run(photos, *flags, "--face_embeddings", table) == 0
    assert seen["fingerprint"] == direct
    assert ("face_model" in direct) == (profile == "official") and direct["detector"] is not None


def test_precomputed_faces_do_without_onnxruntime(run, seen, pack, tmp_path, monkeypatch, caplog):
    photos = write_photos(tmp_path / "photos", "red", "brown", "orange")
    flags, models = [*QUICK, "--crop", "face"], ["--face_model_dir", pack, "--face_select", "left"]
    assert run(photos, *flags, *models) == 0
    direct, fingerprint, pixels = seen["state"], seen["fingerprint"], seen["pixels"]
    table = tmp_path / "faces.safetensors"
    assert __main__.main([str(x) for x in (photos, "--out", table, *models)]) == 0
    for package in ("onnxruntime", "onnx", "insightface", "cv2"):
        for module in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, package, None)
    caplog.clear()
    assert run(photos, *flags, "--face_embeddings", table) == 0
    np.testing.assert_array_equal(
        direct.given["id_embed"], seen["state"].given["id_embed"], strict=True
    )
    np.testing.assert_allclose(np.linalg.norm(direct.given["id_embed"]), 1, rtol=1e-6)
    for (_, ours), (_, theirs) in zip(pixels, seen["pixels"], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert seen["fingerprint"] == fingerprint  # a checkpoint of one resumes the other
    path = tmp_path / "out" / "identity.safetensors"
    assert path.stat().st_mode & 0o777 == 0o600  # the embedding is in it
    with safe_open(path, "numpy") as file:
        told = json.dumps(file.metadata()) + caplog.text
    for value in np.abs(np.asarray(direct.given["id_embed"])[:50]):
        assert f"{value:.5f}"[1:] not in told


def test_pictures_that_were_not_precomputed_are_named(run, pack, tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", "red")
    table = tmp_path / "faces.safetensors"
    assert __main__.main([str(photos), "--out", str(table), "--face_model_dir", str(pack)]) == 0
    write_photos(photos, "blue", "green")
    capsys.readouterr()
    assert run(photos, *QUICK, "--face_embeddings", table) == 1
    message = capsys.readouterr().err
    assert "0.png is not among the 1 pictures of --face_embeddings" in message


def test_pictures_without_a_row_are_left_out(run, seen, pack, tmp_path, caplog):
    """The two commands of a folder with one photo without a face, in which others have one."""
    photos = write_photos(tmp_path / "photos", "red")
    table = tmp_path / "faces.safetensors"
    assert __main__.main([str(photos), "--out", str(table), "--face_model_dir", str(pack)]) == 0
    Image.new("RGB", (64, 64)).save(photos / "wall.png")
    assert run(photos, *QUICK, "--crop", "face", "--face_embeddings", table) == 0
    assert "left out" in caplog.text and "wall.png is not among the 1 pictures" in caplog.text
    assert [name for name, _ in seen["pixels"]] == ["0.png"]
    assert int(seen["photos"].count) == 1


# --- several photos -------------------------------------------------------------------------------


def test_photo_of_somebody_else_is_reported_and_left_out_if_asked(
    run, seen, pack, tmp_path, caplog
):
    photos = write_photos(tmp_path / "photos", "red")
    for index in range(1, 4):
        image = images.read_image(photos / "0.png")
        image.point(lambda value, by=index: min(255, value + by)).save(photos / f"{index}.png")
    Image.effect_noise((640, 320), 250).convert("RGB").save(photos / "stranger.png")
    flags = [photos, *QUICK, "--face_model_dir", pack]
    assert run(*flags) == 0
    assert "stranger.png is unlike the other photos" in caplog.text
    assert "--drop_outliers leaves it out" in caplog.text
    assert int(seen["photos"].count) == 5
    with_stranger = np.asarray(seen["state"].given["id_embed"])
    assert run(*flags, "--drop_outliers", "--overwrite") == 0
    assert "It is left out" in caplog.text
    assert int(seen["photos"].count) == 4
    (photos / "stranger.png").unlink()
    finder = finding.open_finder(pack / "rec.onnx")
    embeds = [finder.look(images.PictureFile(p)).embed for p in sorted(photos.iterdir())]
    mean = embedding.mean_embedding(np.stack(embeds))
    np.testing.assert_array_equal(mean, seen["state"].given["id_embed"])
    assert mean @ with_stranger < 0.999


def test_two_files_with_the_same_bytes_count_once(run, seen, tmp_path, caplog):
    photos = write_photos(tmp_path / "photos", "red", "blue")
    shutil.copy(photos / "0.png", photos / "copy.png")
    assert run(photos, *CROSS) == 0
    assert int(seen["photos"].count) == 2
    assert "skipped copy.png: a copy of 0.png" in caplog.text


def test_files_that_cannot_be_read_are_left_out(run, seen, tmp_path, caplog, capsys):
    photos = write_photos(tmp_path / "root" / "anna", "red", "blue")
    (photos / "0.png").write_bytes((photos / "0.png").read_bytes()[:200])
    (photos / "notes.jpg").write_text("no picture")
    assert run(photos, *CROSS, "--pictures_per_person", "1") == 0
    assert [name for name, _ in seen["pixels"]] == ["1.png"]
    for name in ("0.png is cut off or damaged", "notes.jpg is not a JPEG"):
        assert any("left out" in line and name in line for line in caplog.text.splitlines())
    # Of several people as well; but a picture must be left of each.
    other = write_photos(tmp_path / "root" / "bert", "green")
    good = (other / "0.png").read_bytes()
    (other / "0.png").write_text("no picture")
    assert run(tmp_path / "root", *CROSS) == 1
    assert f"{other / '0.png'} is not a JPEG" in capsys.readouterr().err
    (other / "0.png").write_bytes(good)
    assert run(tmp_path / "root", *CROSS) == 0


# --- several people -------------------------------------------------------------------------------


def test_people_in_folders_become_what_each_becomes_alone(run, tmp_path):
    root = tmp_path / "root"
    write_photos(root / "anna", "red", "brown")
    write_photos(root / "bert", "blue")
    write_photos(root / "carl", "green")
    one_by_one = ["--mesh", "identity=1", "--identities", "0:2", "--pictures_per_person", "1"]
    assert run(root, *CROSS, *one_by_one) == 0
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"anna", "bert", *OF_MANY}
    assert run(root / "bert", *CROSS, out="alone") == 0
    for name in ("identity.safetensors", "learned_embeds.safetensors"):
        assert (out / "bert" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    for name, count in (("anna", 1), ("bert", 0)):
        assert len(json.loads((out / name / "run.json").read_text())["held_out"]) == count


def test_names_that_are_no_utf8_are_kept(run, seen, tmp_path, capsys):
    """What a finished training wrote does not depend on how a photo or a person is called."""
    photos = write_photos(tmp_path / "root" / "caf\udce9", "red", "brown")
    for name in ("0", "1"):
        (photos / f"{name}.png").rename(photos / f"{name}\udce9.png")
    assert run(photos, *CROSS, "--pictures_per_person", "1", out="one") == 0
    assert run(photos.parent, *CROSS, "--pictures_per_person", "1") == 0
    for folder in (tmp_path / "one", tmp_path / "out" / "caf\udce9"):
        (name,) = json.loads((folder / "run.json").read_text("utf-8"))["held_out"]
        assert name in ("0\udce9.png", "1\udce9.png")
    assert "caf\\udce9/identity.safetensors" in capsys.readouterr().out


def test_celeb_a_people_are_trained(run, seen, celeb_a, tmp_path):  # noqa: F811
    dataset = ["--dataset", "celeb_a", "--dataset_dir", celeb_a, "--identities", "0:2"]
    assert run(None, *CROSS, *dataset, "--pictures_per_person", "1") == 0
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"00007", "00091", *OF_MANY}
    for name, held_out in (("00007", 2), ("00091", 0)):
        assert read_identity(out / name / "identity.safetensors").base_model == "tiny"
        assert len(json.loads((out / name / "run.json").read_text())["held_out"]) == held_out
    (picture,) = people.from_celeb_a(celeb_a)["00091"]  # the last one that was begun
    ((_, pixels),) = seen["pixels"]
    expected = images.to_pixels(picture.read(), 32, center_crop=True)
    np.testing.assert_array_equal(pixels, expected)


def test_faces_of_celeb_a_are_precomputed(run, seen, celeb_a, tmp_path, capsys, caplog):  # noqa: F811
    """The same people as in training; their embedding is that of a direct run."""
    caplog.set_level("INFO")
    folder = tmp_path / "pack"
    folder.mkdir()
    scrfd.write_detector(folder / "det.onnx", [scrfd.face(320, 320, 100)])
    random_model.write_random_recogniser(folder / "rec.onnx")
    dataset = ["--dataset", "celeb_a", "--dataset_dir", celeb_a, "--identities", "0:2"]
    table, models = tmp_path / "faces.safetensors", ["--face_model_dir", folder]
    assert __main__.main([str(x) for x in (*dataset, "--out", table, *models)]) == 0
    assert capsys.readouterr().out == f"{table}\n"
    assert "CelebA is for non-commercial research only" in caplog.text
    found = people.choose(people.from_celeb_a(celeb_a), "0:2")
    names = sorted(picture.name for pictures in found.values() for picture in pictures)
    assert sorted(face_table.read(table).names.values()) == names and len(names) == 4
    assert run(None, *QUICK, *dataset, *models) == 0
    direct = np.asarray(seen["state"].given["id_embed"])
    assert run(None, *QUICK, *dataset, "--face_embeddings", table, out="other") == 0
    np.testing.assert_array_equal(seen["state"].given["id_embed"], direct)
    for flags, says in (
        (["--identities", "a:b"], "must be FROM:TO"),
        (["--identities", "5:"], "holds nobody"),
        (["--dataset_dir", tmp_path, "--identities", "0:2"], "no prepared CelebA"),
    ):
        assert __main__.main([str(x) for x in (*dataset, *flags, "--out", table, *models)]) == 1
        assert says in capsys.readouterr().err


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--identities", "0:2"], "holds the photos of one person"),
        (["--pictures_per_person", "2"], "the folder has 1 picture(s), fewer than"),
        (["--crop", "face"], "face has no detection model: arcface.onnx (recognition)"),
        (["--profile", "paper", "--face_select", "first"], "--face_select must be one of largest"),
        (["--profile", "paper", "--face_select", "left"], "has no detection model"),
        (["--profile", "paper", "--face_provider", "cuda"], "--face_provider cuda: CUDA"),
        (["--profile", "paper", "--face_embeddings", "none"], "python -m idea_jax.faces PHOTOS"),
        (["--profile", "paper", "--face_model_dir", "none"], "folder none does not exist"),
    ],
)
def test_bad_input_is_named_and_costs_no_earlier_result(run, tmp_path, capsys, flags, says):
    photos = write_photos(tmp_path / "photos", "red")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "identity.safetensors").write_text("an earlier result")
    assert run(photos, *CROSS, *flags) == 1
    message = capsys.readouterr().err
    assert says in message and message.count("error: ") == 1 and "Traceback" not in message
    assert (tmp_path / "out" / "identity.safetensors").read_text() == "an earlier result"


def test_photo_without_a_face_is_named(run, tmp_path, capsys):
    pack = tmp_path / "pack"
    pack.mkdir()
    scrfd.write_detector(pack / "det.onnx", [])
    random_model.write_random_recogniser(pack / "rec.onnx")
    photos = write_photos(tmp_path / "photos", "red")
    assert run(photos, *QUICK, "--face_model_dir", pack) == 1
    message = capsys.readouterr().err
    assert f"no face found in {photos / '0.png'}" in message and "--pre_aligned" in message


def test_people_with_too_few_pictures_stop_nobody_else(run, seen, tmp_path, capsys):
    root = tmp_path / "root"
    for name, colours in (("anna", ["red"]), ("bert", ["red", "blue"]), ("carl", ["green"])):
        write_photos(root / name, *colours)
    assert run(root, *CROSS, "--pictures_per_person", "2") == 1
    message = capsys.readouterr().err
    assert "2 of 3 people failed" in message
    assert "anna has 1 picture(s), fewer than" in message and "carl has 1" in message
    assert (tmp_path / "out" / "bert" / "identity.safetensors").exists()
    assert run(root, *CROSS, "--pictures_per_person", "3", out="none") == 1
    assert "all of the 3 people have fewer" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_person_with_the_name_of_the_list_of_people_is_refused(run, tmp_path, capsys):
    for name in ("anna", "jobs.jsonl"):
        write_photos(tmp_path / "root" / name, "red")
    assert run(tmp_path / "root", *CROSS) == 1
    assert "nobody can be called jobs.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_cheap_to_see_comes_before_pictures_are_read(run, tmp_path, capsys, monkeypatch):
    """A choice that is none, and the folder of the last person that cannot be written to."""
    root = tmp_path / "root"
    for name in ("anna", "bert"):
        write_photos(root / name, "red")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "bert").write_text("a file")
    with monkeypatch.context() as patch:
        patch.setattr(hub, "resolve", None)  # must not be called
        assert run(root, *CROSS) == 1
        assert "cannot write" in capsys.readouterr().err
        patch.setattr(command, "people_of", None)
        assert run(root, *CROSS, "--identities", "a:b") == 1
        assert "must be FROM:TO" in capsys.readouterr().err
        assert run(root, *QUICK, "--face_select", "first") == 1
        assert "--face_select must be one of" in capsys.readouterr().err


def test_resuming_several_people_takes_the_latest_only(run, tmp_path, capsys):
    write_photos(tmp_path / "root" / "anna", "red")
    assert run(tmp_path / "root", *CROSS, "--resume_from_checkpoint", "out/checkpoints/3") == 1
    assert "only latest can be used" in capsys.readouterr().err
