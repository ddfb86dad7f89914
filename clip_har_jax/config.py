"""RunConfig: every default of a run, held once.

A config file gives `get_config()`, an `ml_collections.ConfigDict` with only what differs; the command line adds
`--config.KEY=VALUE`. Both are checked against the dataclasses here: an unknown key or a wrong type is refused.
"""

import dataclasses
import json
import runpy
import traceback
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_har_jax.errors import UserError, nearest
from clip_har_jax.files import sha256
from clip_har_jax.text import DEFAULT_TEMPLATES


@dataclass(frozen=True)
class AugmentConfig:
    crop_scale_min: float = 0.6  # smallest share of the image's area that a random resized crop keeps; 1.0: no crop
    flip: bool = True  # mirror half of the images; off where left and right matter
    no_flip_labels: tuple[str, ...] = ()  # classes that are never mirrored, where left and right matter for them alone
    randaugment_operations: int = 0  # random operations on each image (RandAugment); 0: none
    randaugment_magnitude: float = 9.0  # their strength, 0 to 30
    color_jitter: float = 0.0  # brightness, contrast and saturation change by up to this share
    erase_probability: float = 0.0  # share of the images of which a random part becomes noise


@dataclass(frozen=True)
class VideoConfig:
    num_frames: int = 8  # frames of a clip that the model sees together
    sampling: str = "tsn"  # uniform, tsn (uniform, jittered while training) or dense (a stretch of the clip)
    rate_hz: float = 4.0  # frames a second of dense sampling
    num_views: int = 1  # how often a clip is sampled when it isn't trained on; the answers are averaged


@dataclass(frozen=True)
class DataConfig:
    train: str = "synthetic?split=train"  # SPEC of the training data
    val: str = ""  # SPEC of the validation data; empty: hold out val_fraction of the training data
    val_fraction: float = 0.1
    split_seed: int = 0  # of what is held out; the same for all seeds, so that runs can be compared
    shots: int | None = None  # training images of each class that are used, drawn by the seed; None: all
    labels: tuple[str, ...] = ()  # the classes and their order; empty: those of the training data
    classes: tuple[str, ...] = ()  # only these classes of the data; empty: all
    max_bad_fraction: float = 0.01  # share of unreadable images above which the run ends
    max_megapixels: float = 50.0  # larger images are refused before decoding
    num_threads: int | None = None  # decoding threads of a process; None: one a core, at most 8; of a worker 1
    num_workers: int | None = None  # decoding processes; 0: decode in threads of the trainer; None: by the cores
    prefetch_batches: int = 4  # decoded batches that wait in host memory; with worker processes two of each at least
    sampling: str = "shuffle"  # or class_balanced, repeat_factor, weights (of a manifest): how often an example comes
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    video: VideoConfig = field(default_factory=VideoConfig)


@dataclass(frozen=True)
class TextConfig:
    templates: tuple[str, ...] = DEFAULT_TEMPLATES  # each holds {}, filled with the class's phrase
    descriptions: dict[str, tuple[str, ...]] = field(default_factory=dict)  # further prompts of a class, verbatim
    phrases: dict[str, str] = field(default_factory=dict)  # how a label is said, where the default is wrong


@dataclass(frozen=True)
class ModelConfig:
    name: str = "tiny"  # a named size (random start), a Hub name, or a model folder
    image_size_px: int | None = None  # position embeddings are interpolated to it; None: the model's own
    compute_dtype: str = "float32"  # or bfloat16; parameters are float32 always
    remat: str = "none"  # none, dots or full: what the backward pass computes again
    attention: str = "auto"  # auto, xla or cudnn (flash attention, on GPUs in bfloat16)


@dataclass(frozen=True)
class MethodConfig:
    name: str = "full"  # how the model is fine-tuned
    towers: str = "both"  # image, text or both: what is trainable
    head: str = ""  # cosine, linear, mlp, cross_attention ...; empty: the method's own
    loss: str = ""  # cross_entropy, class_aware, softmax or sigmoid; empty: the method's own
    freeze: tuple[str, ...] = ()  # patterns of parameter names that stay as they are, e.g. vision.layers.[0-5].*
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0  # examples that are found with probability p count (1 - p)^gamma; 0: all alike
    class_balance: float = 0.0  # 0.99 to 0.9999: rare classes count more; 0: all examples alike
    mixup: float = 0.0  # images are mixed by a share of Beta(mixup, mixup); 0: never
    cutmix: float = 0.0  # boxes of other images are pasted in, their area as above; 0: never
    drop_path: float = 0.0  # probability that an image passes by the last layer, less below (stochastic depth)
    lora_rank: int = 16
    lora_alpha: float = 16.0  # updates count alpha / rank times
    lora_targets: tuple[str, ...] = ("*.attention.query", "*.attention.value")  # patterns of layer names
    prompt_length: int = 5  # learned vectors before each class's name
    prompt_init: str = "a photo of a person"  # the words that the first of them start from; the rest are random
    prompt_per_class: bool = False  # vectors for each class instead of the same for all
    solver: str = "lbfgs"  # or adamw: what fits a linear probe
    cache_per_class: int = 16  # training images of each class that a Tip-Adapter remembers
    wise_ft: tuple[float, ...] = ()  # alphas to try beside 1, the fine-tuned weights; 0 is the start; empty: none


@dataclass(frozen=True)
class MeshConfig:
    strategy: str = "dp"  # dp, fsdp, tp or fsdp_tp: puts all devices on its axis or axes
    data: int | None = None  # devices on each axis; set explicitly, they override the strategy's shape
    fsdp: int | None = None
    tensor: int | None = None


@dataclass(frozen=True)
class RetentionConfig:
    data: str = ""  # SPEC whose zero-shot accuracy is compared before and after training; empty: no gate
    classes: tuple[str, ...] = ()  # of that data; empty: all
    max_drop: float = 0.05  # of top-1; more is reported
    fail: bool = False  # more ends the run with exit code 3 and no model


@dataclass(frozen=True)
class TrainConfig:
    num_epochs: float = 10.0
    num_steps: int | None = None  # overrides num_epochs
    global_batch_size: int = 64  # over all devices of all hosts
    accumulation_steps: int = 1  # parts of a batch that are computed one after the other, to save memory
    max_skipped_steps: int = 10  # updates in a row that may be skipped for not being finite; one more ends the run
    log_every_steps: int = 10
    patience: int = 0  # evaluations without a better val/top1 after which the run is done; 0: never before its end


@dataclass(frozen=True)
class OptimConfig:
    learning_rate: float = 1e-5  # peak
    warmup_fraction: float = 0.05  # share of the steps with a linearly growing rate; then cosine to 0
    weight_decay: float = 0.1  # on matrices; never on biases, norms, embeddings or the logit scale
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    clip_norm: float = 1.0  # of the gradient over all parameters
    layer_decay: float = 1.0  # a layer's rate is this times that of the layer above it; 1.0: the same for all
    ema_decay: float = 0.0  # of the moving average of the weights, which is then evaluated and kept; 0: none


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 500
    keep_latest: int = 2
    keep_best: int = 1  # by val/top1
    allow_new_batch_size: bool = False  # continue a run with another train.global_batch_size


@dataclass(frozen=True)
class EvalConfig:
    every_steps: int = 500
    batch_size: int = 64


@dataclass(frozen=True)
class RunConfig:
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    trackers: tuple[str, ...] = ()  # tensorboard, mlflow, wandb, any of them together; metrics.jsonl is always written
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def digest(self) -> str:
        """SHA-256 of the values, independent of the file that gave them."""
        return sha256(json.dumps(self.to_dict(), sort_keys=True))


TRACKERS = ("tensorboard", "mlflow", "wandb")
MAX_MAGNITUDE = 30  # of RandAugment: the paper's scale
CHOICES = {
    "data.video.sampling": ("uniform", "tsn", "dense"),
    "data.sampling": ("shuffle", "class_balanced", "repeat_factor", "weights"),
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "model.attention": ("auto", "xla", "cudnn"),
    "method.towers": ("image", "text", "both"),
    "method.solver": ("lbfgs", "adamw"),
    "mesh.strategy": ("dp", "fsdp", "tp", "fsdp_tp"),
}
POSITIVE = (
    "data.video.num_frames data.video.rate_hz data.video.num_views "
    "data.shots method.lora_rank method.lora_alpha method.prompt_length method.cache_per_class "
    "data.max_megapixels data.num_threads data.prefetch_batches model.image_size_px train.num_epochs train.num_steps "
    "train.global_batch_size train.accumulation_steps train.max_skipped_steps train.log_every_steps "
    "optim.learning_rate optim.eps optim.clip_norm optim.layer_decay mesh.data mesh.fsdp mesh.tensor "
    "checkpoint.every_steps checkpoint.keep_latest eval.every_steps eval.batch_size"
).split()
NOT_NEGATIVE = (
    "data.num_workers data.augment.randaugment_operations data.augment.randaugment_magnitude optim.weight_decay "
    "method.focal_gamma method.mixup method.cutmix train.patience data.split_seed checkpoint.keep_best seed"
).split()
FRACTIONS = (
    "data.val_fraction data.max_bad_fraction data.augment.crop_scale_min data.augment.color_jitter "
    "data.augment.erase_probability method.label_smoothing method.class_balance method.drop_path retention.max_drop "
    "optim.warmup_fraction optim.b1 optim.b2 optim.layer_decay optim.ema_decay"
).split()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file and the `--config.KEY=VALUE` overrides of a command line.

    A file may also define `complete(config, given)`, which gives further values by what the command line says; the keys
    that it sets, `given`, stay as they are.

    Raises:
      UserError: no such file, no `get_config` in it, an unknown key, a value of the wrong type or out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--config={path}: no such file; configs/ holds the ready ones")
    with _mistakes_in(path):
        defined = runpy.run_path(str(path))
    if "get_config" not in defined:
        raise UserError(f"--config={path}: defines no get_config()")
    with _mistakes_in(path):
        given = defined["get_config"]()
        values = given if isinstance(given, dict) else given.to_dict()
    config = make_config(values, overrides)
    if "complete" in defined:
        given = frozenset(_key_of(override) for override in overrides)
        config = make_config(merge_values(values, defined["complete"](config, given)), overrides)
    return config


@contextmanager
def _mistakes_in(path: Path) -> Iterator[None]:
    """What a config file raises is a mistake of who wrote it: one line, with the number of the file's line."""
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


def merge_values(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both, level by level; of one key the second's value counts."""
    merged = dict(first)
    for key, value in second.items():
        merged[key] = merge_values(merged.get(key, {}), value) if isinstance(value, Mapping) else value
    return merged


def make_config(values: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the defaults, changed by nested `values`, then by `--config.KEY=VALUE` overrides; checked.

    Raises:
      UserError: an unknown key, a value of the wrong type or out of range.
    """
    config = _build(RunConfig, values or {}, "")
    if overrides:
        config = _build(RunConfig, _apply_overrides(config, overrides), "")
    names = tuple(name.strip() for item in config.trackers for name in item.split(",") if name.strip())
    config = dataclasses.replace(config, trackers=tuple(dict.fromkeys(names)))  # a command line says mlflow,wandb
    _check_ranges(config)
    return config


def _apply_overrides(config: RunConfig, overrides: Sequence[str]) -> dict[str, Any]:
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    flat = dict(leaves(config))
    for override in overrides:
        _check_key(_key_of(override), flat)
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = _placeholder(key) if value is None else value
    argv = ["", *overrides]
    flag_values = flags.FlagValues()
    holder = config_flags.DEFINE_config_dict("config", ConfigDict(tree), flag_values=flag_values, sys_argv=argv)
    try:
        flag_values(argv)
    except (flags.Error, ValueError, TypeError) as error:
        said = " ".join(str(error).split())
        named = said.startswith("flag --")  # absl says which
        raise UserError(said.removeprefix("flag ") if named else f"{' '.join(overrides)}: {said}") from error
    return holder.value.to_dict()


def _key_of(override: str) -> str:
    return override.lstrip("-").split("=", 1)[0].removeprefix("config.")


def _placeholder(key: str) -> Any:
    from ml_collections import config_dict

    hint: Any = RunConfig
    for name in key.split("."):
        hint = typing.get_type_hints(hint)[name]
    return config_dict.placeholder(typing.get_args(hint)[0])


def _check_key(key: str, flat: Mapping[str, Any]) -> None:
    if key not in flat:
        last = {name.rsplit(".", 1)[-1]: name for name in flat}
        hint = nearest(key, list(flat))
        if "did you mean" not in hint:  # the section may be what was forgotten: learning_rate, not optim.learning_rate
            name = key.rsplit(".", 1)[-1]
            hint = f"did you mean {last[name]!r}?" if name in last else hint
        raise UserError(f"--config.{key}: unknown key; {hint}")


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every setting of a config dataclass."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"config key {prefix + str(name)!r} is unknown; {nearest(str(name), list(hints))}")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise UserError(f"config key {prefix + name!r} holds keys of its own, not {value!r}")
            arguments[name] = _build(typing.cast(type, hints[name]), value, f"{prefix}{name}.")
        else:
            arguments[name] = _typed(value, hints[name], prefix + name)
    return cls(**arguments)


def _typed(value: Any, hint: Any, key: str) -> Any:
    """`value` as `hint` says; an int serves as a float, a list as a tuple; nothing else is converted."""
    wrong = UserError(f"config key {key!r} takes {getattr(hint, '__name__', hint)}, not {value!r}")
    if isinstance(hint, types.UnionType):
        inner = next(arm for arm in typing.get_args(hint) if arm is not type(None))
        return None if value is None else _typed(value, inner, key)
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise wrong
        return tuple(_typed(item, typing.get_args(hint)[0], key) for item in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise wrong
        return {str(name): _typed(item, typing.get_args(hint)[1], f"{key}.{name}") for name, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:  # a bool is an int to isinstance
        raise wrong
    return value


def _check_ranges(config: RunConfig) -> None:
    values = dict(leaves(config))
    for key, accepted in CHOICES.items():
        if values[key] not in accepted:
            raise UserError(f"config key {key!r} is {values[key]!r}; {nearest(values[key], list(accepted))}")
    for name in config.trackers:
        if name not in TRACKERS:
            raise UserError(f"config key 'trackers' holds {name!r}; {nearest(name, list(TRACKERS))}")
    for key in POSITIVE:
        if values[key] is not None and not values[key] > 0:
            raise UserError(f"config key {key!r} must be above 0, not {values[key]!r}")
    if config.data.augment.randaugment_magnitude > MAX_MAGNITUDE:
        raise UserError(
            f"config key 'data.augment.randaugment_magnitude' is at most {MAX_MAGNITUDE}, not "
            f"{config.data.augment.randaugment_magnitude!r}"
        )
    for key in NOT_NEGATIVE:
        if values[key] is not None and values[key] < 0:
            raise UserError(f"config key {key!r} must be 0 or more, not {values[key]!r}")
    for alpha in config.method.wise_ft:
        if not 0 <= alpha <= 1:
            raise UserError(f"config key 'method.wise_ft' holds {alpha!r}; alphas are from 0 (the start) to 1")
    for key in FRACTIONS:
        if not 0 <= values[key] <= 1:
            raise UserError(f"config key {key!r} is a share, 0 to 1, not {values[key]!r}")
