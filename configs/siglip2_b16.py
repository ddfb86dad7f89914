"""SigLIP 2 B/16 fine-tuned on HAR-15 with the sigmoid loss, both towers, at 224 px.

    python scripts/train.py --config=configs/siglip2_b16.py --workdir=runs/siglip2_b16

Hardware: meant for one GPU of 40 GB or a TPU v5e-4; not measured. Expected result: not measured.

Validation is a tenth of the labelled images of each class, because the set's own test split has no labels.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "data": {"train": "hf:Bingsu/Human_Action_Recognition?split=train", "num_workers": 4},
            "model": {"name": "google/siglip2-base-patch16-224", "compute_dtype": "bfloat16"},
            "method": {"name": "flyp", "loss": "sigmoid"},
            "train": {"global_batch_size": 256},
            "eval": {"batch_size": 256},
        }
    )
