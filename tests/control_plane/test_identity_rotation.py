"""Rotation of the trust root: each step in its turn, and nobody is cut off."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.identity.errors import RotationRefusedError
from control_plane.identity.rotation import Dependent, Phase, Rotation, below, unconfirmed

STEADY = Rotation("a")
ADDED = STEADY.add("b")
OVERLAPPING = ADDED.overlap([])


def workload(number: int, root: str, *trusted: str) -> Dependent:
    return Dependent(f"{number:016x}", "spiffe://mesh.internal/service/orders", frozenset({root}), frozenset(trusted))


def test_a_rotation_goes_through_its_phases() -> None:
    assert (STEADY.phase, STEADY.trusted) == (Phase.STEADY, ("a",))
    assert (ADDED.phase, ADDED.trusted, ADDED.signing) == (Phase.ADDED, ("a", "b"), "a")
    assert (OVERLAPPING.phase, OVERLAPPING.trusted, OVERLAPPING.signing) == (Phase.OVERLAPPING, ("a", "b"), "b")
    assert OVERLAPPING.retire([]) == Rotation("b")


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda: ADDED.add("c"), "overlap is the next step"),
        (lambda: OVERLAPPING.add("c"), "retire is the next step"),
        (lambda: STEADY.overlap([], force=True), "add is the first step"),
        (lambda: OVERLAPPING.overlap([], force=True), "retire is the next step"),
        (lambda: STEADY.retire([], force=True), "add is the first step"),
        (lambda: ADDED.retire([], force=True), "overlap is the next step"),
    ],
)
def test_steps_out_of_turn_are_refused(step: Callable[[], Rotation], words: str) -> None:
    with pytest.raises(RotationRefusedError, match=words):
        step()


def test_nothing_is_signed_by_a_root_that_somebody_may_not_trust() -> None:
    with pytest.raises(RotationRefusedError, match=r"1 workloads have not confirmed.*workload 0{15}2"):
        ADDED.overlap([workload(1, "a", "a", "b"), workload(2, "a", "a")])
    assert ADDED.overlap([workload(1, "a", "a", "b")]) == OVERLAPPING
    assert ADDED.overlap([workload(2, "a")], force=True) == OVERLAPPING


def test_no_root_is_retired_that_somebody_needs() -> None:
    with pytest.raises(RotationRefusedError, match=r"lead up to the old root: .*workload 0{15}1"):
        OVERLAPPING.retire([workload(1, "a", "a", "b"), workload(2, "b", "a", "b")])
    # Enrolled since, with a certificate below the new root, but it may not have got to know that root yet.
    with pytest.raises(RotationRefusedError, match="have not confirmed"):
        OVERLAPPING.retire([workload(2, "b", "a")])
    assert OVERLAPPING.retire([workload(2, "b", "b")]) == Rotation("b")
    # Renewed, but seen with its old certificate: the answer may have been lost.
    both = Dependent("0", "spiffe://mesh.internal/service/orders", frozenset({"a", "b"}), frozenset({"a", "b"}))
    with pytest.raises(RotationRefusedError, match="lead up to the old root"):
        OVERLAPPING.retire([both])
    assert OVERLAPPING.retire([workload(1, "a")], force=True) == Rotation("b")


def test_a_refusal_names_some_and_counts_the_rest() -> None:
    with pytest.raises(RotationRefusedError, match=r"^25 workloads .* and 15 more\."):
        ADDED.overlap([workload(number, "a", "a") for number in range(25)])


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "overlap", "retire"]),
            st.lists(
                st.builds(
                    workload,
                    st.just(1),
                    st.sampled_from(["r0", "r1", "r2", "r3"]),
                    st.sampled_from(["r0", "r1", "r2", "r3"]),
                    st.sampled_from(["r0", "r1", "r2", "r3"]),
                ),
                max_size=2,
            ),
        ),
        max_size=12,
    )
)
def test_whoever_is_known_keeps_a_trusted_root_and_can_verify_what_is_signed(
    steps: list[tuple[str, list[Dependent]]],
) -> None:
    rotation, made = Rotation("r0"), 0
    for step, people in steps:
        before = rotation
        try:
            if step == "add":
                rotation = rotation.add(f"r{made + 1}")
                made += 1
            else:
                rotation = rotation.overlap(people) if step == "overlap" else rotation.retire(people)
        except RotationRefusedError:
            assert rotation == before
            continue
        assert rotation.signing in rotation.trusted
        assert len(set(rotation.trusted)) == len(rotation.trusted) <= 2
        if rotation.signing != before.signing:
            assert not unconfirmed(rotation.signing, people)
        for gone in set(before.trusted) - set(rotation.trusted):
            assert not below(gone, people)
