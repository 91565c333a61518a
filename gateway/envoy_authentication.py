"""Who may call an Envoy: tokens, keys, and how services learn which consumer called.

What the outside says about consumers is removed before anything else looks at a request. The filters that check tokens
and keys write the consumer's name to `CONSUMER_HEADER`, under which Kong names it too.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from gateway.envoy_xds import Json, extension, typed
from gateway.errors import SettingsError
from mesh_client.core.edge_policy import Authentication, EdgePolicy, JwtIssuer, MethodSettings

CONSUMER_HEADER = "x-consumer-username"
KEY_HEADER = "x-api-key"

JWT_FILTER = "envoy.filters.http.jwt_authn"
KEY_FILTER = "envoy.filters.http.api_key_auth"

_JWT = "extensions.filters.http.jwt_authn.v3."
_KEY = "extensions.filters.http.api_key_auth.v3."
_MUTATION = "extensions.filters.http.header_mutation.v3.HeaderMutation"
_REQUIREMENT = "token"
_ISSUER_HEADER = "x-edge-issuer-"
_NAMESPACE = "mesh.edge"

_REMOVED_PREFIXES = ("mesh-", "x-consumer-", "x-credential-", "x-edge-", "x-envoy-")
"""Of request headers that mean something to the mesh, to services behind an edge, or to Envoy."""


def sanitizer() -> Json:
    """Removes what callers must not say. An early header mutation: no filter has seen the request yet."""
    mutations = [{"remove_on_match": {"key_matcher": {"prefix": prefix}}} for prefix in _REMOVED_PREFIXES]
    return extension(
        "sanitizer", "extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation", mutations=mutations
    )


def filters(policy: EdgePolicy, api_keys: Mapping[str, str]) -> Iterator[Json]:
    """The filters of all ways that the policy asks for, in the order in which they run.

    Args:
        policy: of the edge.
        api_keys: values of the keys that the policy names.

    Raises:
        SettingsError: a key has no value, no usable value, or the value of another consumer's.
    """
    ways = ways_of(policy)
    if Authentication.JWT in ways:
        yield from _token_filters(policy)
    if Authentication.API_KEY in ways:
        yield {
            **extension(
                KEY_FILTER,
                _KEY + "ApiKeyAuth",
                credentials=list(_credentials(policy, api_keys)),
                key_sources=[{"header": KEY_HEADER}],
                forwarding={"header": CONSUMER_HEADER, "hide_credentials": True},
            ),
            "disabled": True,  # but for routes that ask for a key
        }


def of_route(settings: MethodSettings) -> Json:
    """What a route asks for, by the names of filters."""
    config: Json = {}
    if Authentication.JWT in settings.authentication:
        config[JWT_FILTER] = typed(_JWT + "PerRouteConfig", requirement_name=_REQUIREMENT)
    if Authentication.API_KEY in settings.authentication:
        # Turns the filter on as it is.
        config[KEY_FILTER] = typed("config.route.v3.FilterConfig", config={})
    return config


def ways_of(policy: EdgePolicy) -> set[Authentication]:
    """All ways that any method of the policy asks for."""
    stated = [service.authentication for service in policy.services.values()]
    stated += [own.authentication or () for service in policy.services.values() for own in service.methods.values()]
    return {way for ways in stated for way in ways}


def _token_filters(policy: EdgePolicy) -> Iterator[Json]:
    providers: Json = {}
    rules: list[Json] = []
    for number, (name, consumer) in enumerate(sorted(policy.consumers.items())):
        # Envoy copies claims to headers, and knows no consumers: a header that is there means one.
        header = f"{_ISSUER_HEADER}{number}"
        for index, issuer in enumerate(consumer.jwt_issuers):
            providers[f"{name}/{index}"] = _provider(name, issuer, header)
        if consumer.jwt_issuers:
            present = {"metadata_namespace": _NAMESPACE, "key": "consumer", "value": name}
            rules.append({"header": header, "on_header_present": present, "remove": True})
    requirements: list[Json] = [{"provider_name": name} for name in providers]
    requirement = requirements[0] if len(requirements) == 1 else {"requires_any": {"requirements": requirements}}
    yield extension(
        JWT_FILTER, _JWT + "JwtAuthentication", providers=providers, requirement_map={_REQUIREMENT: requirement}
    )
    yield extension("consumer", "extensions.filters.http.header_to_metadata.v3.Config", request_rules=rules)
    name_header = {"key": CONSUMER_HEADER, "value": f"%DYNAMIC_METADATA({_NAMESPACE}:consumer)%"}
    named = {"append": {"header": name_header, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}}
    yield extension("consumer_header", _MUTATION, mutations={"request_mutations": [named]})


def _provider(consumer: str, issuer: JwtIssuer, header: str) -> Json:
    return {
        "issuer": issuer.issuer,
        "audiences": list(issuer.audiences),
        "require_expiration": True,
        "local_jwks": {"inline_string": json.dumps({"keys": [_jwk(consumer, issuer)]})},
        # Without this, tokens in the query would count too, which ends up in logs.
        "from_headers": [{"name": "authorization", "value_prefix": "Bearer "}],
        "claim_to_headers": [{"header_name": header, "claim_name": "iss"}],
    }


def _jwk(consumer: str, issuer: JwtIssuer) -> Json:
    """The public key as RFC 7517 and 7518 write it. Its ``alg`` is the only one that tokens may have."""
    try:
        key = load_pem_public_key(issuer.public_key.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise SettingsError(f"consumers.{consumer}.jwt_issuers: the key of {issuer.issuer!r} is damaged") from None
    match key:
        case rsa.RSAPublicKey():
            numbers = key.public_numbers()
            values = {"kty": "RSA", "n": _base64(numbers.n), "e": _base64(numbers.e)}
        case ec.EllipticCurvePublicKey() if isinstance(key.curve, ec.SECP256R1):
            point = key.public_numbers()
            values = {"kty": "EC", "crv": "P-256", "x": _base64(point.x, 32), "y": _base64(point.y, 32)}
        case _:
            raise SettingsError(f"consumers.{consumer}.jwt_issuers: the key of {issuer.issuer!r} is of another kind")
    return {**values, "alg": issuer.algorithm, "use": "sig"}


def _base64(number: int, length: int | None = None) -> str:
    data = number.to_bytes(length or (number.bit_length() + 7) // 8, "big")
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _credentials(policy: EdgePolicy, api_keys: Mapping[str, str]) -> Iterator[Json]:
    known: dict[str, str] = {}
    for name, consumer in sorted(policy.consumers.items()):
        for secret in consumer.api_keys:
            where = f"consumers.{name}.api_keys: {secret}"
            value = api_keys.get(secret)
            if value is None:
                raise SettingsError(f"{where}: there is no such secret")
            if not value or not value.isascii() or not value.isprintable() or " " in value:
                raise SettingsError(f"{where}: expected visible ASCII characters, for it comes in a header")
            if value in known:
                raise SettingsError(f"{where}: it has the value of {known[value]}; each key is of its own")
            known[value] = secret
            yield {"key": value, "client": name}
