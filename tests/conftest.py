"""Strictness for every test: no implicit rank promotion, no random key used twice, no network."""

import ctypes
import dataclasses
import gc
import os
import shutil
import sys
import tempfile
from importlib import metadata

# Eight simulated devices for the tests of vmap and shard_map, and programs that are compiled three
# times as fast: each runs once or twice here, on tiny shapes. Must be set before jax starts.
# XLA ends at a flag that it does not know, and later ones do not know the last of these.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * metadata.version("jaxlib").startswith("0.10."),
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import pytest
from PIL import Image
from skimage import data as pictures

from idea_jax import random_sd
from idea_jax.data import text
from idea_jax.faces import random_model
from idea_jax.models import sd
from idea_jax.runtime import compile_cache

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

# Several tests compile the same training step; the second time it comes from here. The process that
# starts the others makes the folder, and they inherit its name.
if "IDEA_JAX_TEST_CACHE" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="idea-jax-test-")
    os.environ["IDEA_JAX_TEST_CACHE"] = compiled.name
jax.config.update("jax_compilation_cache_dir", os.environ["IDEA_JAX_TEST_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
# Tests replace parts of what is traced: a program that one of them kept would be wrong for others.
compile_cache.KEEPS_TRACES = False


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_let_go():
    """Their code takes memory maps, of which Linux allows a process 65,530 and then ends it.

    The memory of what is let go stays with the process until it is told to give it back: two
    thirds of a worker's.
    """
    yield
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory):
    """A tiny Stable Diffusion checkpoint with random weights and a face model."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    random_sd.write(folder, size="tiny")
    random_model.write_random_recogniser(folder / "face" / "arcface.onnx")
    return folder


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory):
    """A folder with one real photo: scikit-image's portrait of an astronaut."""
    folder = tmp_path_factory.mktemp("photos")
    Image.fromarray(pictures.astronaut()).resize((160, 128)).save(folder / "astronaut.jpg")
    return folder


@pytest.fixture(scope="session")
def smallest_checkpoint(tmp_path_factory):
    """A checkpoint of one level and 8 channels, whose step compiles in a third of the time."""
    return write_smallest(tmp_path_factory.mktemp("smallest") / "smallest", "sd2")


def write_smallest(folder, family):
    """Writes `smallest_checkpoint`, as one of SD 1.x ("sd1"), 2.x ("sd2") or XL ("sdxl"); returns
    its folder."""
    tiny = random_sd.config("tiny", family, vocab_size=2)
    words = [*random_sd.PROMPT_WORDS.split(), *text.TEMPLATES, *text.shipped_names()]
    pad = "!" if family == "sd2" else random_sd.EOS
    vocab_size = random_sd.write_tokenizer(folder / "tokenizer", words, pad=pad)
    second, width = {}, 8
    if family == "sdxl":  # whose encoders are read before their last layer
        random_sd.write_tokenizer(folder / "tokenizer_2", words, pad="!")
        sizes = {"vocab_size": vocab_size, "hidden_size": 16, "intermediate_size": 8}
        second = {"text_2": dataclasses.replace(tiny.text_2, **sizes)}
        width += 16
    model = dataclasses.replace(
        tiny,
        text=dataclasses.replace(
            tiny.text,
            vocab_size=vocab_size,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1 + len(second),
            num_attention_heads=1,
        ),
        **second,
        unet=dataclasses.replace(
            tiny.unet,
            sample_size=4,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            block_out_channels=(8,),
            transformer_layers=(1,),
            num_attention_heads=(1,),
            cross_attention_dim=width,
        ),
        vae=dataclasses.replace(tiny.vae, block_out_channels=(8, 8), sample_size=8),
    )
    sd.save(folder, model, sd.init(model, jax.random.key(0)))
    return folder


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium; where the run needs none, its tests are skipped without it."""
    how = "install Debian's: apt-get install chromium (playwright itself comes with .[test])"
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        if os.environ.get("IDEA_JAX_NEEDS_BROWSER"):
            pytest.fail(f"there is no chromium, and this run needs one; {how}")
        pytest.skip(f"there is no chromium; {how}")
    from playwright.sync_api import sync_playwright

    # Chromium's own sandbox refuses to run as root, as in containers.
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=root)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def rounding():
    """How far values of 1 may be apart that are computed beside other samples: nothing, but where
    the convolution of XLA gives a sample other bits in another place of a batch. CPUs without
    AVX-512 do (jax 0.10.2; 4e-6 of maps of 8 x 8)."""
    random = np.random.default_rng(0)
    maps, kernel = (random.normal(size=n).astype("f") for n in ((2, 8, 8, 16), (3, 3, 16, 16)))
    convolve = jax.jit(
        lambda x: jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )
    return 0.0 if bool((convolve(maps) == convolve(maps[::-1])[::-1]).all()) else 1e-5
