"""Open vocabulary: actions in free words."""

import streamlit as st

from app import widgets
from app.client import Trouble

MAX_ACTIONS = 200
EXAMPLE = "running\nriding a bike\nsleeping\ntalking on the phone: a photo of a person holding a phone to the ear"


def parse_actions(text: str) -> dict[str, list[str]]:
    """Return the actions in the lines, with their optional descriptions.

    Raises:
      Trouble: too few or too many actions, or a duplicate.
    """
    actions: dict[str, list[str]] = {}
    for line in text.splitlines():
        label, _, said = line.partition(":")
        label = " ".join(label.split())
        if not label:
            continue
        if label in actions:
            raise Trouble(f"“{label}” is there twice. Take one of the lines out.")
        actions[label] = [part.strip() for part in said.split(";") if part.strip()]
    if len(actions) < 2:
        raise Trouble("Write two actions or more, each on its own line. The model tells them apart.")
    if len(actions) > MAX_ACTIONS:
        raise Trouble(f"{len(actions)} actions are too many; {MAX_ACTIONS} or fewer are needed.")
    return actions


def save(actions: dict[str, list[str]]) -> None:
    """Make these actions the classes of the service's model."""
    name, version = widgets.active_model()
    old = set(version.labels)
    add = {label: texts for label, texts in actions.items() if label not in old or texts}
    with st.spinner("Saving ..."):
        widgets.service().change_classes(name, add, [label for label in version.labels if label not in actions])
    st.session_state.models = widgets.service().models().models
    st.success(f"Saved: the service now tells these {len(actions)} actions apart.", icon=":material/check:")


def go_back() -> None:
    """Restore the model's own actions."""
    with st.spinner("Loading the model's own actions ..."):
        widgets.service().load(widgets.active_model()[0])
    st.session_state.models = widgets.service().models().models
    st.success("The model tells its own actions apart again.", icon=":material/check:")


st.title("Any action, in your own words")
st.write("Write the actions that you want to tell apart. The result changes at once; nothing has to be trained.")
_, version = widgets.active_model()
if not version.accepts_classes:
    st.info("This model knows only the actions it was trained on. Use one that compares pictures with texts.")
    st.stop()
left, right = st.columns(2, gap="large")
with left:
    text = st.text_area("Actions, one on each line", EXAMPLE, height=190, key="actions")
    st.caption("After a colon you may say how it looks; divide several descriptions by semicolons.")
    picture = widgets.choose_picture("words")
    if picture:
        st.image(picture[2], width="stretch", alt=f"The picture: {picture[0]}")
with right:
    try:
        actions = parse_actions(text)
        if picture:
            with st.spinner("Looking ..."):
                answer = widgets.service().predict(picture[1], classes=actions, top=min(10, len(actions)))
            widgets.show_answer(answer)
        st.caption("New words are a guess from the texts alone: check the result on pictures whose action you know.")
        if st.button("Save this set to the service", icon=":material/save:"):
            save(actions)
        if "+" in widgets.active_model()[1].version and st.button(
            "Back to the model's own set", icon=":material/undo:"
        ):
            go_back()
    except Trouble as trouble:
        st.error(str(trouble), icon=":material/error:")
