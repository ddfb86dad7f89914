"""Settings by the size of the data: what `configs/finetune.py` chooses, and why."""

from typing import Any

import numpy as np

from clip_har_jax.config import RunConfig, merge_values
from clip_har_jax.pipelines.inputs import load_data
from clip_har_jax.text import phrase

MAX_SHOTS = 16  # images of the median class up to which data are few-shot
MAX_SMALL = 10_000  # images below which they are small

PRESETS: dict[str, dict[str, Any]] = {
    # Few images can't tell a million weights anything: train low-rank updates, and keep much of the start.
    "few_shot": {
        "method": {"name": "lora", "label_smoothing": 0.1, "wise_ft": (0.25, 0.5, 0.75, 1.0)},
        "optim": {"learning_rate": 2e-4, "weight_decay": 0.0},
        "train": {"num_epochs": 30.0, "patience": 5},
        "data": {"val_fraction": 0.2, "augment": {"crop_scale_min": 0.5, "randaugment_operations": 1}},
    },
    # Enough to fine-tune, not to forget the start: low layers move least, and weights are interpolated afterwards.
    "small": {
        "method": {"name": "full", "label_smoothing": 0.1, "drop_path": 0.1, "wise_ft": (0.25, 0.5, 0.75, 1.0)},
        "optim": {"learning_rate": 1e-5, "layer_decay": 0.75, "weight_decay": 0.1},
        "train": {"num_epochs": 10.0, "patience": 3},
        "data": {"augment": {"crop_scale_min": 0.6, "randaugment_operations": 2, "erase_probability": 0.25}},
    },
    # So many that regularisation by mixing pays, and an average of the weights is worth its memory.
    "large": {
        "method": {"name": "full", "label_smoothing": 0.1, "drop_path": 0.1, "mixup": 0.2, "cutmix": 1.0},
        "optim": {"learning_rate": 3e-5, "layer_decay": 0.8, "weight_decay": 0.1, "ema_decay": 0.999},
        "train": {"num_epochs": 5.0, "patience": 3},
        "data": {"augment": {"crop_scale_min": 0.5, "randaugment_operations": 2}},
    },
}
BATCH_SIZES = {"few_shot": 32, "small": 64, "large": 256}


def complete(config: RunConfig) -> dict[str, Any]:
    """The settings for the data that a config names; prints them with the reasons. What was set by hand stays so.

    Raises:
      UserError: as `load_data`.
    """
    data = load_data(config)
    count, counts = len(data.train), np.bincount(data.train.label_ids, minlength=len(data.labels))
    name = choose_preset(count, float(np.median(counts)))
    batch_size = 1 << (max(8, min(BATCH_SIZES[name], count // 4)).bit_length() - 1)
    steps_per_epoch = max(1, count // batch_size)
    values = merge_values(
        PRESETS[name],
        {
            "train": {"global_batch_size": batch_size, "log_every_steps": max(1, steps_per_epoch // 5)},
            "eval": {"every_steps": steps_per_epoch, "batch_size": batch_size},
            "checkpoint": {"every_steps": steps_per_epoch},
        },
    )
    reasons = {
        "few_shot": f"the median class has {np.median(counts):g} images, at most {MAX_SHOTS}",
        "small": f"{count} training images, under {MAX_SMALL:,}",
        "large": f"{count} training images, {MAX_SMALL:,} or more",
    }
    if counts.max() > 3 * max(counts.min(), 1):
        values = merge_values(values, {"method": {"class_balance": 0.999}})
        reasons[name] += f"; classes have {counts.min()} to {counts.max()} images, so rare ones count more"
    settings = values["method"] | {"learning_rate": values["optim"]["learning_rate"]} | values["train"]
    said = ", ".join(f'{label} as "{phrase(label)}"' for label in data.labels[:3])
    print(f"chosen  preset {name!r}: {reasons[name]}")
    print(f"        {', '.join(f'{key}={value}' for key, value in settings.items())}")
    print(f"        {len(data.labels)} classes, said as their names: {said} ...; change it by config.text.phrases")
    print("        any of it changes by --config.KEY=VALUE", flush=True)
    return values


def choose_preset(num_images: int, median_of_class: float) -> str:
    if median_of_class <= MAX_SHOTS:
        return "few_shot"
    return "small" if num_images < MAX_SMALL else "large"
