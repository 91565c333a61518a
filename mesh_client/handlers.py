"""Handlers of RPCs, taken apart and put together again around what a server does with each call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import grpc

if TYPE_CHECKING:
    Handler: TypeAlias = grpc.RpcMethodHandler[Any, Any]
    Wrap: TypeAlias = Callable[[str, Handler], Handler]
    """Makes a handler around one, whose method's full name with its leading slash is given."""

_MAX_WRAPPED_METHODS = 1000


def parts(handler: Handler) -> tuple[Callable[..., Handler], Callable[..., Any]]:
    """How to make a handler of the same kind of RPC, and the function in this one."""
    make: Callable[..., Handler]
    if handler.request_streaming and handler.response_streaming:
        make, behavior = grpc.stream_stream_rpc_method_handler, handler.stream_stream
    elif handler.request_streaming:
        make, behavior = grpc.stream_unary_rpc_method_handler, handler.stream_unary
    elif handler.response_streaming:
        make, behavior = grpc.unary_stream_rpc_method_handler, handler.unary_stream
    else:
        make, behavior = grpc.unary_unary_rpc_method_handler, handler.unary_unary
    return make, cast("Callable[..., Any]", behavior)


def wrap_methods(wrap: Wrap, service_name: str, handlers: Mapping[str, Handler]) -> dict[str, Handler]:
    """Handlers by method name, each wrapped."""
    return {name: wrap(f"/{service_name}/{name}", handler) for name, handler in handlers.items()}


class WrappingHandler(grpc.GenericRpcHandler):
    """Wraps what another generic handler finds. What it finds again for a method is not wrapped again."""

    def __init__(self, wrap: Wrap, handler: grpc.GenericRpcHandler) -> None:
        self._wrap = wrap
        self._handler = handler
        self._wrapped: dict[str, tuple[Handler, Handler]] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """The method's handler, wrapped; None for an unknown one."""
        found = self._handler.service(handler_call_details)
        if found is None:
            return None
        method = handler_call_details.method
        known = self._wrapped.get(method)
        if known is not None and known[0] is found:
            return known[1]
        if len(self._wrapped) >= _MAX_WRAPPED_METHODS:  # a proxy that serves whatever method it is asked for
            self._wrapped.clear()
        wrapped = self._wrap(method, found)
        self._wrapped[method] = (found, wrapped)
        return wrapped


class SyncContext:
    """A servicer context of a plain handler that can be asked for the status set on it, as asynchronous ones can."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._code: Any = None
        self._details: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def code(self) -> Any:
        """The status that was set; None for none."""
        return self._code

    def details(self) -> Any:
        """Its message."""
        return self._details

    def set_code(self, code: Any) -> None:
        """As for `grpc.ServicerContext`."""
        self._code = code
        self._context.set_code(code)

    def set_details(self, details: Any) -> None:
        """As for `grpc.ServicerContext`."""
        self._details = details
        self._context.set_details(details)

    def abort(self, code: Any, details: Any = "", trailing_metadata: Any = ()) -> None:
        """As for `grpc.ServicerContext`."""
        self._code, self._details = code, details
        self._context.abort(code, details, trailing_metadata)

    def abort_with_status(self, status: Any) -> None:
        """As for `grpc.ServicerContext`."""
        self._code, self._details = status.code, status.details
        self._context.abort_with_status(status)


_CODES: dict[Any, str] = {code.value[0]: code.name for code in grpc.StatusCode}


def status_name(code: Any, unset: str) -> str:
    """The name of a status that a servicer context holds, which is a number, a `grpc.StatusCode` or None."""
    if isinstance(code, grpc.StatusCode):
        return code.name
    return _CODES.get(code, unset)
