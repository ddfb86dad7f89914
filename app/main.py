"""The web app: streamlit run app/main.py

It uses a running service (HAR_URL, HAR_KEY), or starts one with the demo's model.
"""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1]))  # Streamlit adds only this file's folder

import streamlit as st

from app import own_service
from app.client import AppClient, Trouble, configured
from app.widgets import STYLE

PAGES = (
    ("try_it", "Try it", ":material/image_search:"),
    ("video", "Video", ":material/movie:"),
    ("vocabulary", "Open vocabulary", ":material/edit_note:"),
    ("batch", "Batch", ":material/grid_view:"),
    ("compare", "Compare models", ":material/compare:"),
    ("runs", "Runs", ":material/insights:"),
    ("about", "About", ":material/info:"),
)
ICON = Path(__file__).parent / "samples" / "icon.png"
WITHOUT_SERVICE = ("runs",)


@st.cache_resource(show_spinner="Starting the service; this takes a few seconds ...")
def own_url(_origin: str | None) -> str:
    """Return the address of the app's own service, shared by all visitors."""
    return own_service.start(_origin)


def connect() -> AppClient:
    """Return the service for this visitor."""
    if "service" not in st.session_state:
        url, key = configured()
        page = urlsplit(st.context.url or "")
        origin = f"{page.scheme}://{page.netloc}" if page.netloc else None
        if url is None and not own_service.is_ready(own_url(origin)):
            own_url.clear()  # it has ended; the next call starts another
        st.session_state.service = AppClient(url or own_url(origin), key)
    return st.session_state.service


def open_to_others() -> str | None:
    """Return a warning if other machines can open the page, which has no login; else None."""
    address = str(st.get_option("server.address") or "")
    if address in ("localhost", "127.0.0.1", "::1") or os.environ.get("APP_BEHIND_PROXY") == "true":
        return None
    return "Everyone who reaches this address can use this page: it has no key. Put a proxy with a login in front."


def show_trouble(trouble: Trouble) -> None:
    """Show a failure and what to do about it."""
    st.error(str(trouble), icon=":material/error:")
    if isinstance(trouble, own_service.NoModel):
        st.code(own_service.COMMANDS, language="bash", wrap_lines=True)
    if st.button("Try again", icon=":material/refresh:"):
        st.session_state.pop("service", None)
        st.rerun()


def show(title: str, run: Callable[[], None], with_service: bool = True) -> None:
    """Run a page; on any failure, show a sentence for a person."""
    try:
        if with_service:
            answer = connect().models()
            st.session_state.models, st.session_state.limits = answer.models, answer.limits
        run()
    except Trouble as trouble:
        show_trouble(trouble)
    except Exception:
        logging.getLogger("app").exception("page %s", title)
        st.error("Something went wrong in this page. Reload it; if it happens again, the app's log says why.")


def main() -> None:
    st.set_page_config(page_title="Human actions", page_icon=str(ICON), layout="wide")
    st.html(STYLE)
    if warning := open_to_others():
        st.warning(warning, icon=":material/lock_open:")
    pages = [
        st.Page(f"views/{name}.py", title=title, icon=icon, url_path=name, default=name == "try_it")
        for name, title, icon in PAGES
    ]
    page = st.navigation(pages)
    show(page.title, page.run, page.url_path not in WITHOUT_SERVICE)


if __name__ == "__main__":
    main()
