"""The precomputed faces: what is written, what is refused, and that nothing is computed twice."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import scrfd
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from idea_jax.data import folders, images
from idea_jax.faces import __main__, finding, random_model
from idea_jax.faces import models as face_models
from idea_jax.faces import table as face_table
from idea_jax.faces.precompute import precompute


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pack")
    scrfd.write_detector(folder / "det.onnx", [scrfd.face(320, 320, 300)])
    random_model.write_random_recogniser(folder / "rec.onnx")
    return folder


@pytest.fixture
def photos(tmp_path):
    """Four good photos, one of them in a sub-folder and one a copy; two bad ones; a stray file."""
    folder = tmp_path / "photos"
    (folder / "anna").mkdir(parents=True)
    for index, name in enumerate(["a.png", "b.jpg", "anna/c.png"]):
        Image.effect_noise((64, 64), 50 + 20 * index).convert("RGB").save(folder / name)
    shutil.copy(folder / "a.png", folder / "copy.png")
    (folder / "text.jpg").write_text("not a picture")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:500])
    (folder / ".DS_Store").write_bytes(b"\0")
    return folder


@pytest.fixture
def run(pack, photos, tmp_path, capsys):
    def command(*flags, out="faces.safetensors"):
        common = [photos, "--out", tmp_path / out, "--face_model_dir", pack]
        code = __main__.main([str(x) for x in (*common, *flags)])
        return code, capsys.readouterr()

    return command


@pytest.fixture
def looked(monkeypatch):
    """Names of the pictures that were really looked at."""
    names, look = [], finding.Finder.look

    def noted(self, picture):
        names.append(picture.name)
        return look(self, picture)

    monkeypatch.setattr(finding.Finder, "look", noted)
    return names


def test_folder_is_computed_and_bad_pictures_are_listed(run, photos, pack, tmp_path, looked):
    code, printed = run()
    out = tmp_path / "faces.safetensors"
    assert code == 0 and printed.out == f"{out}\n"
    assert "2 of 6 pictures cannot be used" in printed.err
    table_lines = [line for line in printed.err.splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in table_lines] == ["cut.png", "text.jpg"]
    assert "a text file" in printed.err and "cut off or damaged" in printed.err
    assert sorted(looked) == ["a.png", "b.jpg", "c.png", "cut.png", "text.jpg"]  # not the copy
    table = face_table.read(out)
    assert sorted(table.names.values()) == ["b.jpg", "c.png", "copy.png"]
    finder = finding.open_finder(pack / "rec.onnx")
    for name in ("a.png", "b.jpg", "anna/c.png", "copy.png"):
        picture = images.PictureFile(photos / name)
        read, found = table.look(picture), finder.look(picture)
        for ours, theirs in zip(read, found, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_same_command_goes_on_where_it_stopped(run, photos, tmp_path, looked, monkeypatch):
    """Stopped by the user at the third picture; nothing that was done before is done again."""
    real = finding.Finder.look

    def stops(self, picture):
        if picture.name == "c.png":
            raise KeyboardInterrupt
        return real(self, picture)

    with monkeypatch.context() as patch:
        patch.setattr(finding.Finder, "look", stops)
        code, printed = run()
    assert code == 130 and "goes on" in printed.err
    assert "2 of 6 pictures cannot be used" in printed.err and "  text.jpg" in printed.err
    assert len(face_table.read(tmp_path / "faces.safetensors").rows) == 2
    looked.clear()
    assert run()[0] == 0
    assert looked == ["cut.png", "text.jpg", "c.png"]
    whole = (tmp_path / "faces.safetensors").read_bytes()
    assert run(out="straight.safetensors")[0] == 0
    assert (tmp_path / "straight.safetensors").read_bytes() == whole
    # A picture that came later is added; one that is gone keeps its row.
    (photos / "b.jpg").unlink()
    Image.effect_noise((64, 64), 20).convert("RGB").save(photos / "new.png")
    looked.clear()
    assert run()[0] == 0
    assert "new.png" in looked and "a.png" not in looked
    assert len(face_table.read(tmp_path / "faces.safetensors").rows) == 4


@pytest.fixture
def pictures(photos):
    return [images.PictureFile(photos / name) for name in ("a.png", "b.jpg", "anna/c.png")]


def test_rows_are_saved_on_the_way(pack, pictures, tmp_path, monkeypatch):
    """Every 30 seconds, of which each picture takes 16; the save itself takes 100."""
    sizes, now = [], [0.0]
    look, write = finding.Finder.look, face_table.write

    def slow_look(self, picture):
        now[0] += 16
        return look(self, picture)

    def slow_write(path, table):
        now[0] += 100
        sizes.append(len(table.rows))
        write(path, table)

    monkeypatch.setattr(finding.Finder, "look", slow_look)
    monkeypatch.setattr(face_table, "write", slow_write)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    finder = finding.open_finder(pack / "rec.onnx")
    assert precompute(pictures, tmp_path / "t.safetensors", finder) == []
    assert sizes == [2, 3]


def test_a_picture_that_the_recogniser_cannot_process_does_not_stop_the_others(
    pack, pictures, tmp_path, capsys
):
    finder = finding.open_finder(pack / "rec.onnx")
    model, crops = finder.recogniser.model, []
    get_feat = model.get_feat

    def fails_once(crop):
        crops.append(crop)
        if len(crops) == 2:
            raise RuntimeError("out of memory")
        return get_feat(crop)

    model.get_feat = fails_once
    ((failed, why),) = precompute(pictures, tmp_path / "t.safetensors", finder)
    assert failed.name == "b.jpg" and "cannot process a crop (RuntimeError: out of memory)" in why
    assert len(face_table.read(tmp_path / "t.safetensors").rows) == 2


def test_nobody_else_may_read_the_file(run, tmp_path):
    path = tmp_path / "faces.safetensors"
    assert run()[0] == 0
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_table_of_other_making_is_not_mixed(run, tmp_path):
    assert run()[0] == 0
    before = (tmp_path / "faces.safetensors").read_bytes()
    code, printed = run("--face_select", "left")
    assert code == 1 and "was made with" in printed.err and "choose another --out" in printed.err
    (tmp_path / "faces.safetensors").write_bytes(before[:700])
    code, printed = run()
    assert code == 1 and "damaged or no safetensors file" in printed.err
    assert (tmp_path / "faces.safetensors").read_bytes() == before[:700]


def test_a_table_of_other_models_is_refused_before_models_are_loaded(
    run, pack, tmp_path, monkeypatch
):
    assert run()[0] == 0
    monkeypatch.setattr(__main__, "open_finder", None)  # must not be called
    for name in ("rec.onnx", "det.onnx"):
        other = tmp_path / f"other {name}"
        shutil.copytree(pack, other)
        if name == "rec.onnx":
            random_model.write_random_recogniser(other / name, seed=1)
        else:
            scrfd.write_detector(other / name, [scrfd.face(300, 320, 300)])
        code, printed = run("--face_model_dir", other)
        assert code == 1 and "was made with" in printed.err


def test_folder_without_a_single_face(run, photos, tmp_path):
    for path in photos.rglob("*.*"):
        if path.suffix in (".png", ".jpg") and path.name not in ("cut.png", "text.jpg"):
            path.unlink()
    code, printed = run()
    assert code == 1 and "2 of 2 pictures cannot be used" in printed.err and printed.out == ""
    assert not (tmp_path / "faces.safetensors").exists()
    (photos / "cut.png").unlink()
    (photos / "text.jpg").unlink()
    code, printed = run()
    assert code == 1 and "error: no pictures in" in printed.err


def test_aligned_crops_need_no_detector(run, photos, tmp_path):
    for path in [*photos.glob("*.*"), *photos.glob("anna/*")]:
        if path.is_file():
            path.unlink()
    Image.effect_noise((112, 112), 60).convert("RGB").save(photos / "crop.png")
    Image.effect_noise((113, 112), 60).convert("RGB").save(photos / "other.png")
    code, printed = run("--pre_aligned")
    assert code == 0 and "other.png: expected an aligned crop of 112 x 112" in printed.err
    (sight,) = face_table.read(tmp_path / "faces.safetensors").rows.values()
    np.testing.assert_allclose(sight.points, scrfd.TEMPLATE, atol=1e-4)
    np.testing.assert_array_equal(sight.box, [0, 0, 112, 112])


def test_embeddings_are_in_no_metadata_and_no_message(run, tmp_path, caplog):
    caplog.set_level("DEBUG")
    _, printed = run()
    with safe_open(tmp_path / "faces.safetensors", "numpy") as file:
        metadata = json.dumps(file.metadata())
        embeds = file.get_tensor("embeddings")
    assert "a.png" in metadata or "copy.png" in metadata
    told = metadata + printed.out + printed.err + caplog.text
    assert "face model: rec.onnx" in caplog.text  # the log was really looked at
    for value in np.abs(embeds[:, :50]).ravel():
        assert f"{value:.5f}"[1:] not in told
    assert str(tmp_path) not in metadata


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda arrays: arrays.pop("boxes"), "holds no face embeddings of format version 1 or 2"),
        (lambda arrays: arrays.update(boxes=arrays["boxes"][:1]), "expected boxes to be float32"),
        (lambda arrays: arrays.update(scores=arrays["scores"] * np.nan), "not finite"),
        (lambda arrays: arrays.update(embeddings=arrays["embeddings"] * 2), "not of unit norm"),
    ],
)
def test_tables_that_cannot_be_used(run, tmp_path, change, says):
    run()
    path = tmp_path / "faces.safetensors"
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path, metadata)
    with pytest.raises(face_models.FaceError, match=says):
        face_table.read(path)


def made_before_the_second_look(path):
    """Rewrites a table as the version did that looked once."""
    with safe_open(path, "numpy") as file:
        about = json.loads(file.metadata()["idea_jax.faces"])
    del about["looks"]
    save_file(load_file(path), path, {"idea_jax.faces": json.dumps({**about, "format_version": 1})})


def test_a_table_of_one_look_is_read_but_gets_no_rows_of_two(run, photos, tmp_path):
    run()
    path = tmp_path / "faces.safetensors"
    assert face_table.read(path).about.looks == 3
    made_before_the_second_look(path)
    table = face_table.read(path)
    assert table.about.looks == 1 and len(table.rows) == 3
    assert table.look(images.PictureFile(photos / "b.jpg")).embed.shape == (512,)
    before = path.read_bytes()
    code, printed = run()
    assert code == 1 and "looks=1" in printed.err and "looks=3" in printed.err
    assert path.read_bytes() == before


def test_a_table_of_aligned_crops_goes_on_as_before(run, photos, tmp_path):
    """Nobody looks for a face on them, once or twice."""
    Image.effect_noise((112, 112), 60).convert("RGB").save(photos / "crop.png")
    assert run("--pre_aligned")[0] == 0
    path = tmp_path / "faces.safetensors"
    whole = path.read_bytes()
    made_before_the_second_look(path)
    Image.effect_noise((112, 112), 90).convert("RGB").save(photos / "other.png")
    assert run("--pre_aligned")[0] == 0
    assert len(face_table.read(path).rows) == 2
    (photos / "other.png").unlink()
    path.unlink()
    assert run("--pre_aligned")[0] == 0 and path.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda about: "[" * 100_000 + "]" * 100_000, "damaged"),
        *(
            (lambda about, names=names: json.dumps({**json.loads(about), "names": names}), "holds")
            for names in (5, None, {"a": 1, "b": 2, "c": 3}, [["a"], ["b"], ["c"]], "abc")
        ),
        *(
            (lambda about, wrong=wrong: json.dumps({**json.loads(about), **wrong}), "holds")
            for wrong in (
                {"face_model": []},
                {"face_select": None},
                {"pre_aligned": "no"},
                {"looks": "2"},
            )
        ),
    ],
)
def test_table_whose_metadata_are_of_other_types(run, tmp_path, change, says):
    run()
    path = tmp_path / "faces.safetensors"
    with safe_open(path, "numpy") as file:
        about = file.metadata()["idea_jax.faces"]
    save_file(load_file(path), path, {"idea_jax.faces": change(about)})
    with pytest.raises(face_models.FaceError, match=says):
        face_table.read(path)


def test_table_of_a_number_type_that_numpy_lacks(run, tmp_path):
    run()
    path = tmp_path / "faces.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["picture_sha256"]["dtype"] = "F8_E5M2"
    header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    with pytest.raises(face_models.FaceError, match=r"faces\.safetensors is damaged"):
        face_table.read(path)


def test_what_cannot_be_written_to_is_refused_before_models_are_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(__main__, "open_finder", None)  # must not be called
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("x")
    for flags, out, says in (
        ([], "folder", "folder is a folder; give a file"),
        ([], "text", "damaged or no safetensors file"),
        (["--face_select", "first"], "new", "--face_select must be one of largest"),
    ):
        code, printed = run(*flags, out=out)
        assert code == 1 and says in printed.err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--face_model", "rec.onnx"], "either --face_model or --face_model_dir, not both"),
        (["--pre_aligned", "--face_select", "left"], "no effect on --pre_aligned photos"),
        (["--dataset", "celeb_a", "--dataset_dir", "x"], "give either a folder or --dataset"),
        (["--dataset_dir", "x"], "--dataset and --dataset_dir belong together"),
        (["--identities", "0:2"], "--identities has no effect without --dataset"),
    ],
)
def test_settings_that_do_not_fit_are_refused(run, tmp_path, monkeypatch, flags, says):
    monkeypatch.setattr(folders, "list_tree", None)  # must not be called
    code, printed = run(*flags)
    assert code == 2 and printed.err.startswith("error: ") and says in printed.err


def test_no_source_of_pictures(tmp_path, capsys):
    assert __main__.main(["--out", str(tmp_path / "x.safetensors")]) == 2
    assert "missing: a folder, or --dataset with --dataset_dir" in capsys.readouterr().err


def test_files_that_are_skipped_are_reported(run, photos, caplog):
    (photos / "anna" / "phone.tiff").write_text("x")
    assert run()[0] == 0
    assert "phone.tiff: suffix .tiff" in caplog.text


def test_table_that_is_absent_or_something_else(tmp_path):
    with pytest.raises(
        face_models.FaceError, match=r"does not exist; write it with: python -m idea_jax"
    ):
        face_table.read(tmp_path / "none")
    for metadata in (None, {"idea_jax.faces": "[1]"}, {"idea_jax.faces": '{"format_version": 1}'}):
        save_file({"x": np.zeros(3)}, tmp_path / "other.safetensors", metadata)
        with pytest.raises(
            face_models.FaceError, match="no face embeddings of format version 1 or 2"
        ):
            face_table.read(tmp_path / "other.safetensors")
    newer = {"idea_jax.faces": '{"format_version": 9}'}
    save_file({"x": np.zeros(3)}, tmp_path / "other.safetensors", newer)
    says = r"1 or 2 \(it has 9\);.* install the idea_jax that"
    with pytest.raises(face_models.FaceError, match=says):
        face_table.read(tmp_path / "other.safetensors")


def test_module_runs_as_a_command(pack, photos, tmp_path):
    command = [sys.executable, "-m", "idea_jax.faces"]
    done = subprocess.run(
        [*command, photos / "none", "--out", tmp_path / "x.safetensors"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr.startswith("error: the folder of pictures") and "Traceback" not in done.stderr
    )
