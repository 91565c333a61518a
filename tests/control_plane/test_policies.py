"""Which policy holds for each service."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.events import PolicyDeleted, PolicyStored
from control_plane.policies import PROVISIONAL, PolicyBook
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.policy import ServicePolicy


def stored(timeout: str, version: str = "1", service: str = "orders") -> PolicyStored:
    return PolicyStored(service, f"service: {service}\ntimeout: {timeout}\n".encode(), version)


DEFAULTS = ServicePolicy(service="orders")


def test_a_service_without_a_policy_has_the_defaults() -> None:
    book = PolicyBook(ServicePolicy)
    assert book.policy("orders") == (DEFAULTS, DEFAULTS.version)
    assert book.policy("orders") is book.policy("orders")
    assert not book.has_policy("orders")
    assert book.problems == ()


def test_what_is_no_service_name_has_no_policy() -> None:
    with pytest.raises(ValueError, match="expected"):
        PolicyBook(ServicePolicy).policy("No Name")


def test_a_stored_policy_holds() -> None:
    book = PolicyBook(ServicePolicy)
    assert book.apply(stored("1s"))
    policy, version = book.policy("orders")
    assert policy.timeout == 1.0
    assert version == policy.version
    assert book.has_policy("orders")


def test_the_same_policy_in_other_words_is_no_change() -> None:
    book = PolicyBook(ServicePolicy)
    book.apply(stored("1s"))
    assert not book.apply(stored("1000ms", "2"))


def test_a_bad_policy_is_skipped_and_the_last_good_one_stays() -> None:
    book = PolicyBook(ServicePolicy)
    book.apply(stored("1s"))
    good = book.policy("orders")
    assert not book.apply(stored("never", "2"))
    assert book.policy("orders") == good
    assert book.has_policy("orders")
    (problem,) = book.problems
    assert (problem.name, problem.stored_version, problem.obeyed_version) == ("orders", "2", good[1])
    assert [error.path for error in problem.errors] == ["timeout"]


def test_a_bad_policy_that_is_the_first_leaves_the_defaults_which_are_no_permission() -> None:
    book = PolicyBook(ServicePolicy)
    assert book.apply(stored("never"))
    assert book.policy("orders") == (DEFAULTS, DEFAULTS.version + PROVISIONAL)
    assert book.problems[0].obeyed_version == ""
    assert not book.apply(stored("nothing"))
    assert book.apply(PolicyDeleted("orders"))
    assert book.policy("orders") == (DEFAULTS, DEFAULTS.version)


def test_while_the_store_cannot_be_read_the_defaults_are_no_permission() -> None:
    book = PolicyBook(ServicePolicy)
    book.apply(stored("1s"))
    book.unread = True
    assert book.policy("orders")[0].timeout == 1.0
    assert not book.policy("orders")[1].endswith(PROVISIONAL)
    assert book.policy("payments")[1].endswith(PROVISIONAL)
    assert not book.apply(PolicyDeleted("payments"))
    book.unread = False
    assert not book.policy("payments")[1].endswith(PROVISIONAL)


def test_a_good_policy_ends_the_problem() -> None:
    book = PolicyBook(ServicePolicy)
    book.apply(stored("never"))
    assert book.apply(stored("3s", "2"))
    assert book.problems == ()


def test_deleting_leads_back_to_the_defaults() -> None:
    book = PolicyBook(ServicePolicy)
    book.apply(stored("1s"))
    book.apply(stored("never", "2"))
    assert book.apply(PolicyDeleted("orders"))
    assert book.policy("orders")[0] == DEFAULTS
    assert book.problems == ()
    assert not book.apply(PolicyDeleted("orders"))


def test_a_document_for_another_service_is_a_problem() -> None:
    book = PolicyBook(ServicePolicy)
    book.apply(PolicyStored("orders", b"service: payments", "1"))
    assert book.problems[0].errors[0].path == "service"
    assert not book.has_policy("payments")


def test_problems_are_ordered_by_service() -> None:
    book = PolicyBook(ServicePolicy)
    for service in ("b", "c", "a"):
        book.apply(stored("never", service=service))
    assert [problem.name for problem in book.problems] == ["a", "b", "c"]


def test_an_edge_without_a_policy_exposes_nothing() -> None:
    book = PolicyBook(EdgePolicy)
    assert book.policy("public")[0].services == {}
    book.apply(PolicyStored("public", b"edge: public\nservices: {a.B: {upstream: b}}", "1"))
    book.apply(PolicyStored("inside", b"edge: public", "1"))
    assert book.policy("public")[0].upstreams == ("b",)
    assert book.names == ("inside", "public")
    assert book.problems[0].errors[0].message.startswith("'public' is not 'inside', the edge that")


@given(st.lists(st.sampled_from(["1s", "2s", "never", "delete"]), max_size=12))
def test_what_holds_is_the_last_good_one_since_the_last_deletion(steps: list[str]) -> None:
    book = PolicyBook(ServicePolicy)
    holds: float | None = None
    for step in steps:
        before = book.policy("orders")
        changed = book.apply(PolicyDeleted("orders") if step == "delete" else stored(step))
        assert changed == (book.policy("orders") != before)
        holds = None if step == "delete" else holds if step == "never" else float(step[0])
    assert book.policy("orders")[0].timeout == holds
    assert bool(book.problems) == (steps[-1:] == ["never"])
