"""The inspector over HTTP, without a socket: what it serves, and to whom."""

from __future__ import annotations

import json
import re

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from pellucid.inspector.guard import is_loopback, is_own_name
from pellucid.inspector.library import RunLibrary
from pellucid.inspector.server import make_app
from pellucid.inspector.static_files import ROOT, static_files

HERE = "http://127.0.0.1:8642"
TOKEN = "a-token-of-the-test"


@pytest.fixture
def client(library):
    return TestClient(make_app(library), base_url=HERE)


@pytest.fixture
def guarded(library):
    return TestClient(make_app(library, "192.0.2.7", TOKEN), base_url="http://192.0.2.7:80")


def test_payloads_are_the_library_s(client, library):
    for path in ("runs.json", "run/0/state.json", "run/0/step/1/chunk/1.json", "run/0/prompts.json"):
        answer = client.get(f"/api/{path}")
        assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
        assert answer.text == library.json(path)


@pytest.mark.parametrize(
    "path", ["", "nothing.json", "run/7/state.json", "run/0/step/9/step.json", "run/0/step/1/chunk/9.json"]
)
def test_what_is_not_there_is_404_with_a_sentence(client, path):
    answer = client.get(f"/api/{path}")
    assert answer.status_code == 404 and list(answer.json()) == ["error"] and "\n" not in answer.json()["error"]


def test_a_damaged_file_is_422_with_a_sentence(damaged):
    (damaged / "rollouts/step-000001.parquet").write_bytes(b"PAR1")
    client = TestClient(make_app(RunLibrary([damaged])), base_url=HERE)
    answer = client.get("/api/run/0/step/1/samples.json")
    assert answer.status_code == 422 and "step-000001.parquet" in answer.json()["error"]
    assert client.get("/api/run/0/step/2/samples.json").status_code == 200


@pytest.mark.parametrize(
    ("name", "kind"),
    [("", "text/html"), ("index.html", "text/html"), ("core.js", "text/javascript"), ("style.css", "text/css")],
)  # fmt: skip
def test_pages_have_their_content_types(client, name, kind):
    answer = client.get(f"/{name}")
    assert answer.status_code == 200 and answer.headers["content-type"] == f"{kind}; charset=utf-8"
    assert answer.content == (ROOT / (name or "index.html")).read_bytes()


def test_everything_that_the_page_refers_to_is_served(client):
    references = re.findall(r'(?:src|href)="([^"#:]+)"', (ROOT / "index.html").read_text())
    assert len(references) > 5
    assert all(client.get(f"/{name}").status_code == 200 for name in references)
    assert all(client.get(f"/{name}").status_code == 200 for name in static_files())


@pytest.mark.parametrize(
    "path",
    ["/../library.py", "/..%2flibrary.py", "/%2e%2e/library.py", "/pages/../../library.py", "/static/index.html",
     "//etc/passwd", "/etc/passwd", "/%2fetc%2fpasswd", "/pages", "/pages/", "/index.html/", "/core.js%00", "/..\\library.py",
     "/api/run/0/../../../config.toml", "/api/run/0/config.toml", "/api/run/0/%2e%2e/config.toml", "/config.toml"],
)  # fmt: skip
def test_nothing_else_is_served(client, path):
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
@pytest.mark.parametrize("path", ["/", "/api/runs.json"])
def test_only_get_and_head(client, method, path):
    answer = client.request(method, path)
    assert answer.status_code == 405 and answer.headers["allow"] == "GET, HEAD"


def test_head_is_get_without_a_body(client):
    for path in ("/", "/api/run/0/state.json"):
        assert client.head(path).headers["content-length"] == str(len(client.get(path).content))


@pytest.mark.parametrize("path", ["/", "/core.js", "/api/runs.json", "/api/nothing", "/nothing"])
def test_headers_go_with_every_answer(client, path):
    for answer in (client.get(path), client.post(path), client.get(path, headers={"host": "evil.example"})):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy == {
            "default-src": "'none'", "script-src": "'self'", "style-src": "'self' 'unsafe-inline'", "img-src": "'self' data:",
            "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
        }  # fmt: skip
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:9", "127.0.0.1", "127.0.0.1:8642", "[::1]:8642", "127.9.9.9", "LOCALHOST:1"]
)
def test_loopback_names_are_answered(client, host):
    assert client.get("/api/runs.json", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8642", "127.0.0.1.evil.example", "localhost.evil.example", "192.0.2.7", "", ":80",
     "localhost:x", "a@localhost", "localhost:80:80", "[::1", "[evil.example]", "localhost/x", "0.0.0.0", "127.1 evil"],
)  # fmt: skip
def test_other_names_are_not(client, host):
    for path in ("/", "/api/runs.json"):
        answer = client.get(path, headers={"host": host})
        assert answer.status_code == 421 and "error" in answer.json() and "demo" not in answer.text


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:8642", ""]
)
def test_pages_of_other_sites_are_refused(client, origin):
    assert client.get("/api/runs.json", headers={"origin": origin}).status_code == 403


def test_our_own_page_may_ask(client):
    assert client.get("/api/runs.json", headers={"origin": HERE}).status_code == 200


def test_the_names_of_a_server_that_is_bound_elsewhere():
    assert is_own_name("box.example:80", "box.example") and is_own_name("[2001:db8::1]:80", "2001:db8::1")
    assert not is_own_name("other.example", "box.example") and not is_own_name("192.0.2.7", "192.0.2.8")
    assert is_own_name("192.0.2.7:80", "0.0.0.0") and is_own_name("[2001:db8::1]", "::")
    assert not is_own_name("evil.example", "0.0.0.0") and not is_own_name("evil.example", "::")
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "box", "")] == [
        True
    ] * 3 + [False] * 4


def test_without_the_token_nothing_is_shown(guarded):
    attempts = [
        guarded.get(path)
        for path in ("/", "/core.js", "/api/runs.json", "/?token=", "/?token=wrong", f"/?token={TOKEN}x")
    ]
    attempts.append(guarded.get("/api/runs.json", headers={"cookie": f"pellucid-0=1; {guarded.app.cookie}=wrong"}))
    attempts.append(guarded.get("/", headers={"cookie": f"{guarded.app.cookie}={TOKEN[:-1]}"}))
    for answer in attempts:
        assert answer.status_code == 401 and "token" in answer.json()["error"]
        assert "set-cookie" not in answer.headers and TOKEN not in answer.text


def test_the_token_is_kept_as_a_cookie(guarded):
    answer = guarded.get(f"/?token={TOKEN}")
    assert answer.status_code == 200 and answer.text.startswith("<!doctype html>")
    name, *attributes = answer.headers["set-cookie"].split("; ")
    assert name == f"{guarded.app.cookie}={TOKEN}" and {"HttpOnly", "SameSite=Strict", "Path=/"} == set(attributes)
    assert guarded.get("/api/runs.json").json()["runs"]
    guarded.cookies.clear()
    among_others = f'a{{"b": [1, "c"]}}=; =; d="; {name}; e'  # of other programs on the same machine
    assert guarded.get("/api/runs.json", headers={"cookie": among_others}).status_code == 200
    assert "set-cookie" not in guarded.get("/core.js").headers


def test_two_inspectors_on_one_machine_keep_their_cookies_apart(library, guarded):
    assert make_app(library, token="another-token").cookie != guarded.app.cookie  # type: ignore[attr-defined]


def test_host_and_origin_are_asked_before_the_token(guarded):
    assert guarded.get(f"/?token={TOKEN}", headers={"host": "evil.example"}).status_code == 421
    assert guarded.get(f"/?token={TOKEN}", headers={"origin": "http://evil.example"}).status_code == 403


def test_a_websocket_is_not_spoken_to(client):
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/"):
        pass


def test_an_answer_with_hostile_texts_is_plain_json(client):
    answer = client.get("/api/run/0/step/1/chunk/0.json")
    assert b"<" not in answer.content and json.loads(answer.content)["samples"][1]["prompt"].startswith("</script>")
