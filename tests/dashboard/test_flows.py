"""The dashboard as an operator uses it: a real headless Chromium, a secure control plane, real processes under load."""

from __future__ import annotations

import itertools
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh_cli import output, traffic_form, waterfall
from tests.dashboard.browser import DESKTOP, ENTER, PHONE, Browser
from tests.dashboard.shop import Shop

PAGES = ("", "service/orders", "failures", "traces", "policies", "policy/service/orders", "certificates")
EVIL = "<img src=x onerror=document.title=1>"
DRAWN = "return document.querySelector('h1') && !document.querySelector('[data-key=waiting]')"


@pytest.fixture(scope="module")
def signed_in(shop: Shop, window: Browser) -> Browser:
    window.open(shop.link())
    window.until("return document.getElementById('who').innerText === 'demo'")
    return window


@pytest.fixture
def browser(signed_in: Browser) -> Iterator[Browser]:
    signed_in.problems()
    yield signed_in
    assert signed_in.problems() == []


def show(browser: Browser, page: str) -> None:
    browser.go(f"#/{page}")
    browser.until(DRAWN)


def test_a_link_opens_the_topology_with_live_calls(browser: Browser, shop: Shop, tmp_path: Path) -> None:
    show(browser, "")
    assert "login=" not in browser.script("return location.href")
    browser.until("return document.querySelectorAll('svg .line.good').length === 3")
    placed = browser.element("svg .node .name")
    assert placed == ["web", "orders", "inventory", "payments"]
    browser.until(
        "return [...document.querySelectorAll('svg .label')].every((each) => /\\/s 100%/.test(each.textContent))"
    )
    calls = browser.element("[data-key=calls] tbody tr")
    assert [row.split()[:2] for row in calls] == [["orders", "inventory"], ["orders", "payments"], ["web", "orders"]]
    before = browser.element("[data-key='web orders']")
    browser.until("return document.querySelector(\"[data-key='web orders']\").innerText !== arguments[0]", before[0])
    browser.screenshot(tmp_path / "topology.png")


def test_numbers_are_in_the_words_of_the_command(browser: Browser) -> None:
    spans = [0.0, 0.04, 3.27, 9.99, 42.0, 252.0, 7_500.0, 273_600.0]
    shown: Any = browser.script(
        """const spans = arguments[0]; return import("/format.js").then((is) => ({
            age: spans.map(is.age), took: spans.map(is.took), rate: spans.map(is.rate),
            count: ["endpoint", "policy", "process"].flatMap((noun) => [is.count(1, noun), is.count(2, noun)]),
            code: [0, 4, 14, 99].map(is.code),
        }))""",
        spans,
    )
    assert shown == {
        "age": [output.age(each) for each in spans],
        "took": [waterfall.took(each) for each in spans],
        "rate": [traffic_form.rate(each) for each in spans],
        "count": [output.count(number, noun) for noun in ("endpoint", "policy", "process") for number in (1, 2)],
        "code": [traffic_form.code_name(each) for each in (0, 4, 14, 99)],
    }


def test_a_trace_is_a_waterfall_and_nothing_in_it_is_markup(browser: Browser, shop: Shop, tmp_path: Path) -> None:
    shop.send_trace(0xE7110000 << 96, EVIL, f"failed: {EVIL}\u202egnp.exe")
    show(browser, "traces")
    browser.until("return document.querySelectorAll('tbody tr').length > 1")
    browser.click("#f-errors")
    browser.click(".filter button")
    browser.until("return location.hash.includes('errors=1') && document.querySelectorAll('tbody tr').length === 1")
    browser.click("tbody td a")
    browser.sees("Waterfall", f"failed: {EVIL}\\u{{202e}}gnp.exe")
    assert browser.script("return document.querySelectorAll('main img, main script').length") == 0
    widths = browser.script(
        "return [...document.querySelectorAll('.bar rect')].map((bar) => Number(bar.getAttribute('width')))"
    )
    assert widths == [1000, 500]
    browser.screenshot(tmp_path / "evil.png")
    show(browser, "traces?service=orders&method=PlaceOrder")
    browser.until("return document.querySelectorAll('tbody tr').length > 1")
    browser.click("tbody td a")
    browser.sees("Waterfall", "shop.v1.OrderService/PlaceOrder", "attempt 1", "payments", "inventory")
    browser.screenshot(tmp_path / "trace.png")
    show(browser, "trace/00000000")
    browser.sees("no trace that begins with 00000000 is kept")


def test_a_policy_is_checked_compared_applied_and_acknowledged(browser: Browser, shop: Shop, tmp_path: Path) -> None:
    show(browser, "policy/service/orders")
    browser.sees("No policy is stored; the defaults apply", "3 of 3 have acknowledged")
    apply = "return document.querySelector('[data-action=apply]').disabled"
    browser.type("#document", "service: orders\nretry: {max_attempts: 77}\n")
    browser.click("[data-action=validate]")
    browser.sees("Not valid", "retry.max_attempts")
    assert browser.script(apply)
    browser.click("[data-action=diff]")
    browser.sees("retry.max_attempts")
    assert browser.script(apply)

    browser.type("#document", "service: orders\nretry: {max_attempts: 4}\n")
    browser.sees_no_more("retry.max_attempts", "main")
    browser.click("[data-action=diff]")
    browser.sees("-  max_attempts: 3", "+  max_attempts: 4", "instances received within the last")
    browser.screenshot(tmp_path / "difference.png")
    browser.until("return !document.querySelector('[data-action=apply]').disabled")
    browser.type("#document", "service: orders\nretry: {max_attempts: 5}\n")  # another text than was compared
    browser.sees("The text has been changed since")
    assert browser.script(apply)
    browser.click("[data-action=diff]")
    browser.sees("+  max_attempts: 5")
    browser.click("[data-action=apply]")
    browser.sees("Applied", "Stored as version 1", "3 of 3 have acknowledged it")
    browser.screenshot(tmp_path / "applied.png")
    assert re.search(
        r"operator/demo \(workload \w+\) at dashboard:127.0.0.1 stored the policy of orders", shop.log("control-plane")
    )
    show(browser, "policies")
    browser.sees("its own", "3 of 3")


def test_failures_are_grouped_by_reason_and_explained(browser: Browser, shop: Shop, tmp_path: Path) -> None:
    shop.processes["payments-1"].signal(signal.SIGUSR1)
    show(browser, "failures")
    browser.sees("The service breaker is open", "Every attempt failed")
    browser.sees("the service failed as a whole; its probes close the breaker when it answers again")
    browser.screenshot(tmp_path / "failures.png")
    browser.click("[data-key=FAILURE_REASON_ATTEMPTS_FAILED] summary")
    browser.sees("tried payments-1 at 127.0.0.1", "payments pretends to be out of order")
    before = browser.element("h2")
    browser.until("return document.querySelector('h2').innerText !== arguments[0]", before[0])
    assert browser.script("return document.querySelectorAll('details[open]').length") == 1, (
        "what is open stays open over updates"
    )
    show(browser, "service/payments")
    browser.sees("breaker", "open in", "What was found")
    show(browser, "")
    browser.sees("breaker open in")
    browser.screenshot(tmp_path / "troubled.png")
    shop.processes["payments-1"].signal(signal.SIGUSR2)


def test_a_killed_instance_is_watched_going(browser: Browser, shop: Shop, tmp_path: Path) -> None:
    show(browser, "service/orders")
    browser.sees("orders-1", "orders-2", "2 healthy")
    shop.kill("orders-2")
    browser.until(
        "return ![...document.querySelectorAll('[data-key=endpoints] tbody tr')].some((each) => "
        "each.innerText.startsWith('orders-2') && !each.innerText.includes('not registered'))"
    )
    browser.sees("1 healthy")
    browser.screenshot(tmp_path / "gone.png")
    show(browser, "")
    browser.until("return document.querySelector('[data-key=\"node orders\"]').textContent.includes('1 healthy')")


def test_old_data_is_said_to_be_old_and_comes_back(browser: Browser, shop: Shop, tmp_path: Path) -> None:
    show(browser, "")
    browser.until("return document.querySelectorAll('svg .line').length === 3")
    shop.kill_control_plane()
    browser.sees("The control plane does not answer. What you see is old.", "s old; trying again")
    assert browser.script("return document.querySelectorAll('svg .line').length") == 3
    browser.until("return getComputedStyle(document.getElementById('main')).opacity < 0.6")
    browser.screenshot(tmp_path / "stale.png")
    shop.start_control_plane()
    browser.sees_no_more("The control plane does not answer")
    browser.until("return document.querySelectorAll('svg .line').length === 3")
    assert browser.element("#who") == ["demo"], "the session outlives the restart"


def test_everything_is_reached_by_keyboard_and_the_focus_stays(browser: Browser, shop: Shop) -> None:
    show(browser, "")
    browser.until("return document.activeElement.nodeName === 'H1'")
    browser.script("document.activeElement.blur()")
    browser.tab_to("Skip to the content")
    assert browser.script("return document.activeElement.getBoundingClientRect().left") >= 0, "it is seen"
    browser.press(ENTER)
    assert browser.script("return document.activeElement.id") == "main"
    browser.until("return document.querySelector('[data-key=\"node orders\"]')")
    browser.tab_to("web")
    browser.tab_to("orders")
    outline = browser.script("return getComputedStyle(document.activeElement.querySelector('rect')).strokeWidth")
    assert outline == "4px", "whoever has the focus is seen"
    told = browser.element("#freshness")
    browser.until("return document.getElementById('freshness').innerText !== arguments[0]", told[0])
    assert browser.focused().startswith("orders"), "the focus stays over updates"
    browser.press(ENTER)
    browser.until("return location.hash === '#/service/orders'")
    browser.until("return document.activeElement.nodeName === 'H1'")
    browser.go("#/policy/service/orders")
    browser.until("return document.activeElement.innerText === 'Policy of orders'")
    browser.tab_to("document")
    browser.tab_to("Validate", 1)
    browser.press(ENTER)
    browser.sees("Valid")


def test_it_works_at_phone_width_and_in_the_dark(browser: Browser, tmp_path: Path) -> None:
    browser.size(PHONE)
    browser.scheme("dark")
    try:
        for page in PAGES:
            show(browser, page)
            browser.until("return document.querySelector('main').children.length > 1")
            browser.screenshot(tmp_path / f"phone-{page.replace('/', '-')}.png")
            widths = browser.script("return [document.documentElement.scrollWidth, innerWidth]")
            assert widths == [PHONE[0], PHONE[0]], page
            dark = browser.script("return getComputedStyle(document.body).backgroundColor")
            assert max(int(part) for part in dark.removeprefix("rgb(").rstrip(")").split(",")) < 60
    finally:
        browser.size(DESKTOP)
        browser.scheme("light")


def test_headings_landmarks_and_names_are_there(browser: Browser) -> None:
    for page in PAGES:
        show(browser, page)
        browser.until("return document.querySelector('main').children.length > 1")
        found = browser.script(
            """return {
                h1: document.querySelectorAll("h1").length,
                landmarks: ["header", "nav", "main", "footer"].filter((name) => !document.querySelector(name)),
                current: document.querySelectorAll("nav [aria-current=page]").length,
                nameless: [...document.querySelectorAll("a, button, input, textarea, table, svg[role]")]
                    .filter((each) => !(each.ariaLabel || each.labels?.length || each.textContent.trim()))
                    .map((each) => each.outerHTML),
                twice: [...document.querySelectorAll("[id]")].map((each) => each.id)
                    .filter((id, at, all) => all.indexOf(id) !== at),
                levels: [...document.querySelectorAll("h1, h2, h3")].map((each) => Number(each.nodeName[1])),
            }"""
        )
        levels = found.pop("levels")
        assert found == {"h1": 1, "landmarks": [], "current": 1, "nameless": [], "twice": []}, page
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), page


def test_a_policy_is_compared_with_the_events_that_were_handled(browser: Browser, shop: Shop, tmp_path: Path) -> None:
    shop.report_events("reviews", 3)
    show(browser, "policy/service/web")
    browser.type("#document", "service: web\nevents:\n- handlers:\n  - {publishers: [orders]}\n")
    browser.click("[data-action=diff]")
    browser.sees("Of 3 events that its groups handled within the last", "for who publishes")
    rows = [row.split() for row in browser.element("main tbody tr")]
    assert ["reviews", "shop.v1.OrderPlaced", "main", "3", "-", "3", "-"] in rows
    browser.screenshot(tmp_path / "events.png")


def test_calls_of_somebody_who_sends_no_load_reports_are_shown_as_received(browser: Browser, shop: Shop) -> None:
    shop.call_unreported(6)
    show(browser, "")
    browser.until("return document.querySelector(\"[data-key='edge orders']\")")
    assert browser.element("[data-key='edge orders']")[0].split()[:2] == ["edge", "orders"]
    browser.sees("as received")
    show(browser, "service/orders")
    browser.until("return document.querySelector('main').innerText.includes('counted as received those of edge (')")
    browser.until("return document.querySelector('main').innerText.includes('as received')")
    show(browser, "failures")
    browser.sees("Answered so, to callers that do not report their calls: 6 calls", "of edge to orders")


def test_whoever_signs_out_sees_nothing_more(signed_in: Browser, shop: Shop) -> None:
    show(signed_in, "")
    signed_in.click("#logout")
    signed_in.sees("You are signed out.", "mesh dashboard")
    signed_in.open(f"http://{shop.dashboard_address}/")
    signed_in.sees("This dashboard is for operators.")
    link = shop.link()
    signed_in.open(link)
    signed_in.until("return document.getElementById('who').innerText === 'demo'")
    signed_in.click("#logout")
    signed_in.sees("You are signed out.")
    signed_in.open("about:blank")
    signed_in.open(link)
    signed_in.sees("You are not signed in: the link has been used")
