"""The random checkpoint, read by this project and by torch's diffusers."""

import json
import random

import jax
import numpy as np
import pytest

from idea_jax import random_sd
from idea_jax.data.text import TEMPLATES, Placeholder, fill, shipped_names
from idea_jax.data.tokenizer import load_tokenizer
from idea_jax.models import hub, sd


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / request.param
    return request.param, random_sd.write(folder, "tiny", request.param, seed=3)


def tokenizer_of(folder):
    size = len(json.loads((folder / "vocab.json").read_text()))
    return load_tokenizer(folder, size, 77)


def test_diffusers_loads_it_and_draws(checkpoint):
    torch = pytest.importorskip("torch")
    from diffusers import StableDiffusionPipeline

    family, folder = checkpoint
    pipeline, info = StableDiffusionPipeline.from_pretrained(folder), {}
    for part in ("text_encoder", "unet", "vae"):
        kind = type(getattr(pipeline, part))
        _, info[part] = kind.from_pretrained(folder, subfolder=part, output_loading_info=True)
    assert all(not any(problems.values()) for problems in info.values())
    assert pipeline.safety_checker is None
    assert pipeline.tokenizer.pad_token_id == (
        0 if family == "sd2" else len(pipeline.tokenizer) - 1
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    picture = pipeline(
        "a photo of a cat", num_inference_steps=2, generator=generator, output_type="np"
    ).images
    assert picture.shape == (1, 32, 32, 3)
    assert np.isfinite(picture).all()


def test_this_project_loads_what_was_drawn_from_the_seed(checkpoint):
    family, folder = checkpoint
    assert hub.resolve(folder).folder == folder
    model, frozen = sd.load(folder)
    assert model == random_sd.config("tiny", family, model.text.vocab_size)
    again = sd.init(model, jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, frozen, again)


def test_families_differ_as_the_real_ones_do():
    one, two = (random_sd.config("tiny", family, 1000) for family in ("sd1", "sd2"))
    assert (one.text.hidden_act, two.text.hidden_act) == ("quick_gelu", "gelu")
    assert (one.unet.use_linear_projection, two.unet.use_linear_projection) == (False, True)
    assert one.unet.num_attention_heads == (8, 8)
    assert two.unet.num_attention_heads == (2, 4)


@pytest.mark.parametrize(
    "size, family, parameters",
    # Sums over the real checkpoints' text encoder, UNet and VAE.
    [
        ("sd15", "sd1", (123_060_480, 859_520_964, 83_653_863)),
        ("sd21", "sd2", (340_387_840, 865_910_724, 83_653_863)),
    ],
)
def test_real_sizes_are_those_of_the_real_checkpoints(size, family, parameters):
    frozen = sd.shapes(random_sd.config(size, family, random_sd.CLIP_VOCAB_SIZE))
    count = {
        name: sum(leaf.size for leaf in jax.tree.leaves(tree))
        for name, tree in frozen._asdict().items()
    }
    assert count.pop("shared") == 0
    assert (count["text"], count["unet"] + count["cross_kv"], count["vae"]) == parameters


def test_every_word_is_one_token(checkpoint):
    tokenizer = tokenizer_of(checkpoint[1] / "tokenizer")
    for word in random_sd.PROMPT_WORDS.split():
        assert len(tokenizer.ids(word)) == 1, word
    for name in shipped_names():
        parts = name.replace("-", " - ").split()
        assert len(tokenizer.ids(name)) == len(parts), name
    known = tokenizer.with_placeholder("<x>", 2)
    for template in TEMPLATES:
        words = template.replace("-", " - ").split()
        assert len(known.ids(fill(template, Placeholder("<x>", 2)))) == len(words) + 1, template


@pytest.mark.parametrize("seed", range(3))
def test_words_that_share_pieces_are_one_token_each(tmp_path, seed):
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcé", k=rng.randint(1, 9))) for _ in range(300)]
    words += ["aaaa", "aaaaa", "東京", "anna", "banana", "ananas"]
    size = random_sd.write_tokenizer(tmp_path, words)
    tokenizer = tokenizer_of(tmp_path)
    assert tokenizer.vocab_size == size
    broken = [word for word in words if len(tokenizer.ids(word)) != 1]
    assert broken == []
    assert len({int(tokenizer.ids(word)[0]) for word in words}) == len(set(words))


def test_vocabulary_has_the_order_of_clip(tmp_path):
    size = random_sd.write_tokenizer(tmp_path, ["cat"], vocab_size=1000)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    assert size == len(vocab) == 1000
    assert (vocab["!"], vocab["a"], vocab["!</w>"], vocab["a</w>"]) == (0, 64, 256, 320)
    assert (vocab["<|startoftext|>"], vocab["<|endoftext|>"]) == (998, 999)
    assert tokenizer_of(tmp_path).ids("cat").tolist() == [vocab["cat</w>"]]
    with pytest.raises(ValueError, match="need 516 tokens, more than 515"):
        random_sd.write_tokenizer(tmp_path, ["cat"], vocab_size=515)


def test_it_says_that_the_weights_are_random(checkpoint):
    family, folder = checkpoint
    readme = (folder / "README.md").read_text()
    assert "its weights are random" in readme
    assert f"--size tiny --family {family} --seed 3" in readme


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        random_sd.write(tmp_path)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        random_sd.write(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "size, family", [("huge", "sd2"), ("tiny", "sd3"), ("sd15", "sd2"), ("sd21", "sd1")]
)
def test_unknown_size_or_family_is_refused(tmp_path, size, family):
    with pytest.raises(ValueError, match=f"size '{size}' and family '{family}'"):
        random_sd.write(tmp_path / "new", size, family)
    assert not (tmp_path / "new").exists()


def test_command_writes_or_explains(tmp_path, capsys):
    folder = tmp_path / "model"
    assert random_sd.main([str(folder)]) == 0
    assert "random weights" in capsys.readouterr().out
    model = sd.read_configs(folder)
    assert model.unet.use_linear_projection
    assert random_sd.main([str(folder)]) == 1
    assert "not an empty folder" in capsys.readouterr().err
