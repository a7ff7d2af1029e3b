"""Nothing reports home: the switches are set in time, and nobody is asked for anything."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SWITCHES = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")


def environment(**changes):
    """This process's environment without the switches, and with some changes."""
    kept = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    return {**kept, "PYTHONPATH": str(ROOT), **changes}


# Stands for the real ones, which look at their switch when they are imported.
TELLS = """
import json, os
print(json.dumps({"package": __name__, "switches": {n: os.environ.get(n) for n in %r}}))
raise ImportError("that was all")
"""
REACH = {
    "onnxruntime": "from idea_jax.faces import models; models.load_recogniser('face.onnx')",
    "insightface": "from idea_jax.faces import crops; crops.alignment([[0.0, 0.0]] * 5)",
    "huggingface_hub": "from idea_jax.models import hub; hub.resolve('somebody/something')",
}


@pytest.mark.parametrize("package", REACH)
@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1"), (dict.fromkeys(SWITCHES, ""), "1"), (dict.fromkeys(SWITCHES, "0"), "0")],
)
def test_switches_are_set_before_what_they_switch_off(tmp_path, package, given, expected):
    """Whoever has set one has decided; an empty one says nothing."""
    (tmp_path / f"{package}.py").write_text(TELLS % (SWITCHES,))
    env = environment(**given, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    done = subprocess.run(
        [sys.executable, "-c", REACH[package]], env=env, capture_output=True, text=True
    )
    told = json.loads(done.stdout.splitlines()[0])
    assert told == {"package": package, "switches": dict.fromkeys(SWITCHES, expected)}


# In a network of its own: a name server that knows nobody, and what it is asked by a program.
ALONE = r"""
import fcntl, json, os, socket, struct, subprocess, sys, threading
UP = struct.pack("16sH14x", b"lo", 0x1 | 0x40)
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
fcntl.ioctl(server, 0x8914, UP)  # SIOCSIFFLAGS: up and running
server.bind(("127.0.0.1", 53))
asked = []
def serve():
    while True:
        query, sender = server.recvfrom(4096)
        name, at = [], 12
        while query[at]:
            name.append(query[at + 1 : at + 1 + query[at]].decode())
            at += 1 + query[at]
        asked.append(".".join(name))
        server.sendto(query[:2] + b"\x81\x83" + query[4:6] + bytes(6) + query[12:], sender)
def tried():
    # Connections, and packets that have no way out: the kernel counts them for each network.
    count = 0
    for kind in ("Ip", "Tcp"):
        lines = [line.split() for line in open("/proc/net/snmp") if line.startswith(kind + ":")]
        row = dict(zip(*lines))
        count += int(row.get("OutNoRoutes", 0)) + int(row.get("ActiveOpens", 0))
    six = "/proc/net/snmp6"
    lines = [line.split() for line in open(six)] if os.path.exists(six) else []
    return count + sum(int(line[1]) for line in lines if line[0] == "Ip6OutNoRoutes")
threading.Thread(target=serve, daemon=True).start()
control = tried()
for ask in (
    lambda: socket.getaddrinfo("control.example", 443),
    lambda: socket.create_connection(("192.0.2.1", 443)),
):
    try:
        ask()
    except OSError:
        pass
before = tried()
done = subprocess.run([sys.executable, "-c", *sys.argv[1:]], capture_output=True, text=True)
about = {"asked": asked, "control": before - control, "tried": tried() - before}
print(json.dumps({"code": done.returncode, "out": done.stdout, "err": done.stderr, **about}))
"""
# All of a user's way, with the mini's face models: a face is found, its person learned and drawn.
LEARN = """
import sys
from pathlib import Path
import sample_jax, train_jax
import idea_jax
checkpoint, photos, work = sys.argv[1:]
model = ["--pretrained_model_name_or_path", checkpoint]
pack = str(Path(idea_jax.__file__).parent / "mini" / "checkpoint" / "face")
face = ["--face_model_dir", pack, "--crop", "face", "--train_data_dir", photos]
steps = "--max_train_steps 1 --train_batch_size 1 --checkpointing_steps 1".split()
assert train_jax.main([*model, *face, *steps, "--output_dir", work + "/anna"]) == 0
draw = "--num_images_per_prompt 1 --num_inference_steps 1 --prompt {}".split()
drawn = ["--identity", work + "/anna", "--save_dir", work + "/drawn"]
assert sample_jax.main([*model, *draw, *drawn]) == 0
"""


def alone(tmp_path, code, *arguments, **changes):
    """Runs Python code where nobody can be reached, and an empty home: (what came of it, files)."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    inside = 'mount --bind resolv.conf /etc/resolv.conf && exec "$@"'
    command = ["unshare", "--map-root-user", "--net", "--mount", "sh", "-c", inside, "sh"]
    env = environment(HOME=str(home), TMPDIR=str(home), PYTHONDONTWRITEBYTECODE="1", **changes)
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        env.pop(name, None)
    done = subprocess.run(
        [*command, sys.executable, "-c", ALONE, code, *arguments],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    files = sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())
    return json.loads(done.stdout), files


@pytest.fixture
def namespaces():
    """Skips where the kernel gives none; a machine that tests every change has to have them."""
    needed = ["unshare", "--map-root-user", "--net", "--mount", "true"]
    why = "unshare is not installed"
    if shutil.which("unshare"):
        tried = subprocess.run(needed, capture_output=True, text=True)
        if tried.returncode == 0:
            return
        why = f"no namespaces: {tried.stderr.strip()}"
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


def test_a_person_is_found_learned_and_drawn_and_nobody_is_asked_and_nothing_left(
    tmp_path, namespaces, smallest_checkpoint
):
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(ROOT / "idea_jax" / "mini" / "photo.png", photos)
    paths = [str(path) for path in (smallest_checkpoint, photos, tmp_path)]
    programs = {"JAX_COMPILATION_CACHE_DIR": os.environ["IDEA_JAX_TEST_CACHE"]}
    seen, files = alone(tmp_path, LEARN, *paths, **programs)
    assert seen["code"] == 0, seen["err"]
    assert (tmp_path / "anna" / "identity.safetensors").is_file()
    assert len(list((tmp_path / "drawn").glob("*/00000.png"))) == 1
    # The control shows that a question would have been heard, and a connection counted.
    assert set(seen["asked"]) == {"control.example"} and seen["control"] > 0
    assert seen["tried"] == 0
    assert files == []
    # Nothing lies beside the two folders that were named.
    ours = {"photos", "home", "resolv.conf", "anna", "drawn"}
    assert {path.name for path in tmp_path.iterdir()} == ours
