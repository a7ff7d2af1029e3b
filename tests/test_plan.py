"""Plans: what is computed from shapes is what compiled programs need, and what is chosen fits."""

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from idea_jax import costs, pytrees
from idea_jax.config.reading import build
from idea_jax.config.settings import TrainConfig
from idea_jax.models import flash, sd
from idea_jax.models.precision import exact
from idea_jax.plan import __main__ as command
from idea_jax.plan import compiled, work
from idea_jax.plan.settings import PlanConfig
from idea_jax.runtime import chips
from idea_jax.training import run, sizing
from idea_jax.training.program import (
    Program,
    Shape,
    draw_and_step,
    frozen_shapes,
    frozen_shardings,
    lower_step,
    step_shapes,
)
from idea_jax.training.start import method_of, optimizer_of

GIGA = 10**9
NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[plan]'"
)

NEEDS_CUDA = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="needs CUDA's compiler: pip install jax-cuda13-plugin jax-cuda13-pjrt, of jax's version",
)
# What an H100 tells of itself, for XLA.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  l2_cache_size: 52428800
  device_memory_size: 84929347584  memory_bandwidth: 3352320000000
}
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9  minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Kernels are otherwise tried on the device, to take the fastest.
WITHOUT_A_GPU = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def step_of(folder, *, mesh=None, batch=4, dtype="float32", shard=False):
    """The program of a paper person's steps, and the sizes of its arrays."""
    flags = {
        "pretrained_model_name_or_path": str(folder),
        "train_data_dir": ".",
        "enhancer": "none",
    }
    cfg = build(TrainConfig, {}, flags)
    model, method = sd.read_configs(folder, dtype), method_of(cfg)
    program = Program(model, method, optimizer_of(cfg, method), batch, mesh, shard)
    return program, Shape(2, 3, model.unet.sample_size * model.vae.downscale)


def plan_of(folder, *more):
    """The job that the command's arguments ask for."""
    chip, count = chips.find("v5e:2x2")
    cfg = build(PlanConfig, {}, {"checkpoint": str(folder), **dict(more)})
    return work.training(cfg, chip, count)


def test_bytes_and_operations_are_those_of_the_compiled_step(smallest_checkpoint):
    mesh = Mesh(
        np.array(jax.devices()[:4]).reshape(2, 2),
        ("identity", "data"),
        axis_types=(AxisType.Auto,) * 2,
    )
    program, shape = step_of(smallest_checkpoint, mesh=mesh)
    several = replace(program, steps_per_call=3)
    stats = lower_step(several, shape, 0, None).compile().memory_analysis()
    job = plan_of(
        smallest_checkpoint,
        ("mesh", "identity=2,data=2"),
        ("batch", 4),
        ("pictures_per_person", 3),
        ("people", 2),
        ("mixed_precision", "no"),
        ("steps", 7),
    )
    parts = job.memory
    held = sum(parts.values()) - parts["autoencoder beside them"]
    # Besides, each call takes a key of two words and a number of steps.
    assert stats.argument_size_in_bytes == held + 12
    assert (job.mesh, job.per_call, job.calls) == ({"identity": 2, "data": 2}, 2, 7)
    one = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), step_shapes(program, shape, None)[1:3]
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    frozen = frozen_shapes(program.model, None)
    step = functools.partial(draw_and_step, replace(program, mesh=None, batch_size=2))
    assert job.flops == costs.needed(step, frozen, *one, key) > 10**5
    (reduce,) = job.collectives
    own = pytrees.count(one[0].trainable)
    assert reduce == costs.Collective("all-reduce", ("data",), 1, 4 * (own + 3))


def test_split_weights_take_their_part_and_are_gathered_twice(smallest_checkpoint):
    common = (("batch", 4), ("mixed_precision", "no"))
    whole = plan_of(smallest_checkpoint, *common, ("mesh", "data=2"))
    split = plan_of(smallest_checkpoint, *common, ("mesh", "data=2"), ("shard_frozen", True))
    program, _ = step_of(smallest_checkpoint)
    frozen = frozen_shapes(program.model, None)._replace(vae={})
    shardings = frozen_shardings(frozen, sizing.mesh_of(1, 2), True)
    sizes = jax.tree.map(lambda x, s: 4 * np.prod(s.shard_shape(x.shape)), frozen, shardings)
    name = "weights that the step reads"
    assert split.memory[name] == sum(jax.tree.leaves(sizes)) < 0.6 * whole.memory[name]
    assert split.memory["people with optimiser"] == whole.memory["people with optimiser"]
    gather, reduce = split.collectives
    parts = sum(
        s.shard_shape(x.shape) != x.shape
        for x, s in zip(*map(jax.tree.leaves, (frozen, shardings)), strict=True)
    )
    assert (gather.kind, gather.axes, reduce) == ("all-gather", ("data",), *whole.collectives)
    assert 1.5 * parts < gather.calls <= 2 * parts


def test_one_person_alone_takes_no_collective(smallest_checkpoint):
    assert plan_of(smallest_checkpoint, ("mesh", "identity=1"), ("batch", 1)).collectives == []


def test_memory_is_that_of_a_chain_computed_by_hand():
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32, 128), (128, 16)))
    wide, narrow = 4 * 64 * 128, 4 * 64 * 16

    def of(function):
        return costs.memory(jax.make_jaxpr(function)(x, a, b).jaxpr)

    # Both products at once, and nothing for what is fused between them.
    assert of(lambda x, a, b: jnp.tanh(x @ a * 2 + 1) @ b).peak == wide + narrow
    # Its gradient keeps the first product, and has one of its size before tanh and one behind it.
    kept = of(lambda x, a, b: jax.grad(lambda x: (jnp.tanh(x @ a) @ b).sum())(x)).peak
    assert kept == 3 * wide
    # A loop holds what is carried, and one round's values.
    loop = of(
        lambda x, a, b: jax.lax.scan(lambda c, _: (jnp.tanh(c @ a) @ a.T, None), x, length=9)[0]
    )
    assert wide <= loop.peak <= wide + 3 * 4 * 64 * 32
    assert loop.traffic > 8 * 2 * wide


def need(weights, each):
    """A need of so many bytes, and so many for each sample of a device, in batches of 8."""

    def of(how):
        parts = how.data if how.shard_frozen else 1
        return sizing.Need(weights // parts, 0, 0, 0, int(how.people * 8 / how.data * each), 0)

    return of


@pytest.mark.parametrize(
    ("devices", "people", "room", "more", "expected"),
    [
        (8, 960, 100 * GIGA, {}, (8, 1, 4, False)),  # as many as gain anything
        (8, 1000, 18 * GIGA, {}, (8, 1, 2, False)),  # as many as fit
        (8, 960, 8.5 * GIGA, {}, (4, 2, 1, False)),  # not a whole batch of one person
        (8, 1, 100 * GIGA, {}, (1, 8, 1, False)),
        (8, 8, 100 * GIGA, {}, (8, 1, 1, False)),
        (4, 157, 18 * GIGA, {}, (4, 1, 2, False)),  # as in a process of a large pod
        (4, 100, 1.9 * GIGA, {}, (1, 4, 1, True)),  # only with split weights
        (4, 100, GIGA // 4, {}, None),
        (8, 1000, 100 * GIGA, {"places": 2}, (2, 4, 1, False)),
        (8, 960, 100 * GIGA, {"shard_frozen": True}, (4, 2, 8, True)),
        (6, 1000, None, {"places": 4}, (4, 1, 1, False)),
    ],
)
def test_choice_is_the_fastest_that_fits(devices, people, room, more, expected):
    of = need(weights=1 * GIGA, each=1 * GIGA) if room != 1.9 * GIGA else need(4 * GIGA, GIGA // 4)
    how = sizing.choose(of, devices=devices, room=room, people=people, batch=8, **more)
    assert how == (expected and sizing.Arrangement(*expected))
    if how is not None and room is not None:
        assert of(how).total() <= room


def test_training_with_mesh_auto_takes_what_is_planned(smallest_checkpoint, monkeypatch):
    flags = {
        "pretrained_model_name_or_path": str(smallest_checkpoint),
        "train_data_dir": ".",
        "mesh": "auto",
        "train_batch_size": 4,
    }
    cfg = build(TrainConfig, {}, flags)
    crowd = run.Crowd({f"{i}": ["photo"] for i in range(40)}, [], None)
    rooms = iter((10**12, 9 * 10**6, 10))
    monkeypatch.setattr(chips, "room_of", lambda device, beside: next(rooms))
    first, second = run.arranged(cfg, crowd), run.arranged(cfg, crowd)
    assert (first.mesh, first.identities_per_step) == ("identity=8,data=1", 40)
    assert second.identities_per_step < 40
    assert first.mesh_shape() == {"identity": 8, "data": 1}
    with pytest.raises(run.devices.DevicesError, match="--mesh auto finds no way"):
        run.arranged(cfg, crowd)


def precisions(text):
    """(type of the left operand, precision) of each product and convolution of a program."""
    found = set()
    for line in text.splitlines():
        kind = re.search(r"stablehlo\.(?:convolution|dot_general)", line)
        if kind:
            said = re.search(r"precision(?: =|_config = \[#stablehlo<precision) \[?(\w+)", line)
            left = re.search(r" : \(tensor<(?:\d+x)*(\w+)>", line)[1]
            found.add((left, said[1] if said else "DEFAULT"))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_in_float32_are_that_on_every_device(smallest_checkpoint, dtype):
    program, shape = step_of(smallest_checkpoint, mesh=one_device(jax.devices()[0]), dtype=dtype)
    found = precisions(lower_step(program, shape, 0, None).as_text())
    expected = {("f32", "HIGHEST")} | ({("bf16", "DEFAULT")} if dtype == "bfloat16" else set())
    assert found == expected


def one_device(device):
    return Mesh(np.array([[device]]), ("identity", "data"), axis_types=(AxisType.Auto,) * 2)


def test_command_says_what_is_known_and_refuses_what_is_not(
    smallest_checkpoint, monkeypatch, capsys
):
    common = ["--checkpoint", str(smallest_checkpoint), "--no_compile", "--people", "50"]
    assert command.main([*common, "--json", "--price_per_hour", "2"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["fits"] is True and known["compiled"] is None and known["devices"] == 8
    assert known["cost"] == pytest.approx(known["hours"] * 16)
    assert known["people_per_hour"] == pytest.approx(50 / known["hours"])
    for what in ("enhancer", "sample"):
        more = ["--people", "1"] if what == "enhancer" else []
        assert command.main([*common, *more, "--what", what, "--device", "h100:2"]) == 0
        assert "| fits | yes |" in capsys.readouterr().out
    small = replace(chips.CHIPS["v5e"], memory=10_000)
    monkeypatch.setitem(chips.CHIPS, "v5e", small)
    assert command.main([*common, "--mixed_precision", "no"]) == 1
    told = capsys.readouterr().out
    assert "| fits | no |" in told and "--mixed_precision bf16" in told and "h100" in told
    for wrong, code, words in (
        ([*common, "--what", "sample", "--remat", "none"], 2, "has no effect"),
        (["--checkpoint", "./nowhere"], 1, "Of sd15, sd21, sdxl no file is needed"),
        ([*common, "--device", "v9"], 1, "is not known"),
        ([*common, "--device", "v5e:2x2x2"], 1, "is not known"),
        ([*common, "--mesh", "identity=3,data=3"], 1, "does not fit"),
        ([*common, "--what", "sample", "--mesh", "data=2"], 2, "has no effect"),
        ([*common, "--utilisation", "1.5"], 2, "utilisation must lie"),
    ):
        assert command.main(wrong) == code
        assert words in capsys.readouterr().err


def test_a_program_that_does_not_compile_for_want_of_memory_does_not_fit(
    smallest_checkpoint, monkeypatch, capsys
):
    """XLA says what it needs then, though the numbers from shapes alone are small enough."""
    real, said = (
        work.JOBS["sample"],
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (23.88G) exceeds available HBM (15.75G)."
        ),
    )

    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(said)

    def planned(*arguments):
        return replace(real(*arguments), lower=lambda devices: Lowered())

    monkeypatch.setitem(work.JOBS, "sample", planned)
    monkeypatch.setattr(compiled, "is_there", lambda: True)
    monkeypatch.setattr(compiled, "devices_of", lambda name: [None])
    command_line = ["--checkpoint", str(smallest_checkpoint), "--what", "sample", "--device", "v5e"]
    assert command.main(command_line) == 1
    told = capsys.readouterr()
    assert "| fits | no |" in told.out and "| 23.9 GiB |" in told.out and not told.err
    said = "INTERNAL: the compiler has a bug"
    with pytest.raises(jax.errors.JaxRuntimeError, match="bug"):
        compiled.compile_for(chips.find("v5e")[0], "v5e", 1, lambda devices: Lowered())


def test_checkpoint_on_the_hub_needs_no_weights(smallest_checkpoint, tmp_path, monkeypatch, capsys):
    """The folder that huggingface_hub keeps is filled by hand, with configs alone."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    common = ["--no_compile", "--json", "--device", "v5e", "--checkpoint"]
    assert command.main([*common, "some/model"]) == 1
    told = capsys.readouterr().err
    assert "HF_HUB_OFFLINE is set" in told and "hf download some/model --include" in told
    kept, commit = tmp_path / "models--some--model", "0" * 40
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(commit)
    without = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(smallest_checkpoint, kept / "snapshots" / commit, ignore=without)
    known = []
    for name in ("some/model", str(smallest_checkpoint)):
        assert command.main([*common, name]) == 0
        known.append(json.loads(capsys.readouterr().out))
    assert known[0] == known[1] | {"checkpoint": "some/model"}


@pytest.mark.parametrize(
    ("name", "count", "hosts"),
    [
        ("v5e:2x4", 8, 1),
        ("v5e:4x4", 16, 4),
        ("v5e:16x16", 256, 64),
        ("v5p:2x2x2", 8, 2),
        ("h200", 1, 1),
        ("h100:16", 16, 2),
    ],
)
def test_devices_are_counted_by_their_hosts(name, count, hosts):
    chip, found = chips.find(name)
    assert (found, chips.hosts_of(chip, found)) == (count, hosts)
    assert chip.source.startswith("https://") and chip.room() < chip.memory


def test_kernel_of_a_cpu_is_the_one_that_it_takes():
    cfg = build(PlanConfig, {}, {"checkpoint": "sd21"})
    here = flash.resolve("auto", jax.devices()[0], "bfloat16")
    assert work.kernel_of(cfg, chips.find("cpu")[0]) == here


def chip_that_is_not_here():
    return compiled.devices_of("v5e:2x2")[0]


@NEEDS_LIBTPU
@pytest.mark.parametrize(
    ("positions", "width", "heads", "dtype"),
    [
        (4096, 320, 8, jnp.bfloat16),
        (4096, 320, 5, jnp.bfloat16),
        (1024, 640, 8, jnp.bfloat16),
        (9216, 320, 5, jnp.bfloat16),
        (1024, 320, 5, jnp.float32),
    ],
)
def test_kernel_and_its_gradient_compile_for_a_tpu(positions, width, heads, dtype):
    """Heads of 40, 64 and 80; in float32 with products that are that."""
    chip = chip_that_is_not_here()
    assert flash.resolve("auto", chip, "bfloat16") == "splash"
    x = jax.ShapeDtypeStruct((8, positions, width), dtype, sharding=SingleDeviceSharding(chip))

    def both(q, k, v, w):
        with exact(dtype):
            out, pull = jax.vjp(lambda *a: flash.splash(*a, heads), q, k, v)
        return out, *pull(w)

    program = jax.jit(both).lower(x, x, x, x).compile()
    plain = 8 * heads * positions**2 * 2  # bytes of one matrix of weights
    assert program.memory_analysis().temp_size_in_bytes < plain / 2
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3


@NEEDS_LIBTPU
def test_kept_heads_are_not_padded():
    """Each further layer keeps its four arrays and little else; padded heads would be as much."""
    chip = SingleDeviceSharding(chip_that_is_not_here())
    x = jax.ShapeDtypeStruct((8, 1024, 320), jnp.bfloat16, sharding=chip)
    w = jax.ShapeDtypeStruct((320, 320), jnp.bfloat16, sharding=chip)

    def loss(x, weights):
        for q, k, v, out in weights:
            x = x + flash.splash(x @ q, x @ k, x @ v, 5) @ out
        return (x.astype(jnp.float32) ** 2).sum()

    def held(layers):
        program = jax.jit(jax.grad(loss)).lower(x, [(w,) * 4] * layers).compile()
        return program.memory_analysis().temp_size_in_bytes

    kept = 4 * 8 * 1024 * 320 * 2
    assert held(5) - held(2) < 3 * kept * 1.3


def operands(text):
    """(types of both operands, the operation traced) of each convolution of a compiled program;
    a TPU takes products as convolutions, too."""
    types = dict(re.findall(r"^\s*(?:ROOT )?(%[\w.-]+) = (\w+)\[", text, re.M))
    found = re.findall(r' convolution\((%[\w.-]+), (%[\w.-]+)\).*op_name="[^"]*?(\w+)"', text)
    return {(types[left], types[right], name) for left, right, name in found}


def collectives_of(text):
    """The kinds of what a compiled program sends between devices."""
    kinds = r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)(?:-start)?\("
    return set(re.findall(kinds, text))


def outside_of_loops(text):
    """The lines of a compiled program that run once a call: those of its entry, and of what that
    calls in other ways than as a loop."""
    parts = dict(re.findall(r"^(?:ENTRY )?(%[\w.-]+) \([^\n]*\{$(.*?)^\}", text, re.M | re.S))
    lines, waiting, seen = [], [re.search(r"^ENTRY (%[\w.-]+)", text, re.M)[1]], set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            lines += parts[name].splitlines()
            waiting += re.findall(r"(?:calls|to_apply)=(%[\w.-]+)", parts[name])
    return lines


def check_of_a_tpu(text):
    """A program in bfloat16 convolves in it, and sends nothing to its host."""
    convolved = {found[:2] for found in operands(text) if found[2] == "conv_general_dilated"}
    assert convolved == {("bf16", "bf16")}
    assert not re.search(r"is_host_transfer=true| (?:in|out)feed\(|callback", text)


@NEEDS_LIBTPU
@pytest.mark.slow
@pytest.mark.parametrize("is_split", [False, True])
def test_step_of_people_compiles_for_a_tpu(smallest_checkpoint, is_split):
    chips_there = np.array(compiled.devices_of("v5e:2x2")).reshape(2, 2)
    mesh = Mesh(chips_there, ("identity", "data"), axis_types=(AxisType.Auto,) * 2)
    program, shape = step_of(smallest_checkpoint, mesh=mesh, dtype="bfloat16", shard=is_split)
    program = replace(program, steps_per_call=8)
    text = lower_step(program, shape, 0, None).compile().as_text()
    check_of_a_tpu(text)
    groups = r"replica_groups=(?:\{\{0,1\},\{2,3\}\}|\[2,2\]<=\[4\])"
    (reduce,) = re.findall(r" all-reduce(?:-start)?\(.*", text)
    assert re.search(groups, reduce)
    gathers = re.findall(r" all-gather(?:-start)?\(.*", text)
    assert bool(gathers) == is_split
    assert all(re.search(groups, gather) for gather in gathers)
    assert not collectives_of(text) - {"all-reduce", "all-gather"}
    # In the loop of steps, and not before it, where the whole model would be kept.
    once = outside_of_loops(text)
    assert any(" while(" in line for line in once)
    assert not any(" all-gather" in line for line in once)


@NEEDS_LIBTPU
@pytest.mark.slow
@pytest.mark.parametrize("what", ["enhancer", "sample"])
def test_other_programs_compile_for_a_tpu(smallest_checkpoint, what):
    chip, count = chips.find("v5e:2x2")
    flags = {"checkpoint": str(smallest_checkpoint), "what": what}
    flags |= {"batch": 8} if what == "enhancer" else {"people": 8, "steps": 4}
    cfg = build(PlanConfig, {}, flags)
    job, made = work.JOBS[what](cfg, chip, count), []

    class Kept:
        """What is lowered, whose program is kept."""

        def __init__(self, devices):
            self.lowered = job.lower(devices)

        def compile(self):
            made.append(self.lowered.compile())
            return made[0]

    found = compiled.compile_for(chip, "v5e:2x2", count, Kept)
    assert found.collectives == ({"all-reduce": 1} if what == "enhancer" else {})
    assert found.total > job.memory.get("weights", 0) / 2
    check_of_a_tpu(made[0].as_text())


def assigned(folder, *flags):
    """What XLA assigns to the program that `idea-plan` compiles: bytes of a chip, and its text.

    The process is stopped then: to write the code of a full-size step takes the compiler an hour.
    """
    environment = os.environ | {"XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_as_text"}
    command = [sys.executable, "-m", "idea_jax.plan", *flags]
    process = subprocess.Popen(command, env=environment, cwd=Path(__file__).parent.parent)
    try:
        # The last of the files that are written then; its entry comes last.
        text = ""
        while "\nENTRY" not in text or not text.endswith("\n}"):
            assert process.poll() is None, "it was not compiled"
            time.sleep(1)
            for path in folder.glob("*jit_step_people*after_buffer_assignment.txt"):
                text = path.read_text().rstrip()
    finally:
        process.kill()
        process.wait()
    (report,) = folder.glob("*jit_step_people*memory-usage-report.txt")
    told = re.search(r"default .*\nTotal bytes: (\d+)", report.read_text())
    return int(told[1]), text


@NEEDS_LIBTPU
@pytest.mark.slow
@pytest.mark.parametrize("people", [1, 2])
def test_sd21_is_assigned_what_was_planned(people):
    """The step of full size on one chip; two CPU minutes and 3 GB each."""
    flags = {"checkpoint": "sd21", "device": "v5e", "people": people}
    chip, count = chips.find("v5e")
    job = work.training(build(PlanConfig, {}, flags), chip, count)
    assert job.per_call == people
    with tempfile.TemporaryDirectory() as folder:
        total, text = assigned(Path(folder), *(f"--{k}={v}" for k, v in flags.items()))
    exact = sum(job.memory.values()) - job.memory["autoencoder beside them"]
    assert job.temporary * 0.9 < total - exact < job.temporary + job.spare
    assert total < chip.room()
    check_of_a_tpu(text)
    assert not collectives_of(text)


@NEEDS_CUDA
@pytest.mark.slow
def test_step_of_people_compiles_for_a_gpu(smallest_checkpoint):
    """With plain attention; cuDNN's own would need its libraries, gigabytes that convolutions do
    not ask for until they run."""
    from jax.experimental import topologies

    described = topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x4")
    gpus = np.array(described.devices).reshape(2, 2)
    mesh = Mesh(gpus, ("identity", "data"), axis_types=(AxisType.Auto,) * 2)
    program, shape = step_of(smallest_checkpoint, mesh=mesh, dtype="bfloat16")
    lowered = lower_step(replace(program, steps_per_call=8), shape, 0, None)
    text = lowered.compile(compiler_options=WITHOUT_A_GPU).as_text()
    (reduce,) = re.findall(r" all-reduce(?:-start)?\(.*", text)
    assert re.search(r"replica_groups=(?:\{\{0,1\},\{2,3\}\}|\[2,2\]<=\[4\])", reduce)
    assert collectives_of(text) == {"all-reduce"}
    convolved = re.findall(r'= \(?(\w+)\[.*custom_call_target="__cudnn\$conv', text)
    assert set(convolved) == {"bf16"}
    assert "callback" not in text
