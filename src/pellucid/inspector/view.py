"""`pellucid view`: run directories in the browser, from a server on this machine or as a bundle of files."""

from __future__ import annotations

import re
import secrets
import socket
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from pellucid.errors import CheckpointError, ConfigError

TOKEN = re.compile(r"[A-Za-z0-9_-]{8,}")
SIGNS_OF_A_RUN = ("config.toml", "metrics.jsonl", "rollouts")


def view(
    run_dirs: Sequence[Path],
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    bundle: Path | None = None,
    steps: str | None = None,
    open_browser: bool = False,
) -> None:
    """Serve the run directories until Ctrl-C, or write them into the folder `bundle` and return.

    port: 0 takes a free one. token: what a browser must show; one is made up where host can be reached from other machines.
    steps: of a bundle, such as "1,5-9"; None takes all.

    Raises PellucidError for a directory that holds no run, an address that cannot be had, or a bundle that cannot be written.
    """
    if not run_dirs:
        raise ConfigError("there is no run to show; give a run directory, such as runs/quickstart")
    for run_dir in run_dirs:
        require_run(run_dir)
    if bundle is not None:
        from pellucid.inspector.bundle import write_bundle

        count = write_bundle(run_dirs, bundle, steps)
        print(f"{bundle / 'index.html'}: {count} payloads; open it in a browser")
        return
    if steps is not None:
        raise ConfigError(f"--steps {steps}: chooses what goes into a bundle; give --bundle too, or leave it out")
    serve(run_dirs, host, port, token, open_browser)


def require_run(run_dir: Path) -> None:
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir}: there is no such directory; give the run.dir of a run")
    if not any((run_dir / name).exists() for name in SIGNS_OF_A_RUN):
        raise CheckpointError(
            f"{run_dir}: holds no run ({', '.join(SIGNS_OF_A_RUN)} are missing); give the run.dir of a run"
        )


def serve(run_dirs: Sequence[Path], host: str, port: int, token: str | None, open_browser: bool) -> None:
    import pyarrow
    import uvicorn

    from pellucid.inspector.guard import is_loopback
    from pellucid.inspector.library import RunLibrary
    from pellucid.inspector.server import make_app

    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(24)
    if token is not None and not TOKEN.fullmatch(token):
        raise ConfigError("--token: takes letters, digits, - and _, at least 8 of them")
    pyarrow.array([])  # the first array imports pandas, where there is one: now, and not while a page waits for it
    app = make_app(RunLibrary(run_dirs), host, token)
    with bind(host, port) as listener:
        address = url(host, listener.getsockname()[1], token)
        print(f"{address}  (Ctrl-C stops it)", flush=True)
        if open_browser:
            webbrowser.open(address)
        quiet = {"log_level": "error", "access_log": False, "server_header": False, "lifespan": "off", "ws": "none"}
        server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=1, **quiet))
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # the way to end it
            print(file=sys.stderr)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError when the address cannot be had."""
    try:
        if not 0 <= port < 2**16:
            raise OSError("ports go from 0 to 65535")
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server((address[0], port), family=family)
        # What it accepts inherits this; asyncio sets it for sockets of its own alone. Without it an answer of several writes
        # waits 40 ms for the acknowledgement of the first.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"--host {host} --port {port}: cannot be had ({reason}); choose an address of this machine and a free port, or "
            "leave both out"
        ) from error


def url(host: str, port: int, token: str | None) -> str:
    """What to open. A server on all addresses is shown under the one that this machine always has."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")
