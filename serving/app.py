"""The application: its routes, its error handlers and its middleware."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError, WebSocketRequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles

from serving import api, kserve, streams, videos
from serving.calls import ClientGone
from serving.http_methods import Methods, allowed_methods
from serving.problems import Problem, responses
from serving.security import Gate
from serving.service import Service
from serving.settings import Settings
from serving.telemetry import Observe, problem_response

ABOUT = """Recognises human actions in images and video.

Errors are `application/problem+json` (RFC 9457); their `code` is for programs. Every answer has an `X-Request-ID`.
"""
OF_STATUS = {
    400: "malformed",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    422: "invalid_request",
}


def make_app(settings: Settings) -> FastAPI:
    """Return the service as an ASGI application."""
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.close()

    app = FastAPI(
        title="clip_har_jax",
        summary="Human action recognition",
        description=ABOUT,
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.add_api_route("/docs", docs, include_in_schema=False)
    # The docs page loads its own script and style only, so it works offline and runs no third-party code.
    app.mount("/docs/assets", StaticFiles(packages=[("fastapi_offline", "static")]))
    app.include_router(api.router)
    app.include_router(streams.router)
    app.include_router(videos.router)
    app.include_router(kserve.router)
    app.add_api_route(
        "/metrics",
        metrics,
        response_class=Response,
        responses=responses(*api.ALWAYS) | {200: {"content": {"text/plain": {}}}},
    )
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(WebSocketRequestValidationError, _on_invalid)
    app.add_exception_handler(ClientGone, _on_client_gone)
    app.add_exception_handler(ClientDisconnect, _on_client_gone)
    # The middleware added last is the outermost.
    app.add_middleware(Methods, routes=app.router.routes)
    app.add_middleware(Gate, settings=settings, metrics=service.metrics)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-ID", "X-Timeout-Ms"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    app.add_middleware(Observe, metrics=service.metrics)
    return app


async def docs() -> Response:
    """Return the page that documents the service and can send requests to it."""
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title="clip_har_jax",
        swagger_js_url="docs/assets/swagger-ui-bundle.js",
        swagger_css_url="docs/assets/swagger-ui.css",
        swagger_favicon_url="docs/assets/favicon.png",
    )


async def metrics(request: Request) -> Response:
    """Return the metrics for Prometheus."""
    service = api.service_of(request)
    service.metrics.estimated_wait.set(service.batcher.estimated_wait_s)
    return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


async def _on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return problem_response(error, request.scope)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers, detail = dict(error.headers or {}), str(error.detail)
    if error.status_code == 405:
        found = allowed_methods(request.app.router.routes, request.scope)
        allowed = ", ".join(found or ("GET", "HEAD", "OPTIONS"))  # none are found for mounted files
        headers["Allow"], detail = allowed, f"{request.method} isn't allowed here; allowed: {allowed}"
    problem = Problem(OF_STATUS.get(error.status_code, "internal"), detail, headers=headers)
    return problem_response(problem, request.scope)


async def _on_invalid(request: Request, error: Exception) -> Response:
    """Name the mistake without repeating the input."""
    assert isinstance(error, RequestValidationError | WebSocketRequestValidationError)
    first = error.errors()[0]
    where = " ".join(str(part) for part in first["loc"])
    code = "malformed" if first["type"] == "json_invalid" else "invalid_request"
    return problem_response(Problem(code, f"{where}: {first['msg']}"), request.scope)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # only the log shows it
