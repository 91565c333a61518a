"""An Envoy that turns REST into gRPC, as one would write it by hand, with nothing that the mesh adds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from shop.v1 import inventory_pb2

from mesh_client.core.identity import Principal
from mesh_client.identity import PemCredentials

_TYPE = "type.googleapis.com/envoy.extensions."
SERVICE = "shop.v1.InventoryService"


def write_static(directory: Path, listen: int, ports: Sequence[int], pem: PemCredentials, trust_domain: str) -> Path:
    """Writes the configuration with its certificates.

    Args:
        directory: where to.
        listen: port on 127.0.0.1.
        ports: of the instances of inventory on 127.0.0.1.
        pem: what Envoy shows to them, and whom it believes.
        trust_domain: of the mesh.

    Returns:
        The file that Envoy is started with.
    """
    files = {
        "descriptors.binpb": _descriptors(),
        "cert.pem": pem.certificate,
        "key.pem": pem.key,
        "roots.pem": pem.roots,
    }
    for name, content in files.items():
        path = directory / name
        path.touch(0o600)
        path.write_bytes(content)
    configuration = directory / "static.json"
    resources = {"listeners": [_listener(directory, listen)], "clusters": [_cluster(directory, ports, trust_domain)]}
    configuration.write_text(json.dumps({"static_resources": resources}, indent=1))
    return configuration


def _descriptors() -> bytes:
    found: dict[str, FileDescriptorProto] = {}

    def add(file: FileDescriptor) -> None:
        for dependency in file.dependencies:
            add(dependency)
        if file.name not in found:
            file.CopyToProto(found.setdefault(file.name, FileDescriptorProto()))

    add(inventory_pb2.DESCRIPTOR)
    return FileDescriptorSet(file=found.values()).SerializeToString()


def _listener(directory: Path, port: int) -> dict[str, object]:
    transcoder = {
        "@type": _TYPE + "filters.http.grpc_json_transcoder.v3.GrpcJsonTranscoder",
        "proto_descriptor": str(directory / "descriptors.binpb"),
        "services": [SERVICE],
        "convert_grpc_status": True,
    }
    route = {
        "match": {"prefix": f"/{SERVICE}/"},
        "route": {
            "cluster": "inventory",
            "timeout": "15s",
            "retry_policy": {"retry_on": "connect-failure,refused-stream", "num_retries": 1},
        },
    }
    manager = {
        "@type": _TYPE + "filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "static",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {"name": "transcoder", "typed_config": transcoder},
            {"name": "router", "typed_config": {"@type": _TYPE + "filters.http.router.v3.Router"}},
        ],
    }
    return {
        "name": "static",
        "address": _address(port),
        "filter_chains": [{"filters": [{"name": "manager", "typed_config": manager}]}],
    }


def _cluster(directory: Path, ports: Sequence[int], trust_domain: str) -> dict[str, object]:
    name = Principal.service(trust_domain, "inventory").dns_name
    http2 = {
        "@type": _TYPE + "upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    pair = {
        "certificate_chain": {"filename": str(directory / "cert.pem")},
        "private_key": {"filename": str(directory / "key.pem")},
    }
    validation = {
        "trusted_ca": {"filename": str(directory / "roots.pem")},
        "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": name}}],
    }
    tls = {
        "@type": _TYPE + "transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": name,
        "common_tls_context": {"tls_certificates": [pair], "validation_context": validation},
    }
    hosts = [{"endpoint": {"address": _address(port)}} for port in ports]
    return {
        "name": "inventory",
        "type": "STATIC",
        "lb_policy": "LEAST_REQUEST",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2},
        "transport_socket": {"name": "tls", "typed_config": tls},
        "load_assignment": {"cluster_name": "inventory", "endpoints": [{"lb_endpoints": hosts}]},
    }


def _address(port: int) -> dict[str, object]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}
