"""Video: what is done when."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
import parts
import plotly.graph_objects as go
import streamlit as st
from clip import clock, frame_at
from service import Trouble, configured

MAX_VIDEO_BYTES = 100_000_000
COLORS = ("#3b82d6", "#d97706", "#0f9f8f", "#b4509b", "#7a8b2f", "#7c5cd6", "#c2554d", "#5f7d95")


def timeline(events: list[dict[str, Any]], duration_s: float) -> go.Figure:
    """Each action in a row of its own, over the time."""
    labels = list(dict.fromkeys(parts.words(event["label"]) for event in events))
    figure = go.Figure()
    for i, label in enumerate(labels):
        own = [event for event in events if parts.words(event["label"]) == label]
        figure.add_bar(
            y=[label] * len(own),
            base=[event["start_s"] for event in own],
            x=[event["end_s"] - event["start_s"] for event in own],
            orientation="h",
            marker_color=COLORS[i % len(COLORS)],
            hovertext=[f"{clock(event['start_s'])} to {clock(event['end_s'])}" for event in own],
            hoverinfo="text+y",
            showlegend=False,
        )
    figure.update_layout(height=110 + 44 * len(labels), margin={"l": 0, "r": 10, "t": 10, "b": 40}, barmode="overlay")
    figure.update_xaxes(range=[0, duration_s], title="seconds")
    figure.update_yaxes(autorange="reversed")
    return figure


def show_events(content: bytes, answer: dict[str, Any]) -> None:
    """Return the timeline, a card an event, the downloads."""
    events, duration_s = answer["events"], answer["duration_s"]
    if not events:
        st.info("No action lasted long enough, or was sure enough, to be named in this video.")
        return
    spans = [f"{parts.words(one['label'])} from {clock(one['start_s'])} to {clock(one['end_s'])}" for one in events]
    told = "; ".join(spans)
    st.plotly_chart(timeline(events, duration_s), config={"displayModeBar": False}, alt=f"Timeline: {told}")
    columns = st.columns(min(4, max(2, len(events))))
    for i, event in enumerate(events):
        with columns[i % len(columns)], st.container(border=True):
            label = parts.words(event["label"])
            picture = frame_at(content, (event["start_s"] + event["end_s"]) / 2)
            if picture:
                st.image(picture, width="stretch", alt=f"A moment of {label}")
            st.markdown(f"**{label}**")
            st.caption(f"{clock(event['start_s'])} to {clock(event['end_s'])} · {parts.percent(event['score'])} sure")
    one, two = st.columns(2)
    table = pd.DataFrame(events)[["label", "start_s", "end_s", "score"]]
    one.download_button("Download as CSV", table.to_csv(index=False), "events.csv", "text/csv", width="stretch")
    as_json = json.dumps(answer, indent=1)
    two.download_button("Download as JSON", as_json, "events.json", "application/json", width="stretch")


def show_camera() -> None:
    """What the browser's camera sees, told as it happens."""
    if configured()[1]:
        st.info("The camera works only with a service that needs no key, because a browser can't send one here.")
        return
    address = parts.service().url.replace("http", "ws", 1) + "/v1/stream"
    page = (Path(parts.__file__).parent / "camera.html").read_text(encoding="utf-8")
    st.iframe(
        page.replace("ADDRESS", json.dumps(address), 1), height=560, tab_index=0, alt="The camera, and what it sees"
    )
    st.caption("The pictures go from this browser to the service, and are forgotten when they are answered.")


def choose_video() -> tuple[str, bytes] | None:
    """Lets a person choose a video; None while there is none."""
    way = st.segmented_control(
        "Where the video comes from", ["Sample", "Upload", "Camera"], default="Sample", required=True
    )
    if way == "Sample":
        return "the sample", (parts.SAMPLES / "actions.mp4").read_bytes()
    if way == "Camera":
        show_camera()
        return None
    given = st.file_uploader("A video", ["mp4", "mov", "webm", "mkv", "avi"], key="video_file", help="up to 100 MB")
    if given is None:
        return None
    if given.size > MAX_VIDEO_BYTES:
        raise Trouble(f"{given.name} has {given.size / 1e6:.0f} MB; 100 MB or less is needed. Cut it and try again.")
    if frame_at(given.getvalue(), 0.0) is None:
        raise Trouble(f"{given.name} holds no pictures, or is damaged. Choose another (MP4, MOV, WebM, MKV, AVI).")
    return given.name, given.getvalue()


st.title("What happens when?")
st.write("Give a video. You get the actions in it, each with its start and end.")
try:
    video = choose_video()
    if video:
        name, content = video
        st.video(content, alt=f"The video: {name}", width=480)
        key = hashlib.sha256(content).hexdigest()
        if st.session_state.get("video_of") != key:
            with st.spinner("Watching the video ..."):
                st.session_state.video_answer = parts.service().events(content)
            st.session_state.video_of = key
        show_events(content, st.session_state.video_answer)
except Trouble as trouble:
    st.error(str(trouble), icon=":material/error:")
