"""The build: what the wheel carries and needs, when stubs are generated, and what the lock file may say."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hatch_build import generate

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, f"--wheel-dir={out}", str(ROOT)], check=True, stdin=subprocess.DEVNULL)
    return zipfile.Path(next(out.glob("*.whl")))


def names(wheel: zipfile.Path) -> set[str]:
    return set(wheel.root.namelist())


def test_the_wheel_carries_code_stubs_and_type_information(wheel: zipfile.Path) -> None:
    expected = {
        "mesh/v1/discovery_pb2.py",
        "mesh/v1/discovery_pb2.pyi",
        "mesh/v1/discovery_pb2_grpc.py",
        "mesh/v1/py.typed",
    }
    expected |= {
        f"control_plane/dashboard/static/{path.name}" for path in (ROOT / "control_plane/dashboard/static").iterdir()
    }
    expected |= {
        f"{package}/{name}"
        for package in ("mesh_client", "control_plane", "gateway")
        for name in ("__init__.py", "py.typed")
    }
    assert expected <= names(wheel)


def test_the_wheel_carries_neither_the_example_application_nor_tests(wheel: zipfile.Path) -> None:
    packages = {name.partition("/")[0] for name in names(wheel)}
    ours = {"control_plane", "gateway", "mesh", "mesh_cli", "mesh_client"}
    assert packages == {*ours, f"grpc_mesh-{PROJECT['version']}.dist-info"}


def test_the_client_library_alone_needs_five_packages(wheel: zipfile.Path) -> None:
    metadata = next(path for path in wheel.iterdir() if path.name.endswith(".dist-info")) / "METADATA"
    needed = [Requirement(line) for line in HeaderParser().parsestr(metadata.read_text()).get_all("Requires-Dist", [])]
    assert {item.name for item in needed if item.marker is None} == {
        *("cryptography", "grpcio", "protobuf", "pybreaker", "pydantic")
    }


def test_what_generated_code_needs_is_what_the_package_asks_for() -> None:
    stubs = ROOT / "generated/mesh/v1"
    protobuf = re.search(r"PUBLIC,\s+(\d+),\s+(\d+),\s+(\d+),", (stubs / "discovery_pb2.py").read_text())
    grpcio = re.search(r"GRPC_GENERATED_VERSION = '(.*)'", (stubs / "discovery_pb2_grpc.py").read_text())
    assert protobuf is not None
    assert grpcio is not None
    assert lower_bound("protobuf") == ".".join(protobuf.groups())
    assert lower_bound("grpcio") == grpcio[1]


def lower_bound(package: str) -> str:
    requirement = next(item for item in map(Requirement, PROJECT["dependencies"]) if item.name == package)
    return next(part.version for part in requirement.specifier if part.operator == ">=")


def test_unchanged_protos_are_not_generated_again_and_changed_ones_are(tmp_path: Path) -> None:
    proto = tmp_path / "protos/toy/v1/toy.proto"
    proto.parent.mkdir(parents=True)
    proto.write_text('syntax = "proto3";\npackage toy.v1;\nmessage Toy {}\n')
    out = tmp_path / "generated"
    generate(tmp_path, out)
    first = (out / "toy/v1/toy_pb2.py").stat().st_mtime_ns
    generate(tmp_path, out)
    assert (out / "toy/v1/toy_pb2.py").stat().st_mtime_ns == first
    proto.rename(proto.with_name("game.proto"))
    generate(tmp_path, out)
    assert {path.name for path in out.rglob("*_pb2.py")} == {"game_pb2.py"}


def test_a_bad_proto_leaves_the_stubs_as_they_were(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    proto = tmp_path / "protos/toy/v1/toy.proto"
    proto.parent.mkdir(parents=True)
    proto.write_text('syntax = "proto3";\npackage toy.v1;\nmessage Toy {}\n')
    out = tmp_path / "generated"
    generate(tmp_path, out)
    proto.write_text("nonsense")
    with pytest.raises(RuntimeError, match="protoc failed"):
        generate(tmp_path, out)
    assert "toy.proto" in capfd.readouterr().err
    assert (out / "toy/v1/toy_pb2.py").exists()


def test_the_lock_file_names_no_index_host_or_path() -> None:
    assert re.findall(r"https?:|file:/|--(?:index|extra|find|trusted)\S*|@|(?<![\w:])/", LOCK) == []


def test_the_lock_file_pins_every_dependency_by_hash() -> None:
    pins = {
        canonicalize_name(match[1]): match[2]
        for match in re.finditer(r"^([\w.-]+)(?:\[[\w,-]+\])?==(\S+) \\\n    --hash=sha256:", LOCK, re.MULTILINE)
    }
    everything = [
        *PROJECT["dependencies"],
        *(item for extra in PROJECT["optional-dependencies"].values() for item in extra),
    ]
    everything += tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    for requirement in map(Requirement, everything):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
