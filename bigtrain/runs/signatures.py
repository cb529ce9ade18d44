"""Signatures of exported folders: who has exported them, and that no byte has changed since.

SIGNATURE.json holds a manifest of every other file (size and two hashes), which export it is, and
an Ed25519 signature of the manifest.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from bigtrain.errors import RequestError
from bigtrain.runs.hashes import file_hash

SIGNATURE = "SIGNATURE.json"
MAKE_KEY = "openssl genpkey -algorithm ed25519 -out {key}"
MAKE_PUBLIC_KEY = "openssl pkey -in {key} -pubout -out {public}"


def load_private_key(path: Path) -> Any:
    """An Ed25519 private key. Raises RequestError, with the command that makes one if missing.

    A file that is there would be overwritten by it.
    """
    public = path.with_suffix(".pub.pem")
    make = f"{MAKE_KEY.format(key=path)} && {MAKE_PUBLIC_KEY.format(key=path, public=public)}"
    return _load_key(path, "private", make)


def load_public_key(path: Path) -> Any:
    """An Ed25519 public key. Raises RequestError, with the command that makes one if missing."""
    return _load_key(path, "public", MAKE_PUBLIC_KEY.format(key="KEY.pem", public=path))


def _load_key(path: Path, kind: str, make: str) -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise RequestError(
            "signatures need the package cryptography",
            "it installed beside bigtrain",
            "pip install 'bigtrain[sign]'",
        ) from None
    expected = f"an Ed25519 {kind} key in PEM format, without a password"
    try:
        pem = path.read_bytes()
        if kind == "private":
            key: Any = serialization.load_pem_private_key(pem, password=None)
            is_right = isinstance(key, ed25519.Ed25519PrivateKey)
        else:
            key = serialization.load_pem_public_key(pem)
            is_right = isinstance(key, ed25519.Ed25519PublicKey)
    except FileNotFoundError as problem:
        raise RequestError(f"{path}: {problem.strerror}", expected, make) from None
    except OSError as problem:
        raise RequestError(f"{path}: {problem.strerror}", expected) from None
    except (ValueError, TypeError) as problem:
        found = f"{path} holds no {kind} key that can be read ({problem})"
        raise RequestError(found, expected) from None
    if not is_right:
        raise RequestError(f"{path} holds a {type(key).__name__}", expected)
    return key


def sign_folder(folder: Path, private_key: Any) -> None:
    """Write SIGNATURE.json; `private_key` is what `load_private_key` returns."""
    manifest = {"export": _identity(folder), "files": _entries(folder)}
    signed = {
        "manifest": manifest,
        "public_key": base64.b64encode(private_key.public_key().public_bytes_raw()).decode(),
        "signature": base64.b64encode(private_key.sign(_message(manifest))).decode(),
    }
    (folder / SIGNATURE).write_text(json.dumps(signed, indent=2) + "\n", encoding="utf-8")


def verify_folder(folder: Path, public_key: Any | None) -> list[str]:
    """What is wrong with a signed folder; without a key only whether its files have changed.

    `public_key` is what `load_public_key` returns. Raises RequestError if there is no signature.
    """
    path = folder / SIGNATURE
    try:
        signed = json.loads(path.read_text(encoding="utf-8"))
        manifest = signed["manifest"]
        files = manifest["files"]
        identity = manifest["export"]
        signature = base64.b64decode(signed["signature"], validate=True)
        signer = signed["public_key"]
        if not isinstance(files, dict):
            raise TypeError
    except FileNotFoundError:
        raise RequestError(
            f"{folder} has no {SIGNATURE}: it was never signed",
            "a folder that was exported with --sign",
            "bigtrain export RUN OUT --sign KEY.pem",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        return [f"{SIGNATURE}: cannot be read ({type(problem).__name__})"]
    if public_key is not None:
        problem_with_key = _problem_with_signature(public_key, signature, manifest, signer)
        if problem_with_key:
            return [_printable(problem_with_key)]
    found = _entries(folder)
    problems = [f"{name}: missing" for name in files if name not in found]
    for name, entry in found.items():
        if name not in files:
            problems.append(f"{name}: not in the signed manifest")
        elif entry != files[name]:
            problems.append(f"{name}: content does not match its signed hash")
    ours = _identity(folder)
    if identity != ours:
        problems.insert(0, f"{SIGNATURE}: it is of another export ({identity}; this is {ours})")
    return [_printable(problem) for problem in problems]


def _printable(text: str) -> str:
    """Without what no terminal and no file takes: half of a pair of UTF-16."""
    return text.encode(errors="backslashreplace").decode()


def _problem_with_signature(
    public_key: Any, signature: bytes, manifest: dict[str, Any], signer: str
) -> str:
    from cryptography.exceptions import InvalidSignature

    try:
        public_key.verify(signature, _message(manifest))
    except InvalidSignature:
        if signer == base64.b64encode(public_key.public_bytes_raw()).decode():
            return f"{SIGNATURE}: its manifest was changed after it was signed"
        return f"{SIGNATURE}: signed with another key ({signer}, as it says)"
    return ""


def _message(manifest: dict[str, Any]) -> bytes:
    """The bytes that are signed."""
    return b"bigtrain export manifest\n" + json.dumps(manifest, sort_keys=True).encode()


def _entries(folder: Path) -> dict[str, Any]:
    """Every file but the signature, by its path in the folder."""
    entries: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            entries[name] = {"link": str(path.readlink())}
        elif path.is_file() and name != SIGNATURE:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            entries[name] = {
                "size": path.stat().st_size,
                "blake3": file_hash(path),
                "sha256": sha256,
            }
    return entries


def _identity(folder: Path) -> str:
    """Which export it is, as its bigtrain.json says; empty where it does not."""
    try:
        return str(json.loads((folder / "bigtrain.json").read_text())["export"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
