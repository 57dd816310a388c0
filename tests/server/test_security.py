"""Nobody else's page, name or program gets anything."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest

from logitlab.server.security import HEADERS, POLICY
from logitlab.server.settings import Limits, Settings, Source, named
from tests.server.conftest import Shelf, settings
from tests.server.running import TOKEN, Running, running

BEARER = {"authorization": f"Bearer {TOKEN}"}


def bare(app: Running, method: str = "GET", path: str = "/api/about", **headers: str) -> httpx.Response:
    """A request with nothing but these headers."""
    with httpx.Client(base_url=f"http://127.0.0.1:{app.port}") as client:
        return client.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})


def one_line(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.text.count("\n") <= 1
    assert list(answer.json()) == ["message"]
    return answer.json()["message"]


# -- the token ---------------------------------------------------------------------------------------


def test_the_page_needs_no_token_and_sets_no_cookie(app: Running) -> None:
    for path in ("/", f"/?token={TOKEN}", "/?token=wrong", "/static/app.js"):
        answer = bare(app, path=path)
        assert answer.status_code == 200
        assert "set-cookie" not in answer.headers
        assert TOKEN not in answer.text
    assert bare(app, path="/").headers["content-type"] == "text/html; charset=utf-8"


@pytest.mark.parametrize("token", ["", "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "%00", "a" * 5000])
def test_a_wrong_token(app: Running, token: str) -> None:
    assert bare(app, authorization=f"Bearer {token}".strip()).status_code == 401
    assert bare(app, authorization=token).status_code == 401
    assert bare(app, path=f"/api/about?token={token}").status_code == 401


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/about"),
        ("POST", "/api/run"),
        ("POST", "/api/cancel/0"),
        ("GET", "/api/history"),
        ("DELETE", "/api/history"),
        ("DELETE", "/api/history/0"),
        ("POST", "/"),
        ("POST", "/static/app.js"),
        ("GET", "/nowhere"),
        ("GET", "/static"),
        ("GET", "//api/about"),
    ],
)
def test_no_token(app: Running, method: str, path: str) -> None:
    message = "the token is missing or wrong: open the address that logitlab serve has printed"
    assert one_line(bare(app, method, path), 401) == message
    assert bare(app, method, path, authorization=f"Basic {TOKEN}").status_code == 401
    # No browser sends a bearer by itself; a cookie it would, to any port of this machine.
    assert bare(app, method, path, cookie=f"logitlab-{app.port}={TOKEN}; token={TOKEN}").status_code == 401
    assert bare(app, method, f"{path}?token={TOKEN}").status_code == 401
    assert bare(app, method, path, **BEARER).status_code not in (401, 403)


# -- hosts and origins ---------------------------------------------------------------------------------


def test_names_of_this_machine(app: Running) -> None:
    for host in ("127.0.0.1", "localhost", "LOCALHOST", "[::1]"):
        assert bare(app, host=f"{host}:{app.port}", **BEARER).status_code == 200


OTHERS = ["evil.example", "evil.example:{}", "127.0.0.1", "localhost.evil.example:{}", "127.0.0.1:{}@evil", "127.1:{}"]


@pytest.mark.parametrize("host", OTHERS)
def test_other_names(app: Running, host: str) -> None:
    message = one_line(bare(app, host=host.format(app.port), **BEARER), 421)
    assert message == "this server does not go by that name; start it with --allow-host if it should"


def test_no_host_and_two_hosts(app: Running) -> None:
    line = b"GET /api/about HTTP/1.0\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n"
    assert app.raw(line + b"\r\n").startswith(b"HTTP/1.1 400")
    host = f"Host: 127.0.0.1:{app.port}\r\n".encode()
    assert b"200 OK" in app.raw(line + host + b"\r\n")
    assert app.raw(line + host + b"Host: evil.example\r\n\r\n").startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://127.0.0.1", "http://127.0.0.1:1", "https://127.0.0.1:{}", "file://", "http://localhost:{}"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_other_origins(app: Running, origin: str, method: str) -> None:
    answer = bare(app, method, "/api/history", origin=origin.format(app.port), **BEARER)
    assert one_line(answer, 403) == "requests of other pages are refused"
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_our_own_origin(app: Running) -> None:
    answer = bare(app, origin=f"http://127.0.0.1:{app.port}", sec_fetch_site="same-origin", **BEARER)
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_requests_that_browsers_say_come_from_elsewhere(app: Running, site: str) -> None:
    for method, path in (("GET", "/api/about"), ("GET", "/static/app.js"), ("POST", "/api/run"), ("POST", "/")):
        assert (
            one_line(bare(app, method, path, sec_fetch_site=site, **BEARER), 403)
            == "requests of other pages are refused"
        )
    assert bare(app, path="/", sec_fetch_site=site, **BEARER).status_code == 200
    assert bare(app, path="/api/about", sec_fetch_site="none", **BEARER).status_code == 200


@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "PATCH", "TRACE", "CONNECT", "PROPFIND"])
def test_methods_that_are_not_known(app: Running, method: str) -> None:
    answer = bare(app, method, "/api/run", origin=f"http://127.0.0.1:{app.port}", **BEARER)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_other_names_that_were_allowed(shelf: Shelf) -> None:
    with running(settings(shelf, hosts=("lens.example", "tunnel:9000"))) as app:
        for host in ("lens.example", f"lens.example:{app.port}", "tunnel:9000"):
            assert bare(app, host=host, origin=f"https://{host}", **BEARER).status_code == 200
        for host in ("lens.example:1", "tunnel", f"tunnel:{app.port}"):
            assert bare(app, host=host, **BEARER).status_code == 421


def test_addresses() -> None:
    def made(**changes: Any) -> Settings:
        return Settings(models=(Source("a", "a", False),), **changes)

    assert made().addresses == ("127.0.0.1:8765", "localhost:8765", "[::1]:8765")
    assert made(host="0.0.0.0", port=80).addresses[-1] == "[::1]"
    assert made(host="0.0.0.0").address == "http://127.0.0.1:8765/"
    assert made(host="::").address == "http://[::1]:8765/"
    assert made(token=TOKEN).entrance == f"http://127.0.0.1:8765/#token={TOKEN}"
    assert "[fe80::1]:8765" in made(host="fe80::1").addresses
    assert made(hosts=("[2001:db8::1]",)).addresses[-2:] == ("[2001:db8::1]", "[2001:db8::1]:8765")
    assert TOKEN not in repr(made(token=TOKEN))
    assert len({made().token for _ in range(20)}) == 20
    assert len(made().token) >= 40


# -- headers and files ---------------------------------------------------------------------------------


def test_headers_are_on_everything(app: Running) -> None:
    answers = [
        bare(app, path="/"),
        bare(app, path="/static/app.js"),
        bare(app, path="/static/nothing.js"),
        bare(app),
        bare(app, **BEARER),
        bare(app, path="/nowhere", **BEARER),
        bare(app, "POST", "/api/about", **BEARER),
        bare(app, "OPTIONS", "/api/run", **BEARER),
        bare(app, host="evil.example", **BEARER),
        app.post({"do": "load", "model": "tiny"}),
        app.post({}),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 401, 200, 404, 405, 405, 421, 200, 422]
    for answer in answers:
        for name, value in HEADERS:
            assert answer.headers.get_list(name.decode()) == [value.decode()]
        assert "server" not in answer.headers
    assert "unsafe" not in POLICY
    assert "*" not in POLICY


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/static/%2e%2e%2fapp.py",
        "/static/..%5capp.py",
        "/static/%252e%252e%252fapp.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/....//app.py",
        "/static/",
        "/static/.",
        "/static/%00",
        "/static/app.js%00.png",
        "/static/APP.JS",
        "/static/page.html",
        "/static/__init__.py",
        "/../../etc/passwd",
        "/docs",
        "/redoc",
        "/openapi.json",
        "/api/about/",
        "//api/about",
    ],
)
def test_paths_to_other_files(app: Running, path: str) -> None:
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: 127.0.0.1:{app.port}",
        f"Authorization: Bearer {TOKEN}",
        "Connection: close",
    ]
    answer = app.raw("\r\n".join([*lines, "", ""]).encode())
    assert answer.startswith(b"HTTP/1.1 404"), answer[:200]
    assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {"message": "there is nothing here"}


def test_the_files_of_the_page(app: Running) -> None:
    from importlib import resources

    folder = resources.files("logitlab.server").joinpath("static")
    kinds = {
        "js": "text/javascript; charset=utf-8",
        "css": "text/css; charset=utf-8",
        "html": "text/html; charset=utf-8",
    }
    names = [file.name for file in folder.iterdir() if not file.name.startswith(".")]
    assert {"index.html", "app.js"} <= set(names)
    for name in names:
        answer = app.client.get(f"/static/{name}")
        assert (answer.status_code, answer.content) == (200, folder.joinpath(name).read_bytes())
        assert answer.headers["content-type"] == kinds[name.rpartition(".")[2]]
    component = app.client.get("/static/lens_grid.js")
    assert component.content == resources.files("logitlab.views").joinpath("lens_grid.js").read_bytes()
    assert component.headers["content-type"] == kinds["js"]
    assert app.client.get("/").content == folder.joinpath("index.html").read_bytes()
    assert app.client.head("/").content == b""


def test_websockets_are_refused(app: Running) -> None:
    lines = [
        "GET / HTTP/1.1",
        f"Host: 127.0.0.1:{app.port}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==",
        "Origin: https://evil.example",
    ]
    assert app.raw("\r\n".join([*lines, "Connection: close", "", ""]).encode()).startswith(b"HTTP/1.1 403")


def test_what_fails_inside_is_not_told(
    app: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> Any:
        raise RuntimeError("the secret of /root/secret")

    monkeypatch.setattr(app.server.library, "about", fails)
    assert one_line(bare(app, **BEARER), 500) == "the server failed; its terminal says why"
    until = time.monotonic() + 5
    while "the secret of /root/secret" not in caplog.text:  # it is logged once the answer is on its way
        assert time.monotonic() < until
        time.sleep(0.01)
    monkeypatch.setattr(app.server.library, "model", lambda *_: fails())
    _, error = app.events({"do": "load", "model": "tiny"})[-1]
    assert error == {"message": "the server failed; its terminal says why", "kind": "internal"}


def test_names_not_paths(shelf: Shelf, tmp_path: Any) -> None:
    for place in (tmp_path / "a" / "model", tmp_path / "b" / "model"):
        place.mkdir(parents=True)
    places = [str(tmp_path / "a" / "model"), str(tmp_path / "b" / "model"), "default", "owner/hub-name"]
    assert [(source.name, source.local) for source in named(places)] == [
        ("model", True),
        ("model-2", True),
        ("default", False),
        ("owner/hub-name", False),
    ]
    assert named([str(tmp_path / "gone")])[0].name == "gone"


def test_names_of_links_and_of_paths_without_a_last_part(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = tmp_path / "blobs" / "0123abcd"
    blob.parent.mkdir()
    blob.write_text("")
    link = tmp_path / "model.gguf"
    link.symlink_to(blob)  # as in the cache of the hub
    assert named([str(link)])[0].name == "model.gguf"
    monkeypatch.chdir(blob.parent)
    names = [source.name for source in named([".", "..", str(blob.parent / ".."), "/", "./0123abcd"])]
    assert names == ["blobs", tmp_path.name, f"{tmp_path.name}-2", "root", "0123abcd"]


def test_the_name_of_the_logit_lens_is_taken(tmp_path: Any) -> None:
    (tmp_path / "logit").mkdir()
    places = [str(tmp_path / "logit")]
    assert [source.name for source in named(places * 2, reserved=["logit"])] == ["logit-2", "logit-3"]
    assert named(places)[0].name == "logit"


def test_limits_let_long_prompts_in() -> None:
    assert Limits.of(4096) == Limits()
    for tokens in (1, 60, 4096, 131_072):
        limits = Limits.of(tokens, waiting=3)
        assert (limits.prompt_tokens, limits.waiting) == (tokens, 3)
        assert limits.cells >= 81 * (tokens + limits.new_tokens)
        assert limits.prompt_characters >= 25 * tokens
        assert limits.text_bytes >= 4 * limits.prompt_characters or limits.text_bytes == limits.upload_bytes
        assert limits.upload_bytes >= 4 * limits.prompt_characters
