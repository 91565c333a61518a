"""Keeps bodies from saying again what the path says, by a Lua filter of Envoy's on the routes where they could.

To Envoy's transcoder what a body says comes after what the path says. Its own check of that looks at the first of equal
keys only, and for a field's name in the proto only. This one looks at all keys, by both names. It takes nothing but
JSON: of what is not, such as keys without quotes, the transcoder makes more than one would think.
"""

from __future__ import annotations

from typing import Any

from gateway.envoy_xds import Json, extension, typed
from gateway.routes import Route

FILTER = "envoy.filters.http.lua"

MAX_DEPTH = 100
"""Objects and arrays within each other; the transcoder takes no more either."""

_TYPE = "extensions.filters.http.lua.v3."
_SOURCE = "body"
_FIELDS = "fields"
_RAW = "google.api.HttpBody"

READER = (
    f"local MAX_DEPTH = {MAX_DEPTH}"
    r"""
local LITERALS = { ["true"] = true, ["false"] = true, ["null"] = true }
local ESCAPES = { ['"'] = '"', ["\\"] = "\\", ["/"] = "/", b = "\b", f = "\f", n = "\n", r = "\r", t = "\t" }
local byte, char, find, floor, match, sub = string.byte, string.char, string.find, math.floor, string.match, string.sub

local function utf8(code)
  if code < 0x80 then
    return char(code)
  elseif code < 0x800 then
    return char(0xC0 + floor(code / 0x40), 0x80 + code % 0x40)
  elseif code < 0x10000 then
    return char(0xE0 + floor(code / 0x1000), 0x80 + floor(code / 0x40) % 0x40, 0x80 + code % 0x40)
  end
  return char(
    0xF0 + floor(code / 0x40000), 0x80 + floor(code / 0x1000) % 0x40, 0x80 + floor(code / 0x40) % 0x40,
    0x80 + code % 0x40
  )
end

-- The character of an escape that begins after `at`, and where it ends; nil if JSON has no such escape.
local function escaped(text, at)
  local letter = sub(text, at + 1, at + 1)
  if letter ~= "u" then
    return ESCAPES[letter], at + 2
  end
  local code = tonumber(match(text, "^%x%x%x%x", at + 2) or "", 16)
  at = at + 6
  if code and code >= 0xD800 and code < 0xE000 then
    local low = tonumber(match(text, "^\\u(%x%x%x%x)", at) or "", 16)
    if code >= 0xDC00 or not low or low < 0xDC00 or low >= 0xE000 then
      return nil
    end
    code, at = 0x10000 + (code - 0xD800) * 0x400 + low - 0xDC00, at + 6
  end
  return code and utf8(code), at
end

local function unescaped(text)
  local parts, at = {}, 1
  while true do
    local backslash = find(text, "\\", at, true)
    parts[#parts + 1] = sub(text, at, (backslash or 0) - 1)
    if not backslash then
      return table.concat(parts)
    end
    local letter
    letter, at = escaped(text, backslash)
    if not letter then
      return nil
    end
    parts[#parts + 1] = letter
  end
end

-- Where the string that begins at `at` ends, or nil.
local function closing(text, at)
  while true do
    at = find(text, '["\\]', at + 1)
    if not at or byte(text, at) == 34 then
      return at
    end
    at = at + 1
  end
end

-- Why a body cannot be taken, or nil. `bound` has the fields that the path binds, by all their names: a table for
-- a message that has such fields, and for such a field what it is called.
local function problem(text, bound)
  local BAD = "the body is not JSON"
  local depth, objects, fields = 0, {}, {} -- whether each that is open is an object, and what is bound within
  local want, inside, at = "value", bound, 1
  while true do
    at = find(text, "[^ \t\r\n]", at)
    if not at then
      -- An empty body is none.
      return want ~= "nothing" and (depth > 0 or find(text, "[^ \t\r\n]")) and BAD or nil
    end
    local letter = sub(text, at, at)
    if letter == '"' then
      local last = closing(text, at)
      if not last or want == "colon" or want == "more" or want == "nothing" then
        return BAD
      end
      if want == "key" or want == "first key" then
        local key = unescaped(sub(text, at + 1, last - 1))
        if not key then
          return BAD
        end
        inside = fields[depth] and fields[depth][key] or false
        if type(inside) == "string" then
          return inside .. " is set by the path; leave it out of the body"
        end
        want = "colon"
      else
        want = depth > 0 and "more" or "nothing"
      end
      at = last + 1
    elseif letter == "{" or letter == "[" then
      if want ~= "value" and want ~= "first value" then
        return BAD
      end
      if depth == MAX_DEPTH then
        return "the body is nested too deeply"
      end
      depth = depth + 1
      objects[depth], fields[depth] = letter == "{", inside -- what is in an array is where the array is
      want = letter == "{" and "first key" or "first value"
      at = at + 1
    elseif letter == "}" or letter == "]" then
      if depth == 0 or objects[depth] ~= (letter == "}") then
        return BAD
      end
      if want ~= "more" and want ~= (letter == "}" and "first key" or "first value") then
        return BAD
      end
      depth = depth - 1
      want = depth > 0 and "more" or "nothing"
      at = at + 1
    elseif letter == "," then
      if want ~= "more" then
        return BAD
      end
      want, inside = objects[depth] and "key" or "value", fields[depth]
      at = at + 1
    elseif letter == ":" then
      if want ~= "colon" then
        return BAD
      end
      want, at = "value", at + 1
    else
      local _, last = find(text, "^[%w.+-]+", at)
      local word = last and sub(text, at, last)
      if not word or not (LITERALS[word] or find(word, "^-?%d[%d.eE+-]*$")) then
        return BAD
      end
      if want ~= "value" and want ~= "first value" then
        return BAD
      end
      want, at = depth > 0 and "more" or "nothing", last + 1
    end
  end
end
"""
)
"""Lua with the function ``problem(text, bound)``, in one pass and without recursion."""

_PROGRAM = f"""
function envoy_on_request(handle)
  local body = handle:body()
  if body == nil then
    return
  end
  -- After an error of a program Envoy goes on with the request.
  local ended, found = pcall(problem, body:getBytes(0, body:length()), handle:metadata():get("{_FIELDS}"))
  if not ended then
    handle:logErr(tostring(found))
    handle:respond({{ [":status"] = "500" }}, "the body cannot be read")
  elseif found then
    handle:respond({{ [":status"] = "400" }}, found)
  end
end
"""


def body_filter() -> Json:
    """The filter, which does nothing but for routes that name what it does."""
    return extension(FILTER, _TYPE + "Lua", source_codes={_SOURCE: {"inline_string": READER + _PROGRAM}})


def of_route(route: Route, max_body_bytes: int) -> Json:
    """What a route has in addition, beside `per_filter`; empty if bodies cannot say what its path says.

    Args:
        route: whose.
        max_body_bytes: largest body, which is held until it is there as a whole.
    """
    if not _can_repeat(route):
        return {}
    metadata = {"filter_metadata": {FILTER: {_FIELDS: bound_fields(route)}}}
    return {"metadata": metadata, "request_body_buffer_limit": max_body_bytes}


def per_filter(route: Route) -> Json:
    """What turns the filter on for a route, by its name; empty if bodies cannot say what its path says."""
    return {FILTER: typed(_TYPE + "LuaPerRoute", name=_SOURCE)} if _can_repeat(route) else {}


def bound_fields(route: Route) -> Json:
    """The fields that the path binds, by their names in the proto and in JSON: what each is called, or those within."""
    tree: dict[str, Any] = {}
    for variable in route.template.variables:
        place = tree
        *around, last = route.fields_along(variable)
        for field in around:
            place[field.json_name] = place.setdefault(field.name, {})
            place = place[field.name]
        place |= dict.fromkeys((last.name, last.json_name), variable.name)
    return tree


def _can_repeat(route: Route) -> bool:
    return route.body == "*" and bool(route.template.variables) and route.method.input.full_name != _RAW
