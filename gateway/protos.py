"""Reads an API from files: descriptor sets, or .proto files that are compiled for the purpose."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import util
from pathlib import Path

import google.api

from gateway.descriptors import Api, read
from gateway.errors import DescriptorError

_LOG = re.compile(r"WARNING: All log messages|[IW]\d{4} ")
"""What the compiler logs between its messages."""


def load(files: Sequence[Path], proto_paths: Sequence[Path] = ()) -> Api:
    """The API of these files: those that end in ``.proto`` are compiled, all others are descriptor sets.

    Args:
        files: one or more.
        proto_paths: where imports of .proto files are looked up, and what their names are relative to; without any, the
            current directory. google/api and google/protobuf are always found.

    Raises:
        DescriptorError: a file cannot be read or compiled, or what it says cannot be used. The message says why.
    """
    protos = [file for file in files if file.suffix == ".proto"]
    contents = [_read(file) for file in files if file.suffix != ".proto"]
    if protos:
        contents.append(_compile(protos, proto_paths or [Path()]))
    return read(contents)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DescriptorError(f"cannot read {file}: {error.strerror}") from None


def _compile(protos: Sequence[Path], proto_paths: Sequence[Path]) -> bytes:
    if util.find_spec("grpc_tools") is None:
        raise DescriptorError("compiling .proto files needs grpcio-tools: pip install 'grpc-mesh[gateway]'")
    annotations = Path(next(iter(google.api.__path__))).parent.parent
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "set"
        command = [
            *(sys.executable, "-m", "grpc_tools.protoc", "--include_imports", "--include_source_info"),
            f"--descriptor_set_out={out}",
            *(f"--proto_path={path}" for path in [*proto_paths, annotations]),
            *map(str, protos),
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line and not _LOG.match(line)]
            raise DescriptorError("protoc: " + "; ".join(lines))
        return out.read_bytes()
