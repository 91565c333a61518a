"""Processes as in a container, without one: an ordinary user, no capability, and nothing to write to but one directory.

Root gets a mount namespace of its own in which every file system is read-only but the directory of state; that, the
checkout and Python are where nobody may get at them, whoever owns the directories above; and the user is nobody, for
good. Whoever runs the tests as an ordinary user has that user, and the file systems as they are.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
NOBODY = 65534
CONFINES = os.geteuid() == 0

# The file systems are read first, since the list changes while they are remounted.
_CONFINE = f"""
mount -t tmpfs -o mode=755 tmpfs /srv
mkdir /srv/checkout /srv/state /srv/python
mount --bind "$1" /srv/checkout
mount --bind "$2" /srv/state
mount --bind "$3" /srv/python
shift 3
for target in $(cut -d' ' -f5 /proc/self/mountinfo); do
  case $target in /srv/state|/proc|/proc/*) ;; *) mount -o remount,bind,ro "$target" ;; esac
done
cd /srv/state
exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all -- "$@"
"""


class Box:
    """Where processes run so.

    Attributes:
        directory: the state, as this process sees it.
        state: as the processes see it.
        checkout: as the processes see it.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700)
        self.directory = directory
        self.state, self.checkout = ("/srv/state", "/srv/checkout") if CONFINES else (str(directory), str(REPOSITORY))
        packages = Path(sysconfig.get_path("purelib")).relative_to(REPOSITORY)
        self._packages = f"{self.checkout}/{packages}"
        if CONFINES:
            os.chown(directory, NOBODY, NOBODY)

    def give(self) -> None:
        """Has what this process put into the directory belong to the user of the processes."""
        if CONFINES:
            for path in self.directory.rglob("*"):
                os.chown(path, NOBODY, NOBODY)

    def command(self, *command: str) -> list[str]:
        """What to run in place of ``command``. It becomes that process: signals reach it."""
        if not CONFINES:
            return list(command)
        enter = ["unshare", "--mount", "--propagation=private", "sh", "-euc", _CONFINE, "sh"]
        return [*enter, str(REPOSITORY), str(self.directory), sys.base_prefix, *command]

    def python(self, *arguments: str) -> list[str]:
        """The same for Python."""
        executable = (
            f"/srv/python/bin/python{sys.version_info[0]}.{sys.version_info[1]}" if CONFINES else sys.executable
        )
        return self.command(executable, *arguments)

    def environment(self, **variables: str) -> dict[str, str]:
        """What a container would have, and nothing else of this process's."""
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": ":".join((self.checkout, f"{self.checkout}/generated", self._packages)),
            # Where Python is from a shared library, and it says where that is by a path that nobody may enter.
            "LD_LIBRARY_PATH": "/srv/python/lib",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            **variables,
        }

    def run(self, *arguments: str, variables: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Runs a Python program to its end."""
        return subprocess.run(
            self.python(*arguments),
            env=self.environment(**(variables or {})),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def output(self, *arguments: str, variables: Mapping[str, str] | None = None) -> str:
        """What a Python program prints; it must end with 0."""
        done = self.run(*arguments, variables=variables)
        assert done.returncode == 0, done.stderr
        return done.stdout
