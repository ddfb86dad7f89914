"""Methods compared on the embedded set: a small model that knows ten actions learns five others from few drawings.

    python scripts/train.py --config=configs/compare_start.py --workdir=runs/start
    python scripts/compare.py --config=configs/compare.py --output=runs/compare --test='synthetic?split=test' \
        --methods=zero_shot,linear_probe,full,lp_ft,flyp,lora,prompt,adapter,tip_adapter,bitfit --seeds=0,1,2

Hardware: 2 CPU cores. Expected result: the table in docs/methods.md.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

KNOWN = runpy.run_path(str(Path(__file__).with_name("compare_start.py")))["KNOWN"]
NEW = ("clapping", "dancing", "eating", "hugging", "laughing")


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "data": {
                "val": "synthetic?split=val",
                "classes": NEW,
                "shots": 16,
                "augment": {"crop_scale_min": 1.0},
            },
            "model": {"name": "runs/start/model"},
            "retention": {"data": "synthetic?split=test", "classes": KNOWN, "max_drop": 1.0},
            "train": {"num_steps": 60, "global_batch_size": 40, "log_every_steps": 30},
            "optim": {"learning_rate": 5e-4, "warmup_fraction": 0.1},
            "eval": {"every_steps": 30, "batch_size": 200},
            "checkpoint": {"every_steps": 60},
        }
    )
