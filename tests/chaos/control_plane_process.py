"""A control plane with a certificate authority, as a process of its own, with every option that there is."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path

from control_plane.identity.options import IdentityOptions
from control_plane.options import ControlPlaneOptions
from control_plane.process import serve

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    told = json.loads(sys.argv[1])
    identity = IdentityOptions(renewals_per_second=1000.0, **told.pop("identity", {}))
    asyncio.run(serve(ControlPlaneOptions(identity=identity, data_dir=Path(told.pop("data_dir")), **told)))
