"""Writes tests/golden/peft: a LoRA adapter as PEFT saves it, and the outputs of the adapted CLIP.

Run in an environment of transformers 5 with torch and peft (versions.json has the versions of the last run):

    PYTHONPATH=. python tests/support/make_peft_golden.py

The base model is the folder tests/golden/quick_gelu. Nothing of the package is imported here.
"""

from pathlib import Path

import numpy as np

from tests.support.make_golden import GOLDEN, make_inputs, make_weight, small, write


def main(folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPModel

    base = CLIPModel.from_pretrained(GOLDEN / "quick_gelu").eval()
    settings = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj", "fc1", "visual_projection"])
    model = get_peft_model(base, settings).eval()
    model.peft_config["default"].base_model_name_or_path = "../quick_gelu"
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_" in name:
                value.copy_(torch.from_numpy(np.asarray(make_weight(name, value.shape))))
        config = base.config.to_dict()
        text = {"max_position_embeddings": config["text_config"]["max_position_embeddings"]}
        inputs = make_inputs(small(vocab_size=config["text_config"]["vocab_size"], **text))
        output = model(**{key: torch.from_numpy(value) for key, value in inputs.items()})
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    kept = {name: output[name].numpy() for name in ("logits_per_image", "text_embeds", "image_embeds")}
    write("peft_outputs", kept | inputs, ("peft", "torch", "transformers"))


if __name__ == "__main__":
    main(GOLDEN / "peft")
