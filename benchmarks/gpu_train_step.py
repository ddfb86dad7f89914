"""Our training step of ViT-B/32, B/16 and L/14 on one GPU in bfloat16: images/s, MFU, time spent waiting for data.

    python -m benchmarks.gpu_train_step [--data=folder:photos] [--models=ViT-B/32,ViT-B/16,ViT-L/14] [--steps=50]

Both towers are trained from random weights with 45 prompts of full length. Each model first steps on a batch that stays
on the GPU, then on batches that the training's input pipeline reads from JPEGs; without --data these are generated,
with the size of photographs. "ratio": images/s of ViT-B/16 with JPEGs, divided by the 1,459 published for an H100.
"""

import gzip
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from clip_har_jax import cli
from clip_har_jax.errors import UserError, nearest

if TYPE_CHECKING:
    import jax

    from clip_har_jax.batch import Batch
    from clip_har_jax.data.sources import Source
    from clip_har_jax.models.configuration import TwoTowerConfig

BATCH_SIZES = {"ViT-B/32": 1024, "ViT-B/16": 256, "ViT-L/14": 128}  # for 80 GB; halved if they don't fit
PUBLISHED_B16_IMAGES_PER_S = 1459
WARM_UPS = 5
NUM_PROMPTS = 45
TINY = "tiny"  # a model for test runs on any device
SIDE_FLAG = "--side"  # starts this file as a child process of `benchmarks.gpu`


def write_photographs(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> None:
    """Write JPEGs with the detail and the size of photographs: smooth shapes and noise, in two classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        shapes = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        noise = rng.normal(0, 8, (size[1], size[0], 3))
        path = folder / ("running" if i % 2 else "sleeping") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(np.asarray(shapes) + noise, 0, 255).astype(np.uint8)).save(path, quality=90)


def run_steps(
    train_step: Callable[[Any, "Batch"], tuple[Any, Any, "jax.Array"]],
    state: Any,
    batches: Iterator["Batch"],
    count: int,
) -> tuple[Any, float, float]:
    """Run steps with the host one step ahead of the device, as in training.

    Returns:
      The state, the seconds from the first step to the end of the last, and the seconds spent waiting for a batch.
    """
    import jax

    waited_s, running = 0.0, None
    begin = time.perf_counter()
    for _ in range(count):
        wait_begin = time.perf_counter()
        batch = next(batches)
        waited_s += time.perf_counter() - wait_begin
        state, _, skipped = train_step(state, batch)
        jax.block_until_ready(running)
        running = skipped  # the output that the next step doesn't donate
    jax.block_until_ready(state)
    return state, time.perf_counter() - begin, waited_s


class Training:
    """One model's training on one device, compiled, with a batch that stays there and batches read from images.

    Args:
      source: images, of any size.
      num_workers: processes that decode; 0: threads.
    """

    def __init__(
        self, device: "jax.Device", clip: "TwoTowerConfig", source: "Source", batch_size: int, num_workers: int
    ):
        from clip_har_jax.config import make_config
        from clip_har_jax.data.bad_inputs import BadInputs
        from clip_har_jax.data.pipeline import prefetch_to_mesh, train_batches
        from clip_har_jax.models.params import init_params
        from clip_har_jax.parallel.mesh import make_mesh
        from clip_har_jax.parallel.sharding import batch_sharding, put_local_rows
        from clip_har_jax.parallel.topology import find_chip
        from clip_har_jax.preprocess import Preprocess
        from clip_har_jax.training.methods import ClassInputs
        from clip_har_jax.training.program import Program
        from clip_har_jax.training.step_config import step_config

        config = make_config(
            {
                "model": {"compute_dtype": "bfloat16"},
                "train": {"global_batch_size": batch_size},
                "eval": {"batch_size": batch_size},
                "data": {"num_workers": num_workers},
            }
        )
        mesh, preprocess = make_mesh(config.mesh, [device]), Preprocess(image_size_px=clip.vision.image_size)
        program = Program(step_config(config), clip, preprocess, len(source.labels), num_steps=10_000, mesh=mesh)
        params = {name: np.asarray(value) for name, value in init_params(clip, seed=0).items()}
        self._state, frozen = program.place(params)
        ids = np.random.default_rng(0).integers(1, clip.text.vocab_size - 2, (NUM_PROMPTS, clip.text.context_length))
        ids[:, -1] = clip.text.eos_token_id
        prompts = program.place_prompts(ids.astype(np.int32), [i % len(source.labels) for i in range(NUM_PROMPTS)])
        classes = ClassInputs(*prompts, None)
        self._step = lambda state, batch: program.train_step(state, frozen, classes, batch)
        self._device, self.batch_size = device, batch_size
        chip = find_chip(device)
        self.peak_flops = chip.peak_flops if chip else None
        self.flops_per_step = program.flops_per_step(NUM_PROMPTS)
        rows = batch_sharding(mesh)
        self._read = train_batches(
            source,
            config.data,
            preprocess,
            seed=0,
            global_batch_size=batch_size,
            bad_inputs=BadInputs(source, config.data.max_bad_fraction),
        )
        self._batches = prefetch_to_mesh(self._read, lambda batch: put_local_rows(batch, rows))
        self._resident = itertools.repeat(next(self._batches))
        self.compile_s, _ = self.resident(1)

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: object) -> None:
        self._read.close()

    def resident(self, count: int) -> tuple[float, float]:
        """Step on the batch that stays on the device; return the seconds, and the seconds spent waiting for a batch."""
        self._state, seconds, waited_s = run_steps(self._step, self._state, self._resident, count)
        return seconds, waited_s

    def fed(self, count: int) -> tuple[float, float]:
        """Step on batches read from the images; returns the same as `resident`."""
        self._state, seconds, waited_s = run_steps(self._step, self._state, self._batches, count)
        return seconds, waited_s

    def kernels(self) -> list[str]:
        """Return the names of all kernels and host events in a trace of two steps."""
        import jax

        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, create_perfetto_trace=True):
                self.resident(2)
            (path,) = Path(folder).rglob("perfetto_trace.json.gz")
            events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        return sorted({event["name"] for event in events if event.get("ph") == "X"})

    @property
    def peak_memory_bytes(self) -> int | None:
        return (self._device.memory_stats() or {}).get("peak_bytes_in_use")

    @property
    def skipped_steps(self) -> int:
        """Number of updates that were skipped because they weren't finite."""
        return int(self._state.skipped_total)


def measure(
    device: "jax.Device", clip: "TwoTowerConfig", source: "Source", batch_size: int, steps: int, num_workers: int
) -> dict[str, Any]:
    """Return one model's figures on one device."""
    with Training(device, clip, source, batch_size, num_workers) as training:
        training.resident(WARM_UPS)
        resident_s, _ = training.resident(steps)
        training.fed(WARM_UPS)
        fed_s, waited_s = training.fed(steps)
        peak, flops = training.peak_flops, steps * training.flops_per_step
        return {
            "batch_size": batch_size,
            "first_step_s": training.compile_s,
            "resident_images_per_s": steps * batch_size / resident_s,
            "images_per_s": steps * batch_size / fed_s,
            "mfu_resident": peak and flops / resident_s / peak,
            "mfu": peak and flops / fed_s / peak,
            "data_wait_fraction": waited_s / fed_s,
            "peak_memory_bytes": training.peak_memory_bytes,
            "skipped_steps": training.skipped_steps,
        }


def serve(name: str, batch_size: int, folder: str) -> None:
    """Run the child process: compile, then answer `resident N`, `fed N` and `trace` from standard input."""
    import jax

    from clip_har_jax.data.sources import make_source
    from clip_har_jax.models.clip import CLIPConfig
    from clip_har_jax.models.configuration import TextConfig, VisionConfig
    from clip_har_jax.models.families import NAMED_SIZES
    from clip_har_jax.parallel import xla_flags

    xla_flags.apply()
    tower: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 2}
    tiny = CLIPConfig(
        TextConfig(**tower, vocab_size=50, context_length=6, bos_token_id=48, eos_token_id=49),
        VisionConfig(**tower, image_size=16, patch_size=8),
        projection_dim=8,
    )
    device = jax.devices()[0]
    source = make_source(f"folder:{folder}", "train", (), several_classes=True)
    # Decoding processes only for real sizes: their start takes longer than the tiny model's steps.
    workers = 0 if name == TINY else max(1, (os.cpu_count() or 1) - 2)
    with Training(device, tiny if name == TINY else NAMED_SIZES[name], source, batch_size, workers) as training:
        training.resident(WARM_UPS)
        about = {
            "platform": device.platform,
            "compile_s": training.compile_s,
            "flops_per_step": training.flops_per_step,
            "peak_flops": training.peak_flops,
        }
        print(json.dumps(about), flush=True)
        for line in sys.stdin:
            action, _, count = line.strip().partition(" ")
            answer: dict[str, Any]
            if action == "trace":
                answer = {"kernels": training.kernels()}
            else:
                if action == "fed":
                    training.fed(WARM_UPS)
                seconds, waited_s = (training.fed if action == "fed" else training.resident)(int(count))
                answer = {"seconds": seconds, "waited_s": waited_s, "peak_memory_bytes": training.peak_memory_bytes}
            print(json.dumps(answer), flush=True)


def measure_largest(device: "jax.Device", name: str, source: "Source", steps: int, num_workers: int) -> dict[str, Any]:
    """Measure a named size with the largest batch that fits: its own in `BATCH_SIZES`, or halves of it."""
    import jax

    from clip_har_jax.models.families import NAMED_SIZES

    batch_size = BATCH_SIZES[name]
    while True:
        try:
            return measure(device, NAMED_SIZES[name], source, batch_size, steps, num_workers)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or batch_size < 16:
                raise
        batch_size //= 2


def print_table(measured: dict[str, dict[str, Any]]) -> None:
    columns = ("batch_size", "resident_images_per_s", "images_per_s", "mfu_resident", "mfu", "data_wait_fraction")
    print(f"{'':10}" + "".join(f"{name:>23}" for name in columns))
    for name, values in measured.items():
        cells = (f"{values[key]:.3f}" if isinstance(values[key], float) else str(values[key]) for key in columns)
        print(f"{name:10}" + "".join(f"{cell:>23}" for cell in cells))


def main() -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--data", metavar="SPEC", help="JPEGs to read; default: generated; e.g. --data=folder:photos")
    parser.add_argument("--models", default=",".join(BATCH_SIZES), help="named sizes, e.g. --models=ViT-B/16")
    parser.add_argument("--steps", type=int, default=50, help="timed steps of each, e.g. --steps=50")
    parser.add_argument(
        "--num_workers", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="decoders, e.g. --num_workers=14"
    )
    arguments = parser.parse_args()
    for name in (models := arguments.models.split(",")):
        if name not in BATCH_SIZES:
            raise UserError(f"--models={name}: {nearest(name, list(BATCH_SIZES))}")

    import jax

    result: dict[str, Any] = {"benchmark": "gpu_train_step", "ratio": None, "device": None, "models": {}}
    device = jax.devices()[0]
    if device.platform != "gpu":
        print(f"no GPU here ({device.device_kind}): nothing measured")
        print(json.dumps(result))
        return

    from clip_har_jax.data.sources import make_source

    with tempfile.TemporaryDirectory() as folder:
        if arguments.data is None:
            write_photographs(Path(folder), count=2048)
        source = make_source(arguments.data or f"folder:{folder}", "train", (), several_classes=True)
        result |= {"device": device.device_kind, "jax": jax.__version__, "data": arguments.data or "made here"}
        for name in models:
            result["models"][name] = measure_largest(device, name, source, arguments.steps, arguments.num_workers)
    print_table(result["models"])
    if "ViT-B/16" in result["models"] and device.device_kind.startswith(("NVIDIA H100", "NVIDIA H200")):
        result["ratio"] = result["models"]["ViT-B/16"]["images_per_s"] / PUBLISHED_B16_IMAGES_PER_S
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == [SIDE_FLAG]:
        serve(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        cli.run(main)
