"""The computations of a run on a mesh: its trainable parameters, their shardings, and the jitted steps.

Making a program places no arrays and compiles nothing, so a planner can use it for a machine that isn't present.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from clip_har_jax.batch import Batch, PairBatch
from clip_har_jax.config import RunConfig
from clip_har_jax.errors import UserError
from clip_har_jax.models.configuration import TwoTowerConfig
from clip_har_jax.models.flops import step_flops
from clip_har_jax.models.layers import Runtime
from clip_har_jax.models.params import Params, abstract_model, axis_names, flat_params
from clip_har_jax.models.temporal import is_temporal
from clip_har_jax.parallel.sharding import (
    batch_sharding,
    check_batch_size,
    num_row_shards,
    param_shardings,
    put_global,
    replicated,
)
from clip_har_jax.preprocess import Preprocess
from clip_har_jax.training.losses import balanced_weights
from clip_har_jax.training.methods import ClassInputs, Method
from clip_har_jax.training.optim import evaluated_weights, freeze_masks, make_optimizer, make_schedule
from clip_har_jax.training.recipes import PAIR_LOSSES
from clip_har_jax.training.state import TrainState, make_state, state_shardings
from clip_har_jax.training.step_config import StepConfig, step_config
from clip_har_jax.training.steps import (
    make_caption_step,
    make_class_step,
    make_eval_step,
    make_feature_step,
    make_text_step,
    make_train_step,
)

# Programs that a process keeps for its next runs. Their compiled steps take memory, on accelerators that of the device.
NUM_KEPT = 2


class Program:
    """The steps of a config on a mesh, with the shapes and shardings of their arguments.

    Args:
      config: the settings of the steps.
      sizes: of the model.
      preprocess: mean, deviation and size of its images.
      num_classes: actions.
      num_steps: updates of the whole run.
      mesh: the devices, or descriptions of devices elsewhere.
      class_counts: training images of each class, for a loss that balances them.
      cache_size: training images in the cache of a Tip-Adapter.

    Raises:
      UserError: the mesh doesn't divide a batch or a parameter, settings of a method don't match, or nothing is
        trainable.
    """

    def __init__(
        self,
        config: StepConfig,
        sizes: TwoTowerConfig,
        preprocess: Preprocess,
        num_classes: int,
        num_steps: int,
        mesh: Mesh,
        class_counts: Sequence[int] | None = None,
        cache_size: int = 0,
    ):
        self.config, self.sizes, self.preprocess, self.num_steps, self.mesh = config, sizes, preprocess, num_steps, mesh
        self.num_classes = num_classes
        check_batch_size(config.batch_size, mesh, "train.global_batch_size")
        check_batch_size(config.eval_batch_size, mesh, "eval.batch_size")
        _check_accumulation(config, mesh)
        rows = batch_sharding(mesh)
        self.runtime = Runtime(config.compute_dtype, config.remat, config.attention, activations=rows)
        model = abstract_model(sizes, self.runtime)
        balance = config.method.class_balance
        weights = balanced_weights(class_counts, balance) if balance and class_counts is not None else None
        self.method = Method(config.method, sizes, num_classes, model, mesh, weights, config.multi_label)
        own_shapes, own_axes = self.method.extra_parameters(cache_size)
        self.shapes = {name: value.shape for name, value in flat_params(model).items()} | own_shapes
        self.param_shardings = param_shardings(self.shapes, axis_names(model) | own_axes, mesh)
        masks = freeze_masks(self.shapes, config.method.freeze)
        self.trainable = {
            name: shape for name, shape in self.shapes.items() if self.method.is_trainable(name) and masks[name].any()
        }
        if not self.trainable and self.method.recipe.learns_from != "nothing":
            raise UserError("config.method.freeze leaves nothing to train; freeze less")
        self.trains_text = any(name.startswith(("text", "prompt")) for name in self.trainable)
        self.trains_image = any(name.startswith("vis") for name in self.trainable)
        self._check_pairs()
        self.schedule = make_schedule(config.optim, num_steps)
        self.optimizer = make_optimizer(config.optim, self.schedule, self.trainable, masks)
        self.shardings = state_shardings(
            self.optimizer,
            self._abstract({name: self.shapes[name] for name in self.trainable}),
            {name: self.param_shardings[name] for name in self.trainable},
            mesh,
            with_average=config.optim.ema_decay > 0 or evaluated_weights(config.optim) is not None,
        )
        self.train_step = make_train_step(
            self.method, self.optimizer, self.schedule, config, preprocess, self.shardings, mesh
        )
        self.eval_step = make_eval_step(self.method, preprocess, mesh)
        self.feature_step = make_feature_step(self.method, preprocess, mesh)
        self.class_step = make_class_step(self.method, mesh)
        self.caption_step = make_caption_step(self.method, mesh)
        # By the number of classes.
        self.text_step = functools.lru_cache(maxsize=4)(functools.partial(make_text_step, self.method, mesh=mesh))

    def _check_pairs(self) -> None:
        if self.config.of_pairs and self.method.loss not in ("softmax", "sigmoid"):
            raise UserError(
                f"config.method.loss: image-text pairs have no classes, so they train with softmax or sigmoid, not "
                f"{self.method.loss!r}; add --config.method.loss=softmax"
            )
        if self.method.loss in PAIR_LOSSES and not self.trains_text:
            raise UserError(f"config.method.freeze leaves nothing of the texts that {self.method.loss} learns from")
        if self.method.loss in PAIR_LOSSES and self.config.accumulation_steps > 1:
            raise UserError(
                f"config.train.accumulation_steps: {self.method.loss} compares all images of a batch; use 1, and "
                "config.model.remat=full to save memory"
            )

    def _abstract(self, shapes: dict[str, tuple[int, ...]]) -> Params:
        return {
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=self.param_shardings[name])
            for name, shape in shapes.items()
        }

    def place(self, params: Mapping[str, Any], seed: int = 0) -> tuple[TrainState, Params]:
        """Return the state before the first step and the frozen parameters, on the mesh.

        Args:
          params: host arrays, or arrays on the mesh, which the state takes over. Missing ones become 0: the head of a
            method that fits it to features, if these weren't computed.
          seed: of the random key of the steps.
        """
        params = {name: params.get(name, np.zeros(shape, np.float32)) for name, shape in self.shapes.items()}
        trainable = {name: params[name] for name in self.trainable}
        state = make_state(trainable, self.optimizer, seed, self.shardings)
        return state, self.place_params({name: params[name] for name in self.frozen})

    def place_params(self, params: Mapping[str, Any]) -> Params:
        """Return host arrays of some parameters, placed on the mesh."""
        return put_global(dict(params), {name: self.param_shardings[name] for name in params})

    @property
    def frozen(self) -> list[str]:
        """The names of the parameters that no step updates."""
        return [name for name in self.shapes if name not in self.trainable]

    def place_prompts(
        self, input_ids: Int[np.ndarray, "p t"], class_of_prompt: Sequence[int], num_classes: int | None = None
    ) -> tuple[Any, Any]:
        """Return the prompts on the mesh, padded to a multiple of it so that every device computes an equal share.

        Args:
          num_classes: of the prompts; None: the run's.
        """
        fill = self.num_classes if num_classes is None else num_classes
        missing = -len(input_ids) % num_row_shards(self.mesh)
        ids = np.concatenate([input_ids, np.repeat(input_ids[:1], missing, axis=0)])
        classes = np.asarray([*class_of_prompt, *[fill] * missing], np.int32)
        rows = batch_sharding(self.mesh)
        return put_global((ids, classes), (rows, rows))

    def abstract_state(self) -> TrainState:
        """Return the shapes, types and shardings of the state, for restoring a checkpoint."""
        params, whole = self._abstract(self.trainable), replicated(self.mesh)
        scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        key = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole)
        opt_state = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.eval_shape(self.optimizer.init, params),
            self.shardings.opt_state,
        )
        return TrainState(scalar, params, params if self.shardings.ema else {}, opt_state, key, scalar, scalar)

    def abstract_frozen(self) -> Params:
        """Return the shapes, types and shardings of the frozen parameters."""
        return self._abstract({name: self.shapes[name] for name in self.frozen})

    def abstract_arguments(self, num_prompts: int) -> tuple[TrainState, Params, ClassInputs, Any]:
        """Return the shapes, types and shardings of the training step's arguments."""
        rows, whole, shape = batch_sharding(self.mesh), replicated(self.mesh), self.preprocess.shape
        batch_size, num_frames = self.config.batch_size, self.config.num_frames

        def struct(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        if self.trains_text:
            count = num_prompts + -num_prompts % num_row_shards(self.mesh)
            ids = struct((count, self.sizes.text.context_length - self.method.context_length), jnp.int32, rows)
            classes = ClassInputs(ids, struct((count,), jnp.int32, rows), None)
        else:
            classes = ClassInputs(None, None, struct((self.num_classes, self.sizes.projection_dim), jnp.float32, whole))
        image = (batch_size, *([num_frames] if num_frames else []), *shape)
        index, mask = struct((batch_size,), jnp.int32, rows), struct((batch_size,), jnp.float32, rows)
        label = struct((batch_size, self.num_classes), jnp.uint8, rows) if self.config.multi_label else index
        batch: Any = Batch(struct(image, jnp.uint8, rows), label, mask, index)
        if self.config.of_pairs:
            texts = struct((batch_size, self.sizes.text.context_length), jnp.int32, rows)
            batch = PairBatch(batch.image, texts, mask, index)
        return self.abstract_state(), self.abstract_frozen(), classes, batch

    def flops_per_step(self, num_prompts: int) -> int:
        """Return the model FLOPs of one training step over all devices, as `step_flops` counts them."""
        kernels = [name for name in self.trainable if name.endswith(".kernel")]
        image_passes = 3 if any(name.startswith("vis") and not is_temporal(name) for name in kernels) else 2
        text_passes = 3 if any(name.startswith("text") for name in kernels) else 2
        trains_temporal = any(map(is_temporal, self.trainable))
        return step_flops(
            self.sizes,
            self.config.batch_size,
            self.config.batch_size if self.config.of_pairs else num_prompts,
            image_passes=image_passes if self.trains_image else 1,
            text_passes=text_passes if self.trains_text else 0,
            num_frames=self.config.num_frames,
            temporal_passes=3 if trains_temporal else 2 if self.trains_image else 1,
        )


def make_program(
    config: RunConfig,
    sizes: TwoTowerConfig,
    preprocess: Preprocess,
    num_classes: int,
    num_steps: int,
    mesh: Mesh,
    class_counts: Sequence[int] | None = None,
    cache_size: int = 0,
) -> Program:
    """Return the program of a run.

    The last `NUM_KEPT` programs are kept, so a run whose steps are those of an earlier one compiles nothing. The
    arguments and errors are those of `Program`.
    """
    counts = tuple(class_counts) if class_counts is not None and config.method.class_balance else None
    return _make_program(step_config(config), sizes, preprocess, num_classes, num_steps, mesh, counts, cache_size)


_make_program = functools.lru_cache(maxsize=NUM_KEPT)(Program)


def _check_accumulation(config: StepConfig, mesh: Mesh) -> None:
    size, parts, shards = config.batch_size, config.accumulation_steps, num_row_shards(mesh)
    if size % (parts * shards):
        raise UserError(
            f"config.train.accumulation_steps={parts}: a batch of {size} doesn't divide into {parts} parts on {shards} "
            f"devices; use a train.global_batch_size that is a multiple of {parts * shards}"
        )
