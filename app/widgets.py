"""Parts shared by several pages: checked pictures, answers as bars, the model and its accuracy."""

import base64
import html
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import streamlit as st
from PIL import Image, ImageOps

from app.client import AppClient, Trouble
from serving.schemas import Answer, ImageKind, Limits, ModelVersion, Scored

SAMPLES = Path(__file__).parent / "samples"

STYLE = """<style>
.block-container { padding-top: 3.5rem; max-width: 72rem; }
.answer { margin: 0 0 .5rem; } .answer .what { font-size: 1.9rem; font-weight: 650; line-height: 1.2; }
.answer .sure { opacity: .8; }
.bars { list-style: none; margin: 0 !important; padding: 0 !important; }
.bars li { margin: 0 0 .6rem !important; padding: 0; }
.bars .line { display: flex; justify-content: space-between; gap: 1rem; }
.bars .line span:last-child { font-variant-numeric: tabular-nums; }
.bars .track { height: .6rem; border-radius: .3rem; background: color-mix(in srgb, currentColor 14%, transparent); }
.bars .fill { height: 100%; border-radius: .3rem; background: #3b82d6; min-width: 2px; }
[data-testid="stCaptionContainer"], [data-testid="stCaptionContainer"] p { color: inherit !important; opacity: .9; }
.legend { display: flex; gap: .6rem; align-items: center; font-size: .9rem; }
.legend .scale { flex: 1; height: .7rem; border-radius: .35rem; min-width: 4rem;
  background: linear-gradient(90deg, rgb(45, 45, 45), rgb(179, 105, 89)); }
.bars .first .line { font-weight: 650; } .bars .unsure .fill { background: #8a94a3; }
</style>"""


def service() -> AppClient:
    """Return the service for this visitor."""
    return st.session_state.service


def limits() -> Limits:
    """Return the limits of the service."""
    return st.session_state.get("limits") or Limits()


def formats() -> list[ImageKind]:
    """Return the picture formats that the service and this page can read."""
    Image.init()
    return [kind for kind in limits().image_formats if kind.name in Image.OPEN]


def suffixes() -> list[str]:
    """Return the suffixes of these formats, without dots."""
    return [suffix for kind in formats() for suffix in kind.suffixes]


def kinds() -> str:
    """Return the names of these formats."""
    titles = list(dict.fromkeys(kind.title for kind in formats()))
    return f"{', '.join(titles[:-1])} or {titles[-1]}"


def words(label: str) -> str:
    """Return a label for display, without underscores."""
    return label.replace("_", " ")


def percent(score: float) -> str:
    """Return a probability for display; never 100%."""
    return "over 99%" if score > 0.99 else "under 1%" if score < 0.01 else f"{score:.0%}"


def check_picture(content: bytes, name: str) -> Image.Image:
    """Return a picture that can be displayed.

    Raises:
      Trouble: it isn't a picture, or it is too large.
    """
    if not content:
        raise Trouble(f"{name} is empty. Choose another picture.")
    allowed = limits()
    if len(content) > allowed.max_image_bytes:
        size = f"{len(content) / 1e6:.0f} MB, more than {allowed.max_image_bytes / 1e6:g} MB"
        raise Trouble(f"{name} has {size}. Save it smaller and try again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata; decoding errors raise
            image = Image.open(io.BytesIO(content))
            if image.format not in {kind.name for kind in formats()}:
                raise Trouble(f"{name} is no {kinds()} picture. Save it as one and try again.")
            if image.width * image.height > allowed.max_megapixels * 1e6:
                raise Trouble(f"{name} has over {allowed.max_megapixels:g} megapixels. Make it smaller and try again.")
            image.draft("RGB", (1024, 1024))
            return ImageOps.exif_transpose(image).convert("RGB")
    except Trouble:
        raise
    except Exception as error:  # decoders raise many kinds of exceptions
        raise Trouble(f"{name} is no picture, or a damaged one. Choose another ({kinds()}).") from error


def thumbnail(image: Image.Image, size_px: int = 96) -> str:
    """Return a small copy as a data URI, for tables."""
    small = ImageOps.fit(image, (size_px, size_px))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def choose_picture(key: str, camera: bool = True) -> tuple[str, bytes, Image.Image] | None:
    """Let a person choose a picture; None until then. Describe the problem of a bad one."""
    ways = ["Sample", "Upload", *(["Camera"] if camera else [])]
    way = st.segmented_control("Where the picture comes from", ways, default="Sample", required=True, key=f"{key}_way")
    if way == "Upload":
        most_mb = limits().max_image_bytes / 1e6
        told = f"{kinds()}, up to {most_mb:g} MB"
        given = st.file_uploader(f"A picture ({told})", suffixes(), key=f"{key}_file", max_upload_size=round(most_mb))
    elif way == "Camera":
        given = st.camera_input("Take a picture", key=f"{key}_camera")
    else:
        names = sorted(path.stem for path in SAMPLES.glob("*.jpg"))
        chosen = st.pills(
            "Sample pictures", names, default=names[0], required=True, format_func=words, key=f"{key}_pick", wrap=True
        )
        content = (SAMPLES / f"{chosen}.jpg").read_bytes()
        return f"sample: {words(chosen)}", content, check_picture(content, chosen)
    if given is None:
        return None
    try:
        return given.name, given.getvalue(), check_picture(given.getvalue(), given.name)
    except Trouble as trouble:
        st.error(str(trouble), icon=":material/broken_image:")
        return None


def show_answer(answer: Answer) -> None:
    """Show the prediction, of a multi-label model all its labels, or that the model isn't sure enough."""
    best = answer.top[0]
    if answer.labels:  # of a multi-label model
        what = html.escape(", ".join(words(one.label) for one in answer.labels))
        sure = f"Above the limit of each: {', '.join(percent(one.score) for one in answer.labels)}."
    elif answer.abstained:
        what = "Not sure"
        guess = f"<b>{html.escape(words(best.label))}</b>, at {percent(best.score)}"
        sure = f"The best guess would be {guess}. That is below the model's limit for an answer."
    else:
        what, sure = html.escape(words(best.label)), f"The model is {percent(best.score)} sure."
    st.html(f'<div class="answer" role="status"><div class="what">{what}</div><div class="sure">{sure}</div></div>')
    show_bars(answer.top, answer.abstained)


def show_bars(top: Sequence[Scored], unsure: bool = False) -> None:
    """Show probabilities as bars."""
    rows = [
        f'<li class="{"first" if i == 0 else ""}"><div class="line"><span>{html.escape(words(one.label))}</span>'
        f'<span>{percent(one.score)}</span></div><div class="track" aria-hidden="true"><div class="fill" '
        f'style="width:{100 * one.score:.1f}%"></div></div></li>'
        for i, one in enumerate(top)
    ]
    st.html(f'<ol class="bars{" unsure" if unsure else ""}">{"".join(rows)}</ol>')


def show_model(name: str, version: ModelVersion) -> None:
    """Show the model that answered, its training data and its accuracy."""
    told = [f"Model {name}, version {version.version}, knows {len(version.labels)} actions."]
    origin = version.origin
    if origin is not None and origin.trained_on:
        told.append(f"It was trained on {origin.trained_on}.")
    if origin is not None and origin.top1 is not None:
        of = f" of {origin.num_examples:,} pictures" if origin.num_examples else " of the pictures"
        told.append(f"It named {percent(origin.top1)}{of} right that it hadn't learned from ({origin.judged_on}).")
    else:
        told.append("How often it is right isn't recorded.")
    st.caption(" ".join(told))


def show_heat_legend(label: str) -> None:
    """Show the legend of a heat map's colours."""
    st.html(
        '<div class="legend"><span>speaks for nothing</span><span class="scale" aria-hidden="true"></span>'
        f"<span>speaks most for {html.escape(label)}</span></div>"
    )
    st.caption("The model sees the middle square of the picture only.")


def versions() -> dict[str, tuple[str, ModelVersion]]:
    """Return all versions of the service: displayed name -> (model's name, version)."""
    found = {}
    for model in st.session_state.models:
        for version in model.versions:
            active = ", in use" if version.version == model.active else ""
            found[f"{model.name} {version.version} ({version.format}{active})"] = (model.name, version)
    if not found:
        raise Trouble("The service holds no model that is ready. Wait a few seconds and try again.")
    return found


def active_model() -> tuple[str, ModelVersion]:
    """Return the first model's name and its active version."""
    for model in st.session_state.models:
        for version in model.versions:
            if version.version == model.active:
                return model.name, version
    raise Trouble("The service holds no model that is ready. Wait a few seconds and try again.")
