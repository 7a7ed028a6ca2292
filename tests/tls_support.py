"""A certificate authority and two certificates, made by openssl(1) when a test wants them."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Certificates:
    """`ca.pem`, and `server` and `client` each with `.pem` and `.key`, below `folder`; valid for 127.0.0.1."""

    folder: Path

    def context(self, role: str) -> ssl.SSLContext:
        """A context for `server` or `client` that presents its certificate and wants the peer's."""
        is_server = role == "server"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
        context.load_cert_chain(self.folder / f"{role}.pem", self.folder / f"{role}.key")
        context.load_verify_locations(self.folder / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def channel_credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(
            self._read("ca.pem"), self._read("client.key"), self._read("client.pem")
        )

    def server_credentials(self) -> grpc.ServerCredentials:
        pair = (self._read("server.key"), self._read("server.pem"))
        return grpc.ssl_server_credentials([pair], self._read("ca.pem"), require_client_auth=True)

    def _read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


def make_certificates(folder: Path) -> Certificates:
    """Write the files that Certificates names."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(
        "req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test CA"
    )
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    for role in ("server", "client"):
        openssl("req", *new_key, "-keyout", f"{role}.key", "-out", f"{role}.csr", "-subj", f"/CN={role}")
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{role}.csr", "-out", f"{role}.pem", *signing)
    return Certificates(folder)
