"""Build hook: generates the protobuf and gRPC stubs, with their type information, from ``protos/``.

The wheel carries ``mesh.v1``. An editable install, and ``python hatch_build.py``, fill ``generated/`` beside this file.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
OUT = ROOT / "generated"


def generate(root: Path = ROOT, out: Path = OUT) -> None:
    """Writes stubs for every proto below ``root/protos`` to ``out``; does nothing when they are newer than their sources.

    Raises:
        RuntimeError: protoc refused a file; its own messages are on standard error.
    """
    import google.api
    from grpc_tools import protoc

    protos = sorted((root / "protos").rglob("*.proto"))
    newest = max(path.stat().st_mtime for path in [*protos, Path(__file__)])
    stamp = out / ".stamp"
    if stamp.exists() and stamp.stat().st_mtime >= newest and all(_stub(path, root, out).exists() for path in protos):
        return
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
    for package in {_stub(path, root, fresh).parent for path in protos}:
        (package / "py.typed").touch()
    (fresh / ".stamp").touch()
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)


def _stub(proto: Path, root: Path, out: Path) -> Path:
    relative = proto.relative_to(root / "protos")
    return out / relative.with_name(relative.stem + "_pb2.py")


class StubsBuildHook(BuildHookInterface[Any]):
    """Runs `generate` before hatchling collects files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generates the stubs and adds ``mesh.v1`` to the wheel."""
        generate(Path(self.root), Path(self.root) / "generated")
        if self.target_name == "wheel" and version == "standard":
            build_data["force_include"][str(Path(self.root) / "generated" / "mesh")] = "mesh"


if __name__ == "__main__":
    generate()
    sys.stdout.write(f"stubs are in {OUT.relative_to(ROOT)}\n")
