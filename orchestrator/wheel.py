"""A wheel of exactly the code that is running: the installed package, or the checkout with what is not committed.

Made from the files that this process would import, without a build tool, so that it works from an editable install
and from an installed wheel alike. The same code gives the same bytes: a cluster that has them takes them from its
cache. Dependencies are not named in it; the cluster's environment has them.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import zipfile
from importlib import metadata
from pathlib import Path

ROOMS = ("kernels", "parallel", "models", "data", "workers", "orchestrator")
LEFT_OUT = ("__pycache__",)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a ZIP file knows


def build_wheel(directory: Path) -> Path:
    """Writes the wheel into `directory`; its path. The version's local part is the digest of the code."""
    files = {name: path.read_bytes() for name, path in package_files().items()}
    version = f"{metadata.version('longstride').partition('+')[0]}+code.{_digest(files)[:12]}"
    about = f"longstride-{version}.dist-info"
    files[f"{about}/METADATA"] = f"Metadata-Version: 2.1\nName: longstride\nVersion: {version}\n".encode()
    files[f"{about}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: longstride\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{about}/entry_points.txt"] = b"[console_scripts]\nlongstride = longstride.orchestrator.cli:main\n"
    files[f"{about}/RECORD"] = _record(files, f"{about}/RECORD").encode()
    wheel = directory / f"longstride-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, files[name])
    return wheel


def package_files() -> dict[str, Path]:
    """Every file of the package, by its name below the installation's root."""
    found: dict[str, Path] = {}
    for room in ROOMS:
        module = importlib.import_module(f"longstride.{room}")
        root = Path(str(module.__file__)).parent
        for path in sorted(root.rglob("*")):
            inside = path.relative_to(root)
            if path.is_file() and not any(part in LEFT_OUT or part.startswith(".") for part in inside.parts):
                found[f"longstride/{room}/{inside.as_posix()}"] = path
    return found


def _digest(files: dict[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name in sorted(files):
        whole.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    return whole.hexdigest()


def _record(files: dict[str, bytes], own: str) -> str:
    lines = []
    for name in sorted(files):
        digest = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(files[name])}")
    return "\n".join([*lines, f"{own},,"]) + "\n"
