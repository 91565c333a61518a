"""docs/edge.md lists where Kong differs, as the table of the contract says it; ``--update`` writes it."""

from __future__ import annotations

import json
import re

import pytest

from tests.edge.contract import TABLE
from tests.edge.contract_rows import ANYTHING, Answer, Row
from tests.gateway.compiling import ROOT

REFERENCE = ROOT / "docs/edge.md"
SECTION = re.compile(r"(?<=<!-- differences -->\n).*?(?=<!-- /differences -->)", re.DOTALL)


def shown(answer: Answer) -> str:
    status = " or ".join(map(str, answer.status)) if isinstance(answer.status, tuple) else str(answer.status)
    if answer.body is not ANYTHING:
        return f"{status} `{json.dumps(answer.body, ensure_ascii=False, separators=(',', ':'))}`"
    return status if answer.text is None else f"{status} `{answer.text.rstrip().replace(chr(10), ' ')}`"


def line(row: Row) -> str:
    assert row.kong is not None
    path = row.path if len(row.path) < 60 else f"{row.path[:20]}…"
    request = f"`{row.verb} {path}`" + (f" `{row.body}`" if row.body and len(row.body) < 60 else "")
    answer = f" ({shown(row.kong.answer)})" if row.kong.answer is not None and row.kong.answer != Answer() else ""
    return f"| {row.name} | {request} | {shown(row.answer)} | {row.kong.why}{answer} |\n"


def test_the_reference_lists_where_kong_differs(request: pytest.FixtureRequest) -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    head = "| What | Request | Envoy | Kong |\n| --- | --- | --- | --- |\n"
    table = "\n" + head + "".join(line(row) for row in TABLE if row.kong is not None) + "\n"
    if request.config.getoption("--update"):
        REFERENCE.write_text(SECTION.sub(lambda _: table, text), encoding="utf-8")
    found = SECTION.search(REFERENCE.read_text(encoding="utf-8"))
    assert found is not None
    assert found[0] == table, "write it with --update"


def test_names_of_rows_are_unique() -> None:
    names = [row.name for row in TABLE]
    assert len(set(names)) == len(names)
