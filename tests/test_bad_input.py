"""Bad input through the two commands: one clear message, an exit code, and no earlier file lost."""

import errno
import io
import json
import os
import pickle
import resource
import shutil
import struct
import zipfile
import zlib
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import sample_jax
import train_jax
from idea_jax.data import images
from idea_jax.faces import random_model
from idea_jax.formats import learned_embeds
from idea_jax.formats.identity import FORMAT, Identity, IdentityError, read_identity, write_identity
from idea_jax.method import condition
from idea_jax.runtime import files
from idea_jax.runtime.files import slug
from idea_jax.training import group, tensorboard
from idea_jax.training.results import TrainingError

# So high that the first step is finite and the second is not. All runs here share it, since each
# rate is a program of its own, which takes longer to compile than anything else here.
RATE = 1e30
ONE = "--num_inference_steps 1 --num_images_per_prompt 1 --guidance_scale 1".split()
EARLIER = ("identity.safetensors", "learned_embeds.safetensors", "config.yaml", "run.json")


@pytest.fixture(scope="module")
def person(tmp_path_factory):
    """The file of an identity that fits the checkpoint."""
    rows = np.random.default_rng(0).normal(0, 0.02, (2, 32)).astype(np.float32)
    identity = Identity(
        method=condition.make_method("cross_init"),
        trainable={"pseudo_tokens": rows},
        given={"anchor": rows},
        placeholder="<person>",
        base_model="tiny",
        revision=None,
        seed=0,
        steps=1,
    )
    path = tmp_path_factory.mktemp("person") / "identity.safetensors"
    write_identity(path, identity)
    learned_embeds.write(path.with_name("learned_embeds.safetensors"), "<person>", rows, {})
    return path


class Command:
    """One of the two commands with good input, in which a test replaces what it wants to be bad."""

    def __init__(self, main, good, folder, capsys, *always):
        self.main, self.good, self.folder, self.capsys = main, good, folder, capsys
        self.always = always

    def run(self, *flags, **changes):
        good = {**self.good, **{f"--{name}": value for name, value in changes.items()}}
        named = [str(x) for item in good.items() if item[1] is not None for x in item]
        named += [] if "resume_from_checkpoint" in changes else self.always
        self.capsys.readouterr()
        try:
            code = self.main([*named, *map(str, flags)])
        except SystemExit as stop:  # argparse
            code = stop.code
        return code

    def refuses(self, *flags, says, code=1, **changes):
        """Runs; checks the exit code, the one message, and that no earlier file has changed."""
        before = contents(self.folder)
        assert self.run(*flags, **changes) == code
        printed = self.capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("error: ") == 1 and "Traceback" not in printed.err
        message = printed.err[printed.err.index("error: ") :]
        for phrase in [says] if isinstance(says, str) else says:
            assert phrase in message
        after = contents(self.folder)
        assert {path: after.get(path) for path in before} == before
        # Nothing half-written is left either, but for the lock that says that a run was here.
        assert {path.name for path in self.folder.rglob(".*")} <= {".lock-0"}
        return message


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def training(random_checkpoint, photo_folder, tmp_path, capsys):
    """`train_jax.py` with an output folder that holds the results of an earlier run."""
    out = tmp_path / "out"
    out.mkdir()
    for name in EARLIER:
        (out / name).write_text(f"an earlier {name}")
    good = {
        "--pretrained_model_name_or_path": random_checkpoint,
        "--train_data_dir": photo_folder,
        "--output_dir": out,
        "--profile": "cross_init",
        "--max_train_steps": 1,
        "--train_batch_size": 1,
        "--learning_rate": RATE,
    }
    return Command(train_jax.main, good, out, capsys, "--overwrite")


@pytest.fixture
def sampling(random_checkpoint, person, tmp_path, capsys):
    """`sample_jax.py` with a folder that holds pictures of another origin."""
    save_dir = tmp_path / "pictures"
    (save_dir / slug("a photo of {}")).mkdir(parents=True)
    (save_dir / slug("a photo of {}") / "00000.png").write_text("an earlier picture")
    good = {
        "--pretrained_model_name_or_path": random_checkpoint,
        "--identity": person,
        "--save_dir": save_dir,
        "--prompt": "a photo of {}",
        **dict(zip(ONE[::2], ONE[1::2], strict=True)),
    }
    return Command(sample_jax.main, good, save_dir, capsys)


@contextmanager
def disk_full_after(size):
    """Every file that grows beyond `size` bytes fails to be written, by the operating system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    quickest = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", np.inf)  # no cut-off programs
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", quickest)


@pytest.fixture
def no_steps(monkeypatch):
    """Leaves the training steps out, and keeps what they would have been given."""
    seen = {}

    def train_together(work, learners, finish):
        (learner,) = learners
        seen.update(photos=learner.photos, state=learner.state, base=learner.results.base)
        learner.results.losses.append((1, 1.0))
        learner.results.close()
        finish(learner)

    monkeypatch.setattr(group, "train_together", train_together)
    return seen


# --- photos ---------------------------------------------------------------------------------------


def png_claiming(width, height):
    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def no_folder(folder):
    folder.rmdir()


def no_pictures(folder):
    (folder / "notes.txt").write_text("nothing to see")
    (folder / ".DS_Store").write_bytes(b"\0")


def text_file(folder):
    (folder / "me.jpg").write_text("I am not a picture")


def truncated_jpeg(folder):
    Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "me.jpg")
    (folder / "me.jpg").write_bytes((folder / "me.jpg").read_bytes()[:900])


def bomb(folder):
    (folder / "me.png").write_bytes(png_claiming(30_000, 30_000))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (no_folder, ["does not exist"]),
        (no_pictures, ["no pictures in", "expected files ending in .jpg", "notes.txt"]),
        (text_file, ["me.jpg is not a JPEG", "a text file", "convert or remove it"]),
        (truncated_jpeg, ["me.jpg is cut off or damaged", "download it again"]),
        (bomb, ["me.png is too large to be decoded safely", "scale it down"]),
    ],
)
def test_photos_that_cannot_be_used(training, tmp_path, make, says):
    photos = tmp_path / "photos"
    photos.mkdir()
    make(photos)
    # They are looked at before the checkpoint, which may have to be downloaded.
    training.refuses(
        train_data_dir=photos, pretrained_model_name_or_path="none", says=[str(photos), *says]
    )


def test_photos_of_every_kind_are_used_as_the_plain_picture(training, tmp_path, no_steps):
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(30, 220, (6, 6, 3), dtype=np.uint8))
    plain = coarse.resize((48, 48), Image.Resampling.BICUBIC)
    grey = plain.convert("L")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # to be turned clockwise by a quarter
    kinds = {
        "a-plain.png": lambda path: plain.save(path),
        "b-rotated.png": lambda path: plain.rotate(90).save(path, exif=rotated),
        "c-alpha.png": lambda path: plain.convert("RGBA").save(path),
        "d-animated.png": lambda path: plain.save(
            path, save_all=True, append_images=[Image.new("RGB", plain.size, "red")]
        ),
        "e-cmyk.jpg": lambda path: plain.convert("CMYK").save(path, quality=100, subsampling=0),
        "f-grey.png": lambda path: grey.save(path),
        "g-grey-16-bit.png": lambda path: Image.fromarray(
            np.asarray(grey).astype(np.uint16) * 257
        ).save(path),
    }
    for name, save in kinds.items():
        save(photos / name)
    assert training.run(train_data_dir=photos) == 0
    mean = np.asarray(no_steps["photos"].mean)
    assert int(no_steps["photos"].count) == len(mean) == len(kinds)
    for row in (1, 2, 3):
        np.testing.assert_array_equal(mean[row], mean[0])
    assert np.abs(mean[4] - mean[0]).mean() < 0.03 * mean[0].std()
    np.testing.assert_array_equal(mean[6], mean[5])
    assert np.abs(mean[5] - mean[0]).mean() > 0.1 * mean[0].std()


# --- prompts and sampling -------------------------------------------------------------------------


def test_prompts_of_every_kind_stay_inside_and_apart(sampling, tmp_path, rounding):
    prompts = [
        "../../x {}",
        "/abs {}",
        "{} " + "very " * 79,  # 400 characters with its end
        "a photo of {}",
        "A photo of {}!",
        "a/b\\c {}",
        "{} \0 nul",
        "{} \N{GRINNING FACE}",
        "\N{GRINNING FACE} {}",
        "{}",
    ]

    def outside():
        parent = tmp_path.parent  # where the first prompt would lead
        found = {*parent.glob("*"), *parent.glob("x*/**/*"), *tmp_path.rglob("*")}
        return found - {sampling.folder, *sampling.folder.rglob("*")}

    before = outside()
    assert sampling.run("--prompt", *prompts, prompt=None) == 0
    folders = sampling.capsys.readouterr().out.splitlines()
    assert len(set(folders)) == len(prompts)
    for prompt, folder in zip(prompts, folders, strict=True):
        path = sampling.folder / os.path.basename(folder)
        assert path.is_dir() and not path.is_symlink() and len(path.name) < 100
        assert json.loads((path / "run.json").read_text())["prompt"] == prompt
        assert Image.open(path / "00000.png").size == (32, 32)
    assert outside() == before
    earlier = sampling.folder / slug("a photo of {}") / "00000.png"
    assert earlier.read_text() == "an earlier picture"
    # The same command again writes the same files; no picture of another prompt is replaced.
    drawn = contents(sampling.folder)
    assert sampling.run("--prompt", *prompts[:2], prompt=None) == 0
    again = contents(sampling.folder)
    assert again.keys() == drawn.keys()
    for path in drawn:
        if rounding and again[path] != drawn[path] and path.suffix == ".png":
            first, second = (
                np.asarray(Image.open(io.BytesIO(files[path])), np.int16)
                for files in (drawn, again)
            )
            assert np.abs(first - second).max() <= 1
        else:
            assert again[path] == drawn[path]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("a photo of a dog", ["'a photo of a dog' does not mention the person", "write {}"]),
        ("a {name} photo of {}", ["'{name}'", "remove other braces"]),
        ("a dog " * 800 + "and {}", ["at most 1500 are read", "shorten"]),
        ("{} on (the beach:1000)", ["has a weight beyond 100"]),
        ("a \udcff photo of {}", ["not valid Unicode"]),
    ],
)
def test_prompts_that_cannot_be_drawn(sampling, prompt, says):
    # A good prompt before the bad one: nothing is drawn before all have been read.
    sampling.refuses("--prompt", "a photo of {}", prompt, prompt=None, says=says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        (b"\n \n# a comment\n", "holds no prompt"),
        (b"\xff\xfe\x00", "is not a UTF-8 text file"),
    ],
)
def test_prompt_files_that_cannot_be_used(sampling, tmp_path, content, says):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    sampling.refuses(prompt=None, prompt_file=path, says=[says, str(path)])


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"height": 37}, 1, "height must be a multiple of 4, got 37"),
        ({"num_inference_steps": 1001}, 1, "between 1 and 1000 sampling steps"),
        ({"seed": 2**32}, 2, "seed must lie between 0 and 4294967295"),
        ({"guidance_scale": "inf"}, 2, "guidance_scale must be finite"),
        ({"id_strength": "nan"}, 2, "id_strength must not be negative, got nan"),
        ({"identity": None}, 2, "exactly one of --identity"),
        ({"negative_prompt": "\udcff", "guidance_scale": 2}, 1, "not valid Unicode"),
    ],
)
def test_sampling_settings_that_do_not_fit(sampling, changes, code, says):
    sampling.refuses(**changes, code=code, says=says)


# --- the identity ---------------------------------------------------------------------------------


def edited_identity(source, path, *, tensors=None, **about):
    """A copy of an identity file with other tensors or another description."""
    from safetensors import safe_open

    with safe_open(source, "numpy") as file:
        metadata = file.metadata()
    described = json.loads(metadata[FORMAT])
    described["method"].update(about.pop("method", {}))
    metadata[FORMAT] = json.dumps({**described, **about})
    save_file({**load_file(source), **(tensors or {})}, path, metadata)


TOKENS = "trainable/pseudo_tokens"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"tensors": {TOKENS: np.zeros((2, 64), np.float32)}},
            ["a text width of 64, this checkpoint has 32", "sample with that one, or train again"],
        ),
        (
            {"tensors": {TOKENS: np.full((2, 32), np.nan, np.float32)}},
            ["is damaged", f"{TOKENS} is not finite", "train again"],
        ),
        ({"tensors": {TOKENS: np.zeros(32, np.float32)}}, ["pseudo tokens [2, width]", "(32,)"]),
        ({"method": {"num_tokens": 3}}, ["expected pseudo tokens [3, width]", "(2, 32)"]),
        ({"method": {"kv_rank": "four"}, "seed": None}, ["seed is a NoneType", "kv_rank is a str"]),
        ({"method": {"colour": 1}}, ["lacks a part of its description", "colour"]),
        ({"method": {"kv": "full"}}, ["does not fit", "missing trainable/kv/down_blocks_0"]),
        ({"placeholder": "person"}, ["'person' is in the vocabulary already"]),
    ],
)
def test_identities_that_do_not_fit(sampling, person, tmp_path, change, says):
    path = tmp_path / "other.safetensors"
    edited_identity(person, path, **change)
    sampling.refuses(identity=path, says=says)


def test_identity_files_that_are_none(sampling, person, random_checkpoint, tmp_path):
    whole = person.read_bytes()
    path = tmp_path / "damaged.safetensors"
    for content in (b"", whole[:100], whole[:-1], b"\xff" * 200, b"just text, and quite a lot"):
        path.write_bytes(content)
        sampling.refuses(identity=path, says=[str(path), "is damaged or no safetensors file"])
    sampling.refuses(identity=tmp_path / "none", says="no identity file at")
    sampling.refuses(
        identity=person.with_name("learned_embeds.safetensors"),
        says=["no identity file of this project", "use --learned_embedding_path"],
    )
    foreign = random_checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    sampling.refuses(identity=foreign, says=[str(foreign), "no identity file of this project"])


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["pickle", "torch.save"])
def test_pickle_that_tries_to_run_code(sampling, tmp_path, form):
    marker, path = tmp_path / "ran", tmp_path / "learned_embeds.bin"
    content = pickle.dumps({"<person>": Evil(marker)}, protocol=2)
    if form == "pickle":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3\n")
    sampling.refuses(identity=None, learned_embedding_path=path, says=str(path))
    assert not marker.exists()
    pickle.loads(content)  # the file is what it is meant to be
    assert marker.exists()


def test_embeddings_that_do_not_fit(sampling, tmp_path):
    path = tmp_path / "learned_embeds.safetensors"
    sampling.refuses(identity=None, learned_embedding_path=path, says="does not exist")
    save_file({"<person>": np.zeros((2, 48), np.float32)}, path)
    sampling.refuses(
        identity=None,
        learned_embedding_path=path,
        says="a text width of 48, this checkpoint has 32",
    )
    save_file({f"<{name}>": np.zeros((2, 32), np.float32) for name in "ab"}, path)
    sampling.refuses(
        identity=None, learned_embedding_path=path, says="choose one with --token NAME"
    )
    sampling.refuses(
        identity=None, learned_embedding_path=path, token="<c>", says="which holds <a>, <b>"
    )


# --- the checkpoint, the tokenizer, the face model ------------------------------------------------


@pytest.fixture
def broken(random_checkpoint, tmp_path):
    """A copy of the checkpoint, to be broken by the test."""
    return shutil.copytree(random_checkpoint, tmp_path / "broken")


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_weights_that_do_not_fit_are_listed_in_one_message(training, sampling, broken):
    def spoil(tensors):
        del tensors["conv_in.bias"]
        tensors["conv_sideways.weight"] = np.zeros(3, np.float32)
        tensors["conv_out.weight"] = tensors["conv_out.weight"][:2]

    edit(broken / "unet" / "diffusion_pytorch_model.safetensors", spoil)
    edit(
        broken / "vae" / "diffusion_pytorch_model.safetensors",
        lambda tensors: tensors.pop("quant_conv.bias"),
    )
    says = ["unet", "conv_in.bias", "conv_sideways.weight", "conv_out.weight: [2, 32, 3, 3]"]
    says += ["expected [4, 32, 3, 3]", "vae", "quant_conv.bias"]
    for command in (training, sampling):
        command.refuses(pretrained_model_name_or_path=broken, says=says)


def test_weights_that_are_no_file(training, broken):
    path = broken / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    training.refuses(
        pretrained_model_name_or_path=broken, says=[str(path), "not a complete", "download"]
    )
    path.unlink()
    training.refuses(
        pretrained_model_name_or_path=broken,
        says=["no diffusion_pytorch_model.safetensors in", "it holds config.json"],
    )
    training.refuses(variant="fp16", says=["no model.fp16.safetensors", "take no --variant"])


def test_checkpoints_that_are_none(training, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    training.refuses(pretrained_model_name_or_path=empty, says=["lacks", "unet/config.json"])
    training.refuses(
        pretrained_model_name_or_path="nobody/nothing",
        says=["nobody/nothing", "HF_HUB_OFFLINE is set", "hf download nobody/nothing"],
    )


def test_config_that_is_not_supported(training, broken):
    path = broken / "unet" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "act_fn": "mish", "surprise": 1}))
    training.refuses(
        pretrained_model_name_or_path=broken, says=[str(path), "act_fn", "mish", "surprise"]
    )


def test_empty_tokenizer_folder(training, sampling, broken):
    for path in (broken / "tokenizer").iterdir():
        path.unlink()
    for command in (training, sampling):
        command.refuses(
            pretrained_model_name_or_path=broken,
            says=["tokenizer", "lacks vocab.json and merges.txt", "download"],
        )


def test_face_model(training, broken, tmp_path, monkeypatch):
    other = tmp_path / "other.onnx"
    random_model.write_random_recogniser(other, size=128)
    training.refuses(
        profile="paper", face_model=other, says=[str(other), "[*, 3, 112, 112]", "128"]
    )
    other.write_bytes(other.read_bytes()[:1000])
    training.refuses(profile="paper", face_model=other, says=[str(other), "download it again"])
    training.refuses(profile="paper", face_model=tmp_path / "none", says="does not exist")
    training.refuses("--pre_aligned", profile="paper", says="leave out --pre_aligned")
    shutil.rmtree(broken / "face")
    monkeypatch.setenv("HOME", str(tmp_path))  # no installed face model either
    training.refuses(
        profile="paper",
        pretrained_model_name_or_path=broken,
        says=["--face_model FILE.onnx", "--profile cross_init"],
    )


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"max_trane_steps": 3}, 2, "unrecognized arguments: --max_trane_steps"),
        ({"max_train_steps": "many"}, 2, "invalid int value: 'many'"),
        ({"profile": "papper"}, 2, "invalid choice: 'papper'"),
        ({"train_data_dir": None}, 2, "missing: --train_data_dir"),
        ({"placeholder_token": "person"}, 1, "'person' is in the vocabulary already"),
        ({"placeholder_token": "a b"}, 1, "use printable characters without spaces"),
        ({"initialize_tokens": "astronautess"}, 1, "must be one token of the vocabulary"),
        ({"celeb_path": "/none.txt"}, 1, "the names file /none.txt cannot be read"),
        ({"n_pseudo_tokens": 40}, 1, "40 pseudo tokens cannot be initialised"),
        ({"resolution": 37}, 1, "resolution must be a multiple of 4, got 37"),
        ({"seed": 2**70}, 2, "seed must lie between"),
        ({"learning_rate": "inf"}, 2, "learning_rate must be finite"),
        ({"adam_epsilon": "inf"}, 2, "adam_epsilon must be finite"),
        ({"validation_prompt": "a dog"}, 1, "'a dog' does not mention the person"),
    ],
)
def test_training_settings_that_do_not_fit(training, changes, code, says):
    training.refuses(**changes, code=code, says=says)


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        (
            "train_batchsize: 4",
            ["unknown key 'train_batchsize'", "did you mean 'train_batch_size'"],
        ),
        ("colour: red", ["unknown key 'colour'", "known keys: "]),
        ("max_train_steps: many", ["max_train_steps", "must be int, got 'many'"]),
        ("learning_rate: 1e-4", ["must be float", "write 1.0e-4"]),
        ("scale_lr: 1", ["must be bool, got 1"]),
        ("identities: 7", ["identities", "must be str, got 7 (quote it)"]),
        ("face_select: 0", ["face_select", "must be str, got 0 (quote it)"]),
        ("validation_prompt: a {}", ["must be a list of str"]),
        ("seed: 1\nseed: 2", ["repeated key seed"]),
        ("seed: [1", ["is not valid YAML"]),
    ],
)
def test_config_files_that_cannot_be_used(training, tmp_path, yaml, says):
    path = tmp_path / "settings.yaml"
    path.write_text(yaml)
    training.refuses(config=path, code=2, says=[str(path), *says])


def test_config_file_that_is_absent(training, sampling, tmp_path):
    for command in (training, sampling):
        command.refuses(config=tmp_path / "none.yaml", code=2, says="cannot read the config file")


def test_resuming_from_what_does_not_fit(training):
    assert training.run("--checkpointing_steps", "1") == 0
    out, resume = training.folder, {"max_train_steps": 2}
    training.refuses(
        **resume,
        resume_from_checkpoint="latest",
        learning_rate=0.5,
        says=["other settings (learning_rate: 1e+30 -> 0.5)", "another --output_dir"],
    )
    training.refuses(
        **resume,
        resume_from_checkpoint=out / "checkpoints" / "7",
        says=["no checkpoint at", "there are: 1"],
    )
    for path in (out / "checkpoints" / "1" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:5])
    training.refuses(
        **resume,
        resume_from_checkpoint=out / "checkpoints" / "1",
        says=["checkpoint 1", "cannot be read", "name another one"],
    )


# --- the disk -------------------------------------------------------------------------------------


def test_output_folder_that_cannot_be_written(training, sampling, tmp_path):
    # Root may write to a folder without permission, but nobody below a file.
    (tmp_path / "file").write_text("a file")
    place = tmp_path / "file" / "out"
    says = [f"cannot write {place}: Not a directory", "choose another folder"]
    training.refuses(output_dir=place, says=says)
    sampling.refuses(save_dir=place, says=says)


def test_disk_that_is_full_when_the_identity_is_saved(training):
    with disk_full_after(700):
        training.refuses(
            "--report_to", "none", says=["File too large", str(training.folder), "free some"]
        )


@pytest.mark.parametrize("kth", [2, 3, 4, 5])
def test_disk_that_becomes_full_between_two_results(training, no_steps, monkeypatch, kth):
    """No result of the new run replaces one of the earlier run, if not all do."""
    calls, fsync = [], os.fsync

    def fills_up(handle):
        calls.append(handle)
        if len(calls) > kth:  # the first one proves that the folder can be written to
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(files.os, "fsync", fills_up)
    training.refuses("--report_to", "none", says=["cannot write", "No space left on device"])
    assert len(calls) == kth + 1


def test_disk_that_is_full_when_a_checkpoint_is_written(training, caplog):
    with disk_full_after(700):
        training.refuses(
            "--report_to",
            "none",
            "--checkpointing_steps",
            "1",
            says=["cannot write", "checkpoints", "File too large"],
        )
    assert "Traceback" not in caplog.text  # orbax would log one for each of its threads


def test_disk_that_is_full_when_losses_are_logged(tmp_path):
    with disk_full_after(2000):
        log = tensorboard.Log(tmp_path / "logs")
        with pytest.raises(files.WriteError, match=r"cannot write .*logs: File too large"):
            for step in range(10_000):
                log.scalars({"train/loss": 1.0}, step)
    log.close()


def test_disk_that_is_full_when_pictures_are_saved(sampling):
    assert sampling.run(prompt="{}") == 0
    before = contents(sampling.folder)
    with disk_full_after(2500):
        sampling.refuses(
            "--prompt", "{}", "a photo of {}", prompt=None, says=["File too large", slug("{}")]
        )
        sampling.refuses(prompt="{} again", says=slug("{} again"))
    assert contents(sampling.folder) == before  # not one picture of an unfinished set either


# --- numbers --------------------------------------------------------------------------------------


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_identity(training):
    message = training.refuses(
        max_train_steps=3,
        says=["step 2: loss nan", "Lower the learning rate", "identity-steps-1.safetensors"],
    )
    last_good = training.folder / "identity-steps-1.safetensors"
    assert str(last_good) in message
    identity = read_identity(last_good)
    assert identity.steps == 1 and np.isfinite(identity.trainable["pseudo_tokens"]).all()


@pytest.mark.parametrize("is_reported", [True, False])
def test_values_that_overflow_are_not_saved(training, monkeypatch, is_reported):
    """A step may be finite and leave values that are not: seen at the next step, or at the end."""

    def train_together(work, learners, finish):
        (learner,) = learners
        overflown = {"pseudo_tokens": learner.state.trainable["pseudo_tokens"] * np.inf}
        learner.state = learner.state._replace(trainable=overflown, step=np.int32(6))
        try:
            if is_reported:
                values = {"loss": np.nan, "grad_norm": np.nan, "finite": False}
                learner.results.report(7, values, learner.state)
            finish(learner)
        except (IdentityError, TrainingError) as error:
            learner.error = error

    monkeypatch.setattr(group, "train_together", train_together)
    says = ["step 7: loss nan", "Step 6 had left values", "Lower the learning rate"]
    if not is_reported:
        says = ["identity.safetensors was not written", "a lower learning rate"]
    training.refuses("--report_to", "none", says=says)
    assert not list(training.folder.glob("identity-steps-*"))


@pytest.mark.parametrize(
    ("part", "key", "says"),
    [
        ("text_encoder/model", "text_model.final_layer_norm.bias", "the text encoder of broken"),
        ("vae/diffusion_pytorch_model", "quant_conv.bias", "the VAE of broken, for astronaut.jpg"),
        ("unet/diffusion_pytorch_model", "conv_in.bias", "step 1: loss nan"),
    ],
)
def test_weights_that_are_not_finite(training, broken, part, key, says):
    edit(broken / f"{part}.safetensors", lambda tensors: tensors[key].fill(np.nan))
    training.refuses(pretrained_model_name_or_path=broken, says=[says, "weights", "broken"])
    assert not list(training.folder.glob("identity-steps-*"))


def test_pictures_that_are_not_finite(sampling, broken):
    edit(
        broken / "vae" / "diffusion_pytorch_model.safetensors",
        lambda tensors: tensors["post_quant_conv.bias"].fill(np.nan),
    )
    sampling.refuses(pretrained_model_name_or_path=broken, says="not all finite")


# --- privacy --------------------------------------------------------------------------------------


def test_neither_the_face_nor_the_home_folder_is_told(
    random_checkpoint, photo_folder, tmp_path, monkeypatch, capsys, caplog, no_steps
):
    home = tmp_path / "home-of-somebody"
    model = shutil.copytree(random_checkpoint, home / "models" / "tiny")
    shutil.copytree(photo_folder, home / "photos")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    caplog.set_level("DEBUG")
    common = ["--pretrained_model_name_or_path", str(model)]
    out = ["--profile", "official", "--train_data_dir", "photos", "--output_dir", "out"]
    assert train_jax.main([*common, *out, "--celeb_path", str(names_file(home))]) == 0
    pictures = ["--identity", "out/identity.safetensors", "--save_dir", "pictures"]
    assert sample_jax.main([*common, *pictures, *ONE, "--prompt", "{}"]) == 0

    printed = capsys.readouterr()
    told = {"log": caplog.text, "stdout": printed.out, "stderr": printed.err}
    for path in [*(home / "out").rglob("*"), *(home / "pictures").rglob("*")]:
        # config.yaml is there to repeat the run, so it holds the paths as they were given.
        if path.is_file() and path.name != "config.yaml":
            told[path.name] = path.read_bytes().decode("latin-1")
        if path.suffix == ".png":
            told[f"{path.name} fields"] = str(images.read_png_text(path))
    assert len(told) >= 10
    face = np.asarray(no_steps["state"].given["id_embed"])
    for name, text in told.items():
        assert "home-of-somebody" not in text, name
        assert not any(f"{value:.5f}"[1:] in text for value in np.abs(face[:50])), name
    assert "face model: arcface.onnx" in caplog.text  # the log was really looked at


def names_file(folder):
    path = folder / "names.txt"
    path.write_text("Marie Curie\nAlan Turing\n")
    return path


@pytest.mark.parametrize("picture", ["broken", "without a face"])
def test_a_run_that_has_written_nothing_leaves_no_folder(picture, tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out" / "here"
    photos.mkdir()
    if picture == "broken":
        (photos / "1.jpg").write_bytes(b"no picture")
    else:
        Image.new("RGB", (200, 200), "blue").save(photos / "1.jpg")
    common = ["--pretrained_model_name_or_path", "mini"]
    draw = ["--photo", str(photos / "1.jpg"), "--prompt", "{}", "--save_dir", str(out)]
    learn = ["--train_data_dir", str(photos), "--output_dir", str(out)]
    assert sample_jax.main([*common, *draw]) == 1
    assert train_jax.main([*common, *learn, "--profile", "paper"]) == 1
    assert str(photos / "1.jpg") in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [photos]
