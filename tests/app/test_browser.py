"""The app and the report in a real Chromium: every page is used, at both widths, and checked for accessibility."""

import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import av
import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, FilePayload, Page, Position, expect, sync_playwright

from clip_har_jax.pipelines.evaluate import evaluate_model
from tests.support.model_folders import write_image, write_images, write_model
from tests.support.serving_setup import LABELS, running, write_export

ROOT = Path(__file__).parents[2]
WIDTHS_PX = (375, 1440)
FLAGS = ("--server.headless=true", "--server.address=127.0.0.1")
PAGES = ("", "video", "vocabulary", "batch", "compare", "runs", "about")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found, "no Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-background-networking", "--disable-component-update"]
        flags += ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
        yield playwright.chromium.launch(executable_path=found, args=flags)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the app's address, on a service with a tiny model, with one run to browse."""
    root = tmp_path_factory.mktemp("browser")
    run = root / "runs" / "mine"
    run.mkdir(parents=True)
    rows = [json.dumps({"step": i, "train/loss": 1 / (i + 1), "train/top1": i / 5, "val/nll": 0.5}) for i in range(5)]
    (run / "metrics.jsonl").write_text("\n".join(rows))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A low temperature, so that the random model is sure enough to name actions in a video.
    export = write_export(root, temperature=0.05)
    with running(export, allowed_origins=(f"http://127.0.0.1:{port}",)) as (client, _):
        process = subprocess.Popen(
            [sys.executable, "-m", "streamlit", "run", "app/main.py", f"--server.port={port}", *FLAGS],
            cwd=ROOT,
            env={"HAR_URL": str(client.base_url), "APP_RUNS_DIR": str(root / "runs"), "PATH": "/usr/bin:/bin"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
            while True:
                try:
                    httpx.get(f"{url}/_stcore/health").raise_for_status()
                    break
                except httpx.HTTPError:
                    assert time.monotonic() < end and process.poll() is None, "the app doesn't start"
                    time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            written = process.communicate(timeout=30)[1]
        assert b"Traceback" not in written, written.decode()


def open_watched(browser: Browser, width_px: int, scheme: Any = "light") -> tuple[Page, list[str]]:
    """Return a page, and what goes wrong in it: errors in the console, requests to other hosts."""
    page, wrong = browser.new_page(viewport={"width": width_px, "height": 900}, color_scheme=scheme), []
    # Streamlit looks beside a page's address for its own files first, and then where they are.
    page.on(
        "console",
        lambda message: (
            wrong.append(f"{message.text} {message.location}")
            if message.type == "error" and "_stcore" not in str(message.location)
            else None
        ),
    )
    page.on("pageerror", lambda error: wrong.append(str(error)))
    local = ("http://127.0.0.1", "ws://127.0.0.1", "file:", "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(local) else wrong.append(request.url))
    return page, wrong


def settle(page: Page) -> None:
    """Until the app has drawn all that it has to say."""
    page.wait_for_selector("h1", timeout=60_000)
    page.wait_for_timeout(300)
    expect(page.get_by_test_id("stSpinner")).to_have_count(0, timeout=60_000)
    expect(page.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning", timeout=60_000)


def check_access(page: Page) -> None:
    """No violation that keeps people out."""
    found = Axe().run(page).response["violations"]
    bad = [
        f"{one['id']}: {one['help']}: {[node['html'][:160] for node in one['nodes']]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("width_px", WIDTHS_PX)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits_and_lets_everyone_in(browser: Browser, app: str, width_px: int, scheme: str) -> None:
    page, wrong = open_watched(browser, width_px, scheme)
    for name in PAGES:
        page.goto(f"{app}/{name}")
        settle(page)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name}: wider than the window"
        check_access(page)
        missing = page.evaluate("[...document.images].filter(i => !i.alt).length")
        assert not missing, f"{name}: pictures without an alternative text"
    assert not wrong
    page.close()


def photo(seed: int) -> FilePayload:
    path = Path("/tmp") / f"clip_har_jax_photo_{seed}.png"
    content = write_image(path, seed).read_bytes()
    path.unlink()
    return {"name": f"photo_{seed}.png", "mimeType": "image/png", "buffer": content}


def test_a_picture_is_uploaded_and_answered(browser: Browser, app: str) -> None:
    page, wrong = open_watched(browser, 1440)
    page.goto(app)
    settle(page)
    page.get_by_text("Upload", exact=True).click()
    settle(page)
    page.locator("input[type=file]").set_input_files(photo(1))
    expect(page.get_by_role("status").filter(has_text="sure").first).to_be_visible(timeout=30_000)
    expect(page.get_by_alt_text("marked warm")).to_be_visible(timeout=30_000)
    bad: FilePayload = {"name": "bad.png", "mimeType": "image/png", "buffer": b"no picture"}
    page.locator("input[type=file]").set_input_files(bad)
    expect(page.get_by_text("no picture, or a damaged one")).to_be_visible(timeout=30_000)
    assert not wrong
    page.close()


def test_own_words_are_told_apart_by_keyboard_alone(browser: Browser, app: str) -> None:
    page, wrong = open_watched(browser, 1440)
    page.goto(f"{app}/vocabulary")
    settle(page)
    page.get_by_label("Actions, one on each line").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("juggling\nclimbing a tree")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".bars").get_by_text("climbing a tree")).to_be_visible(timeout=30_000)
    expect(page.locator(".bars li")).to_have_count(2)
    assert not wrong
    page.close()


def test_a_video_has_its_timeline(browser: Browser, app: str) -> None:
    page, wrong = open_watched(browser, 1440)
    page.goto(f"{app}/video")
    settle(page)
    page.get_by_text("Upload", exact=True).click()
    settle(page)
    clip = (ROOT / "app" / "samples" / "actions.mp4").read_bytes()
    page.locator("input[type=file]").set_input_files({"name": "a.mp4", "mimeType": "video/mp4", "buffer": clip})
    expect(page.get_by_text("Download as CSV")).to_be_visible(timeout=60_000)
    settle(page)
    player, second = page.locator("video"), "element => element.currentTime"
    assert player.evaluate(second) == 0
    area = page.locator(".js-plotly-plot .nsewdrag").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    assert box is not None
    place: Position = {"x": box["width"] * 0.7, "y": box["height"] / 2}
    area.hover(position=place)
    area.click(position=place)
    with av.open(io.BytesIO(clip), "r") as container:
        expected = int(0.7 * float(container.duration or 0) / av.time_base)
    page.wait_for_function("() => document.querySelector('video').currentTime > 0")
    settle(page)
    assert abs(player.evaluate(second) - expected) <= 1, "a click on the timeline jumps there in the video"
    moment = page.get_by_role("button", name=re.compile("Play from")).last
    told = re.search(r"(\d+):(\d+)", moment.inner_text())
    assert told is not None
    for _ in range(2):  # again after the video went on
        moment.click()
        page.wait_for_function(
            "second => document.querySelector('video')?.currentTime === second", arg=60 * int(told[1]) + int(told[2])
        )
        settle(page)
        player.evaluate("element => { element.currentTime = 1 }")
    bad: FilePayload = {"name": "bad.mp4", "mimeType": "video/mp4", "buffer": b"no video"}
    page.locator("input[type=file]").set_input_files(bad)
    expect(page.get_by_text("holds no pictures, or is damaged")).to_be_visible(timeout=30_000)
    assert not wrong
    page.close()


def test_what_the_camera_sees_is_told_as_it_happens(browser: Browser, app: str) -> None:
    page, wrong = open_watched(browser, 375)
    page.goto(f"{app}/video")
    settle(page)
    page.get_by_text("Camera", exact=True).click()
    settle(page)
    frame = page.frame_locator("iframe")
    frame.get_by_role("button", name="Start the camera").click()
    expect(frame.locator("#now")).to_have_text(re.compile("sure"), timeout=30_000)
    frame.get_by_role("button", name="Stop the camera").click()
    expect(frame.locator("#now")).to_have_text("")
    assert not wrong
    page.close()


def test_the_camera_follows_several_actions_by_windows(browser: Browser, served_folder: Path, tmp_path: Path) -> None:
    """A window is answered once for several frames; each action keeps its row until its end."""
    query = "window_s=1.6&hop_s=0.4&start_score=0&end_score=0&min_duration_s=0"
    html = (ROOT / "app/camera.html").read_text()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as files, ExitStack() as stack:
        Thread(target=files.serve_forever).start()
        stack.callback(files.shutdown)
        origin = f"http://127.0.0.1:{files.server_port}"
        client, _ = stack.enter_context(running(served_folder, allowed_origins=(origin,)))
        address = f"ws://127.0.0.1:{client.base_url.port}/v1/stream?{query}"
        (tmp_path / "camera.html").write_text(html.replace("ADDRESS", json.dumps(address), 1))
        (tmp_path / "favicon.ico").touch()
        page, wrong = open_watched(browser, 375)
        page.goto(f"{origin}/camera.html")
        page.get_by_role("button", name="Start the camera").click()
        rows = page.locator("#events li")
        expect(rows.nth(len(LABELS) - 1)).to_have_text(re.compile(" s to "), timeout=30_000)
        assert {text.partition(":")[0] for text in rows.all_inner_texts()[: len(LABELS)]} == set(LABELS)
        page.evaluate("() => { window.canvas = HTMLCanvasElement.prototype; window.take = canvas.toBlob; }")
        page.evaluate("() => { canvas.toBlob = () => 0; }")
        page.wait_for_timeout(2500)  # longer than a window: all actions end
        page.evaluate("() => { canvas.toBlob = take; }")
        for i in range(len(LABELS)):
            expect(rows.nth(i)).to_have_text(re.compile(r": [\d.]+ s to [\d.]+ s$"), timeout=30_000)
        page.get_by_role("button", name="Stop the camera").click()
        assert not wrong
        page.close()


def test_a_zip_becomes_a_table_that_is_downloaded(browser: Browser, app: str) -> None:
    page, wrong = open_watched(browser, 1440)
    page.goto(f"{app}/batch")
    settle(page)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i in range(3):
            archive.writestr(f"folder/{i}.png", photo(i)["buffer"])
        archive.writestr("folder/broken.png", b"no picture")
        archive.writestr("folder/notes.txt", b"junk")
    given: FilePayload = {"name": "photos.zip", "mimeType": "application/zip", "buffer": buffer.getvalue()}
    page.locator("input[type=file]").set_input_files(given)
    button = page.get_by_role("button", name="Download as JSON")
    expect(button).to_be_visible(timeout=60_000)
    with page.expect_download() as download:
        button.click()
    rows = json.loads(Path(download.value.path()).read_text())
    assert [row["file"] for row in rows] == ["folder/0.png", "folder/1.png", "folder/2.png", "folder/broken.png"]
    assert all(row["action"] in LABELS for row in rows[:3])
    assert "damaged" in rows[3]["note"]
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("../notes.txt", b"junk")
    page.locator("input[type=file]").set_input_files({**given, "buffer": buffer.getvalue()})
    expect(page.get_by_text("whose name leads out of the zip")).to_be_visible(timeout=30_000)
    assert not wrong
    page.close()


@pytest.mark.parametrize("width_px", WIDTHS_PX)
def test_the_report_needs_no_other_host(browser: Browser, tmp_path: Path, width_px: int) -> None:
    model = write_model(tmp_path / "model", LABELS)
    images = write_images(tmp_path / "images", LABELS, per_class=4)
    evaluate_model(str(model), f"folder:{images}", tmp_path / "out")
    page, wrong = open_watched(browser, width_px, "dark" if width_px < 1000 else "light")
    page.goto(f"file://{tmp_path}/out/report.html")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    check_access(page)
    table = page.locator("#actions table")
    table.get_by_role("button", name="recall").click()
    values = [float(text) for text in table.locator("tbody tr td:nth-child(5)").all_inner_texts()]
    assert values == sorted(values) and len(values) == len(LABELS)
    page.get_by_label("percent of the row").check()
    expect(page.locator(".counts")).to_be_hidden()
    assert np.isfinite(values).all()
    assert not wrong
    page.close()
