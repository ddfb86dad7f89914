"""Video: the actions and their times."""

import hashlib
import json
import math
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from app import widgets
from app.client import Trouble, configured
from app.video_frames import clock, frame_at
from serving.schemas import EventBody, VideoEvents

MOST_CLICKS = 400  # seconds that a click on the timeline can choose; the player starts at whole seconds
UNCHANGED = {kind: {"marker": {"opacity": 1}} for kind in ("selected", "unselected")}
COLORS = ("#3b82d6", "#d97706", "#0f9f8f", "#b4509b", "#7a8b2f", "#7c5cd6", "#c2554d", "#5f7d95")


def end_of(event: EventBody) -> float:
    """Return the end of an event in seconds; in a whole video each event has one."""
    assert event.end_s is not None
    return event.end_s


def timeline(events: list[EventBody], duration_s: float) -> go.Figure:
    """Return a chart of the actions over time, one row each; its invisible points give the second of a click."""
    labels = list(dict.fromkeys(widgets.words(event.label) for event in events))
    seconds = list(range(0, math.ceil(duration_s), math.ceil(duration_s / MOST_CLICKS)))
    figure = go.Figure()
    for i, label in enumerate(labels):
        own = [event for event in events if widgets.words(event.label) == label]
        figure.add_bar(
            y=[label] * len(own),
            base=[event.start_s for event in own],
            x=[end_of(event) - event.start_s for event in own],
            orientation="h",
            marker_color=COLORS[i % len(COLORS)],
            hoverinfo="skip",
            showlegend=False,
            **UNCHANGED,
        )
        figure.add_scatter(
            x=seconds,
            y=[label] * len(seconds),
            mode="markers",
            marker={"opacity": 0, "size": 12},
            hovertext=[clock(second) for second in seconds],
            hoverinfo="text",
            showlegend=False,
            unselected={"marker": {"opacity": 0}},
            selected={"marker": {"opacity": 0}},
        )
    figure.update_layout(height=110 + 44 * len(labels), margin={"l": 0, "r": 10, "t": 10, "b": 40}, barmode="overlay")
    figure.update_layout(hovermode="closest", hoverdistance=60, dragmode=False)
    figure.update_xaxes(range=[0, duration_s], title="seconds")
    figure.update_yaxes(autorange="reversed")
    return figure


def jump(second: int | None = None) -> None:
    """Set the player to a second; None: to the clicked one of the timeline.

    Player and timeline are made anew at each jump, so that the same second can be chosen again.
    """
    if second is None:
        points = st.session_state[f"timeline_{st.session_state.jumps}"].selection.points
        second = points[0]["x"] if points else None
    if second is not None:
        st.session_state.video_at_s = second
        st.session_state.jumps += 1


def show_events(content: bytes, answer: VideoEvents) -> None:
    """Show the timeline, one card per event, and the downloads."""
    events, duration_s = answer.events, answer.duration_s
    if not events:
        st.info("No action lasted long enough, or was sure enough, to be named in this video.")
        return
    spans = [f"{widgets.words(one.label)} from {clock(one.start_s)} to {clock(end_of(one))}" for one in events]
    told = "; ".join(spans)
    st.plotly_chart(
        timeline(events, duration_s),
        config={"displayModeBar": False},
        alt=f"Timeline: {told}",
        key=f"timeline_{st.session_state.jumps}",
        on_select=jump,
        selection_mode="points",
    )
    st.caption("Click the timeline, or a moment below, to jump there in the video.")
    columns = st.columns(min(4, max(2, len(events))))
    for i, event in enumerate(events):
        with columns[i % len(columns)], st.container(border=True):
            label = widgets.words(event.label)
            picture = frame_at(content, (event.start_s + end_of(event)) / 2)
            if picture:
                st.image(picture, width="stretch", alt=f"A moment of {label}")
            st.markdown(f"**{label}**")
            st.caption(f"{clock(event.start_s)} to {clock(end_of(event))} · {widgets.percent(event.score)} sure")
            first = int(event.start_s)
            st.button(f"Play from {clock(first)}", key=f"jump_{i}", on_click=jump, args=(first,), width="stretch")
    one, two = st.columns(2)
    table = pd.DataFrame([event.model_dump() for event in events])[["label", "start_s", "end_s", "score"]]
    one.download_button("Download as CSV", table.to_csv(index=False), "events.csv", "text/csv", width="stretch")
    as_json = answer.model_dump_json(indent=1)
    two.download_button("Download as JSON", as_json, "events.json", "application/json", width="stretch")


def show_camera() -> None:
    """Show the picture of the browser's camera with live predictions."""
    if configured()[1]:
        st.info("The camera works only with a service that needs no key, because a browser can't send one here.")
        return
    address = widgets.service().address.replace("http", "ws", 1) + "/v1/stream"
    page = (Path(widgets.__file__).parent / "camera.html").read_text(encoding="utf-8")
    st.iframe(
        page.replace("ADDRESS", json.dumps(address), 1), height=560, tab_index=0, alt="The camera, and what it sees"
    )
    st.caption("The pictures go from this browser to the service, and are forgotten when they are answered.")


def choose_video() -> tuple[str, bytes] | None:
    """Let a person choose a video; None until then."""
    way = st.segmented_control(
        "Where the video comes from", ["Sample", "Upload", "Camera"], default="Sample", required=True
    )
    if way == "Sample":
        return "the sample", (widgets.SAMPLES / "actions.mp4").read_bytes()
    if way == "Camera":
        show_camera()
        return None
    most_mb = widgets.limits().max_video_bytes / 1e6
    kinds = ["mp4", "mov", "webm", "mkv", "avi"]
    given = st.file_uploader(f"A video, up to {most_mb:g} MB", kinds, key="video_file", max_upload_size=round(most_mb))
    if given is None:
        return None
    if given.size > 1e6 * most_mb:
        size = f"{given.size / 1e6:.0f} MB; {most_mb:g} MB or less is needed"
        raise Trouble(f"{given.name} has {size}. Cut it and try again.")
    if frame_at(given.getvalue(), 0.0) is None:
        raise Trouble(f"{given.name} holds no pictures, or is damaged. Choose another (MP4, MOV, WebM, MKV, AVI).")
    return given.name, given.getvalue()


st.title("What happens when?")
st.write("Give a video. You get the actions in it, each with its start and end.")
try:
    video = choose_video()
    if video:
        name, content = video
        key = hashlib.sha256(content).hexdigest()
        is_new = st.session_state.get("video_of") != key
        if is_new:
            st.session_state.video_at_s = st.session_state.jumps = 0
        with st.container(key=f"player_{st.session_state.jumps}"):
            st.video(content, start_time=st.session_state.video_at_s, alt=f"The video: {name}", width=480)
        if is_new:
            with st.spinner("Watching the video ..."):
                st.session_state.video_answer = widgets.service().events(content)
            st.session_state.video_of = key
        show_events(content, st.session_state.video_answer)
except Trouble as trouble:
    st.error(str(trouble), icon=":material/error:")
