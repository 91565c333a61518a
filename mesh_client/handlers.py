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
