"""Whole runs through the command line, on a tiny checkpoint with random weights."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scrfd
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import sample_jax
import train_jax
from idea_jax.config import reading
from idea_jax.config.settings import TrainConfig
from idea_jax.data import images
from idea_jax.diffusion.samplers import initial_noise
from idea_jax.faces import models as face_models
from idea_jax.formats.identity import read_identity
from idea_jax.models import sd
from idea_jax.training import tensorboard
from idea_jax.training.results import Results
from idea_jax.training.start import how_read


def train(checkpoint_folder, photos, out, *flags):
    common = ["--pretrained_model_name_or_path", checkpoint_folder, "--train_data_dir", photos]
    return train_jax.main([str(flag) for flag in (*common, "--output_dir", out, *flags)])


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def straight(random_checkpoint, photo_folder, tmp_path_factory):
    """Six uninterrupted steps of the paper profile, everything on the way switched on."""
    out = tmp_path_factory.mktemp("straight")
    code = train(
        random_checkpoint,
        photo_folder,
        out,
        *"--max_train_steps 6 --train_batch_size 2 --seed 5 --save_steps 2".split(),
        *"--checkpointing_steps 3 --validation_steps 4 --num_validation_images 2".split(),
        "--validation_prompt",
        "a photo of {}",
    )
    assert code == 0
    return out


def test_training_writes_what_it_promises(straight, random_checkpoint):
    identity = read_identity(straight / "identity.safetensors")
    assert identity.method.profile == "paper" and identity.steps == 6 and identity.seed == 5
    assert identity.base_model == random_checkpoint.name  # a name, not the user's path
    assert identity.placeholder == "<person>"
    assert set(identity.trainable) == {"pseudo_tokens", "adapter", "enhancer", "kv"}
    assert set(identity.given) == {"anchor", "id_embed"}
    np.testing.assert_allclose(np.linalg.norm(identity.given["id_embed"]), 1, rtol=1e-5)
    embeds = load_file(straight / "learned_embeds.safetensors")
    np.testing.assert_array_equal(embeds["<person>"], identity.trainable["pseudo_tokens"])
    webui = load_file(straight / "webui" / "idea-person.safetensors")
    np.testing.assert_array_equal(webui["emb_params"], embeds["<person>"])
    run = json.loads((straight / "run.json").read_text())
    assert run["steps"] == 6 and np.isfinite(run["last_loss"]) and "jax" in run["versions"]
    for step in (2, 4):
        assert read_identity(straight / f"identity-steps-{step}.safetensors").steps == step
    (grid,) = (straight / "validation").iterdir()
    assert grid.name.startswith("step-00004-a-photo-of-")
    assert Image.open(grid).size == (64, 32)
    assert images.read_png_text(grid)["AIGenerated"] == "true"


def test_face_embedding_is_in_no_metadata_and_no_log(straight):
    with safe_open(straight / "identity.safetensors", "numpy") as file:
        metadata = json.dumps(file.metadata())
        value = float(file.get_tensor("given/id_embed")[0])
    texts = [metadata, *(p.read_text() for p in straight.glob("*.json"))]
    assert not any(f"{value:.4f}"[:6] in text for text in texts)


def test_tensorboard_log_holds_every_step(straight):
    raw = next((straight / "logs").iterdir()).read_bytes()
    for name in ("train/loss", "train/denoising", "train/regulariser", "train/grad_norm"):
        assert raw.count(name.encode()) == 6
    assert raw.count(b"validation/") == 1


def test_a_log_does_without_pytorch_and_leaves_it_to_others(tmp_path):
    code = """
import sys
from pathlib import Path
from idea_jax.training import tensorboard
log = tensorboard.Log(Path(sys.argv[1]))
log.scalars({"loss": 1.5}, 1)
log.close()
assert "torch" not in sys.modules, "PyTorch was imported"
import torch
assert torch.zeros(1).item() == 0
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(tensorboard.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, check=True)
    (file,) = tmp_path.iterdir()
    assert b"loss" in file.read_bytes()


def test_resumed_run_equals_the_straight_run_bit_for_bit(
    straight, random_checkpoint, photo_folder, tmp_path, caplog
):
    caplog.set_level("INFO")
    flags = "--train_batch_size 2 --seed 5 --checkpointing_steps 3".split()
    resume = ["--resume_from_checkpoint", "latest"]
    # "latest" without any checkpoint starts from the beginning, and says so.
    assert (
        train(random_checkpoint, photo_folder, tmp_path, *flags, *resume, "--max_train_steps", 3)
        == 0
    )
    assert "starting from the first step" in caplog.text
    stopped = digest(tmp_path / "identity.safetensors")
    assert (
        train(random_checkpoint, photo_folder, tmp_path, *flags, *resume, "--max_train_steps", 6)
        == 0
    )
    assert "resumed after step 3" in caplog.text
    assert digest(tmp_path / "identity.safetensors") != stopped
    assert digest(tmp_path / "identity.safetensors") == digest(straight / "identity.safetensors")

    # By path, from the middle of the run; the checkpoints after it give way to new ones.
    def steps():
        return sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())

    assert steps() == [3, 6]
    path = ["--resume_from_checkpoint", tmp_path / "checkpoints" / "3"]
    often = [*flags[:-1], "1", *path]
    assert train(random_checkpoint, photo_folder, tmp_path, *often, "--max_train_steps", 5) == 0
    assert steps() == [3, 4, 5]
    assert train(random_checkpoint, photo_folder, tmp_path, *often, "--max_train_steps", 6) == 0
    assert steps() == [3, 4, 5, 6]
    assert digest(tmp_path / "identity.safetensors") == digest(straight / "identity.safetensors")


def test_second_run_in_the_same_folder_keeps_the_firsts_checkpoints(
    straight, random_checkpoint, photo_folder, capsys
):
    before = {p: digest(p) for p in straight.rglob("*") if p.is_file()}
    assert train(random_checkpoint, photo_folder, straight, "--seed", 6) == 1
    assert "--resume_from_checkpoint latest" in capsys.readouterr().err
    assert {p: digest(p) for p in straight.rglob("*") if p.is_file()} == before


def test_resuming_where_nothing_is_left_or_too_much_is_done(
    straight, random_checkpoint, photo_folder, tmp_path, capsys, caplog
):
    caplog.set_level("INFO")
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    resume = "--resume_from_checkpoint latest --train_batch_size 2 --seed 5".split()
    before = digest(out / "run.json"), digest(out / "identity.safetensors")
    assert train(random_checkpoint, photo_folder, out, *resume, "--max_train_steps", 6) == 0
    assert "nothing is left to do" in caplog.text
    assert (digest(out / "run.json"), digest(out / "identity.safetensors")) == before
    assert train(random_checkpoint, photo_folder, out, *resume, "--max_train_steps", 5) == 1
    assert "beyond --max_train_steps 5" in capsys.readouterr().err
    # A checkpoint with the same name and other weights is another base model.
    other = tmp_path / "tiny"
    shutil.copytree(random_checkpoint, other)
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    name = next(key for key in tensors if "attn2.to_k" in key)
    save_file(tensors | {name: tensors[name] + 0.01}, weights, {"format": "pt"})
    assert train(other, photo_folder, out, *resume, "--max_train_steps", 7) == 1
    assert "base_weights" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_goes_on_where_it_was(
    straight, random_checkpoint, photo_folder, tmp_path, monkeypatch, capsys, number
):
    report, before = Results.report, signal.getsignal(number)

    def report_and_stop(self, step, *rest):
        report(self, step, *rest)
        if step == 2:
            signal.raise_signal(number)

    flags = "--train_batch_size 2 --seed 5 --max_train_steps 6".split()
    with monkeypatch.context() as patch:
        patch.setattr(Results, "report", report_and_stop)
        assert train(random_checkpoint, photo_folder, tmp_path, *flags) == 128 + number
    # Step 2 is reported while step 3 runs.
    assert "stopped after step 3 of 6" in capsys.readouterr().err
    assert not (tmp_path / "identity.safetensors").exists()
    assert signal.getsignal(number) is before
    resume = ["--resume_from_checkpoint", "latest"]
    assert train(random_checkpoint, photo_folder, tmp_path, *flags, *resume) == 0
    assert digest(tmp_path / "identity.safetensors") == digest(straight / "identity.safetensors")


def test_checkpoints_beyond_the_limit_are_removed(random_checkpoint, photo_folder, tmp_path):
    flags = "--profile cross_init --max_train_steps 4 --train_batch_size 1 --checkpointing_steps 1"
    limit = ["--checkpoints_total_limit", "2"]
    assert train(random_checkpoint, photo_folder, tmp_path, *flags.split(), *limit) == 0
    steps = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert steps == ["3", "4"]
    assert not (tmp_path / "identity-steps-2.safetensors").exists()


def test_commands_of_the_original_readme_run(
    random_checkpoint, photo_folder, tmp_path, caplog, monkeypatch
):
    # A plain checkpoint; the face model is where insightface keeps it.
    plain, pack = tmp_path / "plain", tmp_path / ".insightface" / "models" / "buffalo_l"
    shutil.copytree(random_checkpoint, plain, ignore=shutil.ignore_patterns("face"))
    pack.mkdir(parents=True)
    shutil.copy(random_checkpoint / "face" / "arcface.onnx", pack / "w600k_r50.onnx")
    scrfd.write_detector(pack / "det_10g.onnx", [scrfd.face(320, 200, 60)])
    monkeypatch.setattr(face_models, "KNOWN_SHA256", {})  # these are not the real ones
    monkeypatch.setenv("HOME", str(tmp_path))
    names = tmp_path / "celeb_names.txt"
    names.write_text("Marie Curie\nAlan Turing\nAda Lovelace\n")
    out, pictures = tmp_path / "out", tmp_path / "pictures"
    code = train_jax.main(
        [
            *"--save_steps 100 --only_save_embeds --placeholder_token <00011>".split(),
            *"--train_batch_size 8 --scale_lr --n_persudo_tokens 2 --reg_weight 8e-4".split(),
            *"--learning_rate 0.0015 --max_train_step 320".split(),
            "--train_data_dir",
            str(photo_folder),
            "--celeb_path",
            str(names),
            "--pretrained_model_name_or_path",
            str(plain),
            "--output_dir",
            str(out),
        ]
    )
    assert code == 0
    assert load_file(out / "learned_embeds-steps-300.safetensors")["<00011>"].shape == (2, 32)
    assert not (out / "identity-steps-300.safetensors").exists()  # --only_save_embeds
    code = sample_jax.main(
        [
            "--pretrained_model_name_or_path",
            str(plain),
            "--num_inference_steps",
            "50",
            "--learned_embedding_path",
            str(out / "learned_embeds.bin"),
            "--prompt",
            "{} wearing an oversized sweater",
            "--save_dir",
            str(pictures),
            "--num_images_per_prompt",
            "32",
            "--n_iter",
            "1",
        ]
    )
    assert code == 0
    assert "learned_embeds.bin does not exist; reading learned_embeds.safetensors" in caplog.text
    assert "--identity" in caplog.text  # there is more than the embeddings
    (folder,) = pictures.iterdir()
    assert len(list(folder.glob("000*.png"))) == 32
    assert Image.open(folder / "grid.png").size == (6 * 32, 6 * 32)


def test_pictures_equal_those_of_diffusers(random_checkpoint, photo_folder, tmp_path):
    """The whole chain against diffusers: its own loader of our tokens, its pipeline, same noise."""
    out = tmp_path / "out"
    flags = "--profile cross_init --max_train_steps 3 --train_batch_size 2 --report_to none"
    assert train(random_checkpoint, photo_folder, out, *flags.split()) == 0
    prompt = "a photo of {} on the beach"
    code = sample_jax.main(
        [
            "--pretrained_model_name_or_path",
            str(random_checkpoint),
            "--prompt",
            prompt,
            "--identity",
            str(out / "identity.safetensors"),
            "--save_dir",
            str(tmp_path / "x"),
            *"--num_images_per_prompt 2 --num_inference_steps 7 --guidance_scale 5".split(),
            "--negative_prompt",
            "blurry",
            "--seed",
            "3",
        ]
    )
    assert code == 0
    (folder,) = (tmp_path / "x").iterdir()
    ours = np.stack([np.asarray(Image.open(folder / f"{i:05d}.png")) for i in range(2)])
    pipeline = StableDiffusionPipeline.from_pretrained(random_checkpoint)
    pipeline.load_textual_inversion(out / "learned_embeds.safetensors")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise, _ = initial_noise(3, np.arange(2), (8, 8, 4))
    theirs = pipeline(
        [prompt.replace("{}", "<person>")] * 2,
        negative_prompt=["blurry"] * 2,
        latents=torch.tensor(np.asarray(noise).transpose(0, 3, 1, 2).copy()),
        num_inference_steps=7,
        guidance_scale=5.0,
        output_type="np",
    ).images
    difference = np.abs(ours / 255 - theirs)
    assert ours.std() > 10  # not a flat picture
    assert difference.max() <= 2 / 255


def test_steps_of_one_call_are_those_of_many(straight, random_checkpoint, photo_folder, tmp_path):
    """Calls of four steps, cut where something is saved or drawn, so at 2, 3, 4 and 6."""
    flags = "--max_train_steps 6 --train_batch_size 2 --seed 5 --save_steps 2".split()
    flags += "--checkpointing_steps 3 --steps_per_call 4".split()
    assert train(random_checkpoint, photo_folder, tmp_path, *flags) == 0
    for name in ("identity", "identity-steps-2", "identity-steps-4"):
        ours, theirs = (
            load_file(folder / f"{name}.safetensors") for folder in (tmp_path, straight)
        )
        for key, value in theirs.items():
            np.testing.assert_allclose(ours[key], value, atol=1e-5, err_msg=key)
    curves = [
        json.loads((folder / "run.json").read_text())["loss_curve"]
        for folder in (tmp_path, straight)
    ]
    np.testing.assert_allclose(*curves, rtol=1e-4)


def test_early_stopping_ends_where_nothing_is_gained(random_checkpoint, photo_folder, tmp_path):
    """At rate 0 nothing is: the first evaluation counts, the second and the third do not.

    A run that was interrupted between them ends at the same step, whichever way the setting came.
    """
    flags = "--evaluation_steps 2 --train_batch_size 2 --learning_rate 0".split()
    patience, fast = ["--early_stopping", "2"], ["--preset", "fast"]
    flags += "--profile textual_inversion --checkpointing_steps 2".split()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    last = ["--max_train_steps", "20"]
    assert train(random_checkpoint, photo_folder, whole, *flags, *patience, *last) == 0
    assert read_identity(whole / "identity.safetensors").steps == 6
    assert json.loads((whole / "run.json").read_text())["steps"] == 6
    resume = ["--resume_from_checkpoint", "latest"]
    for how, last, expected in ((patience, 4, 4), (fast, 20, 6), (patience, 30, 6)):
        last = [*how, "--max_train_steps", str(last)]
        assert train(random_checkpoint, photo_folder, parts, *flags, *last, *resume) == 0
        assert read_identity(parts / "identity.safetensors").steps == expected
    assert digest(parts / "identity.safetensors") == digest(whole / "identity.safetensors")


def test_early_stopping_lets_somebody_go_on_who_gains(random_checkpoint, photo_folder, tmp_path):
    """Without any gain this one would end after step 4."""
    flags = "--early_stopping 1 --evaluation_steps 2 --train_batch_size 2".split()
    flags += "--learning_rate 0.05 --profile textual_inversion --max_train_steps 8".split()
    assert train(random_checkpoint, photo_folder, tmp_path, *flags) == 0
    assert read_identity(tmp_path / "identity.safetensors").steps > 4


def test_the_checkpoint_is_read_as_a_training_says(
    random_checkpoint, photo_folder, tmp_path, capsys
):
    """With another autoencoder, and without the last layers of the text encoder."""
    given = {"pretrained_model_name_or_path": str(random_checkpoint), "train_data_dir": "."}
    own = json.loads((random_checkpoint / "vae" / "config.json").read_text())
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(own | {"scaling_factor": 0.5}))
    cfg = reading.build(TrainConfig, {}, given | {"vae": str(tmp_path / "vae"), "clip_skip": 1})
    plain = sd.read_configs(random_checkpoint)
    read = sd.read_configs(random_checkpoint, **how_read(cfg))
    assert read.vae.scaling_factor == 0.5 != plain.vae.scaling_factor
    assert read.text.num_hidden_layers == plain.text.num_hidden_layers - 1
    for flags, message in (
        (["--vae", photo_folder], "is no autoencoder"),
        (["--clip_skip", 9], "--clip_skip 9 leaves nothing"),
    ):
        assert train(random_checkpoint, photo_folder, tmp_path / "out", *flags) == 1
        assert message in capsys.readouterr().err
