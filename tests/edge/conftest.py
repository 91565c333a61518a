"""One Envoy before one server of the contract's services, for a whole module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.edge.contract_rig import ContractRig, contract_rig


@pytest.fixture(scope="module")
def rig() -> Iterator[ContractRig]:
    with contract_rig() as started:
        yield started
