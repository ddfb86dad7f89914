"""The pages, each a script run by Streamlit."""
