"""Localisation: a model folder and annotated untrimmed videos -> thresholds, a boundary head, mAP at temporal IoU."""

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from clip_har_jax import cli
from clip_har_jax.config import VideoConfig
from clip_har_jax.data.windows import WINDOW_S, UntrimmedVideo, list_untrimmed
from clip_har_jax.errors import UserError
from clip_har_jax.evaluation.localization import (
    Found,
    Localiser,
    Track,
    annotated_in,
    by_hysteresis,
    fit_rules,
    found_in,
    mean_map,
    rules_to_json,
    summarize,
)
from clip_har_jax.files import write_json
from clip_har_jax.folders import output_folder
from clip_har_jax.inference.jax_backend import JaxBackend
from clip_har_jax.listing import Tally
from clip_har_jax.preprocess import evaluation_transform
from clip_har_jax.specs import parse_spec
from clip_har_jax.training.boundaries import by_boundaries, fit_boundaries
from clip_har_jax.video.clips import TimedFrame
from clip_har_jax.video.decoding import BadVideo

HYSTERESIS, BOUNDARIES = "hysteresis", "boundaries"


def localize(
    model: str,
    data: str,
    output: str | Path,
    val: str = "",
    train: str = "",
    window_s: float = WINDOW_S,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Fit localisers to a model's predictions, evaluate them on untrimmed videos, and write the results.

    Args:
      model: a model folder.
      data: the SPEC of the annotated test videos.
      output: the folder to write: localisation.json, segments.json, timeline.png, and boundaries.safetensors.
      val: SPEC of the videos for fitting the thresholds; empty: the split val of `data`.
      train: SPEC of the videos for fitting the boundary head; empty: no such head.
      window_s: length of the model's input.
      batch_size: windows in one forward pass.

    Raises:
      UserError: a mistake in the arguments, the model or the data.
    """
    backend = JaxBackend(model, (), (), batch_size)
    labels = backend.labels
    held_out = list_videos(val or data, "val", "--val")
    judged = list_videos(data, "test", "--data")
    if {video.name for video in held_out} & {video.name for video in judged}:
        raise UserError("--val and --data name the same videos; thresholds that are fitted on them would flatter")
    val_tracks = list(make_tracks(backend, held_out, window_s))
    rules = fit_rules(val_tracks, labels)
    localisers: dict[str, Localiser] = {HYSTERESIS: by_hysteresis(labels, rules)}
    head = None
    if train:
        head = fit_boundaries(list(make_tracks(backend, list_videos(train, "train", "--train"), window_s)))
        localisers[BOUNDARIES] = by_boundaries(labels, head)
    val_maps = {name: mean_map(val_tracks, localise) for name, localise in localisers.items()}
    chosen = max(val_maps, key=lambda name: val_maps[name])
    tracks = list(make_tracks(backend, judged, window_s))
    found = {name: found_in(tracks, localise) for name, localise in localisers.items()}
    result = {
        "model_digest": backend.digest,
        "data": data,
        "window_s": window_s,
        "rules": rules_to_json(rules),
        "val_mean_map": val_maps,
        "chosen": chosen,
        **summarize(tracks, labels, found),
    }
    with output_folder(output) as folder:
        write_json(folder / "localisation.json", result)
        segments = {video: [one._asdict() for one in ones] for video, ones in found[chosen].items()}
        write_json(folder / "segments.json", segments)
        (folder / "timeline.png").write_bytes(_timeline(tracks, found[chosen], labels))
        if head is not None:
            save_file(head.params, folder / "boundaries.safetensors", {"longest_s": str(head.longest_s)})
    return result


def _timeline(tracks: Sequence[Track], found: Found, labels: Sequence[str]) -> bytes:
    from clip_har_jax.evaluation.timeline import draw_timelines

    return draw_timelines(annotated_in(tracks), found, labels)


def list_videos(text: str, split: str, flag: str) -> list[UntrimmedVideo]:
    """Return the untrimmed videos of a SPEC.

    Raises:
      UserError: a SPEC of something else.
    """
    spec = parse_spec(text)
    if spec.kind not in ("csv", "motion", "video") or (spec.kind == "motion" and "untrimmed" not in spec.options):
        raise UserError(f"{flag}={text}: annotations with times are needed: video:FILE, csv:FILE or motion?untrimmed")
    tally = Tally()
    videos = list_untrimmed(spec, spec.options.get("split", split), tally)
    cli.print_tally(flag, tally)
    return videos


def make_tracks(backend: JaxBackend, videos: Sequence[UntrimmedVideo], window_s: float) -> Iterator[Track]:
    """Yield a model's output over the time of each video, with progress on the terminal."""
    from rich.console import Console
    from rich.progress import track as progress

    console = Console(file=sys.stderr)
    for video in progress(videos, "watching", console=console, transient=True, disable=not console.is_terminal):
        yield follow(backend, video, window_s)


def follow(backend: JaxBackend, video: UntrimmedVideo, window_s: float) -> Track:
    """Return a model's output over the time of one video: for each frame, of the window around it.

    Each frame is encoded once, unless the model's tower looks over the frames of a window. Only the frames of one batch
    of windows are held, so memory grows with the video only by the outputs.
    """
    num_frames = int(backend.actions.video.get("num_frames", VideoConfig.num_frames))
    rate_hz = num_frames / window_s
    times_s, outputs = [], []
    answer = backend.frame_outputs if backend.takes_frames else backend.outputs
    windows = iter(sliding_windows(_encoded(backend, _readable(video, rate_hz)), num_frames))
    while chunk := list(islice(windows, backend.batch_size)):
        times_s += [time_s for time_s, _ in chunk]
        outputs.append(answer(np.stack([rows for _, rows in chunk]))[1:])
    probs, embeddings = (np.concatenate(parts).astype(np.float32) for parts in zip(*outputs, strict=True))
    middles_s = np.asarray(times_s) + (0.5 / rate_hz if num_frames % 2 == 0 else 0.0)
    return Track(video.name, video.duration_s, video.segments, middles_s, probs, embeddings)


def _readable(video: UntrimmedVideo, rate_hz: float) -> Iterator[TimedFrame]:
    """Yield the frames of a video; damage is printed, and the frames around it count.

    Raises:
      UserError: no frame of it can be read.
    """
    count = 0
    try:
        for count, frame in enumerate(video.frames(rate_hz), 1):  # noqa: B007
            yield frame
    except BadVideo as error:
        if not count:
            raise UserError(f"{video.name}: {error}") from error
        print(f"{video.name}: {error}; the readable frames count", file=sys.stderr)


def _encoded(backend: JaxBackend, frames: Iterable[TimedFrame]) -> Iterator[tuple[float, np.ndarray]]:
    """Yield each frame's time with its features, or with its pixels if the model can't encode single frames."""
    timed = iter(frames)
    while chunk := list(islice(timed, backend.batch_size)):
        images = np.stack([evaluation_transform(frame.image, backend.preprocess) for frame in chunk])
        rows = backend.embed_frames(images) if backend.takes_frames else images
        yield from zip([frame.time_s for frame in chunk], rows, strict=True)


def sliding_windows(frames: Iterable[tuple[float, np.ndarray]], num_frames: int) -> Iterator[tuple[float, np.ndarray]]:
    """Yield the window around each frame, with the frame's time; the first and last frame repeat outside the video.

    Args:
      frames: times with rows of any shape: pixels or features.
      num_frames: of a window.
    """
    before = (num_frames - 1) // 2  # the rest of the window comes after the frame
    held: deque[np.ndarray] = deque(maxlen=num_frames)
    times: deque[float] = deque()
    for time_s, row in frames:
        if not held:
            held.extend([row] * before)
        held.append(row)
        times.append(time_s)
        if len(held) == num_frames:
            yield times.popleft(), np.stack(held)
    last = held[-1] if held else None
    while times and last is not None:
        held.append(last)
        if len(held) == num_frames:
            yield times.popleft(), np.stack(held)


def print_result(result: dict[str, Any], output: str | Path) -> None:
    """Print the metrics and the paths of the files."""
    rows = [("videos", f"{result['num_videos']}, {result['num_segments']} segments")]
    if result["frame_map"] is not None:
        rows.append(("frame mAP", f"{result['frame_map']:.3f}"))
    for name, figures in result["localisers"].items():
        maps = "  ".join(f"{threshold}: {value:.3f}" for threshold, value in figures["map"].items())
        note = ", chosen on the validation videos" if name == result["chosen"] else ""
        rows.append((name, f"mAP {figures['mean_map']:.3f}{note}; at IoU {maps}"))
    rules = ", ".join(f"{name} {value:g}" for name, value in result["rules"].items())
    cli.print_rows([*rows, ("thresholds", rules), ("timeline", str(Path(output) / "timeline.png"))])
