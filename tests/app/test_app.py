"""The app's pages against a running service: what they show, and the sentence that every mistake gets."""

import io
import json
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

from tests.support.serving_setup import LABELS, running, write_export

APP = Path(__file__).parents[2] / "app"
sys.path.insert(0, str(APP))

import archive  # noqa: E402
import clip  # noqa: E402
import main  # noqa: E402
import parts  # noqa: E402
from service import Service, Trouble  # noqa: E402

PAGES = [name for name, _, _ in main.PAGES]
SCRIPT = """
import runpy
import main
main.show("{page}", lambda: runpy.run_path("{path}"), "{page}" not in main.WITHOUT_SERVICE)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[str]:
    with running(folder, max_classes=50) as (client, _):
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


def test_the_app_imports_nothing_of_the_project() -> None:
    for path in APP.rglob("*.py"):
        if path.name != "make_samples.py":
            assert not re.search(r"^\s*(from|import) (clip_har_jax|serving|export)", path.read_text(), re.M), path


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
    page.session_state["service"].url = "gone"
    page.session_state["service"]._client.base_url = "http://127.0.0.1:9"
    assert "doesn't answer" in errors(run(page))
    page.session_state["service"]._client.base_url = service
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
    open_page: Callable[[str], AppTest], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.delenv("HAR_URL")
    monkeypatch.setenv("APP_MODEL", str(folder))
    started = []
    original = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(original(*a, **k)) or started[-1])
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


@pytest.mark.parametrize(("score", "told"), [(0.999, "over 99%"), (0.001, "under 1%"), (0.555, "56%")])
def test_no_answer_claims_to_be_certain(score: float, told: str) -> None:
    assert parts.percent(score) == told


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "empty"),
        (b"not a picture", "no picture, or a damaged one"),
        (picture()[:900], "no picture, or a damaged one"),
        (picture(kind="BMP"), "no JPEG, PNG or WebP"),
        (b"\xff\xd8" + bytes(50_000_000), "50 MB"),
        (flat((5200, 5000)), "over 25 megapixels"),
    ],
)
def test_a_bad_picture_gets_a_sentence(content: bytes, sentence: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Trouble, match=sentence):
            parts.check_picture(content, "a.jpg").load()


def test_pictures_of_all_kinds_are_shown() -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        assert parts.check_picture(picture(kind=kind), "a").size == (64, 48)


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
    client = Service(service)

    def known() -> set[str]:
        (model,) = client.models()
        return set(next(version["labels"] for version in model["versions"] if version["version"] == model["active"]))

    assert known() == {"running", "jumping high"}
    next(button for button in page.button if "Back" in button.label).click()
    assert "its own actions" in run(page).success[0].value
    assert known() == set(LABELS)
    assert not [button for button in run(page).button if "Back" in button.label]


def test_two_models_are_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(folder, models={"other": folder}) as (client, _):
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


def test_a_zip_with_folders_junk_and_tricks_gives_its_pictures() -> None:
    good = picture()
    content = zipped(
        {
            "a/": b"",
            "a/one.png": good,
            "../../two.PNG": good,
            "C:\\three.jpg": good,
            "__MACOSX/._one.png": b"junk",
            "a/.DS_Store": b"junk",
            "notes.txt": b"junk",
            "bomb.png": bytes(30_000_000),
        }
    )
    found = dict(archive.unpack("a.zip", content))
    assert set(found) == {"a/one.png", "../../two.PNG", "C:\\three.jpg", "bomb.png"}
    assert found["a/one.png"] == good
    assert len(found["bomb.png"]) == parts.MAX_IMAGE_BYTES + 1  # and not more of it is read


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"PK\x03\x04 no zip", "damaged zip"),
        (zipped({f"{i}.jpg": b"x" for i in range(501)}), "501 pictures; 500"),
    ],
)
def test_a_bad_zip_gets_a_sentence(content: bytes, sentence: str) -> None:
    with pytest.raises(Trouble, match=sentence):
        archive.unpack("a.zip", content)


def test_many_pictures_get_a_table(open_page: Callable[[str], AppTest]) -> None:
    page = open_page("batch")
    page.button[0].click()
    table = run(page).dataframe[0].value
    assert len(table) == len(list(parts.SAMPLES.glob("*.jpg"))) == 8
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
    (folder / "run.json").write_text('{"started": "today", "last_step": 2, "num_steps": 9}')
    page = open_page("runs")
    assert not page.error
    assert "step 2 of 9" in page.caption[0].value
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
            Service(f"http://127.0.0.1:{server.server_port}").models()
        server.shutdown()


def test_a_missing_key_is_told(tmp_path: Path) -> None:
    key_line = "alice:use:" + "0" * 64
    with running(None, wait=False, api_keys=key_line) as (client, _), pytest.raises(Trouble, match="HAR_KEY"):
        Service(str(client.base_url)).models()


def test_moments_of_a_video() -> None:
    assert clip.frame_at(b"no video", 0.0) is None
    frame = clip.frame_at((parts.SAMPLES / "actions.mp4").read_bytes(), 5.0)
    assert frame is not None and frame.size == (384, 384)
    assert clip.clock(61.25) == "1:01.2"
