"""Of the CUDA sources: what a library was built from, so that one that was carried along can be told from the sources here."""

import hashlib
from pathlib import Path


def fingerprint() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.*")):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
