"""Packs of face models: which files are taken, and what is said of folders that are none."""

import hashlib
import json
import os
import shutil
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scrfd
from PIL import Image

from idea_jax.faces import embedding, finding, packs, random_model
from idea_jax.faces import models as face_models

FOUND = [scrfd.face(320, 320, 200)]


@pytest.fixture
def pack(tmp_path):
    """A folder like buffalo_l, with models for other things in it, too."""
    folder = tmp_path / "some_pack"
    folder.mkdir()
    random_model.write_random_recogniser(folder / "1k3d68.onnx", size=192)
    scrfd.write_detector(folder / "det.onnx", FOUND)
    random_model.write_random_recogniser(folder / "genderage.onnx", size=96)
    random_model.write_random_recogniser(folder / "rec.onnx")
    (folder / "README.txt").write_text("not a model")
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder; returns where insightface would keep its packs there."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home" / ".insightface" / "models"


def find(folder=None, *, file=None, own=None, accept=False):
    return packs.find_recogniser(file, folder, own, accept_licence=accept)


def test_pack_files_are_told_apart_by_what_they_are(pack, caplog):
    caplog.set_level("INFO")
    assert find(pack) == pack / "rec.onnx"
    assert packs.find_in_pack(pack, "detection") == pack / "det.onnx"
    finder = finding.open_finder(find(pack))
    assert finder.detector.path.name == "det.onnx"
    assert finder.detector.provider == finder.recogniser.provider == "CPUExecutionProvider"
    assert "the face models run on the CPUExecutionProvider" in caplog.text


def test_order_in_which_models_are_looked_for(pack, home, tmp_path):
    own = tmp_path / "checkpoint" / "face"
    with pytest.raises(face_models.FaceError, match="--face_model_dir PACK.*--accept_face_licence"):
        find(own=own)
    for name in ("antelopev2", "buffalo_l"):
        (home / name).mkdir(parents=True)
        random_model.write_random_recogniser(home / name / f"{name}.onnx")
        assert find(own=own).name == f"{name}.onnx"
    own.mkdir(parents=True)
    random_model.write_random_recogniser(own / "own.onnx")
    assert find(own=own).name == "own.onnx"
    assert find(pack, own=own).name == "rec.onnx"
    assert find(file="given.onnx", own=own).name == "given.onnx"


def empty(pack):
    for path in pack.iterdir():
        path.unlink()


def only_a_zip(pack):
    empty(pack)
    (pack / "buffalo_l.zip").write_bytes(b"PK")


def nested(pack):
    inner = pack.parent / "inner"
    pack.rename(inner)
    pack.mkdir()
    inner.rename(pack / "buffalo_l")


def no_recogniser(pack):
    (pack / "rec.onnx").unlink()


def damaged_recogniser(pack):
    (pack / "rec.onnx").write_bytes(b"<html>not found</html>")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (empty, "holds no .onnx file, but nothing"),
        (only_a_zip, "holds no .onnx file, but buffalo_l.zip"),
        (nested, "some_pack/buffalo_l does .*: give --face_model_dir .*some_pack/buffalo_l"),
        (no_recogniser, r"has no recognition model: 1k3d68.onnx .*, det.onnx \(detection\)"),
        (damaged_recogniser, r"has no recognition model: .*rec.onnx \(damaged\)"),
    ],
)
def test_pack_that_is_none_is_named_with_what_was_expected(pack, change, says):
    change(pack)
    with pytest.raises(face_models.FaceError, match=rf"(?s){says}.*det_10g.onnx.*w600k_r50.onnx"):
        find(pack)


def test_pack_that_is_a_file_or_absent(pack):
    with pytest.raises(
        face_models.FaceError, match=r"does not exist; expected a folder of insightface"
    ):
        find(pack / "none")
    with pytest.raises(face_models.FaceError, match=r"rec.onnx is a file.*--face_model"):
        find(pack / "rec.onnx")


def test_pack_that_cannot_be_read(pack, monkeypatch):
    def forbidden(self):
        raise PermissionError(13, "Permission denied", str(self))

    if os.geteuid() == 0:  # root may read everything
        monkeypatch.setattr(type(pack), "iterdir", forbidden)
    else:
        pack.chmod(0)
    with pytest.raises(face_models.FaceError, match="some_pack cannot be read: Permission denied"):
        find(pack)
    pack.chmod(0o755)


def test_pack_without_detector(pack, caplog):
    (pack / "det.onnx").unlink()
    says = r"no detection model: .*Add the detector .*det_10g\.onnx.*--face_model FILE"
    with pytest.raises(face_models.FaceError, match=says):
        finding.open_finder(find(pack))
    # Aligned crops need none, and a recogniser alone is used with a warning.
    assert finding.open_finder(find(pack), pre_aligned=True).detector is None
    assert "central square" not in caplog.text
    assert finding.open_finder(find(pack), needs_detector=False).detector is None
    assert "central square of each photo is taken for the face" in caplog.text


@pytest.mark.parametrize("needed", [True, False])
def test_detector_that_is_there_but_unusable_is_an_error(pack, needed):
    (pack / "det.onnx").write_bytes(b"cut off")
    with pytest.raises(face_models.FaceError, match=r"det.onnx \(damaged\).*Replace or remove"):
        finding.open_finder(find(pack), needs_detector=needed)
    scrfd.write_detector(pack / "det.onnx", FOUND, points=False)
    with pytest.raises(face_models.FaceError, match="not an SCRFD face detector"):
        finding.open_finder(find(pack), needs_detector=needed)
    (pack / "manifest.json").write_text('{"manifest_version": 2}')
    with pytest.raises(face_models.FaceError, match="the manifest of the face model folder"):
        finding.open_finder(pack / "rec.onnx", needs_detector=needed)


# --- hashes ---------------------------------------------------------------------------------------


@pytest.fixture
def no_onnxruntime(monkeypatch):
    import onnxruntime
    from insightface.model_zoo import model_zoo  # derives a class from the one replaced here

    def session(*_, **__):
        raise AssertionError("onnxruntime has been given the file")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(model_zoo, "PickableInferenceSession", session)


@pytest.mark.parametrize("name", ["w600k_r50.onnx", "glintr100.onnx"])
def test_known_file_with_another_hash_is_refused_before_onnxruntime(pack, no_onnxruntime, name):
    (pack / "rec.onnx").rename(pack / name)
    digest = hashlib.sha256((pack / name).read_bytes()).hexdigest()
    with pytest.raises(
        face_models.FaceError,
        match=rf"{digest}, expected {face_models.KNOWN_SHA256[name]}.*download the pack again",
    ):
        face_models.load_recogniser(pack / name)
    (pack / "det.onnx").rename(pack / "det_10g.onnx")
    with pytest.raises(face_models.FaceError, match="expected 5838f7fe"):
        face_models.load_detector(pack / "det_10g.onnx")


def test_known_file_with_its_hash_is_taken(pack, monkeypatch):
    digest = hashlib.sha256((pack / "rec.onnx").read_bytes()).hexdigest()
    monkeypatch.setitem(face_models.KNOWN_SHA256, "rec.onnx", digest)
    assert face_models.load_recogniser(pack / "rec.onnx").sha256 == digest


def test_known_hashes_are_hashes():
    for value in face_models.KNOWN_SHA256.values():
        assert len(bytes.fromhex(value)) == 32


def write_manifest(pack, **hashes):
    tasks = {
        "detection": {"file": "det.onnx", "preprocessing": {"mean": 100.0, "std": 50.0}},
        "recognition": {"file": "rec.onnx", "preprocessing": {"mean": 120.0, "std": 60.0}},
    }
    for task, digest in hashes.items():
        tasks[task]["sha256"] = digest
    manifest = {"manifest_version": 2, "model_id": "own", "license": "MODEL.LICENSE"}
    (pack / "manifest.json").write_text(json.dumps({**manifest, "tasks": tasks}))


def test_manifest_of_a_pack_names_files_hashes_and_preprocessing(pack, monkeypatch):
    digest = hashlib.sha256((pack / "rec.onnx").read_bytes()).hexdigest()
    random_model.write_random_recogniser(pack / "a.onnx")  # first by name, but not the one named
    write_manifest(pack, recognition=digest)
    finder = finding.open_finder(find(pack))
    assert finder.recogniser.path.name == "rec.onnx"
    assert (finder.recogniser.model.input_mean, finder.recogniser.model.input_std) == (120, 60)
    assert (finder.detector.model.input_mean, finder.detector.model.input_std) == (100, 50)


def test_manifest_without_a_hash_does_not_switch_off_a_known_one(pack, no_onnxruntime, monkeypatch):
    write_manifest(pack)
    for name, load in (
        ("rec.onnx", face_models.load_recogniser),
        ("det.onnx", face_models.load_detector),
    ):
        monkeypatch.setitem(face_models.KNOWN_SHA256, name, "1" * 64)
        with pytest.raises(face_models.FaceError, match=f"is not the file .* expected {'1' * 64}"):
            load(pack / name)


@pytest.mark.parametrize("name", ["rec.onnx", "det.onnx"])
@pytest.mark.parametrize("manifest", [False, True])
def test_what_is_run_is_what_was_inspected(pack, monkeypatch, name, manifest):
    """The file is changed between the two: its bytes are run that were read, or it is refused."""
    inspect = face_models.inspect

    def inspect_and_change(path, expected):
        seen = inspect(path, expected)
        random_model.write_random_recogniser(path, seed=9)
        return seen

    monkeypatch.setattr(face_models, "inspect", inspect_and_change)
    load = face_models.load_recogniser if name == "rec.onnx" else face_models.load_detector
    if manifest:
        write_manifest(pack)
        with pytest.raises(face_models.FaceError, match="SHA-256 mismatch"):
            load(pack / name)
        return
    digest = hashlib.sha256((pack / name).read_bytes()).hexdigest()
    loaded = load(pack / name)
    assert loaded.sha256 == digest
    if name == "rec.onnx":
        crop = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
        random_model.write_random_recogniser(pack / name)
        monkeypatch.undo()
        again = embedding.embed_faces(load(pack / name), [crop])
        np.testing.assert_array_equal(embedding.embed_faces(loaded, [crop]), again)
    else:
        assert len(finding.detect(loaded, Image.new("RGB", (640, 640)))) == 1


def test_manifest_with_another_hash_is_refused_before_onnxruntime(pack, no_onnxruntime):
    write_manifest(pack, recognition="0" * 64)
    with pytest.raises(face_models.FaceError, match=f"is not the file .* expected {'0' * 64}"):
        face_models.load_recogniser(find(pack))


def test_manifest_that_is_damaged(pack):
    write_manifest(pack)
    text = (pack / "manifest.json").read_text()
    (pack / "manifest.json").write_text(text.replace("det.onnx", "../det.onnx"))
    with pytest.raises(
        face_models.FaceError, match="manifest of the face model folder .*some_pack"
    ):
        find(pack)
    (pack / "manifest.json").write_text(text.replace('"recognition"', '"other"'))
    with pytest.raises(face_models.FaceError, match="names no recognition model"):
        find(pack)


# --- the download ---------------------------------------------------------------------------------


def test_download_only_after_the_licence_was_accepted(pack, home, monkeypatch, caplog, capsys):
    """insightface's own code unpacks what its HTTP library, replaced here, returns."""
    archive = pack.parent / "buffalo_l.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in pack.glob("*.onnx"):
            file.write(path, path.name)
    content = archive.read_bytes()
    asked = []

    def get(url, **_):
        asked.append(url)
        return types.SimpleNamespace(
            status_code=200, headers={}, iter_content=lambda chunk_size: [content]
        )

    import requests

    monkeypatch.setattr(requests, "get", get)
    with pytest.raises(face_models.FaceError, match="non-commercial research only"):
        find()
    assert asked == [] and not home.exists()
    assert find(accept=True) == home / "buffalo_l" / "rec.onnx"
    assert len(asked) == 1 and asked[0].endswith("/buffalo_l.zip")
    assert capsys.readouterr().out == ""  # standard output is for results
    found = find()
    assert found == home / "buffalo_l" / "rec.onnx"  # found now, without a second download
    assert len(asked) == 1
    caplog.set_level("INFO")
    digest = hashlib.sha256(found.read_bytes()).hexdigest()
    monkeypatch.setitem(face_models.KNOWN_SHA256, found.name, digest)
    finding.open_finder(found)
    assert caplog.text.count("non-commercial research only") == 1  # of the download, too


@pytest.mark.parametrize("case", ["own", "recogniser", "detector", "detector alone", "manifest"])
def test_licence_is_said_once_of_what_is_insightfaces(pack, monkeypatch, caplog, case):
    caplog.set_level("INFO")
    name = {"recogniser": "rec.onnx", "detector": "det.onnx", "detector alone": "det.onnx"}
    if case in name:
        digest = hashlib.sha256((pack / name[case]).read_bytes()).hexdigest()
        monkeypatch.setitem(face_models.KNOWN_SHA256, name[case], digest)
    if case == "manifest":
        write_manifest(pack)
    finding.open_finder(find(pack), embeds=case != "detector alone")
    assert caplog.text.count("non-commercial research only") == (case != "own")
    assert ("MODEL.LICENSE says otherwise" in caplog.text) == (case == "manifest")


@pytest.mark.parametrize(
    ("folder", "file", "said"),
    [
        ("own", "scrfd_2.5g_bnkps.onnx", True),
        ("own", "det_2.5g.onnx", True),
        ("own", "R100_Glint360K.onnx", True),
        ("own", "glint360k_r50.onnx", True),
        ("own", "ms1mv3_r18.onnx", True),
        ("buffalo_m", "x.onnx", True),
        ("antelope", "x.onnx", True),
        ("own", "recogniser.onnx", False),
        ("own", "my_scrfd.onnx", False),
    ],
)
def test_licence_is_that_of_every_pack_and_file_that_insightface_names(
    tmp_path, folder, file, said
):
    assert bool(packs.licence([tmp_path / folder / file])) == said


@pytest.mark.parametrize("content", [None, b"<html>404</html>"])
def test_download_that_fails_leaves_nothing_that_looks_like_a_pack(home, monkeypatch, content):
    import requests

    def get(url, **_):
        if content is None:
            raise requests.ConnectionError("no network")
        return types.SimpleNamespace(
            status_code=200, headers={}, iter_content=lambda chunk_size: [content]
        )

    monkeypatch.setattr(requests, "get", get)
    with pytest.raises(
        face_models.FaceError, match=r"could not download buffalo_l.*--face_model_dir"
    ):
        find(accept=True)
    assert not (home / "buffalo_l").exists()


def test_unpacking_that_is_interrupted_leaves_nothing(pack, home, monkeypatch):
    """The same command downloads again, instead of taking half a pack for the whole one."""
    from insightface.utils import storage

    def ensure_available(sub_dir, name, root):
        folder = Path(root) / sub_dir / name
        folder.mkdir(parents=True)
        shutil.copy(pack / "rec.onnx", folder)
        if stop:
            raise stop.pop()
        shutil.copy(pack / "det.onnx", folder)
        return str(folder)

    monkeypatch.setattr(storage, "ensure_available", ensure_available)
    stop = [OSError(28, "No space left on device"), KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        find(accept=True)
    assert list(home.iterdir()) == []
    with pytest.raises(face_models.FaceError, match="No space left"):
        find(accept=True)
    assert list(home.iterdir()) == []
    assert find(accept=True) == home / "buffalo_l" / "rec.onnx"
    assert [path.name for path in home.iterdir()] == ["buffalo_l"]


def test_damaged_pack_in_insightfaces_own_folder_can_be_removed(home):
    (home / "buffalo_l").mkdir(parents=True)
    (home / "buffalo_l" / "w600k_r50.onnx").write_bytes(b"cut off")
    with pytest.raises(
        face_models.FaceError, match=r"Remove .*buffalo_l to have a pack downloaded"
    ):
        find()


def test_packages_that_are_missing_are_named(pack, monkeypatch):
    write_manifest(pack)
    monkeypatch.setitem(sys.modules, "insightface.model_zoo", None)
    with pytest.raises(face_models.FaceError, match="pip install insightface onnxruntime"):
        find(pack)


@pytest.mark.parametrize(
    ("package", "manifest"), [("insightface.model_zoo", True), ("onnx", False)]
)
def test_a_missing_package_is_no_reason_to_remove_a_pack(
    pack, home, monkeypatch, package, manifest
):
    if manifest:
        write_manifest(pack)
    shutil.copytree(pack, home / "buffalo_l")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        face_models.FaceError, match="pip install insightface onnxruntime"
    ) as caught:
        find()
    assert "Remove" not in str(caught.value)


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(face_models.FaceError, match="needs a face model"):
        packs.find_recogniser(None, None, None, accept_licence=False)
    with pytest.raises(face_models.FaceError, match="no home folder.*--face_model_dir"):
        packs.find_recogniser(None, None, None, accept_licence=True)
    with pytest.raises(face_models.FaceError, match="~/pack does not exist"):
        packs.find_recogniser(None, "~/pack", None, accept_licence=False)


def test_a_pointer_of_git_lfs_in_a_pack_is_named_as_such(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    (tmp_path / "w600k_r50.onnx").write_text(pointer)
    with pytest.raises(face_models.FaceError, match="pointer of git-lfs, run git lfs pull"):
        packs.find_in_pack(tmp_path, "recognition")
