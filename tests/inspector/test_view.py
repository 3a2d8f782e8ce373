"""`pellucid view` as a user meets it: what it refuses, what it prints, and that Ctrl-C ends it."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import httpx
import pytest

from pellucid.errors import CheckpointError, ConfigError
from pellucid.inspector.view import bind, url, view

SERVE = """
import sys
from pathlib import Path
from pellucid.inspector.view import view
view([Path(sys.argv[1])], host=sys.argv[2])
"""


@contextmanager
def served(run_dir, host="127.0.0.1"):
    """(the server's process, the address that it printed)."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SERVE, str(run_dir), host], **pipes) as process:
        try:
            line = process.stdout.readline()
            assert line.endswith("  (Ctrl-C stops it)\n"), process.stderr.read()
            yield process, line.split()[0]
        finally:
            process.kill()


def test_it_serves_until_ctrl_c(recorded):
    with served(recorded) as (process, address):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        assert httpx.get(address).text.startswith("<!doctype html>")
        answer = httpx.get(f"{address}api/runs.json")
        assert answer.json()["live"] is True and answer.json()["runs"][0]["path"] == str(recorded)
        assert "server" not in answer.headers
        assert httpx.head(f"{address}api/run/0/state.json").content == b""
        assert httpx.get(address, headers={"host": "evil.example"}).status_code == 421
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stdout.read() == "" and process.stderr.read().strip() == ""


def test_a_new_step_is_seen_while_it_runs(damaged):
    with served(damaged) as (_, address):
        before = httpx.get(f"{address}api/run/0/state.json").json()
        (damaged / "rollouts/step-000002.parquet").rename(damaged / "rollouts/step-000003.parquet")
        after = httpx.get(f"{address}api/run/0/state.json").json()
        assert before["steps"] == [1, 2] and after["steps"] == [1, 3] and before["revision"] != after["revision"]
        assert httpx.get(f"{address}api/run/0/step/3/samples.json").json()["rows"] == 8


def test_beyond_this_machine_a_token_is_made(recorded):
    with served(recorded, "0.0.0.0") as (_, address):
        base, _, token = address.partition("?token=")
        assert len(token) >= 32
        assert httpx.get(base).status_code == 401 and httpx.get(f"{base}api/runs.json").status_code == 401
        with httpx.Client() as browser:
            assert browser.get(address).status_code == 200
            assert browser.get(f"{base}api/runs.json").json()["runs"]


def test_a_bundle_is_written_instead(recorded, tmp_path, capsys):
    view([recorded], bundle=tmp_path / "out", steps="1")
    assert (tmp_path / "out/index.html").is_file() and (tmp_path / "out/data/run/0/step/1/samples.json.js").is_file()
    assert capsys.readouterr().out.startswith(str(tmp_path / "out/index.html"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"steps": "1"}, "--steps 1: "), ({"token": "short"}, "--token: "), ({"token": ""}, "--token: "),
     ({"token": "ab;cd efgh"}, "--token: "), ({"port": 99999}, "--port 99999: cannot be had"),
     ({"host": "192.0.2.1"}, "--host 192.0.2.1 "), ({"host": "no host"}, "--host no host ")],
)  # fmt: skip
def test_options_that_cannot_be(recorded, options, sentence):
    with pytest.raises(ConfigError, match=r"^[^\n]+$") as error:
        view([recorded], **options)
    assert sentence in str(error.value)


def test_directories_without_a_run(tmp_path, recorded):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing", tmp_path / "empty", tmp_path / "file"):
        with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))}: [^\n]+$"):
            view([recorded, path], bundle=tmp_path / "out")
    with pytest.raises(ConfigError, match="no run to show"):
        view([])
    assert not (tmp_path / "out").exists()


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: cannot be had"):
            bind("127.0.0.1", port)


def test_an_answer_is_not_held_back_for_an_acknowledgement():
    with bind("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_addresses_to_open():
    assert url("127.0.0.1", 80, None) == "http://127.0.0.1:80/"
    assert url("0.0.0.0", 80, "t") == "http://127.0.0.1:80/?token=t"
    assert url("2001:db8::1", 80, None) == "http://[2001:db8::1]:80/" and url("::", 80, None) == "http://[::1]:80/"
