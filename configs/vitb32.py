"""OpenAI's ViT-B/32 fine-tuned on HAR-15, both towers, at 224 px.

    python scripts/train.py --config=configs/vitb32.py --workdir=runs/vitb32

Hardware: meant for one GPU of 24 GB or one TPU chip; not measured. Expected result: not measured.

Validation is a tenth of the labelled images of each class, because the set's own test split has no labels.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "data": {"train": "hf:Bingsu/Human_Action_Recognition?split=train", "num_workers": 4},
            "model": {"name": "openai/clip-vit-base-patch32", "compute_dtype": "bfloat16"},
            "train": {"global_batch_size": 256},
            "eval": {"batch_size": 256},
        }
    )
