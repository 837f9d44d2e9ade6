"""The HTTP API behind a real server, in a thread of the test's own process."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from ui.app import build_api
from ui.assembly import Fathom


@contextmanager
def serving(fathom: Fathom, *, is_public: bool = False, with_mcp: bool = False) -> Iterator[str]:
    """Serve a library on a free port of this machine, and yield the address."""
    app = build_api(fathom, is_public=is_public, with_mcp=with_mcp)
    config = uvicorn.Config(app, log_level="error", lifespan="on")
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server ended"
            time.sleep(0.02)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(30)
            fathom.batch_runs.close()
            assert not thread.is_alive()
