"""From words to token ids: the checkpoint's CLIP tokenizer, with placeholders added to it."""

import copy
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from idea_jax.data.text import Placeholder, TextError, training_prompts
from idea_jax.runtime import traces
from idea_jax.runtime.files import file_digest, read_object

log = logging.getLogger(__name__)

# What transformers writes where a tokenizer has no length is larger.
NO_LENGTH = 1e20
MAX_CHUNKS = 20  # of a prompt; each costs memory and time in every step of drawing


class Tokens(NamedTuple):
    """A prompt of any length for the text encoder, in K chunks: int32[K, T] and float32[K, T]."""

    ids: np.ndarray
    weights: np.ndarray


def training_ids(tokenizer: "Tokenizer") -> np.ndarray:
    """Returns int32[81, length]: the tokens of `training_prompts` for the tokenizer's person.

    Raises: TextError, if the person has more tokens than fit into one of them.
    """
    prompts = training_prompts(tokenizer.placeholders[0])
    longest = max(len(tokenizer.ids(prompt)) for prompt in prompts)
    room, n = tokenizer.length - 2, tokenizer.placeholders[0].n
    if longest > room:
        raise TextError(
            f"{n} pseudo tokens are too many: the longest text of training has {longest} tokens "
            f"with them, and the text encoder reads {room}; take at most {n - longest + room} "
            "--n_pseudo_tokens"
        )
    return tokenizer(prompts)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A CLIP tokenizer and the placeholders added to it. Calling it turns prompts into token ids.

    The tokens of the placeholders have the ids `vocab_size, vocab_size + 1, ...` in the order in
    which they were added; `vocab_size` itself stays that of the text encoder.
    """

    length: int
    bos: int
    eos: int
    pad: int
    vocab_size: int
    placeholders: tuple[Placeholder, ...]
    _tokenizer: Any  # tokenizers.Tokenizer; never changed once it is here

    @property
    def placeholder(self) -> Placeholder:
        """The placeholder that was added last."""
        if not self.placeholders:
            raise TextError("this tokenizer has no placeholder yet; call with_placeholder first")
        return self.placeholders[-1]

    def ids(self, text: str) -> np.ndarray:
        """Returns int32[K]: the tokens of the text alone, without begin, end and padding."""
        return np.array(self._encode(text).ids, np.int32)

    def is_word(self, text: str) -> bool:
        """Whether a text is one word of the vocabulary."""
        return len(self.ids(text)) == 1

    def _encode(self, text: str) -> Any:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TextError(f"not valid Unicode text: {text!r}") from error
        return self._tokenizer.encode(text, add_special_tokens=False)

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Returns int32[B, length]: begin, the tokens of each prompt, end, then padding.

        A prompt that is too long loses its tail, with a logged warning.

        Raises: TextError, if a token of a placeholder would be lost.
        """
        if isinstance(prompts, str):
            raise TextError(f"expected a list of prompts, got one string: {prompts!r}")
        rows = np.full((len(prompts), self.length), self.pad, np.int32)
        for row, prompt in zip(rows, prompts, strict=True):
            encoding = self._encode(prompt)
            ids = encoding.ids
            kept, cut = ids[: self.length - 2], ids[self.length - 2 :]
            if any(i >= self.vocab_size for i in cut):
                raise TextError(
                    f"the prompt has {len(ids)} tokens, the text encoder reads {self.length - 2}, "
                    f"and the person is in the part that would be cut; shorten {prompt!r}"
                )
            if cut:
                first, _ = encoding.offsets[len(kept)]
                log.warning("the prompt is too long; its end is ignored: %r", prompt[first:])
            row[: len(kept) + 2] = [self.bos, *kept, self.eos]
        return rows

    def chunks(self, pieces: Sequence[tuple[str, float]]) -> Tokens:
        """Returns the tokens of weighted text: as many chunks of `length` as it needs.

        Each has a begin, up to `length - 2` tokens, an end and padding; the weight of these three
        is 1. The tokens of a person stay in one chunk.

        Raises: TextError, if there are more than `MAX_CHUNKS`, or a person has more tokens than fit
        into one.
        """
        room = self.length - 2
        units: list[list[tuple[int, float]]] = []  # what is not torn: a token, or a whole person
        for piece, weight in pieces:
            last = None
            for token in self._encode(piece).ids:
                person = token if token >= self.vocab_size else None
                if person is not None and last == person - 1 and self._same(last, person):
                    units[-1].append((token, weight))
                else:
                    units.append([(token, weight)])
                last = person
        rows: list[list[tuple[int, float]]] = [[]]
        for unit in units:
            if len(unit) > room:
                raise TextError(f"a person of {len(unit)} tokens does not fit into {room}")
            if len(rows[-1]) + len(unit) > room:
                rows.append([])
            rows[-1] += unit
        if len(rows) > MAX_CHUNKS:
            raise TextError(
                f"the prompt has {sum(map(len, rows))} tokens, at most {MAX_CHUNKS * room} are "
                f"read; shorten {''.join(text for text, _ in pieces)[:60]!r}..."
            )
        ids = np.full((len(rows), self.length), self.pad, np.int32)
        weights = np.ones((len(rows), self.length), np.float32)
        for row, own in enumerate(rows):
            tokens = [token for token, _ in own]
            ids[row, : len(own) + 2] = [self.bos, *tokens, self.eos]
            weights[row, 1 : len(own) + 1] = [weight for _, weight in own]
        return Tokens(ids, weights)

    def _same(self, first: int, second: int) -> bool:
        """Whether two tokens beyond the vocabulary are of the same person."""
        ends = np.cumsum([0, *(known.n for known in self.placeholders)]) + self.vocab_size
        return int(np.searchsorted(ends, first, "right")) == int(
            np.searchsorted(ends, second, "right")
        )

    def with_placeholder(self, token: str, n: int) -> "Tokenizer":
        """Returns a new tokenizer that also knows `{token}_v0 .. {token}_v{n-1}`.

        Raises: TextError, if the token (as `normalise_placeholder` returns it) or one of its n
        tokens is in the vocabulary already.
        """
        placeholder = Placeholder(token, n)
        for name in (placeholder.token, *placeholder.tokens):
            if len(self.ids(name)) == 1:
                raise _is_taken(placeholder, name)
        extended = copy.deepcopy(self._tokenizer)
        extended.add_tokens(list(placeholder.tokens))
        placeholders = (*self.placeholders, placeholder)
        result = Tokenizer(
            self.length, self.bos, self.eos, self.pad, self.vocab_size, placeholders, extended
        )
        # Unicode's rarer case rules may leave a name that the tokenizer spells in another way.
        first = self.vocab_size + sum(known.n for known in self.placeholders)
        if result.ids(placeholder.text).tolist() != list(range(first, first + n)):
            raise TextError(
                f"the tokenizer does not recognise the placeholder token {placeholder.token!r}; "
                "use plain letters and digits, such as <person-1>"
            )
        return result


def check_unknown(folder: Path, placeholder: Placeholder) -> None:
    """Refuses a placeholder that is a word of a tokenizer, as `Tokenizer.with_placeholder` does.

    It reads the file of words alone: making the tokenizer takes seconds, most of them to import it.

    Args:
      folder: as of `load_tokenizer`.

    Raises: TextError, if it is one, or there are no words to be read.
    """
    known = word_check(folder)
    taken = [name for name in (placeholder.token, *placeholder.tokens) if known(name)]
    if taken:
        raise _is_taken(placeholder, taken[0])


def word_check(folder: Path) -> Callable[[str], bool]:
    """Returns what tells whether a text is one word of a tokenizer; reads its file of words alone.

    Of words with other letters than ASCII's it says no, since the file spells their bytes.

    Raises: TextError, if there are no words to be read.
    """
    folder = Path(folder)
    _tokenizer_config(folder)
    whole, words = folder / "tokenizer.json", folder / "vocab.json"
    try:
        if words.is_file():
            known = frozenset(json.loads(words.read_text(encoding="utf-8")))
        else:
            known = frozenset(json.loads(whole.read_text(encoding="utf-8"))["model"]["vocab"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TextError(f"the tokenizer in {folder} cannot be read: {error!r}") from error
    return lambda text: text in known or f"{text.lower()}</w>" in known


def _is_taken(placeholder: Placeholder, name: str) -> TextError:
    return TextError(
        f"the placeholder token {placeholder.token!r} cannot be used: {name!r} is in the "
        "vocabulary already; take one that means nothing yet, such as <person-1>"
    )


def load_tokenizer(
    folder: Path, vocab_size: int, length: int, padding: str | None = None
) -> Tokenizer:
    """Reads the `tokenizer/` folder of a checkpoint and checks that it fits the text encoder.

    Args:
      folder: with vocab.json and merges.txt, or with tokenizer.json alone (as transformers 5
        saves it), and the config files that name the special tokens.
      vocab_size, length: rows of the text encoder's token and position tables.
      padding: the token that fills prompts up, instead of what the folder says.

    Raises: TextError, if anything is missing, unreadable or does not fit.
    """
    import tokenizers

    folder = Path(folder)
    config = _tokenizer_config(folder)
    about = _about(folder)
    tokenizer = tokenizers.Tokenizer.from_str(about["tokenizer"])
    ids = sorted(tokenizer.get_vocab(with_added_tokens=True).values())
    if ids != list(range(vocab_size)):
        raise TextError(
            f"the tokenizer in {folder} has {len(ids)} tokens with ids up to {ids[-1]}, but the "
            f"text encoder knows {vocab_size}: these two parts do not belong together"
        )
    bos, eos, pad = about["bos"], about["eos"], about["pad"]
    if padding is not None:
        pad = tokenizer.token_to_id(padding)
    if (folder.parent / "text_encoder_2").is_dir() and folder.name == "tokenizer":
        _check_second(folder.parent / "tokenizer_2", tokenizer, pad == eos)
    if bos is None or eos is None or pad is None or bos == eos:
        raise TextError(
            f"the tokenizer in {folder} needs a begin, an end and a padding token, the first two "
            f"distinct; found the ids {bos}, {eos} and {pad}"
        )
    configured = config.get("model_max_length")
    if configured is None or (isinstance(configured, int | float) and configured > NO_LENGTH):
        log.info("%s names no length; using the text encoder's, %d", folder, length)
    elif configured != length:
        raise TextError(
            f"tokenizer_config.json in {folder} says model_max_length = {configured}, but the text "
            f"encoder reads {length} positions: these two parts do not belong together"
        )
    return Tokenizer(length, bos, eos, pad, vocab_size, (), tokenizer)


def _check_second(folder: Path, first: Any, pads_with_end: bool) -> None:
    """Raises TextError unless SDXL's second tokenizer is its first one but for the padding: the
    second text encoder is given the same ids, with "!" after the end (`models.sd.encode_text`)."""
    _tokenizer_config(folder)
    about = _about(folder)
    if json.loads(about["tokenizer"])["model"] != json.loads(first.to_str())["model"]:
        raise TextError(
            f"the tokenizers tokenizer/ and tokenizer_2/ in {folder.parent} have different words; "
            "those of SDXL differ in their padding alone"
        )
    if about["pad"] != 0 or not pads_with_end:
        raise TextError(
            f"in {folder.parent} tokenizer/ must fill prompts up with the end token and "
            "tokenizer_2/ with the token of id 0 (!), as SDXL's do; are the two swapped? Download "
            "them again"
        )


def _tokenizer_config(folder: Path) -> dict:
    """Returns tokenizer_config.json, or {}; checks what transformers would silently make up."""
    # Of a missing folder transformers makes a Hub id, of an empty one a tokenizer of three tokens.
    if not folder.is_dir():
        raise TextError(f"there is no tokenizer folder {folder}")
    if not (folder / "tokenizer.json").is_file():
        missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
        if missing:
            raise TextError(
                f"the tokenizer folder {folder} lacks {' and '.join(missing)}; download the "
                "checkpoint's tokenizer/ again"
            )
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    config = read_object(path, TextError)
    kind = config.get("tokenizer_class", "CLIPTokenizer")
    if kind not in ("CLIPTokenizer", "CLIPTokenizerFast"):
        raise TextError(f"{path} is for a {kind}; only CLIPTokenizer is supported")
    return config


def _about(folder: Path) -> dict:
    """`_read_by_transformers`, kept from run to run."""
    import tokenizers

    files = [*sorted(folder.glob("*.json")), *sorted(folder.glob("*.txt"))]
    made_of = [tokenizers.__version__, *((path.name, file_digest(path)) for path in files)]
    return traces.remembered("tokenizer", made_of, lambda: _read_by_transformers(folder))


def _read_by_transformers(folder: Path) -> dict:
    """A tokenizer as transformers reads it: what the library `tokenizers` needs to make it, and the
    ids of its special tokens. Importing transformers takes half a second.

    Raises: TextError, if it cannot be read.
    """
    clip_tokenizer = _import_clip_tokenizer()
    try:
        tokenizer = clip_tokenizer.from_pretrained(str(folder), local_files_only=True)
        tokenizer.backend_tokenizer.no_padding()  # tokenizer.json may carry those of its last use
        tokenizer.backend_tokenizer.no_truncation()
        return {
            "tokenizer": tokenizer.backend_tokenizer.to_str(),
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "pad": tokenizer.pad_token_id,
        }
    except Exception as error:  # the Rust side raises plain Exception for a damaged file
        raise TextError(f"the tokenizer in {folder} cannot be read: {error}") from error


def _import_clip_tokenizer() -> Any:
    """Returns transformers.CLIPTokenizer, without the notice that PyTorch is not installed."""

    def keep(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    root = logging.getLogger("transformers")
    root.addFilter(keep)
    try:
        from transformers import CLIPTokenizer
    finally:
        root.removeFilter(keep)
    return CLIPTokenizer


def name_token_ids(tokenizer: Tokenizer, names: Sequence[str], n: int) -> np.ndarray:
    """Returns int32[K, n]: the first n tokens of each name, -1 where a name has fewer.

    Raises: TextError, if for one of the n columns no name has a token, so that it has no mean.
    Source: Cross Initialization, arXiv 2312.15905; the authors' utils.celeb_names_cross_init.
    """
    ids = np.full((len(names), n), -1, np.int32)
    for row, name in zip(ids, names, strict=True):
        first = tokenizer.ids(name)[:n]
        row[: len(first)] = first
    empty = np.flatnonzero((ids < 0).all(axis=0))
    if len(empty):
        raise TextError(
            f"none of the {len(names)} names has {empty[0] + 1} tokens, so {n} pseudo tokens "
            "cannot be initialised from them; use longer names or fewer pseudo tokens"
        )
    return ids


def word_token_ids(tokenizer: Tokenizer, words: Sequence[str], n: int) -> np.ndarray:
    """Returns int32[n]: the tokens of n words that are one token each.

    Raises: TextError for another number of words, or for a word of several tokens.
    """
    if len(words) != n:
        raise TextError(
            f"{n} pseudo tokens need {n} words to start from, got {len(words)}: {words}"
        )
    ids = [tokenizer.ids(word) for word in words]
    several = [f"{word!r} has {len(i)}" for word, i in zip(words, ids, strict=True) if len(i) != 1]
    if several:
        raise TextError(
            f"a word to start from must be one token of the vocabulary: {', '.join(several)}"
        )
    return np.concatenate(ids)
