"""The dashboard's HTTP server: files of the page, signing in, the feed, and what operators do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
from aiohttp import web
from cryptography import x509

from control_plane.access import TOLD_AT_ONCE, TOLD_PER_SECOND
from control_plane.addresses import split_address
from control_plane.dashboard import session_file
from control_plane.dashboard.actions import Actions
from control_plane.dashboard.context import OwnContext, RefusedError
from control_plane.dashboard.feed import Feed
from control_plane.dashboard.links import DashboardLinks
from control_plane.dashboard.options import DashboardOptions
from control_plane.dashboard.requests import Doors, bracketed
from control_plane.dashboard.sessions import Session
from control_plane.dashboard.views import MAX_PARAMETER, Servicers, Shown, Views
from control_plane.files import read_given_secret
from control_plane.identity.limits import CallerLimits
from mesh_client.core.errors import ConfigError
from mesh_client.tasks import in_thread

MAX_BODY = 1024 * 1024
"""Bytes of a request: a policy of 256 KiB, with every character escaped."""
MAX_STREAMS = 100
"""Pages that are open at once."""
WRITE_TIMEOUT = 20.0
"""Seconds after which a page that takes nothing is given up."""

STATIC = Path(__file__).parent / "static"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "Server": "grpc-mesh",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
    grpc.StatusCode.UNAVAILABLE: 503,
}
_SIGN_IN = "nobody is signed in; `mesh dashboard` writes a link that signs you in"

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_Action = Callable[[Shown, OwnContext], Awaitable[Shown]]
_log = logging.getLogger(__name__)


class Dashboard:
    """Serves until it is closed.

    Args:
        servicers: that pages are answered by.
        links: knows who may sign in.
        data_dir: where sessions are kept; None for in memory.
    """

    def __init__(self, servicers: Servicers, links: DashboardLinks, data_dir: Path | None) -> None:
        self._access = servicers.access
        self._links = links
        self._sessions = links.sessions
        self._file = None if data_dir is None or not self._access.secure else data_dir / session_file.NAME
        self._saving = asyncio.Lock()
        self._views = Views(servicers)
        self._feed = Feed(self._views.show)
        self._actions = Actions(servicers)
        self._files = {path.name: path.read_bytes() for path in sorted(STATIC.iterdir()) if path.suffix in _TYPES}
        self._doors = Doors("127.0.0.1", 0, secure=False)
        self._streams = 0
        self._told = CallerLimits(TOLD_PER_SECOND, TOLD_AT_ONCE)
        self._runner: web.AppRunner | None = None

    async def start(self, options: DashboardOptions) -> None:
        """Listens.

        Raises:
            ConfigError: the address or the certificate cannot be used.
        """
        host, port = split_address(options.address, "dashboard_listen")
        tls = _tls(options)
        if self._file is not None:
            self._sessions.restore(await asyncio.to_thread(session_file.load, self._file), time.time())
        app = web.Application(client_max_size=MAX_BODY, middlewares=[self._guard])
        app.on_response_prepare.append(_protect)
        app.router.add_get("/api/session", self._session)
        app.router.add_get("/api/feed/{view}", self._stream)
        app.router.add_post("/api/login", self._login)
        app.router.add_post("/api/logout", self._logout)
        for name in ("validate", "diff", "apply"):
            app.router.add_post(f"/api/policy/{name}", self._does(getattr(self._actions, name)))
        app.router.add_get("/{name:[a-z.]*}", self._static)
        # Streams of pages end when the feed is closed, so nothing has to be waited for.
        runner = self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port, ssl_context=tls).start()
        except OSError as error:
            await self.close()
            message = f"dashboard_listen: cannot listen on {options.address!r}: {error.strerror}"
            raise ConfigError(message) from error
        port = runner.addresses[0][1]
        self._doors = Doors(host, port, secure=tls is not None)
        scheme, name = ("http", host) if options.certificate is None else ("https", _name(host, options.certificate))
        self._links.url = f"{scheme}://{bracketed(name)}:{port}/"
        _log.info("the dashboard is at %s", self._links.url)

    async def close(self) -> None:
        """Ends every stream, and stops listening."""
        self._links.url = ""
        self._feed.close()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    # -- who may ask

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        api = request.path.startswith("/api/")
        refused = self._doors.refusal(request.method, request.headers, api=api)
        if refused is not None:
            return _error(refused.status, "PERMISSION_DENIED", refused.reason)
        try:
            return await handler(request)
        except RefusedError as error:
            return _error(_STATUS.get(error.code, 500), error.code.name, error.details)
        except web.HTTPUnauthorized as error:
            return _error(error.status, "UNAUTHENTICATED", error.reason)
        except web.HTTPNotFound as error:
            return _error(error.status, "NOT_FOUND", self._nothing)
        except web.HTTPException as error:
            return _error(error.status, "INVALID_ARGUMENT", error.reason)

    @property
    def _nothing(self) -> str:
        return (
            "nothing is here; the dashboard is at /, and what its pages show at /api/feed/ and one of "
            f"{', '.join(self._views.names)}, with parameters of at most {MAX_PARAMETER} characters"
        )

    def _signed_in(self, request: web.Request) -> Session | None:
        """Who uses the browser; None without identity.

        Raises:
            web.HTTPUnauthorized: nobody.
        """
        if not self._access.secure:
            return None
        session = self._sessions.find(request.cookies.get(self._cookie, ""), time.time())
        if session is None or self._access.is_revoked(session.identity.caller):
            raise web.HTTPUnauthorized(reason=_SIGN_IN)
        return session

    @property
    def _cookie(self) -> str:
        # Cookies are not kept apart by port; a name of their own keeps two control planes of one host apart.
        return f"{'__Host-' if self._doors.secure else ''}mesh-dashboard-{self._doors.port}"

    def _context(self, request: web.Request, session: Session | None) -> OwnContext:
        return OwnContext(None if session is None else session.identity.certificate, request.remote or "")

    # -- handlers

    async def _static(self, request: web.Request) -> web.Response:
        name = request.match_info["name"] or "index.html"
        content = self._files.get(name)
        if content is None:
            raise web.HTTPNotFound
        return web.Response(body=content, content_type=_TYPES[Path(name).suffix], charset="utf-8")

    async def _session(self, request: web.Request) -> web.Response:
        session = self._signed_in(request)
        if session is None:
            return web.json_response({"operator": None, "expires": None})
        return web.json_response({"operator": session.identity.caller.principal.name, "expires": session.expires})

    async def _login(self, request: web.Request) -> web.Response:
        key = secrets.token_urlsafe(32)
        code = (await _body(request)).get("code")
        session = self._sessions.redeem(code, key, time.time()) if isinstance(code, str) else None
        if session is None or self._access.is_revoked(session.identity.caller):
            self._sessions.end(key)
            if not self._told.take(request.remote or "", time.monotonic()):
                _log.warning("a link to the dashboard is none, was used, or is too old; opened by %s", request.remote)
            raise web.HTTPUnauthorized(
                reason="the link has been used, or is older than a minute; `mesh dashboard` writes another"
            )
        await self._save()
        _log.info("%s signed in to the dashboard from %s", session.identity.caller, request.remote)
        response = web.json_response({"operator": session.identity.caller.principal.name})
        response.set_cookie(
            self._cookie,
            key,
            max_age=max(int(session.expires - time.time()), 0),
            path="/",
            secure=self._doors.secure,
            httponly=True,
            samesite="Strict",
        )
        return response

    async def _logout(self, request: web.Request) -> web.Response:
        if self._sessions.end(request.cookies.get(self._cookie, "")):
            await self._save()
        response = web.json_response({})
        response.del_cookie(self._cookie, path="/", secure=self._doors.secure, httponly=True, samesite="Strict")
        return response

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        session = self._signed_in(request)
        view = self._views.view(request.match_info["view"], request.query)
        if view is None:
            raise web.HTTPNotFound
        if self._streams >= MAX_STREAMS:
            return _error(503, "RESOURCE_EXHAUSTED", f"{MAX_STREAMS} pages are open already")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        ended = asyncio.Event()
        who = None if session is None else session.identity.caller
        self._streams += 1
        try:
            with self._access.cut_when_revoked(who, ended.set):
                await response.prepare(request)
                async with contextlib.aclosing(
                    self._feed.events(view, self._context(request, session), ended)
                ) as events:
                    async for event in events:
                        async with asyncio.timeout(WRITE_TIMEOUT):
                            await response.write(event)
                        self._signed_in(request)  # still
        except (RefusedError, TimeoutError, ConnectionError, web.HTTPUnauthorized) as error:
            _log.debug("a page of the dashboard is told nothing more: %s", error)
        finally:
            self._streams -= 1
        return response

    def _does(self, action: _Action) -> _Handler:
        async def handle(request: web.Request) -> web.Response:
            session = self._signed_in(request)
            return web.json_response(await action(await _body(request), self._context(request, session)))

        return handle

    async def _save(self) -> None:
        if self._file is not None:
            async with self._saving:
                await in_thread(session_file.save, self._file, dict(self._sessions.kept))


async def _protect(request: web.Request, response: web.StreamResponse) -> None:
    del request
    response.headers.update(_HEADERS)


async def _body(request: web.Request) -> Shown:
    """The body, an object.

    Raises:
        RefusedError: it is something else.
    """
    try:
        document = json.loads(await request.text())
    except (ValueError, RecursionError, LookupError):  # no JSON, or of a character set that nobody knows
        document = None
    if not isinstance(document, dict):
        raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "expected a JSON object")
    return document


def _error(status: int, code: str, details: str) -> web.Response:
    return web.json_response({"error": {"code": code, "details": details}}, status=status)


def _tls(options: DashboardOptions) -> ssl.SSLContext | None:
    if options.certificate is None or options.key is None:
        return None
    read_given_secret(options.key)  # others must not be able to read it
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(options.certificate, options.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"dashboard_certificate: {options.certificate} and its key cannot be used: {error}") from None
    return context


def _name(host: str, certificate: Path) -> str:
    """By which name browsers reach a dashboard that listens on all addresses: the first in its certificate."""
    if host not in ("0.0.0.0", "::"):  # noqa: S104 - compared, not listened on
        return host
    leaf = x509.load_pem_x509_certificate(certificate.read_bytes())
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return socket.gethostname()
    found = names.get_values_for_type(x509.DNSName)
    return next((name for name in found if not name.startswith("*")), socket.gethostname())
