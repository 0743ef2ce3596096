"""Certificates for tests of TLS, in a folder as QEMU and nbdkit want them."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["make_certificates"]


def make_certificates(folder: Path) -> None:
    """An authority, a server for ``localhost`` and 127.0.0.1, and a client."""
    folder.mkdir(exist_ok=True)
    authority, key = _certificate("the authority", None, None, ca=True)
    _write(folder, "ca", authority, None)
    for end in ("server", "client"):
        _write(folder, end, *_certificate("localhost", authority, key, ca=False))


def _certificate(
    name: str,
    issuer: x509.Certificate | None,
    issuer_key: ec.EllipticCurvePrivateKey | None,
    *,
    ca: bool,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    usage = x509.KeyUsage(not ca, False, not ca, False, False, ca, ca, False, False)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(usage, critical=True)
    )
    if not ca:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(issuer_key or key, hashes.SHA256()), key


def _write(
    folder: Path, end: str, made: x509.Certificate, key: ec.EllipticCurvePrivateKey | None
) -> None:
    encoding = serialization.Encoding.PEM
    (folder / f"{end}-cert.pem").write_bytes(made.public_bytes(encoding))
    if key is not None:
        data = key.private_bytes(
            encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (folder / f"{end}-key.pem").write_bytes(data)
