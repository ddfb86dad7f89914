"""Take the documentation's pictures of the real app and a real report, with the embedded action set.

  python scripts/train.py --config=configs/demo.py --workdir=runs/demo
  python -m export --model=runs/demo/model --formats=onnx,onnx_int8 --output=runs/demo/export
  python scripts/evaluate.py --model=runs/demo/model --data=synthetic --output=runs/demo/test
  python scripts/screenshots.py --run=runs/demo --output=docs/images

Needs Chromium and the packages of the extras `app`, `dev` and `serving`. Exits 0 when done, 2 on a mistake.
"""

import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clip_har_jax import cli
from clip_har_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
WIDTHS_PX = (1440, 375)
MAX_BYTES = 150_000
MAX_HEIGHT_PX = 1900
PAGES = {"try-it": "", **{name: name for name in ("video", "vocabulary", "batch", "compare", "runs", "about")}}
REPORT_PARTS = {"top": "body", "calibration": "#sure", "examples": "#examples", "training": "#training"}


@contextmanager
def running_app(run: Path) -> Iterator[str]:
    """Run the app with a run's export; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--server.port={port}", "--server.headless=true", "--server.address=127.0.0.1"]
    environment = {
        **os.environ,
        "APP_MODEL": str((run / "export").resolve()),
        "APP_RUNS_DIR": str(run.parent.resolve()),
    }
    environment.pop("HAR_URL", None)
    app = subprocess.Popen(
        [sys.executable, "-m", "streamlit", "run", "app/main.py", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        app.terminate()
        app.wait(30)


def wait_for_app(page: Any) -> None:
    """Wait until the app has rendered its page."""
    page.wait_for_selector("h1", timeout=90_000)
    page.wait_for_timeout(500)
    page.wait_for_selector('[data-testid="stApp"][data-test-script-state="notRunning"]', timeout=90_000)
    page.wait_for_timeout(1000)


def save(picture: bytes, path: Path) -> None:
    """Write a picture with few colours, to keep it small."""
    from PIL import Image

    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image = image.crop((0, 0, image.width, min(image.height, MAX_HEIGHT_PX)))
    for colors in (256, 128, 64, 32):
        buffer = io.BytesIO()
        image.quantize(colors, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        if len(buffer.getvalue()) <= MAX_BYTES:
            break
    path.write_bytes(buffer.getvalue())
    print(f"{path}: {len(buffer.getvalue()) / 1000:.0f} kB", flush=True)


def take_app(browser: Any, url: str, output: Path, width_px: int, scheme: str, pages: dict[str, str]) -> None:
    """Take a picture of each page at its full height."""
    suffix = f"{width_px}{'-dark' if scheme == 'dark' else ''}"
    page = browser.new_page(viewport={"width": width_px, "height": 900}, color_scheme=scheme)
    for name, path in pages.items():
        page.goto(f"{url}/{path}")
        wait_for_app(page)
        if name == "batch":
            page.get_by_role("button", name="Use the sample pictures").click()
            page.wait_for_selector('[data-testid="stDataFrame"]', timeout=60_000)
            wait_for_app(page)
        height = page.evaluate("document.querySelector('[data-testid=stMainBlockContainer]').scrollHeight")
        page.set_viewport_size({"width": width_px, "height": max(700, min(height, MAX_HEIGHT_PX))})
        page.wait_for_timeout(1000)
        save(page.screenshot(), output / f"app-{name}-{suffix}.png")
        page.set_viewport_size({"width": width_px, "height": 900})
    page.close()


def take_report(browser: Any, report: Path, output: Path, width_px: int, scheme: str) -> None:
    """Take pictures of the report's parts."""
    suffix = f"{width_px}{'-dark' if scheme == 'dark' else ''}"
    page = browser.new_page(viewport={"width": width_px, "height": 1000}, color_scheme=scheme)
    page.goto(report.resolve().as_uri())
    for name, selector in REPORT_PARTS.items():
        picture = page.screenshot() if selector == "body" else page.locator(selector).screenshot()
        save(picture, output / f"report-{name}-{suffix}.png")
    page.close()


def main() -> int:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/demo"), metavar="DIR", help="e.g. --run=runs/demo (default)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("docs/images"), metavar="DIR", help="e.g. --output=docs/images (default)"
    )
    arguments = parser.parse_args()
    needed = (arguments.run / "export" / "signature.json", arguments.run / "test" / "report.html")
    if missing := [path for path in needed if not path.is_file()]:
        raise UserError(f"{missing[0]}: isn't there; run the commands that --help shows first")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise UserError("no Chromium on this machine; install it, e.g. apt-get install chromium")

    from playwright.sync_api import sync_playwright

    arguments.output.mkdir(parents=True, exist_ok=True)
    with running_app(arguments.run) as url, sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        for width_px in WIDTHS_PX:
            take_app(browser, url, arguments.output, width_px, "light", PAGES)
            take_report(browser, needed[1], arguments.output, width_px, "light")
        take_app(browser, url, arguments.output, WIDTHS_PX[0], "dark", {"try-it": ""})
        take_report(browser, needed[1], arguments.output, WIDTHS_PX[0], "dark")
        browser.close()
    return 0


if __name__ == "__main__":
    cli.run(main)
