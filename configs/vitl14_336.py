"""OpenAI's ViT-L/14@336 fine-tuned on HAR-15, both towers, at 336 px.

    python scripts/train.py --config=configs/vitl14_336.py --workdir=runs/vitl14_336

Hardware: meant for 8 GPUs of 80 GB or a TPU v5e-16; not measured. Expected result: not measured.

Validation is a tenth of the labelled images of each class, because the set's own test split has no labels.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "data": {"train": "hf:Bingsu/Human_Action_Recognition?split=train", "num_workers": 4},
            "model": {"name": "openai/clip-vit-large-patch14-336", "compute_dtype": "bfloat16", "remat": "dots"},
            "mesh": {"strategy": "fsdp"},
            "train": {"global_batch_size": 256},
            "optim": {"learning_rate": 5e-6},
            "eval": {"batch_size": 256},
        }
    )
