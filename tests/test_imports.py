"""Who may import whom, what is where at the top level, and how long a file may be.

The rules are in `tests.import_rules`; half of the tests here show that breaking one is noticed.
"""

from __future__ import annotations

import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.import_rules import OURS, cycle, module_name, violations
from tools.coverage_gates import PURE

ROOT = Path(__file__).resolve().parents[1]
GENERATED = {"mesh", "shop"}
TOP_LEVEL = {
    *(
        "benchmarks",
        "control_plane",
        "deploy",
        "docs",
        "gateway",
        "mesh_cli",
        "mesh_client",
        "protos",
        "services",
        "tests",
    ),
    *("LICENSE", "Makefile", "README.md", "buf.yaml", "pyproject.toml"),
    # The build hook stands beside the pyproject.toml that names it; set-up and checks are in tools/.
    *("hatch_build.py", "requirements.lock", "tools"),
    *(".ci", ".git", ".gitignore"),
}
MAX_LINES = 450
MAX_TEST_LINES = 650
"""Tests of one thing may be many; they are read one by one."""


def python_files() -> list[str]:
    """All Python of this repository, as paths relative to it."""
    folders = sorted(OURS - GENERATED)
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_every_file_imports_only_what_it_may() -> None:
    assert [line for path in python_files() for line in violations(path, (ROOT / path).read_text())] == []


def test_modules_do_not_import_each_other_in_a_ring() -> None:
    assert cycle({module_name(path): (ROOT / path).read_text() for path in python_files()}) == []


def test_the_top_level_holds_nothing_unexpected() -> None:
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    entries = {path.name for path in ROOT.iterdir()}
    assert {name for name in entries - TOP_LEVEL if not any(fnmatch(name, pattern) for pattern in ignored)} == set()


def test_no_file_is_too_long() -> None:
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in [*python_files(), "hatch_build.py"]}
    limits = {path: MAX_TEST_LINES if path.startswith("tests/") else MAX_LINES for path in lengths}
    assert {path: lines for path, lines in lengths.items() if lines > limits[path]} == {}


def test_the_client_library_imports_without_any_extra() -> None:
    program = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        extras = {"aio_pika", "aiohttp", "aiormq", "consul", "grpc_health", "grpc_reflection", "opentelemetry"}
        extras |= {"prometheus_client", "psycopg", "requests", "rich", "typer", "yaml"}
        if name.partition(".")[0] in extras:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import mesh_client
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mesh_client/core/store.py", "import grpc"),
        ("mesh_client/core/store.py", "import grpc.aio"),
        ("mesh_client/core/store.py", "from google.protobuf import json_format"),
        ("mesh_client/core/store.py", "import asyncio"),
        ("mesh_client/core/store.py", "from threading import Lock"),
        ("mesh_client/core/store.py", "from time import monotonic"),
        ("mesh_client/core/store.py", "def now():\n    import time"),
        ("mesh_client/core/store.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import grpc"),
        ("mesh_client/core/store.py", "import pydantic"),
        ("mesh_client/core/store.py", "import pybreaker"),
        ("mesh_client/core/policy.py", "import pybreaker"),
        ("mesh_client/core/breaker.py", "import pydantic"),
        ("mesh_client/core/store.py", "from mesh_client import transport"),
        ("mesh_client/core/store.py", "from mesh.v1 import discovery_pb2"),
        ("mesh_client/core/store.py", "from . import model"),
        ("mesh_client/core/store.py", "from random import choice"),
        ("mesh_client/core/store.py", "import random\nrandom.random()"),
        ("mesh_client/core/store.py", "from random import Random\nrng = Random()"),
        ("mesh_client/core/store.py", "import random\nrng = random.Random(1)"),
        ("mesh_client/core/store.py", "from datetime import datetime, UTC\ndatetime.now(UTC)"),
        ("mesh_client/core/store.py", "import datetime\ndatetime.datetime.now()"),
        ("mesh_client/core/store.py", "open('state')"),
        ("mesh_client/channel.py", "from control_plane.events import Event"),
        ("control_plane/discovery.py", "from mesh_client import transport"),
        ("control_plane/discovery.py", "import mesh_client"),
        ("control_plane/catalog.py", "import grpc"),
        ("control_plane/catalog.py", "import aiohttp"),
        ("control_plane/catalog.py", "import asyncio"),
        ("control_plane/catalog.py", "from control_plane.publisher import Publisher"),
        ("gateway/routes.py", "from control_plane import server"),
        ("mesh_cli/demo/system.py", "from services.orders import store"),
        ("services/orders/service.py", "import control_plane"),
        ("services/orders/service.py", "from services.inventory import store"),
        ("services/orders/service.py", "import yaml"),
        ("tools/setup.py", "import yaml"),
        ("elsewhere/new.py", ""),
    ],
)
def test_a_violation_is_found(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mesh_client/core/policy.py", "import math\nfrom pydantic import BaseModel"),
        ("mesh_client/core/breaker.py", "import pybreaker"),
        (
            "mesh_client/core/retry.py",
            "from random import Random\ndef delay(rng: Random) -> float: return rng.random()",
        ),
        ("mesh_client/core/retry.py", "import random\ndef delay(random_source: random.Random) -> None: ..."),
        (
            "mesh_client/channel.py",
            "import asyncio, grpc\nfrom mesh_client.core import call\nfrom mesh.v1 import policy_pb2",
        ),
        (
            "control_plane/catalog.py",
            "from control_plane.events import Event\nfrom mesh_client.core.model import Endpoint",
        ),
        (
            "control_plane/discovery.py",
            "import grpc\nfrom control_plane import publisher\nfrom mesh_client.core import model",
        ),
        (
            "services/orders/service.py",
            "import mesh_client\nfrom services.orders import store\nfrom shop.v1 import orders_pb2",
        ),
        ("services/orders/store.py", "import sqlite3\nfrom services.common import database"),
        ("mesh_cli/control_plane.py", "from control_plane.process import serve\nimport typer"),
    ],
)
def test_what_is_allowed_is_not_reported(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_a_ring_of_imports_is_found() -> None:
    sources = {"a": "import b", "b": "def late():\n    from c import d", "c.d": "import a", "e": "import a"}
    assert cycle({**sources, "c": "from c import d"}) == ["a", "b", "c.d", "a"]


def test_imports_for_types_alone_close_a_ring_too() -> None:
    back = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a"
    assert cycle({"a": "import b", "b": back}) == ["a", "b", "a"]


def test_every_pure_file_is_under_a_rule_of_purity() -> None:
    for path in python_files():
        if any(fnmatch(path, pattern) for pattern in PURE):
            assert len(violations(path, "import socket")) == 1, path
