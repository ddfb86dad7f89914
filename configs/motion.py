"""Clips of the embedded motion set, which a single frame can't tell apart: a temporal model from random weights.

    python scripts/train.py --config=configs/motion.py --workdir=runs/motion

Hardware: 2 CPU cores. Expected result: top-1 0.802 on the 480 validation clips after 700 of the 1,500 steps (chance
0.063; the best without the order of frames is 0.5).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "data": {
                "train": "motion",
                "val": "motion?split=val",
                "augment": {"crop_scale_min": 1.0, "flip": False},
                "video": {"sampling": "uniform"},
            },
            "text": {"templates": ("a video of a person {}.",)},
            "model": {"name": "mini", "temporal": "divided"},
            "train": {"num_steps": 750, "global_batch_size": 32, "log_every_steps": 50},
            "optim": {"learning_rate": 2e-3, "weight_decay": 0.05},
            "eval": {"every_steps": 250},
            "checkpoint": {"every_steps": 250},
        }
    )
