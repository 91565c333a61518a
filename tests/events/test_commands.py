"""`mesh events`, against a real broker."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shop.v1.events_pb2 import OrderPlaced
from typer.testing import CliRunner, Result

from mesh_cli.app import app
from mesh_client.core.events.topology import OPERATOR
from mesh_client.events import Event, RetrySchedule
from mesh_client.events.settings import read_credentials
from tests.events.services import Services, started, until
from tests.ports import held_address


async def mesh(services: Services, *arguments: str, user: str = OPERATOR) -> Result:
    environment = {
        "MESH_BROKER": services.broker.url_of(services.vhost),
        "MESH_BROKER_CREDENTIALS": str(services.broker.credentials(user)),
        "MESH_INSECURE": "1",
        "COLUMNS": "240",
    }
    return await asyncio.to_thread(lambda: CliRunner().invoke(app, ["events", *arguments], env=environment))


async def as_json(services: Services, *arguments: str) -> Any:
    result = await mesh(services, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


async def test_dead_letters_are_listed_shown_replayed_and_purged(services: Services) -> None:
    bus = services.bus("shipping")
    bus.group(retries=RetrySchedule(()))
    well: list[tuple[int, str]] = []
    sick = True

    @bus.subscribe(OrderPlaced)
    async def handle(event: Event[OrderPlaced]) -> None:
        if sick:
            raise ValueError("no label left")
        well.append((event.message.quantity, event.source))

    await started(bus)
    orders = services.bus("orders")
    ids = [await orders.publish(OrderPlaced(quantity=number), key="k") for number in range(4)]
    await until(lambda: bus.state().groups[0].counters.dead == {"attempts": 4})
    listed = await as_json(services, "dead", "list", "shipping")
    assert [letter["id"] for letter in listed] == ids
    assert [listed[0][name] for name in ("type", "publisher", "key", "reason", "attempts")] == [
        *("shop.v1.OrderPlaced", "orders", "k", "attempts"),
        1,
    ]
    assert "ValueError: no label left" in listed[0]["detail"]
    table = await mesh(services, "dead", "list", "shipping", "--limit", "1")
    assert ids[0] in table.stdout
    assert ids[1] not in table.stdout
    shown = await as_json(services, "dead", "show", "shipping", ids[2])
    assert OrderPlaced.FromString(base64.b64decode(shown["body"])).quantity == 2
    plain = await mesh(services, "dead", "show", "shipping", ids[2], user="shipping")
    assert "cloudEvents:source" in plain.stdout
    while True:  # those that were looked at are back in a moment
        queues = (await as_json(services, "status", "shipping"))["queues"]
        depths = {each["queue"]: each["events"] for each in queues}
        if depths["shipping.shipping.dead"] == 4:
            break
    assert depths["shipping.shipping"] == 0
    sick = False
    replayed = await mesh(services, "dead", "replay", "shipping", ids[1])
    assert replayed.stdout == "1 event sent back.\n"
    await until(lambda: well == [(1, "mesh:orders")])
    assert (await mesh(services, "dead", "purge", "shipping", ids[0])).stdout == "1 event deleted.\n"
    assert (
        await mesh(services, "dead", "replay", "shipping", "--all", user="shipping")
    ).stdout == "2 events sent back.\n"
    await until(lambda: [number for number, _ in well] == [1, 2, 3])
    assert (await mesh(services, "dead", "list", "shipping")).stdout == "There are no dead letters.\n"
    assert bus.state().groups[0].counters.handled == 3


async def test_what_cannot_be_done_is_said(services: Services) -> None:
    # One that no other test has left at the broker.
    unknown = await mesh(services, "dead", "list", "billing")
    assert unknown.exit_code == 1
    assert "the broker knows no group billing.billing" in unknown.output
    for options in ((), ("--json",)):
        empty = await mesh(services, "status", "billing", *options)
        assert (empty.exit_code, empty.output) == (1, unknown.output)
    await services.subscribed("shipping", OrderPlaced)
    for command in ("show", "replay", "purge"):
        missing = await mesh(services, "dead", command, "shipping", "nothing")
        assert missing.exit_code == 1
        assert "there is no dead letter 'nothing'" in missing.output
    for wrong in (("dead", "replay", "shipping"), ("dead", "purge", "shipping", "x", "--all"), ("credentials",)):
        assert (await mesh(services, *wrong)).exit_code == 2
    refused = await mesh(services, "dead", "list", "shipping", user="orders")
    assert refused.exit_code == 1
    assert "the broker refuses" in refused.output


async def test_the_status_shows_what_waits_in_an_outbox(services: Services) -> None:
    orders = services.bus("orders", broker=False)
    await orders.publish(OrderPlaced())
    file = str(services.directory / "orders.sqlite")
    shown = await as_json(services, "status", "orders", "--outbox", file)
    assert (shown["outbox"]["events"], shown["outbox"]["refused"], shown["queues"]) == (1, 0, [])
    result = CliRunner().invoke(app, ["events", "status", "orders", "--outbox", file], env={"COLUMNS": "240"})
    assert result.exit_code == 0
    assert f"outbox {file}" in result.stdout
    assert "No broker is named" in result.stdout
    (services.directory / "other.sqlite").touch()
    other = await mesh(services, "status", "orders", "--outbox", str(services.directory / "other.sqlite"))
    assert "holds no outbox" in other.output
    absent = services.directory / "absent.sqlite"
    assert "holds no outbox" in (await mesh(services, "status", "orders", "--outbox", str(absent))).output
    assert not absent.exists()


def test_without_a_broker_the_commands_say_what_is_missing() -> None:
    result = CliRunner().invoke(app, ["events", "dead", "list", "shipping"], env={"MESH_BROKER": ""})
    assert result.exit_code == 1
    assert "no broker is named" in result.output


def test_a_broker_that_is_not_there_is_one_line_on_standard_error(tmp_path: Path) -> None:
    file = tmp_path / "operator.credentials"
    file.touch(mode=0o600)
    file.write_text("mesh:operator\nsecret\n", encoding="utf-8")
    with held_address() as address:  # where nobody listens
        environment = os.environ | {
            "MESH_BROKER": f"amqp://{address}",
            "MESH_BROKER_CREDENTIALS": str(file),
            "MESH_INSECURE": "1",
        }
        for command in (["status", "shipping"], ["dead", "list", "shipping"]):
            done = subprocess.run(
                [sys.executable, "-m", "mesh_cli", "events", *command],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            assert (done.returncode, done.stdout) == (1, "")
            (line,) = done.stderr.splitlines()
            assert line.startswith("mesh: ")
            assert address in line


def test_users_are_made_with_rights_to_their_own_names(tmp_path: Path) -> None:
    directory = tmp_path / "users"
    arguments = ["events", "credentials", "orders", "--operator", "--control-plane", "--directory", str(directory)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert read_credentials(directory / "orders.credentials").user == "orders"
    assert read_credentials(directory / "mesh-operator.credentials").user == OPERATOR
    assert stat.S_IMODE((directory / "definitions.json").stat().st_mode) == 0o600
    made = json.loads((directory / "definitions.json").read_text())
    assert [user["name"] for user in made["users"]] == ["orders", "mesh:operator", "mesh:control-plane"]
    assert (
        read_credentials(directory / "orders.credentials").password not in (directory / "definitions.json").read_text()
    )
    assert made["permissions"][0]["configure"] == r"^orders\..+$"
    for wrong in ("mesh", "Orders"):
        assert CliRunner().invoke(app, ["events", "credentials", wrong, "--directory", str(directory)]).exit_code == 2


@pytest.mark.parametrize("group", ["Upper", "a.b"])
def test_a_groups_name_is_checked(group: str) -> None:
    assert CliRunner().invoke(app, ["events", "dead", "list", "shipping", "--group", group]).exit_code == 2
