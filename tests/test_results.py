"""Whose results lie in a folder, and what web UIs are told a person is called."""

import json

import numpy as np
import pytest

from idea_jax.data.tokenizer import load_tokenizer
from idea_jax.formats import learned_embeds
from idea_jax.formats.identity import Identity, write_identity
from idea_jax.method import condition
from idea_jax.random_sd import write_tokenizer
from idea_jax.training import results
from idea_jax.training.results import Occupant


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    size = write_tokenizer(folder, ["person", "anna"], pad="!")
    return load_tokenizer(folder, size, 77)


@pytest.mark.parametrize(
    ("token", "trigger"),
    [
        ("<bert>", "bert"),
        ("<anna-lena>", "anna-lena"),
        ("<анна>", "анна"),
        ("<安娜>", "安娜"),
        ("<person>", "idea-person"),  # ordinary words of the vocabulary
        ("<anna>", "idea-anna"),
        ("anna", "idea-anna"),
    ],
)
def test_a_trigger_is_the_name_but_no_word_of_the_vocabulary(tokenizer, token, trigger):
    assert learned_embeds.trigger_of(token, tokenizer.is_word) == trigger
    assert len(tokenizer.ids(trigger)) > 1


def test_names_that_no_file_can_have_are_kept_apart(tokenizer):
    tokens = ["<a.b>", "<a/b>", "<a:b>", "<*>", "<?>", "<\N{GRINNING FACE}>", "<a-b>", "<../a-b>"]
    triggers = [learned_embeds.trigger_of(token, tokenizer.is_word) for token in tokens]
    assert len(set(triggers)) == len(tokens)
    for trigger in triggers:
        assert trigger and not set(trigger) & set('./\\:*?"<>| ') and len(trigger.encode()) < 200


ROWS = np.ones((2, 8), np.float32)
ANNA = Occupant("<anna>", "digest", "photos/anna")


def write_person(path, placeholder):
    identity = Identity(
        method=condition.make_method("cross_init"),
        trainable={"pseudo_tokens": ROWS},
        given={"anchor": ROWS},
        placeholder=placeholder,
        base_model="tiny",
        revision=None,
        seed=0,
        steps=1,
    )
    write_identity(path, identity)


@pytest.mark.parametrize(
    ("placeholder", "photos", "source", "says"),
    [
        ("<anna>", "digest", "photos/anna", None),
        ("<anna>", "digest", "elsewhere", None),  # the same photos in another place
        ("<anna>", None, None, None),  # stopped before it noted its photos
        ("<anna>", None, "photos/anna", None),  # of an earlier version
        ("<anna>", None, "photos/bert", "holds <anna> of photos/bert"),
        ("<anna>", "other", "photos/anna", "which now holds other photos"),
        ("<bert>", "digest", "photos/anna", "holds <bert> of photos/anna"),
        (None, None, None, "somebody, in a file that cannot be read"),
    ],
)
def test_a_folder_holds_the_same_person_or_another(tmp_path, placeholder, photos, source, says):
    results.refuse_another(tmp_path, ANNA)  # nobody is there
    path = tmp_path / "identity.safetensors"
    if placeholder is None:
        path.write_text("cut off")
    else:
        write_person(path, placeholder)
    if photos is not None:
        (tmp_path / "run.json").write_text(json.dumps({"photos": photos}))
    if source is not None:
        (tmp_path / "config.yaml").write_text(f"train_data_dir: {source}\n")
    if says is None:
        results.refuse_another(tmp_path, ANNA)
        return
    with pytest.raises(results.OccupiedError, match=says) as error:
        results.refuse_another(tmp_path, ANNA)
    for phrase in (str(tmp_path), "this run learns <anna> of photos/anna", "--overwrite"):
        assert phrase in str(error.value)


def test_results_on_the_way_are_somebodys_too(tmp_path):
    learned_embeds.write(tmp_path / "learned_embeds-steps-5.safetensors", "<bert>", ROWS, {})
    assert results.occupant_of(tmp_path) == Occupant("<bert>", None, None)
    write_person(tmp_path / "identity-steps-5.safetensors", "<carl>")
    assert results.occupant_of(tmp_path).placeholder == "<carl>"
