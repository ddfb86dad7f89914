"""TorchScript, from the model folder's Hugging Face layout with `transformers.CLIPModel`.

transformers implements the model independently, so equal outputs confirm both. torch is an extra dependency, and no
other file here imports it.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax.preprocess import Preprocess
from export.graphs import NotExpressible


def write_torchscript(graphs: "TorchGraphs", names: Sequence[str], folder: Path) -> None:
    """Write one traced module for each graph.

    Args:
      graphs: the graphs of a model.
      names: names of the graphs to write.
      folder: the folder to write into.

    Raises:
      NotExpressible: a head that isn't written here.
    """
    import torch

    class Module(torch.nn.Module):
        def __init__(self, clip: Any, function: Any):
            super().__init__()
            self.clip, self.function = clip, function

        def forward(self, *inputs: Any) -> Any:
            return self.function(*inputs)

    functions = graphs.traced_with()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing warns about each fixed shape; the comparison tries other batch sizes
        for name in names:
            function, inputs = functions[name]
            traced = torch.jit.trace(Module(graphs.clip, function), inputs, check_trace=False)
            with (folder / f"{name}.pt").open("wb") as file:  # opened by Python, whose errors name the disk's problem
                torch.jit.save(torch.jit.freeze(traced.eval()), file)


class TorchGraphs:
    """The graphs of `export.graphs` in torch; for clips, those of models that average the frames.

    Args:
      model_folder: config.json and model.safetensors in the Hugging Face layout.
      preprocess: its normalisation is part of the graphs.
      head: name of the head, a key of `models.heads.HEADS`.
      head_params: its parameters.
      temperature: the divisor of its logits.
      multi_label: probabilities are the sigmoid of each label by itself.
    """

    def __init__(
        self,
        model_folder: Path,
        preprocess: Preprocess,
        head: str,
        head_params: Mapping[str, np.ndarray],
        temperature: float,
        multi_label: bool = False,
    ):
        import torch
        from transformers import CLIPModel

        clip = CLIPModel.from_pretrained(model_folder, local_files_only=True, attn_implementation="eager").eval()
        self.clip, self.vision, self.size = clip, clip.vision_model, preprocess.image_size_px
        self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (preprocess.mean, preprocess.std)
        )
        self.head, self.temperature, self.multi_label = head, temperature, multi_label
        self.params = {name: torch.tensor(np.asarray(value)) for name, value in head_params.items()}
        self.class_rows = self.params["classes.kernel"].T

    def traced_with(self) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
        """Return each graph's function with example inputs for tracing."""
        import torch

        image = torch.zeros((2, self.size, self.size, 3), dtype=torch.uint8)
        ids = torch.full((2, self.clip.config.text_config.max_position_embeddings), 3, dtype=torch.int32)
        ids[:, -1] = self.clip.config.text_config.eos_token_id
        weights = torch.eye(len(self.class_rows))[:2]
        frames = image[:, None].repeat(1, 3, 1, 1, 1)
        embeds = torch.full((2, 3, len(self.params["classes.kernel"])), 1.0)
        return {
            "image_encoder": (self.encode_image, (image,)),
            "text_encoder": (self.encode_text, (ids,)),
            "classifier": (self.classify, (image,)),
            "explainer": (self.explain, (image, weights)),
            "clip_classifier": (self.classify_clip, (frames,)),
            "frame_encoder": (self.encode_image, (image,)),
            "clip_head": (self.pool, (embeds,)),
        }

    def to_floats(self, image: Any) -> Any:
        return (image.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std

    def encode_image(self, image: Any) -> Any:
        return (unit(self.clip.visual_projection(self.vision(pixel_values=self.to_floats(image)).pooler_output)),)

    def encode_text(self, input_ids: Any) -> Any:
        return (unit(self.clip.text_projection(self.clip.text_model(input_ids=input_ids.long()).pooler_output)),)

    def embed_tokens(self, image: Any) -> Any:
        """Return all tokens in the space of the texts, [b, 1 + n, d], of unit length."""
        tokens = self.vision(pixel_values=self.to_floats(image)).last_hidden_state
        return unit(self.clip.visual_projection(self.vision.post_layernorm(tokens)))

    def answer(self, image: Any, patches: Any) -> Any:
        logits = head_logits(self.head, self.params, image, patches) / self.temperature
        return logits.sigmoid() if self.multi_label else logits.softmax(-1), logits

    def classify(self, image: Any) -> Any:
        embeds = self.embed_tokens(image)
        return self.answer(embeds[:, 0], embeds[:, 1:])

    def classify_clip(self, frames: Any) -> Any:
        """Return the outputs for clips, [b, t, h, w, 3], and their embeddings: the mean over the frames."""
        count, length = frames.shape[0], frames.shape[1]
        embeds = self.embed_tokens(frames.flatten(0, 1))
        embeds = embeds.reshape(count, length, embeds.shape[1], embeds.shape[2])
        mean = unit(embeds[:, :, 0].mean(1))
        return (*self.answer(mean, embeds[:, :, 1:].flatten(1, 2)), mean)

    def pool(self, frames: Any) -> Any:
        """Return the outputs for the embeddings of frames, [b, t, d], and the clips' embeddings."""
        mean = unit(frames.mean(1))
        return (*self.answer(mean, None), mean)

    def explain(self, image: Any, class_weights: Any) -> Any:
        """Return heat maps and patch embeddings, as `clip_har_jax.models.explain` defines them."""
        import torch

        entering = self.vision(pixel_values=self.to_floats(image), output_hidden_states=True).hidden_states[-2]
        last = self.vision.encoder.layers[-1]
        attention, x = last.self_attn, last.layer_norm1(entering)
        heads = attention.num_heads
        query, key, value = (
            layer(x).unflatten(-1, (heads, x.shape[-1] // heads))
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        scores = torch.einsum("bhd,bnhd->bhn", query[:, 0], key) * (x.shape[-1] // heads) ** -0.5
        moved = (scores.softmax(-1).transpose(1, 2)[..., None] * value).flatten(-2)
        added = moved @ attention.out_proj.weight.T
        added = (added - added.mean(-1, keepdim=True)) * self.vision.post_layernorm.weight
        patches = self.clip.visual_projection(added)[:, 1:]
        relevance = torch.einsum("bnd,bd->bn", patches, class_weights @ self.class_rows).relu()
        heat = relevance / relevance.amax(1, keepdim=True).clamp_min(1e-12)
        grid = self.vision.config.image_size // self.vision.config.patch_size
        return heat.unflatten(1, (grid, grid)), patches


def unit(x: Any) -> Any:
    """Return `x` scaled to unit length along its last dim."""
    return x / x.norm(dim=-1, keepdim=True)


def head_logits(head: str, params: Mapping[str, Any], image: Any, patches: Any) -> Any:
    """Return the logits of a head of `models.heads`, in torch.

    Args:
      head: its name.
      params: its parameters.
      image: L2-normalised image embeddings [b, d].
      patches: L2-normalised patch embeddings [b, n, d].

    Raises:
      NotExpressible: a head that isn't written here.
    """
    from torch import cat
    from torch.nn.functional import gelu

    def linear(name: str, x: Any) -> Any:
        y = x @ params[f"{name}.kernel"]
        return y + params[f"{name}.bias"] if f"{name}.bias" in params else y

    logits, classes = linear("classes", image), unit(params["classes.kernel"].T)
    if head == "linear":
        return logits
    if head == "mlp":
        shape = (image.shape[0], *classes.shape)  # `len` would fix the batch size
        pairs = cat([image[:, None].expand(shape), classes[None].expand(shape)], dim=-1)
        return logits + linear("fc2", gelu(linear("fc1", pairs)))[..., 0]
    if head == "cross_attention":
        query, key, value = linear("query", classes), linear("key", patches), linear("value", patches)
        weights = (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1)
        scale = params["classes.kernel"].norm(dim=0)
        return logits + scale * (linear("out", weights @ value) * classes).sum(-1)
    if head == "adapter":
        mixed = params["ratio"] * linear("up", linear("down", image).relu()).relu() + (1 - params["ratio"]) * image
        return linear("classes", unit(mixed))
    if head == "tip_adapter":
        affinity = (-params["beta"] * (1 - linear("keys", image))).exp()
        return logits + params["alpha"] * linear("values", affinity)
    raise NotExpressible(f"the {head!r} head isn't written in torch")
