"""The contract of the REST edge, by a real Envoy."""

from __future__ import annotations

import pytest

from tests.edge.contract import TABLE
from tests.edge.contract_rig import ContractRig
from tests.edge.contract_rows import Row
from tests.edge.http_client import ask


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_contract(row: Row, rig: ContractRig) -> None:
    for _ in range(row.times - 1):
        ask(rig.address, row.verb, row.path, row.request_headers(), row.body)
    response = ask(rig.address, row.verb, row.path, row.request_headers(), row.body)
    row.answer.check(response.status, response.headers, response.body)
