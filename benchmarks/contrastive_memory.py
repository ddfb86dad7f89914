"""Memory of the contrastive loss and its gradients on 8 simulated devices: full similarity matrix against ring.

    python -m benchmarks.contrastive_memory [--kind=softmax] [--dim=512]

Nothing is run: the figures are the memory analyses of the compiled programs, the bytes that one device needs beside its
  arguments and results. Both forms get the same sharded rows; the compiler partitions the dense one. "ratio" is the
  ring's bytes divided by the dense form's at the largest batch, "growth" the growth of each form at the last doubling.
"""

import json
import os
from typing import Any

from clip_har_jax import cli

NUM_DEVICES = 8
BATCH_SIZES = tuple(1024 * 2**i for i in range(6))
FORMS = ("dense", "ring")


def temp_bytes(form: str, batch_size: int, kind: str, dim: int) -> int:
    """Return the bytes that one device needs for the loss of a global batch and its gradients."""
    import jax
    import jax.numpy as jnp

    from clip_har_jax.config import MeshConfig
    from clip_har_jax.parallel.mesh import make_mesh
    from clip_har_jax.parallel.sharding import batch_sharding, replicated
    from clip_har_jax.training.contrastive import contrastive_loss
    from clip_har_jax.training.losses import masked_mean
    from tests.support.dense_contrastive import dense_contrastive_loss

    mesh = make_mesh(MeshConfig(strategy="dp"))
    rows = batch_sharding(mesh)

    def loss(
        image: jax.Array, text: jax.Array, scale: jax.Array, bias: jax.Array, label: jax.Array, mask: jax.Array
    ) -> jax.Array:
        inputs: Any = {"kind": kind, "label": label, "logit_bias": bias}
        if form == "dense":
            losses = dense_contrastive_loss(image, text, scale, mask, **inputs)
        else:
            losses = contrastive_loss(image, text, scale, mask, mesh=mesh, **inputs)
        return masked_mean(losses, mask)

    side = jax.ShapeDtypeStruct((batch_size, dim), jnp.float32, sharding=rows)
    label, mask = (jax.ShapeDtypeStruct((batch_size,), dtype, sharding=rows) for dtype in (jnp.int32, jnp.float32))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    analysis = step.lower(side, side, scalar, scalar, label, mask).compile().memory_analysis()
    assert analysis is not None, "the CPU compiler has one"
    return analysis.temp_size_in_bytes


def main() -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--kind", choices=("softmax", "sigmoid"), default="softmax", help="loss, e.g. --kind=sigmoid")
    parser.add_argument("--dim", type=int, default=512, help="width of the embeddings, e.g. --dim=768")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={NUM_DEVICES}"
    print(f"temporary MB per device, of {NUM_DEVICES}; the similarity matrix is the global batch's, in float32")
    print(f"{'global batch':>12}{'similarity':>12}{''.join(f'{form:>10}' for form in FORMS)}")
    measured: dict[str, list[int]] = {form: [] for form in FORMS}
    for batch_size in BATCH_SIZES:
        for form in FORMS:
            measured[form].append(temp_bytes(form, batch_size, **vars(arguments)))
        cells = "".join(f"{measured[form][-1] / 1e6:10.1f}" for form in FORMS)
        print(f"{batch_size:12,}{batch_size**2 * 4 / 1e6:12.1f}{cells}", flush=True)
    result = {
        "benchmark": "contrastive_memory",
        "ratio": round(measured["ring"][-1] / measured["dense"][-1], 4),
        "growth": {form: round(sizes[-1] / sizes[-2], 2) for form, sizes in measured.items()},
        "global_batch": BATCH_SIZES,
        "temp_bytes": measured,
        **vars(arguments),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
