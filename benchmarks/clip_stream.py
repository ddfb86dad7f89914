"""Stream of a model of clips: features of frames kept, compared with the whole window at each hop.

    python -m benchmarks.clip_stream --size=ViT-B/32 --frames=16 --window_s=2 --hop_s=0.25

Random weights, `model.temporal` of `head`. Counted: FLOPs per second of stream. Measured: processor time per second of
stream, in alternating rounds. The last line is JSON; `ratio` is that of the FLOPs.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_har_jax import cli
from clip_har_jax.inference.sliding_windows import Windows
from clip_har_jax.models.clip import SIZES
from clip_har_jax.models.flops import matmul_flops
from clip_har_jax.models.params import init_params, make_model

SECONDS, ROUNDS = 2, 3  # of stream in a round


def main() -> int:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--size", choices=tuple(SIZES), default="ViT-B/32", help="of the model, e.g. --size=ViT-B/32 (default)")
    add("--frames", type=int, default=16, metavar="N", help="of a window, e.g. --frames=16 (default)")
    add("--window_s", type=float, default=2.0, metavar="S", help="length of a window, e.g. --window_s=2 (default)")
    add("--hop_s", type=float, default=0.25, metavar="S", help="between windows, e.g. --hop_s=0.25 (default)")
    arguments = parser.parse_args()
    windows = Windows(arguments.frames, arguments.window_s, arguments.hop_s)
    config = replace(SIZES[arguments.size], temporal="head")
    model = make_model(config, jax.tree.map(jnp.asarray, init_params(config, 0)))
    side = config.vision.image_size
    frame = jnp.zeros((1, side, side, 3), jnp.float32)
    clip = jnp.zeros((1, windows.num_frames, side, side, 3), jnp.float32)
    embeds = jnp.asarray(
        np.random.default_rng(0).normal(size=(1, windows.num_frames, config.projection_dim)), jnp.float32
    )
    encode, pool, whole = (jax.jit(run) for run in (model.encode_image, model.pool_frames, model.encode_image))
    flops = {
        name: matmul_flops(jax.make_jaxpr(run)(x))
        for name, run, x in (
            ("frame", model.encode_image, frame),
            ("head", model.pool_frames, embeds),
            ("clip", model.encode_image, clip),
        )
    }
    hops = 1 / windows.hop_s
    kept = windows.rate_hz * flops["frame"] + hops * flops["head"]
    again = hops * flops["clip"]

    def keep() -> None:
        for _ in range(round(SECONDS * windows.rate_hz)):
            encode(frame).block_until_ready()
        for _ in range(round(SECONDS * hops)):
            pool(embeds).block_until_ready()

    def repeat() -> None:
        for _ in range(round(SECONDS * hops)):
            whole(clip).block_until_ready()

    times = _alternate({"kept": keep, "whole": repeat})
    print(f"{arguments.size}, {windows.num_frames} frames in {windows.window_s:g} s, a window each {windows.hop_s:g} s")
    print(f"features kept:  {kept / 1e9:8.1f} GFLOP, {times['kept']:.2f} s of processor time per second of stream")
    print(f"whole windows:  {again / 1e9:8.1f} GFLOP, {times['whole']:.2f} s")
    result: dict[str, Any] = {"benchmark": "clip_stream", "ratio": again / kept, "gflops": [kept / 1e9, again / 1e9]}
    print(json.dumps(result | {"processor_s": [times["kept"], times["whole"]]}))
    return 0


def _alternate(ways: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Return the median processor time of each way per second of stream; the first round compiles."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, run in ways.items():
            start = time.process_time()
            run()
            times[name].append((time.process_time() - start) / SECONDS)
    return {name: float(np.median(rounds[1:])) for name, rounds in times.items()}


if __name__ == "__main__":
    cli.run(main)
