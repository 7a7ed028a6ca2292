"""What page streams ask of TLS, for either end."""

from __future__ import annotations

import ssl
from typing import Any


class DirectSSLObject(ssl.SSLObject):
    """The event loop calls these for every record of 16 KiB: without a method of Python's in between.

    Source: Lib/ssl.py of CPython, SSLObject: each does nothing but call the one of the same name.
    """

    _sslobj: Any

    @property
    def read(self) -> Any:
        return self._sslobj.read

    @property
    def write(self) -> Any:
        return self._sslobj.write

    @property
    def pending(self) -> Any:
        return self._sslobj.pending


def prepare(context: ssl.SSLContext) -> None:
    """Make `context` one for HTTP/2."""
    context.set_alpn_protocols(["h2"])
    context.sslobject_class = DirectSSLObject
