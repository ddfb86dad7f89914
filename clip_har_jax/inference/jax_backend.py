"""A model folder, or any CLIP in the Hugging Face layout, run by JAX, which is imported when a model is opened."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from clip_har_jax import bundle
from clip_har_jax.errors import UserError
from clip_har_jax.files import read_object
from clip_har_jax.inference import jax_programs
from clip_har_jax.inference.backends import (
    check_finite,
    check_indices,
    choose_actions,
    choose_sigmoid,
    mean_by_class,
    pad,
    rows_at_once,
)
from clip_har_jax.inference.program_cache import KeptEntry, model_folder_digest, read_tensors
from clip_har_jax.models.hf_layout import IMAGE_ALONE, TABLES, TEMPORAL_FILE, hf_names, params_from_hf
from clip_har_jax.models.resolve import resolve_folder
from clip_har_jax.preprocess import Preprocess

if TYPE_CHECKING:
    from clip_har_jax.models.factory import LoadedModel

PROMPTS_AT_ONCE = 64  # bounds the text tower's memory for long lists of classes


class JaxBackend:
    """A model folder, or any CLIP in the Hugging Face layout, run by JAX.

    The first prediction of a folder keeps its traced program and class embeddings on disk (`inference.program_cache`).
    A later process reads them, so it needs neither flax, the text tower nor tracing. It loads the whole model only for
    what needs it.

    Args:
      name_or_folder: a model folder or a Hub name.
      classes: the actions to recognise; empty: the folder's own.
      default_classes: the actions if neither is given.
      batch_size: images in one forward pass; smaller batches are padded, to avoid a new compilation.
      multi_label: accept multi-label models too, whose probabilities don't sum to 1.

    Raises:
      UserError: an incomplete model, a sealed one with a changed file, or no classes.
    """

    takes_clips = True
    num_frames = None

    def __init__(
        self,
        name_or_folder: str | os.PathLike[str],
        classes: Sequence[str] = (),
        default_classes: Sequence[str] = (),
        batch_size: int = 32,
        multi_label: bool = False,
    ):
        if batch_size < 1:
            raise UserError(f"a batch size of {batch_size}; 1 or more is needed")
        self.path, self.batch_size = resolve_folder(os.fspath(name_or_folder)), batch_size
        with ThreadPoolExecutor(1) as pool:  # hashing takes as long as importing JAX, and releases Python's lock
            verifying = pool.submit(bundle.verify, self.path)
            import jax

            from clip_har_jax.parallel.compile_cache import keep_compiled

            keep_compiled()
        self.digest = verifying.result()
        self.actions = choose_actions(self.path, classes, default_classes, multi_label)
        self.labels = self.actions.labels
        machine = (jax.default_backend(), jax.devices()[0].device_kind, jax.__version__, np.__version__)
        self._entry = KeptEntry(model_folder_digest(self.path, self.digest), self.actions, machine)
        self._programs: dict[tuple[int, ...], Callable[..., Any]] = {}
        self._tensors = self._entry.tensors() or self._make_tensors()
        bias = self._tensors.get("logit_bias")  # the backend's logits don't have it
        self.logit_bias = None if bias is None else float(bias)
        self.sigmoid = choose_sigmoid(self.actions, self.logit_bias)
        self.preprocess = self._read_preprocess(int(self._tensors["image_size_px"]))

    def release(self) -> None:
        """Free the weights and the compiled programs; they are read again when they are needed."""
        for name in ("_loaded", "_params", "_restore", "_image_params", "_explain", "_encode_text", "_pool"):
            self.__dict__.pop(name, None)
        self._programs.clear()

    def _read_preprocess(self, image_size_px: int) -> Preprocess:
        if (self.path / "config.json").is_file() and Preprocess.is_in(self.path):
            return Preprocess.from_folder(self.path, image_size_px)
        from clip_har_jax.models.pretrained import read_preprocess

        return read_preprocess(self.path, image_size_px)

    @property
    def scale(self) -> float:
        """Return the factor from cosines to logits."""
        return float(self._tensors["scale"])

    @property
    def class_embeddings(self) -> Float32[np.ndarray, "c d"]:
        """Return the class embeddings: those of the texts, or those that the head has learned."""
        return self._tensors["class_embeddings"]

    @cached_property
    def head_params(self) -> dict[str, np.ndarray]:
        """Return the head's parameters in their shapes; empty for the cosine, which has only class embeddings."""
        return {name.removeprefix("head."): self._tensors[name] for name in self._tensors if name.startswith("head.")}

    def _make_tensors(self) -> dict[str, np.ndarray]:
        """Compute the arrays that depend only on the classes, and store them."""
        from clip_har_jax.models.head_file import read_head

        config, head = self._loaded.model.config, self.actions.head
        labels, temperature = self.labels, self.actions.temperature
        params = {} if head == "cosine" else read_head(self.path, head, config.projection_dim, len(labels))
        if params:
            directions = params["classes.kernel"].T
            embeddings = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
        else:
            embeddings = self._embed_classes()
        tensors = {
            "class_embeddings": embeddings,
            "scale": np.asarray(float(np.exp(self._loaded.model.logit_scale[...])) / temperature),
            "image_size_px": np.asarray(config.vision.image_size),
            **{name: np.asarray(value) for name, value in self._params.items() if name == "logit_bias"},
            **{f"head.{name}": np.asarray(value) for name, value in params.items()},
        }
        self._entry.write_tensors(tensors)
        return tensors

    def _embed_classes(self) -> Float32[np.ndarray, "c d"]:
        """Return the class embeddings of the prompts."""
        prompts = [self.actions.prompts[label] for label in self.labels]
        ids = self.tokenize([text for group in prompts for text in group])
        return mean_by_class(self.embed_texts(ids), [len(group) for group in prompts])

    @cached_property
    def _loaded(self) -> "LoadedModel":
        from clip_har_jax.models.factory import load

        return load(str(self.path))

    @cached_property
    def _params(self) -> dict[str, Any]:
        from clip_har_jax.models.params import flat_params

        return flat_params(self._loaded.model)

    @cached_property
    def _restore(self) -> jax_programs.Restore:
        return jax_programs.make_restore(self._loaded.model)

    @cached_property
    def _image_params(self) -> dict[str, Any]:
        from clip_har_jax.models.temporal import HEAD
        from clip_har_jax.models.two_towers import IMAGE_TOWER

        return {name: value for name, value in self._params.items() if name.startswith((*IMAGE_TOWER, HEAD))}

    @cached_property
    def _classes(self) -> Any:
        """Return the second argument of the program: a head's parameters, or class embeddings and their scale."""
        import jax

        return jax.tree.map(jax.numpy.asarray, self.head_params or (self.class_embeddings, np.float32(self.scale)))

    def _program(self, shape: tuple[int, ...]) -> Callable[..., Any]:
        """Return the function from images of this shape to logits, probabilities and embeddings."""
        import jax

        if shape not in self._programs:
            name = f"forward-{'x'.join(map(str, shape))}"
            exported = self._entry.program(name)
            if exported is None or (params := self._read_image_params(exported)) is None:
                exported, params = self._trace(shape), self._image_params
                self._entry.write_program(name, exported)
            self.__dict__["_image_params"] = params
            self._programs[shape] = jax.jit(exported.call)
        return self._programs[shape]

    def _read_image_params(self, exported: Any) -> dict[str, Any] | None:
        """Return the parameters of a stored program without loading the model; None: the model must be loaded."""
        import jax

        if "_image_params" in self.__dict__:
            return self._image_params
        (avals, *_), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        config = self.path / "config.json"
        if not config.is_file():  # an open_clip folder
            return None
        table = TABLES[read_object(config).get("model_type", "clip").removesuffix(IMAGE_ALONE)]
        own = {name: aval.shape for name, aval in avals.items() if name in table}
        added = [name for name in avals if name not in table]
        file = self.path / "model.safetensors"
        tensors = read_tensors(file, hf_names(own, table)) if file.is_file() else None
        over_time = read_tensors(self.path / TEMPORAL_FILE, added) if added else {}
        if tensors is None or over_time is None:
            return None
        return jax.device_put(params_from_hf(tensors, own, str(self.path), table) | over_time)

    def _trace(self, shape: tuple[int, ...]) -> Any:
        import jax
        from jax import export

        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (self._image_params, self._classes))
        forward = jax_programs.make_forward(self._restore, self.actions, self.preprocess)
        return export.export(forward)(*shapes, jax.ShapeDtypeStruct(shape, np.uint8))

    @cached_property
    def _explain(self) -> Callable[..., Any]:
        return jax_programs.make_explain(self._restore, self.preprocess)

    @cached_property
    def _encode_text(self) -> Callable[..., Any]:
        return jax_programs.make_encode_text(self._restore)

    @cached_property
    def _pool(self) -> Callable[..., Any]:
        return jax_programs.make_pool(self._restore, self.actions)

    def tokenize(self, texts: Sequence[str]) -> Int32[np.ndarray, "p t"]:
        """Return token ids, padded to the model's context length."""
        return self._loaded.tokenizer(texts, self._loaded.model.config.text.context_length)[0]

    def embed_texts(self, ids: Int32[np.ndarray, "p t"]) -> Float32[np.ndarray, "p d"]:
        """Return L2-normalised text embeddings of token ids."""
        size, parts = min(PROMPTS_AT_ONCE, len(ids)), []
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            parts.append(np.asarray(self._encode_text(self._params, pad(part, size)))[: len(part)])
        return np.concatenate(parts)

    def outputs(self, images: UInt8[np.ndarray, "b *t h w 3"]) -> tuple[np.ndarray, ...]:
        """Return logits [b, c], probabilities [b, c] and embeddings [b, d].

        Compiled only for one row and for about `batch_size` images.
        """
        size = 1 if len(images) == 1 else rows_at_once(images, self.batch_size)
        return self._batched(self._program((size, *images.shape[1:])), images, size)

    def _batched(self, program: Callable[..., Any], rows: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
        """Return the program's logits, probabilities and embeddings for any number of rows, `size` at once."""
        parts = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            outputs = program(self._image_params, self._classes, pad(part, size))
            parts.append([np.asarray(output)[: len(part)] for output in outputs])
        logits, probs, embeddings = (np.concatenate(output) for output in zip(*parts, strict=True))
        check_finite(logits, self.path)
        return logits, probs, embeddings

    def logits(self, images: UInt8[np.ndarray, "b *t h w 3"]) -> Float32[np.ndarray, "b c"]:
        """Return class logits, divided by the temperature."""
        return self.outputs(images)[0]

    def predict(self, images: UInt8[np.ndarray, "b *t h w 3"]) -> Float32[np.ndarray, "b c"]:
        """Return class probabilities."""
        return self.outputs(images)[1]

    def embed(self, images: UInt8[np.ndarray, "b *t h w 3"]) -> Float32[np.ndarray, "b d"]:
        """Return L2-normalised embeddings of images or clips."""
        return self.outputs(images)[2]

    @cached_property
    def takes_frames(self) -> bool:
        """Return whether the frames of a clip can be encoded one by one."""
        from clip_har_jax.models.pretrained import read_config
        from clip_har_jax.models.temporal import IN_BLOCKS

        return read_config(self.path).temporal not in IN_BLOCKS and not jax_programs.needs_patches(self.actions.head)

    def embed_frames(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float32[np.ndarray, "n d"]:
        """Return the features of single frames, the input of `frame_logits`; requires `takes_frames`."""
        return self.embed(images)

    def frame_outputs(self, embeds: Float32[np.ndarray, "b t d"]) -> tuple[np.ndarray, ...]:
        """Return logits, probabilities and embeddings of clips from the features of their frames, as `outputs` does."""
        return self._batched(self._pool, embeds, 1 if len(embeds) == 1 else self.batch_size)

    def frame_logits(self, embeds: Float32[np.ndarray, "b t d"]) -> Float32[np.ndarray, "b c"]:
        """Return class logits of clips from the features of their frames; equal to `logits` of the clips."""
        return self.frame_outputs(embeds)[0]

    def explain(
        self, images: UInt8[np.ndarray, "b h w 3"], class_indices: Sequence[int]
    ) -> Float32[np.ndarray, "b g g"]:
        """Return a heat map of the class in each image, by `models.explain`."""
        size, parts = 1 if len(images) == 1 else self.batch_size, []
        classes = self.class_embeddings[check_indices(class_indices, len(images), len(self.labels))]
        for start in range(0, len(images), size):
            part, rows = images[start : start + size], classes[start : start + size]
            heat = self._explain(self._image_params, pad(rows, size), pad(part, size))
            parts.append(np.asarray(heat)[: len(part)])
        return np.concatenate(parts)
