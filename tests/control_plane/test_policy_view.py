"""What is believed of the policies in Consul, and how a source's state is said."""

from __future__ import annotations

from control_plane.events import PolicyDeleted, PolicyStored, SourceConnected, SourceLost
from control_plane.sources import StoredDocument
from control_plane.sources.policy_view import PolicyView
from control_plane.sources.source_health import SourceHealth
from mesh_client.core.edge_policy import EdgePolicy


def stored(*names: str, version: str = "1") -> dict[str, StoredDocument]:
    return {name: StoredDocument(name, name.encode(), version) for name in names}


def event(name: str, version: str = "1") -> PolicyStored:
    return PolicyStored(name, name.encode(), version)


def test_documents_are_said_when_they_come_change_and_go() -> None:
    view = PolicyView()
    assert view.documents(stored("b", "a"), False) == [event("a"), event("b")]
    assert view.documents(stored("a", "b"), False) == []
    assert view.documents(stored("a") | stored("b", version="2"), False) == [event("b", "2")]
    assert view.documents(stored("a"), False) == [PolicyDeleted("b")]
    assert view.documents({}, False) == [PolicyDeleted("a")]
    assert view.loss is None


def test_a_restart_that_shows_the_same_says_nothing() -> None:
    view = PolicyView()
    view.documents(stored("a"), False)
    assert view.documents(stored("a"), True) == []


def test_a_deletion_that_a_restart_shows_is_one_while_others_are_left() -> None:
    view = PolicyView()
    view.documents(stored("a", "b"), False)
    assert view.documents(stored("a"), True) == [PolicyDeleted("b")]


def test_everything_gone_after_a_restart_is_a_loss_until_it_is_stored_again() -> None:
    view = PolicyView()
    view.documents(stored("a", "b"), False)
    assert view.documents({}, True) == []
    assert view.loss is not None
    assert "a, b" in view.loss
    assert view.documents(stored("a", version="2"), False) == [event("a", "2")]
    assert view.loss is not None
    assert view.documents({}, False) == [PolicyDeleted("a")]
    assert view.documents(stored("b", version="3"), False) == [event("b", "3")]
    assert view.loss is None
    assert view.documents({}, False) == [PolicyDeleted("b")]


def test_a_lost_policy_of_an_edge_is_called_one() -> None:
    view = PolicyView(EdgePolicy)
    view.documents(stored("public"), False)
    view.documents({}, True)
    assert view.loss is not None
    assert "the policies of edge public: " in view.loss


def test_nothing_stored_before_and_after_a_restart_is_no_loss() -> None:
    view = PolicyView()
    assert view.documents({}, True) == []
    assert view.loss is None


def lost(detail: str) -> SourceLost:
    return SourceLost("consul", detail)


CONNECTED = SourceConnected("consul")


def test_a_source_is_connected_once_it_started_and_no_watch_is_in_trouble() -> None:
    health = SourceHealth("consul", "reading")
    assert health.begin() == lost("reading")
    assert health.trouble("a", "refused") == lost("refused")
    assert health.trouble("b", "refused") is None
    assert health.started() is None
    assert health.well("a") is None
    assert health.well("b") == CONNECTED
    assert health.well("b") is None
    assert health.started() is None


def test_the_oldest_trouble_is_said_and_each_only_once() -> None:
    health = SourceHealth("consul", "reading")
    assert health.started() == CONNECTED
    assert health.trouble("a", "first") == lost("first")
    assert health.trouble("b", "second") is None
    assert health.trouble("a", "worse") == lost("worse")
    assert health.well("a") == lost("second")
    assert health.well("b") == CONNECTED
