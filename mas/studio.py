"""`mas studio`: a page in the browser where a scene is drawn and becomes a picture.

In: a model. Out: the page of mas/studio_page.py, served until somebody ends it. Needs the extra
studio (gradio).
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import gradio as gr
from starlette.applications import Starlette

from mas.model import MakeAScene
from mas.painter import Painter
from mas.precision import Precision
from mas.studio_canvas import CSS
from mas.studio_guard import Guard
from mas.studio_page import Page

LOOK_UP = 0.2  # seconds until a signal is noticed, at most


def studio(
    *,
    model: str = "park",
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Serves a page on which scenes are drawn and painted, until it is interrupted.

    Args:
        model: park, a model folder, or a model of the Hugging Face hub.
        host: address to listen at; 127.0.0.1 = this machine only, 0.0.0.0 = whoever can reach it.
        port: of the page.
        device: auto, cpu, cuda, …
        precision: of the GPT; auto takes what is best on the device.

    Raises:
        ModelError: no such model, or not all of it.
        ValueError: as `check_address`.
    """
    address = check_address(host, port)
    network = MakeAScene.from_pretrained(model, device=device, precision=precision)
    # Both leave as by Ctrl-C, with nothing left behind. A shell that starts a command in the
    # background has it ignore SIGINT.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="mas-studio-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # what is uploaded and shown goes with the rest
        painter = Painter(network)
        page = Page(painter, model, Path(folder)).build()
        try:
            page.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                show_error=True,
                prevent_thread_lock=True,
                allowed_paths=[folder],
                footer_links=[],
                run_history=False,
                max_file_size="1kb",  # nothing is uploaded: the canvas sends its files itself
                enable_monitoring=False,
                app_kwargs={"lifespan": guarded(host, address)},
                css=CSS,
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            )
            print(f"http://{host}:{port} (Ctrl-C ends it)", flush=True)
            while True:  # not for ever at once: a signal may reach another thread than this one
                time.sleep(LOOK_UP)
        except KeyboardInterrupt:
            print("The studio is closed.")
        finally:
            painter.close()
            page.close(verbose=False)


def guarded(host: str, address: str) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    """Puts a guard in front of an application, all its middleware included, before it serves."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        assert app.middleware_stack is not None  # it has called this
        app.middleware_stack = Guard(app.middleware_stack, host=host, address=address)
        yield

    return lifespan


def check_address(host: str, port: int) -> str:
    """Tries whether the page can be served there, before a model is loaded for it.

    Returns:
        The address that `host` is, in numbers.

    Raises:
        ValueError: no port, one that is taken, or no address of this machine.
    """
    if not host:
        raise ValueError("--host is empty, use 127.0.0.1 for this machine alone, 0.0.0.0 for all")
    if not 0 < port < 2**16:
        raise ValueError(f"--port is {port}, use a number from 1 to {2**16 - 1}")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return probe.getsockname()[0]
    except OSError as error:
        raise ValueError(
            f"{host}:{port} cannot be served at ({error.strerror}): use another --port, or as "
            "--host an IPv4 address of this machine"
        ) from error
