"""Try it: a picture in, the action out."""

import parts
import streamlit as st
from service import Trouble

st.title("What is this person doing?")
st.write("Give a picture of a person. The model names the action, and shows how sure it is.")
left, right = st.columns(2, gap="large")
with left:
    picture = parts.choose_picture("try")
    if picture:
        name, content, image = picture
        st.image(image, width="stretch", alt=f"The picture: {name}")
with right:
    if not picture:
        st.info("Choose a picture on this page to see what the model says.", icon=":material/image:")
    else:
        try:
            with st.spinner("Looking ..."):
                answer = parts.service().predict(content)
            parts.show_answer(answer)
            label = st.selectbox(
                "Show where the model sees", [one["label"] for one in answer["top"]], format_func=parts.words
            )
            with st.spinner("Marking ..."):
                marked = parts.service().explain(content, label)
            st.image(marked, width="stretch", alt=f"The picture with what speaks for {parts.words(label)} marked warm")
            st.caption("The warmer a spot, the more it speaks for this action. The model sees the middle square only.")
        except Trouble as trouble:
            st.error(str(trouble), icon=":material/error:")
