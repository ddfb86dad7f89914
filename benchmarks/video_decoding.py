"""Clips read per second, 8 frames of 320x240 H.264, compared with plain PyAV and (if its environment is given) decord.

    python -m benchmarks.video_decoding --video=clip.mp4 [--decord_python=PATH] [--rounds=5]

The first 10 s of the video are re-encoded with x264, with its defaults (a keyframe every 250 frames) and like phones (a
keyframe every second). Plain PyAV decodes all frames and keeps 8. The sides alternate on one thread; figures are
medians of processor time. The frames of ours and of plain PyAV must be equal.
"""

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clip_har_jax import cli
from clip_har_jax.video.clips import read_clip
from clip_har_jax.video.sampling import FrameSampling

NUM_FRAMES, SIZE, SECONDS = 8, (320, 240), 10
CLIPS_A_ROUND = 5
DECORD = """
import json, sys, time
import decord
path, indices, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
decord.VideoReader(path, num_threads=1).get_batch(indices)
begin = time.process_time()
for _ in range(count):
    frames = decord.VideoReader(path, num_threads=1).get_batch(indices)
print(json.dumps([(time.process_time() - begin) / count, float(frames.asnumpy().mean())]))
"""


def write(source: str, target: Path, keyframe_every: int) -> int:
    """Write the beginning of a video in the benchmark's size; return its number of frames."""
    import av

    with av.open(source) as read, av.open(target, "w") as written:
        rate = read.streams.video[0].average_rate or 25
        stream = written.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.gop_size = keyframe_every
        count = 0
        for frame in read.decode(video=0):
            if count == round(SECONDS * float(rate)):
                break
            image = frame.reformat(*SIZE, "yuv420p").to_ndarray()
            picture = av.VideoFrame.from_ndarray(image, format="yuv420p")
            picture.pts, count = count, count + 1
            written.mux(stream.encode(picture))
        written.mux(stream.encode(None))
    return count


def plain(path: Path, indices: list[int]) -> list[np.ndarray]:
    """Decode all frames and keep some."""
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "SLICE", 1
        frames = list(container.decode(stream))
        return [frames[i].to_ndarray(format="rgb24") for i in indices]


def ours(path: Path, indices: list[int]) -> list[np.ndarray]:
    """Read the clip with this project's code."""
    return list(read_clip(path, FrameSampling(len(indices))).frames)


def process_s(read: Callable[[Path, list[int]], Any], path: Path, indices: list[int]) -> float:
    """Return the processor time of reading one clip."""
    begin = time.process_time()
    for _ in range(CLIPS_A_ROUND):
        read(path, indices)
    return (time.process_time() - begin) / CLIPS_A_ROUND


def decord_s(python: str, path: Path, indices: list[int]) -> float:
    """Return the processor time of decord for one clip, in its own environment."""
    command = [python, "-c", DECORD, str(path), json.dumps(indices), str(CLIPS_A_ROUND)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(said)[0])


def main() -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--video", required=True, metavar="FILE", help="a few seconds of real people")
    parser.add_argument("--decord_python", metavar="PATH", help="Python of an environment with decord")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "video_decoding"}
    with tempfile.TemporaryDirectory() as folder:
        for keyframe_every in (250, 30):
            path = Path(folder) / f"{keyframe_every}.mp4"
            count = write(arguments.video, path, keyframe_every)
            indices = ((np.arange(NUM_FRAMES) + 0.5) / NUM_FRAMES * count).astype(int).tolist()
            if not np.array_equal(ours(path, indices), plain(path, indices)):
                raise SystemExit("the frames differ")
            times: dict[str, list[float]] = {"plain": [], "ours": []}
            for _ in range(arguments.rounds):
                times["plain"].append(process_s(plain, path, indices))
                times["ours"].append(process_s(ours, path, indices))
                if arguments.decord_python:
                    times.setdefault("decord", []).append(decord_s(arguments.decord_python, path, indices))
            rates = {side: 1 / statistics.median(values) for side, values in times.items()}
            result[f"keyframe_every_{keyframe_every}"] = rates | {
                f"ratio_{side}": rates["ours"] / rate for side, rate in rates.items() if side != "ours"
            }
            shown = ", ".join(f"{side} {rate:.1f}" for side, rate in rates.items())
            print(f"a keyframe every {keyframe_every} of {count} frames: clips a second of processor time: {shown}")
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
