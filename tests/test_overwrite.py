"""Who is trained into a folder that holds somebody already: refused, or replaced without a rest."""

import json
import shutil

import pytest
from PIL import Image
from skimage import data as pictures

import train_jax
from idea_jax.config.reading import parse
from idea_jax.config.settings import TrainConfig
from idea_jax.formats.identity import read_identity

FLAGS = "--max_train_steps 2 --train_batch_size 1 --profile cross_init --save_steps 1".split()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two folders of one photo each, of two people."""
    root = tmp_path_factory.mktemp("photos")
    for name, image in (("anna", pictures.astronaut()), ("bert", pictures.cat())):
        (root / name).mkdir()
        Image.fromarray(image).resize((64, 64)).save(root / name / "photo.png")
    return root


@pytest.fixture
def run(smallest_checkpoint, photos, tmp_path, capsys):
    """Trains; returns the exit code and what was said."""

    def command(who, placeholder, *flags, out=tmp_path / "out"):
        code = train_jax.main(
            [
                "--pretrained_model_name_or_path",
                str(smallest_checkpoint),
                "--train_data_dir",
                str(photos / who),
                "--output_dir",
                str(out),
                "--placeholder_token",
                placeholder,
                *FLAGS,
                *flags,
            ]
        )
        return code, capsys.readouterr().err

    return command


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_person_is_refused_and_the_first_stays(run, photos, tmp_path):
    out = tmp_path / "out"
    assert run("anna", "<anna>")[0] == 0
    before = contents(out)
    for placeholder in ("<bert>", "<anna>"):  # another name, or the same for other photos
        code, said = run("bert", placeholder)
        assert code == 1 and "Traceback" not in said
        # Both are named: who is there and who was to come.
        for phrase in (f"<anna> of {photos / 'anna'}", f"{placeholder} of {photos / 'bert'}"):
            assert phrase in said
        assert "--overwrite" in said and contents(out) == before
    # The same photos under another name are another person, too, for all that draws with them.
    assert run("anna", "<other>")[0] == 1
    assert contents(out) == before
    # The same person may be trained again.
    assert run("anna", "<anna>", "--seed", "1")[0] == 0
    assert read_identity(out / "identity.safetensors").seed == 1


def test_overwrite_leaves_nothing_of_the_first_beside_the_second(run, tmp_path):
    out = tmp_path / "out"
    first = ["--max_train_steps", "3", "--checkpointing_steps", "1"]
    validation = ["--validation_prompt", "{} as a statue", "--validation_steps", "3"]
    assert run("anna", "<anna>", *first, *validation, "--num_validation_images", "1")[0] == 0
    (out / "notes.txt").write_text("of the user")
    # That of SDXL's second text encoder, which this checkpoint has none of.
    shutil.copy(out / "learned_embeds.safetensors", out / "learned_embeds_2.safetensors")
    code, said = run("bert", "<bert>", "--overwrite")
    assert code == 0, said
    assert {path.name for path in out.rglob("*") if path.is_file()} == {
        "notes.txt",
        ".lock-0",
        "identity.safetensors",
        "learned_embeds.safetensors",
        "config.yaml",
        "run.json",
        "bert.safetensors",
        *(
            f"{kind}-steps-{n}.safetensors"
            for kind in ("identity", "learned_embeds")
            for n in (1, 2)
        ),
        *(path.name for path in (out / "logs").iterdir()),
    }
    assert len(list((out / "logs").iterdir())) == 1
    assert read_identity(out / "identity.safetensors").placeholder == "<bert>"
    # The settings that were kept do not replace anybody when they are used again.
    assert "overwrite: false" in (out / "config.yaml").read_text()


def test_what_fails_does_not_cost_the_person_who_is_there(run, tmp_path):
    out = tmp_path / "out"
    assert run("anna", "<anna>")[0] == 0
    finished = {path: data for path, data in contents(out).items() if "steps" not in path.name}
    finished = {path: data for path, data in finished.items() if "logs" not in path.parts}
    rates = ["--learning_rate", "1e30", "--scale_lr"]
    code, said = run("bert", "<bert>", "--overwrite", *rates)
    assert code == 1 and "learning rate" in said
    assert {path: path.read_bytes() for path in finished} == finished
    # Nor does the person on the way, whose leftovers are there now, become somebody else.
    assert run("bert", "<anna>")[0] == 1


def test_a_checkpoint_says_itself_whose_it_is(run, tmp_path):
    """Somebody who was to replace another and was stopped goes on without saying it again."""
    out = tmp_path / "out"
    keep = ["--checkpointing_steps", "1"]
    assert run("anna", "<anna>")[0] == 0
    assert run("bert", "<bert>", "--overwrite", *keep, "--max_train_steps", "1")[0] == 0
    resume = [*keep, "--resume_from_checkpoint", "latest"]
    (out / "run.json").unlink()  # as if it had been stopped before its results were written
    assert run("bert", "<bert>", *resume)[0] == 0
    code, said = run("anna", "<anna>", *resume)
    assert code == 1 and "belongs to a run with other settings" in said


def test_of_many_people_a_folder_of_somebody_else_fails_alone(run, photos, tmp_path):
    out = tmp_path / "out"
    # One of the folders of the run for many was made by a run for one, with other photos.
    assert run("bert", "<person>", out=out / "anna")[0] == 0
    before = contents(out / "anna")
    one = ["--identities_per_step", "1", "--mesh", "identity=1,data=1"]
    code, said = run(".", "<person>", *one)
    assert code == 1 and "1 of 2 people failed" in said
    assert (out / "bert" / "identity.safetensors").is_file()
    records = map(json.loads, (out / "jobs.jsonl").read_text().splitlines())
    assert {r["person"]: r["status"] for r in records} == {"anna": "failed", "bert": "done"}
    after = contents(out / "anna")
    assert {path: after[path] for path in before} == before
    code, said = run(".", "<person>", "--overwrite")
    assert code == 1 and "for one person" in said


@pytest.mark.parametrize(
    ("placeholder", "folder"),
    [
        ("<person>", "idea-person"),
        ("<Anna-Lena>", "idea-anna-lena"),
        ("<анна>", "idea-анна"),
        ("<../../etc>", "idea-etc"),
        ("<*>", "idea-person"),
    ],
)
def test_the_default_folder_has_the_persons_name(placeholder, folder):
    flags = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d"]
    cfg = parse(TrainConfig, [*flags, "--placeholder_token", placeholder])
    assert cfg.output_dir == folder
    assert parse(TrainConfig, [*flags, "--output_dir", "o"]).output_dir == "o"
