"""The tokenizer against transformers' CLIPTokenizer, and prompts."""

import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerBase

from clip_har_jax.errors import UserError
from clip_har_jax.text import DEFAULT_TEMPLATES, HAR15_PHRASES, Tokenizer, make_prompts, phrase

PROMPTS = [f"a photo of a person {words}." for words in HAR15_PHRASES.values()]
TEXTS = [
    *PROMPTS,
    "Hello!! World! a!b ! !!!",
    "it's they'll I'M we've you're he'd don’t",
    "naïve café e\u0301 ﬁ İstanbul ẞ ΣΑΣ",
    "😀 👩‍👩‍👧 日本語 हिन्दी عربى",
    "a\n\tb \r\n  c \u2028 d\u00a0e \ufeff",
    "123 4.5 ½ Ⅷ ² $%^&*()_+-=[]{}|;:,./<>?`~\\\"'",
    "\x00\x01\x7f\x85",
    "<|startoftext|> typed <|endoftext|>",
    "<|STARTOFTEXT|> in capitals <|ENDOFTEXT|>",
    "",
    "   ",
    "x" * 300,
    "riding " * 200,
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(PROMPTS, 800)


def write_folder(folder: Path, trained: Tokenizer, names: set[str], **settings: dict) -> Path:
    """Return a published folder's files: those named, with these settings."""
    trained.save(folder)
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
    for name, content in settings.items():
        if listed := content.get("added_tokens_decoder"):
            numbers = (0, trained.bos_token_id, trained.eos_token_id)
            content = content | {"added_tokens_decoder": dict(zip(map(str, numbers), listed, strict=True))}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def assert_same(ours: Tokenizer, theirs: PreTrainedTokenizerBase, context_length: int = 24) -> None:
    ids, mask = ours(TEXTS, context_length)
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=context_length, return_tensors="np")
    for text, row, right in zip(TEXTS, ids, expected["input_ids"], strict=True):
        np.testing.assert_array_equal(row, right, err_msg=repr(text[:40]))
    np.testing.assert_array_equal(mask, expected["attention_mask"])
    assert ids.dtype == mask.dtype == np.int32
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert (ours.pad_token_id, ours.vocab_size) == (theirs.pad_token_id, len(theirs))


def flagged(token: str) -> dict[str, object]:
    return {"content": token, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def added(token: str) -> dict[str, object]:
    return {"__type": "AddedToken", **flagged(token)}


WHOLE, VOCABULARY = {"tokenizer.json"}, {"vocab.json", "merges.txt"}
CLASS = {"tokenizer_class": "CLIPTokenizer"}
OPENAI = CLASS | {
    "bos_token": added("<|startoftext|>"),
    "eos_token": added("<|endoftext|>"),
    "unk_token": added("<|endoftext|>"),
    "pad_token": "<|endoftext|>",
}


OLDER = {"bos_token": flagged("<|startoftext|>"), "eos_token": flagged("<|endoftext|>"), "pad_token": "!"}
LISTED = [
    flagged("!") | {"normalized": False, "special": True},
    flagged("<|startoftext|>") | {"special": True},
    flagged("<|endoftext|>") | {"special": True},
]


@pytest.mark.parametrize("names", [WHOLE, VOCABULARY, WHOLE | VOCABULARY], ids=["whole", "vocabulary", "both"])
@pytest.mark.parametrize(
    ("settings", "pad"),
    [
        ({}, "<|endoftext|>"),
        ({"tokenizer_config": OPENAI}, "<|endoftext|>"),
        ({"tokenizer_config": CLASS | {"pad_token": "!"}}, "!"),
        ({"tokenizer_config": CLASS, "special_tokens_map": {"pad_token": "!"}}, "!"),
        ({"tokenizer_config": OPENAI, "special_tokens_map": {"pad_token": flagged("!")}}, "!"),
        ({"special_tokens_map": OLDER}, "!"),
        ({"tokenizer_config": OPENAI, "special_tokens_map": OLDER | {"pad_token": "<|endoftext|>"}}, "<|endoftext|>"),
        ({"tokenizer_config": CLASS | {"pad_token": "!", "added_tokens_decoder": LISTED}}, "!"),
        (
            {
                "tokenizer_config": CLASS | {"pad_token": "<|endoftext|>", "added_tokens_decoder": {}},
                "special_tokens_map": {"pad_token": "!"},
            },
            "<|endoftext|>",
        ),
    ],
    ids=[
        "no settings",
        "openai",
        "pad !",
        "older file",
        "both files",
        "older alone",
        "both, openai",
        "listed",
        "older ignored",
    ],
)
def test_ids_equal_transformers(
    tmp_path: Path, trained: Tokenizer, names: set[str], settings: dict[str, dict], pad: str
) -> None:
    folder = write_folder(tmp_path / "published", trained, names, **settings)
    ours = Tokenizer.from_folder(folder)
    assert ours.pad_token == pad
    assert_same(ours, CLIPTokenizer.from_pretrained(folder))
    ours.save(tmp_path / "saved")
    assert_same(Tokenizer.from_folder(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved"))


@pytest.mark.parametrize("context_length", [2, 3, 16, 77, 400])
def test_every_context_length(tmp_path: Path, trained: Tokenizer, context_length: int) -> None:
    trained.save(tmp_path)
    assert_same(trained, AutoTokenizer.from_pretrained(tmp_path), context_length)


def test_folder_that_transformers_saved(tmp_path: Path, trained: Tokenizer) -> None:
    trained.save(tmp_path / "ours")
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "ours")
    theirs(["cut"], padding="max_length", truncation=True, max_length=4)  # leaves its settings in the file
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Tokenizer.from_folder(tmp_path / "theirs")
    assert_same(ours, theirs)
    assert ours(["a"], 9)[0].shape == (1, 9)


def test_no_texts(trained: Tokenizer) -> None:
    ids, mask = trained([], 8)
    assert ids.shape == mask.shape == (0, 8)


def test_cut_texts_keep_begin_and_end(trained: Tokenizer) -> None:
    ids, mask = trained(["riding " * 50], 10)
    assert (ids[0, 0], ids[0, -1]) == (trained.bos_token_id, trained.eos_token_id)
    assert mask.all()


def test_merges_are_learned_and_vocabulary_bounded(trained: Tokenizer) -> None:
    word, _ = trained(["person"], 10)
    assert list(word[0, [0, 2]]) == [trained.bos_token_id, trained.eos_token_id]  # one token
    assert 514 < trained.vocab_size <= 800
    assert Tokenizer.train(PROMPTS, 560).vocab_size == 560
    assert Tokenizer.train([], 800).vocab_size == 514
    with pytest.raises(UserError, match="513 is too small; at least 514"):
        Tokenizer.train(PROMPTS, 513)


def test_training_is_the_same_each_time(tmp_path: Path) -> None:
    # All pairs are equally frequent: which one merges first must not hang on the order of a hash table.
    words = ["".join(chr(97 + (start + step * i) % 26) for i in range(4)) for step in (1, 3, 5) for start in range(26)]
    saved = set()
    for _ in range(20):
        Tokenizer.train(words, 700).save(tmp_path)
        saved.add((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(saved) == 1


def test_any_text_round_trips(tmp_path: Path, trained: Tokenizer) -> None:
    trained.save(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    every_byte_start = "".join(chr(point) for point in [*range(33, 0x800), 0x20AC, 0x4E2D, 0xFFFD, 0x1F600, 0x10FFFF])
    for text in ("日本語 😀 zq", "ünïcödé", *every_byte_start):
        ids, _ = trained([text], 64)
        kept = [i for i in ids[0] if i not in (trained.bos_token_id, trained.eos_token_id)]
        normal = theirs.backend_tokenizer.normalizer.normalize_str(text)
        decoded = theirs.decode(kept)
        assert isinstance(decoded, str) and decoded.replace(" ", "") == "".join(normal.split()), repr(text)


def test_threads_with_different_lengths_do_not_disturb_each_other(trained: Tokenizer) -> None:
    expected = {length: trained(TEXTS, length) for length in (8, 16, 32)}
    wrong: list[int] = []

    def work(length: int) -> None:
        for _ in range(30):
            if not all(map(np.array_equal, trained(TEXTS, length), expected[length])):
                wrong.append(length)

    threads = [threading.Thread(target=work, args=(length,)) for length in expected for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_pickle(trained: Tokenizer) -> None:
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(trained))(TEXTS, 16)[0], trained(TEXTS, 16)[0])


def test_bad_folders(tmp_path: Path, trained: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"nowhere: no tokenizer; tokenizer.json, or vocab.json and merges.txt"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    half = write_folder(tmp_path / "half", trained, {"vocab.json"})
    with pytest.raises(UserError, match=r"half: no tokenizer"):
        Tokenizer.from_folder(half)
    (half / "tokenizer.json").write_text("{ cut off")
    with pytest.raises(UserError, match=r"half: the tokenizer can't be read .*copy it again"):
        Tokenizer.from_folder(half)
    damaged = write_folder(tmp_path / "damaged", trained, VOCABULARY)
    (damaged / "merges.txt").write_text("three words here\n")
    with pytest.raises(UserError, match=r"damaged: the tokenizer can't be read"):
        Tokenizer.from_folder(damaged)


def test_vocabulary_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="can't be read"):
        Tokenizer.from_folder(tmp_path)


def test_unknown_pad_token(tmp_path: Path, trained: Tokenizer) -> None:
    folder = write_folder(tmp_path, trained, VOCABULARY, tokenizer_config=CLASS | {"pad_token": "<pad>"})
    with pytest.raises(UserError, match=r"no '<pad>'; a CLIP tokenizer is needed"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("using_laptop", "using a laptop"),
        ("calling", "talking on the phone"),
        ("texting", "texting on a phone"),
        ("listening_to_music", "listening to music"),
        ("ApplyEyeMakeup", "apply eye makeup"),
        ("BMXRide", "bmx ride"),
        ("brush_hair", "brush hair"),
        ("push-up__fast", "push up fast"),
        ("TaiChi2", "tai chi2"),
        ("riding a BMX on a MacBook", "riding a BMX on a MacBook"),
        ("  tying  laces ", "tying laces"),
    ],
)
def test_phrase(label: str, words: str) -> None:
    assert phrase(label) == words


def test_har15_labels_are_all_spelled() -> None:
    assert len(HAR15_PHRASES) == 15
    assert len(set(HAR15_PHRASES.values())) == 15
    assert not any("_" in words for words in HAR15_PHRASES.values())


def test_prompts() -> None:
    prompts = make_prompts(
        ["using_laptop", "TaiChi"],
        ["a photo of a person {}.", "{}!"],
        {"TaiChi": ("slow {} movements",)},
        {"TaiChi": "doing tai chi"},
    )
    assert list(prompts) == ["using_laptop", "TaiChi"]
    assert prompts["using_laptop"] == ("a photo of a person using a laptop.", "using a laptop!")
    assert prompts["TaiChi"] == ("a photo of a person doing tai chi.", "doing tai chi!", "slow {} movements")
    assert len(make_prompts(["running"], DEFAULT_TEMPLATES)["running"]) == len(DEFAULT_TEMPLATES)
    assert make_prompts(["a"], [], {"a": ["only this"]}) == {"a": ("only this",)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], ["a photo"]), "'a photo' needs one {}"),
        ((["a"], ["{} and {}"]), "'{} and {}' needs one {}"),
        ((["a"], ["{0}"]), "'{0}' needs one {}"),
        ((["a"], ["{}"], {"b": ["x"]}), "text.descriptions: 'b' is no class of the data; classes: a"),
        ((["a"], ["{}"], {}, {"b": "x"}), "text.phrases: 'b' is no class of the data; classes: a"),
        ((["a", "b"], [], {"b": ["x"]}), "class 'a' has no prompts"),
    ],
)
def test_prompts_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_prompts(*arguments)
    assert message in str(caught.value)


def test_importing_is_light() -> None:
    heavy = "{'jax', 'transformers', 'tokenizers', 'tensorflow', 'grain', 'matplotlib'}"
    code = f"import sys, clip_har_jax.text, clip_har_jax.preprocess; sys.exit(sorted({heavy} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
