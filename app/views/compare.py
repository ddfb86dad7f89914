"""Compare models: two versions on the same picture."""

import time

import streamlit as st

from app import widgets
from app.client import Trouble

st.title("Two models, one picture")
st.write("See where two versions agree, and how sure each of them is.")
versions = widgets.versions()
names = list(versions)
if len(names) < 2:
    st.info(
        "The service holds one version only. Save a set of actions on the page “Open vocabulary”, or start the service "
        "with further models, and compare them here."
    )
picture = widgets.choose_picture("compare", camera=False)
if picture:
    st.image(picture[2], width=260, alt=f"The picture: {picture[0]}")
answers = []
for i, column in enumerate(st.columns(2, gap="large")):
    with column:
        chosen = st.selectbox(f"{('First', 'Second')[i]} model", names, index=min(i, len(names) - 1), key=f"model_{i}")
        name, version = versions[chosen]
        if picture:
            try:
                start = time.perf_counter()
                with st.spinner("Looking ..."):
                    answer = widgets.service().predict(picture[1], model=name, version=version.version)
                took_ms = 1000 * (time.perf_counter() - start)
                widgets.show_answer(answer)
                st.caption(f"Answered in {took_ms:.0f} ms. Knows {len(version.labels)} actions.")
                answers.append(answer.top[0].label)
            except Trouble as trouble:
                st.error(str(trouble), icon=":material/error:")
if len(answers) == 2:
    same = answers[0] == answers[1]
    st.info("Both name the same action." if same else "They name different actions.", icon=":material/balance:")
