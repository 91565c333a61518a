"""deploy/systemd: the units are ones, and leave a service nothing but its own state."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy.prepare import SERVICES
from tests.deploy.consul import DEPLOY

UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
EXPOSURE = 1.5
"""Of 10; systemd calls less than 2 fine. What is left is the network, which a service needs."""

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def settings(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if (entry := re.fullmatch(r"(\w+)=(.*)", line)) is not None:
            found.setdefault(entry[1], []).append(entry[2])
    return found


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_it_is_an_ordinary_user_that_writes_its_state_alone(unit: Path) -> None:
    found = settings(unit)
    assert found["User"] == found["Group"]
    assert found["User"][0].startswith("mesh-")
    assert found["CapabilityBoundingSet"] == found["AmbientCapabilities"] == [""]
    for name, value in (("NoNewPrivileges", "yes"), ("ProtectSystem", "strict"), ("StateDirectoryMode", "0700")):
        assert found[name] == [value]
    assert "ReadWritePaths" not in found
    assert not [line for line in found.get("Environment", ()) if re.search(r"(TOKEN|PASSWORD)=", line)]


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_finds_little_exposed(unit: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={EXPOSURE * 10:.0f}"]
    done = subprocess.run([*command, str(unit)], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


@needs_systemd
def test_systemd_understands_them(tmp_path: Path) -> None:
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    shutil.copytree("/usr/lib/systemd/system", tmp_path / "usr/lib/systemd/system", symlinks=True)
    programs = tmp_path / "opt/grpc-mesh/bin"
    programs.mkdir(parents=True)
    for name in ("mesh", "python"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    names = [unit.name.replace("@", "@orders") for unit in UNITS]
    for unit, name in zip(UNITS, names, strict=True):
        shutil.copy(unit, units / name)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", f"--root={tmp_path}", *names],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_user_is_made() -> None:
    made = re.findall(r"^u (\S+) ", (DEPLOY / "systemd" / "grpc-mesh.sysusers.conf").read_text(), re.MULTILINE)
    named = {settings(unit)["User"][0] for unit in UNITS}
    assert {name.replace("%i", service) for name in named for service in SERVICES} == set(made)
