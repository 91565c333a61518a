"""docs/cli.md agrees with the command: its examples are golden files, and no command or option is left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.commands import COMMANDS
from tests.cli.conftest import GOLDEN, Run

DOCS = Path(__file__).parents[2] / "docs"
REFERENCE = (DOCS / "cli.md").read_text(encoding="utf-8")

EXAMPLES = {
    "mesh status": ["status_healthy.txt", "status_troubled.txt"],
    "mesh status --json": ["status_quiet.json"],
    "mesh endpoints inventory": ["endpoints.txt"],
    "mesh top": ["top.txt"],
    "mesh top orders": ["top_service.txt"],
    "mesh tap orders": ["tap.txt"],
    "mesh explain orders": ["explain.txt"],
    "mesh diff orders.yaml": ["diff.txt"],
    "mesh trace": ["traces.txt"],
    "mesh trace 4bf92f35": ["trace.txt"],
    "mesh policy validate orders.yaml": ["policy_validate_errors.txt"],
    "mesh policy apply --dry-run orders.yaml": ["policy_dry_run.txt"],
    "mesh policy get orders": ["policy_get_stated.yaml"],
    "mesh policy list": ["policy_list.txt"],
    "mesh edge apply --dry-run public.yaml": ["edge_dry_run.txt"],
    "mesh edge list": ["edge_list.txt"],
    "mesh token list": ["token_list.txt"],
    "mesh check": ["check.txt"],
    "mesh drain orders orders-1": ["drain.txt"],
    "mesh logs orders": ["logs.txt"],
    "mesh logs level orders debug --logger shop --for 90s": ["logs_level.txt"],
    "mesh logs list": ["logs_list.txt"],
    "mesh ca status": ["ca_status.txt"],
    "mesh policy check orders shop.v1.PaymentService/Charge": ["policy_check_allowed.txt"],
    "mesh policy check refunds shop.v1.PaymentService/Charge": ["policy_check_denied.txt"],
}


@pytest.mark.parametrize(("command", "files"), EXAMPLES.items(), ids=EXAMPLES)
def test_example_outputs_are_the_golden_ones(command: str, files: list[str]) -> None:
    shown = re.findall(rf"^```console\n\$ {re.escape(command)}\n(.*?)^```$", REFERENCE, re.MULTILINE | re.DOTALL)
    assert shown == [(GOLDEN / file).read_text(encoding="utf-8") for file in files]


@pytest.mark.parametrize("command", COMMANDS[1:], ids=" ".join)
def test_every_command_and_option_is_mentioned(command: tuple[str, ...], run: Run) -> None:
    reference = (DOCS / "gateway.md").read_text(encoding="utf-8") if command[0] == "gateway" else REFERENCE
    assert f"mesh {' '.join(command)}" in reference
    options = set(re.findall(r"(?<![\w`-])--[a-z][a-z-]+", run(*command, "--help").stdout)) - {"--help"}
    assert {option for option in options if f"`{option}" not in reference and f"`{option}" not in REFERENCE} == set()
