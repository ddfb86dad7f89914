"""When actions happen: windows of the embedded untrimmed videos, starting from a model of the actions in clips.

    python scripts/train.py --config=configs/motion.py --workdir=runs/motion
    python scripts/train.py --config=configs/motion_when.py --workdir=runs/when --config.model.name=runs/motion/model
    python scripts/localize.py --model=runs/when/model --train="motion?untrimmed" --data="motion?untrimmed" \\
        --output=runs/when/test

Hardware: 2 CPU cores, 2 minutes. Expected result: top-1 0.794 on windows of the validation videos, and by localize.py
a mean mAP of 0.628 on the test videos (with thresholds instead of the boundary head 0.557).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "data": {
                "train": "motion?untrimmed&split=train",
                "val": "motion?untrimmed&split=val",
                "augment": {"crop_scale_min": 1.0, "flip": False},
                "video": {"sampling": "uniform"},
            },
            "text": {"templates": ("a video of a person {}.",)},
            "model": {"name": "runs/motion/model", "temporal": "divided"},
            "train": {"num_steps": 250, "global_batch_size": 32, "log_every_steps": 50},
            "optim": {"name": "muon", "learning_rate": 2e-3, "weight_decay": 0.05},
            "eval": {"every_steps": 250},
            "checkpoint": {"every_steps": 250},
        }
    )
