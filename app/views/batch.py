"""Batch: many pictures at once."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

import pandas as pd
import streamlit as st

from app import widgets
from app.archive import MAX_PICTURES, unpack
from app.client import Trouble

AT_ONCE = 16
MAX_UPLOAD_MB = 100  # per file, as in app/.streamlit/config.toml
ROW_PX = 72
RowAndPicture = tuple[dict[str, object], bytes]


def answer_all(pictures: Sequence[tuple[str, bytes]]) -> list[dict[str, object]]:
    """Return one row per picture."""
    rows: list[dict[str, object]] = []
    progress = st.progress(0.0, f"0 of {len(pictures)} pictures")
    for start in range(0, len(pictures), AT_ONCE):
        rows += _answer(pictures[start : start + AT_ONCE])
        progress.progress(len(rows) / len(pictures), f"{len(rows)} of {len(pictures)} pictures")
    progress.empty()
    return rows


def _answer(pictures: Sequence[tuple[str, bytes]]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    good: list[RowAndPicture] = []
    for name, content in pictures:
        row: dict[str, object] = {"picture": None, "file": name, "action": "", "sure": None, "note": ""}
        try:
            row["picture"] = widgets.thumbnail(widgets.check_picture(content, PurePosixPath(name).name))
            good.append((row, content))
        except Trouble as trouble:
            row["note"] = str(trouble)
        rows.append(row)
    for part in _within(good, widgets.limits().max_image_bytes):
        answers = widgets.service().predict_batch([content for _, content in part]).predictions
        for (row, _), answer in zip(part, answers, strict=True):
            if answer.error is not None:
                row["note"] = f"The service can't read it: {answer.error.detail}"
            elif answer.top:
                row |= {"action": widgets.words(answer.top[0].label), "sure": answer.top[0].score}
                row["note"] = "not sure" if answer.abstained else ""
    return rows


def _within(good: list[RowAndPicture], most_bytes: int) -> list[list[RowAndPicture]]:
    """Split pictures into parts that fit into one request each."""
    parts: list[list[RowAndPicture]] = []
    size = 0
    for one in good:
        if not parts or size + len(one[1]) > most_bytes:
            parts.append([])
            size = 0
        parts[-1].append(one)
        size += len(one[1]) + 1000  # of the form's headers
    return parts


def show(rows: list[dict[str, object]]) -> None:
    """Show the table, its filter and its downloads."""
    table = pd.DataFrame(rows)
    told = sorted({str(action) for action in table["action"] if action})
    wanted = st.multiselect("Show only", told, placeholder="all actions", key="batch_filter")
    unsure = st.toggle("Only those that need a look", help="not sure, or can't be read", key="batch_unsure")
    shown = table[table["action"].isin(wanted)] if wanted else table
    shown = shown[shown["note"] != ""] if unsure else shown
    st.dataframe(
        shown,
        hide_index=True,
        row_height=ROW_PX,
        height=ROW_PX * min(len(shown), 8) + 40,
        alt=f"{len(shown)} pictures with their actions",
        column_config={
            "picture": st.column_config.ImageColumn("picture", width="small"),
            "sure": st.column_config.ProgressColumn("how sure", min_value=0, max_value=1, format="percent"),
        },
    )
    plain = shown.drop(columns="picture")
    one, two = st.columns(2)
    one.download_button("Download as CSV", plain.to_csv(index=False), "actions.csv", "text/csv", width="stretch")
    as_json = json.dumps(plain.astype(object).where(plain.notna(), None).to_dict("records"), indent=1)
    two.download_button("Download as JSON", as_json, "actions.json", "application/json", width="stretch")


st.title("Many pictures at once")
st.write("Give pictures, or a zip of them. Every one gets its action, in a table that you can filter and download.")
files = st.file_uploader(
    f"Pictures ({widgets.kinds()}), or a zip of them",
    [*widgets.suffixes(), "zip"],
    accept_multiple_files=True,
    key="batch_files",
    max_upload_size=MAX_UPLOAD_MB,
)
samples = st.button("Use the sample pictures", icon=":material/photo_library:")
if samples:
    chosen = [(path.name, path.read_bytes()) for path in sorted(widgets.SAMPLES.glob("*.jpg"))]
    st.session_state.batch_rows, st.session_state.batch_left_out = answer_all(chosen), Counter()
    st.session_state.batch_of = None
elif files and st.session_state.get("batch_of") != [file.file_id for file in files]:
    try:
        endings = tuple(f".{suffix}" for suffix in widgets.suffixes())
        zips = [unpack(file.name, file.getvalue(), endings) for file in files if file.name.lower().endswith(".zip")]
        loose = [(file.name, file.getvalue()) for file in files if not file.name.lower().endswith(".zip")]
        count = len(loose) + sum(map(len, zips))
        if not count:
            raise Trouble(f"There is no {widgets.kinds()} picture in it. Choose another file.")
        if count > MAX_PICTURES:
            raise Trouble(f"{count} pictures are too many; {MAX_PICTURES} or fewer can be done at once.")
        left_out = sum((Counter(one.left_out) for one in zips), Counter[str]())
        rows = [row for pictures in (loose, *zips) if pictures for row in answer_all(pictures)]
        st.session_state.batch_rows, st.session_state.batch_left_out = rows, left_out
        st.session_state.batch_of = [file.file_id for file in files]
    except Trouble as trouble:
        st.session_state.pop("batch_rows", None)
        st.error(str(trouble), icon=":material/error:")
if st.session_state.get("batch_rows"):
    if left_out := st.session_state.batch_left_out:
        told = ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common())
        st.caption(f"Left out, as they are no {widgets.kinds()}: {told}.")
    show(st.session_state.batch_rows)
