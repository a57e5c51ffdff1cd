"""What the studio's server refuses: foreign pages, foreign names, bodies without end."""

import asyncio
import http.client
import json
import urllib.error
import urllib.request

import pytest

pytest.importorskip("gradio", reason="needs the extra studio")
from mas.studio_guard import MOST_BYTES, Guard

OPEN = "/gradio_api/component_server"


def ask(address, path="/config", *, method="GET", body=None, **headers):
    """Status and text of an answer; headers with _ for -."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(address + path, body, headers, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil.example"),
        *("", "[::1", "[evil]"),
    ],
)
def test_a_name_that_another_page_has_led_here_gets_nothing(address, host):
    status, text = ask(address, Host=host)
    assert status == 403 and "open it at localhost" in text
    assert "--host 0.0.0.0" in text  # what a proxy needs that keeps the name


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "localhost:9000", "127.0.0.1:80", "[::1]:7860"),
        *("LocalHost.:80", "studio.localhost:7860", "localhost.localdomain"),
    ],
)
def test_the_machines_own_names_are_answered_whatever_the_port(address, host):
    """As behind a tunnel of ssh."""
    assert ask(address, Host=host)[0] == 200


FOREIGN = (
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "http://[evil"},
    {"Origin": "http://evil.example", "Sec_Fetch_Site": "cross-site"},
    {"Sec_Fetch_Site": "same-site"},
)


@pytest.mark.parametrize("headers", FOREIGN)
def test_another_page_cannot_have_the_studio_work(address, headers):
    """A browser sends it such a form unasked, though it keeps the answer from the page."""
    body = json.dumps({"data": "AAAA", "component_id": 1, "fn_name": "x", "session_hash": "x"})
    plain = {"method": "POST", "body": body.encode(), "Content_Type": "text/plain"}
    status, text = ask(address, OPEN, **plain, **headers)
    assert status == 403 and "Another page must not use this studio" in text
    own = {"Origin": address, "Sec_Fetch_Site": "same-origin"}
    assert ask(address, OPEN, **plain, **own)[1] == '{"detail":"Function not found."}'
    assert ask(address, OPEN, **plain)[0] == 404  # a program


def test_another_page_may_neither_ask_what_is_allowed_nor_read(address):
    """Gradio itself allows every page everything where the studio has another name than localhost.

    A page could then name itself as the one that a proxy stands for.
    """
    other = {"Host": "127.0.0.2:7860", "Origin": "http://evil.example"}
    asked = {"Access-Control-Request-Method": "POST"}
    asked |= {"Access-Control-Request-Headers": "x-forwarded-host"}
    assert ask(address, OPEN, method="OPTIONS", **other, **asked)[0] == 403
    assert ask(address, **other)[0] == 403
    assert ask(address, **other, Sec_Fetch_Site="cross-site")[0] == 403
    link = {"Host": "127.0.0.2:7860", "Sec_Fetch_Site": "cross-site"}
    assert ask(address, "/", **link)[0] == 200


def test_nothing_is_uploaded_and_nobody_is_monitored(address):
    form = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n1\r\n--x--\r\n'
    )
    kind = "multipart/form-data; boundary=x"
    for path in ("/gradio_api/upload", "/gradio_api/upload/", "/gradio_api/process_recording"):
        status, text = ask(address, path, method="POST", body=form, Content_Type=kind)
        assert (status, text) == (403, "Nothing is uploaded here.")
    assert ask(address, "/monitoring")[0] == 403


def test_a_body_without_end_is_not_taken(studio):
    connection = http.client.HTTPConnection("127.0.0.1", studio.port, timeout=60)
    connection.putrequest("POST", OPEN)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(MOST_BYTES + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_a_body_of_no_stated_length_is_counted():
    taken, sent = [], []

    async def application(scope, receive, send):
        while True:
            taken.append(len((await receive())["body"]))

    async def receive():
        return {"type": "http.request", "body": bytes(10**6), "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"host", b"localhost")]}
    asyncio.run(Guard(application, host="127.0.0.1", address="127.0.0.1")(scope, receive, send))
    assert sum(taken) == MOST_BYTES and sent[0]["status"] == 413


def ask_guard(headers, **guard):
    """Status of an answer to a post with these headers."""
    sent = []

    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": encoded}
    asyncio.run(Guard(application, **guard)(scope, None, send))
    return sent[0]["status"]


@pytest.mark.parametrize(
    ("origin", "more", "status"),
    [
        ("http://lab:7860", {}, 200),
        ("http://evil.example", {}, 403),
        ("https://studio.example", {"x-forwarded-host": "studio.example"}, 200),  # behind a proxy
        ("https://studio.example", {"sec-fetch-site": "same-origin"}, 200),
    ],
)
def test_in_a_network_every_name_is_answered_but_no_other_page(origin, more, status):
    headers = {"host": "lab:7860", "origin": origin} | more
    assert ask_guard(headers, host="0.0.0.0", address="0.0.0.0") == status


@pytest.mark.parametrize("host", ["workstation", "127.1", "localhost"])
def test_a_name_for_this_machine_alone_lets_no_other_name_in(host):
    """Debian gives a machine's own name 127.0.1.1."""
    guard = {"host": host, "address": "127.0.1.1"}
    for name in ("evil.example", "lab:7860", ""):
        assert ask_guard({"host": name}, **guard) == 403
    for name in (f"{host.title()}:7860", "127.0.1.1:7860", "localhost"):
        assert ask_guard({"host": name}, **guard) == 200
