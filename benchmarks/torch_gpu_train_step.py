"""The torch side of `benchmarks.gpu`: transformers' CLIPModel with torch.compile and SDPA, bfloat16 by autocast.

Trains both towers with the same number of prompts of full length as ours, on a batch of uint8 images that stays on the
device. For each line on standard input, runs that many steps and answers with a JSON line.
"""

import json
import sys
import time
from typing import Any


def main(name: str, batch_size: int, num_prompts: int) -> None:
    import numpy as np
    import torch
    import transformers
    from torch.nn import functional

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    config = make_config(name, transformers)
    config._attn_implementation = "sdpa"
    model: Any = transformers.CLIPModel(config)
    model.to(device).train()
    # No CUDA graphs: they hold memory that our side needs.
    compiled = torch.compile(model) if device == "cuda" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, fused=True)
    size, vocabulary = config.vision_config.image_size, config.text_config.vocab_size
    rng = np.random.default_rng(0)
    ids = rng.integers(1, vocabulary - 2, (num_prompts, config.text_config.max_position_embeddings))
    ids[:, -1] = config.text_config.eos_token_id
    ids = torch.from_numpy(ids).to(device)
    images = torch.from_numpy(rng.integers(0, 256, (batch_size, 3, size, size), np.uint8)).to(device)
    labels = torch.arange(batch_size, device=device) % num_prompts
    mean, deviation = (torch.full((1, 3, 1, 1), value, device=device) for value in (0.45, 0.27))

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16):
            pixels = (images.float() / 255 - mean) / deviation
            logits = compiled(input_ids=ids, pixel_values=pixels).logits_per_image
        loss = functional.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        return loss

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    for _ in range(3):
        step()
    synchronize()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"versions": versions, "compile_s": time.perf_counter() - start, "device": device}), flush=True)
    for line in sys.stdin:
        count = int(line.split()[1])
        start = time.perf_counter()
        for _ in range(count):
            loss = step()
        synchronize()
        answer = {"seconds": time.perf_counter() - start, "loss": loss.item()}
        if device == "cuda":
            answer["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        print(json.dumps(answer), flush=True)


def make_config(name: str, transformers: Any) -> Any:
    """Return the sizes of Radford et al. 2021, tables 19 and 20; "tiny" is the size of our test run."""
    if name == "tiny":
        tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = tower | {"vocab_size": 50, "max_position_embeddings": 6, "eos_token_id": 49, "bos_token_id": 48}
        return transformers.CLIPConfig(
            text_config=text, vision_config=tower | {"image_size": 16, "patch_size": 8}, projection_dim=8
        )
    large = name == "ViT-L/14"
    width = 768 if large else 512
    text = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    vision = {"patch_size": int(name.split("/")[1])}
    if large:
        vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
