"""Drawing: what a picture depends on, and what is written beside it."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image
from safetensors.numpy import save_file

import sample_jax
from idea_jax.config import reading
from idea_jax.config.settings import ConfigError, SampleConfig
from idea_jax.data import images, text
from idea_jax.data.tokenizer import Tokens, load_tokenizer
from idea_jax.diffusion import samplers
from idea_jax.formats import learned_embeds
from idea_jax.formats.identity import Identity, write_identity
from idea_jax.method import condition
from idea_jax.models import sd
from idea_jax.runtime import files
from idea_jax.sampling import plan as sitters_of
from idea_jax.sampling import programs
from idea_jax.sampling.plan import (
    Sitter,
    padded,
    plan,
    read_prompts,
    read_sitters,
    read_tokens,
    weighted_tokens,
)


@pytest.fixture(scope="module")
def loaded(random_checkpoint):
    model, frozen = sd.load(random_checkpoint)
    tokenizer = load_tokenizer(random_checkpoint / "tokenizer", model.text.vocab_size, 77)
    return model, frozen, tokenizer.with_placeholder("<person>", 2)


@pytest.fixture(scope="module")
def identity(loaded):
    """An identity whose parts are all far from their start."""
    model, frozen, _ = loaded
    method = condition.make_method("paper", kv="low_rank")
    rng = np.random.default_rng(0)
    start = rng.normal(size=(2, 32)).astype(np.float32)
    key = jax.random.key(0)
    trainable = condition.init_trainable(model, method, key, start)
    trainable = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape), trainable)
    face = rng.normal(size=512)
    given = condition.init_given(model, method, key, start, face / np.linalg.norm(face))
    return Identity(
        method=method,
        trainable=jax.tree.map(np.float32, trainable),
        given=given,
        placeholder="<person>",
        base_model="tiny",
        revision=None,
        seed=0,
        steps=1,
    )


def keys_values(loaded, identity, prompt="a photo of {}", negative="", strength=1.0):
    model, frozen, tokenizer = loaded
    ids = tokenizer([text.fill(prompt, tokenizer.placeholders[0]), negative])
    return programs.prompt_keys_values(
        model,
        identity.method,
        frozen,
        identity.trainable,
        identity.given,
        *ids,
        jnp.float32(strength),
    )


def draw(
    loaded,
    kv,
    indices,
    guidance_scale=5.0,
    is_guided=True,
    scheduler="ddim",
    eta=0.0,
    interval=None,
):
    drawn = programs.draw(
        *loaded[:2],
        kv,
        jnp.uint32(7),
        jnp.asarray(indices, jnp.int32),
        jnp.float32(guidance_scale) if is_guided else None,
        programs.Sampling((32, 32), scheduler, 4, eta, interval),
    )
    return np.asarray(drawn)


def test_picture_is_the_same_in_any_batch(loaded, identity):
    kv = keys_values(loaded, identity)
    together = draw(loaded, kv, [0, 1, 2, 3], eta=0.5)
    alone = draw(loaded, kv, [2], eta=0.5)
    shuffled = draw(loaded, kv, [3, 2, 9, 0], eta=0.5)
    np.testing.assert_allclose(alone[0], together[2], atol=1e-4)
    np.testing.assert_allclose(shuffled[1], together[2], atol=1e-4)
    assert np.abs(together[0] - together[1]).mean() > 0.01


@pytest.mark.parametrize(
    ("scheduler", "interval"),
    [("ddim", None), ("dpmpp_2m", (0.3, 0.8)), ("euler_ancestral", None), ("lcm", None)],
)
def test_each_step_has_the_row_of_its_own_timestep(loaded, identity, scheduler, interval):
    """Against the same loop with the whole UNet in it, which embeds the timestep it is given."""
    model, frozen, _ = loaded
    kv = keys_values(loaded, identity)
    drawn = draw(loaded, kv, [0, 3], scheduler=scheduler, interval=interval)
    latent_size = [side // model.vae.downscale for side in (32, 32)]
    x, keys = samplers.initial_noise(7, jnp.asarray([0, 3]), (*latent_size, 4))

    @jax.jit
    def plain(x, off):
        def predict(first):
            rows = jax.tree.map(lambda leaf: jnp.repeat(leaf[first:], 2, axis=0), kv)
            return lambda x, timestep: sd.predict(model, frozen, x, timestep + off, rows)

        chosen = samplers.guided(predict(0), 5.0)
        if interval is not None:
            chosen = samplers.guided_between(chosen, predict(1), interval, model.schedule)
        x = samplers.sample(scheduler, chosen, x, model.schedule, 4, keys=keys)
        return sd.decode(model, frozen, x)

    np.testing.assert_allclose(drawn, plain(x, 0), atol=1e-4)
    assert np.abs(drawn - plain(x, 100)).max() > 0.01  # those of another step are seen


def test_many_pictures_are_decoded_in_parts(loaded, monkeypatch):
    model, frozen, _ = loaded
    latents = jax.random.normal(jax.random.key(3), (5, 4, 4, 4))
    monkeypatch.setattr(programs, "DECODED", 2)
    whole, parts = (
        jax.jit(functools.partial(function, model)).trace(frozen, latents)
        for function in (sd.decode, programs.decode)
    )
    assert "f32[5,8,8," in str(whole.jaxpr) and "f32[5,8,8," not in str(parts.jaxpr)
    expected, drawn = (traced.lower().compile()(frozen, latents) for traced in (whole, parts))
    np.testing.assert_allclose(drawn, expected, atol=1e-5)


def test_picture_is_the_same_on_any_number_of_devices(loaded, identity):
    kv = keys_values(loaded, identity)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(jnp.arange(8, dtype=jnp.int32), NamedSharding(mesh, P("data")))
    model, frozen, _ = loaded
    everywhere = jax.device_put((frozen, kv), NamedSharding(mesh, P()))
    drawn = draw((model, everywhere[0]), everywhere[1], spread)
    np.testing.assert_allclose(drawn[:4], draw(loaded, kv, [0, 1, 2, 3]), atol=1e-4)


def test_guidance_of_one_is_the_prompt_alone(loaded, identity):
    kv = keys_values(loaded, identity)
    alone = draw(loaded, kv, [0], guidance_scale=1.0, is_guided=False)
    guided = draw(loaded, kv, [0], guidance_scale=1.0)
    np.testing.assert_allclose(alone, guided, atol=1e-4)
    assert np.abs(draw(loaded, kv, [0], guidance_scale=5.0) - guided).max() > 1e-2


def test_guidance_on_the_whole_interval_is_guidance_and_on_none_of_it_is_none(loaded, identity):
    kv = keys_values(loaded, identity)
    guided = draw(loaded, kv, [0], guidance_scale=5.0)
    whole = draw(loaded, kv, [0], guidance_scale=5.0, interval=(0.0, 1.0))
    np.testing.assert_allclose(whole, guided, atol=1e-5)
    # Between two timesteps of the sampler there is none at all.
    nothing = draw(loaded, kv, [0], guidance_scale=5.0, interval=(0.9991, 0.9999))
    alone = draw(loaded, kv, [0], guidance_scale=1.0, is_guided=False)
    np.testing.assert_allclose(nothing, alone, atol=1e-4)
    assert np.abs(nothing - guided).max() > 1e-2


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_negative_prompt_has_the_keys_and_values_of_the_person_and_no_more(
    loaded, identity, strength
):
    """As with a LoRA: the delta is in the weights, and the adapter acts where somebody is named."""
    model, frozen, tokenizer = loaded
    assert identity.method.adapter and identity.method.kv == "low_rank"
    kv = keys_values(loaded, identity, negative="blurry", strength=strength)
    plain = sd.encode_text(model, frozen, tokenizer(["blurry"]))[0]
    expected = jax.tree.map(
        lambda kernel, delta: plain @ (kernel + strength * delta["down"] @ delta["up"]),
        frozen.cross_kv,
        identity.trainable["kv"],
    )
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got[0], want, atol=1e-5), kv, expected
    )


def test_prompt_and_strength_change_the_picture(loaded, identity):
    first = draw(loaded, keys_values(loaded, identity), [0])
    for change in ({"prompt": "a drawing of {}"}, {"negative": "red"}, {"strength": 0.0}):
        assert (
            np.abs(draw(loaded, keys_values(loaded, identity, **change), [0]) - first).max() > 1e-3
        )


def test_person_may_stand_anywhere_and_twice(loaded, identity):
    for prompt in ("{}", "{} and {}", "a ({}), smiling", "the face of {}'s friend"):
        kv = keys_values(loaded, identity, prompt=prompt)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kv))


def run(folder, identity_file, save_dir, *flags):
    common = ["--pretrained_model_name_or_path", folder, "--save_dir", save_dir]
    source = [] if identity_file is None else ["--identity", identity_file]
    quick = ["--num_inference_steps", "4", "--num_images_per_prompt", "2"]
    return sample_jax.main([str(f) for f in (*common, *source, *quick, *flags)])


def read_folder(folder):
    return np.stack([np.asarray(Image.open(p)) for p in sorted(folder.glob("0*.png"))])


def test_command_writes_pictures_grid_and_what_made_them(
    random_checkpoint, identity, tmp_path, capsys
):
    file = tmp_path / "identity.safetensors"
    write_identity(file, identity)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeff\na photo of {}\n\na painting of {}\na photo of {}\n", "utf-8")
    save_dir = tmp_path / "pictures"
    args = (random_checkpoint, file, save_dir, "--prompt_file", prompts, "--n_iter", 2)
    assert run(*args) == 0
    folders = [save_dir / line.split("/")[-1] for line in capsys.readouterr().out.split()]
    assert len(folders) == 2 and set(folders) == set(save_dir.iterdir())  # a repeated one once
    photos, paintings = (read_folder(folder) for folder in folders)
    assert photos.shape == (4, 32, 32, 3)  # two iterations of two
    about = json.loads((folders[0] / "run.json").read_text())
    assert about["prompt"] == "a photo of {}" and about["seed"] == 0
    assert about["model"] == "tiny" and about["identity"]["file"] == "identity.safetensors"
    assert about["identity"]["sha256"] == files.file_digest(file)
    marks = images.read_png_text(folders[0] / "00001.png")
    assert marks["AIGenerated"] == "true"
    assert json.loads(marks["parameters"])["picture"] == 1
    # The other prompts, the batch and the number of pictures change no picture.
    again = tmp_path / "again"
    assert (
        run(random_checkpoint, file, again, "--prompt", "a painting of {}", "--batch_size", 1) == 0
    )
    (folder,) = again.iterdir()
    difference = np.abs(read_folder(folder).astype(int) - paintings[:2])
    assert difference.max() <= 1


def test_other_settings_get_a_folder_of_their_own(random_checkpoint, identity, tmp_path):
    file = tmp_path / "identity.safetensors"
    write_identity(file, identity)
    save_dir = tmp_path / "pictures"
    base = (random_checkpoint, file, save_dir, "--prompt", "{}", "--guidance_scale", 2)
    for seed, count in ((0, 1), (0, 1), (1, 2), (0, 2)):
        assert run(*base, "--seed", seed) == 0
        assert len(list(save_dir.iterdir())) == count


def test_legacy_embeddings_draw_as_the_same_tokens(random_checkpoint, identity, tmp_path):
    vectors = identity.trainable["pseudo_tokens"]
    legacy = tmp_path / "learned_embeds.bin"
    torch.save({f"<00011>_v{i}": torch.tensor(row) for i, row in enumerate(vectors)}, legacy)
    base = (random_checkpoint, None, tmp_path / "bin", "--prompt", "a photo of {}")
    assert run(*base, "--learned_embedding_path", legacy) == 0
    # A file for the web interfaces has no name inside; its own may be a word of the vocabulary.
    webui = tmp_path / "person.safetensors"
    learned_embeds.write_webui(webui, vectors, {})
    base = (random_checkpoint, None, tmp_path / "webui", "--prompt", "a photo of {}")
    assert run(*base, "--learned_embedding_path", webui) == 0
    file = tmp_path / "identity.safetensors"
    write_identity(file, identity)
    base = (random_checkpoint, file, tmp_path / "all", "--prompt", "a photo of {}")
    assert run(*base, "--id_strength", 0) == 0
    (silenced,) = (tmp_path / "all").iterdir()
    for name in ("bin", "webui"):
        (tokens,) = (tmp_path / name).iterdir()
        difference = np.abs(read_folder(tokens).astype(int) - read_folder(silenced))
        assert difference.max() <= 1


@pytest.mark.parametrize("flags", [["--preset", "fast"], ["--guidance_interval", "0.51", "0.52"]])
def test_guidance_where_no_step_lies_is_refused(
    random_checkpoint, identity, tmp_path, capsys, flags
):
    """It would be none at all, and the negative prompt would not be heard."""
    file = tmp_path / "identity.safetensors"
    write_identity(file, identity)
    one = ["--prompt", "{}", "--negative_prompt", "blurry", "--num_inference_steps", "1", *flags]
    assert run(random_checkpoint, file, tmp_path / "out", *one) == 1
    assert "no step of num_inference_steps 1 lies within" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_weights_and_chunks_equal_the_rule_computed_by_hand(loaded, identity):
    """A weight multiplies a token's row of the condition; chunks are encoded one by one."""
    model, frozen, tokenizer = loaded
    method = condition.make_method("cross_init")
    trainable = {"pseudo_tokens": identity.trainable["pseudo_tokens"]}
    prompt = "(a photo:1.5) of {} " + "dog " * 90
    named = weighted_tokens(tokenizer, prompt, {"{}": tokenizer.placeholder.text})
    empty = tokenizer.chunks([("", 1.0)])
    negative = padded(empty, empty, 2)
    people = (model, (method,), frozen, (trainable,), ({},))
    kv = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b]),
        programs.plain_keys_values(model, frozen, negative),
        programs.named_keys_values(*people, named, jnp.float32(1)),
    )

    tokens = tokenizer.ids(
        prompt.replace("(", "").replace(":1.5)", "").format("<person>_v0 <person>_v1")
    )
    weighted = len(tokenizer.ids("a photo"))
    rows = []
    for chunk, part in enumerate((tokens[:75], tokens[75:])):
        ids = np.full(77, tokenizer.pad, np.int32)
        ids[: len(part) + 2] = [tokenizer.bos, *part, tokenizer.eos]
        context = np.array(sd.encode_text(model, frozen, ids[None], trainable["pseudo_tokens"])[0])
        if chunk == 0:
            context[1 : 1 + weighted] *= 1.5
        rows.append(context)
    plain = np.array(sd.encode_text(model, frozen, tokenizer([""]))[0])
    both = np.stack([np.concatenate([plain, plain]), np.concatenate(rows)])
    jax.tree.map(
        lambda leaf, kernel: np.testing.assert_allclose(leaf, both @ kernel, rtol=1e-4, atol=1e-5),
        kv,
        frozen.cross_kv,
    )


def config_of(**changes):
    given = {"pretrained_model_name_or_path": "m", "identity": ["i"], "prompt": ["{}"], **changes}
    return reading.build(SampleConfig, {}, given)


def test_one_of_several_tokens_is_chosen_by_its_name(tmp_path):
    path = tmp_path / "learned_embeds.safetensors"
    tokens = {f"<{name}>": np.full((2, 32), k, np.float32) for k, name in enumerate("ab")}
    save_file({**tokens, "a": np.full((2, 32), 7, np.float32)}, path)
    for asked, value in (("<a>", 0), ("<b>", 1), ("B", 1), ("a", 7)):
        cfg = config_of(identity=None, learned_embedding_path=str(path), token=asked)
        identity, _ = read_tokens(cfg)
        assert (identity.trainable["pseudo_tokens"] == value).all()
    with pytest.raises(ConfigError, match="--token chooses from --learned_embedding_path"):
        config_of(token="<a>")


def test_the_two_files_of_sdxl_are_read_together(tmp_path):
    """As training and diffusers write them; by the first of them, or by their folder."""
    path = tmp_path / "learned_embeds.safetensors"
    both = {"clip_l": np.full((2, 8), 1, np.float32), "clip_g": np.full((2, 16), 2, np.float32)}
    learned_embeds.write(path, "<anna>", both, {})
    for given in (path, tmp_path):
        identity, _ = read_tokens(config_of(identity=None, learned_embedding_path=str(given)))
        assert identity.is_of_sdxl
        for name, tokens in identity.trainable["pseudo_tokens"].items():
            np.testing.assert_array_equal(tokens, both[name])
    second = tmp_path / "learned_embeds_2.safetensors"
    for tokens, says in (
        (
            {"<ben>": both["clip_g"]},
            "holds <anna>, and learned_embeds_2.safetensors beside it <ben>",
        ),
        ({"<anna>": both["clip_g"][:1]}, "2 tokens of clip_l and 1 of clip_g"),
    ):
        save_file(tokens, second)
        with pytest.raises(learned_embeds.EmbedsError, match=says):
            read_tokens(config_of(identity=None, learned_embedding_path=str(path)))


def test_a_folder_stands_for_the_identity_in_it(identity, tmp_path):
    (tmp_path / "anna").mkdir()
    write_identity(tmp_path / "anna" / "identity.safetensors", identity)
    file = tmp_path / "anna" / "identity.safetensors"
    for given, name in (
        (tmp_path / "anna", "anna"),
        (file, "anna"),
        (f"eve={tmp_path / 'anna'}", "eve"),
    ):
        (sitter,) = read_sitters(config_of(identity=[str(given)]))
        assert (sitter.name, sitter.source) == (name, file)
    write_identity(tmp_path / "bo" / "identity.safetensors", identity)
    with pytest.raises(ConfigError, match="2 people.*: anna, bo; name those to draw"):
        read_sitters(config_of(identity=[str(tmp_path)]))


def test_comments_and_blank_lines_of_a_prompt_file_are_no_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# of the sea\n\n{} on the beach\n   # {} alone\n a #1 photo of {} \n", "utf-8")
    found = read_prompts(config_of(prompt=None, prompt_file=str(path)))
    assert found == ["{} on the beach", "a #1 photo of {}"]


@pytest.mark.parametrize("negative", ["<person>", "ugly <Person>, bad", "<person>_v0 ugly"])
def test_the_person_in_the_negative_prompt_is_refused_however_named(
    loaded, identity, random_checkpoint, negative
):
    model, _, _ = loaded
    plain = load_tokenizer(random_checkpoint / "tokenizer", model.text.vocab_size, 77)
    sitters = [Sitter("anna", identity, Path("identity.safetensors"))]
    with pytest.raises(ConfigError, match="leave <person> out of it"):
        plan(config_of(negative_prompt=negative), ["{}"], sitters, plain)
    _, tokens = plan(config_of(negative_prompt="a person"), ["{}"], sitters, plain)
    assert (tokens.ids < model.text.vocab_size).all()


def test_negative_prompt_that_names_the_person_is_refused(
    random_checkpoint, identity, tmp_path, capsys
):
    file = tmp_path / "identity.safetensors"
    write_identity(file, identity)
    args = (random_checkpoint, file, tmp_path / "x", "--prompt", "{}")
    assert run(*args, "--negative_prompt", "<person>_v0 ugly") == 1
    assert "leave <person> out of it" in capsys.readouterr().err


def test_person_may_be_called_anything_that_a_prompt_can_say(tmp_path, monkeypatch):
    monkeypatch.setattr(sitters_of, "read_identity", str)
    file = tmp_path / "a=b" / "identity.safetensors"
    given = [str(file), f"jürgen={file}", f"anna smith={file}", f"x.1={file}"]
    cfg = SampleConfig("tiny", identity=given, prompt=["{}"])
    sitters = read_sitters(cfg)
    assert [sitter.name for sitter in sitters] == ["a=b", "jürgen", "anna smith", "x.1"]
    assert {sitter.source for sitter in sitters} == {file}


def test_several_people_alone_and_in_one_picture(random_checkpoint, identity, tmp_path, capsys):
    """Each alone as with the file of one; twins together as the one person they are."""
    files_of = {}
    for name, scale in (("anna", 1.0), ("bert", -1.0)):
        tokens = identity.trainable["pseudo_tokens"] * np.float32(scale)
        changed = dataclasses.replace(
            identity, trainable={**identity.trainable, "pseudo_tokens": tokens}
        )
        (tmp_path / name).mkdir()
        files_of[name] = tmp_path / name / "identity.safetensors"
        write_identity(files_of[name], changed)
    save_dir = tmp_path / "pictures"
    both = [f"twin={files_of['anna']}", "--identity", files_of["anna"], files_of["bert"]]
    prompts = ["a photo of {}", "{anna} and {bert}", "{twin} and {anna}"]
    assert run(random_checkpoint, both[0], save_dir, *both[1:], "--prompt", *prompts) == 0
    folders = [Path(line) for line in capsys.readouterr().out.split()]
    places = [folder.relative_to(save_dir).parts[0] for folder in folders[:3]]
    assert places == ["twin", "anna", "bert"] and len(folders) == 5
    about = json.loads((folders[3] / "run.json").read_text())
    assert set(about["identities"]) == {"anna", "bert"}
    own = json.loads((folders[2] / "run.json").read_text())
    assert own["identity"]["sha256"] == files.file_digest(files_of["bert"])
    drawn = [read_folder(folder).astype(int) for folder in folders]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[2] - drawn[1]).mean() > 1 and np.abs(drawn[3] - drawn[4]).mean() > 1
    alone = tmp_path / "alone"
    for prompt, expected in (("a photo of {}", drawn[1]), ("{} and {}", drawn[4])):
        assert run(random_checkpoint, files_of["anna"], alone, "--prompt", prompt) == 0
        folder = Path(capsys.readouterr().out.strip())
        assert np.abs(read_folder(folder) - expected).max() <= 1
    # What cannot be drawn is said before anything is loaded.
    for bad, says in (("{carl}", "'{carl}'"), ("a hat", "no name"), ("{} and {anna}", "'{anna}'")):
        assert run(random_checkpoint, both[0], save_dir, *both[1:], "--prompt", bad) == 1
        assert says in capsys.readouterr().err
    assert run(random_checkpoint, files_of["anna"], save_dir, *both[1:], "--prompt", "{}") == 1
    assert "are called anna" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eta", "0.5", "--scheduler", "euler"], "eta 0.5 has no effect with sampler euler"),
        (["--karras_sigmas"], "no effect with sampler ddim, which is the checkpoint's own"),
        (["--timestep_spacing", "trailing", "--scheduler", "lcm"], "with sampler lcm"),
        (["--scheduler", "lcm", "--num_inference_steps", "51"], "between 1 and 50 sampling steps"),
        (["--crop_top_left", "0", "8"], "--crop_top_left is for SDXL, and this checkpoint is none"),
    ],
)
def test_settings_that_a_sampler_does_not_have_are_refused(
    random_checkpoint, identity, tmp_path, capsys, flags, message
):
    file = tmp_path / "identity.safetensors"
    write_identity(file, identity)
    assert run(random_checkpoint, file, tmp_path / "out", "--prompt", "{}", *flags) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_checkpoint_says_how_its_pictures_are_drawn(random_checkpoint, identity, tmp_path):
    """Sampler, spacing and Karras sigmas of scheduler_config.json, as if flags had said so; a
    guidance of 0 is one of 1."""
    file, own = tmp_path / "identity.safetensors", tmp_path / "checkpoint"
    write_identity(file, identity)
    shutil.copytree(random_checkpoint, own)
    path = own / "scheduler" / "scheduler_config.json"
    said = {"timestep_spacing": "trailing", "use_karras_sigmas": True}
    said |= {"_class_name": "EulerDiscreteScheduler"}
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    flags = ["--scheduler", "euler", "--timestep_spacing", "trailing", "--karras_sigmas"]
    prompt = ["--prompt", "{}", "--guidance_scale"]
    assert run(own, file, tmp_path / "own", *prompt, "0") == 0
    assert run(random_checkpoint, file, tmp_path / "said", *prompt, "1", *flags) == 0
    assert run(random_checkpoint, file, tmp_path / "other", *prompt, "1", *flags[:2]) == 0
    drawn = [read_folder(next((tmp_path / name).iterdir())) for name in ("own", "said", "other")]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0].astype(int) - drawn[2]).max() > 3
    about = json.loads(next((tmp_path / "own").glob("*/run.json")).read_text())
    assert about["scheduler"] == "euler"


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        ("DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
        ("EulerDiscreteScheduler", {}),
    ],
)
def test_pictures_by_v_with_another_vae_and_clip_skip_equal_those_of_diffusers(
    random_checkpoint, loaded, tmp_path, scheduler, said
):
    own, vae = tmp_path / "checkpoint", tmp_path / "vae"
    shutil.copytree(random_checkpoint, own)
    path = own / "scheduler" / "scheduler_config.json"
    said = {**said, "_class_name": scheduler, "prediction_type": "v_prediction"}
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(random_checkpoint)
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.weight *= -1.5
    pipeline.vae.save_pretrained(vae)
    pipeline.scheduler = getattr(diffusers, scheduler).from_pretrained(own / "scheduler")
    pipeline.set_progress_bar_config(disable=True)
    texts, tokenizer = ("blurry", "a photo of a dog"), loaded[2]
    model, frozen = sd.load(own, vae=vae, clip_skip=1)
    halves = [
        programs.plain_keys_values(model, frozen, Tokens(ids[None], np.ones((1, len(ids)))))
        for ids in tokenizer(texts)
    ]
    kv = programs.stacked(*([half] * 2 for half in halves))
    sampling = programs.Sampling((32, 32), model.schedule.sampler, 4, rescale=0.7)
    # Against diffusers' own: test_clip_skip_gives_the_hidden_state_that_diffusers_takes.
    off, on = (np.asarray(sd.encode_text(model, frozen, ids[None])) for ids in tokenizer(texts))
    embeds = {"negative_prompt_embeds": np.repeat(off, 2, 0), "prompt_embeds": np.repeat(on, 2, 0)}
    numbers = np.array([(7, 0), (7, 1)], np.uint32)
    drawn = programs.draw_rows(model, frozen, kv, numbers, np.float32([5, 5]), sampling)
    latent_side = 32 // model.vae.downscale
    noise, _ = samplers.initial_noise(7, np.arange(2), (latent_side, latent_side, 4))
    theirs = pipeline(
        **{name: torch.tensor(values) for name, values in embeds.items()},
        latents=torch.tensor(np.asarray(noise).transpose(0, 3, 1, 2).copy()),
        num_inference_steps=4,
        guidance_scale=5.0,
        guidance_rescale=0.7,
        output_type="np",
    ).images
    ours = images.to_uint8(np.asarray(drawn)) / 255
    assert ours.std() > 0.04  # not a flat picture
    assert np.abs(ours - theirs).max() <= 2 / 255
