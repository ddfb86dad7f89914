"""LAION-2B's ViT-B/32 of open_clip fine-tuned on HAR-15, both towers, at 224 px.

    python scripts/train.py --config=configs/openclip_b32.py --workdir=runs/openclip_b32

--config.model.name may also name a folder with open_clip_config.json and open_clip_model.safetensors.

Hardware: meant for one GPU of 24 GB or a TPU v5e-4; not measured. Expected result: not measured.

Validation is a tenth of the labelled images of each class, because the set's own test split has no labels.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "data": {"train": "hf:Bingsu/Human_Action_Recognition?split=train", "num_workers": 4},
            "model": {"name": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "compute_dtype": "bfloat16"},
            "train": {"global_batch_size": 512},
            "eval": {"batch_size": 256},
        }
    )
