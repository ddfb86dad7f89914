"""Settings chosen by the size of the data, printed with their reasons: the values of `configs/finetune.py`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Int

from clip_har_jax.config import make_config
from clip_har_jax.settings import leaves, merge_values, override_key
from clip_har_jax.text import phrase
from clip_har_jax.trainer.run_data import Data, load_data

MAX_SHOTS = 16  # data whose median class has at most this many images is few-shot
MAX_SMALL = 10_000  # data with fewer images is small

PRESETS: dict[str, dict[str, Any]] = {
    "few_shot": {
        "method": {"name": "lora", "label_smoothing": 0.1, "wise_ft": (0.25, 0.5, 0.75, 1.0)},
        "optim": {"learning_rate": 2e-4, "weight_decay": 0.0},
        "train": {"num_epochs": 30.0, "patience": 5},
        "data": {"val_fraction": 0.2, "augment": {"crop_scale_min": 0.5, "randaugment_operations": 1}},
    },
    "small": {
        "method": {"name": "full", "label_smoothing": 0.1, "drop_path": 0.1, "wise_ft": (0.25, 0.5, 0.75, 1.0)},
        "optim": {"learning_rate": 1e-5, "layer_decay": 0.75, "weight_decay": 0.1},
        "train": {"num_epochs": 10.0, "patience": 3},
        "data": {"augment": {"crop_scale_min": 0.6, "randaugment_operations": 2, "erase_probability": 0.25}},
    },
    "large": {
        "method": {"name": "full", "label_smoothing": 0.1, "drop_path": 0.1, "mixup": 0.2, "cutmix": 1.0},
        "optim": {"learning_rate": 3e-5, "layer_decay": 0.8, "weight_decay": 0.1, "ema_decay": 0.999},
        "train": {"num_epochs": 5.0, "patience": 3},
        "data": {"augment": {"crop_scale_min": 0.5, "randaugment_operations": 2}},
    },
}
BATCH_SIZES = {"few_shot": 32, "small": 64, "large": 256}
METHOD_REASONS = {
    "few_shot": "too few images for all weights; low-rank updates leave much of the start",
    "small": "enough to train both towers, not to forget the start: lower layers move less",
    "large": "enough to train both towers; a moving average of the weights is kept",
}
# Name, keys and reason of each printed line.
GROUPS = (
    ("learning", ("method.name", "optim."), ""),
    (
        "overfitting",
        ("method.label_smoothing", "method.drop_path", "method.mixup", "method.cutmix", "data.augment."),
        "",
    ),
    ("forgetting", ("method.wise_ft",), "weights between the start and the trained ones are tried on validation"),
    ("rare classes", ("method.class_balance",), "classes differ more than threefold in size, so rare ones count more"),
    ("held out", ("data.val_fraction",), "of so few images a tenth would say too little"),
    ("batch", ("train.global_batch_size",), "the largest power of two up to {most} with four steps an epoch"),
    ("schedule", ("train.num_epochs", "train.patience"), "validated each epoch; ends early after so many no better"),
)


def choose_values(start: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the config values for the data on the command line, and print them with the reasons.

    Args:
      start: nested values for data of any size, e.g. the model's name.
      overrides: `--config.KEY=VALUE` of the command line. The printed text marks these keys.

    Raises:
      UserError: the data can't be read, as in `load_data`, or an override is wrong.
    """
    config = make_config(start, overrides)
    given = {override_key(override) for override in overrides}
    by_hand = {key: value for key, value in leaves(config) if key in given}
    data = load_data(config)
    name = choose_preset(len(data.classified), float(np.median(_class_counts(data))))
    if (share := PRESETS[name]["data"].get("val_fraction")) and "data.val_fraction" not in given:
        data = load_data(replace(config, data=replace(config.data, val_fraction=share)))
    count, counts = len(data.classified), _class_counts(data)
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
    if counts.max() > 3 * max(counts.min(), 1):
        values = merge_values(values, {"method": {"class_balance": 0.999}})
    reason = {
        "few_shot": f"the median class has {np.median(counts):g} training images, at most {MAX_SHOTS}",
        "small": f"{count} training images, under {MAX_SMALL:,}",
        "large": f"{count} training images, {MAX_SMALL:,} or more",
    }[name]
    print(f"chosen  preset {name!r}: {reason} ({counts.min()} to {counts.max()} a class)")
    for group, keys, why in GROUPS:
        if said := _describe(values, by_hand, keys):
            because = why.format(most=BATCH_SIZES[name])
            if group == "learning" and "method.name" not in given:
                because = METHOD_REASONS[name]
            print(f"        {group + ':':<13} {said}" + (f" ({because})" if because else ""))
    examples = ", ".join(f'{label} as "{config.text.phrases.get(label, phrase(label))}"' for label in data.labels[:3])
    print(f"        {'prompts:':<13} {examples} ... (by their names; text.phrases of a config says them otherwise)")
    print("        each stays as you set it by --config.KEY=VALUE, e.g. --config.method.name=linear_probe", flush=True)
    return merge_values(start, values)


def _class_counts(data: Data) -> Int[np.ndarray, " c"]:
    return data.classified.class_counts


def _describe(values: dict[str, Any], given: dict[str, Any], keys: tuple[str, ...]) -> str:
    """Return the settings of these keys as text; values of the command line replace the preset's."""
    return ", ".join(
        f"{key}={given[key]} (as you set it)" if key in given else f"{key}={value}"
        for key, value in _flat(values)
        if key.startswith(keys)
    )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def choose_preset(num_images: int, median_of_class: float) -> str:
    if median_of_class <= MAX_SHOTS:
        return "few_shot"
    return "small" if num_images < MAX_SMALL else "large"
