"""HEAD for all paths with GET, OPTIONS for all paths, and the allowed methods of a path (RFC 9110, 9.3)."""

from collections.abc import Sequence

from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.problems import Problem

VERBS = ("GET", "POST", "PUT", "PATCH", "DELETE")


def allowed_methods(routes: Sequence[BaseRoute], scope: Scope) -> list[str]:
    """Return the methods that a request's path allows; empty if no route has the path."""
    scope = {**scope, "type": "http"}
    if scope["path"] == "*":  # the whole service
        return ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"] if scope["method"] == "OPTIONS" else []
    allowed = [verb for verb in VERBS if any(_allows(route, {**scope, "method": verb}) for route in routes)]
    if not allowed:
        return []
    return [*allowed, *(["HEAD"] if "GET" in allowed else []), "OPTIONS"]


def _allows(route: BaseRoute, scope: Scope) -> bool:
    files = isinstance(route, Mount)  # matches any method and WebSockets, and serves files
    return route.matches(scope)[0] is Match.FULL and (not files or scope.get("method") == "GET")


class Methods:
    """Middleware below access control: answers OPTIONS, and HEAD like GET; the server omits the body.

    Raises:
      Problem: no route takes WebSockets at the path.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]):
        self._app, self._routes = app, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and not any(_allows(route, scope) for route in self._routes):
            raise Problem("not_found", "no WebSocket is taken at this path; frames go to /v1/stream")
        method = scope.get("method")
        if method == "OPTIONS" and (allowed := allowed_methods(self._routes, scope)):
            await Response(status_code=204, headers={"Allow": ", ".join(allowed)})(scope, receive, send)
        elif method == "HEAD":
            as_get = {**scope, "method": "GET"}
            try:
                await self._app(as_get, receive, send)
            finally:
                scope["route"] = as_get.get("route")  # for metrics and logs
        else:
            await self._app(scope, receive, send)
