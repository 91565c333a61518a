"""Build hook: generates the protobuf and gRPC stubs, with their type information, from ``protos/``.

The wheel carries ``mesh.v1``. An editable install, and ``python hatch_build.py``, fill ``generated/`` beside this file.
"""

from __future__ import annotations

import hashlib
import shutil
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
OUT = ROOT / "generated"
GENERATORS = ("grpcio-tools", "googleapis-common-protos", "mypy-protobuf")


def generate(root: Path = ROOT, out: Path = OUT) -> None:
    """Writes stubs for every proto below ``root/protos`` to ``out``; does nothing when they are there for these protos.

    Raises:
        RuntimeError: protoc refused a file; its own messages are on standard error.
    """
    protos = sorted((root / "protos").rglob("*.proto"))
    stamp = out / ".stamp"
    wanted = _fingerprint(protos, root)
    if stamp.exists() and stamp.read_text() == wanted:
        return

    import google.api
    from grpc_tools import protoc

    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    scripts = Path(sysconfig.get_path("scripts"))
    builtin = Path(protoc.__file__).parent / "_proto"
    annotations = Path(next(iter(google.api.__path__))).parent.parent
    arguments = [
        "protoc",
        f"--proto_path={root / 'protos'}",
        f"--proto_path={builtin}",
        f"--proto_path={annotations}",
        f"--plugin=protoc-gen-mypy={scripts / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={scripts / 'protoc-gen-mypy_grpc'}",
        f"--python_out={fresh}",
        f"--grpc_python_out={fresh}",
        f"--mypy_out=quiet:{fresh}",
        f"--mypy_grpc_out=quiet:{fresh}",
        *map(str, protos),
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc failed; its messages are above")
    for package in {(fresh / path.relative_to(root / "protos")).parent for path in protos}:
        (package / "py.typed").touch()
    (fresh / ".stamp").write_text(wanted)
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)


def _fingerprint(protos: list[Path], root: Path) -> str:
    """Changes with the protos, their names, this file, and the generators."""
    joined = hashlib.sha256(Path(__file__).read_bytes())
    for package in GENERATORS:
        joined.update(f"{package} {metadata.version(package)}\n".encode())
    for path in protos:
        joined.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return joined.hexdigest()


class StubsBuildHook(BuildHookInterface[Any]):
    """Runs `generate` before hatchling collects files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generates the stubs and adds ``mesh.v1`` to the wheel."""
        generate(Path(self.root), Path(self.root) / "generated")
        if self.target_name == "wheel" and version == "standard":
            build_data["force_include"][str(Path(self.root) / "generated" / "mesh")] = "mesh"


if __name__ == "__main__":
    generate()
