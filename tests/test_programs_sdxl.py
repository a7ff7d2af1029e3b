"""SDXL in the programs around it: batches, the server, evaluation, cards and plans."""

import base64
import dataclasses
import io
import json

import jax
import numpy as np
import pytest
import serving
import test_card as card
from conftest import write_smallest
from people import person
from PIL import Image

from idea_jax import batch, evaluate
from idea_jax.config.reading import build
from idea_jax.faces import random_model
from idea_jax.formats.identity import read_identity, write_identity
from idea_jax.models import sd
from idea_jax.plan import __main__ as plan
from idea_jax.plan import work
from idea_jax.plan.settings import PlanConfig
from idea_jax.runtime import chips


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    return write_smallest(tmp_path_factory.mktemp("xl") / "smallest", "sdxl")


@pytest.fixture(scope="module")
def people(smallest, tmp_path_factory):
    """Two people with all parts."""
    folder, model = tmp_path_factory.mktemp("people"), sd.read_configs(smallest, "float32")
    for seed, name in enumerate(("anna", "ben")):
        who = person(model, seed=seed, base_model="smallest")
        write_identity(folder / name / "identity.safetensors", who)
    return folder


def test_rows_of_a_batch_do_not_depend_on_their_company(smallest, people, tmp_path, monkeypatch):
    """One person or two in a picture, with a negative prompt or without, at another guidance."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda *_, **__: one)
    rows = [
        {"identity": "anna", "prompt": "a photo of {}"},
        {"identity": "ben", "prompt": "a photo of {}", "negative_prompt": "blurry", "seed": 3},
        {"identity": "anna,ben", "prompt": "{anna} and {ben}", "guidance_scale": 5},
    ]

    def drawn(out, asked):
        jobs = tmp_path / "jobs.jsonl"
        jobs.write_text("".join(json.dumps(row) + "\n" for row in asked))
        flags = ["--out", out, "--identities", people, "--pretrained_model_name_or_path", smallest]
        flags += ["--num_inference_steps", 2, "--guidance_scale", 3, "--batch_size", 2]
        assert batch.main([*map(str, [jobs, *flags, "--compile_cache", "off"])]) == 0
        index = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
        return [(out / line["file"]).read_bytes() for line in index]

    together = drawn(tmp_path / "together", rows)
    assert len(set(together)) == 3
    assert drawn(tmp_path / "alone", rows[1:2]) == together[1:2]


def test_the_server_learns_draws_and_exports_people(smallest, tmp_path):
    model = serving.checkpoint(smallest, tmp_path / "model")
    running = serving.Running(model, tmp_path / "served", height=8, width=8)
    with running, running.client() as client:
        job = serving.ended(client, serving.learn(client, "anna", steps=1))
        assert job["state"] == "done", job["problem"]
        folder = running.service.shelf.get("anna").folder
        anna = read_identity(folder / "identity.safetensors")
        assert anna.is_of_sdxl and anna.method.enhanced
        asked = [serving.row("anna"), serving.row("anna", "a sketch of {}")]
        answer = client.post("/v1/images", json={"rows": asked})
        assert answer.status_code == 200, answer.text
        pictures = [base64.b64decode(picture["data"]) for picture in answer.json()["pictures"]]
        first, second = (np.asarray(Image.open(io.BytesIO(data))) for data in pictures)
        assert first.shape == (8, 8, 3) and (first != second).any()


@pytest.fixture(scope="module")
def world(smallest, tmp_path_factory):
    """What `test_card.world` has, around SDXL."""
    return card.world.__wrapped__(tmp_path_factory, smallest)


def test_a_card_trains_an_enhancer_and_compares_methods(world, tmp_path):
    out = tmp_path / "out"
    methods = "paper@steps=0,textual_inversion@steps=1;train_batch_size=1"
    assert evaluate.main(card.arguments(world, out, compare=methods)) == 0
    about = json.loads((out / "card" / "card.json").read_text())
    assert about["enhancer"]["was_trained_here"] and about["enhancer"]["people"] == 3
    summary = json.loads((out / "card" / "summary.json").read_text())
    assert len(summary["methods"]) == 2 and summary["problems"] == []


def test_identities_are_drawn_and_scored(smallest, people, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("anna", "ben"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        pixels = rng.integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name / "0.png")
    scoring = tmp_path / "scoring.onnx"
    random_model.write_random_recogniser(scoring, seed=5)
    given = {"photos": tmp_path / "photos", "identity": people, "output_dir": tmp_path / "out"}
    given |= {"pretrained_model_name_or_path": smallest, "score_model": scoring}
    given |= {"score_crop": "center", "clip": "none", "pictures": 1, "num_inference_steps": 2}
    (tmp_path / "prompts.txt").write_text("a photo of {}\n")
    given |= {"prompts": tmp_path / "prompts.txt", "scheduler": "euler"}
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    assert evaluate.main(words) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["problems"] == []


# --- plans ----------------------------------------------------------------------------------------


def test_a_plan_has_the_bytes_of_the_compiled_step(smallest):
    chip, count = chips.find("v5e:2x2")
    given = {"checkpoint": str(smallest), "mixed_precision": "no", "batch": 4, "mesh": "data=1"}
    given |= {"attention": "xla", "remat": "blocks"}
    planned = work.training(build(PlanConfig, {}, given), chip, count)
    stats = planned.lower(jax.devices()[:1]).compile().memory_analysis()
    held = sum(planned.memory.values()) - planned.memory["autoencoder beside them"]
    assert stats.argument_size_in_bytes == held + 12  # a key of two words, a number of steps


def test_auto_computes_blocks_again_where_nothing_else_fits(smallest, monkeypatch, capsys):
    # With so many pixels the UNet holds the most.
    given = ["--checkpoint", str(smallest), "--no_compile", "--json", "--batch", "8"]
    given += ["--mesh", "data=1", "--mixed_precision", "no", "--resolution", "64"]
    found = {}
    for remat in ("none", "blocks"):
        assert plan.main([*given, "--remat", remat]) == 0
        found[remat] = json.loads(capsys.readouterr().out)
        assert found[remat]["remat"] == remat
    plain, blocks = (found[remat]["memory"]["all"] for remat in ("none", "blocks"))
    assert blocks < plain and found["blocks"]["flops_per_call"] > found["none"]["flops_per_call"]
    small = dataclasses.replace(chips.CHIPS["v5e"], memory=plain - 1, usable=1.0)
    monkeypatch.setitem(chips.CHIPS, "v5e", small)
    assert plan.main(given) == 0
    known = json.loads(capsys.readouterr().out)
    assert (known["remat"], known["fits"]) == ("blocks", True)


def test_other_programs_are_planned(smallest, capsys):
    for what in ("enhancer", "sample"):
        common = ["--checkpoint", str(smallest), "--no_compile", "--what", what]
        assert plan.main([*common, "--device", "h100"]) == 0
        assert ("--remat none" in capsys.readouterr().out) == (what == "enhancer")
