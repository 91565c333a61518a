"""Where else traces are to be seen."""

from __future__ import annotations

from mesh_client.core.errors import ConfigError


class TraceLinks:
    """Addresses of traces in a Jaeger.

    Args:
        jaeger_ui: its address as people open it, such as ``https://jaeger.example:16686``; empty for none.

    Raises:
        ConfigError: it is no address of a web page.
    """

    def __init__(self, jaeger_ui: str = "") -> None:
        scheme, separator, rest = jaeger_ui.partition("://")
        host = rest.partition("/")[0]
        if jaeger_ui and not (
            scheme in {"http", "https"}
            and separator
            and host
            and jaeger_ui.isascii()
            and jaeger_ui.isprintable()
            and not set(jaeger_ui) & set(' "<>?#@\\')
        ):
            raise ConfigError(f"jaeger_ui: {jaeger_ui!r} is not allowed; expected such as https://jaeger.example:16686")
        self.jaeger_ui = jaeger_ui.rstrip("/")

    def __bool__(self) -> bool:
        return bool(self.jaeger_ui)

    def link(self, trace_id: str) -> str:
        """Where the trace is; empty without a Jaeger."""
        return f"{self.jaeger_ui}/trace/{trace_id}" if self.jaeger_ui else ""
