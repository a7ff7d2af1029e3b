"""Loading, refusing and saving weight files."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextModel

from idea_jax.models import sd, weights
from idea_jax.models.tensor_files import WeightsError
from idea_jax.pytrees import flatten

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def checkpoint(request, tmp_path_factory):
    """(folder, torch models, model, frozen), not to be changed."""
    folder = tmp_path_factory.mktemp(request.param)
    built = reference.write_checkpoint(folder, request.param)
    return folder, built, *sd.load(folder)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    reference.write_checkpoint(folder, "sd1")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A checkpoint that the test may spoil."""
    return shutil.copytree(original, tmp_path / "checkpoint")


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def assert_equal_trees(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(
    "configs",
    [
        (reference.SD15_UNET, reference.SD15_VAE, reference.SD15_TEXT),
        (reference.SD21_UNET, reference.SD21_VAE, reference.SD21_TEXT),
    ],
    ids=["SD 1.5", "SD 2.1-base"],
)
def test_every_key_of_the_published_networks_is_one_leaf(configs):
    model = reference.published(*configs)
    targets = sd.shapes(model)._asdict()
    with torch.device("meta"):
        networks = (
            (reference.unet_from(configs[0]), weights.unet_table(model.unet.use_linear_projection)),
            (AutoencoderKL.from_config(configs[1]), weights.vae_table()),
            (reference.text_from(configs[2]), weights.text_table()),
        )
    for (network, table), trees in zip(
        networks, (("unet", "cross_kv"), ("vae",), ("text",)), strict=True
    ):
        headers = {k: (tuple(v.shape), "F32") for k, v in network.state_dict().items()}
        leaves = flatten({tree: targets[tree] for tree in trees})
        plan = weights.match_keys(table, headers, leaves, "torch")  # raises unless one to one
        assert set(plan) == set(headers)
        written = weights.source_keys(table, list(leaves))
        prefix = "text_model." if trees == ("text",) else ""
        assert {path: prefix + key for key, (path, _) in plan.items()} == written


def test_saved_checkpoint_loads_in_torch_and_here(checkpoint, tmp_path):
    _, built, model, frozen = checkpoint
    sd.save(tmp_path, model, frozen)
    kinds = (UNet2DConditionModel, AutoencoderKL, CLIPTextModel)
    for kind, name, expected in zip(kinds, ("unet", "vae", "text_encoder"), built, strict=True):
        network, info = kind.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info.values()), info
        state = network.state_dict()
        assert state.keys() == expected.state_dict().keys()
        for key, tensor in expected.state_dict().items():
            torch.testing.assert_close(state[key], tensor, rtol=0, atol=0)
    schedule = DDIMScheduler.from_pretrained(tmp_path / "scheduler").config
    assert (schedule.steps_offset, schedule.set_alpha_to_one, schedule.clip_sample) == (1, False, 0)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path, tokenizer=None)
    assert pipeline.unet.config.cross_attention_dim == model.unet.cross_attention_dim

    again, reloaded = sd.load(tmp_path)
    assert again == model
    assert_equal_trees(reloaded, frozen)


def test_save_in_half_precision_under_a_variant_keeps_the_rounded_values(checkpoint, tmp_path):
    _, _, model, frozen = checkpoint
    sd.save(tmp_path, model, frozen, variant="fp16", dtype="float16")
    assert (
        load_file(tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors")[
            "conv_in.weight"
        ].dtype
        == np.float16
    )
    _, reloaded = sd.load(tmp_path, variant="fp16")
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.float16).astype(jnp.float32), frozen)
    assert_equal_trees(reloaded, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_cast_to_the_compute_dtype(folder, dtype):
    _, exact = sd.load(folder)
    for path in (UNET, VAE, TEXT):
        tensors = {key: x.astype(jnp.dtype(dtype)) for key, x in load_file(folder / path).items()}
        save_file(tensors, folder / path)
    model, frozen = sd.load(folder, compute_dtype="bfloat16")
    assert model.dtype == jnp.bfloat16
    rounded = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)).astype(jnp.bfloat16), exact)
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    assert_equal_trees(frozen, rounded)


def test_sharded_files_and_variants_equal_the_single_file(checkpoint, tmp_path):
    folder, built, _, frozen = checkpoint
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for path in (UNET, VAE, TEXT):
        (tmp_path / path).unlink()
    built.unet.save_pretrained(tmp_path / "unet", variant="v2", max_shard_size="50KB")
    built.vae.save_pretrained(tmp_path / "vae", variant="v2")
    built.text.save_pretrained(tmp_path / "text_encoder", variant="v2", max_shard_size="20KB")
    for part in ("unet", "text_encoder"):
        assert len(list((tmp_path / part).glob("*.safetensors"))) > 1
    _, sharded = sd.load(tmp_path, variant="v2")
    assert_equal_trees(sharded, frozen)


@pytest.mark.parametrize("as_convolution", [False, True])
def test_old_names_of_autoencoder_attention_are_read(original, folder, as_convolution):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for key in [key for key in tensors if "attentions.0.to_" in key]:
            tensor = tensors.pop(key)
            for new, name in old.items():
                key = key.replace(new, name)
            weight_as_convolution = as_convolution and tensor.ndim == 2
            tensors[key] = tensor[:, :, None, None] if weight_as_convolution else tensor
        assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors

    edit(folder / VAE, rename)
    assert_equal_trees(sd.load(folder)[1].vae, sd.load(original)[1].vae)


def test_text_keys_with_prefix_and_position_ids_are_read(original, folder):
    def rename(tensors):
        for key in list(tensors):
            tensors[f"text_model.{key}"] = tensors.pop(key)
        tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]

    assert "final_layer_norm.weight" in load_file(folder / TEXT)  # as transformers 5 saves
    edit(folder / TEXT, rename)
    assert_equal_trees(sd.load(folder)[1].text, sd.load(original)[1].text)


def test_layers_that_were_cut_for_clip_skip_may_stay_in_the_file(folder, caplog):
    path = folder / "text_encoder" / "config.json"
    values = json.loads(path.read_text())
    last = values["num_hidden_layers"] - 1
    path.write_text(json.dumps({**values, "num_hidden_layers": last}))
    kept = sd.load(folder)[1].text
    assert f"layers {last} to {last} are left out" in caplog.text

    def cut(tensors):
        gone = [key for key in tensors if f"encoder.layers.{last}." in key]
        assert gone
        for key in gone:
            del tensors[key]

    edit(folder / TEXT, cut)
    assert_equal_trees(kept, sd.load(folder)[1].text)
    # A layer that is missing is an error all the same.
    path.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=rf"encoder\.layers\.{last}"):
        sd.load(folder)


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_a_spare_number_among_the_weights_is_named_and_left(original, folder, file, caplog):
    def add(tensors):
        tensors["decay"] = np.array(0.9999)
        tensors["optimization_step"] = np.array([100])

    edit(folder / file, add)
    assert_equal_trees(sd.load(folder)[1], sd.load(original)[1])
    assert "decay, optimization_step" in caplog.text and str(folder / file) in caplog.text


def test_all_unfitting_weights_are_listed_in_one_error(folder):
    def spoil(tensors):
        del tensors["conv_in.weight"]
        del tensors["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
        tensors["lora.up.weight"] = np.zeros((2, 2), np.float32)
        tensors["down_blocks.0.resnets.7.conv1.bias"] = np.zeros(16, np.float32)
        tensors["conv_out.weight"] = tensors["conv_out.weight"][:, :8].copy()
        tensors["time_embedding.linear_1.bias"] = np.zeros(64, np.int8)

    edit(folder / UNET, spoil)
    with pytest.raises(WeightsError) as error:
        sd.load(folder)
    message = str(error.value)
    assert str(folder / UNET) in message
    for line in (
        "2 missing keys",
        "conv_in.weight (parameter unet/conv_in/kernel [3, 3, 4, 16])",
        "attn2.to_k.weight (parameter cross_kv/mid_block/attentions_0/",
        "2 keys unknown to the network",
        "lora.up.weight [2, 2]",
        "down_blocks.0.resnets.7.conv1.bias [16]",
        "1 keys of another shape",
        "conv_out.weight: [4, 8, 3, 3], expected [4, 16, 3, 3]",
        "1 keys of another type",
        "time_embedding.linear_1.bias: I8",
    ):
        assert line in message


def test_long_listings_are_cut_with_their_count(folder):
    edit(folder / UNET, lambda tensors: [tensors.pop(key) for key in list(tensors)[5:]])
    with pytest.raises(WeightsError, match=r"and \d+ more"):
        sd.load(folder)


def test_parameter_given_twice_is_refused(folder):
    name = "final_layer_norm.bias"
    edit(folder / TEXT, lambda tensors: tensors.update({f"text_model.{name}": tensors[name]}))
    with pytest.raises(WeightsError, match=r"given twice.*\n.*text_model\.final_layer_norm\.bias"):
        sd.load(folder)


def test_convolution_where_a_1x1_is_expected_is_refused(folder):
    def widen(tensors):
        tensors["quant_conv.weight"] = np.zeros((8, 8, 3, 3), np.float32)

    edit(folder / VAE, widen)
    with pytest.raises(
        WeightsError, match=r"quant_conv\.weight: \[8, 8, 3, 3\], expected \[8, 8, 1, 1\]"
    ):
        sd.load(folder)


def test_two_rules_for_one_key_are_refused():
    rule = weights.Rule("a.#.weight", "x/a_#/kernel", "linear")
    other = weights.Rule("a.0.weight", "x/b/kernel", "linear")
    targets = {"x": {"a_0": {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.float32)}}}
    with pytest.raises(WeightsError, match=r"matched by two rules.*\n.*a\.0\.weight \(a\.#"):
        weights.to_params(
            weights.Table((rule, other)), {"a.0.weight": np.zeros((2, 3))}, targets, "somewhere"
        )


def test_dots_of_a_rule_match_dots_only():
    table = weights.Table((weights.Rule("a.b", "x/y", "as_is"),))
    targets = {"x": {"y": jax.ShapeDtypeStruct((2,), jnp.float32)}}
    with pytest.raises(WeightsError, match="unknown to the network"):
        weights.to_params(table, {"a_b": np.zeros(2)}, targets, "somewhere")


def test_absent_weights_say_what_is_there(folder):
    with pytest.raises(WeightsError, match=r"no model\.fp16\.safetensors in .*model\.safetensors"):
        sd.load(folder, variant="fp16")
    (folder / UNET).unlink()
    (folder / "unet/model.ckpt").write_bytes(b"\x80\x02")
    with pytest.raises(WeightsError, match=r"pickles .* are not read\. Convert") as error:
        sd.load(folder)
    assert "config.json, model.ckpt" in str(error.value)


def as_pickles(folder, built, pieces=1):
    """Replaces the weights of a folder by what older versions of diffusers wrote."""
    for part, stem, network in zip(
        ("unet", "vae", "text_encoder"),
        ("diffusion_pytorch_model",) * 2 + ("pytorch_model",),
        built,
        strict=True,
    ):
        for path in (folder / part).glob("*.safetensors"):
            path.unlink()
        state = network.state_dict()  # an OrderedDict with an attribute, `_metadata`
        if part == "text_encoder":
            state["embeddings.position_ids"] = torch.arange(77)[None]
        if pieces == 1:
            torch.save(state, folder / part / f"{stem}.bin")
            continue
        names = {key: f"{stem}-0000{1 + i % 2}-of-00002.bin" for i, key in enumerate(state)}
        for name in set(names.values()):
            own = {key: value for key, value in state.items() if names[key] == name}
            torch.save(own, folder / part / name)
        index = {"metadata": {}, "weight_map": names}
        (folder / part / f"{stem}.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("pieces", [1, 2])
def test_pickles_of_torch_are_read_bit_for_bit_without_being_run(checkpoint, tmp_path, pieces):
    source, built, model, frozen = checkpoint
    folder = shutil.copytree(source, tmp_path / "old")
    as_pickles(folder, built, pieces)
    again, read = sd.load(folder)
    assert again == model
    assert_equal_trees(read, frozen)


def test_a_pickle_in_half_precision_and_strided_has_its_values(checkpoint, tmp_path):
    source, built, _, _ = checkpoint
    folder = shutil.copytree(source, tmp_path / "old")
    as_pickles(folder, built)
    for dtype in (torch.float16, torch.bfloat16):
        state = {key: value.to(dtype) for key, value in built.unet.state_dict().items()}
        turned = state["conv_in.weight"].transpose(0, 1).contiguous().transpose(0, 1)
        assert not turned.is_contiguous()
        state["conv_in.weight"] = turned
        torch.save(state, folder / "unet/diffusion_pytorch_model.bin")
        _, frozen = sd.load(folder)
        expected = turned.float().numpy().transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(frozen.unet["conv_in"]["kernel"], expected)


class Hostile:
    def __reduce__(self):
        return (os.system, ("touch hostile",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"conv_in.weight": Hostile()}, "asks for posix.system"),
        ({"state_dict": {"conv_in.weight": torch.zeros(2)}}, "is no tensor, expected a flat dict"),
        ({"conv_in.weight": torch.zeros(1, 1, 1, 1, 1)}, "expected four sizes at most"),
        (torch.zeros(3), "expected one dictionary"),
        (b"PK\x03\x04cut", "it is cut, or no file of torch.save"),
        (None, "it is cut, or no file of torch.save"),
        ({}, "missing keys"),
        ({"conv_in.weight": torch.zeros(3, 3)}, "keys of another shape"),
        ({"conv_in.weight": torch.zeros(3, dtype=torch.int64)}, "conv_in.weight"),
    ],
)
def test_a_pickle_that_is_no_network_is_refused_and_nothing_runs(
    folder, monkeypatch, tmp_path, content, message
):
    monkeypatch.chdir(tmp_path)
    as_pickles(folder, reference.models("sd1"))
    path = folder / "unet/diffusion_pytorch_model.bin"
    if content is None:
        path.write_bytes(path.read_bytes()[:-2000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(WeightsError, match=message) as error:
        sd.load(folder)
    assert "unet" in str(error.value) and not (tmp_path / "hostile").exists()


@pytest.mark.parametrize("content", [None, b"", b"version 1.0"])
def test_broken_weight_files_are_named(folder, content):
    whole = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(whole[:-100] if content is None else content)
    with pytest.raises(WeightsError, match=r"unet.*not a complete safetensors file.*again"):
        sd.load(folder)


def test_index_that_names_absent_or_outside_files_is_refused(folder):
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    for name in ("part-1.safetensors", "../vae/diffusion_pytorch_model.safetensors"):
        index.write_text(json.dumps({"weight_map": {"conv_in.bias": name}}))
        (folder / UNET).unlink(missing_ok=True)
        with pytest.raises(WeightsError, match="which is not in"):
            sd.load(folder)


def test_folder_that_is_no_checkpoint_is_refused(folder, tmp_path):
    with pytest.raises(WeightsError, match=r"no text_encoder/config\.json .* holds nothing"):
        sd.load(tmp_path / "nowhere")
    (folder / "vae/config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"vae/config\.json is not valid JSON"):
        sd.load(folder)
    (folder / "vae/config.json").write_text("[]")
    with pytest.raises(WeightsError, match="holds a list, expected an object"):
        sd.load(folder)


def test_failing_save_leaves_the_earlier_file(checkpoint, tmp_path, monkeypatch):
    _, _, model, frozen = checkpoint
    sd.save(tmp_path, model, frozen)
    before = (tmp_path / TEXT).read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(sd, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        sd.save(tmp_path, model, jax.tree.map(jnp.zeros_like, frozen))
    assert (tmp_path / TEXT).read_bytes() == before
    assert [path.name for path in (tmp_path / "text_encoder").iterdir()].count("config.json") == 1
    assert len(list((tmp_path / "text_encoder").iterdir())) == 2
