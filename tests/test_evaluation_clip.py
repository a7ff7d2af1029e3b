"""CLIP's towers and its preprocessing against transformers, on small random models."""

import json

import numpy as np
import people
import pytest
import torch
import transformers
from PIL import Image

from idea_jax import random_sd
from idea_jax.evaluation import clip as clips
from idea_jax.models import clip, hub
from idea_jax.models.config_reader import UnsupportedConfig
from idea_jax.models.weights import WeightsError

WORDS = "a photo of the sea with two people in front"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A random CLIPModel of transformers, in its files."""
    folder = tmp_path_factory.mktemp("clip")
    vocab = random_sd.write_tokenizer(folder, WORDS.split(), pad="<|endoftext|>")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 24}))
    tower = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=tower
            | {"hidden_size": 32, "vocab_size": vocab, "max_position_embeddings": 24}
            | {"bos_token_id": vocab - 2, "eos_token_id": vocab - 1},
            vision_config=tower | {"hidden_size": 40, "image_size": 32, "patch_size": 8},
            projection_dim=20,
        )
    ).eval()
    for parameter in model.parameters():  # biases and norms start at values that hide mistakes
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = transformers.CLIPImageProcessorPil(**size)
    processor.save_pretrained(folder)
    return folder, model, processor


def pictures():
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (90, 61), (40, 97), (33, 35)]
    return [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        for width, height in sizes
    ]


def cosines(embeds):
    return torch.nn.functional.normalize(embeds, dim=-1).numpy()


def test_both_towers_match_transformers(theirs):
    folder, model, processor = theirs
    ours = clips.load(str(folder))
    images, texts = pictures(), ["a photo of the sea", WORDS, "", WORDS + " " + WORDS]
    ids = torch.tensor(ours.tokenizer(texts).astype(int))
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels)
    np.testing.assert_allclose(ours.embed_images(images), cosines(out.image_embeds), atol=2e-6)
    np.testing.assert_allclose(ours.embed_texts(texts), cosines(out.text_embeds), atol=2e-6)
    assert ours.embed_images([]).shape == (0, 20)
    assert ours.name == folder.name and len(ours.digest) == 64


def test_preprocessing_is_that_of_clip(theirs):
    """At 224 pixels, of pictures that are larger, smaller, and odd on a side."""
    how = clip.Preprocessing(224, 224, (0.48145466, 0.4578275, 0.40821073), (0.2686, 0.2613, 0.27))
    processor = transformers.CLIPImageProcessorPil(image_std=how.std)
    for image in [*pictures(), Image.new("RGB", (301, 224)), Image.new("RGB", (512, 512), "red")]:
        expected = processor([image], return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_allclose(clips.preprocess(image, how), expected, atol=1e-6)


def test_settings_of_text_generation_change_nothing(theirs, tmp_path):
    """OpenAI's files on the Hub repeat them in each tower; a size in words counts."""
    folder, *_ = theirs
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"top_k": 50, "id2label": {"0": "LABEL_0"}, "length_penalty": 1.0}
    config["text_config_dict"] = {"hidden_size": 7}
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text('{"size": 32, "crop_size": 32}')
    model, _ = clip.load(tmp_path)
    assert model == clip.load(folder)[0]
    for values, problem in (
        ({**config, "model_type": "siglip"}, "'siglip', expected"),
        ({**config, "projection_dim": 21}, "do not fit"),
        ({**config, "vision_config": {**config["vision_config"], "hidden_act": "relu"}}, "relu"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises((UnsupportedConfig, WeightsError), match=problem):
            clip.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for text, problem in (
        ('{"size": 32, "crop_size": 32, "resample": 2}', "another preprocessing"),
        ('{"size": 224}', "squares of 224 pixels"),
        ("[1", "not valid JSON"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises((UnsupportedConfig, WeightsError), match=problem):
            clip.load(tmp_path)


def test_the_mini_finds_the_caption_of_a_picture_by_the_same_code():
    mini = clips.load(hub.MINI)
    pictures, said = people.portraits(24)
    images = [Image.fromarray(image) for image in pictures]
    cosine = mini.embed_images(images) @ mini.embed_texts(said).T
    assert np.mean(cosine.argmax(axis=1) == np.arange(24)) > 0.9  # 1 here
