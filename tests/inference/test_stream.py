"""Frames to events: smoothing, hysteresis, abstention, live sources."""

import json
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_har_jax import UserError
from clip_har_jax.inference.stream import Event, EventDetector, EventRules, FrameResult, Latest
from clip_har_jax.video.clips import iter_frames
from tests.support.rtsp_server import serve_one
from tests.support.videos import write_video

LABELS = ("sitting", "running", "jumping")
SCRIPTS = Path(__file__).parents[2] / "scripts"


def logits(index: int, probability: float = 0.9) -> np.ndarray:
    """Of a class with this probability, the others alike."""
    rest = np.log((1 - probability) / 2)
    return np.asarray([np.log(probability) if i == index else rest for i in range(3)], np.float32)


def follow(rules: EventRules, frames: list[np.ndarray], rate_hz: float = 10.0) -> tuple[list[FrameResult], list[Event]]:
    """Moments, and events that ended, of frames at a steady rate."""
    detector = EventDetector(LABELS, rules)
    moments = [detector.update(i / rate_hz, frame) for i, frame in enumerate(frames)]
    return moments, [event for moment in moments for event in moment.ended] + list(detector.finish())


def test_one_action_after_the_other() -> None:
    moments, events = follow(EventRules(memory_s=0.2), [logits(0)] * 20 + [logits(1)] * 20)
    assert [event.label for event in events] == ["sitting", "running"]
    assert events[0].start_s == 0 and events[0].end_s == events[1].start_s == pytest.approx(2.1, abs=0.15)
    assert events[1].end_s == 3.9 and 0.8 < events[0].score <= 0.9
    started = [(i, event.label) for i, moment in enumerate(moments) for event in moment.started]
    assert started[0] == (5, "sitting"), "told once it has lasted min_duration_s"


def test_a_score_that_wavers_gives_one_event() -> None:
    wavering = [logits(0, 0.55 if i % 2 else 0.65) for i in range(40)]
    rules = EventRules(smoothing="none", start_score=0.6, end_score=0.4)
    assert len(follow(rules, wavering)[1]) == 1
    # With one threshold instead of two each dip would end it.
    without = EventRules(smoothing="none", start_score=0.6, end_score=0.6, min_duration_s=0.0)
    assert len(follow(without, wavering)[1]) == 20


def test_a_single_odd_frame_changes_nothing() -> None:
    frames = [logits(0)] * 20 + [logits(1, 0.99)] + [logits(0)] * 20
    assert [event.label for event in follow(EventRules(memory_s=1.0), frames)[1]] == ["sitting"]
    assert len(follow(EventRules(smoothing="none"), frames)[1]) == 2, "which smoothing is for"


def test_short_ones_and_uncertain_ones_are_not_told() -> None:
    flash = [logits(0, 0.34)] * 10 + [logits(1)] * 3 + [logits(0, 0.34)] * 10
    assert follow(EventRules(smoothing="none", min_duration_s=0.5), flash)[1] == []
    moments, events = follow(EventRules(abstain_below=0.95), [logits(0)] * 20)
    assert events == [] and {moment.label for moment in moments} == {None}
    assert moments[0].score == pytest.approx(0.9, abs=1e-5)


def test_exponential_smoothing_is_the_weighted_mean_of_logits() -> None:
    detector = EventDetector(LABELS, EventRules(memory_s=0.5))
    rng = np.random.default_rng(0)
    rows, times = rng.normal(size=(6, 3)).astype(np.float32), [0.0, 0.1, 0.35, 0.4, 0.8, 1.0]
    for time_s, row in zip(times, rows, strict=True):
        moment = detector.update(time_s, row)
    weights = np.exp((np.asarray(times) - 1.0) / 0.5)
    mean = weights @ rows / weights.sum()
    np.testing.assert_allclose(moment.probs, np.exp(mean) / np.exp(mean).sum(), rtol=1e-5)


def test_attention_forgets_at_a_cut() -> None:
    """What was before the cut looks different, so it counts no more; by age alone it would for a second."""
    scenes = np.eye(4, dtype=np.float32)[:2]

    def label_after_cut(smoothing: str) -> str | None:
        detector = EventDetector(LABELS, EventRules(smoothing=smoothing, memory_s=2.0))
        for i in range(20):
            detector.update(i / 10, logits(0), scenes[0])
        return detector.update(2.0, logits(1), scenes[1]).label

    assert label_after_cut("attention") == "running" and label_after_cut("exponential") == "sitting"


def test_memory_is_bounded_and_time_never_runs_back() -> None:
    detector = EventDetector(LABELS)
    sizes = []
    for i in range(2000):
        moment = detector.update(i / 1000, logits(0))
        if i in (9, 299, 1999):
            sizes.append(len(pickle.dumps(detector)))
    assert sizes[0] < sizes[1] == pytest.approx(sizes[2], rel=0.1)
    assert detector.update(0.5, logits(0)).time_s == moment.time_s


@pytest.mark.parametrize(
    "wrong", [{"smoothing": "average"}, {"memory_s": 0.0}, {"end_score": 0.9}, {"min_duration_s": float("nan")}]
)
def test_rules_that_make_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError):
        EventRules(**wrong)  # type: ignore[arg-type]


def test_the_latest_wins() -> None:
    go = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        go.wait(5)
        yield from range(1, 100)

    latest = Latest(source())
    items = iter(latest)
    assert next(items) == 0
    go.set()
    time.sleep(0.2)
    assert list(items) == [99] and latest.skipped == 98


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPTS / script), *arguments], capture_output=True, text=True)


def test_both_scripts_find_the_same_events(served_folder: Path, tmp_path: Path) -> None:
    video = tmp_path / "clip.mp4"
    write_video(str(video))
    rules = ["--start_score=0.01", "--end_score=0", "--min_duration_s=0.2", "--json", f"--model={served_folder}"]
    done = run("predict.py", "--events", *rules, str(video), str(tmp_path / "none.mp4"))
    found, missing = (json.loads(line) for line in done.stdout.splitlines())
    assert done.returncode == 1 and "error" in missing and found["frames"] == 8, done.stderr
    assert found["events"] and found["duration_s"] == pytest.approx(1.75, abs=0.1)
    watched = run("stream.py", *rules, "--whole", str(video))
    assert watched.returncode == 0, watched.stderr
    lines = [json.loads(line) for line in watched.stdout.splitlines()]
    ends = [{key: value for key, value in line.items() if key != "event"} for line in lines if line["event"] == "end"]
    assert [event["label"] for event in ends] == [event["label"] for event in found["events"]]
    assert [event["start_s"] for event in ends] == [event["start_s"] for event in found["events"]]


def test_a_live_stream_is_read_as_it_comes() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"udp://127.0.0.1:{probe.getsockname()[1]}"
    sender = threading.Thread(target=write_video, args=(address, "mpegts", 6.0, True))
    sender.start()
    try:
        frames = iter_frames(f"{address}?timeout=3000000")
        first, second = next(frames), next(frames)
        assert first.image.shape == (48, 64, 3) and second.time_s > first.time_s
        frames.close()
    finally:
        sender.join()


def test_a_gap_ends_what_went_on() -> None:
    """Nobody knows what was done while no frame came."""
    detector = EventDetector(LABELS, EventRules(max_gap_s=3.0))
    for i in range(20):
        detector.update(i / 10, logits(0))
    moment = detector.update(30.0, logits(0))
    assert [(event.label, event.end_s) for event in moment.ended] == [("sitting", 1.9)] and not moment.started
    assert detector.update(31.0, logits(0)).started[0].start_s == 30.0


def wait_for_line(process: subprocess.Popen[str], words: str) -> str:
    assert process.stderr is not None
    line = process.stderr.readline()
    assert words in line, line
    return line


def test_a_camera_that_breaks_off_is_connected_to_again(served_folder: Path) -> None:
    """By RTSP in real time: it sends, drops the client, is down for a while, sends again, and is gone for good."""
    rules = ["--start_score=0.01", "--end_score=0", "--min_duration_s=0.2", "--rate_hz=5", "--reconnect_s=4"]
    down_s = 4.0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        command = [sys.executable, str(SCRIPTS / "stream.py"), f"--model={served_folder}", "--json", *rules]
        process = subprocess.Popen(
            [*command, f"rtsp://eve:secret@127.0.0.1:{port}/live"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        events: list[dict[str, Any]] = []
        seen = [threading.Event(), threading.Event()]
        reader = threading.Thread(target=collect, args=(process, events, seen))
        reader.start()
        requests, first_s = serve_one(listener, 2.0, seen[0])
    with process:
        assert requests[-1].startswith("PLAY rtsp://") and "RTP/AVP/TCP" in "".join(requests)
        words = f"rtsp://eve:***@127.0.0.1:{port}/live: it broke off; connecting again"
        wait_for_line(process, words)
        time.sleep(down_s - 1)  # between attempts, and so that what went on is known no more
        with socket.create_server(("127.0.0.1", port)) as listener:
            _, second_s = serve_one(listener, 2.0, seen[1])
        wait_for_line(process, "/live: back after ")
        wait_for_line(process, words)
        last = wait_for_line(process, "no stream that can be read (connection refused); check the address")
        assert last.startswith(f"error: rtsp://eve:***@127.0.0.1:{port}/live: ") and "gone for 4 s" in last
        assert process.wait(20) == 1
        reader.join(20)
    assert [event["event"] for event in events] == ["start", "end"] * 2
    first, second = (event for event in events if event["event"] == "end")
    assert first["start_s"] == 0, events
    assert 1.0 < first["end_s"] < first_s + 0.3, "what went on ends as the camera breaks off"
    assert down_s - 1 < second["start_s"] - first["end_s"] < 20, events
    assert 1.0 < second["end_s"] - second["start_s"] < second_s + 0.3, events


def collect(process: "subprocess.Popen[str]", events: list[dict[str, Any]], seen: list[threading.Event]) -> None:
    """Read the events that a process prints, and set one of `seen` for each that starts."""
    assert process.stdout is not None
    for line in process.stdout:
        events.append(json.loads(line))
        if events[-1]["event"] == "start":
            seen[sum(event["event"] == "start" for event in events) - 1].set()


@pytest.mark.parametrize("scheme", ["rtsp", "http", "tcp"])
def test_an_address_where_nobody_is(served_folder: Path, scheme: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # and doesn't listen
        done = run("stream.py", f"--model={served_folder}", f"{scheme}://127.0.0.1:{probe.getsockname()[1]}/live")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "no stream that can be read (connection refused); check the address, and that it sends" in done.stderr


def test_a_camera_that_is_not_there(served_folder: Path) -> None:
    done = run("stream.py", f"--model={served_folder}", "/dev/video77")
    assert done.returncode == 1 and done.stderr.startswith("error: /dev/video77: no camera")
