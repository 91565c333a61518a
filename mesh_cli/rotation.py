"""Where a rotation of the trust root stands. Pure."""

from __future__ import annotations

from mesh.v1 import authority_pb2 as pb


def next_step(answer: pb.GetCertificateAuthorityResponse) -> str:
    """What an operator does next in a rotation that is under way; empty when there is none."""
    # In the order: previous, signing, next.
    order = [root.signing for root in answer.roots]
    if order[:2] == [True, False]:
        waiting = answer.roots[1].unconfirmed
        if waiting:
            return f"A root was added; {_workloads(waiting)} did not confirm yet that it is trusted."
        return "A root was added, and every workload trusts it. Next: `mesh ca rotate overlap`, which signs by it."
    if order[:2] == [False, True]:
        old = answer.roots[0].workloads
        if old:
            return f"The new root signs; {_workloads(old)} of the old one will renew soon."
        return "The new root signs, and no workload depends on the old one. Next: `mesh ca rotate retire`."
    return ""


def _workloads(number: int) -> str:
    return f"{number} workload{'' if number == 1 else 's'}"
