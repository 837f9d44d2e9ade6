"""Who is let in: the one door that every request passes, sign-in page, sessions and API keys.

Without any account the server is one person's, on this machine's own address, and asks nothing.
With accounts a request carries a session cookie or an API key, or gets nothing but the sign-in
page. Whoever was let in stands in the request's scope, and `Fathom.for_user` gives handlers his
view of the library: a handler that has not been through here has no owner, and fails.
"""

import html
import ipaddress
import logging
import time
from collections import deque
from contextlib import suppress
from threading import Lock
from urllib.parse import parse_qs, urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from rag.errors import AccountError
from rag.store.accounts import SESSION_DAYS
from ui.assembly import Fathom
from ui.http_errors import PlainError

logger = logging.getLogger(__name__)

COOKIE = "fathom_session"
_OPEN_PATHS = ("/login", "/healthz")
# A page elsewhere whose name was made to point here must not read the documents (DNS rebinding).
_OWN_NAMES = ("127.0.0.1", "localhost", "::1", "[::1]")
_UPLOADS = ("/v1/documents", "/uploads")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_FORM_BYTES = 8192
_BODY_BYTES = 32 * 2**20  # of a request that is no upload; the page sends its conversation along
_FAILURES, _FAILURE_SECONDS = 10, 300.0  # so many wrong passwords for one name or address
_MOST_WATCHED = 10_000

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Fathom: sign in</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; font-family: system-ui, sans-serif; }}
body {{ display: grid; place-items: center; min-height: 90vh; margin: 0; }}
form {{ display: grid; gap: .8rem; width: min(20rem, 85vw); }}
h1 {{ font-size: 1.4rem; margin: 0; }} label {{ display: grid; gap: .3rem; }}
input, button {{ font: inherit; padding: .55rem .7rem; border-radius: 6px;
  border: 1px solid #78716c; }}
button {{ background: #0f766e; color: white; border: 0; cursor: pointer; }}
.problem {{ border-left: 3px solid #b91c1c; padding-left: .7rem; margin: 0; }}
</style></head><body><form method="post" action="/login">
<h1>Fathom</h1>{problem}
<label>Name <input name="name" autocomplete="username" required autofocus></label>
<label>Password <input name="password" type="password" autocomplete="current-password" required>
</label><button>Sign in</button></form></body></html>"""


class Door:
    """ASGI middleware: refuses what comes from elsewhere, finds out who asks, shows the sign-in."""

    def __init__(self, app: ASGIApp, fathom: Fathom, *, is_public: bool) -> None:
        """Stand before an application.

        Args:
            app: the application.
            fathom: its library.
            is_public: whether others can reach the address; then nobody is let in unasked, even if
                the last account is removed while the server runs.
        """
        self._app = RequestBodyLimitMiddleware(app, _BODY_BYTES)
        self._with_uploads = RequestBodyLimitMiddleware(app, fathom.settings.max_bytes_per_user)
        self._fathom = fathom
        self._asks = is_public
        self._failures = _Failures()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let it through with its owner's name in the scope."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":  # nothing here speaks it
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        response = await self._answer(request)
        if response is not None:
            await response(scope, receive, send)
            return
        is_upload = request.url.path in _UPLOADS
        await (self._with_uploads if is_upload else self._app)(scope, receive, send)

    async def _answer(self, request: Request) -> Response | None:
        """Return what is answered here, or None where the application may answer."""
        # an account that is made while the server runs closes the door for good
        self._asks = self._asks or await run_in_threadpool(self._fathom.accounts.any)
        host = request.headers.get("host", "")
        if not self._asks and _name_of(host) not in _OWN_NAMES:
            return PlainError(400, "this server answers to its own machine only")
        if request.method not in _SAFE_METHODS and not _is_same_origin(request.headers, host):
            self._fathom.metrics.count_refusal("origin")
            return PlainError(403, "the request comes from another site")
        if not self._asks:
            request.scope["fathom_owner"] = ""
            return RedirectResponse("/", 303) if request.url.path == "/login" else None
        if request.url.path == "/login":
            return await self._login(request)
        owner = await run_in_threadpool(self._owner, request)
        if request.url.path == "/logout" and request.method == "POST":
            if secret := request.cookies.get(COOKIE):
                await run_in_threadpool(self._fathom.accounts.close_session, secret)
            gone = RedirectResponse("/login", 303)
            gone.delete_cookie(COOKIE)
            return gone
        if owner is not None:
            request.scope["fathom_owner"] = owner
            return None
        if request.url.path in _OPEN_PATHS or _is_local_metrics(request):
            return None
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return RedirectResponse("/login", 303)
        refused = PlainError(401, "sign in, or give an API key")
        refused.headers["www-authenticate"] = "Bearer"
        return refused

    def _owner(self, request: Request) -> str | None:
        kind, _, secret = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return self._fathom.accounts.account_of_key(secret.strip())
        if secret := request.cookies.get(COOKIE, ""):
            return self._fathom.accounts.account_of_session(secret)
        return None

    async def _login(self, request: Request) -> Response:
        if request.method != "POST":
            return HTMLResponse(_PAGE.format(problem=""))
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _FORM_BYTES:
                return PlainError(413, "the request is too large")
        form = parse_qs(body.decode("utf-8", "replace"))
        name, password = form.get("name", [""])[0].strip()[:80], form.get("password", [""])[0]
        address = request.client.host if request.client else ""
        if not self._failures.may_try(name, address):
            self._fathom.metrics.count_refusal("sign-in rate")
            minutes = round(_FAILURE_SECONDS / 60)
            return _sign_in_page(429, f"Too many wrong passwords. Try again in {minutes} minutes.")
        accounts = self._fathom.accounts
        secret = None
        if await run_in_threadpool(accounts.password_is_right, name, password):
            with suppress(AccountError):  # removed in this moment
                secret = await run_in_threadpool(accounts.open_session, name)
        if secret is None:
            self._failures.add(name, address)
            self._fathom.metrics.count_refusal("sign-in")
            logger.warning("a sign-in failed from %s", address)
            return _sign_in_page(403, "Name or password is wrong.")
        self._failures.forget(name)
        welcome = RedirectResponse("/", 303)
        welcome.set_cookie(
            COOKIE,
            secret,
            max_age=SESSION_DAYS * 86400,
            httponly=True,
            samesite="lax",
            secure=request.url.scheme == "https",
        )
        return welcome


class _Failures:
    """When sign-ins failed of late, by name and by address."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._times: dict[str, deque[float]] = {}

    def may_try(self, name: str, address: str) -> bool:
        since = time.monotonic() - _FAILURE_SECONDS
        with self._lock:
            for key in (f"name {name}", f"address {address}"):
                times = self._times.get(key)
                while times and times[0] < since:
                    times.popleft()
                if times is not None and len(times) >= _FAILURES:
                    return False
        return True

    def add(self, name: str, address: str) -> None:
        with self._lock:
            for key in (f"name {name}", f"address {address}"):
                self._times.setdefault(key, deque(maxlen=_FAILURES)).append(time.monotonic())
            while len(self._times) > _MOST_WATCHED:
                del self._times[next(iter(self._times))]

    def forget(self, name: str) -> None:
        with self._lock:
            self._times.pop(f"name {name}", None)


def is_loopback(host: str) -> bool:
    """Say whether an address is this machine's own and cannot be reached from another."""
    try:
        return ipaddress.ip_address("127.0.0.1" if host == "localhost" else host).is_loopback
    except ValueError:
        return False


def _sign_in_page(status: int, problem: str) -> HTMLResponse:
    shown = f'<p class="problem" role="alert">{html.escape(problem)}</p>'
    return HTMLResponse(_PAGE.format(problem=shown), status)


def _name_of(host: str) -> str:
    """Return a Host header without its port."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() and not host.endswith("]") else host


def _is_same_origin(headers: Headers, host: str) -> bool:
    """Say whether a request that changes something was sent by a page of ours, or by a program.

    A browser names the page's origin; a program sends neither of these headers.
    """
    if "sec-fetch-site" in headers:
        return headers["sec-fetch-site"] in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == host


def _is_local_metrics(request: Request) -> bool:
    """Say whether the counts are asked for on this machine itself, not through a proxy."""
    forwarded = "x-forwarded-for" in request.headers or "forwarded" in request.headers
    local = request.client is not None and is_loopback(request.client.host)
    return request.url.path == "/metrics" and local and not forwarded
