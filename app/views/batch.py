"""Batch: many pictures at once."""

import json
from pathlib import PurePosixPath

import pandas as pd
import parts
import streamlit as st
from archive import MAX_PICTURES, unpack
from service import Trouble

AT_ONCE = 16
ROW_PX = 72


def answer_all(pictures: list[tuple[str, bytes]]) -> list[dict[str, object]]:
    """Return a row for each picture."""
    rows: list[dict[str, object]] = []
    progress = st.progress(0.0, f"0 of {len(pictures)} pictures")
    for start in range(0, len(pictures), AT_ONCE):
        rows += _answer(pictures[start : start + AT_ONCE])
        progress.progress(len(rows) / len(pictures), f"{len(rows)} of {len(pictures)} pictures")
    progress.empty()
    return rows


def _answer(pictures: list[tuple[str, bytes]]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    good = []
    for name, content in pictures:
        row: dict[str, object] = {"picture": None, "file": name, "action": "", "sure": None, "note": ""}
        try:
            row["picture"] = parts.thumbnail(parts.check_picture(content, PurePosixPath(name).name))
            good.append((row, (name, content)))
        except Trouble as trouble:
            row["note"] = str(trouble)
        rows.append(row)
    if good:
        answers = parts.service().predict_batch([picture for _, picture in good])
        for (row, _), answer in zip(good, answers, strict=True):
            if answer.get("error"):
                row["note"] = f"The service can't read it: {answer['error']['detail']}"
            else:
                best = answer["top"][0]
                row |= {"action": parts.words(best["label"]), "sure": best["score"]}
                row["note"] = "not sure" if answer["abstained"] else ""
    return rows


def show(rows: list[dict[str, object]]) -> None:
    """Return the table, its filter and its downloads."""
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
files = st.file_uploader("Pictures, or a zip", [*parts.KINDS, "zip"], accept_multiple_files=True, key="batch_files")
samples = st.button("Use the sample pictures", icon=":material/photo_library:")
if samples:
    chosen = [(path.name, path.read_bytes()) for path in sorted(parts.SAMPLES.glob("*.jpg"))]
    st.session_state.batch_rows = answer_all(chosen)
    st.session_state.batch_of = None
elif files and st.session_state.get("batch_of") != [file.file_id for file in files]:
    try:
        pictures: list[tuple[str, bytes]] = []
        for file in files:
            content = file.getvalue()
            pictures += unpack(file.name, content) if file.name.lower().endswith(".zip") else [(file.name, content)]
        if not pictures:
            raise Trouble("There is no JPEG, PNG or WebP picture in it. Choose another file.")
        if len(pictures) > MAX_PICTURES:
            raise Trouble(f"{len(pictures)} pictures are too many; {MAX_PICTURES} or fewer can be done at once.")
        st.session_state.batch_rows = answer_all(pictures)
        st.session_state.batch_of = [file.file_id for file in files]
    except Trouble as trouble:
        st.session_state.pop("batch_rows", None)
        st.error(str(trouble), icon=":material/error:")
if st.session_state.get("batch_rows"):
    show(st.session_state.batch_rows)
