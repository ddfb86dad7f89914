"""The torch side of `benchmarks.train_step`: transformers' CLIPModel or SiglipModel.

Runs in an environment with torch and transformers. For each line on standard input, it runs one training step and
answers with a JSON line, so that only one side runs at a time.
"""

import json
import sys
import time


def main(folder: str, inputs_file: str, learning_rate: float, weight_decay: float) -> None:
    import numpy as np
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(folder).train()
    # fused: the fastest of torch's implementations, and the default of transformers' Trainer.
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True)
    with np.load(inputs_file) as arrays:
        inputs = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"versions": versions}), flush=True)
    for _ in sys.stdin:
        start, cpu_start = time.perf_counter(), time.process_time()
        optimizer.zero_grad(set_to_none=True)
        loss = model(**inputs, return_loss=True).loss
        loss.backward()
        optimizer.step()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        print(json.dumps({"loss": loss.item(), "seconds": seconds, "cpu_seconds": cpu_seconds}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
