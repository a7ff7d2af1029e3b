"""People and their pictures: folders, CelebA without TensorFlow, the choice and the split."""

import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from idea_jax.data import folders, images, people

# Identity_No of the pictures 000001.jpg, 000002.jpg, ..., and the split that each is in.
IDENTITIES = (2880, 7, 7, 91, 2880, 7, 2880, 2880)
PARTITION = (0, 0, 0, 1, 0, 0, 0, 0)


def jpeg(index):
    pixels = np.random.default_rng(index).integers(0, 256, (10, 8, 3), np.uint8)
    buffer = io.BytesIO()
    smooth = Image.fromarray(pixels).resize((178, 218), Image.Resampling.BICUBIC)
    smooth.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_celeb_a(folder, raw, file_format="array_record", first=0):
    """A small CelebA: its own builder reads its own text files, tensorflow-datasets writes them.

    Args:
      first: number of the first random picture.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder("celeb_a", data_dir=folder, file_format=file_format)
    module = sys.modules[type(builder).__module__]
    names = [f"{number:06d}.jpg" for number in range(1, len(IDENTITIES) + 1)]

    def table(file, columns, head=True):
        lines = [" ".join([name, *map(str, values)]) for name, values in columns.items()]
        start = [str(len(names)), " ".join(head)] if head else []
        (raw / file).write_text("\n".join([*start, *lines]) + "\n")
        return raw / file

    files = {
        "list_eval_partition": table(
            "part.txt", {n: [p] for n, p in zip(names, PARTITION, strict=True)}, None
        ),
        "identity_celeba": table(
            "identity.txt", {n: [i] for n, i in zip(names, IDENTITIES, strict=True)}, None
        ),
        "list_attr_celeba": table(
            "attributes.txt", dict.fromkeys(names, [1, -1] * 20), module.ATTR_HEADINGS
        ),
        "landmarks_celeba": table(
            "landmarks.txt", dict.fromkeys(names, range(10)), module.LANDMARK_HEADINGS
        ),
    }

    def splits(dl_manager):
        pictures = {name: io.BytesIO(jpeg(index)) for index, name in enumerate(names, first)}
        return {
            name: builder._generate_examples(number, files, pictures)
            for number, name in enumerate(["train", "validation"])
        }

    builder._split_generators = splits
    builder.download_and_prepare()
    return folder


@pytest.fixture(scope="module")
def celeb_a(tmp_path_factory):
    raw = tmp_path_factory.mktemp("raw")
    return write_celeb_a(tmp_path_factory.mktemp("celeb_a"), raw)


# --- CelebA ---------------------------------------------------------------------------------------


def test_celeb_a_is_grouped_by_identity(celeb_a):
    found = people.from_celeb_a(celeb_a)
    assert {name: len(pictures) for name, pictures in found.items()} == {
        "00007": 3,
        "00091": 1,
        "02880": 4,
    }
    assert list(found) == sorted(found)
    # Each person has their own pictures: 02880 is on the first, fifth, seventh and eighth.
    digests = {picture.sha256() for picture in found["02880"]}
    originals = [Image.open(io.BytesIO(jpeg(index))) for index in (0, 4, 6, 7)]
    assert len(digests) == 4
    read = [np.asarray(picture.read()) for picture in found["02880"]]
    for original in originals:
        assert any(np.array_equal(np.asarray(original), pixels) for pixels in read)
    picture = found["00007"][0]
    assert picture.read().mode == "RGB" and picture.read().size == (178, 218)
    assert picture.name.isdigit() and "data set" in str(picture)


def test_tensorflow_is_not_imported_even_where_it_is_installed(tmp_path, celeb_a):
    """In its place is a package that leaves a mark when it is imported."""
    mark = tmp_path / "imported"
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    places = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    code = (
        "import sys; from idea_jax.data import people; "
        "found = people.from_celeb_a(sys.argv[1]); print(found['00091'][0].read().size)"
    )
    for command, printed in ((code, "(178, 218)"), ("import tensorflow", "")):
        assert not mark.exists()
        done = subprocess.run(
            [sys.executable, "-c", command, celeb_a],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == printed
    assert mark.exists()  # the package would have been found


def test_celeb_a_that_is_not_prepared(tmp_path, celeb_a):
    with pytest.raises(people.PeopleError, match=r"no prepared CelebA.*celeb_a.*array_record"):
        people.from_celeb_a(tmp_path)
    shutil.copytree(celeb_a, tmp_path / "cut")
    for path in (tmp_path / "cut").rglob("*array_record*"):
        path.unlink()
    with pytest.raises(people.PeopleError, match="cannot be read without TensorFlow"):
        people.from_celeb_a(tmp_path / "cut")
    picture = people.from_celeb_a(celeb_a)["00091"][0]
    cut = people.StoredPicture([{"image": jpeg(0)[:300]}], 0)
    with pytest.raises(images.ImageError, match="picture 0 of the data set is damaged"):
        cut.read()
    assert picture.read().size == (178, 218)
    info = next((tmp_path / "cut").rglob("dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(people.PeopleError, match=r"without TensorFlow .*file_format='array_record"):
        people.from_celeb_a(tmp_path / "cut")


def test_celeb_a_that_is_damaged(tmp_path, celeb_a):
    shutil.copytree(celeb_a, tmp_path / "cut")
    info = next((tmp_path / "cut").rglob("dataset_info.json"))
    info.write_text(info.read_text()[:100])
    with pytest.raises(people.PeopleError, match=r"cannot be read .*file_format='array_record"):
        people.from_celeb_a(tmp_path / "cut")


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record"])
def test_package_that_is_missing_is_named(celeb_a, package):
    """In a process of its own, since tensorflow-datasets keeps what it has imported."""
    lines = (
        f"import sys; sys.modules[{package!r}] = None",
        "from idea_jax.data import people",
        "people.from_celeb_a(sys.argv[1])",
    )
    command = [sys.executable, "-c", "\n".join(lines), celeb_a]
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("idea_jax.data.people.PeopleError: CelebA needs the packages")
    assert last.endswith("pip install '.[celeba]'")


# --- folders --------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    """Three people; a hidden folder, one without pictures and a stray file beside them."""
    for index, name in enumerate(["carl/a.png", "anna/b.jpg", "anna/a.png", "Bert/x.webp"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (index * 60, 90, 20)).save(tmp_path / name)
    shutil.copy(tmp_path / "anna" / "a.png", tmp_path / "anna" / "z.png")
    (tmp_path / "anna" / "notes.txt").write_text("x")
    for folder in (".hidden", "empty"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / ".hidden" / "a.png")
    (tmp_path / "list.txt").write_text("x")
    return tmp_path


def test_each_folder_is_a_person_and_copies_count_once(root, caplog):
    found = people.from_folders(root)
    assert {name: [p.name for p in pictures] for name, pictures in found.items()} == {
        "Bert": ["x.webp"],
        "anna": ["a.png", "b.jpg", "z.png"],
        "carl": ["a.png"],
    }
    assert [p.name for p in images.without_copies(found["anna"])] == ["a.png", "b.jpg"]
    assert "skipped z.png: a copy of a.png" in caplog.text
    assert folders.has_only_folders(root) and not folders.has_only_folders(root / "anna")
    paths, skipped = folders.list_tree(root)
    assert [path.name for path in paths] == ["x.webp", "a.png", "b.jpg", "z.png", "a.png"]
    assert {path.name for path, _ in skipped} == {".hidden", "notes.txt", "empty", "list.txt"}


def test_what_is_left_out_is_reported(root, caplog):
    people.from_folders(root)
    for name in ("anna/notes.txt", "list.txt"):
        assert f"skipped {root / name}: suffix .txt" in caplog.text
    assert f"skipped {root / 'empty'}: it holds no pictures" in caplog.text


def test_who_has_photos_of_another_kind_is_a_person_all_the_same(root):
    (root / "dora").mkdir()
    (root / "dora" / "scan.tif").write_text("x")
    found = people.from_folders(root)
    assert list(found) == ["Bert", "anna", "carl", "dora"]
    says = r"no pictures in .*dora: .*found scan.tif \(suffix .tif\)"
    with pytest.raises(images.ImageError, match=says):
        images.readable(found["dora"])


def test_folders_of_archives_and_tools_are_nobody(root):
    for name, file in (("__MACOSX", "._a.jpg"), ("__pycache__", "a.pyc"), ("only-hidden", ".x")):
        (root / name).mkdir()
        (root / name / file).write_text("x")
    assert list(people.from_folders(root)) == ["Bert", "anna", "carl"]
    Image.new("RGB", (32, 32)).save(root / "__MACOSX" / "a.png")  # then it is somebody's
    assert list(people.from_folders(root)) == ["Bert", "__MACOSX", "anna", "carl"]


def test_folders_without_anybody(root):
    for name in ("carl", "anna", "Bert"):
        shutil.rmtree(root / name)
    with pytest.raises(
        images.ImageError, match="no pictures in .*expected files ending in .*empty \\(it holds no"
    ):
        people.from_folders(root)
    with pytest.raises(images.ImageError, match="does not exist"):
        people.from_folders(root / "none")


def test_a_folder_that_cannot_be_read(root, monkeypatch):
    real = type(root).iterdir

    def iterdir(self):
        if self.name == "anna":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    if os.geteuid() == 0:  # root may read everything
        monkeypatch.setattr(type(root), "iterdir", iterdir)
    else:
        (root / "anna").chmod(0)
    found = people.from_folders(root)
    _, skipped = folders.list_tree(root)
    (root / "anna").chmod(0o755)
    reason = f"the folder of pictures {root / 'anna'} cannot be read: Permission denied"
    with pytest.raises(images.ImageError, match=reason):
        images.readable(found["anna"])
    assert (root / "anna", reason) in skipped and len(found["carl"]) == 1


# --- choosing and splitting -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("identities", "names"),
    [
        (None, "abcd"),
        ("0:2", "ab"),
        ("1:", "bcd"),
        (":3", "abc"),
        (":", "abcd"),
        ("2", "c"),
        ("2:99", "cd"),
    ],
)
def test_identities_are_places_in_the_order_of_names(identities, names):
    found = {name: [name] for name in "abcd"}
    assert "".join(people.choose(found, identities)) == names


@pytest.mark.parametrize("identities", ["", "a:b", "0-3", "-1:", "1:2:3", "0, 1"])
def test_identities_that_are_no_range(identities):
    with pytest.raises(people.PeopleError, match="must be FROM:TO"):
        people.choose({"a": [1]}, identities)


def test_identities_that_hold_nobody():
    with pytest.raises(people.PeopleError, match="2:2 holds nobody: there are 3 people"):
        people.choose({name: [] for name in "abc"}, "2:2")


def test_split_depends_on_seed_and_name_only():
    pictures = [f"{index:02d}" for index in range(20)]
    person = people.split("anna", pictures, 5, seed=3)
    assert len(person.train) == 5 and len(person.held_out) == 15
    assert sorted((*person.train, *person.held_out)) == pictures
    assert list(person.train) == sorted(person.train)
    assert people.split("anna", pictures, 5, seed=3) == person
    others = [people.split("anna", pictures, 5, seed=4), people.split("bert", pictures, 5, seed=3)]
    assert all(other.train != person.train for other in others)
    # More pictures to train on are more of the same ones.
    assert set(person.train) < set(people.split("anna", pictures, 6, seed=3).train)
    assert people.split("anna", pictures, None, seed=3).train == tuple(pictures)
    with pytest.raises(people.PeopleError, match=r"anna has 20 picture\(s\), fewer than.* 21"):
        people.split("anna", pictures, 21, seed=3)
