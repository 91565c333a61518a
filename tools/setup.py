"""Makes a checkout ready for work: ``python3 -m tools.setup``, which every target of the Makefile runs first.

Needs Debian 12 with Python 3.11 or newer, make and git; root or not. What is already as it should be is left alone:

- ``.venv/``: virtual environment with the packages of ``requirements.lock`` and this project, editable
- ``generated/``: stubs of ``protos/``
- ``.tools/googleapis/``: the annotations that ``protos/shop`` imports, for buf
- ``.tools/consul/consul``: a real Consul
- ``.tools/rabbitmq/``: a real RabbitMQ, unless one is installed
- ``.tools/postgresql/``: a real PostgreSQL, unless one is installed; the tests that need it are skipped without
- ``.tools/chromium/``: a real Chromium with its driver, which tests of the dashboard look through
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools.debian import UnavailableError, fetch

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
TOOLS = ROOT / ".tools"
CONSUL = TOOLS / "consul" / "consul"
GOOGLEAPIS = TOOLS / "googleapis"
LOCK = ROOT / "requirements.lock"
# The last release of Debian that has Consul.
CONSUL_SUITE = "bullseye"
RABBITMQ = TOOLS / "rabbitmq"
RABBITMQ_SERVER = Path("usr/lib/rabbitmq/bin/rabbitmq-server")
ERLANG = Path("usr/lib/erlang")
_ERLANG_PARTS = (
    *("asn1", "base", "crypto", "eldap", "ftp", "inets", "mnesia", "os-mon", "parsetools", "public-key"),
    *("runtime-tools", "snmp", "ssl", "syntax-tools", "tftp", "tools", "xmerl"),
)
RABBITMQ_PACKAGES = ("rabbitmq-server", *(f"erlang-{part}" for part in _ERLANG_PARTS))
"""RabbitMQ and what it needs beyond what every Debian has."""
POSTGRES = TOOLS / "postgresql"
POSTGRES_BINARIES = "usr/lib/postgresql/*/bin"
# Of Debian 12.
POSTGRES_PACKAGES = (
    *("postgresql-15", "libpq5", "libxml2", "libicu72", "libldap-2.5-0", "libsasl2-2", "libgssapi-krb5-2", "libkrb5-3"),
    *("libk5crypto3", "libkrb5support0", "libkeyutils1", "liblz4-1", "libzstd1"),
)
"""PostgreSQL and what it needs beyond what every Debian has."""
CHROMIUM = TOOLS / "chromium"
CHROMIUM_PROGRAMS = ("chromium", "chromedriver")


class SetupError(Exception):
    """Set-up cannot go on. The message says what is missing and how to get it."""


def main() -> None:
    """Sets up what is missing; exits with 1 and a message when something cannot be had."""
    parser = argparse.ArgumentParser(description="Makes a checkout ready for work.")
    parser.add_argument(
        "--servers-optional",
        action="store_true",
        help="go on without Consul or RabbitMQ when they cannot be had, and without what only tests need",
    )
    arguments = parser.parse_args()
    TOOLS.mkdir(exist_ok=True)
    with (TOOLS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two targets may be made at once
        try:
            set_up_packages()
            set_up_stubs()
            for name, set_up in (("Consul", set_up_consul), ("RabbitMQ", set_up_rabbitmq)):
                try:
                    set_up()
                except SetupError as error:
                    if not arguments.servers_optional:
                        raise
                    report(f"going on without {name}: {error}")
            if not arguments.servers_optional:
                set_up_for_tests()
        except SetupError as error:
            sys.exit(f"set-up: {error}")
        except subprocess.CalledProcessError as error:
            sys.exit(
                f"set-up: `{' '.join(map(str, error.cmd))}` failed with {error.returncode}; its messages are above"
            )


def set_up_for_tests() -> None:
    """What tests alone need."""
    set_up_chromium()
    try:
        set_up_postgresql()
    except SetupError as error:
        report(f"going on without PostgreSQL, which some tests would use: {error}")


def set_up_packages() -> None:
    """The virtual environment, exactly as the lock file and pyproject.toml say."""
    stamp = VENV / ".packages"
    wanted = digest(LOCK, ROOT / "pyproject.toml", ROOT / "tools" / "setup.py")
    if works(PYTHON, "-c", "") and stamp.exists() and stamp.read_text() == wanted:
        return
    stamp.unlink(missing_ok=True)
    pip = make_environment()
    install = [*pip, "install", "--quiet", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    install += ["--root-user-action=ignore"]
    report(f"packages of {LOCK.name} into {VENV.name}")
    run([*install, "--require-hashes", "--only-binary=:all:", "--requirement", LOCK])
    run([*install, "--no-deps", "--no-build-isolation", "--editable", ROOT])
    copy_googleapis()
    stamp.write_text(wanted)


def make_environment() -> list[str | Path]:
    """Makes ``.venv`` where there is no working one; the command that runs pip in it."""
    own_pip: list[str | Path] = [PYTHON, "-m", "pip"]
    same_python = f"import pip, sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]!r})"
    if works(PYTHON, "-c", same_python):
        return own_pip
    report(f"virtual environment with Python {sys.version.split()[0]}")
    shutil.rmtree(VENV, ignore_errors=True)
    if works(Path(sys.executable), "-c", "import ensurepip"):
        run([sys.executable, "-m", "venv", VENV])
        return own_pip
    # Debian moves ensurepip to python3-venv, which only root can install. pip's own wheel does as well.
    if not works(Path(sys.executable), "-c", "import venv"):
        raise SetupError(f"{sys.executable} has no venv module. As root: apt-get install python3-venv")
    run([sys.executable, "-m", "venv", "--without-pip", VENV])
    report("pip from Debian's python3-pip-whl")
    try:
        unpacked = fetch(["python3-pip-whl"], None, TOOLS / "pip")
    except UnavailableError as error:
        message = f"{sys.executable} has neither ensurepip nor pip, and Debian's pip cannot be had: {error}\n"
        raise SetupError(message + "As root: apt-get install python3-venv; then again.") from error
    wheel = next((unpacked / "usr/share/python-wheels").glob("pip-*.whl"))
    return [PYTHON, wheel / "pip"]


def copy_googleapis() -> None:
    """Copies the two protos that ours import: buf resolves imports among modules only, so they become one."""
    source = next(VENV.glob("lib/python3*/site-packages/google/api"))
    target = GOOGLEAPIS / "google" / "api"
    target.mkdir(parents=True, exist_ok=True)
    for name in ("annotations.proto", "http.proto"):
        shutil.copyfile(source / name, target / name)


def set_up_stubs() -> None:
    """The stubs, when a proto has changed."""
    run([PYTHON, ROOT / "hatch_build.py"])


def set_up_consul() -> None:
    """A Consul: the one that MESH_CONSUL_BINARY names, else one on PATH, else Debian's."""
    named = os.environ.get("MESH_CONSUL_BINARY")
    if named:
        if not works(Path(named), "version"):
            raise SetupError(f"MESH_CONSUL_BINARY is {named}, which does not run")
        if not CONSUL.exists() or not CONSUL.samefile(named):
            link_consul(Path(named))
        return
    if works(CONSUL, "version"):
        return
    found = shutil.which("consul")
    if found is not None and works(Path(found), "version"):
        link_consul(Path(found))
        return
    report(f"Consul from Debian {CONSUL_SUITE}")
    work = TOOLS / "consul-download"
    try:
        unpacked = fetch(["consul"], CONSUL_SUITE, work)
    except UnavailableError as error:
        message = f"no Consul on PATH, and Debian's cannot be had: {error}\n"
        raise SetupError(message + "Put a consul (1.8 or newer) on PATH, or name it in MESH_CONSUL_BINARY.") from error
    CONSUL.parent.mkdir(exist_ok=True)
    (unpacked / "usr/bin/consul").replace(CONSUL)
    shutil.rmtree(work)
    if not works(CONSUL, "version"):
        raise SetupError(f"{CONSUL.relative_to(ROOT)} does not run on this machine; name another in MESH_CONSUL_BINARY")


def link_consul(binary: Path) -> None:
    """Makes ``binary`` the one Consul that tests and the demo find."""
    report(f"Consul is {binary}")
    CONSUL.parent.mkdir(exist_ok=True)
    CONSUL.unlink(missing_ok=True)
    CONSUL.symlink_to(binary.resolve())


def set_up_rabbitmq() -> None:
    """A RabbitMQ: the one below the directory in MESH_RABBITMQ_ROOT, else the installed one, else Debian's."""
    named = os.environ.get("MESH_RABBITMQ_ROOT")
    if named:
        if not has_rabbitmq(Path(named)):
            raise SetupError(f"MESH_RABBITMQ_ROOT is {named}, which has no {RABBITMQ_SERVER} with Erlang")
        return
    if has_rabbitmq(RABBITMQ) or has_rabbitmq(Path("/")):
        return
    report("RabbitMQ from Debian")
    work = TOOLS / "rabbitmq-download"
    try:
        unpacked = fetch(RABBITMQ_PACKAGES, None, work)
    except UnavailableError as error:
        message = f"RabbitMQ is not installed, and Debian's cannot be had: {error}\n"
        raise SetupError(message + "As root: apt-get install --no-install-recommends rabbitmq-server") from error
    script = unpacked / ERLANG / "bin/erl"
    # It looks for the rest of Erlang where the package would have been installed.
    script.write_text(script.read_text().replace(f"=/{ERLANG}", '=$(dirname "$(dirname "$(readlink -f "$0")")")'))
    shutil.rmtree(RABBITMQ, ignore_errors=True)
    unpacked.rename(RABBITMQ)
    shutil.rmtree(work)
    if not works(RABBITMQ / ERLANG / "bin/erl", "-noinput", "-eval", "halt()."):
        raise SetupError(f"Debian's Erlang does not run here. As root: apt-get install {RABBITMQ_PACKAGES[0]}")


def has_rabbitmq(root: Path) -> bool:
    """Whether there are RabbitMQ and Erlang below a directory that is laid out as Debian's ``/``."""
    return all(os.access(root / program, os.X_OK) for program in (RABBITMQ_SERVER, ERLANG / "bin/erl"))


def set_up_postgresql() -> None:
    """A PostgreSQL: the installed one, else Debian's."""
    if find_postgres() is not None:
        return
    report("PostgreSQL from Debian")
    work = TOOLS / "postgresql-download"
    try:
        unpacked = fetch(POSTGRES_PACKAGES, None, work)
    except UnavailableError as error:
        raise SetupError(str(error)) from error
    shutil.rmtree(POSTGRES, ignore_errors=True)
    unpacked.rename(POSTGRES)
    shutil.rmtree(work)
    program = next(POSTGRES.glob(f"{POSTGRES_BINARIES}/postgres"))
    if not works(Path("env"), f"LD_LIBRARY_PATH={postgres_libraries()}", str(program), "--version"):
        shutil.rmtree(POSTGRES)
        raise SetupError("Debian's does not run here. As root: apt-get install postgresql")


def postgres_libraries() -> str:
    """Where the libraries of a fetched PostgreSQL are, as LD_LIBRARY_PATH takes them."""
    return ":".join(map(str, POSTGRES.glob("usr/lib/*-linux-gnu")))


def find_postgres() -> Path | None:
    """Where PostgreSQL's programs are: the newest installed ones, else those that were fetched; None for nowhere."""
    for root in (Path("/"), POSTGRES):
        found = [path for path in root.glob(POSTGRES_BINARIES) if os.access(path / "postgres", os.X_OK)]
        if found:
            return max(found, key=lambda path: path.parent.name.zfill(4))
    return None


def set_up_chromium() -> None:
    """A Chromium: what MESH_CHROMIUM and MESH_CHROMEDRIVER name, else those on PATH, else Debian's."""
    named = [os.environ.get(f"MESH_{name.upper()}") for name in CHROMIUM_PROGRAMS]
    there = all(works(CHROMIUM / name, "--version") for name in CHROMIUM_PROGRAMS)
    if there and not any(named):
        return
    found = [path or shutil.which(name) for path, name in zip(named, CHROMIUM_PROGRAMS, strict=True)]
    if all(path is not None and works(Path(path), "--version") for path in found):
        CHROMIUM.mkdir(exist_ok=True)
        for path, name in zip(found, CHROMIUM_PROGRAMS, strict=True):
            link = CHROMIUM / name
            link.unlink(missing_ok=True)
            link.symlink_to(Path(path or "").resolve())
        return
    if any(named):
        raise SetupError("MESH_CHROMIUM and MESH_CHROMEDRIVER have to name a Chromium and its driver, which run")
    report("Chromium from Debian")
    work = TOOLS / "chromium-download"
    try:
        unpacked = fetch(("chromium", "chromium-driver"), None, work, missing_dependencies=True)
    except UnavailableError as error:
        message = f"Chromium is not installed, and Debian's cannot be had: {error}\n"
        raise SetupError(
            message + "As root: apt-get install --no-install-recommends chromium chromium-driver"
        ) from error
    shutil.rmtree(CHROMIUM, ignore_errors=True)
    CHROMIUM.mkdir()
    unpacked.rename(CHROMIUM / "root")
    shutil.rmtree(work)
    for name, program in zip(CHROMIUM_PROGRAMS, ("usr/lib/chromium/chromium", "usr/bin/chromedriver"), strict=True):
        script = CHROMIUM / name
        script.write_text(_CHROMIUM_SCRIPT.format(program=program))
        script.chmod(0o755)
    if not all(works(CHROMIUM / name, "--version") for name in CHROMIUM_PROGRAMS):
        raise SetupError("Debian's Chromium does not run here. As root: apt-get install chromium chromium-driver")


_CHROMIUM_SCRIPT = """#!/bin/sh
# Runs what was unpacked beside it, with the libraries that this machine does not have.
root="$(dirname "$(readlink -f "$0")")/root"
for directory in "$root"/usr/lib/*-linux-gnu "$root"/usr/lib/*-linux-gnu/pulseaudio; do
    LD_LIBRARY_PATH="$LD_LIBRARY_PATH${{LD_LIBRARY_PATH:+:}}$directory"
done
export LD_LIBRARY_PATH
exec "$root/{program}" "$@"
"""


def digest(*paths: Path) -> str:
    """Hash of the files' content and of the Python that runs this."""
    joined = hashlib.sha256(sys.version.encode())
    for path in paths:
        joined.update(path.read_bytes())
    return joined.hexdigest()


def works(program: Path, *arguments: str) -> bool:
    """Whether the program exists and ends with 0."""
    try:
        done = subprocess.run(
            [
                program,
                *arguments,
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def run(command: list[str | Path]) -> None:
    """Runs a step, its messages shown.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=True)


def report(message: str) -> None:
    """One line per step that is really done."""
    print(f"set-up: {message}", flush=True)


if __name__ == "__main__":
    main()
