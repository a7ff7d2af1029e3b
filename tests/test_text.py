"""Tokenizer, placeholders, templates and names, against transformers' own CLIPTokenizer."""

import json
import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest

from idea_jax.data import text
from idea_jax.data.text import Placeholder, TextError
from idea_jax.data.tokenizer import load_tokenizer, name_token_ids, training_ids, word_token_ids
from idea_jax.random_sd import write_tokenizer

WORDS = "a photo of the face person cat dog beach wearing hat and on tom hanks brad pitt o'neal"


@pytest.fixture(scope="module", params=["!", "<|endoftext|>"], ids=["sd2", "sd1"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, WORDS.split(), pad=request.param)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    """A folder that a test may damage."""
    return shutil.copytree(folder, tmp_path / "tokenizer")


def size_of(folder):
    return len(json.loads((folder / "vocab.json").read_text()))


def load(folder):
    return load_tokenizer(folder, size_of(folder), 77)


def reference(folder, *added):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    tokenizer.add_tokens(list(added))
    return lambda prompts: (
        tokenizer(
            prompts, padding="max_length", truncation=True, max_length=77, return_tensors="np"
        ).input_ids
    )


PROMPTS = [
    "",
    "a photo of the cat",
    "A PHOTO   of\tthe\ncat!",
    "café 東京 🐈 naïve 3.14, it's the dog's hat",
    "<|endoftext|> cat <|startoftext|>",
    "!! cat!",
    "cat " * 75,
]


def test_ids_equal_those_of_transformers(folder):
    ours = load(folder)(PROMPTS)
    assert ours.dtype == np.int32
    assert ours.shape == (len(PROMPTS), 77)
    np.testing.assert_array_equal(ours, reference(folder)(PROMPTS))


FIELDS = [
    "{}",
    "a photo of {}",
    "{}'s hat",
    "the hat of ({}), on the beach",
    "{}, {} and the cat",
    'a{}b {}! "{}"',
    "the face of {} person",
]


@pytest.mark.parametrize("token", ["<00011>", "<x>", "person-1", "zaphod", "<å>"])
@pytest.mark.parametrize("n", [1, 2, 12])
def test_placeholder_ids_equal_those_of_transformers(folder, token, n):
    tokenizer = load(folder).with_placeholder(token, n)
    prompts = [text.fill(field, tokenizer.placeholder) for field in FIELDS]
    names = [f"{token}_v{i}" for i in range(n)]
    by_hand = [field.replace("{}", " ".join(names)) for field in FIELDS]
    ids = tokenizer(prompts)
    np.testing.assert_array_equal(ids, reference(folder, *names)(by_hand))

    rows = tokenizer.vocab_size + np.arange(n)
    for row, field in zip(ids, FIELDS, strict=True):
        found = row[row >= tokenizer.vocab_size]
        np.testing.assert_array_equal(found, np.tile(rows, field.count("{}")))


def test_people_are_filled_in_by_their_names():
    people = {"anna": Placeholder("<a>", 2), "bert": Placeholder("<b>", 1)}
    both = text.fill_names("{bert}, {anna} and {bert}'s hat", people)
    assert both == ("<b>_v0, <a>_v0 <a>_v1 and <b>_v0's hat", ["anna", "bert"])
    assert text.fill_names("a photo of {bert}", people)[1] == ["bert"]
    for prompt, says in (("a hat", "no name"), ("{carl} and {anna}", "'{carl}'"), ("{anna", "'{'")):
        with pytest.raises(TextError, match=f"contains {says}.*{{anna}} or {{bert}}"):
            text.fill_names(prompt, people)


def test_two_placeholders_get_consecutive_ids(folder):
    base = load(folder)
    one = base.with_placeholder("<a>", 2)
    both = one.with_placeholder("<b>", 3)
    V = base.vocab_size
    assert both.ids("<b>_v0 <b>_v1 <b>_v2 <a>_v0 <a>_v1").tolist() == [
        V + i for i in (2, 3, 4, 0, 1)
    ]
    assert both.placeholders == (Placeholder("<a>", 2), Placeholder("<b>", 3))
    # The earlier tokenizers are unchanged.
    assert max(one.ids("<b>_v0")) < V
    assert max(base.ids("<a>_v0")) < V
    assert base.placeholders == ()
    with pytest.raises(TextError, match="with_placeholder"):
        _ = base.placeholder


@pytest.mark.parametrize("token", ["cat", "person", "!", "a", "<|endoftext|>"])
def test_token_of_the_vocabulary_is_refused_as_placeholder(folder, token):
    with pytest.raises(TextError, match="in the vocabulary already"):
        load(folder).with_placeholder(token, 2)


def test_placeholder_whose_rows_are_taken_is_refused(folder):
    tokenizer = load(folder).with_placeholder("<a>", 2)
    with pytest.raises(TextError, match="'<a>_v0' is in the vocabulary already"):
        tokenizer.with_placeholder("<a>", 1)
    with pytest.raises(TextError, match="'<a>_v0' is in the vocabulary already"):
        tokenizer.with_placeholder("<a>_v0", 1)


def test_placeholder_is_normalised_with_a_notice(folder):
    assert text.normalise_placeholder("<00011>") == ("<00011>", None)
    name, notice = text.normalise_placeholder("<Ann-É>")
    assert name == "<ann-é>"
    assert "'<Ann-É>' becomes '<ann-é>'" in notice
    # The tokenizer takes the normalised form, and finds it in text of any case.
    tokenizer = load(folder).with_placeholder(name, 1)
    assert tokenizer.ids("<ANN-É>_V0").tolist() == [tokenizer.vocab_size]
    with pytest.raises(TextError, match="pass '<ann-é>'"):
        load(folder).with_placeholder("<Ann-É>", 1)


@pytest.mark.parametrize(
    "token, message",
    [
        ("", "empty"),
        (" ", "' '"),
        ("a b", "' '"),
        ("<x>\n", "n'"),
        ("{x}", "'{', '}'"),
        ("a\0b", "x00"),
        ("x" * 65, "65 characters"),
    ],
)
def test_unusable_placeholder_is_refused(token, message):
    with pytest.raises(TextError, match=message):
        text.normalise_placeholder(token)


def test_placeholder_needs_a_token():
    with pytest.raises(TextError, match="at least one"):
        Placeholder("<x>", 0)


def test_fill_replaces_every_field():
    x = Placeholder("<x>", 2)
    assert text.fill("{}", x) == "<x>_v0 <x>_v1"
    assert text.fill("{} and {}'s hat", x) == "<x>_v0 <x>_v1 and <x>_v0 <x>_v1's hat"


@pytest.mark.parametrize("prompt", ["", "a photo", "<x> on the beach"])
def test_prompt_without_field_is_refused(prompt):
    with pytest.raises(TextError, match="does not mention the person"):
        text.fill(prompt, Placeholder("<x>", 2))


@pytest.mark.parametrize(
    "prompt, named",
    [
        ("{a} and {}", "'{a}'"),
        ("{0}", "'{0}'"),
        ("{} {", "'{'"),
        ("{{}}", "'{', '}'"),
        ("{} {0.__class__}", "'{0.__class__}'"),
    ],
)
def test_other_braces_are_refused(prompt, named):
    with pytest.raises(TextError) as error:
        text.fill(prompt, Placeholder("<x>", 2))
    assert named in str(error.value)


def test_long_prompt_is_cut_with_a_warning(folder, caplog):
    tokenizer = load(folder).with_placeholder("<x>", 2)
    prompt = text.fill("{} " + "cat " * 73 + "dog beach", tokenizer.placeholder)
    with caplog.at_level(logging.WARNING):
        ids = tokenizer([prompt])
    np.testing.assert_array_equal(ids, reference(folder, "<x>_v0", "<x>_v1")([prompt]))
    assert "its end is ignored: 'dog beach'" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        tokenizer([text.fill("{} " + "cat " * 73, tokenizer.placeholder)])
    assert not caplog.text


@pytest.mark.parametrize("cats", [74, 75, 100])
def test_prompt_that_would_lose_the_person_is_refused(folder, cats):
    tokenizer = load(folder).with_placeholder("<x>", 2)
    fits = text.fill("cat " * 73 + "{}", tokenizer.placeholder)
    assert tokenizer([fits])[0, 75] == tokenizer.vocab_size + 1
    with pytest.raises(TextError, match="person is in the part that would be cut"):
        tokenizer([text.fill("cat " * cats + "{}", tokenizer.placeholder)])


def test_one_string_is_refused_as_list_of_prompts(folder):
    with pytest.raises(TextError, match="list of prompts"):
        load(folder)("a cat")


def test_text_that_is_not_unicode_is_refused(folder):
    with pytest.raises(TextError, match="not valid Unicode"):
        load(folder)(["caf\udce9"])


def test_padding_and_length_come_from_the_files(folder):
    special = json.loads((folder / "special_tokens_map.json").read_text())
    tokenizer = load(folder)
    V = tokenizer.vocab_size
    assert (tokenizer.bos, tokenizer.eos) == (V - 2, V - 1)
    assert tokenizer.pad == (0 if special["pad_token"] == "!" else V - 1)
    ids = tokenizer(["cat"])[0]
    assert (ids[3:] == tokenizer.pad).all()


def test_special_tokens_map_wins_over_the_config(copy):
    """The files of SD 2.x name two paddings; transformers and diffusers use "!"."""
    for name, pad in (("tokenizer_config.json", "<|endoftext|>"), ("special_tokens_map.json", "!")):
        values = json.loads((copy / name).read_text()) | {"pad_token": pad}
        (copy / name).write_text(json.dumps(values))
    assert load(copy).pad == 0


def test_tokenizer_saved_by_transformers_loads_the_same(folder, tmp_path):
    from transformers import CLIPTokenizer

    original = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    # Leaves a truncation and a padding in the file that must not be taken over.
    original(["a cat"], padding="max_length", truncation=True, max_length=5)
    original.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    loaded = load_tokenizer(tmp_path, size_of(folder), 77)
    np.testing.assert_array_equal(loaded(PROMPTS), load(folder)(PROMPTS))


def test_missing_length_is_that_of_the_text_encoder(copy, caplog):
    (copy / "tokenizer_config.json").unlink()
    with caplog.at_level(logging.INFO):
        assert load_tokenizer(copy, size_of(copy), 50).length == 50
    assert "text encoder's, 50" in caplog.text


def test_missing_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TextError, match="no tokenizer folder openai/clip"):
        load_tokenizer("openai/clip", 49408, 77)


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(TextError, match=r"lacks vocab\.json and merges\.txt"):
        load_tokenizer(tmp_path, 3, 77)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_missing_file_is_named(copy, name):
    size = size_of(copy)
    (copy / name).unlink()
    with pytest.raises(TextError, match=f"lacks {name}"):
        load_tokenizer(copy, size, 77)


# --- weights and chunks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a photo of {}", [("a photo of {}", 1)]),
        ("a (red) hat", [("a ", 1), ("red", 1.1), (" hat", 1)]),
        ("a (red:1.5) hat", [("a ", 1), ("red", 1.5), (" hat", 1)]),
        ("a [red] hat", [("a ", 1), ("red", 1 / 1.1), (" hat", 1)]),
        ("((red)) [[hat]]", [("red", 1.21), (" ", 1), ("hat", 1 / 1.21)]),
        ("(a (red:2) hat)", [("a ", 1.1), ("red", 2.2), (" hat", 1.1)]),
        ("a red++ hat", [("a ", 1), ("red", 1.21), (" hat", 1)]),
        ("a red-- hat, sea+", [("a ", 1), ("red", 0.81), (" hat, ", 1), ("sea", 1.1)]),
        ("(a red hat)++ by", [("a red hat", 1.21), (" by", 1)]),
        ("(a red hat)--, x", [("a red hat", 0.81), (", x", 1)]),
        (r"\(red\) \[hat\]", [("(red) [hat]", 1)]),
        ("a well-known, half- open T-shirt: red", [("a well-known, half- open T-shirt: red", 1)]),
        ("red) :) a]", [("red) :) a]", 1)]),
        ("a (red hat", [("a ", 1), ("red hat", 1.1)]),
        ("(of {anna (1)}:1.2) {b++}", [("of {anna (1)}", 1.2), (" {b++}", 1)]),
        ("", [("", 1)]),
    ],
)
def test_weights_are_written_as_in_a1111_and_compel(prompt, expected):
    found = text.parse_weights(prompt)
    assert [piece for piece, _ in found] == [piece for piece, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


def test_a_short_prompt_is_one_chunk_of_the_same_tokens(folder):
    tokenizer = load(folder).with_placeholder("<x>", 2)
    for prompt in ("", "a photo of <x>_v0 <x>_v1 on the beach", "dog " * 75):
        ids, weights = tokenizer.chunks([(prompt, 1.0)])
        np.testing.assert_array_equal(ids, tokenizer([prompt]))
        assert (weights == 1).all()


def test_a_long_prompt_goes_on_in_further_chunks(folder):
    tokenizer = load(folder).with_placeholder("<x>", 2)
    (dog,) = tokenizer.ids("dog")
    ids, weights = tokenizer.chunks([("dog " * 100, 1.0), ("cat", 1.5)])
    assert ids.shape == weights.shape == (2, 77)
    assert ids[0].tolist() == [tokenizer.bos, *[dog] * 75, tokenizer.eos]
    rest = [tokenizer.bos, *[dog] * 25, *tokenizer.ids("cat"), tokenizer.eos]
    assert ids[1].tolist() == rest + [tokenizer.pad] * (77 - len(rest))
    assert weights[1, 26] == 1.5 and weights.sum() == 2 * 77 + 0.5
    # A person is not torn.
    ids, _ = tokenizer.chunks([("dog " * 74 + "<x>_v0 <x>_v1", 1.0)])
    first = tokenizer.vocab_size
    assert ids[0].tolist() == [tokenizer.bos, *[dog] * 74, tokenizer.eos, tokenizer.pad]
    assert ids[1, :4].tolist() == [tokenizer.bos, first, first + 1, tokenizer.eos]
    with pytest.raises(TextError, match="has 1600 tokens, at most 1500 are read"):
        tokenizer.chunks([("dog " * 1600, 1.0)])


def test_more_tokens_of_a_person_than_a_text_of_training_holds_are_told_so(folder):
    tokenizer = load(folder).with_placeholder("<x>", 70)
    with pytest.raises(TextError, match="70 pseudo tokens are too many.*take at most") as error:
        training_ids(tokenizer)
    most = int(str(error.value).split("at most ")[1].split()[0])
    assert training_ids(load(folder).with_placeholder("<x>", most)).shape == (81, 77)
    with pytest.raises(TextError, match="too many"):
        training_ids(load(folder).with_placeholder("<x>", most + 1))


@pytest.mark.parametrize("length", ["null", "1000000000000000019884624838656", "1e30"])
def test_a_tokenizer_that_says_no_length_takes_the_encoders(copy, length):
    size = size_of(copy)
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    text = json.dumps({**config, "model_max_length": 0})
    path.write_text(text.replace('"model_max_length": 0', f'"model_max_length": {length}'))
    assert load_tokenizer(copy, size, 77)(["a"]).shape == (1, 77)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("vocab.json", "{", "cannot be read"),
        ("vocab.json", '{"a": 0}', "cannot be read"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[]", "expected an object"),
        ("tokenizer_config.json", '{"tokenizer_class": "T5Tokenizer"}', "T5Tokenizer"),
        ("tokenizer_config.json", '{"model_max_length": 64}', "model_max_length = 64"),
    ],
)
def test_damaged_file_is_named(copy, name, content, message):
    size = size_of(copy)
    (copy / name).write_text(content)
    with pytest.raises(TextError, match=message):
        load_tokenizer(copy, size, 77)


@pytest.mark.parametrize("change", [-1, 1])
def test_vocabulary_of_another_size_is_refused(folder, change):
    with pytest.raises(TextError, match="do not belong together"):
        load_tokenizer(folder, size_of(folder) + change, 77)


def test_begin_and_end_must_differ(copy):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        values = json.loads((copy / name).read_text()) | {"bos_token": "<|endoftext|>"}
        (copy / name).write_text(json.dumps(values))
    with pytest.raises(TextError, match="distinct"):
        load(copy)


def test_loading_needs_no_torch_and_prints_nothing(folder):
    code = f"""
import sys
sys.modules["torch"] = None
from idea_jax.data.tokenizer import load_tokenizer
assert "transformers" not in sys.modules
load_tokenizer({str(folder)!r}, {size_of(folder)}, 77).with_placeholder("<x>", 2)(["<x>_v0"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_loading_does_not_import_torch(folder):
    code = f"""
import sys
from idea_jax.data.tokenizer import load_tokenizer
load_tokenizer({str(folder)!r}, {size_of(folder)}, 77)(["a cat"])
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_prompts_are_those_of_the_published_code():
    prompts = text.training_prompts(Placeholder("<x>", 2))
    assert len(prompts) == 81
    assert len(set(prompts)) == 57
    assert "a cropped photo of the face of <x>_v0 <x>_v1 person" in prompts
    assert "a depiction of my face of <x>_v0 <x>_v1 person" in prompts
    # Positions in the published list.
    person = "face of <x>_v0 <x>_v1 person"
    assert prompts[0] == f"a photo of a {person}"
    assert prompts[26] == f"a photo of a small {person}"
    assert prompts[27] == f"an illustration of a {person}"
    assert prompts[28] == prompts[1] == f"a rendering of a {person}"
    assert prompts[80] == f"a depiction of a small {person}"


def test_shipped_names_are_many_pairs_of_words():
    names = text.shipped_names()
    assert len(names) >= 600
    assert len({name.lower() for name in names}) == len(names)
    assert all(len(name.split(" ")) == 2 and name.isascii() for name in names)
    letters = {c for name in names for c in name if not c.isalpha()}
    assert letters <= {" ", "-", "'"}


def test_names_file_may_have_comments_blank_lines_and_windows_ends(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeff# people\r\nTom Hanks\r\n\r\n  Zoë Kravitz \r\n".encode())
    assert text.read_names(path) == ["Tom Hanks", "Zoë Kravitz"]


@pytest.mark.parametrize(
    "content, message",
    [(b"", "holds no name"), (b"# a\n\n", "holds no name"), (b"Zo\xeb", "not a UTF-8")],
)
def test_unusable_names_file_is_refused(tmp_path, content, message):
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(TextError, match=message):
        text.read_names(path)


def test_absent_names_file_is_refused(tmp_path):
    with pytest.raises(TextError, match="cannot be read"):
        text.read_names(tmp_path / "absent.txt")
    with pytest.raises(TextError, match="cannot be read"):
        text.read_names(tmp_path)


def test_name_token_ids_are_the_first_tokens(folder):
    tokenizer = load(folder)
    one = {word: tokenizer.ids(word)[0] for word in ("tom", "hanks", "brad", "o", "'", "neal")}
    ids = name_token_ids(tokenizer, ["Tom Hanks", "Brad", "O'Neal"], 3)
    expected = [
        [one["tom"], one["hanks"], -1],
        [one["brad"], -1, -1],
        [one["o"], one["'"], one["neal"]],
    ]
    assert ids.dtype == np.int32
    assert ids.tolist() == expected


def test_column_without_any_token_is_refused(folder):
    with pytest.raises(TextError, match="none of the 2 names has 3 tokens"):
        name_token_ids(load(folder), ["Tom Hanks", "Brad Pitt"], 3)


def test_word_token_ids_wants_one_token_a_word(folder):
    tokenizer = load(folder)
    ids = word_token_ids(tokenizer, ["Person", "cat"], 2)
    assert ids.tolist() == tokenizer.ids("person cat").tolist()
    with pytest.raises(TextError, match="'zaphod' has 4"):
        word_token_ids(tokenizer, ["zaphod", "cat"], 2)
    with pytest.raises(TextError, match="need 2 words"):
        word_token_ids(tokenizer, ["cat"], 2)
