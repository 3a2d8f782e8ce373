"""Who may ask, and what goes with every answer.

The inspector shows what a run recorded, prompts and all, so only its own pages, on the address that it is bound to, may read
it. A page of another site that is open in the same browser can send requests here; it is stopped by the Host header (it came
under a name that is not ours: DNS rebinding), by Origin, and by headers that keep answers from being embedded elsewhere.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
import socket

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = ("GET", "HEAD")
THE_ADDRESS = "open the address that `pellucid view` printed"
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:@/\[\]]+))(?::\d+)?", re.IGNORECASE)
"""A Host header: a name or an address, and perhaps a port."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Around the application. host: what the server is bound to. token: what a request must show, or None for no need."""

    def __init__(self, app: ASGIApp, host: str, token: str | None) -> None:
        self.app, self.host, self.token = app, host, token
        # Cookies are shared by the ports of a machine: two inspectors must not overwrite each other's.
        self.cookie = "pellucid-" + hashlib.sha256((token or "").encode()).hexdigest()[:12]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = HTTPConnection(scope)
        refusal = self._refusal(request)
        shown = refusal is None and self.token is not None and _equal(self.token, request.query_params.get("token", ""))

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer.update(HEADERS)
                if shown:
                    answer["Set-Cookie"] = f"{self.cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/"
            await send(message)

        await (refusal or self.app)(scope, receive, guarded)

    def _refusal(self, request: HTTPConnection) -> Response | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not is_own_name(host, self.host):
            return refuse(421, f"this inspector does not answer under that name; {THE_ADDRESS}")
        if origin is not None and origin.partition("://")[2] != host:
            return refuse(403, f"a page of another site asked; {THE_ADDRESS}")
        if request.scope["method"] not in METHODS:
            return refuse(405, "the inspector changes nothing; use GET or HEAD", {"Allow": ", ".join(METHODS)})
        if self.token is not None and not self._knows_token(request):
            return refuse(401, f"this inspector asks for a token; {THE_ADDRESS}, with all that follows the ?")
        return None

    def _knows_token(self, request: HTTPConnection) -> bool:
        given = request.query_params.get("token", ""), request.cookies.get(self.cookie, "")
        return any(_equal(self.token or "", text) for text in given)


def refuse(status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps({"error": sentence}), status, headers, "application/json")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that is bound to host."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def is_own_name(header: str, bound: str) -> bool:
    """Whether a Host header names this server: a loopback name or address, or what it is bound to, on any port.

    A server bound to all addresses has no name of its own. It answers to any address, since a name that another site points
    at this machine is never one, and to the machine's own name.
    """
    found = HOST.fullmatch(header)
    name = (found[1] or found[2]).lower() if found else ""
    if name and (name == bound.lower() or is_loopback(name)):
        return True
    everywhere = _address(bound)
    if everywhere is None or not everywhere.is_unspecified:
        return False
    return _address(name) is not None or name in (socket.gethostname().lower(), socket.getfqdn().lower())


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _equal(token: str, given: str) -> bool:
    """In constant time, so that a guess learns nothing from how long the answer takes."""
    return hmac.compare_digest(token.encode("utf-8", "replace"), given.encode("utf-8", "replace"))
