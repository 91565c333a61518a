"""What every command promises: JSON where it prints data, and exit codes and messages that scripts can trust."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from mesh.v1 import authority_pb2, operations_pb2, traffic_pb2

from tests.cli.commands import ASKING, EVERY, LEAVES, options
from tests.cli.conftest import Run
from tests.cli.scripted import ScriptedAdmin

WITHOUT_JSON: dict[tuple[str, ...], str] = {
    ("control-plane",): "runs until it is stopped",
    ("up",): "runs until it is stopped",
    ("gateway", "run", "envoy"): "runs until it is stopped",
    ("gateway", "run", "kong"): "runs until it is stopped",
    ("policy", "schema"): "writes JSON and nothing else",
    ("edge", "schema"): "writes JSON and nothing else",
}

ARGUMENTS: dict[tuple[str, ...], list[str]] = {
    ("endpoints",): ["orders"],
    ("top",): ["--once"],
    ("tap",): ["orders"],
    ("explain",): ["orders"],
    ("diff",): ["{policy}"],
    ("drain",): ["orders"],
    ("policy", "apply"): ["{policy}"],
    ("policy", "get"): ["orders"],
    ("policy", "delete"): ["orders"],
    ("policy", "check"): ["orders", "a.B/C", "--service", "payments"],
    ("edge", "apply"): ["{edge}"],
    ("edge", "get"): ["public"],
    ("edge", "delete"): ["public"],
    ("logs", "show"): ["orders"],
    ("logs", "level"): ["orders", "debug"],
    ("token", "create"): ["--service", "orders"],
    ("token", "revoke"): ["8a1e3cc39be0f858"],
    ("ca", "revoke"): ["--service", "orders"],
}
"""What a command that asks a control plane needs to be given, where it needs anything."""

LINES = [("logs", "show"), ("tap",)]
"""Those whose JSON is a document a line."""

UNDECIDED: dict[tuple[str, ...], int] = {("policy", "check"): 2, ("diff",): 2}
"""Exit codes other than 1 when there is no answer: 1 is an answer there."""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Files that arguments name."""
    (tmp_path / "policy.yaml").write_text("service: orders\n")
    (tmp_path / "edge.yaml").write_text("edge: public\n")
    return {"policy": str(tmp_path / "policy.yaml"), "edge": str(tmp_path / "edge.yaml")}


def arguments(words: tuple[str, ...], files: dict[str, str]) -> Sequence[str]:
    """The words of a command that is used rightly."""
    return [*words, *(each.format(**files) for each in ARGUMENTS.get(words, []))]


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_what_prints_data_prints_json_if_asked(words: tuple[str, ...]) -> None:
    assert ("--json" in options(LEAVES[words])) == (words not in WITHOUT_JSON)


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_each_is_explained_in_a_sentence_and_each_of_its_options_too(words: tuple[str, ...]) -> None:
    command = LEAVES[words]
    assert command.help.partition("\n")[0].rstrip().endswith((".", ":")) or "." in command.help
    for parameter in command.params:
        assert parameter.name == "help" or parameter.help, f"{' '.join(words)}: {parameter.name} has no help"


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_an_option_that_there_is_not_is_wrong_use(words: tuple[str, ...], run: Run) -> None:
    result = run(*words, "--frobnicate")
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.mark.parametrize("words", ASKING, ids=" ".join)
def test_each_that_asks_a_control_plane_asks_for_it_in_the_same_way(words: tuple[str, ...]) -> None:
    assert {"--control-plane", "--timeout", "--operator", "--insecure", "--json"} <= options(ASKING[words])


@pytest.mark.parametrize("words", ASKING, ids=" ".join)
def test_a_control_plane_that_cannot_be_reached_is_a_failure_in_words(
    words: tuple[str, ...], run: Run, nobody: str, files: dict[str, str]
) -> None:
    result = run(*arguments(words, files), "--control-plane", nobody)
    assert result.exit_code == UNDECIDED.get(words, 1)
    said = result.stdout if words == ("check",) else result.stderr
    assert "cannot reach the control plane at" in said
    assert "Traceback" not in said
    if words != ("check",):
        assert result.stdout == ""


@pytest.mark.parametrize("words", ASKING, ids=" ".join)
def test_without_credentials_nobody_is_asked(
    words: tuple[str, ...],
    run: Run,
    admin: ScriptedAdmin,
    files: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("MESH_INSECURE")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    result = run(*arguments(words, files), "--control-plane", admin.address)
    assert result.exit_code == UNDECIDED.get(words, 1)
    assert "there are no operator's credentials in" in result.stdout + result.stderr
    assert admin.requests == []


@pytest.mark.parametrize("words", ASKING, ids=" ".join)
def test_json_is_json_and_nothing_else(
    words: tuple[str, ...], run: Run, admin: ScriptedAdmin, files: dict[str, str]
) -> None:
    process = operations_pb2.Process(service="orders", instances=["orders-1"], id="p1")
    answers: dict[str, Message | list[Message]] = {
        "SetLogLevel": operations_pb2.SetLogLevelResponse(outcomes=[operations_pb2.LogLevelOutcome(process=process)]),
        "RevokeWorkload": authority_pb2.RevokeWorkloadResponse(workload_ids=["1d2f0a9b8c7e6f50"]),
    }
    admin.streams["TailLogs"] = [
        operations_pb2.TailLogsResponse(processes=[process], records=[operations_pb2.LogRecord()])
    ]
    admin.streams["Tap"] = [traffic_pb2.TapResponse(calls=[traffic_pb2.CallRecord()])]
    admin.answers |= answers  # type: ignore[arg-type]  # a dictionary's values are what they are
    if words == ("ca", "roots"):
        return  # it needs roots; tests/cli/test_secure_commands.py
    result = run(*arguments(words, files), "--json", "--control-plane", admin.address)
    if words in UNDECIDED:
        assert result.exit_code in (0, 1, 2), result.stderr
        return
    assert result.exit_code == 0, result.stderr
    documents = (
        [json.loads(line) for line in result.stdout.splitlines()] if words in LINES else [json.loads(result.stdout)]
    )
    assert all(isinstance(document, dict) for document in documents)
    assert documents


def test_messages_of_answers_can_all_be_shown() -> None:
    """Of each service for operators: every answer has a form in JSON."""
    from mesh_cli.output import to_json

    for service in (operations_pb2.DESCRIPTOR, authority_pb2.DESCRIPTOR):
        for name in service.message_types_by_name.values():
            json.dumps(to_json(GetMessageClass(name)()))
