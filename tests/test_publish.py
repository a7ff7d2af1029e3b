"""A person is uploaded when a user asks for it, and only then; the library of the Hub is a fake."""

from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml

from idea_jax import publish
from idea_jax.config import reading
from idea_jax.config.settings import ConfigError, TrainConfig
from idea_jax.training import results


class Hub:
    """Stands for `huggingface_hub.HfApi`, and keeps what it is given."""

    calls: list

    def __init__(self, token=None):
        self.calls.append(("token", token))

    def create_repo(self, name, **settings):
        self.calls.append(("create", name, settings))
        return SimpleNamespace(repo_id=f"somebody/{name}")

    def upload_folder(self, **settings):
        self.calls.append(("upload", settings))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Hub, "calls", [], raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub.calls


def read_head(card):
    _, head, _ = card.split("---", 2)
    return yaml.safe_load(head)


def test_card_says_what_it_is_and_whom_it_concerns():
    text = publish.card("<anna>", "someone/sd-base", "paper", 25, holds_face=False)
    head = read_head(text)
    assert head["base_model"] == "someone/sd-base" and head["license"] == "other"
    assert head["license_link"].endswith("someone/sd-base") and head["instance_prompt"] == "<anna>"
    assert "agreed" in text and "They hold no face embedding" in text and "25 steps" in text
    biometric = publish.card("<anna>", "mini", "paper", 320, holds_face=True)
    assert "biometric" in biometric and "base_model" not in read_head(biometric)


def test_upload_is_private_and_leaves_out_what_has_paths_and_photo_names(tmp_path, hub):
    publish.push(tmp_path, "card", "anna", "secret")
    (_, token), (_, name, made), (_, sent) = hub
    assert (token, name) == ("secret", "anna") and made["private"] is True
    assert sent["repo_id"] == "somebody/anna" and sent["folder_path"] == tmp_path
    wanted = ["README.md", "identity.safetensors", "webui/anna.safetensors"]
    listed = [*wanted, "config.yaml", "run.json"]
    kept = list(
        huggingface_hub.utils.filter_repo_objects(listed, allow_patterns=sent["allow_patterns"])
    )
    assert kept == wanted
    assert (tmp_path / "README.md").read_text() == "card"


def test_failed_upload_says_what_is_left_to_do(tmp_path, hub, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no way out\nsecond line")

    monkeypatch.setattr(Hub, "create_repo", fail)
    with pytest.raises(publish.PublishError, match="no way out") as refused:
        publish.push(tmp_path, "card", "anna")
    assert f"hf upload anna {tmp_path}" in str(refused.value)
    assert "second line" not in str(refused.value)


def settings(*flags):
    needed = ("--pretrained_model_name_or_path", "m", "--train_data_dir", "d")
    return reading.parse(TrainConfig, [*needed, *flags])


def test_nobody_is_published_who_did_not_agree():
    with pytest.raises(ConfigError, match="publish_consent"):
        settings("--push_to_hub")
    for flag in (("--publish_consent",), ("--hub_model_id", "a"), ("--hub_token", "t")):
        with pytest.raises(ConfigError, match="without --push_to_hub"):
            settings(*flag)


def test_no_file_keeps_the_token_or_publishes_again(tmp_path):
    cfg = settings("--push_to_hub", "--publish_consent", "--hub_token", "secret")
    assert "secret" not in reading.to_yaml(cfg)
    base = SimpleNamespace(name="m", revision=None, tokenizer=None)
    kept = results.Results(cfg, None, base, tmp_path, [], lambda word: False)
    kept.save_run(0, 0.0, SimpleNamespace(held_out=[]), "0" * 64, tmp_path)
    kept.close()
    said = (tmp_path / "config.yaml").read_text()
    assert "secret" not in said and "push_to_hub: true" not in said
