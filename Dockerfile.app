# The service and the web app on ONNX Runtime, without JAX. One image, two commands:
#   docker run -p 8000:8000 -v "$PWD/runs/demo/export:/model:ro" -e HAR_API_KEYS="..." clip-har-jax-app
#   docker run -p 8501:8501 clip-har-jax-app -m streamlit run app/main.py --server.address=0.0.0.0
# Nothing is written outside /tmp: start it with --read-only --tmpfs /tmp.
FROM python:3.12.12-slim-trixie AS packages
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY requirements.txt requirements-app.txt ./
RUN python -m venv /opt/venv \
    && grep -v "^-e" requirements.txt > constraints.txt \
    && /opt/venv/bin/pip install --no-cache-dir -r requirements-app.txt -c constraints.txt

FROM python:3.12.12-slim-trixie
ARG REVISION="unknown"
LABEL org.opencontainers.image.title="clip-har-jax-app" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV PATH="/opt/venv/bin:${PATH}" \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    STREAMLIT_BROWSER_GATHER_USAGE_STATS=false \
    HAR_HOST=0.0.0.0 \
    HAR_MODEL=/model
WORKDIR /srv
COPY --from=packages /opt/venv /opt/venv
COPY LICENSE ./
COPY clip_har_jax clip_har_jax
COPY serving serving
COPY app app
RUN useradd --no-log-init --no-create-home --uid 10001 har
USER 10001
EXPOSE 8000 8501
HEALTHCHECK --interval=10s --timeout=4s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request as web; web.urlopen('http://127.0.0.1:8000/v2/health/live', timeout=3)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["python"]
CMD ["-m", "serving"]
