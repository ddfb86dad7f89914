"""Try it: a picture in, the action out."""

import streamlit as st

from app import widgets
from app.client import Trouble

st.title("What is this person doing?")
st.write("Give a picture of a person. The model names the action, and shows how sure it is.")
picture = widgets.choose_picture("try")
left, right = st.columns(2, gap="large")
with left:  # on a narrow page the first column is on top: first the answer, then the picture
    if not picture:
        st.info("Choose a picture on this page to see what the model says.", icon=":material/image:")
    else:
        name, content, image = picture
        try:
            with st.spinner("Looking ..."):
                answer = widgets.service().predict(content)
            widgets.show_answer(answer)
            widgets.show_model(*widgets.active_model())
            st.image(image, width="stretch", alt=f"The picture: {name}")
        except Trouble as trouble:
            st.error(str(trouble), icon=":material/error:")
            st.stop()
with right:
    if picture:
        label = st.selectbox(
            "Show where the model sees", [one.label for one in answer.top], format_func=widgets.words, key="try_label"
        )
        try:
            with st.spinner("Marking ..."):
                marked = widgets.service().explain_picture(content, label)
            alt = f"The picture with what speaks for {widgets.words(label)} marked warm"
            st.image(marked, width="stretch", alt=alt)
            widgets.show_heat_legend(widgets.words(label))
        except Trouble as trouble:
            st.error(str(trouble), icon=":material/error:")
