"""Which transport a daemon uses, from its configuration."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Code, ConfigError

if TYPE_CHECKING:
    import grpc

    from ..config import DaemonConfig
    from . import TransportFactory


def make_factory(config: DaemonConfig) -> TransportFactory:
    """Return what makes the transport of a HOST:PORT.

    Raises:
        ConfigError: a TLS file cannot be read or used.
    """
    if config.transport == "native":
        from .native import NativeTransport

        context = _ssl_context(config)
        timeout_s = config.connect_timeout_s
        return lambda target: NativeTransport(
            target, tls=context, connect_timeout_s=timeout_s, call_timeout_s=timeout_s
        )
    # Each is loaded only where it is used: a daemon that comes back has guests waiting.
    from .grpcio import GrpcioTransport, Timeouts

    credentials = _credentials(config)
    timeouts = Timeouts(connect_s=config.connect_timeout_s)
    return lambda target: GrpcioTransport(target, timeouts=timeouts, credentials=credentials)


def _read(key: str, path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            Code.CONFIG_UNREADABLE, f"tls.{key} = {path} cannot be read: {error.strerror}"
        ) from error


def _credentials(config: DaemonConfig) -> grpc.ChannelCredentials | None:
    if not config.tls.ca:
        return None
    import grpc

    return grpc.ssl_channel_credentials(
        _read("ca", config.tls.ca), _read("key", config.tls.key), _read("cert", config.tls.cert)
    )


def _ssl_context(config: DaemonConfig) -> ssl.SSLContext | None:
    if not config.tls.ca:
        return None
    try:
        context = ssl.create_default_context(cafile=config.tls.ca)
        if config.tls.cert:
            context.load_cert_chain(config.tls.cert, config.tls.key or None)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(Code.CONFIG_UNREADABLE, f"the tls files cannot be used: {error}") from error
    return context
