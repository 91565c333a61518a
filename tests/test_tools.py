"""The tools of this repository: where set-up finds Debian's archive, and what the coverage gates let through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tools.coverage_gates import PURE, Tally, problems, tallies
from tools.debian import UnavailableError, debian_sources

OS_RELEASE = 'ID=debian\nVERSION_CODENAME=bookworm\nNAME="Debian GNU/Linux"\n'
MODERN = """
# comment
Types: deb
URIs: http://archive.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://archive.example/debian-security
Suites: bookworm-security
Components: main
"""
CLASSIC = """
deb-src http://archive.example/debian bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/other.gpg] https://vendor.example/linux bookworm stable
deb [ signed-by=/usr/share/keyrings/debian-archive-keyring.gpg ] http://archive.example/debian bookworm main # x
"""
STANZA = """Types: deb
Suites: bullseye
Components: main
Uris: http://archive.example/debian
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "etc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    "files",
    [
        {"apt/sources.list.d/debian.sources": MODERN},
        {"apt/sources.list": CLASSIC},
        {"apt/sources.list": "", "apt/sources.list.d/main.list": CLASSIC},
        {"apt/sources.list.d/debian.sources": f"Enabled: no{MODERN}", "apt/sources.list": CLASSIC},
    ],
)
def test_set_up_finds_the_archive_in_either_form_of_sources(tmp_path: Path, files: dict[str, str]) -> None:
    assert debian_sources("bullseye", machine(tmp_path, {"os-release": OS_RELEASE, **files})) == STANZA


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "not a Debian"),
        ({"os-release": "ID=fedora\nVERSION_ID=41\n"}, "not a Debian"),
        ({"os-release": OS_RELEASE}, "no source"),
        ({"os-release": OS_RELEASE, "apt/sources.list": "deb http://archive.example/debian trixie main"}, "no source"),
    ],
)
def test_set_up_says_why_there_is_no_archive(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(UnavailableError, match=message):
        debian_sources("bullseye", machine(tmp_path, files))


def coverage_report(**percents: int) -> dict[str, Any]:
    """A report in which each file has 60 statements and 40 branches."""
    files = {}
    for path, percent in percents.items():
        lines = min(percent, 60)
        counts = {"covered_lines": lines, "num_statements": 60, "covered_branches": percent - lines, "num_branches": 40}
        files[path] = {"summary": counts}
    return {"files": files}


PURE_FILES = {
    "mesh_client/core/store.py": 100,
    **{path: 100 for path in PURE if "*" not in path},
}


@pytest.mark.parametrize(
    ("percents", "expected"),
    [
        ({}, []),
        ({"mesh_client/channel.py": 90}, []),
        ({f"mesh_client/{name}.py": 88 for name in range(len(PURE_FILES))}, ["everything: 94.00% of 95%"]),
        ({"mesh_client/core/store.py": 99}, ["mesh_client/core/store.py: 99.00% of 100%, for it is pure"]),
    ],
)
def test_gates_hold_pure_files_to_all_and_everything_to_most(percents: dict[str, int], expected: list[str]) -> None:
    assert problems(tallies(coverage_report(**{**PURE_FILES, **percents}))) == expected


def test_gates_notice_a_pure_file_that_was_not_measured() -> None:
    assert (
        problems({"mesh_client/core/store.py": Tally(1, 1)})[0] == "control_plane/catalog.py: no such file was measured"
    )
