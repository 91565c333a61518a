"""`mesh check`: whether everything that the mesh needs and promises is so, and what to do where it is not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from mesh_cli.check.facts import Facts
from mesh_cli.check.findings import Finding, Outcome, tally
from mesh_cli.check.gather import host_facts, operator_facts, plane_facts
from mesh_cli.check.host import check_before_start, check_host
from mesh_cli.check.identity import check_identity
from mesh_cli.check.planes import check_planes
from mesh_cli.check.registry import check_registry
from mesh_cli.check.services import check_mesh
from mesh_cli.client import AdminClient
from mesh_cli.control_plane import default_data_dir
from mesh_cli.credentials import default_operator_directory
from mesh_cli.options import DEFAULT_CONTROL_PLANE, AsJson, ControlPlane, Insecure, Operator, Timeout
from mesh_cli.output import Failure, Json, console, count, printable, reports_errors, write_json

_STYLES = {Outcome.PASS: "green", Outcome.WARN: "yellow", Outcome.FAIL: "bold red", Outcome.SKIP: "dim"}
_WIDTH = 6


@reports_errors
def check(
    pre: Annotated[
        bool, typer.Option("--pre", help="Only this host, before anything of the mesh runs. Asks no control plane.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Take warnings for failures.")] = False,
    listen: Annotated[
        str,
        typer.Option("--listen", metavar="HOST:PORT", help="With --pre: where a control plane would listen."),
    ] = DEFAULT_CONTROL_PLANE,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir",
            envvar="MESH_DATA_DIR",
            file_okay=False,
            help="Of a control plane on this host. Default: grpc-mesh in XDG_STATE_HOME.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Check everything that a running mesh needs and promises; each failure says what to do.

    Every control plane that is named is asked. Nothing is changed. Exit code 0 if nothing failed, 1 otherwise.
    """
    addresses = control_plane.split(",")
    directory, data_dir = operator or default_operator_directory(), data_dir or default_data_dir()
    shown = None if insecure else directory
    if pre:
        ports = _ports(listen, insecure=insecure)
        findings = check_before_start(host_facts(addresses, shown, data_dir, ports))
    else:
        host = host_facts(addresses, shown, data_dir)
        who, credentials = operator_facts(directory, insecure=insecure)
        with ExitStack() as stack:
            clients = [stack.enter_context(AdminClient([each], timeout, credentials)) for each in addresses]
            planes = () if who.problem else plane_facts(clients)
        findings = check_all(Facts(time.time(), host, who, planes))
    if as_json:
        write_json(_to_json(findings))
    else:
        out = console()
        for line in render(findings):
            out.print(line, soft_wrap=True)
    counted = tally(findings)
    if counted[Outcome.FAIL] or (strict and counted[Outcome.WARN]):
        raise Failure


def check_all(facts: Facts) -> list[Finding]:
    """Every check, in the order in which they are shown."""
    return [
        *check_host(facts.host),
        *check_planes(facts),
        *check_identity(facts),
        *check_registry(facts),
        *check_mesh(facts),
    ]


def render(findings: Sequence[Finding]) -> list[Text]:
    """Findings by their groups, and how many ended how, line by line."""
    lines: list[Text] = []
    for group in dict.fromkeys(finding.group for finding in findings):
        lines.append(Text(group, style="bold"))
        for finding in findings:
            if finding.group == group:
                lines += _lines(finding)
        lines.append(Text())
    counted = tally(findings)
    summary = f"{counted[Outcome.PASS]} passed, {count(counted[Outcome.WARN], 'warning')}, "
    summary += count(counted[Outcome.FAIL], "failure")
    if counted[Outcome.SKIP]:
        summary += f", {counted[Outcome.SKIP]} could not be told"
    return [*lines, Text(summary, style="bold")]


def _lines(finding: Finding) -> list[Text]:
    outcome = (f"{finding.outcome.value:<{_WIDTH}}", _STYLES[finding.outcome])
    lines = [Text.assemble("  ", outcome, f"{finding.name}: {printable(finding.detail)}")]
    if finding.fix:
        lines.append(Text(f"  {'':<{_WIDTH}}fix: {printable(finding.fix)}"))
    return lines


def _to_json(findings: Sequence[Finding]) -> dict[str, Json]:
    counted = tally(findings)
    return {
        "checks": [
            {
                "group": finding.group,
                "name": finding.name,
                "outcome": finding.outcome.value,
                "detail": finding.detail,
                "fix": finding.fix,
            }
            for finding in findings
        ],
        "passed": counted[Outcome.PASS],
        "warnings": counted[Outcome.WARN],
        "failures": counted[Outcome.FAIL],
        "skipped": counted[Outcome.SKIP],
    }


def _ports(listen: str, *, insecure: bool) -> list[str]:
    """Where a control plane would listen, and enrol."""
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise typer.BadParameter(f"{listen!r}: expected host:port", param_hint="'--listen'")
    return [listen] if insecure or int(port) in (0, 65535) else [listen, f"{host}:{int(port) + 1}"]
