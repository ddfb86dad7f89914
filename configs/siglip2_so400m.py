"""SigLIP 2 So400m/14 fine-tuned on HAR-15 with the sigmoid loss, both towers, at 384 px.

    python scripts/train.py --config=configs/siglip2_so400m.py --workdir=runs/siglip2_so400m

Hardware: meant for one GPU of 80 GB or a TPU v5e-16; not measured. Expected result: not measured.

Validation is a tenth of the labelled images of each class, because the set's own test split has no labels.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "data": {"train": "hf:Bingsu/Human_Action_Recognition?split=train", "num_workers": 4},
            "model": {"name": "google/siglip2-so400m-patch14-384", "compute_dtype": "bfloat16"},
            "method": {"name": "flyp", "loss": "sigmoid"},
        }
    )
