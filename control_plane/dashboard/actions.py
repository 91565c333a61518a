"""What operators do in the dashboard: they try policies, and store them."""

from __future__ import annotations

import grpc
from mesh.v1 import admin_pb2, edge_pb2, policy_pb2, traffic_pb2

from control_plane.dashboard.context import OwnContext, RefusedError
from control_plane.dashboard.views import KINDS, Servicers, Shown
from control_plane.message_json import to_json
from control_plane.policy_text import difference, effective


class Actions:
    """Does what pages ask for.

    Args:
        servicers: that are asked.
    """

    def __init__(self, servicers: Servicers) -> None:
        self._servicers = servicers

    async def validate(self, asked: Shown, context: OwnContext) -> Shown:
        """The verdict on a document.

        Raises:
            RefusedError: whoever is signed in may not ask, or asks for nonsense.
        """
        await self._may(context)
        request = admin_pb2.ValidatePolicyRequest(kind=_kind(asked), document=_text(asked, "document"))
        answer = await self._servicers.admin.ValidatePolicy(request, context.for_servicer)
        return {
            "errors": [to_json(each) for each in answer.errors],
            "warnings": [to_json(each) for each in answer.warnings],
        }

    async def diff(self, asked: Shown, context: OwnContext) -> Shown:
        """What a document would change, and which of the last calls it would have refused.

        Raises:
            RefusedError: whoever is signed in may not ask, or the policy is bad.
        """
        await self._may(context)
        kind, document = _kind(asked), _text(asked, "document")
        request = admin_pb2.ApplyPolicyRequest(kind=kind, document=document, dry_run=True)
        answer = await self._servicers.admin.ApplyPolicy(request, context.for_servicer)
        name = answer.after.service
        before, after = _obeyed(answer.before, kind), _obeyed(answer.after, kind)
        was = "stored" if answer.before.stored_version else "defaults"
        shown: Shown = {
            "name": name,
            "stored_version": answer.before.stored_version,
            "difference": [*difference(before, after, f"{name} ({was})", f"{name} (proposed)")],
            "warnings": [to_json(each) for each in answer.warnings],
            "tried": None,
        }
        if kind == admin_pb2.POLICY_KIND_SERVICE:
            tried = await self._servicers.traffic.TryPolicy(
                traffic_pb2.TryPolicyRequest(document=document), context.for_servicer
            )
            tried.ClearField("current_policy")
            shown["tried"] = to_json(tried)
        return shown

    async def apply(self, asked: Shown, context: OwnContext) -> Shown:
        """Stores a document in place of the version with which it was compared, and of no other.

        Raises:
            RefusedError: whoever is signed in may not, the policy is bad, or another version is stored meanwhile.
        """
        await self._may(context)
        request = admin_pb2.ApplyPolicyRequest(
            kind=_kind(asked), document=_text(asked, "document"), if_version=_text(asked, "if_version")
        )
        answer = await self._servicers.admin.ApplyPolicy(request, context.for_servicer)
        return {"name": answer.after.service, "stored_version": answer.after.stored_version, "changed": answer.changed}

    async def _may(self, context: OwnContext) -> None:
        await self._servicers.access.require_operator(context, "use the dashboard")


def _kind(asked: Shown) -> admin_pb2.PolicyKind.ValueType:
    try:
        return KINDS[_text(asked, "kind")]
    except KeyError:
        raise _nonsense(f"kind: expected one of {', '.join(KINDS)}") from None


def _text(asked: Shown, name: str) -> str:
    value = asked.get(name)
    if not isinstance(value, str):
        raise _nonsense(f"{name}: expected a text")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can say and protobuf cannot
        raise _nonsense(f"{name}: is not Unicode") from None
    return value


def _nonsense(details: str) -> RefusedError:
    return RefusedError(grpc.StatusCode.INVALID_ARGUMENT, details)


def _obeyed(stored: admin_pb2.StoredPolicy, kind: admin_pb2.PolicyKind.ValueType) -> Shown:
    """The policy with every default; the defaults where none is stored, and nothing in place of an invalid one."""
    if stored.HasField("edge_policy"):
        return effective(stored.edge_policy)
    if stored.HasField("policy"):
        return effective(stored.policy)
    if stored.errors:
        return {}
    if kind == admin_pb2.POLICY_KIND_EDGE:
        return effective(edge_pb2.EdgePolicy(edge=stored.service))
    return effective(policy_pb2.ServicePolicy(service=stored.service))
