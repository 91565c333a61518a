"""`mesh events`: what services need at the broker, how full its queues are, and what nobody could handle."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import sqlite3
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import typer

from mesh_cli.options import AsJson, Insecure, checked_service
from mesh_cli.output import (
    Failure,
    Json,
    add_row,
    age,
    console,
    count,
    printable,
    reports_errors,
    table,
    write_error,
    write_json,
)
from mesh_client.core.errors import ConfigError, InvalidValueError, MeshError
from mesh_client.core.events.retry import DEFAULT_DELAYS, RetrySchedule
from mesh_client.core.events.topology import CONTROL_PLANE, OPERATOR, Group, check_group, permissions

if TYPE_CHECKING:
    from mesh_client.events.dead_letters import DeadLetter, DeadLetters
    from mesh_client.events.outbox import OutboxSize

app = typer.Typer(
    no_args_is_help=True,
    help="Events: users of the broker, depths of queues, and events that nobody could handle.",
    epilog="Example: mesh events dead list shipping",
)
dead = typer.Typer(
    no_args_is_help=True,
    help="Dead letters: events that a group could not handle, with the reason.",
    epilog="Example: mesh events dead replay shipping --all",
)
app.add_typer(dead, name="dead")

T = TypeVar("T")


def _checked_group(name: str) -> str:
    try:
        return check_group(name) if name else name
    except InvalidValueError as error:
        raise typer.BadParameter(f"{name!r}: expected {error.expected}") from None


Service = Annotated[
    str, typer.Argument(metavar="SERVICE", callback=checked_service, help="Whose group it is.", show_default=False)
]
GroupName = Annotated[
    str,
    typer.Option(
        "--group",
        metavar="GROUP",
        callback=_checked_group,
        help="The group. Default: the one named like the service.",
        show_default=False,
    ),
]
BrokerUrl = Annotated[
    str | None,
    typer.Option(
        "--broker", envvar="MESH_BROKER", metavar="URL", help="As amqps://host:port/vhost.", show_default=False
    ),
]
CredentialsFile = Annotated[
    Path | None,
    typer.Option(
        "--credentials",
        envvar="MESH_BROKER_CREDENTIALS",
        dir_okay=False,
        help="File with user and password, one a line, mode 0600: the service's or the operator's.",
        show_default=False,
    ),
]
Roots = Annotated[
    Path | None,
    typer.Option(
        "--roots",
        envvar="MESH_BROKER_ROOTS",
        dir_okay=False,
        help="PEM file of the roots that the broker's certificate is verified by. Default: the system's.",
        show_default=False,
    ),
]
Ids = Annotated[list[str] | None, typer.Argument(metavar="[EVENT]...", help="Ids of events.", show_default=False)]
All = Annotated[bool, typer.Option("--all", help="All that are there now.")]


@app.command(epilog="Example: mesh events credentials orders shipping --directory broker --operator")
@reports_errors
def credentials(
    services: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SERVICE]...", help="Services that shall have a user.", show_default=False),
    ] = None,
    directory: Annotated[
        Path, typer.Option("--directory", file_okay=False, help="Where the files go; it is made with mode 0700.")
    ] = Path("broker-users"),
    operator: Annotated[bool, typer.Option("--operator", help=f"Also one for operators, {OPERATOR}.")] = False,
    control_plane: Annotated[
        bool, typer.Option("--control-plane", help=f"Also one for control planes, {CONTROL_PLANE}.")
    ] = False,
    vhost: Annotated[str, typer.Option("--vhost", help="Virtual host in which they have their rights.")] = "/",
    as_json: AsJson = False,
) -> None:
    """Make users for a broker: a file with user and password each, and definitions for RabbitMQ.

    Services have rights to their own names alone. Import the definitions with `rabbitmqctl import_definitions`, or name
    them in rabbitmq.conf (load_definitions); they hold hashes of the passwords. Running it again makes new passwords.
    """
    from control_plane.files import secret_directory, write_atomically
    from mesh_client.events.definitions import definitions, new_credentials

    names = [*(services or []), *([OPERATOR] if operator else []), *([CONTROL_PLANE] if control_plane else [])]
    if not names:
        raise typer.BadParameter("name a service, or --operator or --control-plane")
    for name in names:
        try:
            permissions(name)
        except InvalidValueError as error:
            raise typer.BadParameter(f"{name!r}: expected {error.expected}") from None
    users = [new_credentials(name) for name in names]
    secret_directory(directory)
    made: dict[str, Json] = {}
    for user in users:
        file = directory / f"{user.user.replace(':', '-')}.credentials"
        write_atomically(file, f"{user.user}\n{user.password}\n".encode())
        made[user.user] = str(file)
    file = directory / "definitions.json"
    write_atomically(file, json.dumps(definitions(users, [vhost]), indent=1).encode())
    if as_json:
        write_json({"credentials": made, "definitions": str(file)})
        return
    for name, path in made.items():
        console().print(f"{name}: {path}", soft_wrap=True)
    console().print(f"definitions for RabbitMQ: {file}", soft_wrap=True)


@app.command(epilog="Example: mesh events status shipping --outbox shipping.sqlite")
@reports_errors
def status(
    service: Service,
    group: GroupName = "",
    outbox: Annotated[
        str,
        typer.Option(
            "--outbox",
            metavar="FILE|URL",
            help="The service's outbox: a SQLite file, or an address of PostgreSQL as postgresql://USER@HOST/DATABASE.",
            show_default=False,
        ),
    ] = "",
    as_json: AsJson = False,
    broker: BrokerUrl = None,
    credentials: CredentialsFile = None,
    roots: Roots = None,
    insecure: Insecure = False,
) -> None:
    """Show how many events wait: at the broker in the group's queues, and in the service's outbox."""
    made: dict[str, Json] = {}
    shown = table("WHERE", "EVENTS", "CONSUMERS", "OLDEST", right=["EVENTS", "CONSUMERS"])
    if outbox:
        name, waits = _outbox(outbox)
        made["outbox"] = waits
        oldest = waits["oldest_age"]
        add_row(shown, f"outbox {name}", str(waits["events"]), "", age(oldest) if isinstance(oldest, float) else "-")
        if waits["refused"]:
            add_row(shown, "never taken by the broker", str(waits["refused"]), "", "")
    if broker or not outbox:
        delays = RetrySchedule(DEFAULT_DELAYS).milliseconds
        letters = _dead_letters(service, group, broker, credentials, roots, insecure=insecure)
        depths = _ask(letters, lambda letters: letters.depths(delays))
        if not depths and not outbox:
            from aio_pika.exceptions import ChannelNotFoundEntity

            # A group that there is has its queue: this is what `mesh events dead list` is told.
            raise ConfigError(letters.explain(ChannelNotFoundEntity()))
        made["queues"] = [{"queue": each.queue, "events": each.events, "consumers": each.consumers} for each in depths]
        for each in depths:
            add_row(shown, each.queue, str(each.events), str(each.consumers), "")
    if as_json:
        write_json(made)
        return
    console().print(shown)
    if "queues" not in made:
        console().print("No broker is named (--broker, MESH_BROKER): what its queues hold is not shown.")


@dead.command("list", epilog="Example: mesh events dead list shipping --json")
@reports_errors
def list_letters(
    service: Service,
    group: GroupName = "",
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="At most so many, the oldest.")] = 100,
    as_json: AsJson = False,
    broker: BrokerUrl = None,
    credentials: CredentialsFile = None,
    roots: Roots = None,
    insecure: Insecure = False,
) -> None:
    """Show what a group could not handle, and why, the oldest first."""
    letters = _ask(
        _dead_letters(service, group, broker, credentials, roots, insecure=insecure),
        lambda letters: letters.letters(limit),
    )
    if as_json:
        write_json([_as_json(letter) for letter in letters])
        return
    if not letters:
        console().print("There are no dead letters.")
        return
    shown = table("EVENT", "TYPE", "FROM", "KEY", "AGE", "REASON", "DETAIL")
    for letter in letters:
        since = age(max(0.0, time.time() - letter.buried)) if letter.buried else "-"
        cells = (letter.id, letter.type, letter.publisher, letter.key, since, letter.reason, letter.detail)
        add_row(shown, *(cell or "-" for cell in cells))
    console().print(shown)


@dead.command(epilog="Example: mesh events dead show shipping 5f0c9a1b2c3d4e5f")
@reports_errors
def show(
    service: Service,
    event: Annotated[str, typer.Argument(metavar="EVENT", help="Its id, from `mesh events dead list`.")],
    group: GroupName = "",
    as_json: AsJson = False,
    broker: BrokerUrl = None,
    credentials: CredentialsFile = None,
    roots: Roots = None,
    insecure: Insecure = False,
) -> None:
    """Show one dead letter with all of its headers and its body, base64."""
    letters = _ask(
        _dead_letters(service, group, broker, credentials, roots, insecure=insecure),
        lambda letters: letters.letters(1_000_000),
    )
    found = next((letter for letter in letters if letter.id == event), None)
    if found is None:
        _none(event)
    if as_json:
        write_json(_as_json(found))
        return
    shown = table("HEADER", "VALUE")
    for name, value in found.headers.items():
        add_row(shown, name, value)
    console().print(shown)
    console().print(f"body, {len(found.body)} bytes: {base64.b64encode(found.body).decode()}", soft_wrap=True)


@dead.command(epilog="Example: mesh events dead replay shipping --all")
@reports_errors
def replay(
    service: Service,
    events: Ids = None,
    everything: All = False,
    group: GroupName = "",
    as_json: AsJson = False,
    broker: BrokerUrl = None,
    credentials: CredentialsFile = None,
    roots: Roots = None,
    insecure: Insecure = False,
) -> None:
    """Send dead letters back to their group, and to no other, to be handled as if for the first time."""
    chosen = _chosen(events, everything)
    letters = _dead_letters(service, group, broker, credentials, roots, insecure=insecure)
    done = _ask(letters, lambda letters: letters.replay(chosen))
    _report(done, chosen, "sent back", as_json=as_json)


@dead.command(epilog="Example: mesh events dead purge shipping 5f0c9a1b2c3d4e5f")
@reports_errors
def purge(
    service: Service,
    events: Ids = None,
    everything: All = False,
    group: GroupName = "",
    as_json: AsJson = False,
    broker: BrokerUrl = None,
    credentials: CredentialsFile = None,
    roots: Roots = None,
    insecure: Insecure = False,
) -> None:
    """Delete dead letters for good."""
    chosen = _chosen(events, everything)
    letters = _dead_letters(service, group, broker, credentials, roots, insecure=insecure)
    done = _ask(letters, lambda letters: letters.purge(chosen))
    _report(done, chosen, "deleted", as_json=as_json)


def _report(done: int, chosen: list[str], what: str, *, as_json: bool) -> None:
    """Says what became of how many events; fails when those that were named are not there."""
    if chosen and not done:
        _none(chosen[0])
    if as_json:
        write_json({what.replace(" ", "_"): done})
    else:
        console().print(f"{count(done, 'event')} {what}.")


def _none(event: str) -> NoReturn:
    write_error(f"there is no dead letter {printable(event)!r}; `mesh events dead list` shows those that there are")
    raise Failure


def _chosen(events: list[str] | None, everything: bool) -> list[str]:
    if bool(events) == everything:
        raise typer.BadParameter("name events, or say --all")
    return events or []


def _dead_letters(
    service: str, group: str, broker: str | None, credentials: Path | None, roots: Path | None, *, insecure: bool
) -> DeadLetters:
    try:
        from mesh_client.events.broker import CONNECT_TIMEOUT, Broker
        from mesh_client.events.dead_letters import DeadLetters
        from mesh_client.events.settings import broker_settings
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; install 'grpc-mesh[events]'") from None
    settings = broker_settings(broker, credentials, roots, insecure=insecure)
    if settings is None:
        raise ConfigError("no broker is named: give --broker, or MESH_BROKER")
    return DeadLetters(Broker(settings, "mesh events", CONNECT_TIMEOUT), Group(service, group or service))


def _ask(letters: DeadLetters, ask: Callable[[DeadLetters], Coroutine[object, object, T]]) -> T:
    from mesh_client.events.broker import FAILURES

    # What the library has to say of a broker that cannot be reached is said below, in words.
    library = logging.getLogger("aiormq")
    level = library.level
    library.setLevel(logging.CRITICAL + 1)
    try:
        return asyncio.run(ask(letters))
    except MeshError:
        raise
    except FAILURES as error:
        raise ConfigError(letters.explain(error)) from None
    finally:
        library.setLevel(level)


def _outbox(named: str) -> tuple[str, dict[str, Json]]:
    """The outbox's name, without a password, and what is in it."""
    from mesh_client.events.outbox import POSTGRES

    name, size = _postgres(named) if named.startswith(POSTGRES) else _sqlite(named)
    oldest = None if size.oldest is None else max(0.0, time.time() - size.oldest)
    return name, {
        "events": size.events,
        "bytes": size.bytes,
        "oldest_age": oldest,
        "refused": size.refused,
        "max_events": size.max_events or None,
        "max_bytes": size.max_bytes or None,
    }


def _sqlite(file: str) -> tuple[str, OutboxSize]:
    from mesh_client.events.outbox import read_size

    try:
        # Not opened for writing, which would make a file that is not there.
        with contextlib.closing(sqlite3.connect(f"{Path(file).absolute().as_uri()}?mode=ro", uri=True)) as connection:
            return file, read_size(connection)
    except sqlite3.Error as error:
        raise ConfigError(f"{file} holds no outbox: {error}") from None


def _postgres(address: str) -> tuple[str, OutboxSize]:
    try:
        from mesh_client.events.postgres import PostgresOutbox, read_size
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; install 'grpc-mesh[postgres]'") from None
    return PostgresOutbox(address).name, read_size(address)


def _as_json(letter: DeadLetter) -> dict[str, Json]:
    return {
        "id": letter.id,
        "type": letter.type,
        "source": letter.source,
        "publisher": letter.publisher,
        "key": letter.key,
        "time": letter.time,
        "reason": letter.reason,
        "detail": letter.detail,
        "buried": letter.buried,
        "attempts": letter.attempts,
        "headers": dict(letter.headers),
        "body": base64.b64encode(letter.body).decode(),
    }
