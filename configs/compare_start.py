"""The start of configs/compare.py: a small model from random weights, trained on ten of the embedded set's actions.

    python scripts/train.py --config=configs/compare_start.py --workdir=runs/start

Hardware: 2 CPU cores. Expected result: top-1 0.90 on the ten actions' drawings of the test split (chance 0.1).
"""

from ml_collections import ConfigDict

KNOWN = (
    "calling",
    "cycling",
    "drinking",
    "fighting",
    "listening_to_music",
    "running",
    "sitting",
    "sleeping",
    "texting",
    "using_laptop",
)


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "data": {
                "val": "synthetic?split=val",
                "classes": KNOWN,
                "shots": 400,
                "augment": {"crop_scale_min": 1.0},
            },
            "model": {"name": "mini"},
            "train": {"num_steps": 400, "log_every_steps": 50},
            "optim": {"learning_rate": 2e-3},
            "eval": {"every_steps": 200},
        }
    )
