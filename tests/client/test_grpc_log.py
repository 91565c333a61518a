"""gRPC's log taken over in a process of its own: it is about the standard error of a whole process."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import logging, os, sys
import mesh_client

before = sys.stderr
give_back = mesh_client.adopt_grpc_log()
logging.basicConfig(level="DEBUG", format="%(levelname)s %(name)s: %(message)s")
os.write(2, b"E1130 05:45:23.998911    3071 chttp2.cc:7] out of luck\\n")
os.write(2, b"I1130 05:45:23.998911    3071 chttp2.cc:8] Got goaway\\n")
os.write(2, b"W1130 05:45:23.998911    3071 log.cc:102] Log level INFO is not suitable for production.\\n")
os.write(2, b"plain \\xff line\\n")
print("from python", file=sys.stderr)
if sys.argv[1] == "back":
    give_back()
    assert sys.stderr is before
    os.write(2, b"E1130 05:45:23.998911    3071 chttp2.cc:9] as it is\\n")
"""


def run(argument: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, argument],
        env={**inherited, **environment},
        capture_output=True,
        check=True,
        timeout=30,
    )
    return done.stderr.decode(errors="backslashreplace")


def test_lines_of_grpc_become_records_and_others_go_on_as_they_are() -> None:
    lines = sorted(run("").splitlines())
    assert lines == [
        "DEBUG grpc.core: Got goaway (chttp2.cc:8)",
        "ERROR grpc.core: out of luck (chttp2.cc:7)",
        "from python",
        r"plain \xff line",
    ]


def test_it_can_be_given_back() -> None:
    assert run("back").splitlines()[-1] == "E1130 05:45:23.998911    3071 chttp2.cc:9] as it is"


def test_whoever_sets_the_verbosity_gets_grpcs_log_as_it_is() -> None:
    assert "E1130 05:45:23.998911    3071 chttp2.cc:7] out of luck" in run("", GRPC_VERBOSITY="error")
