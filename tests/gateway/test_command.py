"""``mesh gateway``: its commands, and docs/gateway.md, which describes them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from gateway.kong import KONG_CONF
from tests.gateway.compiling import NASTY, ROOT, SHOP, compile_files
from tests.gateway.conftest import GOLDEN, Golden, Run

SHOP_FILES = [str(path) for path in sorted((SHOP / "shop").rglob("*.proto"))]
SHOP_ARGUMENTS = ["-I", str(SHOP), *SHOP_FILES]
NASTY_ARGUMENTS = ["-I", str(NASTY), str(NASTY / "nasty/v1/nasty.proto")]
EDGE = Path(__file__).with_name("edge.yaml")
KONG = Path(__file__).with_name("kong.yaml")
FILES = ["--policy", str(EDGE), "--settings", str(KONG)]
REFERENCE = (ROOT / "docs/gateway.md").read_text(encoding="utf-8")
COMMANDS = [("lint",), ("routes",), ("openapi",), ("render",), ("render", "kong")]


@pytest.fixture
def shop_set(tmp_path: Path) -> str:
    path = tmp_path / "shop.binpb"
    path.write_bytes(compile_files(SHOP, *(str(Path(name).relative_to(SHOP)) for name in SHOP_FILES)))
    return str(path)


@pytest.mark.parametrize("command", [(), *COMMANDS], ids=" ".join)
def test_each_help_has_an_example_of_that_command(command: tuple[str, ...], run: Run) -> None:
    result = run("gateway", *command, "--help")
    assert result.exit_code == 0
    assert f"Example: mesh gateway {' '.join(command)}".strip() in " ".join(result.stdout.split())


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_and_option_is_in_the_reference(command: tuple[str, ...], run: Run) -> None:
    assert f"mesh gateway {' '.join(command)}" in REFERENCE
    options = set(re.findall(r"(?<![\w`-])--[a-z][a-z-]+", run("gateway", *command, "--help").stdout))
    assert {option for option in options - {"--help", "--include"} if f"`{option}" not in REFERENCE} == set()


def test_policy_and_settings_of_the_reference_are_those_that_are_tested() -> None:
    assert EDGE.read_text() in REFERENCE
    assert KONG.read_text() in REFERENCE


def test_the_reference_says_what_kong_conf_must_say() -> None:
    assert f"```ini\n{KONG_CONF}```" in REFERENCE


def test_the_reference_names_every_rule() -> None:
    rules = set(re.findall(r"^(?:error|warning) ([a-z0-9-]+):", (GOLDEN / "lint_nasty.txt").read_text(), re.MULTILINE))
    assert {rule for rule in rules | {"group", "package"} if f"`{rule}`" not in REFERENCE} == set()


def test_routes_are_listed_in_the_order_of_precedence(run: Run, golden: Golden, shop_set: str) -> None:
    result = run("gateway", "routes", shop_set)
    assert result.exit_code == 0
    golden("routes_shop.txt", "".join(f"{line.rstrip()}\n" for line in result.stdout.splitlines()))
    assert (GOLDEN / "routes_shop.txt").read_text() in REFERENCE


def test_routes_as_json(run: Run, golden: Golden) -> None:
    result = run("gateway", "routes", "--json", *NASTY_ARGUMENTS)
    assert result.exit_code == 0
    golden("routes_nasty.json", result.stdout)


def test_a_descriptor_set_and_its_protos_say_the_same(run: Run, shop_set: str) -> None:
    assert run("gateway", "routes", shop_set).stdout == run("gateway", "routes", *SHOP_ARGUMENTS).stdout


def test_lint_passes_with_warnings(run: Run) -> None:
    accepted = ("--accept", "int64")
    result = run("gateway", "lint", *accepted, *SHOP_ARGUMENTS)
    assert result.exit_code == 0
    assert result.stdout.endswith("0 errors, 34 warnings\n")


def test_lint_fails_with_errors(run: Run) -> None:
    result = run("gateway", "lint", *NASTY_ARGUMENTS)
    assert result.exit_code == 1
    assert result.stdout.startswith((GOLDEN / "lint_nasty.txt").read_text())
    answer = run("gateway", "lint", "--json", *NASTY_ARGUMENTS)
    document = json.loads(answer.stdout)
    assert (answer.exit_code, document["errors"]) == (1, sum(f["severity"] == "error" for f in document["findings"]))
    assert set(document["findings"][0]) == {"severity", "rule", "method", "field", "message", "remedy"}


def test_lint_of_one_service_with_accepted_findings(run: Run) -> None:
    library = ["--service", "nasty.v1.LibraryService"]
    assert run("gateway", "lint", *library, "--accept", "int64", *NASTY_ARGUMENTS).exit_code == 0
    result = run("gateway", "lint", "--accept", "nested-path", *NASTY_ARGUMENTS)
    assert result.exit_code == 1
    assert "cannot be accepted" in result.stderr


def test_openapi_is_written_to_standard_output(run: Run) -> None:
    result = run("gateway", "openapi", *SHOP_ARGUMENTS, "--title", "Shop", "--api-version", "3", "--json")
    document = json.loads(result.stdout)
    assert (result.exit_code, document["info"]) == (0, {"title": "Shop", "version": "3"})
    exposed = json.loads(
        run("gateway", "openapi", *SHOP_ARGUMENTS, "--policy", str(EDGE), "--server", "https://a").stdout
    )
    assert "/v1/payments/{order_id}" not in exposed["paths"]
    assert exposed["components"]["securitySchemes"].keys() == {"api_key"}
    assert exposed["servers"] == [{"url": "https://a"}]


def test_render_kong_writes_what_kong_needs(run: Run, tmp_path: Path, shop_set: str) -> None:
    out = tmp_path / "build"
    arguments = ["gateway", "render", "kong", *FILES, "--output", str(out), shop_set]
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    protos = sorted(path.name for path in (out / "protos").iterdir())
    declared = (out / "kong.yml").read_text()
    assert [name.partition("-")[0] for name in protos] == ["shop.v1.InventoryService", "shop.v1.OrderService"]
    assert all(f"/usr/local/kong/protos/{name}\n" in declared for name in protos)
    assert yaml.safe_load(declared)["_format_version"] == "3.0"
    assert len(result.stdout.splitlines()) == 4
    again = run(*arguments, "--json")
    answer = json.loads(again.stdout)
    assert answer["written"][-1] == str(out / "kong.yml")
    assert (out / "kong.yml").read_text() == declared
    assert not list(out.rglob(".*"))


def written(directory: Path, service: str) -> list[str]:
    """Options that name a policy that exposes this service, and settings for it."""
    policy, settings = directory / "edge.yaml", directory / "local.yaml"
    policy.write_text(f"services: {{{service}: {{upstream: u}}}}\n")
    settings.write_text("upstreams: {u: {}}\n")
    return ["--policy", str(policy), "--settings", str(settings)]


def test_render_kong_without_findings_says_nothing_of_warnings(run: Run, tmp_path: Path) -> None:
    files = written(tmp_path, "shop.v1.OrderService")
    proto = tmp_path / "orders.proto"
    proto.write_text('syntax = "proto3"; package shop.v1; message M {} service OrderService { rpc A(M) returns (M); }')
    result = run("gateway", "render", "kong", *files, "-o", str(tmp_path), "-I", str(tmp_path), str(proto))
    assert (result.exit_code, result.stdout) == (0, f"wrote {tmp_path}/kong.yml\n")


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_render_kong_refuses_what_would_be_distorted_and_writes_nothing(
    run: Run, tmp_path: Path, form: list[str]
) -> None:
    files = written(tmp_path, "nasty.v1.DistortedService")
    out = tmp_path / "out"
    result = run("gateway", "render", "kong", *files, "-o", str(out), *form, *NASTY_ARGUMENTS)
    assert result.exit_code == 1
    assert "mesh: error int64: nasty.v1.DistortedService.Get, nasty.v1.Distorted.big: " in result.stderr
    assert not out.exists()
    if form:
        assert json.loads(result.stdout)["written"] == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.binpb", None, "cannot read missing.binpb: No such file or directory"),
        ("bad.binpb", b"\xff\xff", "not a descriptor set"),
        ("bad.proto", b"nonsense", "protoc: bad.proto:1:1: "),
        ("bad.proto", b'syntax = "proto3"; import "nope.proto";', "nope.proto: File not found."),
    ],
)
def test_bad_files_are_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    result = run("gateway", "routes", name)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("policy", None, "No such file or directory"),
        ("policy", "a: [", "not YAML: "),
        ("policy", "services: {a.B: {}}", "services.a.B.upstream: Field required (line 1)"),
        ("settings", None, "No such file or directory"),
        ("settings", "a: [", "is not YAML: "),
        ("settings", "upstreams: 1", "upstreams: "),
    ],
)
def test_bad_policies_and_settings_are_one_line(
    run: Run, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    file = tmp_path / "file.yaml"
    if content is not None:
        file.write_text(content)
    result = run("gateway", "render", "kong", *FILES, f"--{name}", str(file), "-o", str(tmp_path), *SHOP_ARGUMENTS)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_one_line(run: Run, tmp_path: Path, shop_set: str) -> None:
    (tmp_path / "out").write_text("a file")
    result = run("gateway", "render", "kong", *FILES, "-o", str(tmp_path / "out"), shop_set)
    assert result.exit_code == 1
    assert "cannot write" in result.stderr
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_without_the_extra_it_says_what_to_install(
    run: Run, tmp_path: Path, shop_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    proto = tmp_path / "a.proto"
    proto.write_text('syntax = "proto3";')
    result = run("gateway", "routes", "-I", str(tmp_path), str(proto))
    assert result.exit_code == 1
    assert "pip install 'grpc-mesh[gateway]'" in result.stderr
    monkeypatch.setitem(__import__("sys").modules, "gateway.protos", None)
    result = run("gateway", "routes", shop_set)
    assert result.exit_code == 1
    assert "gateway.protos is missing: pip install 'grpc-mesh[gateway]'" in result.stderr
