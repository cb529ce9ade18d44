"""Signed exports: a changed byte, another key and another export's signature are told apart."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import bigtrain

from bigtrain.errors import RequestError
from bigtrain.runs.signatures import (
    MAKE_KEY,
    MAKE_PUBLIC_KEY,
    SIGNATURE,
    load_private_key,
    load_public_key,
    sign_folder,
    verify_folder,
)

pytestmark = pytest.mark.trained


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """With the commands that bigtrain tells people to type."""
    key, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    subprocess.run(shlex.split(MAKE_KEY.format(key=key)), check=True)
    subprocess.run(shlex.split(MAKE_PUBLIC_KEY.format(key=key, public=public)), check=True)
    return key, public


def make_export(folder: Path, identity: str) -> Path:
    folder.mkdir()
    (folder / "bigtrain.json").write_text(json.dumps({"export": identity}))
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text(f"{name} of {identity}")
    return folder


def test_what_was_changed_added_or_taken_away_is_named(tmp_path: Path) -> None:
    key, public = make_keys(tmp_path, "mine")
    export = make_export(tmp_path / "export", "one")
    sign_folder(export, load_private_key(key))
    trusted = load_public_key(public)
    assert verify_folder(export, trusted) == []
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        path = export / name
        content = path.read_bytes()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        for known in (trusted, None):
            assert verify_folder(export, known) == [
                f"{name}: content does not match its signed hash"
            ]
        path.unlink()
        assert verify_folder(export, trusted) == [f"{name}: missing"]
        path.write_bytes(content)
    (export / "extra.py").write_text("")
    assert verify_folder(export, trusted) == ["extra.py: not in the signed manifest"]


def test_another_key_and_another_exports_signature_are_refused(tmp_path: Path) -> None:
    key, public = make_keys(tmp_path, "mine")
    other_key, other_public = make_keys(tmp_path, "other")
    one = make_export(tmp_path / "one", "one")
    two = make_export(tmp_path / "two", "two")
    sign_folder(one, load_private_key(key))
    sign_folder(two, load_private_key(key))
    (problem,) = verify_folder(one, load_public_key(other_public))
    assert "signed with another key" in problem
    # Hashes and all made to fit, but without the private key.
    forged = json.loads((one / SIGNATURE).read_text())
    (one / "config.json").write_text("changed")
    sign_folder(one, load_private_key(other_key))
    forged["manifest"] = json.loads((one / SIGNATURE).read_text())["manifest"]
    (one / SIGNATURE).write_text(json.dumps(forged))
    (problem,) = verify_folder(one, load_public_key(public))
    assert "its manifest was changed" in problem
    shutil.copy(two / SIGNATURE, one / SIGNATURE)
    assert (
        "it is of another export (two; this is one)"
        in verify_folder(one, load_public_key(public))[0]
    )


def test_the_command_line_verifies_and_refuses(tmp_path: Path) -> None:
    key, public = make_keys(tmp_path, "mine")
    export = make_export(tmp_path / "export", "one")
    unsigned = bigtrain("verify", "export", "--key", str(public), cwd=tmp_path)
    assert unsigned.returncode == 2 and "--sign" in unsigned.stderr
    sign_folder(export, load_private_key(key))
    assert bigtrain("verify", "export", "--key", str(public), cwd=tmp_path).returncode == 0
    (export / "config.json").write_text("changed")
    changed = bigtrain("verify", "export", "--key", str(public), "--json", cwd=tmp_path)
    assert changed.returncode == 1
    assert json.loads(changed.stdout) == {
        "export": ["config.json: content does not match its signed hash"],
        "authenticated": False,
    }
    sign_folder(export, load_private_key(key))
    for options, authenticated in ((["--key", str(public)], True), ([], False)):
        done = bigtrain("verify", "export", "--json", *options, cwd=tmp_path)
        assert json.loads(done.stdout) == {"export": [], "authenticated": authenticated}
    surrogate = {"files": {"\ud800": {}}, "export": "one"}
    for manifest, said in (
        ({"files": ["config.json"], "export": "one"}, "cannot be read"),
        (surrogate, "missing"),
    ):
        signed = {"manifest": manifest, "signature": "", "public_key": ""}
        (export / SIGNATURE).write_text(json.dumps(signed))
        done = bigtrain("verify", "export", cwd=tmp_path)
        assert done.returncode == 1 and said in done.stdout and "Traceback" not in done.stderr


def test_what_is_no_ed25519_key_is_refused(tmp_path: Path) -> None:
    key, public = make_keys(tmp_path, "mine")
    rsa = tmp_path / "rsa.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "rsa", "-out", rsa], check=True)
    for path, said in ((rsa, "RSA"), (public, "private key"), (tmp_path / "no.pem", "No such")):
        with pytest.raises(RequestError, match=said) as refused:
            load_private_key(path)
        # Its command would overwrite a key that is there.
        assert ("openssl genpkey -algorithm ed25519" in str(refused.value)) != path.exists()
    with pytest.raises(RequestError, match="public key"):
        load_public_key(key)
