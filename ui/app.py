"""The web page and the HTTP API: one application behind a door and a strict content policy."""

import logging
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rag.errors import FathomError, ServeError
from ui.api import add_api
from ui.assembly import Fathom
from ui.fair_queue import MAX_WAITING
from ui.http_errors import FaultsTold
from ui.sign_in import Door, is_loopback
from ui.tabs.chat import build_chat
from ui.tabs.library import build_library

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

_CSS = """
.gradio-container { width: 100% !important; max-width: 1200px !important; margin: 0 auto; }
footer { display: none !important; }
#brand { margin-bottom: .6rem; }
#brand h1 { font-size: 1.4rem; margin: 0; letter-spacing: -0.01em; }
#brand p { opacity: .75; margin: .1rem 0 0; }
#chat { gap: 1.6rem; }
#documents .wrap { max-height: 40vh; overflow-y: auto; }
#upload-note { font-size: .85em; opacity: .8; }
#question textarea { padding: .6rem .8rem; }
.answer { line-height: 1.65; }
.marker { font-weight: 600; padding: 0 .15em; color: var(--primary-700); }
.dark .marker { color: var(--primary-300); }
.unverified { font-size: .8em; border: 1px solid currentColor; border-radius: 4px;
  padding: 0 .35em; margin-left: .3em; color: #b45309; }
.dark .unverified { color: #fbbf24; }
ol.citations { margin: .8rem 0 .6rem 1.2rem !important; padding: 0; font-size: .92em; }
ol.citations li { margin: 0 0 .6rem !important; }
ol.citations blockquote { margin: 0 !important; padding: .05rem .8rem;
  border-left: 3px solid var(--primary-400); }
ol.citations cite { display: block; padding-left: calc(.8rem + 3px); font-style: normal;
  font-size: .92em; opacity: .75; }
details.receipt { margin-top: .6rem; font-size: .88em; border-top: 1px solid
  var(--border-color-primary); padding-top: .5rem; overflow-x: auto; }
details summary { cursor: pointer; }
details.more { font-size: .88em; }
details.receipt table { border-collapse: collapse; margin: .6rem 0; border: 0; }
details.receipt th, details.receipt td { text-align: left; padding: .15rem 1rem .15rem 0;
  border: 0 !important; font-variant-numeric: tabular-nums; white-space: nowrap; }
details.receipt tr.failed td { color: #b91c1c; font-weight: 600; }
.dark details.receipt tr.failed td { color: #fca5a5; }
details.receipt dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem;
  margin: 0; }
details.receipt dt { opacity: .7; } details.receipt dd { margin: 0; }
.problem { border-left: 3px solid #b91c1c; padding-left: .8rem; }
figure.evidence { line-height: 1.6; margin: 0; padding: .4rem .2rem; overflow-wrap: anywhere; }
figure.evidence figcaption { font-size: .88em; opacity: .75; margin-bottom: .4rem; }
figure.evidence mark, .citations mark { background: #fde68a; color: #1c1917; padding: .05em .1em; }
#deleting { margin-top: 1rem; align-items: center; }
#conversation .placeholder-content { padding: 0 1.2rem; }
@media (max-width: 680px) {
  #chat > #side { order: 2; }
  details.receipt dl { grid-template-columns: 1fr; } details.receipt dd { margin-bottom: .3rem; }
}
"""


def build_app(fathom: Fathom, *, is_public: bool = False) -> FastAPI:
    """Return the whole web application; nothing is served yet.

    Everybody has to sign in where there are accounts, or where it `is_public`.
    """
    # Gradio gives out what lies here to whoever knows the path: nothing else does
    uploads = fathom.settings.home / "tmp" / "gradio"
    uploads.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    blocks = gr.Blocks(title="Fathom", analytics_enabled=False, delete_cache=(3600, 3600))
    with blocks:
        gr.Markdown(
            "# Fathom\nAsk long documents. Every answer shows its quotations and how it was read.",
            elem_id="brand",
        )
        with gr.Tab("Chat") as chat_tab:
            build_chat(fathom.for_user, blocks, chat_tab)
        with gr.Tab("Library") as library_tab:
            build_library(fathom.for_user, library_tab)
    blocks.max_threads = _THREADS
    blocks.queue(default_concurrency_limit=4, max_size=_THREADS, api_open=False)
    theme = gr.themes.Soft(
        primary_hue="teal",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_padding="0",
        body_background_fill="*neutral_50",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        checkbox_border_width="1px",
        checkbox_border_color="*neutral_400",
        checkbox_border_color_dark="*neutral_500",
    )
    options: dict[str, Any] = {
        "theme": theme,
        "css": _CSS,
        "max_file_size": fathom.settings.max_file_bytes,
        "allowed_paths": [],
        "blocked_paths": [str(fathom.settings.originals_dir), str(fathom.settings.index_dir)],
        "show_error": False,
        "ssr_mode": False,
        "run_history": False,
        "footer_links": [],
    }
    app: FastAPI = gr.mount_gradio_app(
        build_api(fathom, is_public=is_public), blocks, path="/", **options
    )
    return app


def build_api(fathom: Fathom, *, is_public: bool = False) -> FastAPI:
    """Return the application without the page: the HTTP API behind the door."""
    api = FastAPI(title="Fathom", docs_url=None, redoc_url=None, openapi_url=None)
    add_api(api, fathom)
    api.add_middleware(FaultsTold)
    api.add_middleware(Door, fathom=fathom, is_public=is_public)
    api.add_middleware(_ContentPolicy)
    return api


def serve(
    fathom: Fathom, host: str, port: int, *, on_ready: Callable[[], None] = lambda: None
) -> None:
    """Serve the page until the process is stopped; the models are loaded meanwhile.

    Args:
        fathom: the library.
        host: an address of this machine's own; any address where there are accounts.
        port: a free port.
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
            build_app(fathom, is_public=is_public),
            log_level="warning",
            lifespan="on",
            timeout_graceful_shutdown=_LEAVING_SECONDS,
        )
        listener.listen(config.backlog)  # who connects from here on is waited on
        on_ready()
        threading.Thread(target=_warm_up, args=[fathom], daemon=True).start()
        uvicorn.Server(config).run(sockets=[listener])


def _warm_up(fathom: Fathom) -> None:
    """Load both models, so that the first question does not wait for them."""
    try:
        fathom.warm_up()
    except FathomError as error:  # the first question shows it too
        logger.warning("%s; %s", error.message, error.hint)


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
