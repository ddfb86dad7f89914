# What answers in production: the server and, with --target=app, the web page that speaks to it. Models run in ONNX
# Runtime; neither image has JAX.
#   docker build -f Dockerfile.app -t clip-har-jax-server .
#   docker build -f Dockerfile.app -t clip-har-jax-app --target=app .
FROM python:3.11.14-slim-bookworm AS base
ENV HOME=/tmp PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
RUN useradd --uid=10001 --no-create-home --home-dir=/tmp --shell=/usr/sbin/nologin har
ARG REVISION=""
LABEL org.opencontainers.image.title="clip_har_jax" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision=$REVISION
WORKDIR /srv
COPY LICENSE ./
# The versions that the tests ran with; what each image needs of them stands beside its code.
COPY requirements.txt ./
RUN grep -v "^-e" requirements.txt > constraints.txt

FROM base AS app
COPY app/requirements.txt app/
RUN pip install --no-cache-dir --only-binary=:all: -c constraints.txt -r app/requirements.txt
COPY app app
COPY serving/__init__.py serving/client.py serving/problems.py serving/schemas.py serving/
USER 10001
EXPOSE 8501
# The page asks nobody for a key, and says so to whom it is open. Behind a proxy with a login: APP_BEHIND_PROXY=true.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8501/_stcore/health', timeout=2)"]
ENTRYPOINT ["streamlit", "run", "app/main.py", "--server.address=0.0.0.0", "--server.headless=true", "--browser.gatherUsageStats=false"]

FROM base AS server
COPY serving/requirements.txt serving/
RUN pip install --no-cache-dir --only-binary=:all: -c constraints.txt -r serving/requirements.txt
COPY clip_har_jax clip_har_jax
COPY serving serving
USER 10001
EXPOSE 8000
# Listening beyond loopback needs API keys (HAR_API_KEYS): without them it stops and says so.
ENV HAR_HOST=0.0.0.0 HAR_MODEL=/models/har
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
ENTRYPOINT ["python", "-m", "serving"]
