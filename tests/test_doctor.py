"""The doctor: what it finds, what it calls wrong, and that it sends nothing."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from idea_jax import doctor, findings
from idea_jax.config import reading
from idea_jax.config.settings import TrainConfig
from idea_jax.faces import random_model
from idea_jax.models import hub, sd
from idea_jax.pytrees import flatten
from idea_jax.runtime import memory


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A user's home with nothing in it, so that no pack and no cache of this machine is found."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def found(capsys, *argv):
    code = doctor.main([*argv, "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return code, {line["what"]: (line["level"], line["text"]) for line in lines}


def test_a_whole_checkpoint_is_described(smallest_checkpoint, capsys):
    code, lines = found(capsys, "--checkpoint", str(smallest_checkpoint))
    assert code == 0
    level, text = lines["checkpoint"]
    model = sd.read_configs(smallest_checkpoint)
    assert level == "ok" and model.schedule.prediction_type in text
    assert lines["jax"] == ("ok", importlib.metadata.version("jax"))
    assert "8 x cpu" in lines["devices"][1] and "shared by all" in lines["devices"][1]
    assert lines["Hub"] == ("note", lines["Hub"][1]) and "HF_HUB_OFFLINE" in lines["Hub"][1]
    assert lines["compiled programs"][0] == "ok" and "not made yet" in lines["compiled programs"][1]
    assert lines["shared ID-Enhancer"][0] == "note"
    assert {level for level, _ in lines.values()} <= {"ok", "note"}
    assert doctor.main([]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(lines) - 2 and said[0].startswith("ok    python: ")


def test_pages_that_the_system_gives_to_those_that_ask(tmp_path, capsys, monkeypatch):
    """They are advised where asking helps, and beside what the user has set already."""
    monkeypatch.setattr(memory, "PAGES", tmp_path)
    asks = "always [madvise] never"

    def advised(
        library="glibc", version="2.36", said=asks, size=2**21, tunables="", system="Linux"
    ):
        monkeypatch.setattr(memory.platform, "system", lambda: system)
        monkeypatch.setattr(memory.platform, "libc_ver", lambda: (library, version))
        monkeypatch.setenv(memory.TUNABLES, tunables)
        (tmp_path / "enabled").write_text(f"{said}\n")
        (tmp_path / "hpage_pmd_size").write_text(f"{size}\n")
        return memory.wish_for_huge_pages()

    assert advised() == advised(version="2.100") == "glibc.malloc.hugetlb=1"
    both = "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    assert advised(tunables="glibc.malloc.check=0") == both
    level, text = found(capsys)[1]["pages"]
    assert level == "note" and f"GLIBC_TUNABLES={both} " in text
    for tunables in ("glibc.malloc.hugetlb=1", "glibc.malloc.hugetlb=0"):
        assert not advised(tunables=tunables)
    assert "pages" not in found(capsys)[1]
    assert not advised(said="[always] madvise never")
    assert not advised(said="always madvise [never]")
    assert not advised(size=2**29)
    assert not advised(version="2.34") and not advised(version="2.9") and not advised(version="")
    assert not advised(library="musl") and not advised(system="Darwin")
    assert advised()
    (tmp_path / "enabled").unlink()
    assert not memory.wish_for_huge_pages()


@pytest.mark.skipif(
    not memory.wish_for_huge_pages()
    or not Path("/proc/self/smaps_rollup").is_file()
    or "THP_enabled:\t1" not in Path("/proc/self/status").read_text(),
    reason="the system asks nobody, or tells nobody",
)
def test_glibc_understands_what_is_advised():
    """An allocation of 64 MB gets at least one such page: how many, the system's memory decides."""
    look = "kept = bytearray(64 << 20); kept[::4096] = b'x' * 16384\n"
    look += "print(open('/proc/self/smaps_rollup').read().split('AnonHugePages:')[1].split()[0])"

    def kibibytes(**variables):
        run = subprocess.run(
            [sys.executable, "-c", look],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=True,
        )
        return int(run.stdout)

    wish = memory.wish_for_huge_pages()
    assert kibibytes() == 0
    assert kibibytes(**{memory.TUNABLES: wish}) >= 2048


def test_what_is_wrong_is_named_and_decides_the_exit_code(
    smallest_checkpoint, tmp_path, home, capsys, monkeypatch
):
    """A cut weight file, a face model under another's name, a package that is too old or absent."""
    broken = tmp_path / "broken"
    shutil.copytree(smallest_checkpoint, broken)
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    pack = home / ".insightface" / "models" / "buffalo_l"
    pack.mkdir(parents=True)
    for name in ("w600k_r50.onnx", "mine.onnx"):
        random_model.write_random_recogniser(pack / name)
    version = importlib.metadata.version

    def other(name):
        if name == "optax":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "flax" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", other)
    code, lines = found(capsys, "--checkpoint", str(broken))
    assert code == 1
    wrong = {what for what, (level, _) in lines.items() if level == "wrong"}
    assert wrong == {"checkpoint", "buffalo_l/w600k_r50.onnx", "flax", "optax"}
    assert "not a complete safetensors file" in lines["checkpoint"][1]
    assert "pip install 'flax" in lines["flax"][1] and "not installed" in lines["optax"][1]
    assert lines["buffalo_l/mine.onnx"][0] == "ok"
    # Other parts that a run would end at, each cut off.
    shutil.copytree(hub.MINI_FOLDER, tmp_path / "mini")
    parts = {
        "shared ID-Enhancer": "enhancer/enhancer.safetensors",
        "face/recogniser.onnx": "face/recogniser.onnx",
        "checkpoint": "tokenizer/vocab.json",
    }
    for what, name in parts.items():
        whole = (tmp_path / "mini" / name).read_bytes()
        (tmp_path / "mini" / name).write_bytes(whole[: len(whole) // 2])
        code, lines = found(capsys, "--checkpoint", str(tmp_path / "mini"))
        assert code == 1 and lines[what][0] == "wrong", lines[what]
        (tmp_path / "mini" / name).write_bytes(whole)
    code, lines = found(capsys, "--checkpoint", str(tmp_path / "nowhere" / "x" / "y"))
    assert code == 1 and "there is no folder" in lines["checkpoint"][1]


def test_what_a_checkpoint_does_not_say_can_be_said(smallest_checkpoint, capsys):
    command = ["--pretrained_model_name_or_path", str(smallest_checkpoint)]
    for kind in ("epsilon", "v_prediction"):
        code, lines = found(capsys, *command, "--prediction_type", kind)
        assert code == 0 and f"predicts {kind}" in lines["checkpoint"][1]
    with pytest.raises(SystemExit):
        doctor.main(["--prediction_type", "epsilon"])


def test_a_cache_that_cannot_be_written_is_a_note(home, capsys, monkeypatch):
    (home / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    code, lines = found(capsys)
    level, text = lines["compiled programs"]
    assert (code, level) == (0, "note") and "cannot write" in text
    # Where the system says that it may be written and it may not: nothing but trying tells.
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nobody")
    level, text = found(capsys)[1]["compiled programs"]
    assert level == "note" and "cannot write" in text
    # Trying leaves nothing behind.
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    assert found(capsys)[1]["compiled programs"][0] == "ok" and not (home / "cache").exists()


def test_people_that_fit_are_counted_from_two_steps(smallest_checkpoint, capsys, monkeypatch):
    assert findings.people_that_fit(50, 60, 49) == 0
    assert findings.people_that_fit(50, 60, 50) == 1
    assert findings.people_that_fit(50, 60, 89) == 4
    monkeypatch.setattr(findings, "step_bytes", lambda cfg, folder, count: 2**30 * (3 + count))
    monkeypatch.setattr(findings, "memory_limit", lambda: 2**30 * 16)
    command = ["--checkpoint", str(smallest_checkpoint), "--people_in_a_step"]
    code, lines = found(capsys, *command)
    assert code == 0 and lines["people in a step"][1].startswith("13 on a device of 16.0 GiB")
    monkeypatch.setattr(findings, "memory_limit", lambda: 2**30)
    assert found(capsys, *command)[0] == 1
    with pytest.raises(SystemExit):
        doctor.main(["--people_in_a_step"])


def test_a_step_needs_more_than_the_frozen_weights(smallest_checkpoint):
    given = {"pretrained_model_name_or_path": str(smallest_checkpoint), "train_data_dir": "."}
    given |= {"profile": "textual_inversion", "train_batch_size": 1}
    cfg = reading.build(TrainConfig, {}, given)
    needed = findings.step_bytes(cfg, hub.resolve(str(smallest_checkpoint)).folder, 1)
    shapes = sd.shapes(sd.read_configs(smallest_checkpoint))
    frozen = sum(4 * leaf.size for tree in shapes for leaf in flatten(tree).values())
    assert frozen < needed < 20 * frozen
