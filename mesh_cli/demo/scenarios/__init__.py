"""What the demo does to the system, one file a scenario, in the order of the demo."""

from mesh_cli.demo.scenarios.books import Books
from mesh_cli.demo.scenarios.breaker import FailingService
from mesh_cli.demo.scenarios.broker import BrokerKilled
from mesh_cli.demo.scenarios.control_plane import ControlPlaneKilled
from mesh_cli.demo.scenarios.hang import HungInstance
from mesh_cli.demo.scenarios.identity import Strangers
from mesh_cli.demo.scenarios.kill import KilledInstances
from mesh_cli.demo.scenarios.rolling import RollingRestart
from mesh_cli.demo.scenarios.rotation import Rotation
from mesh_cli.demo.scenarios.spread import Spread
from mesh_cli.demo.stage import Scenario

SCENARIOS: tuple[Scenario, ...] = (
    Spread(),
    # Before anything dies: the dead are waited for until their certificates end.
    Rotation(),
    Strangers(),
    KilledInstances(),
    HungInstance(),
    FailingService(),
    RollingRestart(),
    ControlPlaneKilled(),
    BrokerKilled(),
    Books(),
)
