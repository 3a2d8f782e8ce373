"""The inspector over HTTP: the pages, and under /api/ the payloads that they ask for."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from pellucid.errors import PellucidError
from pellucid.inspector.guard import Guard, refuse
from pellucid.inspector.library import NotThere, RunLibrary
from pellucid.inspector.road import road_files
from pellucid.inspector.static_files import content_type, static_files


def make_app(library: RunLibrary, host: str = "127.0.0.1", token: str | None = None) -> ASGIApp:
    """The application. host: what it will be bound to; token: what every request must show, None for none."""

    # Plain functions run in a thread pool: reading a large step does not hold up the other requests.
    def payload(request: Request) -> Response:
        try:
            return Response(library.json(request.path_params["path"]), media_type="application/json")
        except NotThere as error:
            return refuse(404, str(error))
        except PellucidError as error:
            return refuse(422, str(error))

    def page(request: Request) -> Response:
        name = request.path_params["path"] or "index.html"
        if name in road_files():
            return Response(road_files()[name], media_type=content_type(name))
        found = static_files().get(name)
        if found is None:
            return refuse(404, f"{name}: the inspector has no such page")
        return FileResponse(found, media_type=content_type(name))

    return Guard(Starlette(routes=[Route("/api/{path:path}", payload), Route("/{path:path}", page)]), host, token)
