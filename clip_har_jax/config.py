"""RunConfig: every setting of a run, with its default, accepted values and resume policy.

Fields are declared as `setting(default, accepted values, policy when a run is continued)`; see `settings.py`. A config
file defines `get_config()`, which returns an `ml_collections.ConfigDict` with the values that differ from the defaults.
The command line adds `--config.KEY=VALUE`. Unknown keys, wrong types and values out of range are refused.
"""

import dataclasses
import inspect
import json
import runpy
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_har_jax.errors import UserError
from clip_har_jax.files import sha256
from clip_har_jax.settings import (
    ANYTHING,
    FREE,
    NOT_NEGATIVE,
    POSITIVE,
    REFUSED,
    SHARE,
    WARNED,
    Range,
    apply_overrides,
    build,
    check_values,
    one_of,
    setting,
)
from clip_har_jax.text import DEFAULT_TEMPLATES

TRACKERS = ("tensorboard", "mlflow", "wandb")
MAX_MAGNITUDE = 30.0  # of RandAugment, as in the paper (Cubuk et al. 2020)
REMAT = ("none", "dots", "full")
OPTIMIZERS = ("adamw", "lion", "muon", "adafactor", "schedule_free_adamw")
SCHEDULES = ("cosine", "wsd", "constant")
TEMPORAL = ("mean", "head", "st_adapter", "divided")


@dataclass(frozen=True)
class AugmentConfig:
    # A random resized crop keeps at least this share of the image's area; 1.0: no crop.
    crop_scale_min: float = setting(0.6, SHARE, WARNED)
    flip: bool = setting(True, ANYTHING, WARNED)  # mirror half of the images; turn off where left and right matter
    no_flip_labels: tuple[str, ...] = setting((), ANYTHING, WARNED)  # classes whose images are never mirrored
    randaugment_operations: int = setting(0, NOT_NEGATIVE, WARNED)  # random operations on each image; 0: none
    randaugment_magnitude: float = setting(9.0, Range(at_least=0.0, at_most=MAX_MAGNITUDE), WARNED)  # their strength
    color_jitter: float = setting(0.0, SHARE, WARNED)  # largest relative change of brightness, contrast, saturation
    erase_probability: float = setting(0.0, SHARE, WARNED)  # probability that a random box becomes noise


@dataclass(frozen=True)
class VideoConfig:
    num_frames: int = setting(8, POSITIVE, REFUSED)  # frames of a clip that the model sees together
    # uniform; tsn: uniform, with random shifts while training; dense: consecutive frames of one part of the clip
    sampling: str = setting("tsn", one_of("uniform", "tsn", "dense"), REFUSED)
    rate_hz: float = setting(4.0, POSITIVE, REFUSED)  # frames a second of dense sampling
    num_views: int = setting(1, POSITIVE, REFUSED)  # samples of a clip outside training; their answers are averaged


@dataclass(frozen=True)
class DataConfig:
    train: str = setting("synthetic?split=train", ANYTHING, REFUSED)  # SPEC of the training data
    val: str = setting("", ANYTHING, REFUSED)  # SPEC of the validation data; empty: val_fraction of the training data
    val_fraction: float = setting(0.1, SHARE, REFUSED)
    split_seed: int = setting(0, NOT_NEGATIVE, REFUSED)  # of the held-out split; not `seed`, to keep runs comparable
    shots: int | None = setting(None, POSITIVE, REFUSED)  # random training images of each class; None: all
    labels: tuple[str, ...] = setting((), ANYTHING, REFUSED)  # classes and their order; empty: as in the training data
    classes: tuple[str, ...] = setting((), ANYTHING, REFUSED)  # use only these classes of the data; empty: all
    multi_label: bool = setting(False, ANYTHING, REFUSED)  # an image has any number of labels, not exactly one
    max_bad_fraction: float = setting(0.01, SHARE, FREE)  # a larger share of unreadable images ends the run
    max_megapixels: float = setting(50.0, POSITIVE, FREE)  # larger images are refused before decoding
    # Decoding threads of a process. None: one per core, at most 8; with worker processes one in each.
    num_threads: int | None = setting(None, POSITIVE, FREE)
    num_workers: int | None = setting(None, NOT_NEGATIVE, FREE)  # decoding processes; 0: threads alone; None: by cores
    prefetch_batches: int = setting(4, POSITIVE, FREE)  # decoded batches kept in host memory; at least two per worker
    # How examples are drawn in an epoch; `weights` are read from a manifest.
    sampling: str = setting("shuffle", one_of("shuffle", "class_balanced", "repeat_factor", "weights"), REFUSED)
    shuffle_buffer: int = setting(1000, POSITIVE, REFUSED)  # image-text pairs that a stream shuffles together
    # Streams of pairs in the whole run, each with its own shards and rows of a batch. None: up to 8 for each process.
    num_streams: int | None = setting(None, POSITIVE, REFUSED)
    retrieval: str = setting("", ANYTHING, FREE)  # SPEC of pairs; recall on them at the end of a training; empty: none
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    video: VideoConfig = field(default_factory=VideoConfig)


@dataclass(frozen=True)
class PromptConfig:
    templates: tuple[str, ...] = setting(DEFAULT_TEMPLATES, ANYTHING, REFUSED)  # {} is replaced by the class's phrase
    descriptions: dict[str, tuple[str, ...]] = setting({}, ANYTHING, REFUSED)  # more prompts of a class, used verbatim
    phrases: dict[str, str] = setting({}, ANYTHING, REFUSED)  # phrase of a label, where the default is wrong


@dataclass(frozen=True)
class ModelConfig:
    name: str = setting("tiny", ANYTHING, REFUSED)  # a named size (random weights), a Hub name, or a model folder
    image_size_px: int | None = setting(None, POSITIVE, REFUSED)  # None: the model's own; else interpolate positions
    compute_dtype: str = setting("float32", one_of("float32", "bfloat16"), WARNED)  # parameters are always float32
    remat: str = setting("none", one_of(*REMAT), FREE)  # activations to recompute in the backward pass
    temporal: str = setting("mean", one_of(*TEMPORAL), REFUSED)  # how the frames of a clip are combined
    attention: str = setting("auto", one_of("auto", "xla", "cudnn"), FREE)  # cudnn: flash attention on GPUs, bfloat16


@dataclass(frozen=True)
class MethodConfig:
    name: str = setting("full", ANYTHING, REFUSED)  # fine-tuning method, a key of training.recipes.METHODS
    towers: str = setting("both", one_of("image", "text", "both"), REFUSED)  # the trainable towers
    head: str = setting("", ANYTHING, REFUSED)  # cosine, linear, mlp, cross_attention ...; empty: the method's own
    loss: str = setting("", ANYTHING, REFUSED)  # a name in docs/methods.md; empty: the method's own
    freeze: tuple[str, ...] = setting((), ANYTHING, REFUSED)  # patterns of frozen parameters: vision.layers.[0-5].*
    label_smoothing: float = setting(0.0, SHARE, WARNED)
    focal_gamma: float = setting(0.0, NOT_NEGATIVE, REFUSED)  # weight of an example's loss: (1 - p)^gamma; 0: none
    # Of the loss `asymmetric`: exponents for present and absent labels, and the probability below which these are free.
    asymmetric_gamma_pos: float = setting(0.0, NOT_NEGATIVE, REFUSED)
    asymmetric_gamma_neg: float = setting(4.0, NOT_NEGATIVE, REFUSED)
    asymmetric_margin: float = setting(0.05, SHARE, REFUSED)
    class_balance: float = setting(0.0, SHARE, REFUSED)  # 0.99 to 0.9999: rare classes weigh more; 0: no weights
    mixup: float = setting(0.0, NOT_NEGATIVE, REFUSED)  # mix two images, with weights from Beta(mixup, mixup); 0: never
    cutmix: float = setting(0.0, NOT_NEGATIVE, REFUSED)  # paste a box of another image, its area from Beta; 0: never
    drop_path: float = setting(0.0, SHARE, REFUSED)  # stochastic depth: rate of the last layer; lower ones less
    lora_rank: int = setting(16, POSITIVE, REFUSED)
    lora_alpha: float = setting(16.0, POSITIVE, REFUSED)  # updates are scaled by alpha / rank
    # Patterns of the layers that get low-rank updates.
    lora_targets: tuple[str, ...] = setting(("*.attention.query", "*.attention.value"), ANYTHING, REFUSED)
    prompt_length: int = setting(5, POSITIVE, REFUSED)  # learned vectors before each class's name
    prompt_init: str = setting("a photo of a person", ANYTHING, REFUSED)  # words that initialise the learned vectors
    prompt_per_class: bool = setting(False, ANYTHING, REFUSED)  # separate vectors for each class instead of shared ones
    solver: str = setting("lbfgs", one_of("lbfgs", "adamw"), REFUSED)  # of a linear probe
    cache_per_class: int = setting(16, POSITIVE, REFUSED)  # training images of each class in a Tip-Adapter's cache
    # WiSE-FT: weights of the fine-tuned model to try beside 1; 0 is the zero-shot model; empty: none.
    wise_ft: tuple[float, ...] = setting((), SHARE, FREE)


@dataclass(frozen=True)
class MeshConfig:
    # Places all devices on its axis or axes.
    strategy: str = setting("dp", one_of("dp", "fsdp", "tp", "fsdp_tp"), FREE)
    data: int | None = setting(None, POSITIVE, FREE)  # devices on each axis; a set value overrides the strategy
    fsdp: int | None = setting(None, POSITIVE, FREE)
    tensor: int | None = setting(None, POSITIVE, FREE)


@dataclass(frozen=True)
class RetentionConfig:
    data: str = setting("", ANYTHING, REFUSED)  # SPEC; zero-shot accuracy before and after training; empty: unmeasured
    classes: tuple[str, ...] = setting((), ANYTHING, REFUSED)  # classes of that data to use; empty: all
    max_drop: float = setting(0.05, SHARE, FREE)  # largest accepted drop of top-1; a larger one is reported
    fail: bool = setting(False, ANYTHING, FREE)  # end with exit code 3 and no model after a larger drop


@dataclass(frozen=True)
class TrainConfig:
    num_epochs: float = setting(10.0, POSITIVE, WARNED)
    num_steps: int | None = setting(None, POSITIVE, WARNED)  # overrides num_epochs
    global_batch_size: int = setting(64, POSITIVE, REFUSED)  # over all devices of all hosts
    accumulation_steps: int = setting(1, POSITIVE, FREE)  # parts of a batch, computed in turn to save memory
    max_skipped_steps: int = setting(10, POSITIVE, FREE)  # end the run after more consecutive non-finite updates
    log_every_steps: int = setting(10, POSITIVE, FREE)
    # Evaluations without a better val/top1, or val/map of multi-label data, before a stop; 0: none.
    patience: int = setting(0, NOT_NEGATIVE, FREE)


@dataclass(frozen=True)
class OptimConfig:
    name: str = setting("adamw", one_of(*OPTIMIZERS), REFUSED)
    schedule: str = setting("cosine", one_of(*SCHEDULES), WARNED)  # after the warm-up; wsd: constant, then linear to 0
    decay_fraction: float = setting(0.2, SHARE, WARNED)  # share of the steps after the warm-up in which wsd falls
    learning_rate: float = setting(1e-5, POSITIVE, WARNED)  # peak
    warmup_fraction: float = setting(0.05, SHARE, WARNED)  # share of the steps of linear warm-up, before `schedule`
    weight_decay: float = setting(0.1, NOT_NEGATIVE, WARNED)  # of matrices; not biases, norms, embeddings, logit scale
    b1: float = setting(0.9, SHARE, WARNED)
    b2: float = setting(0.98, SHARE, WARNED)
    eps: float = setting(1e-6, POSITIVE, WARNED)
    clip_norm: float = setting(1.0, POSITIVE, WARNED)  # largest norm of the gradient over all parameters
    # Learning rate of a layer divided by that of the layer above it; 1.0: the same for all.
    layer_decay: float = setting(1.0, Range(above=0.0, at_most=1.0), WARNED)
    ema_decay: float = setting(0.0, SHARE, REFUSED)  # of averaged weights, which are evaluated and saved; 0: none


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = setting(500, POSITIVE, FREE)
    keep_latest: int = setting(2, POSITIVE, FREE)
    keep_best: int = setting(1, NOT_NEGATIVE, FREE)  # by val/top1; multi-label: val/map
    allow_new_batch_size: bool = setting(False, ANYTHING, FREE)  # continue a run with another train.global_batch_size


@dataclass(frozen=True)
class EvalConfig:
    every_steps: int = setting(500, POSITIVE, FREE)
    batch_size: int = setting(64, POSITIVE, FREE)


@dataclass(frozen=True)
class RunConfig:
    data: DataConfig = field(default_factory=DataConfig)
    text: PromptConfig = field(default_factory=PromptConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    trackers: tuple[str, ...] = setting((), one_of(*TRACKERS), FREE)  # metrics.jsonl is always written as well
    seed: int = setting(0, NOT_NEGATIVE, REFUSED)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def digest(self) -> str:
        """SHA-256 of the values, independent of the file that they came from."""
        return sha256(json.dumps(self.to_dict(), sort_keys=True))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file and the `--config.KEY=VALUE` overrides of a command line.

    The file's `get_config` takes no argument, or the overrides if its values depend on them.

    >>> config = load_config("configs/demo.py", ["--config.train.num_steps=10"])
    >>> config.train.num_steps
    10

    Raises:
      UserError: no such file, no `get_config` in it, an unknown key, or a value of the wrong type or out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--config={path}: no such file; configs/ holds the ready ones")
    with _mistakes_in(path):
        defined = runpy.run_path(str(path))
    if "get_config" not in defined:
        raise UserError(f"--config={path}: defines no get_config()")
    get_config = defined["get_config"]
    with _mistakes_in(path):
        given = get_config(overrides) if inspect.signature(get_config).parameters else get_config()
        values = given if isinstance(given, dict) else given.to_dict()
    return make_config(values, overrides)


def refuse_multi_label(config: RunConfig, command: str) -> None:
    """Refuse multi-label data in a command that judges models by top-1 accuracy.

    Raises:
      UserError: `config.data.multi_label` is set.
    """
    if config.data.multi_label:
        raise UserError(
            f"config.data.multi_label: {command} judges models by top-1 accuracy, which images with several labels "
            "don't have; use train.py and evaluate.py"
        )


@contextmanager
def _mistakes_in(path: Path) -> Iterator[None]:
    """Turn an exception in a config file's code into a `UserError` that names the file and the line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
        where = f"--config={path}" + (f", line {line}" if line else "")
        said = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
        raise UserError(f"{where}: {type(error).__name__}: {said}") from error


def make_config(values: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the defaults, changed by nested `values` and then by `--config.KEY=VALUE` overrides; checked.

    >>> make_config({"optim": {"learning_rate": 1e-4}}, ["--config.seed=3"]).seed
    3

    Raises:
      UserError: an unknown key, a value of the wrong type or out of range.
    """
    config = build(RunConfig, values or {})
    if overrides:
        config = build(RunConfig, apply_overrides(config, overrides))
    names = tuple(name.strip() for item in config.trackers for name in item.split(",") if name.strip())
    config = dataclasses.replace(config, trackers=tuple(dict.fromkeys(names)))  # a flag's mlflow,wandb
    check_values(config)
    return config
