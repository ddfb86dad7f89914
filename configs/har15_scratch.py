"""Real photographs, a small CLIP from random weights: from a CSV to a model without pretrained weights.

    python scripts/train.py --config=configs/har15_scratch.py --workdir=runs/scratch \
        --config.data.train=csv:har15/train.csv --config.data.val=csv:har15/test.csv

Hardware: 2 CPU cores. Expected result: top-1 0.183 on 240 photographs after training on 600 (chance 0.067).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "data": {"train": "csv:har15/train.csv", "augment": {"crop_scale_min": 0.4}},
            "train": {"num_epochs": 60.0, "global_batch_size": 32},
            "optim": {"learning_rate": 5e-4, "weight_decay": 0.2},
            "method": {"label_smoothing": 0.1},
            "eval": {"every_steps": 200},
            "checkpoint": {"every_steps": 200},
        }
    )
