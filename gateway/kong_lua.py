"""Lua that Kong's pre-function and post-function plugins run: what its grpc-gateway leaves out.

It runs in Kong's sandbox, by the documented plugin development kit; ``untrusted_lua_sandbox_requires = cjson.safe`` in
kong.conf lets it read and write JSON. Configuration cannot break out of it: what comes from protos and policies is
identifiers, numbers, and texts of which every other character is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.http_status import GRPC_STATUS, HTTP_STATUS
from gateway.routes import Route

REQUEST_HEADERS = """\
ngx.var.upstream_te = "trailers"
-- Services believe what the mesh and Kong say here. Kong's plugins say it afterwards.
for _, name in ipairs({
  "mesh-caller", "mesh-previous-attempts", "x-anonymous-consumer", "x-consumer-custom-id", "x-consumer-id",
  "x-consumer-username", "x-credential-identifier",
}) do
  kong.service.request.clear_header(name)
end
"""
"""Runs first. Kong 3.6 to 3.9 do not send ``te: trailers``, without which gRPC servers in Python reset the stream."""

_REST_HEADERS = """\
-- What is gRPC's own means nothing in requests by REST.
for name in pairs(kong.request.get_headers(1000)) do
  if name:find("^grpc%-") or name:find("%-bin$") then
    kong.service.request.clear_header(name)
  end
end
"""

_QUERY = """\
-- Kong's grpc-gateway lets query parameters override what the path says.
local bound = {bound}
for name in pairs(kong.request.get_query()) do
  local field = name:match("[^.]+")
  if field and bound[field] then
    local message = bound[field] .. " is set by the path; leave it out of the query"
    return kong.response.exit(400, {{ code = 3, message = message }})
  end
end
"""

_BODY = """\
-- A body that did not fit into Kong's buffer would be taken for none.
local body = kong.request.get_raw_body()
if not body{too_large} then
  return kong.response.exit(413, {{ code = 3, message = "the body is too large" }})
end
"""

_JSON = """\
-- Bad JSON would be answered with 500.
local decoded
if body ~= "" then
  decoded = require("cjson.safe").decode(body)
  if decoded == nil{not_an_object} then
    return kong.response.exit(400, {{ code = 3, message = "the body is not {expected}" }})
  end
end
"""

_OVERRIDE = """\
-- Kong's grpc-gateway lets the body override what the path says. It reads bodies by the same decoder.
for name, field in pairs({bound}) do
  if decoded and decoded[name] ~= nil then
    return kong.response.exit(400, {{ code = 3, message = field .. " is set by the path; leave it out of the body" }})
  end
end
"""

_NO_BODY = """\
if kong.request.get_raw_body() ~= "" then
  return kong.response.exit(413, {{ code = 3, message = "the method takes no body" }})
end
"""

_AUDIENCES = """\
-- Kong's jwt plugin, which checks the token afterwards, does not look at whom it is for.
local audiences = {audiences}
local function claims_of(token)
  local payload = token:match("^[^.]+[.]([^.]+)[.]")
  payload = payload and payload:gsub("%-", "+"):gsub("_", "/")
  payload = payload and ngx.decode_base64(payload .. string.rep("=", -#payload % 4))
  return payload and require("cjson.safe").decode(payload)
end
local header = kong.request.get_header("authorization")
local token = header and header:match("[Bb]earer%s+(.+)")
if token then
  local claims = claims_of(token)
  -- Without an issuer among the claims, the plugin would take the one in the token's header.
  local allowed = false
  if type(claims) == "table" and type(claims.iss) == "string" then
    local known = audiences[claims.iss]
    allowed = known == nil
    for _, audience in ipairs(type(claims.aud) == "table" and claims.aud or {{ claims.aud }}) do
      allowed = allowed or known[audience]
    end
  end
  if not allowed then
    return kong.response.exit(401, {{ code = 16, message = "the token is not for this audience" }})
  end
end
"""

_NATIVE = """\
local media_type = kong.request.get_header("content-type")
if media_type and media_type:find("application/grpc", 1, true) == 1 then
  return
end
"""

_HEADER_FILTER = """\
{native}\
if {wildcard}kong.response.get_header("access-control-allow-origin") == "*" then
  -- grpc-gateway's own, whatever the cors plugin says
  kong.response.clear_header("access-control-allow-origin")
end
local codes = {codes}
local code = tonumber(kong.response.get_header("grpc-status"))
if code and code ~= 0 then
  kong.response.set_status(codes[code] or 500)
end
if kong.response.get_status() >= 400 then
  kong.response.set_header("content-type", "application/json")
  kong.response.clear_header("content-length")
end
"""

_BODY_FILTER = """\
{native}\
local status = kong.response.get_status()
if status < 400 then
  return
end
local body = kong.response.get_raw_body()
if body == nil then
  return
end
local json = require("cjson.safe")
local code = tonumber(kong.response.get_header("grpc-status"))
local message
if code and code ~= 0 then
  message = (kong.response.get_header("grpc-message") or ""):gsub("%%(%x%x)", function(hex)
    return string.char(tonumber(hex, 16))
  end)
else
  local answer = json.decode(body)
  if type(answer) ~= "table" then
    answer = {{ message = body }}
  end
  local codes = {codes}
  code = answer.code or codes[status] or (status < 500 and 3 or 13)
  message = answer.message or ""
end
kong.response.set_raw_body(json.encode({{ code = code, message = message }}))
"""


def access(route: Route, max_body_bytes: int | None) -> list[str]:
    """What runs before Kong's grpc-gateway for requests to this route."""
    names = {name: field.name for _, field in route.path_fields() for name in (field.json_name, field.name)}
    bound = "{ " + ", ".join(f"[{_text(name)}] = {_text(field)}" for name, field in names.items()) + " }"
    if not route.body:
        guards = (_QUERY.format(bound=bound) if names else "") + _NO_BODY.format()
    else:
        whole = route.body == "*"
        guards = _BODY.format(too_large=f" or #body > {max_body_bytes}" if max_body_bytes is not None else "")
        guards += _JSON.format(
            not_an_object=' or type(decoded) ~= "table" or decoded[1] ~= nil' if whole else "",
            expected="a JSON object" if whole else "JSON",
        )
        guards += _OVERRIDE.format(bound=bound) if names and whole else ""
    return [REQUEST_HEADERS, _REST_HEADERS, guards]


def audiences(known: Mapping[str, Sequence[str]]) -> str:
    """Refuses tokens that name none of the audiences that their issuer's tokens must name, before Kong checks them.

    Args:
        known: audiences by issuer; issuers that are not in it may name any.
    """
    table = ", ".join(
        f"[{_text(issuer)}] = {{ {', '.join(f'[{_text(name)}] = true' for name in names)} }}"
        for issuer, names in sorted(known.items())
    )
    return _AUDIENCES.format(audiences=f"{{ {table} }}")


def _text(value: str) -> str:
    """A literal of Lua that holds nothing but letters, digits, underscores and escapes."""
    return (
        '"'
        + "".join(
            chr(byte) if (chr(byte).isalnum() and byte < 128) or byte == ord("_") else f"\\{byte:03d}"
            for byte in value.encode()
        )
        + '"'
    )


def errors(origins: Sequence[str]) -> dict[str, list[str]]:
    """Makes a JSON google.rpc.Status of every error, of services and of the edge, by the phases of a post-function.

    Args:
        origins: what CORS allows; the ``*`` that Kong's grpc-gateway sends goes out only if it is among them.
    """
    return {
        "header_filter": [
            _HEADER_FILTER.format(
                native=_NATIVE, wildcard="false and " if "*" in origins else "", codes=_table(HTTP_STATUS)
            )
        ],
        "body_filter": [_BODY_FILTER.format(native=_NATIVE, codes=_table(GRPC_STATUS))],
    }


def _table(numbers: dict[int, int]) -> str:
    return "{ " + ", ".join(f"[{key}] = {value}" for key, value in sorted(numbers.items())) + " }"
