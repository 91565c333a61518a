from __future__ import annotations

import pytest

from gateway.descriptors import read
from gateway.errors import SettingsError
from gateway.lint import ACCEPTABLE, Finding, RefusedError, Severity, for_kong, refuse_errors
from gateway.routes import build
from tests.gateway.compiling import HEADER, compile_text, nasty, shop, with_rules
from tests.gateway.conftest import Golden


def test_findings_of_the_nasty_protos_are_the_golden_ones(golden: Golden) -> None:
    golden("lint_nasty.txt", "".join(f"{finding}\n" for finding in for_kong(build(nasty()))))


def test_findings_of_the_shop_are_the_golden_ones(golden: Golden) -> None:
    golden("lint_shop.txt", "".join(f"{finding}\n" for finding in for_kong(build(shop()))))


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        ("int64", "nasty.v1.Distorted.big"),
        ("int64", "nasty.v1.Distorted.bigs"),
        ("int64", "nasty.v1.Distorted.counts"),
        ("bytes", "nasty.v1.Distorted.data"),
        ("wrapper", "nasty.v1.Distorted.wrapped"),
        ("wrapper", "google.protobuf.Int64Value"),
        ("struct", "nasty.v1.Distorted.structure"),
        ("struct", "nasty.v1.Distorted.value"),
        ("any", "nasty.v1.Distorted.any"),
        ("duration", "nasty.v1.Distorted.duration"),
        ("field-mask", "nasty.v1.Distorted.mask"),
        ("nested-path", "nasty.v1.DistortedRequest.Inner.id"),
        ("path-pattern", "nasty.v1.DistortedRequest.plain"),
        ("response-body", "nasty.v1.Distorted.text"),
        ("type-name", "nasty.v1.DistortedRequest_Inner"),
        ("json-name", "nasty.v1.Distorted.odd"),
        ("map-key", "nasty.v1.Distorted.genres"),
        ("map-key", "nasty.v1.Distorted.answers"),
        ("client-streaming", ""),
        ("verb", ""),
    ],
)
def test_what_kong_distorts_is_an_error_by_field_name_with_a_remedy(rule: str, field: str) -> None:
    found = [finding for finding in for_kong(build(nasty())) if (finding.rule, finding.field) == (rule, field)]
    assert found
    assert all(finding.severity is Severity.ERROR and finding.remedy for finding in found)


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        ("timestamp", "nasty.v1.Book.printed_at"),
        ("timestamp-input", "nasty.v1.Book.printed_at"),
        ("path-override", "nasty.v1.GetBookRequest.isbn"),
        ("path-encoding", "nasty.v1.GetBookRequest.isbn"),
        ("repeated-query", "nasty.v1.FindBooksRequest.genre"),
        ("bool-query", "nasty.v1.GetFileRequest.deep"),
        ("query-with-body", "nasty.v1.PutBookRequest.dry_run"),
        ("unset-fields", "nasty.v1.Book"),
        ("enum-alias", "nasty.v1.Genre"),
        ("server-streaming", ""),
    ],
)
def test_what_is_a_risk_is_a_warning(rule: str, field: str) -> None:
    found = for_kong(build(nasty(), ["nasty.v1.LibraryService"]))
    assert {finding.severity for finding in found if (finding.rule, finding.field) == (rule, field)} == {
        Severity.WARNING
    }


def test_groups_and_a_missing_package_are_errors() -> None:
    text = """syntax = "proto2"; import "google/api/annotations.proto";
    message M { optional group Old = 1 { optional int32 a = 1; } }
    service S { rpc A(M) returns (M) { option (google.api.http) = {get: "/a"}; } }"""
    errors = [item for item in for_kong(build(read([compile_text({"t.proto": text})]))) if item.severity == "error"]
    assert [(item.rule, item.method, item.field) for item in errors] == [
        ("group", "S.A", "M.old"),
        ("package", "S", ""),
    ]


def test_an_api_without_trouble_has_no_findings() -> None:
    text = f"""{HEADER} message M {{ optional string name = 1; }}
    service Quiet {{ rpc B(M) returns (M); }}
    service S {{ rpc A(M) returns (M) {{ option (google.api.http) = {{post: "/a" body: "*"}}; }} }}"""
    assert for_kong(build(read([compile_text({"t.proto": text})]))) == ()


def errors(*accepted: str) -> set[tuple[str, str]]:
    table = build(nasty(), ["nasty.v1.DistortedService"])
    return {(item.rule, item.field) for item in for_kong(table, accepted) if item.severity is Severity.ERROR}


def test_one_field_is_accepted_by_name() -> None:
    assert errors() - errors("int64:nasty.v1.Distorted.big") == {("int64", "nasty.v1.Distorted.big")}


def test_a_whole_rule_is_accepted() -> None:
    assert {rule for rule, _ in errors() - errors("int64")} == {"int64"}
    assert {rule for rule, _ in errors(*ACCEPTABLE)}.isdisjoint(ACCEPTABLE)


@pytest.mark.parametrize("rule", ["nested-path", "int65", "response-body:nasty.v1.Distorted.text"])
def test_what_would_not_work_at_all_cannot_be_accepted(rule: str) -> None:
    with pytest.raises(SettingsError, match=r"cannot be accepted; what can is any, bytes, duration"):
        for_kong(build(shop()), [rule])


def test_errors_refuse_and_warnings_do_not() -> None:
    warning = Finding(Severity.WARNING, "w", "m", "", "message", "remedy")
    error = Finding(Severity.ERROR, "e", "m", "f", "message", "remedy")
    refuse_errors([warning])
    with pytest.raises(RefusedError, match="error e: m, f: message; remedy") as caught:
        refuse_errors([warning, error])
    assert caught.value.findings == (error,)
    assert sorted([warning, error]) == [error, warning]


def test_a_body_that_is_one_field_overrides_nothing() -> None:
    overridden = for_kong(build(with_rules('put: "/{id}" body: "n"', 'post: "/{id}" body: "*"')))
    assert [item.method for item in overridden if item.rule == "path-override"] == ["t.v1.S.B"]


def test_a_get_with_no_variables_has_no_override() -> None:
    rules = {finding.rule for finding in for_kong(build(with_rules('get: "/a"')))}
    assert "path-override" not in rules
