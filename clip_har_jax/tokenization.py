"""The tokenizers of text towers, read from the files of a model folder.

CLIP's own tokenizer is in `text.py`. Others are published as tokenizer.json (Gemma's for SigLIP 2, BERT's for CLIPA),
or as a SentencePiece model, spiece.model (SigLIP).
"""

import html
import json
import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import numpy as np

from clip_har_jax.errors import UserError
from clip_har_jax.text import BOS, Tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model", "vocab.txt")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@runtime_checkable
class TextTokenizer(Protocol):
    """Token ids from texts; threads can share it."""

    def __call__(self, texts: Sequence[str], context_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and attention masks, int32 [n, context_length] each, truncated and padded."""

    def words(self, text: str) -> list[int]:
        """Return the tokens of a text, without special ones."""

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files."""


def _squeeze(text: str) -> str:
    return " ".join(html.unescape(html.unescape(text)).split())


# Functions that clean a text before tokenization, by their names in open_clip's `tokenizer_kwargs.clean`. Unlike
# open_clip, they don't repair wrongly decoded letters (ftfy).
CLEANING: dict[str, Callable[[str], str]] = {
    "": lambda text: text,
    "whitespace": _squeeze,
    "lower": lambda text: _squeeze(text).lower(),
    "canonicalize": lambda text: _squeeze(
        html.unescape(html.unescape(text)).replace("_", " ").translate(_NO_PUNCTUATION).lower()
    ),
}


class PublishedTokenizer:
    """A tokenizer of a model folder; it keeps the folder's files and writes them unchanged.

    Args:
      files: contents of its files, by name.
      encode: returns the token ids of a text, and the numbers of special tokens at its beginning and end.
      pad_token_id: id of the token that fills short texts.
      settings: tokenizer_config.json; `padding_side`, and `clean` and `zero_token_id`, which are this project's own.
    """

    def __init__(
        self,
        files: dict[str, bytes],
        encode: Callable[[str], tuple[list[int], int, int]],
        pad_token_id: int,
        settings: dict[str, Any],
    ):
        self._files, self._encode, self.pad_token_id, self._settings = files, encode, pad_token_id, settings
        self._clean = _find_cleaning(settings.get("clean", ""))
        gemma = str(settings.get("tokenizer_class", "")).startswith(("Gemma", "Siglip2"))  # transformers' default
        self._left = settings.get("padding_side", "left" if gemma else "right") == "left"

    def with_settings(self, **settings: Any) -> "PublishedTokenizer":
        """Return the same tokenizer with other settings, which are saved with it."""
        merged = self._settings | settings
        files = self._files | {"tokenizer_config.json": (json.dumps(merged, indent=2) + "\n").encode()}
        return PublishedTokenizer(files, self._encode, self.pad_token_id, merged)

    @property
    def last_special_id(self) -> int:
        """The id of the special token that ends every text."""
        return self._encode("")[0][-1]

    def words(self, text: str) -> list[int]:
        """Return the tokens of a text, without special ones."""
        tokens, first, last = self._encode(self._clean(text))
        return tokens[first : len(tokens) - last]

    def __call__(self, texts: Sequence[str], context_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and attention masks, int32 [n, context_length] each.

        Long texts are truncated but keep their special tokens; short ones are padded, with mask 0.
        """
        ids = np.full((len(texts), context_length), self.pad_token_id, np.int32)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            tokens, _, last = self._encode(self._clean(text))
            if len(tokens) > context_length:
                tokens = tokens[: context_length - last] + tokens[len(tokens) - last :]
            place = slice(context_length - len(tokens), None) if self._left else slice(len(tokens))
            ids[row, place], mask[row, place] = tokens, 1
        if (zeroed := self._settings.get("zero_token_id")) is not None:
            ids[ids == zeroed] = 0
        return ids, mask

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files, which transformers opens."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).write_bytes(content)


class CleanedTokenizer:
    """CLIP's tokenizer as open_clip uses it: texts are cleaned first, and short ones may be padded with zeros.

    It is saved as CLIP's own, since a causal tower doesn't see the padding.

    Args:
      tokenizer: CLIP's.
      cleaning: a name in `CLEANING`.
      pads_zeros: pad with zeros; otherwise as the tokenizer does.
    """

    def __init__(self, tokenizer: TextTokenizer, cleaning: str, pads_zeros: bool):
        self._tokenizer, self._clean, self._pads_zeros = tokenizer, _find_cleaning(cleaning), pads_zeros

    def __call__(self, texts: Sequence[str], context_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and attention masks, int32 [n, context_length] each."""
        ids, mask = self._tokenizer([self._clean(text) for text in texts], context_length)
        return ids * mask if self._pads_zeros else ids, mask

    def words(self, text: str) -> list[int]:
        """Return the tokens of a text, without special ones."""
        return self._tokenizer.words(self._clean(text))

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files."""
        self._tokenizer.save(folder)


def _find_cleaning(name: str) -> Callable[[str], str]:
    if name not in CLEANING:
        raise UserError(f"the tokenizer's setting clean is {name!r}; accepted: {', '.join(CLEANING)}")
    return CLEANING[name]


class CheckedTokenizer:
    """A tokenizer whose ids are compared with the vocabulary of its model, which would take larger ones for its last.

    Args:
      tokenizer: gives the ids.
      vocab_size: of the model.
      where: the folder of both, for messages.
    """

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int, where: str):
        self._tokenizer, self._vocab_size, self._where = tokenizer, vocab_size, where

    def __call__(self, texts: Sequence[str], context_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and attention masks, int32 [n, context_length] each.

        Raises:
          UserError: an id that the model doesn't have.
        """
        ids, mask = self._tokenizer(texts, context_length)
        self._check(ids)
        return ids, mask

    def words(self, text: str) -> list[int]:
        """Return the tokens of a text, without special ones; errors as of the call."""
        tokens = self._tokenizer.words(text)
        self._check(np.asarray(tokens))
        return tokens

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files."""
        self._tokenizer.save(folder)

    def _check(self, ids: np.ndarray) -> None:
        if ids.size and ids.max() >= self._vocab_size:
            raise UserError(
                f"{self._where}: the tokenizer gives the id {ids.max()}, but the model has {self._vocab_size} tokens; "
                "copy the model's own tokenizer"
            )


class NoTokenizer:
    """Stands for the tokenizer of a model with an image tower alone; it refuses all texts."""

    def __init__(self, where: str):
        self._where = where

    def __call__(self, texts: Sequence[str], context_length: int) -> NoReturn:
        """Refuse the texts."""
        self.words("")

    def words(self, text: str) -> NoReturn:
        """Refuse the text."""
        raise UserError(
            f"{self._where}: an image tower alone, which knows no texts; train a linear head for its classes "
            "(method.name=linear_probe), or use a model with a text tower"
        )

    def save(self, folder: str | Path) -> None:
        """Write nothing."""


def read_tokenizer(folder: str | Path) -> Tokenizer | PublishedTokenizer:
    """Read the tokenizer of a model folder.

    Raises:
      UserError: its files are missing, or can't be read.
    """
    folder = Path(folder)
    whole, pieces = folder / "tokenizer.json", folder / "spiece.model"
    is_clip = f'"{BOS}"' in whole.read_text("utf-8", "replace") if whole.is_file() else not pieces.is_file()
    if is_clip:
        return Tokenizer.from_folder(folder)
    try:
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        settings: dict[str, Any] = json.loads(files.get("tokenizer_config.json", b"{}"))
        make = _from_json if whole.is_file() else _from_pieces
        return PublishedTokenizer(files, *make(files, settings), settings)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except Exception as error:  # the libraries raise bare Exception on a damaged file
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: the tokenizer can't be read ({reason}); copy it again") from error


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _from_json(files: dict[str, bytes], settings: dict[str, Any]) -> tuple[Any, int]:
    """Return the function that encodes with tokenizer.json, and the id of the pad token."""
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(files["tokenizer.json"].decode())
    backend.no_truncation()
    backend.no_padding()
    named = json.loads(files.get("special_tokens_map.json", b"{}")) | settings
    given = [_content(named["pad_token"])] if named.get("pad_token") else ["<pad>", "[PAD]"]
    pad = next((number for token in given if (number := backend.token_to_id(token)) is not None), None)
    if pad is None:
        raise UserError(f"the tokenizer's vocabulary has no pad token {given[0]!r}; copy tokenizer.json again")
    lowers = str(settings.get("tokenizer_class", "")).startswith("Siglip2")

    def encode(text: str) -> tuple[list[int], int, int]:
        encoding = backend.encode(text.lower() if lowers else text)
        is_special = encoding.special_tokens_mask
        first = next((i for i, special in enumerate(is_special) if not special), 0)
        last = next((i for i, special in enumerate(reversed(is_special)) if not special), len(is_special))
        return encoding.ids, first, last

    return encode, pad


def _from_pieces(files: dict[str, bytes], settings: dict[str, Any]) -> tuple[Any, int]:
    """Return the function that encodes with spiece.model like transformers' SiglipTokenizer, and the pad token's id."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_proto=files["spiece.model"])
    unknown, end, pad = (
        _content(settings.get(name) or default)
        for name, default in (("unk_token", "<unk>"), ("eos_token", "</s>"), ("pad_token", "</s>"))
    )
    numbers = {token: model.piece_to_id(token) for token in (end, pad)}
    prefix = len(model.encode(unknown))

    def encode(text: str) -> tuple[list[int], int, int]:
        text = text.lower() if settings.get("do_lower_case", True) else text
        text = re.sub(r"\s+", " ", f"\N{LOWER ONE EIGHTH BLOCK}{text}".translate(_NO_PUNCTUATION)).strip()
        # The library drops a space at the beginning; one after the unknown token stays.
        return [*model.encode(unknown + text)[prefix:], numbers[end]], 0, 1

    return encode, numbers[pad]
