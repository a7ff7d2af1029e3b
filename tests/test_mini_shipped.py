"""The mini that comes with the package: whole, as good as it says, and the same in PyTorch."""

import base64
import dataclasses
import hashlib
import io
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import people as drawn_people
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTextModel, CLIPVisionModelWithProjection

from idea_jax import demo
from idea_jax.data.images import read_png_text, to_uint8
from idea_jax.diffusion.samplers import initial_noise
from idea_jax.faces import embedding, finding, portraits
from idea_jax.faces.crops import align, training_square
from idea_jax.mini import captions, drawings, measures, people, second_look, trials, world
from idea_jax.mini.pretrain import stages as all_stages
from idea_jax.mini.pretrain.budget import BUDGETS
from idea_jax.mini.pretrain.run import RECORD, SUMS
from idea_jax.models import hub
from idea_jax.training import learner as learners
from idea_jax.training.start import known_names

QUALITY = Path(__file__).resolve().parent.parent / "docs" / "mini_quality.json"


@pytest.fixture(scope="module")
def mini():
    return measures.load()


def test_files_are_those_that_were_trained():
    folder = hub.resolve("mini").folder
    lines = (folder / SUMS).read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    assert files.keys() - sums.keys() == {RECORD, SUMS}
    for name, digest in sums.items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest, name
    assert sum(path.stat().st_size for path in files.values()) <= 25_000_000
    assert known_names(folder) == people.named_people()


def test_quality_of_the_networks_that_look(mini):
    """A form in small of the test below: the rows for which the UNet draws nobody."""
    key = jax.random.key(0)
    drawn = drawings.portraits(people.unnamed("test", 30), 2, key)
    assert measures.psnr(drawn.images, measures.reconstruct(mini, drawn.images)).mean() > 27
    found, seen = measures.look(mini.finder(), drawn.images)
    assert found.mean() > 0.95
    scoring = measures.embed(mini.scoring(), drawn.images)
    for embeds, who in ((seen, drawn.who[found]), (scoring, drawn.who)):
        pairs = measures.verification(embeds, who, 200, np.random.default_rng(0))
        assert measures.auc(*pairs) > 0.98


@pytest.mark.long
def test_quality_on_a_small_sample(mini):
    """As `python -m idea_jax.mini.quality`, with slack for the few that are measured here.

    What falls short of what it must reach is as good as it is written down to be.
    """
    measured = {row["name"]: row["value"] for row in json.loads(QUALITY.read_text())}
    rows = measures.table(mini, seed=1, named=100, unnamed=60, pairs=1000, each=2, composed=60)
    slack = {"dB": 0.5, "": 0.003, "%": 10.0}
    for row in rows:
        value = measured[row.name.replace("1,000 pairs", "10,000 pairs")]
        if row.unit == "s":  # the machine may be busy
            continue
        if row.at_most:
            assert row.value <= max(row.must, value) + slack[row.unit] / 2, row
        else:
            assert row.value >= min(row.must, value) - slack[row.unit], row
    assert len(rows) == len(measured) == 15


def test_documentation_has_the_numbers_that_were_measured():
    """The column of seed 1 in docs/mini.md is docs/mini_quality.json; what misses is bold."""
    text = (QUALITY.parent / "mini.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    shown = {cells[1]: cells[3] for cells in lines if len(cells) == 7}
    rows = [measures.Row(**row) for row in json.loads(QUALITY.read_text())]
    for row in rows:
        value = f"{row.value:.{1 if row.unit else 4}f} {row.unit}".strip()
        assert shown[row.name] == (f"**{value}**" if row.missed() else value), row.name


@pytest.mark.long
def test_a_short_personalisation_beats_its_start(mini):
    """Fifty steps on one picture; compared with the celebrity anchor that they start from."""
    learner = trials.Lab(mini, trials.read_config("paper_alone", {"max_train_steps": 50}))
    scoring = mini.scoring()
    prompts = captions.PROMPTS
    gains = []
    for person in trials.meet(mini, "validation", [2, 3], 4, prompts=prompts):
        begin, _ = learner.begin(person.photos)
        end, losses = learner.learn(person.photos)
        drawn = [learner.draw(state, [p.text for p in prompts], 2) for state in (begin, end)]
        (before, _), (after, kept) = (
            trials.judge_pictures(mini, scoring, person, pictures, prompts) for pictures in drawn
        )
        gains.append(after - before)
        assert kept > 0.8
        assert np.mean(losses[-10:]) < np.mean(losses[:10])
    # They gain 0.32 and 0.85, and keep 96% and 92%.
    assert min(gains) > 0.15 and np.mean(gains) > 0.35


def test_the_shared_enhancer_draws_a_stranger_without_a_step(mini):
    learner = trials.Lab(mini, trials.read_config("paper", {"max_train_steps": 0}))
    (person,) = trials.meet(mini, "validation", [2], 2)
    state, losses = learner.learn(person.photos)
    assert losses == []
    drawn = learner.draw(state, [prompt.text for prompt in captions.PROMPTS], 2)
    likeness, kept = trials.judge_pictures(mini, mini.scoring(), person, drawn)
    assert likeness > 0.9 and kept > 0.95


@pytest.mark.parametrize("prompt", ["a photo of {} smiling", "a cartoon of {} with a red hat"])
def test_pictures_equal_those_of_torch(mini, prompt):
    prompt = prompt.format(people.full_name(5, 5))
    ours = measures.draw(mini, prompt, 2, seed=7, steps=20, batch_size=2)
    pipeline = StableDiffusionPipeline.from_pretrained(mini.folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise, _ = initial_noise(7, np.arange(2), (8, 8, mini.model.unet.in_channels))
    theirs = pipeline(
        [prompt] * 2,
        latents=torch.tensor(np.asarray(noise).transpose(0, 3, 1, 2).copy()),
        num_inference_steps=20,
        guidance_scale=measures.GUIDANCE,
        output_type="np",
    ).images
    assert ours.std() > 20  # not a flat picture
    assert np.abs(ours / 255 - theirs).max() <= 2 / 255


def test_two_people_are_told_apart_by_the_faces_that_are_found(mini):
    one, two = trials.meet(mini, "validation", [0, 1], 2, prompts=captions.PROMPTS[:1])
    images = np.concatenate([one.photos, one.true[0], two.photos, two.true[0]])
    found, embeds = measures.look(mini.finder(), images)
    assert found.all()
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, rtol=1e-5)
    similarity = embeds @ embeds.T
    assert similarity[:3, :3].min() > similarity[:3, 3:].max() + 0.2


def test_detector_finds_faces_of_any_size_turned_and_aside(mini):
    """Pictures of another size than the detector's own, and what faces/finding.py makes of them."""
    who = people.unnamed("validation", 6)
    scenes = drawings.random_scenes(jax.random.key(1), (6,))
    scenes = scenes._replace(style=np.zeros(6, np.int32), light=np.zeros(6, np.int32))
    angles, zooms = np.radians([0, 20, -20, 45, -45, 30]), [0.9, 0.5, 0.35, 0.6, 0.3, 0.8]
    draw = jax.jit(world.draw, static_argnames="size")
    finder = mini.finder()
    for number, (angle, zoom) in enumerate(zip(angles, zooms, strict=True)):
        person, scene = (
            jax.tree.map(lambda leaf, i=number: leaf[i], tree) for tree in (who, scenes)
        )
        view = world.View(zoom, angle, 0.6 * (1 - zoom), -0.4 * (1 - zoom))
        key = jax.random.fold_in(jax.random.key(2), number)
        there = world.landmarks(person, scene, key, size=384, view=view)
        picture = to_uint8(np.asarray(draw(person, scene, jax.random.clone(key), 384, view)))
        seen = finder.look_at(Image.fromarray(picture), number)
        across = np.linalg.norm(there[1] - there[0])
        # The smallest of them, turned by 45 degrees, is at the edge of what was learned: it is
        # found, but its points are 0.27 off.
        off = np.linalg.norm(seen.points - there, axis=1).mean()
        if number == 4:
            assert off < 0.35 * across
            continue
        assert off < 0.2 * across, number
        # Heads are tilted a little themselves, so the angle is that between the points.
        turned, true = (training_square(p, (384, 384))[2] for p in (seen.points, there))
        assert abs(np.degrees(turned - true)) < 12, number


def test_photo_of_the_demo_shows_the_person_it_is_compared_with(mini):
    with Image.open(demo.PHOTO) as photo:
        pixels = np.asarray(photo.convert("RGB"))
    drawn = demo.draw_photo().astype(int)
    assert np.abs(drawn - pixels).max() <= 2  # another processor may round a pixel differently
    met = trials.meet(mini, "test", [demo.PERSON, demo.PERSON + 1], 1, prompts=captions.PROMPTS[:1])
    (square,) = measures.embed(mini.scoring(), demo.face_square(pixels)[None])
    same, other = (float(np.mean(person.references @ square)) for person in met)
    assert same > 0.75 and same > other + 0.15
    # Small, aside and turned: the person is found there, and upright in what is learned from.
    points = mini.finder().look_at(Image.fromarray(pixels), "the photo").points
    (x, y), side, angle = training_square(points, pixels.shape[1::-1])  # without margin
    assert side < 110 and np.hypot(x - 128, y - 128) > 30 and 15 < np.degrees(angle) < 33


def test_second_look_recognises_the_person_of_the_demo(mini):
    """By the first look the small, turned face is nearer to a stranger than to its own drawings."""
    finder = mini.finder()
    set_ = drawings.portraits(people.unnamed("test", demo.PERSON + 1), 8, jax.random.key(0))
    rows = np.flatnonzero(set_.who == demo.PERSON)
    pictures = [Image.fromarray(set_.images[row]) for row in rows]
    crops = [align(p, set_.points[row]) for p, row in zip(pictures, rows, strict=True)]
    true = embedding.mean_embedding(embedding.embed_faces(finder.recogniser, crops))
    with Image.open(demo.PHOTO) as photo:
        photo = photo.convert("RGB")
    (once,) = finding.find_faces(finder.detector, photo, "the photo")
    first = embedding.embed_faces(finder.recogniser, [align(photo, once.points)])[0] @ true
    second = finder.look_at(photo, "the photo").embed @ true
    assert first < 0.88 and second > 0.95


def test_table_of_looks_says_what_was_seen(mini):
    seen = second_look.look(mini.finder(), "validation", 1)
    assert {(s.degrees, s.side) for s in seen} <= {
        (d, s) for d in second_look.DEGREES for s in second_look.SIDES
    }
    rows = {row.name: row for row in second_look.table(seen)}
    assert len(rows) == 1 + len(second_look.DEGREES) + len(second_look.SIDES)
    assert rows["all"].faces == len(seen) >= 25
    assert rows["all"].second > rows["all"].first and rows["all"].best > 0.9
    assert rows["36 pixels"].second > rows["36 pixels"].first
    assert len(second_look.markdown(list(rows.values())).splitlines()) == 2 + len(rows)


def test_pictures_on_their_side_and_upside_down_are_turned_where_the_detector_is_surer(mini):
    upright = second_look.look(mini.finder(), "validation", 2)
    for turn in (90, 180):
        seen = second_look.look(mini.finder(), "validation", 2, turn=turn)
        # The true points were turned with the picture.
        best = {(s.person, s.degrees, s.side): s.best for s in upright}
        assert all(abs(s.best - best[s.person, s.degrees, s.side]) < 0.05 for s in seen)
        gains = [s.second - s.first for s in seen]
        assert np.mean(gains) > 0.05


def test_demo_replaces_what_it_made_and_nothing_else(tmp_path, capsys):
    mine = tmp_path / "photo" / "mine.png"
    mine.parent.mkdir()
    mine.touch()
    assert demo.main([str(tmp_path)]) == 1
    assert f"{mine.parent} would be replaced" in capsys.readouterr().err and mine.is_file()
    made = tmp_path / "demo"
    demo.clear(made)  # an empty one, as before the first
    for path in (made / "photo" / "photo.png", made / "index.html", made / "notes.txt"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    demo.clear(made)  # as before the second
    assert {path.name for path in made.iterdir()} == {demo.MARK, "notes.txt"}
    earlier = tmp_path / "earlier"  # of a version that left no mark
    (earlier / "photo").mkdir(parents=True)
    shutil.copy(demo.PHOTO, earlier / "photo" / "photo.png")
    demo.clear(earlier)
    assert [path.name for path in earlier.iterdir()] == [demo.MARK]


def test_record_says_how_it_was_made(mini):
    """All of it by the command as it stands: its stages, with its sizes and steps."""
    record = json.loads((mini.folder / RECORD).read_text())
    assert record.keys() == {"seed", "budget", "stages"}
    assert record["budget"] == json.loads(json.dumps(dataclasses.asdict(BUDGETS["full"])))
    assert list(record["stages"]) == list(all_stages.STAGES)
    for name, stage in record["stages"].items():
        for what, losses in stage.items():
            if what.startswith("losses"):
                assert np.mean(losses[-5:]) < np.mean(losses[:5]), (name, what)


def test_image_encoder_finds_the_caption_of_a_picture(mini):
    """With transformers' classes: unit outputs of both encoders, the text's without projection."""
    load = {"dtype": torch.float32, "local_files_only": True}
    see = CLIPVisionModelWithProjection.from_pretrained(mini.folder / "image_encoder", **load)
    read = CLIPTextModel.from_pretrained(mini.folder / "text_encoder", **load)
    images, said = drawn_people.portraits(32)
    pixels = np.asarray(drawings.to_float(images)).transpose(0, 3, 1, 2)
    ids = torch.tensor(mini.tokenizer(said).astype(int))
    with torch.no_grad():
        pictures = see(torch.tensor(pixels)).image_embeds
        texts = read(ids).pooler_output
    cosines = torch.nn.functional.cosine_similarity(pictures[:, None], texts[None], dim=-1)
    right = np.mean(cosines.argmax(dim=1).numpy() == np.arange(32))
    assert right > 0.9, right  # 1 here


def test_learning_never_sees_the_recogniser_that_scores(mini):
    assert portraits.find_face_model(None, mini.folder).name == "recogniser.onnx"
    files = [mini.folder / "face" / f"{name}.onnx" for name in ("recogniser", "scoring")]
    assert len({hashlib.sha256(path.read_bytes()).digest() for path in files}) == 2


def test_demo_writes_a_page_that_needs_no_other_file(tmp_path, monkeypatch, capsys):
    """The demo as it is, with ten steps: what it shows is what was drawn and measured."""
    short = tmp_path / "short.yaml"
    short.write_text(demo.CONFIG.read_text().replace("max_train_steps: ", "max_train_steps: 10 # "))
    monkeypatch.setattr(demo, "CONFIG", short)
    trained_on, training_pixels = [], learners.training_pixels

    def recorded(*args):
        for name, pixels, sizes in training_pixels(*args):
            trained_on.append(to_uint8(pixels))
            yield name, pixels, sizes

    monkeypatch.setattr(learners, "training_pixels", recorded)
    assert demo.main([str(tmp_path / "demo")]) == 0
    page = (tmp_path / "demo" / "index.html").read_text()
    assert not re.findall(r"https?://|src=(?!\"data:)|href", page)
    shown = [base64.b64decode(data) for data in re.findall(r"image/png;base64,([^\"]+)", page)]
    photo, square, *grids = (np.asarray(Image.open(io.BytesIO(data))) for data in shown)
    np.testing.assert_array_equal(photo, np.asarray(Image.open(demo.PHOTO).convert("RGB")))
    assert len(trained_on) == 1
    np.testing.assert_array_equal(square, trained_on[0])
    # What the model drew says so, the photo does not.
    marked = ["AIGenerated" in Image.open(io.BytesIO(data)).text for data in shown]
    assert marked == [False, False, *(True for _ in demo.PROMPTS)]
    drawn = sorted((tmp_path / "demo" / "pictures").glob("*/00000.png"))
    assert len(grids) == len(drawn) == len(demo.PROMPTS)
    for path in drawn:
        first = np.asarray(Image.open(path))
        assert any(np.array_equal(first, grid[: len(first), : first.shape[1]]) for grid in grids)
    assert page.count("<polyline") == 1
    said = re.search(r"learned from the picture\): (-?\d\.\d\d)", capsys.readouterr().out)[1]
    shown = re.search(r"learned from the picture</td><td class=number>(-?\d\.\d{3})<", page)[1]
    assert abs(float(said) - float(shown)) <= 0.0056  # rounded to two digits and to three
    assert read_png_text(tmp_path / "demo" / "overview.png")["AIGenerated"] == "true"
