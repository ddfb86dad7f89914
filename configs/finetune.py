"""Fine-tuning on your own images in one command: settings by their number, printed with the reasons.

    python scripts/train.py --config=configs/finetune.py --workdir=runs/mine --config.data.train=folder:my_images

Starts from OpenAI's ViT-B/32; --config.model.name sets another name or folder. Keys set by --config.KEY=VALUE are kept.
Guide: docs/own-data.md.

Hardware: a GPU for thousands of images; CPU cores suffice for a few hundred. Expected result: depends on the images.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from clip_har_jax.pipelines.presets import choose_values


def get_config(overrides: Sequence[str] = ()) -> ConfigDict:
    return ConfigDict(choose_values({"model": {"name": "openai/clip-vit-base-patch32"}}, overrides))
