"""The web page and the HTTP API: one application behind a door and a strict content policy."""

import html
import logging
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rag.errors import FathomError, ServeError
from ui.api import add_api
from ui.assembly import Fathom
from ui.fair_queue import MAX_WAITING
from ui.http_errors import FaultsTold
from ui.look import CSS, SCRIPT, theme
from ui.sign_in import Door, is_loopback
from ui.tabs.batch import build_batch, tables_router
from ui.tabs.chat import build_chat
from ui.tabs.compare import build_compare
from ui.tabs.compare_table import questions_router
from ui.tabs.library import build_library
from ui.tabs.limits import build_limits
from ui.tabs.upload import uploads_router

logger = logging.getLogger(__name__)

# No document and no model output can make the browser fetch anything from elsewhere.
_POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data: blob:",
        "media-src 'self' blob:",
        "font-src 'self' data:",
        "style-src 'self' 'unsafe-inline'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "connect-src 'self'",
        "frame-src 'none'",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),  # with none, a form's origin would be null,
]
_LEAVING_SECONDS = 3  # that an open page may keep a server that was told to stop
_THREADS = MAX_WAITING + 64  # a question that waits for the model holds one

_BRAND = (
    "<h1>Fathom</h1>"
    "<p>Ask long documents. Every answer shows its quotations and how it was read.</p>"
)
_SIGN_OUT = (
    '<form id="account" method="post" action="/logout"><span>{name}</span>'
    "<button>Sign out</button></form>"
)


def build_app(fathom: Fathom, *, is_public: bool = False, with_mcp: bool = False) -> FastAPI:
    """Return the whole web application; nothing is served yet.

    Everybody has to sign in where there are accounts, or where it `is_public`.
    """
    # Gradio gives out what lies here to whoever knows the path: nothing else does
    uploads = fathom.settings.home / "tmp" / "gradio"
    uploads.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    blocks = gr.Blocks(title="Fathom", analytics_enabled=False, delete_cache=(3600, 3600))
    with blocks:
        brand = gr.HTML(_BRAND, elem_id="brand", apply_default_css=False)
        with gr.Tab("Chat") as chat_tab:
            thrift = build_chat(fathom.for_user, blocks, chat_tab, fathom.settings.thrift)
        with gr.Tab("Library") as library_tab:
            build_library(fathom.for_user, library_tab)
        with gr.Tab("Batch") as batch_tab:
            build_batch(fathom.for_user, batch_tab)
        with gr.Tab("Compare") as compare_tab:
            build_compare(fathom.for_user, fathom.given_tables, compare_tab)
        with gr.Tab("Limits") as limits_tab:
            build_limits(fathom, blocks, limits_tab, thrift)

        def greet(request: gr.Request) -> Any:  # noqa: ANN401 - HTML, or no change
            name = fathom.for_user(request).owner
            return _BRAND + _SIGN_OUT.format(name=html.escape(name)) if name else gr.skip()

        blocks.load(greet, None, [brand], show_progress="hidden", api_visibility="private")
    blocks.max_threads = _THREADS
    blocks.queue(default_concurrency_limit=4, max_size=_THREADS, api_open=False)
    options: dict[str, Any] = {
        "theme": theme(),
        "css": CSS,
        "head": f"<script>{SCRIPT}</script>",
        "max_file_size": fathom.settings.max_file_bytes,
        "allowed_paths": [],
        "blocked_paths": [str(fathom.settings.originals_dir), str(fathom.settings.index_dir)],
        "show_error": False,
        "ssr_mode": False,
        "run_history": False,
        "footer_links": [],
    }
    app: FastAPI = gr.mount_gradio_app(
        build_api(fathom, is_public=is_public, with_mcp=with_mcp), blocks, path="/", **options
    )
    return app


def build_api(fathom: Fathom, *, is_public: bool = False, with_mcp: bool = False) -> FastAPI:
    """Return the application without the page: the HTTP API behind the door.

    Raises:
        InstallError: if agents are to be answered `with_mcp`, and the package is not there.
    """
    api = FastAPI(title="Fathom", docs_url=None, redoc_url=None, openapi_url=None)
    add_api(api, fathom)
    api.include_router(uploads_router(fathom))
    api.include_router(tables_router(fathom))
    api.include_router(questions_router(fathom))
    if with_mcp:
        from ui.mcp_server import add_mcp

        add_mcp(api, fathom.for_user)
    api.add_middleware(FaultsTold)
    api.add_middleware(Door, fathom=fathom, is_public=is_public)
    api.add_middleware(_ContentPolicy)
    api.add_middleware(_PageCompressed)
    return api


def serve(
    fathom: Fathom,
    host: str,
    port: int,
    *,
    with_mcp: bool = False,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve the page until the process is stopped; the models are loaded meanwhile.

    Args:
        fathom: the library.
        host: an address of this machine's own; any address where there are accounts.
        port: a free port.
        with_mcp: whether agents are answered at /mcp.
        on_ready: called once the address is taken and the page can be asked for.

    Raises:
        ServeError: if others could reach the address and there is no account, or the port is in
            use.
    """
    is_public = not is_loopback(host)
    if is_public and not fathom.accounts.any():
        raise ServeError(
            f"binding to {host} would show the documents to others, and nobody has to sign in yet",
            hint="make an account first: fathom users add NAME; or serve on 127.0.0.1",
        )
    if is_public:
        logger.warning("passwords travel readably: put a proxy that speaks TLS before %s", host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ServeError(
                f"port {port} of {host} cannot be used: {error.strerror}",
                hint=f"stop the other program, or choose another: fathom serve --port {port + 1}",
            ) from error
        config = uvicorn.Config(
            build_app(fathom, is_public=is_public, with_mcp=with_mcp),
            log_level="warning",
            lifespan="on",
            timeout_graceful_shutdown=_LEAVING_SECONDS,
        )
        listener.listen(config.backlog)  # who connects from here on is waited on
        on_ready()
        threading.Thread(target=_warm_up, args=[fathom], daemon=True).start()
        try:
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            fathom.batch_runs.close()


def _warm_up(fathom: Fathom) -> None:
    """Load both models, so that the first question does not wait for them."""
    try:
        fathom.warm_up()
    except FathomError as error:  # the first question shows it too
        logger.warning("%s; %s", error.message, error.hint)
    fathom.batch_runs.go_on()


class _PageCompressed:
    """Compress the page itself, which Gradio leaves as it is; its scripts and styles it compresses.

    Nothing else: what streams has to come as it is made.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._plain, self._compressed = app, GZipMiddleware(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_page = scope["type"] == "http" and scope["path"] == "/"
        await (self._compressed if is_page else self._plain)(scope, receive, send)


class _ContentPolicy:
    """Put the policy's headers on every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        await self._app(scope, receive, send_with_headers)
