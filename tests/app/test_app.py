"""The app's pages against a running service: what they show, and the sentence that every mistake gets."""

import gzip
import io
import json
import os
import stat
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

from app import archive, main, own_service, video_frames, widgets
from app.client import AppClient, Trouble
from clip_har_jax.image_formats import IMAGE_SUFFIXES
from clip_har_jax.listing import SYSTEM_FILES, SYSTEM_FOLDERS
from serving.schemas import Answer, Scored
from tests.support.serving_setup import LABELS, running

APP = Path(__file__).parents[2] / "app"
PAGES = [name for name, _, _ in main.PAGES]
SCRIPT = """
import runpy
from app import main
main.show("{page}", lambda: runpy.run_path("{path}"), "{page}" not in main.WITHOUT_SERVICE)
"""


@pytest.fixture(scope="module")
def service(served_folder: Path) -> Iterator[str]:
    with running(served_folder, max_classes=50) as (client, _):
        yield str(client.base_url)


@pytest.fixture
def open_page(service: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], AppTest]:
    monkeypatch.setenv("HAR_URL", service)
    monkeypatch.setenv("APP_RUNS_DIR", str(tmp_path))
    return lambda page: run(AppTest.from_string(SCRIPT.format(page=page, path=APP / "views" / f"{page}.py")))


def run(page: AppTest) -> AppTest:
    page.run(timeout=60)
    assert not page.exception, page.exception
    return page


def errors(page: AppTest) -> str:
    return " ".join(error.value for error in page.error)


def picture(size: tuple[int, int] = (64, 48), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def flat(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", [name for name in PAGES if name != "runs"])
def test_each_page_shows_without_a_mistake(open_page: Callable[[str], AppTest], name: str) -> None:
    page = open_page(name)
    assert len(page.title) == 1
    assert not page.error


@pytest.mark.parametrize("name", [name for name in PAGES if name != "runs"])
def test_each_page_says_what_helps_when_the_service_is_gone(
    open_page: Callable[[str], AppTest], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HAR_URL", "http://127.0.0.1:9")
    page = open_page(name)
    assert "doesn't answer" in errors(page)
    assert "python -m serving" in errors(page)
    assert [button.label for button in page.button] == ["Try again"]


def test_the_service_may_go_in_the_middle(open_page: Callable[[str], AppTest], service: str) -> None:
    page = open_page("try_it")
    page.session_state["service"] = AppClient("http://127.0.0.1:9")
    assert "doesn't answer" in errors(run(page))
    page.session_state["service"] = AppClient(service)
    assert not errors(run(page))


def test_without_a_model_the_commands_that_make_one_are_shown(
    open_page: Callable[[str], AppTest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HAR_URL")
    monkeypatch.setenv("APP_MODEL", str(tmp_path / "none"))
    main.own_url.clear()
    page = open_page("try_it")
    assert "There is no model at" in errors(page)
    assert "python -m export" in page.code[0].value


def test_a_service_of_its_own_is_started_and_started_again_when_it_ended(
    open_page: Callable[[str], AppTest], monkeypatch: pytest.MonkeyPatch, served_folder: Path
) -> None:
    monkeypatch.delenv("HAR_URL")
    monkeypatch.setenv("APP_MODEL", str(served_folder))
    started: list[subprocess.Popen[str]] = []
    original = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(original(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    main.own_url.clear()
    try:
        page = open_page("about")
        assert not page.error
        started[0].kill()
        started[0].wait()
        assert "doesn't answer" in errors(run(page))
        page.button[0].click()
        assert not errors(run(page))
        assert len(started) == 2
    finally:
        main.own_url.clear()
        for process in started:
            process.kill()
            process.wait()


def test_the_apps_own_service_stays_on_loopback(served_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says: it has no key."""
    for name, value in (
        ("APP_MODEL", str(served_folder)),
        ("HAR_HOST", "0.0.0.0"),
        ("HAR_API_KEYS", "a:use:" + "0" * 64),
    ):
        monkeypatch.setenv(name, value)
    before = set(psutil.Process().children())
    url = own_service.start()
    (process,) = set(psutil.Process().children()) - before
    try:
        assert {one.laddr.ip for one in process.net_connections() if one.status == "LISTEN"} == {"127.0.0.1"}
        assert AppClient(url).models().models
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize(("score", "told"), [(0.999, "over 99%"), (0.001, "under 1%"), (0.555, "56%")])
def test_no_answer_claims_to_be_certain(score: float, told: str) -> None:
    assert widgets.percent(score) == told


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "empty"),
        (b"not a picture", "no picture, or a damaged one"),
        (picture()[:900], "no picture, or a damaged one"),
        (picture(kind="ICO"), "no JPEG, PNG or WebP"),
        (b"\xff\xd8" + bytes(50_000_000), "50 MB"),
        (flat((5200, 5000)), "over 25 megapixels"),
    ],
)
def test_a_bad_picture_gets_a_sentence(content: bytes, sentence: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Trouble, match=sentence):
            widgets.check_picture(content, "a.jpg").load()


def test_pictures_of_all_kinds_are_shown() -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        assert widgets.check_picture(picture(kind=kind), "a").size == (64, 48)


def test_own_words_change_the_result_and_are_checked(open_page: Callable[[str], AppTest]) -> None:
    page = open_page("vocabulary")
    assert not page.error
    for text, sentence in (
        ("", "two actions or more"),
        ("running", "two actions or more"),
        ("running\nrunning", "there twice"),
        ("\n".join(f"action {i}" for i in range(201)), "201 actions are too many; 200"),
        ("\n".join(f"action {i}" for i in range(200)), "too many"),  # this service takes 50
    ):
        page.text_area(key="actions").set_value(text)
        assert sentence in errors(run(page))
    page.text_area(key="actions").set_value("jumping\nflying: a photo of a person in the air; a person with wings")
    assert not errors(run(page))


def test_a_set_of_words_is_saved_to_the_service(open_page: Callable[[str], AppTest], service: str) -> None:
    page = open_page("vocabulary")
    page.text_area(key="actions").set_value("running\njumping high")
    run(page)
    next(button for button in page.button if "Save" in button.label).click()
    assert "tells these 2 actions apart" in run(page).success[0].value
    client = AppClient(service)

    def known() -> set[str]:
        (model,) = client.models().models
        return set(next(version.labels for version in model.versions if version.version == model.active))

    assert known() == {"running", "jumping high"}
    next(button for button in page.button if "Back" in button.label).click()
    assert "its own actions" in run(page).success[0].value
    assert known() == set(LABELS)
    assert not [button for button in run(page).button if "Back" in button.label]


def test_two_models_are_compared(served_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(served_folder, models={"other": served_folder}) as (client, _):
        monkeypatch.setenv("HAR_URL", str(client.base_url))
        page = run(AppTest.from_string(SCRIPT.format(page="compare", path=APP / "views" / "compare.py")))
    assert [box.index for box in page.selectbox] == [0, 1]
    assert "Both name the same action." in [info.value for info in page.info]


def zipped(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_a_zip_with_folders_and_junk_gives_its_pictures() -> None:
    good = picture()
    content = zipped(
        {
            "a/": b"",
            "a/one.png": good,
            "two.PNG": good,
            "b\\three.jpg": good,
            "__MACOSX/._one.png": b"junk",
            "a/.DS_Store": b"junk",
            "a/@eaDir/one.png": good,
            "Thumbs.db": b"junk",
            "notes.txt": b"junk",
            "b/shot.HEIC": b"not read by this service",
            "inner.zip": b"not looked into",
            "README": b"",
            "large.png": bytes(30_000_000),
        }
    )
    pictures = archive.unpack("a.zip", content)
    assert pictures.left_out == {".txt": 1, ".heic": 1, ".zip": 1, "no suffix": 1}
    found = dict(pictures)
    assert set(found) == {"a/one.png", "two.PNG", "b\\three.jpg", "large.png"}
    assert found["a/one.png"] == good
    assert len(found["large.png"]) == archive.MAX_PICTURE_BYTES + 1  # and not more of it is read


def test_pictures_and_system_files_are_those_of_training() -> None:
    assert set(archive.EVERY_SERVICE) <= IMAGE_SUFFIXES
    assert set(SYSTEM_FOLDERS + SYSTEM_FILES) >= set(archive.SYSTEM_NAMES)


def with_entry(**fields: Any) -> bytes:
    """Return a zip whose one entry is unusual."""
    buffer, entry = io.BytesIO(), zipfile.ZipInfo("a.png")
    for name, value in fields.items():
        setattr(entry, name, value)
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr(entry, b"x" * 1000)
    return buffer.getvalue()


def damaged(content: bytes, at: int) -> bytes:
    return content[:at] + bytes(255 - byte for byte in content[at : at + 2]) + content[at + 2 :]


def marked_encrypted() -> bytes:
    content = bytearray(zipped({"a.png": picture()}))
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"PK\x03\x04 no zip", "damaged zip"),
        (b"", "damaged zip"),
        (b"7z\xbc\xaf'\x1c" + bytes(100), "is a 7z archive, not a zip"),
        (gzip.compress(b"tar", mtime=0), "is a gzip archive, not a zip"),
        (zipped({"a.png": picture()})[:-30], "damaged zip"),
        (damaged(zipped({"a.png": picture()}), 300), "damaged zip"),
        (damaged(zipped({"a.png": bytes(100_000)}), 45), "damaged zip"),
        (zipped({f"{i}.jpg": b"x" for i in range(501)}), "501 pictures; 500"),
        (zipped({f"{i}.txt": b"" for i in range(40_000)}), "too many files"),
        (zipped({"/".join("a" * 20) + ".png": b"x"}), "over 16 deep"),
        (zipped({"../../two.png": b"x"}), "leads out"),
        (zipped({"/etc/two.png": b"x"}), "leads out"),
        (zipped({"C:\\two.png": b"x"}), "leads out"),
        (with_entry(external_attr=(stat.S_IFLNK | 0o777) << 16), "a link or a device"),
        (with_entry(external_attr=(stat.S_IFCHR | 0o777) << 16), "a link or a device"),
        (with_entry(compress_type=zipfile.ZIP_LZMA), "isn't read here"),
        (marked_encrypted(), "password"),
        (zipped({f"{i}.png": bytes(11_000_000) for i in range(6)}), "66 MB"),
    ],
)
def test_a_bad_zip_gets_a_sentence(content: bytes, sentence: str) -> None:
    with pytest.raises(Trouble, match=sentence):
        archive.unpack("a.zip", content)


@pytest.mark.parametrize("count", [100, pytest.param(400, marks=pytest.mark.slow)])
def test_a_bomb_is_refused_in_little_memory(tmp_path: Path, count: int) -> None:
    """Up to 4 GB in 4 MB, in a process whose memory is looked at after it."""
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as made:
        for i in range(count):
            made.writestr(f"{i}.png", bytes(11_000_000))
    code = """
import sys
from pathlib import Path
from app.archive import Trouble, unpack
try:
    unpack("bomb.zip", open(sys.argv[1], "rb").read())
except Trouble as trouble:
    print(trouble)
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""
    command = [sys.executable, "-c", code, str(tmp_path / "bomb.zip")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=APP.parent)
    told, peak_kb = done.stdout.splitlines()
    assert f"would unpack to {11 * count} MB" in told and int(peak_kb) < 200_000


def test_the_app_listens_on_loopback_unless_asked_otherwise(tmp_path: Path) -> None:
    """By the settings beside it, from any folder; the address that it prints is of this machine alone."""
    script = str(APP / "main.py")
    command = [sys.executable, "-m", "streamlit", "run", script, "--server.port=0", "--server.headless=true"]
    environment = {**os.environ, "HAR_URL": "http://127.0.0.1:9", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = ""
        while "URL" not in told and process.poll() is None:
            told += process.stdout.readline()
        listening = {one.laddr.ip for one in psutil.Process(process.pid).net_connections() if one.status == "LISTEN"}
        process.terminate()
        told += process.stdout.read()
    assert "localhost" in told and "Network URL" not in told and "External URL" not in told
    assert listening <= {"127.0.0.1", "::1"} and listening


@pytest.mark.parametrize(
    ("address", "open_to_all"), [("localhost", False), ("127.0.0.1", False), ("0.0.0.0", True), ("", True)]
)
def test_a_page_open_to_others_says_that_it_has_no_key(
    monkeypatch: pytest.MonkeyPatch, address: str, open_to_all: bool
) -> None:
    monkeypatch.setattr(main.st, "get_option", lambda name: address)
    assert ("it has no key" in (main.open_to_others() or "")) == open_to_all


def test_many_pictures_get_a_table(open_page: Callable[[str], AppTest]) -> None:
    page = open_page("batch")
    page.button[0].click()
    table = run(page).dataframe[0].value
    assert len(table) == len(list(widgets.SAMPLES.glob("*.jpg"))) == 8
    assert set(table["action"]) <= set(LABELS)
    page.multiselect(key="batch_filter").select(table["action"][0])
    assert set(run(page).dataframe[0].value["action"]) == {table["action"][0]}


def test_a_run_shows_its_curves_and_settings(open_page: Callable[[str], AppTest], tmp_path: Path) -> None:
    assert "There are no runs" in errors(open_page("runs"))
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = [json.dumps({"step": i, "train/loss": 1 / (i + 1), "val/nll": 0.5}) for i in range(3)]
    (folder / "metrics.jsonl").write_text("\n".join([*rows, '{"step": 3, "tr']))  # of a run that goes on
    (folder / "config.json").write_text("{damaged")
    (folder / "run.json").write_text('{"started": "2026-11-07T09:05:00+01:00", "last_step": 2, "num_steps": 9}')
    page = open_page("runs")
    assert not page.error
    assert "Started on 7 November 2026 at 08:05 UTC · step 2 of 9" in page.caption[0].value
    assert any("training 0.333" in caption.value for caption in page.caption)
    assert "scripts/evaluate.py" in page.info[0].value


def test_an_answer_that_is_no_services_is_told(open_page: Callable[[str], AppTest], tmp_path: Path) -> None:
    import http.server
    import threading

    handler = http.server.SimpleHTTPRequestHandler
    handler.log_message = lambda *_: None  # type: ignore[method-assign]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(Trouble, match=r"isn't the service .status 404.*HAR_URL"):
            AppClient(f"http://127.0.0.1:{server.server_port}").models()
        server.shutdown()


def test_a_missing_key_is_told(tmp_path: Path) -> None:
    key_line = "alice:use:" + "0" * 64
    with running(None, wait=False, api_keys=key_line) as (client, _), pytest.raises(Trouble, match="HAR_KEY"):
        AppClient(str(client.base_url)).models()


def test_moments_of_a_video() -> None:
    assert video_frames.frame_at(b"no video", 0.0) is None
    frame = video_frames.frame_at((widgets.SAMPLES / "actions.mp4").read_bytes(), 5.0)
    assert frame is not None and frame.size == (384, 384)
    assert video_frames.clock(61.25) == "1:01.2"


def test_an_answer_of_several_labels_names_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(widgets.st, "html", shown.append)
    top = [
        Scored(label=label, score=score) for label, score in (("using_phone", 0.9), ("sitting", 0.6), ("running", 0.1))
    ]
    widgets.show_answer(Answer(label="using_phone", score=0.9, top=top, abstained=False, labels=top[:2]))
    assert "using phone, sitting" in shown[0]
    assert f"{widgets.percent(0.9)}, {widgets.percent(0.6)}" in shown[0]
    assert "running" not in shown[0]
    assert "running" in shown[1]  # among the bars
    widgets.show_answer(Answer(label=None, score=0.1, top=top, abstained=True, labels=[]))
    assert "Not sure" in shown[2]
