"""Prompts for class names, and CLIP's byte-pair tokenizer (with the `tokenizers` library)."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_har_jax.errors import UserError

if TYPE_CHECKING:
    import tokenizers

DEFAULT_TEMPLATES = (
    "a photo of a person {}.",
    "a photo of someone {}.",
    "a person is {}.",
)

# The labels of the Human Action Recognition data set in natural language.
HAR15_PHRASES = {
    "calling": "talking on the phone",
    "clapping": "clapping their hands",
    "cycling": "riding a bike",
    "dancing": "dancing",
    "drinking": "drinking",
    "eating": "eating",
    "fighting": "fighting",
    "hugging": "hugging someone",
    "laughing": "laughing",
    "listening_to_music": "listening to music",
    "running": "running",
    "sitting": "sitting",
    "sleeping": "sleeping",
    "texting": "texting on a phone",
    "using_laptop": "using a laptop",
}

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_SPLIT = rf"{re.escape(BOS)}|{re.escape(EOS)}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"


def phrase(label: str) -> str:
    """Return the phrase for a label in a prompt.

    >>> phrase("using_laptop"), phrase("ApplyLipstick")
    ('using a laptop', 'apply lipstick')
    """
    if label in HAR15_PHRASES:
        return HAR15_PHRASES[label]
    if " " in label:  # already words; keep capitals, such as of names
        return " ".join(label.split())
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[_\-]", " ", label)
    return " ".join(words.lower().split())


def make_prompts(
    labels: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    descriptions: Mapping[str, Sequence[str]] | None = None,
    phrases: Mapping[str, str] | None = None,
) -> dict[str, tuple[str, ...]]:
    """Return the prompts of each class: the filled templates, then its descriptions unchanged.

    >>> make_prompts(["dancing"], ["a person is {}."])
    {'dancing': ('a person is dancing.',)}

    Raises:
      UserError: a template without {}, a description or phrase of an unknown class, or a class without prompts.
    """
    descriptions, phrases = descriptions or {}, phrases or {}
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"text.templates: {template!r} needs one {{}}, where the action's name goes")
    for name, given in (("descriptions", descriptions), ("phrases", phrases)):
        if unknown := sorted(set(given) - set(labels)):
            raise UserError(f"text.{name}: {unknown[0]!r} is no class of the data; classes: {', '.join(labels)}")
    prompts = {
        label: (
            *(template.replace("{}", phrases.get(label, phrase(label))) for template in templates),
            *descriptions.get(label, ()),
        )
        for label in labels
    }
    if empty := [label for label, texts in prompts.items() if not texts]:
        raise UserError(f"class {empty[0]!r} has no prompts; set text.templates or text.descriptions")
    return prompts


def _clip_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> "tokenizers.Tokenizer":
    """Return CLIP's tokenizer (openai/CLIP, simple_tokenizer.py) for a vocabulary, built like Hugging Face's."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(
        models.BPE(
            vocab, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False, unk_token=EOS
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        (EOS, vocab[EOS]), (BOS, vocab[BOS]), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


class Tokenizer:
    """The tokenizer of a CLIP text tower. Thread-safe.

    Args:
      tokenizer: contains the special tokens, and adds the begin and end tokens itself.
      pad_token: fills short texts; published models use different ones.
    """

    def __init__(self, tokenizer: "tokenizers.Tokenizer", pad_token: str = EOS):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            _token_id(tokenizer, token) for token in (BOS, EOS, pad_token)
        )
        self._tokenizer, self.pad_token = tokenizer, pad_token

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including the begin and end tokens."""
        return self._tokenizer.get_vocab_size()

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read tokenizer.json, else vocab.json and merges.txt.

        Raises:
          UserError: both are missing or can't be read.
        """
        from tokenizers import Tokenizer as Backend

        folder = Path(folder)
        whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
        if not whole.is_file() and not (vocab.is_file() and merges.is_file()):
            raise UserError(f"{folder}: no tokenizer; tokenizer.json, or vocab.json and merges.txt, are needed")
        try:
            backend = Backend.from_str(_read(whole)) if whole.is_file() else _from_vocabulary(vocab, merges)
            settings = _read_settings(folder)
            _add_special_tokens(backend, settings)
            return cls(backend, _content(settings["pad_token"]))
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
        except Exception as error:  # the library raises a bare Exception for a damaged file
            reason = " ".join(str(error).split())
            raise UserError(f"{folder}: the tokenizer can't be read ({reason}); copy it again") from error

    @classmethod
    def train(cls, texts: Sequence[str], vocab_size: int) -> "Tokenizer":
        """Return a small byte-pair tokenizer like CLIP's, trained on texts; equal texts give equal tokenizers.

        Its vocabulary has every byte, both inside and at the end of a word, so it can encode any text.

        Args:
          texts: the prompts of a run.
          vocab_size: upper limit of the number of tokens; at least 514, for the bytes and the begin and end tokens.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import models, pre_tokenizers, trainers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        base = [*alphabet, *(f"{byte}</w>" for byte in alphabet)]
        if vocab_size < len(base) + 2:
            raise UserError(f"tokenizer: vocab_size {vocab_size} is too small; at least {len(base) + 2} are needed")
        words = _clip_tokenizer({token: i for i, token in enumerate([*base, BOS, EOS])}, [])
        learner = Backend(models.BPE(end_of_word_suffix="</w>"))
        learner.normalizer, learner.pre_tokenizer = words.normalizer, words.pre_tokenizer
        # As special tokens, the bytes have fixed ids; otherwise equally frequent pairs would be merged in random order.
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2, special_tokens=base, end_of_word_suffix="</w>", show_progress=False
        )
        learner.train_from_iterator(texts, trainer)
        merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
        tokens = dict.fromkeys([*base, *("".join(pair) for pair in merges), BOS, EOS])
        tokenizer = _clip_tokenizer({token: i for i, token in enumerate(tokens)}, merges)
        tokenizer.add_special_tokens([BOS, EOS])
        return cls(tokenizer)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, vocab.json and merges.txt, as transformers reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = self._tokenizer.to_str(pretty=True)
        model = json.loads(text)["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        settings = {"tokenizer_class": "CLIPTokenizer", "bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
        files = {
            "tokenizer.json": text,
            "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *merges]),
            "tokenizer_config.json": json.dumps(settings | {"pad_token": self.pad_token}, indent=2, ensure_ascii=False),
        }
        for name, content in files.items():
            (folder / name).write_text(content + "\n", encoding="utf-8")

    def words(self, text: str) -> list[int]:
        """Return the tokens of a text, without the begin and end tokens."""
        return self._tokenizer.encode(text).ids[1:-1]

    def __call__(self, texts: Sequence[str], context_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and attention masks, int32 [n, context_length] each.

        Long texts are truncated but keep their end token; short ones are padded, with mask 0.
        """
        assert context_length >= 2, "no room for the begin and end tokens"
        ids = np.full((len(texts), context_length), self.pad_token_id, np.int32)
        mask = np.zeros_like(ids)
        # Not by the library: its truncation and padding are state of an object that threads share.
        for row, encoding in enumerate(self._tokenizer.encode_batch_fast(list(texts))):
            tokens = encoding.ids
            if len(tokens) > context_length:
                tokens = [*tokens[: context_length - 1], self.eos_token_id]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask


def _token_id(tokenizer: "tokenizers.Tokenizer", token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise UserError(f"the tokenizer's vocabulary has no {token!r}; a CLIP tokenizer is needed")
    return number


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _from_vocabulary(vocab: Path, merges: Path) -> "tokenizers.Tokenizer":
    lines = [line for line in _read(merges).splitlines() if line.strip() and not line.startswith("#version")]
    pairs = [(left, right) for left, right in (line.split() for line in lines)]
    return _clip_tokenizer(json.loads(_read(vocab)), pairs)


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return the special tokens of a folder: each a string, or an object with content and flags.

    As in transformers, special_tokens_map.json has precedence unless tokenizer_config.json lists the added tokens.
    """
    newer, older = (
        json.loads(_read(path)) if path.is_file() else {}
        for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json")
    )
    settings = older | newer if "added_tokens_decoder" in newer else newer | older
    defaults = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS, "added_tokens_decoder": {}}
    return {name: settings.get(name) or default for name, default in defaults.items()}


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _add_special_tokens(tokenizer: "tokenizers.Tokenizer", settings: dict[str, Any]) -> None:
    """Add the listed special tokens, then any missing named ones; later flags override earlier ones.

    This includes the pad token: if it is "!", a "!" in a text becomes that token too (as in transformers).
    """
    listed = [token for _, token in sorted(settings["added_tokens_decoder"].items(), key=lambda item: int(item[0]))]
    tokenizer.add_special_tokens([_added_token(token) for token in listed])
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    named = [settings[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")]
    for token in named:
        _token_id(tokenizer, _content(token))  # a token outside the vocabulary would have no embedding
    tokenizer.add_special_tokens([_added_token(token) for token in named if _content(token) not in present])


def _added_token(token: str | dict[str, Any]) -> "tokenizers.AddedToken":
    from tokenizers import AddedToken

    known = ("lstrip", "rstrip", "normalized", "single_word")
    flags = {name: token[name] for name in known if name in token} if isinstance(token, dict) else {}
    return AddedToken(_content(token), special=True, **flags)
