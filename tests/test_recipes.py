"""Recipes for clusters: scripts that a shell reads, known fields, flags that are understood."""

import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import people
import pyarrow as pa
import pytest
import yaml
from PIL import Image

from idea_jax.config import reading
from idea_jax.config.settings import TrainConfig
from idea_jax.formats.identity import write_identity
from idea_jax.models import sd

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"

# What stands in for srun: two processes with the variables that SLURM gives to each.
SRUN = """#!/bin/bash
export SLURM_JOB_ID={job} SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_JOB_NUM_NODES=1
export SLURM_STEP_NUM_TASKS=2 SLURM_NODELIST=localhost
for place in 0 1; do
  SLURM_PROCID=$place SLURM_LOCALID=$place "$@" & started[$place]=$!
done
wait "${{started[0]}}" && wait "${{started[1]}}"
"""
# What stands in for idea-train: it joins the other process, and says with which arguments.
TRAIN = """#!{python}
import os, sys
sys.path.insert(0, {root!r})
from idea_jax.runtime import devices
with devices.joined():
    import jax
    words = " ".join(sys.argv[1:])
    # At once, with its end: two processes share the output.
    said = f"process {{jax.process_index()}} of {{jax.process_count()}}: {{words}}\\n"
    os.write(1, said.encode())
"""


def train_commands(text):
    """The words after idea-train of each command in a script."""
    joined = re.sub(r"\\\n", " ", text)
    for words in re.findall(r"(?:^|[\s\"])idea-train (--[^\n]*)", joined):
        yield shlex.split(words.replace('"$@"', "").rstrip('"'))


@pytest.mark.parametrize("name", ["slurm.sbatch", "xpk.sh", "skypilot.yaml"])
def test_flags_of_a_recipe_are_understood(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (RECIPES / name).read_text("utf-8")
    text = text.replace("${IDEA_CONFIG:-configs/paper.yaml}", "configs/paper.yaml")
    (words,) = train_commands(text.replace("/app/", ""))
    cfg = reading.parse(TrainConfig, words)
    assert cfg.mesh == "auto" and cfg.checkpointing_steps > 0


@pytest.mark.parametrize("name", ["slurm.sbatch", "xpk.sh"])
def test_a_shell_reads_a_recipe(name):
    subprocess.run(["bash", "-n", RECIPES / name], check=True)
    few = subprocess.run(["bash", RECIPES / name], capture_output=True, text=True)
    assert few.returncode == 2 and few.stderr.startswith("usage: ")


def test_jobset_starts_a_process_on_each_host_of_the_topology(monkeypatch):
    monkeypatch.chdir(ROOT)
    jobset = yaml.safe_load((RECIPES / "gke-jobset.yaml").read_text("utf-8"))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == int(rows) * int(columns) // chips
    assert job["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert container["command"] == ["idea-train"]
    cfg = reading.parse(TrainConfig, [word.replace("/app/", "") for word in container["args"]])
    assert cfg.distributed and cfg.output_dir.startswith("/data/")


def test_skypilot_task_has_fields_that_skypilot_knows():
    task = yaml.safe_load((RECIPES / "skypilot.yaml").read_text("utf-8"))
    assert set(task) <= {"name", "resources", "workdir", "file_mounts", "setup", "run"}
    assert set(task["resources"]) <= {"accelerators", "use_spot", "disk_size"}
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_rows_of_ray_data_come_back_with_a_picture_or_a_reason(smallest_checkpoint, tmp_path):
    """The actor itself; Ray is not needed for it."""
    spec = importlib.util.spec_from_file_location("ray_data", RECIPES / "ray_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = sd.read_configs(smallest_checkpoint)
    write_identity(tmp_path / "anna" / "identity.safetensors", people.person(model))
    rows = [
        {"identity": "anna", "prompt": "a photo of {}", "seed": 7, "note": "kept"},
        {"identity": "nobody", "prompt": "a photo of {}", "seed": None, "note": None},
        {"identity": "anna", "prompt": "a sketch of {}", "seed": None, "note": None},
    ]
    small = {"batch_size": 2, "num_inference_steps": 2, "height": 8, "width": 8}
    painter = module.Painter(str(smallest_checkpoint), str(tmp_path), small)
    first, second, third = painter(pa.Table.from_pylist(rows)).to_pylist()
    assert first["note"] == "kept" and "nobody" in second["error"] and second["picture"] is None
    for row in (first, third):
        assert row["error"] is None
        with Image.open(io.BytesIO(row["picture"])) as picture:
            assert picture.size == (8, 8) and '"seed": ' in picture.text["parameters"]
    assert first["picture"] != third["picture"]


def test_image_takes_the_platforms_that_it_says():
    text = (RECIPES / "Dockerfile").read_text("utf-8")
    script = re.search(r"RUN (case .*?esac)", re.sub(r"\\\n", " ", text), re.DOTALL)[1]
    for platform, extra in (("cpu", ""), ("cuda13", "jax[cuda13]"), ("tpu", "jax[tpu]")):
        said = subprocess.run(
            ["bash", "-euc", f'{script}; echo "$extra"'],
            env=os.environ | {"PLATFORM": platform},
            capture_output=True,
            text=True,
            check=True,
        )
        assert said.stdout.strip() == extra
    wrong = subprocess.run(["bash", "-euc", script], env=os.environ | {"PLATFORM": "rocm"})
    assert wrong.returncode == 2


def test_slurm_script_starts_processes_that_find_each_other(tmp_path):
    job = 1000 + os.getpid() % 4000  # JAX makes its port of it
    for name, text in (
        ("srun", SRUN.format(job=job)),
        ("idea-train", TRAIN.format(python=sys.executable, root=str(ROOT))),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", RECIPES / "slurm.sbatch", "photos", "out folder", "mini", "--seed", "1"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("process"))
    assert [line.split(":")[0] for line in lines] == ["process 0 of 2", "process 1 of 2"]
    assert all("--output_dir out folder" in line and line.endswith("--seed 1") for line in lines)
