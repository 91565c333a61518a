"""Protos for tests of the gateway, compiled in this process."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path

import google.api
from grpc_tools import protoc

from gateway.descriptors import Api, read
from gateway.routes import RouteTable, build

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SHOP = ROOT / "protos"
NASTY = HERE / "protos"
WELL_KNOWN = (Path(next(iter(google.api.__path__))).parents[1], Path(protoc.__file__).parent / "_proto")


def compile_files(folder: Path, *names: str) -> bytes:
    """The descriptor set of these files below a folder, with imports and comments."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "set"
        paths = [f"--proto_path={path}" for path in (folder, *WELL_KNOWN)]
        options = ["--include_imports", "--include_source_info", f"--descriptor_set_out={out}"]
        assert protoc.main(["protoc", *paths, *options, *names]) == 0, f"{names} do not compile"
        return out.read_bytes()


def compile_text(files: Mapping[str, str]) -> bytes:
    """The descriptor set of files by name."""
    with tempfile.TemporaryDirectory() as directory:
        for name, text in files.items():
            path = Path(directory) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return compile_files(Path(directory), *files)


HEADER = 'syntax = "proto3"; package t.v1; import "google/api/annotations.proto";'
MESSAGES = """
message M {
  string id = 1; int32 number = 2; repeated string tags = 3; N n = 4; map<string, string> labels = 5; repeated N ns = 6;
}
message N { string id = 1; }
"""


def with_rules(*rules: str) -> Api:
    """An API of one service, whose methods A, B, ... take and give an ``M`` and have these rules."""
    methods = " ".join(
        f"rpc {chr(ord('A') + index)}(M) returns (M) {{ option (google.api.http) = {{{rule}}}; }}"
        for index, rule in enumerate(rules)
    )
    return read([compile_text({"t.proto": f"{HEADER} service S {{ {methods} }} {MESSAGES}"})])


def with_paths(*paths: str) -> RouteTable:
    """The table of an API whose methods are got by these paths."""
    return build(with_rules(*(f'get: "{path}"' for path in paths)))


@functools.cache
def shop() -> Api:
    """The API of the example application."""
    names = [str(path.relative_to(SHOP)) for path in sorted((SHOP / "shop").rglob("*.proto"))]
    return read([compile_files(SHOP, *names)])


@functools.cache
def nasty() -> Api:
    """The API of tests/gateway/protos."""
    return read([compile_files(NASTY, "nasty/v1/nasty.proto")])
