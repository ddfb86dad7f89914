"""TorchScript, through the model folder's Hugging Face layout and `transformers.CLIPModel`.

That is another implementation of the same weights, so its parity is evidence for both. torch is an extra, and nothing
else here imports it.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from clip_har_jax.preprocess import Preprocess


def write_torchscript(
    model_folder: Path, preprocess: Preprocess, classes: Float32[np.ndarray, "c d"], scale: float, folder: Path
) -> None:
    """One traced module a graph.

    Args:
      model_folder: config.json and model.safetensors in the Hugging Face layout.
      preprocess: whose normalisation the graphs do.
      classes: class embeddings.
      scale: what cosine similarities are multiplied by.
      folder: where to write.
    """
    import torch
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(model_folder, local_files_only=True, attn_implementation="eager").eval()
    vision, size = clip.vision_model, preprocess.image_size_px
    mean, std = (
        torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (preprocess.mean, preprocess.std)
    )
    class_rows = torch.tensor(np.asarray(classes))

    def to_floats(image: Any) -> Any:
        return (image.permute(0, 3, 1, 2).float() / 255 - mean) / std

    def unit(x: Any) -> Any:
        return x / x.norm(dim=-1, keepdim=True)

    def encode_image(image: Any) -> Any:
        return (unit(clip.visual_projection(vision(pixel_values=to_floats(image)).pooler_output)),)

    def encode_text(input_ids: Any) -> Any:
        return (unit(clip.text_projection(clip.text_model(input_ids=input_ids.long()).pooler_output)),)

    def classify(image: Any) -> Any:
        logits = scale * encode_image(image)[0] @ class_rows.T
        return logits.softmax(-1), logits

    def explain(image: Any, class_weights: Any) -> Any:
        """As `clip_har_jax.models.explain`."""
        entering = vision(pixel_values=to_floats(image), output_hidden_states=True).hidden_states[-2]
        last = vision.encoder.layers[-1]
        attention, x = last.self_attn, last.layer_norm1(entering)
        heads = attention.num_heads
        query, key, value = (
            layer(x).unflatten(-1, (heads, x.shape[-1] // heads))
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        scores = torch.einsum("bhd,bnhd->bhn", query[:, 0], key) * (x.shape[-1] // heads) ** -0.5
        moved = (scores.softmax(-1).transpose(1, 2)[..., None] * value).flatten(-2)
        added = moved @ attention.out_proj.weight.T
        added = (added - added.mean(-1, keepdim=True)) * vision.post_layernorm.weight
        patches = clip.visual_projection(added)[:, 1:]
        relevance = torch.einsum("bnd,bd->bn", patches, scale * class_weights @ class_rows).relu()
        heat = relevance / relevance.amax(1, keepdim=True).clamp_min(1e-12)
        grid = vision.config.image_size // vision.config.patch_size
        return heat.unflatten(1, (grid, grid)), patches

    class Module(torch.nn.Module):
        def __init__(self, function: Any):
            super().__init__()
            self.clip, self.function = clip, function

        def forward(self, *inputs: Any) -> Any:
            return self.function(*inputs)

    image = torch.zeros((2, size, size, 3), dtype=torch.uint8)
    ids = torch.full((2, clip.config.text_config.max_position_embeddings), 3, dtype=torch.int32)
    ids[:, -1] = clip.config.text_config.eos_token_id
    weights = torch.eye(len(classes))[:2]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing warns of every shape that it keeps; the gate tries other batch sizes
        for name, function, inputs in (
            ("image_encoder", encode_image, (image,)),
            ("text_encoder", encode_text, (ids,)),
            ("classifier", classify, (image,)),
            ("explainer", explain, (image, weights)),
        ):
            traced = torch.jit.trace(Module(function), inputs, check_trace=False)
            torch.jit.save(torch.jit.freeze(traced.eval()), str(folder / f"{name}.pt"))
