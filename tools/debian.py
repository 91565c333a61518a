"""Takes single files out of Debian packages, without root and without touching the system.

apt-get does the fetching and checks the signatures, with sources, lists and caches of its own below ``.tools/``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


class UnavailableError(Exception):
    """A package cannot be had here. The message says what was tried, and is meant for people."""


def fetch(packages: Sequence[str], suite: str | None, work: Path, *, missing_dependencies: bool = False) -> Path:
    """Downloads packages and unpacks them below ``work``, which is emptied first; the directory they are unpacked to.

    Args:
        packages: their names.
        suite: a Debian release such as ``bullseye``; None for this machine's own.
        work: where it is done.
        missing_dependencies: fetch what they depend on and what is not installed too.

    Raises:
        UnavailableError: this is no Debian, it has no usable source, or the download failed.
    """
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise UnavailableError(f"{program} is not on this machine")
    sources = debian_sources(suite)
    shutil.rmtree(work, ignore_errors=True)
    unpacked = work / "x"
    for directory in (work / "lists" / "partial", work / "sources", work / "deb", unpacked):
        directory.mkdir(parents=True)
    (work / "sources" / "debian.sources").write_text(sources)
    settings = {
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": str(work / "sources"),
        "Dir::State::lists": str(work / "lists"),
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
    }
    apt_get = ["apt-get", "-q", *(f"-o{key}={value}" for key, value in settings.items())]
    # Without this, apt takes an index that it could not fetch for a warning.
    _run([*apt_get, "-oAPT::Update::Error-Mode=any", "update"], work)
    if missing_dependencies:
        simulated = _run([*apt_get, "-s", "--no-install-recommends", "install", *packages], work)
        packages = [line.split()[1] for line in simulated.splitlines() if line.startswith("Inst ")]
    _run([*apt_get, "download", *packages], work / "deb")
    for archive in (work / "deb").glob("*.deb"):
        _run(["dpkg", "-x", str(archive), str(unpacked)], work)
    for name in ("lists", "sources", "deb"):
        shutil.rmtree(work / name)
    return unpacked


def debian_sources(suite: str | None, root: Path = Path("/")) -> str:
    """This machine's Debian archive as a deb822 stanza, with ``suite`` in place of its own release.

    Reads both forms of ``/etc/apt``: deb822 ``.sources`` files and one-line ``.list`` files.

    Raises:
        UnavailableError: this is no Debian, or none of its sources is the archive.
    """
    release = _key_values((root / "etc/os-release").read_text()) if (root / "etc/os-release").exists() else {}
    codename = release.get("VERSION_CODENAME")
    if release.get("ID") != "debian" or codename is None:
        raise UnavailableError("this is not a Debian release")
    apt = root / "etc/apt"
    parts = apt / "sources.list.d"
    modern = [stanza for path in sorted(parts.glob("*.sources")) for stanza in _deb822(path.read_text())]
    classic = [
        stanza
        for path in [apt / "sources.list", *sorted(parts.glob("*.list"))]
        if path.exists()
        for stanza in _one_line(path.read_text())
    ]
    usable = [
        stanza
        for stanza in [*modern, *classic]
        if "deb" in stanza.get("types", "").split()
        and codename in stanza.get("suites", "").split()
        and "main" in stanza.get("components", "").split()
        and stanza.get("enabled", "yes").lower() not in {"no", "false"}
    ]
    if not usable:
        raise UnavailableError(f"no source below {apt} names the main component of {codename}")
    best = min(usable, key=lambda stanza: not stanza["uris"].split()[0].rstrip("/").endswith("debian"))
    kept = {key: value for key, value in best.items() if key not in {"types", "suites", "components", "architectures"}}
    lines = ["Types: deb", f"Suites: {suite or codename}", "Components: main"]
    lines += [f"{key.title()}: {value}" for key, value in kept.items()]
    return "\n".join(lines) + "\n"


def _key_values(text: str) -> dict[str, str]:
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {key: value.strip().strip('"') for key, value in pairs}


def _deb822(text: str) -> list[dict[str, str]]:
    stanzas: list[dict[str, str]] = [{}]
    key = ""
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        if not line.strip():
            stanzas.append({})
        elif line[0].isspace():
            stanzas[-1][key] += "\n" + line
        else:
            key, _, value = line.partition(":")
            key = key.lower()
            stanzas[-1][key] = value.strip()
    return [stanza for stanza in stanzas if "uris" in stanza]


def _one_line(text: str) -> list[dict[str, str]]:
    stanzas = []
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if not words or words[0] != "deb":
            continue
        options: dict[str, str] = {}
        if words[1].startswith("["):
            end = next(index for index, word in enumerate(words) if word.endswith("]"))
            for option in " ".join(words[1 : end + 1]).strip("[] ").split():
                name, _, value = option.partition("=")
                options[name] = value.replace(",", " ")
            words[1 : end + 1] = []
        stanzas.append(
            {"types": "deb", "uris": words[1], "suites": words[2], "components": " ".join(words[3:])} | options
        )
    return stanzas


def _run(command: list[str], directory: Path) -> str:
    environment = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        problems = [line for line in done.stdout.splitlines() if line.startswith(("E:", "W:", "Err:", "dpkg"))]
        tail = "\n".join(f"    {line}" for line in problems[-5:])
        raise UnavailableError(f"{' '.join(word for word in command if not word.startswith('-'))} failed:\n{tail}")
    return done.stdout
