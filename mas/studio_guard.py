"""Who may ask the studio for what: keeps foreign web pages and bodies without end away from it.

In: every request to the page. Out: the request, handed on; or why it is refused.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

MOST_BYTES = 32_000_000  # of a request; the canvas sends a file of 20 MB as 27 MB of text
TOO_MUCH = f"More than {MOST_BYTES // 10**6} MB is too much."
FOR_ITSELF = (
    "This studio is for its own machine: open it at localhost or 127.0.0.1, or start it with "
    "--host 0.0.0.0 for others, or for a proxy that hands on the name it was asked by."
)
NAMES = ("localhost", "localhost.localdomain")  # of this machine; and all that end in .localhost
READING = ("GET", "HEAD", "OPTIONS")
UNUSED = ("/upload", "/process_recording")  # of gradio: what would fill the disk or the processor

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class TooMuch(Exception):
    """A body has more bytes than may be."""


class Guard:
    """ASGI middleware in front of gradio's application, and of gradio's own middleware.

    For that allows foreign pages whatever they ask, where the studio is no localhost.
    """

    def __init__(self, app: App, *, host: str, address: str) -> None:
        """`host` is where the studio was told to listen, `address` what that is in numbers."""
        self.app = app
        self.name, self.local = host.lower(), is_local(address)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Hands a request on, or answers why not."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin1"): x.decode("latin1") for name, x in scope["headers"]}
        if refusal := self._find_refusal(scope, headers):
            await _answer(send, 403, refusal)
            return
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            await _answer(send, 413, TOO_MUCH)
            return
        taken, answered = 0, False

        async def count() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MOST_BYTES:
                raise TooMuch
            return message

        async def note(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self.app(scope, count, note)
        except TooMuch:
            if not answered:
                await _answer(send, 413, TOO_MUCH)

    def _find_refusal(self, scope: Message, headers: dict[str, str]) -> str | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        name = _name_of(host)
        if self.local and name != self.name and not is_local(name):
            # A page elsewhere may have its own name lead to this machine, and then read answers.
            return FOR_ITSELF
        if scope["method"] in READING and origin is None:  # a link; a script would name its page
            return None
        if scope["method"] not in READING and scope["path"].rstrip("/").endswith(UNUSED):
            return "Nothing is uploaded here."
        site = headers.get("sec-fetch-site")
        if site is not None:
            foreign = site not in ("same-origin", "none")
        else:
            own = (host, headers.get("x-forwarded-host"))
            foreign = origin is not None and origin.partition("://")[2] not in own
        return "Another page must not use this studio: open its own." if foreign else None


def is_local(host: str) -> bool:
    """Whether a host is this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        name = host.lower().removesuffix(".")
        return name in NAMES or name.endswith(".localhost")


def _name_of(host: str) -> str:
    """A Host without its port; nothing where it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # brackets around what is no address
        return ""


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
