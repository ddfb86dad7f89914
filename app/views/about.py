"""About: the model, its training data, its limits."""

import streamlit as st

from app import widgets

st.title("About this model")
name, version = widgets.active_model()
one, two, three = st.columns(3)
one.metric("Actions it knows", len(version.labels))
two.metric("Picture size it sees", f"{version.image_size_px} px")
limit = version.abstain_below
three.metric("Says “not sure” below", widgets.percent(limit) if limit else "never")
st.subheader("Actions")
st.write(" · ".join(widgets.words(label) for label in version.labels))
st.subheader("What it learned from")
widgets.show_model(name, version)
st.write(
    "A model of this project starts from CLIP, which has seen pictures and texts of the web, or from nothing, as the "
    "demo's does. It is then trained on pictures with a known action. The report of its run, on the page “Runs”, names "
    "the data and how well it does on pictures that it hasn't seen."
)
st.subheader("How sure it is")
st.write(
    "How sure the model says it is was adjusted on pictures that it hadn't learned from, so that of the answers given "
    "with 80% about 80 in 100 are right, on pictures like those. Below its limit it says “not sure” instead of "
    "guessing: on those pictures that held back about half of its mistakes."
)
st.subheader("What it can't do")
st.markdown(
    "- It knows one action a picture, of the middle square. Two people doing two things confuse it.\n"
    "- A picture that is nothing like those it learned from gets an answer too. It may be wrong and sound sure.\n"
    "- It may do worse for people, clothes and places that its data showed rarely. Check before you rely on it.\n"
    "- It isn't made to identify people, to watch them, or to decide about them."
)
st.subheader("Which model this is")
checksum = version.digest or "none: the folder is not sealed"
st.code(f"{name}\nversion {version.version}\nchecksum {checksum}", None, wrap_lines=True)
st.caption("Pictures that you give are sent to the service, answered and forgotten. Neither it nor the app keeps them.")
