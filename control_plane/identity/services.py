"""Which services of the certificate authority are on which port."""

from __future__ import annotations

import grpc.aio

from control_plane.access import Access
from control_plane.identity.authority import AuthorityServicer, add_authority_service
from control_plane.identity.certificate_authority import CertificateAuthority
from control_plane.identity.certificates import EnrolmentServicer, RenewalServicer, add_certificate_service


def add_enrolment_services(authority: CertificateAuthority, server: grpc.aio.Server) -> None:
    """Adds what the enrolment port serves."""
    add_certificate_service(EnrolmentServicer(authority), server)


def add_mesh_services(authority: CertificateAuthority, server: grpc.aio.Server, access: Access) -> None:
    """Adds what the mesh port serves: renewal, the trust bundle, and the operators' API."""
    add_certificate_service(RenewalServicer(authority, access), server)
    add_authority_service(AuthorityServicer(authority, access), server)
