"""Objects made on the command line (``--object``): secrets, throttle groups and credentials for TLS
are used, others only checked."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from ..backend.node import Graph
from ..errors import PyvirtioError
from .messages import Failure, say_findings, say_more, text_of, warn
from .optlist import split

__all__ = ["Objects"]

_TYPES: dict[str, tuple[str, ...]] = {
    "secret": ("data", "file", "format", "keyid", "iv"),
    "throttle-group": ("limits", "x-"),
    "iothread": ("poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch", "thread-pool-"),
    "tls-creds-anon": ("dir", "endpoint", "verify-peer", "priority"),
    "tls-creds-psk": ("dir", "endpoint", "verify-peer", "priority", "username"),
    "tls-creds-x509": ("dir", "endpoint", "verify-peer", "priority", "passwordid", "sanity-check"),
    "authz-list": ("policy", "rules"),
    "authz-list-file": ("filename", "refresh"),
    "authz-simple": ("identity",),
}

_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


class Objects:
    """The objects of one run."""

    def __init__(self) -> None:
        self.secrets: dict[str, bytes] = {}
        self.named: dict[str, Any] = {}
        """What drivers take by a name: throttle groups, credentials."""
        self.graph = Graph(
            secrets=self.secrets, objects=self.named, warn=_warn, tell_repairs=say_findings
        )
        """For every image opened in this run."""
        self._known: set[str] = set()

    def add(self, text: str) -> None:
        """Make the object that ``type,id=name,key=value…`` describes. Raises Failure."""
        options = dict(split(text, "qom-type"))
        kind = options.pop("qom-type", None)
        if kind is None:
            raise Failure("Parameter 'qom-type' is missing")
        if kind not in _TYPES:
            raise Failure(f"Parameter 'qom-type' does not accept value '{kind}'")
        name = options.pop("id", None)
        if name is None:
            raise Failure("Parameter 'id' is missing")
        if not _IDENTIFIER.fullmatch(name):
            raise Failure(
                "Parameter 'id' expects an identifier\nIdentifiers consist of letters, digits, "
                "'-', '.', '_', starting with a letter."
            )
        for option in options:
            if not any(option == word or option.startswith(word) for word in _TYPES[kind]):
                raise Failure(f"Parameter '{option}' is unexpected")
        if name in self._known:
            raise Failure(
                f"attempt to add duplicate property '{name}' to object (type 'container')"
            )
        if kind == "secret":
            self.secrets[name] = self._secret(options)
        elif kind == "throttle-group":
            from ..backend.throttle import ThrottleGroup, ThrottleLimits

            self.named[name] = ThrottleGroup(ThrottleLimits.of(options))
        elif kind in ("tls-creds-x509", "tls-creds-psk"):
            self.named[name] = self._credentials(kind, options)
        elif kind == "tls-creds-anon":
            raise Failure("TLS without certificates or keys is not supported")
        self._known.add(name)

    def secret(self, name: str) -> bytes:
        """The contents of a secret. Raises Failure if there is none of that name."""
        try:
            return self.secrets[name]
        except KeyError:
            raise Failure(f"No secret with id '{name}'") from None

    def _credentials(self, kind: str, options: dict[str, str]) -> object:
        """Credentials for TLS, found good as far as that goes without a peer."""
        from ..backend.options import parse_boolean
        from ..backend.tls import TlsCredentials

        endpoint = options.get("endpoint", "client")
        if endpoint not in ("client", "server"):
            raise Failure(f"Parameter 'endpoint' does not accept value '{endpoint}'")
        if "priority" in options:
            raise Failure("Parameter 'priority' is not supported")
        try:
            verify = parse_boolean("verify-peer", options.get("verify-peer", "on"))
            if "dir" not in options:
                raise Failure("Missing 'dir' property value")
            credentials = TlsCredentials(
                options["dir"],
                server=endpoint == "server",
                verify_peer=verify,
                shared_key=kind == "tls-creds-psk",
                username=options.get("username", "qemu"),
                password=self.secret(options["passwordid"]) if "passwordid" in options else None,
            )
            credentials.context()
        except (PyvirtioError, ValueError) as error:
            raise Failure(text_of(error)) from error
        return credentials

    def _secret(self, options: dict[str, str]) -> bytes:
        form = options.get("format", "raw")
        if form not in ("raw", "base64"):
            raise Failure(f"Parameter 'format' does not accept value '{form}'")
        if "file" in options and "data" in options:
            raise Failure("'file' and 'data' are mutually exclusive")
        if "file" in options:
            data = _contents(options["file"])
        elif "data" in options:
            data = options["data"].encode(errors="surrogateescape")
        else:
            raise Failure("Either 'file' or 'data' must be provided")
        if "keyid" in options:
            if "iv" not in options:
                raise Failure("IV is required to decrypt secret")
            data = _decrypted(data, form, self.secret(options["keyid"]), _base64(options["iv"]))
        elif form == "base64":
            data = _base64(data)
        elif "\0" not in options.get("data", ""):
            try:
                data.decode()
            except UnicodeDecodeError:
                raise Failure("Data from secret is not valid UTF-8") from None
        return data


def _warn(message: str) -> None:
    if message.startswith("Image format was not specified"):
        say_more("WARNING: " + "\n         ".join(message.splitlines()) + "\n")
    else:
        warn(message)


def _contents(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20)
    except OSError as error:
        raise Failure(
            f"Unable to read {path}: Failed to open file “{path}”: {error.strerror}"
        ) from error


def _base64(text: str | bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=isinstance(text, str))
    except (ValueError, binascii.Error):
        raise Failure("Base64 data is not valid") from None


def _decrypted(data: bytes, form: str, key: bytes, iv: bytes) -> bytes:
    """A secret that is encrypted with another one (AES-256-CBC, PKCS#7 padding)."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = _base64(key)
    if len(key) != 32:
        raise Failure(f"Key should be 32 bytes in length not {len(key)}")
    if len(iv) != 16:
        raise Failure(f"IV should be 16 bytes in length not {len(iv)}")
    if form == "base64":
        data = _base64(data)
    if not data or len(data) % 16:
        raise Failure("Length of decrypted data is not a multiple of the block size")
    decryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
    plain = decryptor.update(data) + decryptor.finalize()
    padding = plain[-1]
    if not 1 <= padding <= 16 or plain[-padding:] != bytes([padding]) * padding:
        raise Failure(f"Incorrect number of padding bytes ({padding}) found on decrypted data")
    return plain[:-padding]
