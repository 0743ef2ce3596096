"""Credentials for TLS, in the folders and under the names that QEMU and nbdkit give them.

Certificates: ``ca-cert.pem``, ``ca-crl.pem``, and ``server-cert.pem`` and ``server-key.pem`` or
``client-cert.pem`` and ``client-key.pem``. Shared keys: ``keys.psk`` with lines ``name:hex``, for
Pythons that can do that (3.13).
"""

from __future__ import annotations

import errno
import os
import ssl
import sys
from dataclasses import dataclass

from ..errors import BackendError, UnsupportedError

__all__ = ["TlsCredentials", "read_keys"]

_PSK_CIPHERS = "kECDHEPSK:kDHEPSK:kPSK"


@dataclass(frozen=True, slots=True)
class TlsCredentials:
    """What one end of connections shows and demands (QEMU's ``tls-creds-x509`` and ``-psk``)."""

    folder: str
    server: bool = False
    verify_peer: bool = True
    """A client demands a certificate of the server's name; a server, one of the authority."""
    shared_key: bool = False
    username: str = "qemu"
    """With a shared key: the client's."""
    password: bytes | None = None
    """Of the private key."""

    def context(self) -> ssl.SSLContext:
        """For :mod:`ssl`.

        Raises BackendError or ValueError if what is in the folder cannot be used.
        """
        protocol = ssl.PROTOCOL_TLS_SERVER if self.server else ssl.PROTOCOL_TLS_CLIENT
        context = ssl.SSLContext(protocol)
        if self.shared_key:
            self._take_shared_key(context)
        else:
            self._take_certificates(context)
        return context

    def _take_certificates(self, context: ssl.SSLContext) -> None:
        demanding = self.verify_peer
        authority = self._path("ca-cert.pem", needed=demanding or not self.server)
        end = "server" if self.server else "client"
        certificate = self._path(f"{end}-cert.pem", needed=self.server)
        key = self._path(f"{end}-key.pem", needed=certificate is not None)
        revoked = self._path("ca-crl.pem", needed=False)
        try:
            if authority is not None:
                context.load_verify_locations(authority)
            if certificate is not None:
                context.load_cert_chain(certificate, key, lambda: self.password or b"")
            if revoked is not None:
                context.load_verify_locations(revoked)
                context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        except (ssl.SSLError, ValueError) as error:
            reason = getattr(error, "reason", None) or str(error)
            raise ValueError(f"Unable to use the certificates in {self.folder}: {reason}") from None
        if not self.server:
            context.check_hostname = demanding
        context.verify_mode = ssl.CERT_REQUIRED if demanding else ssl.CERT_NONE

    def _take_shared_key(self, context: ssl.SSLContext) -> None:
        if sys.version_info < (3, 13):
            raise UnsupportedError("TLS with shared keys needs Python 3.13", feature="tls-psk")
        path = self._path("keys.psk")
        assert path is not None, "it is needed"
        keys = read_keys(path)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        if self.server:
            context.set_ciphers(_PSK_CIPHERS)
            context.set_psk_server_callback(lambda name: keys.get(name or "", b""))
            return
        if self.username not in keys:
            raise ValueError(f"Username {self.username} not found in {path}")
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_ciphers(_PSK_CIPHERS)
        context.set_psk_client_callback(lambda hint: (self.username, keys[self.username]))

    def _path(self, name: str, *, needed: bool = True) -> str | None:
        """The path of a file in the folder; None if it is not there, and not needed."""
        path = os.path.join(self.folder, name)
        try:
            with open(path, "rb"):
                return path
        except OSError as error:
            if error.errno == errno.ENOENT and not needed:
                return None
            raise BackendError.wrap(error, f"Unable to access credentials {path}") from error


def read_keys(path: str) -> dict[str, bytes]:
    """The shared keys in a file of lines ``name:hex``. Raises BackendError or ValueError."""
    keys = {}
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                name, colon, key = line.strip().rpartition(":")
                if colon:
                    keys[name] = bytes.fromhex(key)
    except OSError as error:
        raise BackendError.wrap(error, f"Unable to access credentials {path}") from error
    except ValueError:
        raise ValueError(f"{path} is no list of names and keys") from None
    return keys
