"""Writes tests/golden/siglip*: the outputs of Hugging Face's SiglipModel, for weights and inputs made by a rule.

Run in an environment of transformers 5 with torch, sentencepiece and protobuf (versions.json has the versions of the
last run):

    PYTHONPATH=. python tests/support/make_siglip_golden.py

Nothing of the package is imported here, so the tests compare with transformers alone.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.make_golden import GOLDEN, make_images, make_weight, uniform, write

PROMPTS = ("a person riding a bike.", "Riding_bikes, NOW!", "naïve 😀 bikes", "sleeping " * 30)
VOCAB_SIZE = 1000  # of all cases, so that their weights are made in seconds; a published vocabulary has 32,000 or more


def _case(width: int, inner: int, heads: int, patch: int, image: int, text: int | None = None) -> dict[str, Any]:
    def layer(width: int, inner: int, heads: int) -> dict[str, int]:
        return {
            "hidden_size": width,
            "intermediate_size": inner,
            "num_attention_heads": heads,
            "num_hidden_layers": 1,
        }

    of_text = layer(1152, 4304, 16) if text else layer(width, inner, heads)
    return {
        "model_type": "siglip",
        "text_config": of_text | {"vocab_size": VOCAB_SIZE, "projection_size": width},
        "vision_config": layer(width, inner, heads) | {"patch_size": patch, "image_size": image},
    }


TINY = _case(64, 192, 4, 8, 32)
for tower in ("text_config", "vision_config"):
    TINY[tower]["num_hidden_layers"] = 3
TINY["text_config"] |= {"hidden_size": 32, "max_position_embeddings": 16}
# A tiny one of several layers, and one layer of each size of towers in `models.siglip.SIZES`.
CASES = {
    "tiny": TINY,
    "siglip-base-patch16-224": _case(768, 3072, 12, 16, 224),
    "siglip-large-patch16-256": _case(1024, 4096, 16, 16, 256),
    "siglip-so400m-patch14-384": _case(1152, 4304, 16, 14, 384),
    "siglip2-giant-opt-patch16-256": _case(1536, 6144, 16, 16, 256, text=1152),
}


def make_inputs(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return two images and three texts, padded with the id 1 after 3, half and all tokens."""
    length, size = config["text_config"].get("max_position_embeddings", 64), config["vision_config"]["image_size"]
    ids = np.abs(uniform("input_ids", (3, length)) * 1e6).astype(np.int32) % VOCAB_SIZE
    for row, end in enumerate((3, length // 2, length)):
        ids[row, end:] = 1
    return {"input_ids": ids, "pixel_values": uniform("pixel_values", (2, 3, size, size))}


def model_outputs() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    import torch
    from transformers import SiglipConfig, SiglipModel

    arrays, shapes = {}, {}
    for name, config in CASES.items():
        model = SiglipModel(SiglipConfig(**config)).eval()
        weights = {key: torch.from_numpy(make_weight(key, value.shape)) for key, value in model.state_dict().items()}
        model.load_state_dict(weights)
        shapes[name] = {key: list(value.shape) for key, value in weights.items()}
        with torch.no_grad():
            output = model(**{key: torch.from_numpy(value) for key, value in make_inputs(config).items()})
        for key in ("logits_per_image", "text_embeds", "image_embeds"):
            arrays[f"{name}|{key}"] = output[key].numpy()
    return arrays, shapes


def processed(folder: Path) -> dict[str, np.ndarray]:
    """Write folders of a SigLIP and a SigLIP 2 tokenizer and image processor, and return what these give."""
    import sentencepiece
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import SiglipImageProcessorPil, SiglipTokenizer
    from transformers.models.siglip2.tokenization_siglip2 import Siglip2Tokenizer

    arrays: dict[str, Any] = {}
    texts = [prompt.lower() for prompt in PROMPTS] + ["a photo of a person", "someone is dancing"]
    pieces, gemma = folder / "siglip_tokenizer", folder / "siglip2_tokenizer"
    pieces.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 5), model_prefix=str(pieces / "spiece"), vocab_size=60, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (pieces / "spiece.vocab").unlink()
    SiglipTokenizer(str(pieces / "spiece.model")).save_pretrained(pieces)
    trainer = trainers.BpeTrainer(vocab_size=70, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    learner.train_from_iterator([text.replace(" ", "▁") for text in texts], trainer)
    learned = json.loads(learner.to_str())["model"]
    vocab = learned["vocab"] | {f"<0x{i:02X}>": len(learned["vocab"]) + i for i in range(256)}
    merges: Any = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Siglip2Tokenizer(vocab, merges, padding_side="right")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", vocab["<eos>"])]
    )
    tokenizer.save_pretrained(gemma)
    for kind, resample in ((pieces, 3), (gemma, 2)):
        processor = SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=resample)
        processor.save_pretrained(kind)
        arrays[f"{kind.name}|pixel_values"] = processor(make_images(), return_tensors="np")["pixel_values"]
    for kind, read in ((pieces, SiglipTokenizer), (gemma, Siglip2Tokenizer)):
        ids = read.from_pretrained(kind)(
            list(PROMPTS), padding="max_length", truncation=True, max_length=16, return_tensors="np"
        )
        arrays[f"{kind.name}|input_ids"] = ids["input_ids"].astype(np.int32)
    return arrays


if __name__ == "__main__":
    arrays, shapes = model_outputs()
    (GOLDEN / "siglip_shapes.json").write_text(json.dumps(shapes, indent=1) + "\n")
    write("siglip", arrays | processed(GOLDEN), ("torch", "transformers", "sentencepiece", "tokenizers"))
