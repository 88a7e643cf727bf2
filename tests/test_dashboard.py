"""The dashboard in a real browser, over a real service: it shows what the API says, and takes mouse and keyboard."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qs, urlsplit

import httpx
import numpy as np
import pytest
import typer
from gradstore import cli
from gradstore.types import AttributionRequest, AttributionResult, JobKind, JobStatus, Problem
from playwright.sync_api import Browser, Error, Locator, Route, expect

from datastore.attributions import Answered
from datastore.questions import QuestionFeature
from service.routes.dashboard import FOLDER, POLICY
from tests.browser import Visit, chromium, visiting
from tests.serving import Service, problem_of, serving
from tests.shown import DIM, ROWS, large, shown
from tests.stores import Store, numbers, request

pytestmark = pytest.mark.services

expect.set_options(timeout=20_000)
LARGE = 200_000  # rows
FULL = Problem(type="not-enough-space", title="Not enough space", status=507, detail="the disk is full: free 2 GB")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service over the store of the pictures; its job at work keeps its lease."""
    folder = tmp_path_factory.mktemp("shown")
    shown(folder).catalog.close()
    with serving(folder / "store", lease=3600.0) as running:
        yield running


@pytest.fixture
def visit(browser: Browser, service: Service) -> Iterator[Visit]:
    with visiting(browser, service.url) as found:
        yield found


def send(route: Route, old: str = "", new: str = "") -> None:
    """Let a request go on, with another word in its address; one that was given up is gone."""
    with contextlib.suppress(Error):
        route.continue_(url=route.request.url.replace(old, new))


@contextlib.contextmanager
def held(visit: Visit, pattern: str, then: Callable[[Route], None] = send) -> Iterator[list[Route]]:
    """Keep back what is asked meanwhile, and let it go on in the end."""
    routes: list[Route] = []

    def hold(route: Route) -> None:
        routes.append(route)

    visit.page.route(pattern, hold)
    yield routes
    visit.page.unroute(pattern, hold)
    for route in routes:
        then(route)


@contextlib.contextmanager
def refused(visit: Visit, pattern: str) -> Iterator[None]:
    """Answer what is asked meanwhile as a server whose disk is full."""

    def refuse(route: Route) -> None:
        route.fulfill(status=FULL.status, json=FULL.model_dump(mode="json"))

    visit.page.route(pattern, refuse)
    yield
    visit.page.unroute(pattern, refuse)
    visit.forgive(str(FULL.status))


def answer(service: Service, path: str, **params: Any) -> Any:
    """What the API says."""
    found = service.http.get(path, params=params)
    assert found.is_success, found.text
    return found.json()


# The files ----------------------------------------------------------------------------------------------------------


def test_a_browser_that_knows_the_address_alone_finds_the_dashboard(shared_service: Service) -> None:
    for path in ("/", "/dashboard"):
        found = shared_service.http.get(path, follow_redirects=True)
        assert found.url.path == "/dashboard/"
        assert found.headers["content-type"] == "text/html; charset=utf-8"


def test_files_come_with_a_strict_policy_and_are_not_sent_twice(shared_service: Service) -> None:
    for path in FOLDER.rglob("*.*"):
        found = shared_service.http.get(f"/dashboard/{path.relative_to(FOLDER).as_posix()}")
        assert found.content == path.read_bytes()
        assert found.headers["content-security-policy"] == POLICY
        again = shared_service.http.get(found.url.path, headers={"If-None-Match": found.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["content-security-policy"] == POLICY  # the browser's copy takes it over
    assert "unsafe" not in POLICY


@pytest.mark.parametrize("name", ["nothing.js", "../app.py", "%2e%2e/app.py", "pages", "pages/"])
def test_what_is_no_file_of_the_dashboard_is_not_found(shared_service: Service, name: str) -> None:
    problem_of(shared_service.http.get(f"/dashboard/{name}"), 404)


def test_the_files_ask_nobody_else() -> None:
    addresses = {
        address
        for path in FOLDER.rglob("*.*")
        for address in re.findall(r"https?://[\w./]+", path.read_text())
        if address != "http://www.w3.org/2000/svg"
    }
    assert not addresses


def advised() -> list[str]:
    """The commands that the pages advise."""
    text = "".join(path.read_text() for path in sorted(FOLDER.rglob("*.js")))
    literals = {words for _, words in re.findall(r"""(["'])(gradstore .*?)\1""", text)} - {"gradstore key"}
    return sorted({command for words in literals for command in words.split(r"\n")})


def parse(command: Any, words: list[str], parent: Any = None) -> None:
    """Read words as the command line does, down to the last command, and run nothing."""
    context = command.make_context(command.name, words, parent=parent)
    if hasattr(command, "commands"):
        _, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        parse(inner, rest, context)


@pytest.mark.parametrize("command", advised())
def test_the_command_line_understands_what_the_pages_advise(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pool.jsonl", "mmlu.zip", "bbh.zip"):
        (tmp_path / name).touch()
    parse(typer.main.get_command(cli.app), shlex.split(command)[1:])


def test_with_a_key_the_files_are_open_and_the_data_are_not(tmp_path: Path) -> None:
    with serving(tmp_path / "store", api_key="secret") as service, httpx.Client(base_url=service.url) as stranger:
        for path in ("/dashboard/", "/dashboard/app.js", "/dashboard/pages/jobs.js"):
            assert stranger.get(path).status_code == 200
        assert stranger.get("/").status_code == 307
        for path in ("/datasets", "/usage", "/openapi.json", "/dashboards"):
            problem_of(stranger.get(path), 401)
        problem_of(stranger.post("/dashboard/"), 401)


# All pages ----------------------------------------------------------------------------------------------------------

PLACES = {
    "overview": ("", "Overview"),
    "jobs": ("jobs", "Jobs"),
    "datasets": ("datasets", "Datasets"),
    "scores": ("scores?task=mmlu", "Scores"),
    "selections": ("selections", "Selections"),
    "overlap": ("overlaps", "Overlap"),
    "comparison": ("comparisons/five%20ways", "five ways"),
    "comparisons": ("comparisons", "Comparison"),
    "question": ("attributions", "Attribution"),
    "training": ("training", "Training"),
    "generations": ("generations", "Generations"),
    "generation": ("generations/levers", "levers"),
    "predictors": ("predictors", "Predictors"),
    "predictor": ("predictors/from%20a%20tenth", "from a tenth"),
    "levels": ("predictors/three%20levels", "three levels"),
    "cascade": ("cascades/a%20fifth", "a fifth"),
    "estimates": ("estimates", "Estimates"),
    "estimate": ("estimates/sixty%20parts", "sixty parts"),
    "search": ("estimates/step%20by%20step", "step by step"),
    "estimate-validation": ("estimate-validations/ten%20trainings", "ten trainings"),
    "adapters": ("adapters", "Adapters"),
    "adapter-choice": ("adapter-choices/two%20of%20six", "two of six"),
    "projectors": ("projectors", "Projectors"),
    "projector": ("projectors/origins%20told", "origins told"),
    "streams": ("streams", "Streams"),
    "stream": ("streams/of%20the%20pool", "of the pool"),
    "annotations": ("annotations", "Annotations"),
    "annotation": ("annotations/origins", "origins"),
    "taxonomy": ("taxonomies/cods", "cods"),
}
PICTURED = {
    *("overview", "jobs", "datasets", "dataset", "scores", "selections", "selection", "overlap", "comparison"),
    *("training", "predictor", "estimate", "estimate-validation", "projector"),
}
"""Pages of which docs/dashboard.md has a picture that is taken here."""
SCROLLED = {
    "predictor": "Recall of the true best 5 %",
    "estimate": "Groups",
    "estimate-validation": "Estimated and trained",
    "projector": "Capabilities, on held-out rows",
}
"""What stands at the top of a picture, where that is not the heading."""


def opened(visit: Visit, service: Service, name: str) -> None:
    """Go to one of the pages that the documentation shows."""
    if name == "dataset":
        visit.open(f"datasets/{answer(service, '/datasets/tulu-sample')['id']}", title="tulu-sample")
        visit.page.get_by_role("heading", name="Row 0").wait_for()
    elif name == "selection":
        chosen = answer(service, "/select", task="mmlu", pct=0.05, limit=0)
        visit.open(f"selections/{chosen['id']}", title=chosen["id"])
        visit.page.get_by_role("heading", name="Rank 1", exact=True).wait_for()
    else:
        place, title = PLACES[name]
        visit.open(place, title=title)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", [*PLACES, "dataset", "selection"])
def test_a_page_has_no_fault_that_axe_knows(browser: Browser, service: Service, name: str, scheme: Any) -> None:
    with visiting(browser, service.url, color_scheme=scheme) as visit:
        opened(visit, service, name)
        assert not visit.faults(only=None if scheme == "light" else "color-contrast")  # the rest is the same
        if name == "selection":
            visit.page.get_by_role("heading", name="Chosen rows").scroll_into_view_if_needed()
            visit.page.mouse.wheel(0, 700)
            visit.page.wait_for_timeout(300)
        if name in SCROLLED:
            visit.page.get_by_role("heading", name=SCROLLED[name], exact=True).evaluate("node => node.scrollIntoView()")
        if name in PICTURED and (scheme == "light" or name in {"comparison", "scores"}):
            visit.picture(name if scheme == "light" else f"{name}-dark")


def test_the_check_for_faults_finds_one(visit: Visit) -> None:
    visit.open("jobs", title="Jobs")
    visit.page.evaluate("document.querySelector('label').remove()")
    assert any(fault.startswith("select-name") for fault in visit.faults())


def test_dark_and_light_are_the_systems_choice(browser: Browser, service: Service) -> None:
    found = {}
    for scheme in ("light", "dark"):
        with visiting(browser, service.url, color_scheme=scheme) as visit:
            visit.open("", title="Overview")
            colour = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
            found[scheme] = sum(map(int, re.findall(r"\d+", colour)))
    assert found["dark"] < 150
    assert found["light"] > 600


def test_a_narrow_window_scrolls_down_only(browser: Browser, service: Service) -> None:
    with visiting(browser, service.url) as visit:
        visit.page.set_viewport_size({"width": 400, "height": 800})
        for name in [*PLACES, "dataset", "selection"]:
            opened(visit, service, name)
            assert visit.page.evaluate("document.documentElement.scrollWidth") <= 400, name


def test_the_keyboard_alone_leads_everywhere(visit: Visit) -> None:
    visit.open("", title="Overview")
    visit.page.keyboard.press("Tab")
    expect(visit.page.get_by_role("link", name="Skip to content")).to_be_focused()
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#main")).to_be_focused()
    visit.page.keyboard.press("Shift+Tab")
    links = visit.page.get_by_role("navigation").get_by_role("link")
    expect(links.last).to_be_focused()
    while not links.filter(has_text="Jobs").evaluate("link => link === document.activeElement"):
        visit.page.keyboard.press("Shift+Tab")
    visit.page.keyboard.press("Enter")
    visit.heading("Jobs")
    expect(visit.page.get_by_role("heading", level=1)).to_be_focused()
    visit.page.keyboard.press("Tab")
    expect(visit.page.get_by_label("Kind")).to_be_focused()


def test_an_address_that_leads_nowhere_says_so(visit: Visit) -> None:
    for place in ("nowhere", "%E0%A4%A"):
        visit.open(place, title="There is no such page")


def test_a_page_that_is_refused_keeps_its_heading(visit: Visit) -> None:
    for place, title in (("datasets/nothing", "Datasets"), ("jobs?kind=bogus", "Jobs")):
        visit.open(place, title=title)
        expect(visit.page.get_by_role("alert")).to_be_visible()
        visit.complaints.clear()  # what the browser writes of an answer that is none
    visit.open("datasets/nothing", title="Datasets")
    expect(visit.page.get_by_role("alert").locator("code")).to_have_text("gradstore datasets list")
    visit.complaints.clear()


def test_the_key_is_asked_for_and_never_shown(browser: Browser, tmp_path: Path) -> None:
    with serving(tmp_path / "store", api_key="a-secret") as service, visiting(browser, service.url) as visit:
        asked: list[str] = []
        visit.page.on("request", lambda request: asked.append(request.url))
        visit.open("", title="Log in")
        assert not visit.faults()
        field = visit.page.get_by_label("API key")
        field.fill("wrong")
        field.press("Enter")
        visit.page.get_by_text("This is not the server's key.").wait_for()
        field.fill("a-secret")
        visit.page.get_by_role("button", name="Log in").click()
        visit.heading("Overview")
        visit.page.reload()
        visit.heading("Overview")
        assert not any("a-secret" in url for url in [*asked, visit.page.url])
        visit.page.get_by_role("button", name="Log out").click()
        visit.heading("Log in")
        assert visit.page.evaluate("sessionStorage.length + localStorage.length + document.cookie.length") == 0
        visit.forgive("401")


def test_a_server_that_goes_away_is_told_and_found_again(browser: Browser, tmp_path: Path) -> None:
    with visiting(browser, "") as visit:
        with serving(tmp_path / "store") as service:
            visit.url = service.url
            visit.open("", title="Overview")
            port = httpx.URL(service.url).port
        visit.page.get_by_role("navigation").get_by_role("link", name="Jobs").click()
        expect(visit.page.get_by_role("alert")).to_contain_text("The server does not answer")
        with serving(tmp_path / "store", port=port):
            visit.page.get_by_role("button", name="Try again").click()
            visit.heading("Jobs")
        visit.forgive("ERR_CONNECTION")


# Overview -----------------------------------------------------------------------------------------------------------


def test_an_empty_store_says_what_to_do(browser: Browser, shared_service: Service) -> None:
    with visiting(browser, shared_service.url) as visit:
        visit.open("", title="Overview")
        expect(visit.page.get_by_text("gradstore datasets upload")).to_be_visible()
        assert not visit.faults()
        visit.picture("empty")
        visit.open("datasets", title="Datasets")
        expect(visit.page.get_by_text("There is no dataset yet")).to_be_visible()
        visit.open("jobs", title="Jobs")
        expect(visit.page.get_by_text("Nothing has been started yet.")).to_be_visible()


def test_the_overview_counts_what_the_store_holds(visit: Visit, service: Service) -> None:
    visit.open("", title="Overview")
    counts = answer(service, "/usage")["counts"]
    cards = visit.page.get_by_role("list", name="What the store holds").get_by_role("listitem")
    expect(cards.filter(has_text="tasks")).to_have_text(re.compile(rf"^{counts['tasks']}\s*tasks$"))
    expect(cards.filter(has_text="gradients")).to_have_text(re.compile(rf"^{counts['gradients']}\s*gradients jobs$"))


# Jobs ---------------------------------------------------------------------------------------------------------------


def gradients(service: Service, seed: int) -> dict[str, Any]:
    """A gradients job that waits, of its own."""
    body = {"dataset": "tulu-sample", "run": "warmup", "dims": [8], "seed": seed, "name": f"job {seed}"}
    found: dict[str, Any] = service.http.post("/gradients", json=body).json()
    return found


def test_every_kind_of_job_can_be_chosen(visit: Visit) -> None:
    visit.open("jobs", title="Jobs")
    assert set(visit.page.get_by_label("Kind").locator("option").all_inner_texts()) == {"all kinds", *get_args(JobKind)}
    states = visit.page.get_by_label("State").locator("option").all_inner_texts()
    assert set(states) == {"all states", *get_args(JobStatus)}


def test_jobs_are_filtered_by_the_server(visit: Visit, service: Service) -> None:
    visit.open("jobs", title="Jobs")
    rows = visit.page.get_by_role("table").locator("tbody tr")
    assert rows.count() == len(answer(service, "/jobs", limit=50)["data"])
    visit.page.get_by_label("State").select_option("failed")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("failed")
    assert "status=failed" in visit.page.url
    visit.page.reload()
    visit.heading("Jobs")
    expect(rows).to_have_count(1)


def test_lists_say_what_their_things_are_of(visit: Visit, service: Service) -> None:
    job = gradients(service, 5)
    visit.open("jobs", title="Jobs")
    expect(visit.page.locator(f"tr[data-job={job['id']}] td").nth(1)).to_have_text("tulu-sample")
    service.http.post(f"/jobs/{job['id']}/cancel")
    answer(service, "/select", task="mmlu", method="bm25", pct=0.01, wait=30)
    visit.open("selections", title="Selections")
    expect(visit.page.locator("tbody tr").first.locator("td").nth(0)).to_have_text("bm25")
    expect(visit.page.locator("tbody tr").first.locator("td").nth(2)).to_have_text("tulu-sample")


def test_a_job_is_followed_cancelled_and_tried_again(visit: Visit, service: Service) -> None:
    job = gradients(service, 1)
    visit.open(f"jobs/{job['id']}", title="job 1")
    state = visit.page.locator(".badge")
    expect(state).to_contain_text("queued")
    claim = service.backend.jobs.claim("test", kinds=["gradients"], job=job["id"])
    assert claim is not None
    assert service.backend.jobs.renew(claim, done=160)
    expect(visit.page.get_by_text("160 of 1,280 rows")).to_be_visible()
    expect(visit.page.get_by_role("progressbar")).to_have_attribute("value", "0.125")
    visit.page.get_by_role("button", name="Cancel").click()
    expect(state).to_contain_text("cancelled")
    assert answer(service, f"/jobs/{job['id']}")["status"] == "cancelled"
    visit.page.get_by_role("button", name="Try again").click()
    expect(state).to_contain_text(re.compile("queued|running"))
    service.http.post(f"/jobs/{job['id']}/cancel")
    expect(visit.page.get_by_role("status").filter(has_text="The job is cancelled")).to_be_attached()


def test_the_list_of_jobs_keeps_itself_up_to_date_and_the_focus_where_it_is(visit: Visit, service: Service) -> None:
    visit.open("jobs", title="Jobs")
    job = gradients(service, 2)
    row = visit.page.locator(f"tr[data-job={job['id']}]")
    button = row.get_by_role("button", name="Cancel job 2")
    button.focus()
    claim = service.backend.jobs.claim("test", kinds=["gradients"], job=job["id"])
    assert claim is not None
    assert service.backend.jobs.renew(claim, done=64)
    expect(row).to_contain_text("64 of 1,280 rows")
    button.press("Enter")
    expect(row).to_contain_text("cancelled")


def test_a_list_of_jobs_that_was_refused_keeps_itself_up_to_date_again(visit: Visit, service: Service) -> None:
    visit.open("jobs", title="Jobs")
    told, again = visit.page.get_by_role("alert"), visit.page.get_by_role("button", name="Try again", exact=True)
    with refused(visit, "**/jobs?*"):
        expect(told).to_contain_text(FULL.detail)
        with visit.page.expect_response("**/jobs?*"):
            again.click()
        expect(told).to_contain_text(FULL.detail)
    again.click()
    expect(visit.page.get_by_role("table")).to_be_visible()
    expect(told).to_have_count(0)
    job = gradients(service, 3)
    expect(visit.page.locator(f"tr[data-job={job['id']}]")).to_be_visible()


def test_a_look_at_the_jobs_that_comes_late_does_not_stand_for_a_newer_choice(visit: Visit) -> None:
    visit.open("jobs", title="Jobs")
    rows = visit.page.get_by_role("table").locator("tbody tr")
    unfiltered = "**/jobs?limit=*"
    with held(visit, unfiltered):
        with visit.page.expect_request(unfiltered):
            pass  # the list looks by itself
        visit.page.get_by_label("State").select_option("failed")
        expect(rows).to_have_count(1)
    visit.page.wait_for_timeout(500)
    assert rows.count() == 1


def test_a_job_that_cannot_be_followed_is_told_and_tried_again(visit: Visit, service: Service) -> None:
    job = gradients(service, 4)
    told, again = visit.page.get_by_role("alert"), visit.page.get_by_role("button", name="Try again", exact=True)
    with refused(visit, "**/events"):
        visit.open(f"jobs/{job['id']}", title="job 4")
        expect(told).to_contain_text(FULL.detail)
    with refused(visit, f"**/jobs/{job['id']}"):
        again.click()
        expect(told).to_contain_text(FULL.detail)
    again.click()
    expect(told).to_have_count(0)
    service.http.post(f"/jobs/{job['id']}/cancel")
    expect(visit.page.locator(".badge")).to_contain_text("cancelled")


def test_a_failed_job_shows_why_in_the_servers_words(visit: Visit, service: Service) -> None:
    failed = answer(service, "/jobs", status="failed")["data"][0]
    visit.open(f"jobs/{failed['id']}", title=failed["name"])
    expect(visit.page.get_by_role("alert")).to_contain_text(failed["error"]["detail"])
    assert not visit.faults()
    visit.picture("job-failed")


# Datasets -----------------------------------------------------------------------------------------------------------


def test_a_dataset_shows_its_origins_and_lengths(visit: Visit, service: Service) -> None:
    opened(visit, service, "dataset")
    dataset = answer(service, "/datasets/tulu-sample")
    origins = visit.page.get_by_role("table", name="Rows of each origin").locator("tbody tr")
    shown = [(row.locator("th").inner_text(), row.locator("td").nth(1).inner_text()) for row in origins.all()]
    assert dict(shown) == {name: str(count) for name, count in dataset["origins"].items()}
    lengths = answer(service, "/datasets/tulu-sample/lengths")["origins"]
    visit.page.get_by_text("The same as numbers").click()
    table = visit.page.get_by_role("table", name="Bytes of a row by origin").locator("tbody tr")
    for name, own in lengths.items():
        expect(table.filter(has_text=name)).to_contain_text(f"{own['shortest']} B")


def test_rows_are_searched_and_paged(visit: Visit, service: Service) -> None:
    opened(visit, service, "dataset")
    titles = visit.page.locator(".row h3")
    visit.page.get_by_label("Text", exact=True).fill("TROUT")
    visit.page.get_by_role("button", name="Search").click()
    found = answer(service, "/datasets/tulu-sample/rows", q="trout", limit=20)["data"]
    expect(titles).to_have_text([f"Row {row['row']}" for row in found[:10]])
    expect(
        visit.page.get_by_text(f"10 rows found between row {found[0]['row']} and row {found[9]['row']}")
    ).to_be_visible()
    visit.page.get_by_role("button", name="Next").click()
    expect(titles).to_have_text([f"Row {row['row']}" for row in found[10:]])
    visit.page.get_by_role("button", name="Previous").click()
    expect(titles).to_have_text([f"Row {row['row']}" for row in found[:10]])
    visit.page.get_by_label("Origin", exact=True).select_option("cot")
    expect(visit.page.get_by_text("No row is like this.")).to_be_visible()
    visit.page.get_by_label("Text", exact=True).fill("")
    visit.page.get_by_role("button", name="Search").click()
    of_cot = answer(service, "/datasets/tulu-sample/rows", origin="cot", limit=10)["data"]
    expect(titles).to_have_text([f"Row {row['row']}" for row in of_cot])
    visit.page.get_by_label("Go to row").fill(str(ROWS - 1))
    visit.page.get_by_role("button", name="Go", exact=True).click()
    last = answer(service, "/datasets/tulu-sample/rows", origin="cot", after=ROWS - 1)["data"]
    expect(titles).to_have_text([f"Row {row['row']}" for row in last])


# Lists --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with four datasets, four selections and four jobs."""
    with serving(tmp_path_factory.mktemp("several") / "store") as running:
        for number in range(4):
            pool = running.pool(10 + number)["id"]
            answer(running, "/select", method="random", dataset=pool, k=2)
            running.finetune(dataset=pool)
        yield running


def thin(route: Route) -> None:
    """Let a request for fifty things go on as one for one thing."""
    limit = int(parse_qs(urlsplit(route.request.url).query)["limit"][0])
    send(route, f"limit={limit}", f"limit={limit // 50}")


LISTS = pytest.mark.parametrize("name", ["datasets", "selections", "jobs"])


@LISTS
def test_a_double_click_shows_one_page_more(browser: Browser, several: Service, name: str) -> None:
    with visiting(browser, several.url) as visit:
        visit.page.route(f"**/{name}?*", thin)
        visit.open(name, title=name.title())
        lines, more = visit.page.locator("tbody th"), visit.page.get_by_role("button", name="Show more")
        expect(lines).to_have_count(1)
        with held(visit, f"**/{name}?*", thin):
            more.dblclick()
            expect(more).to_be_disabled()
        expect(lines).to_have_count(2)
        visit.page.wait_for_timeout(500)
        assert len(set(lines.all_inner_texts())) == lines.count() == 2
        more.press("Enter")
        expect(lines).to_have_count(3)
        expect(more).to_be_focused()


@LISTS
def test_a_page_more_that_is_refused_is_told_and_tried_again(browser: Browser, several: Service, name: str) -> None:
    with visiting(browser, several.url) as visit:
        visit.page.route(f"**/{name}?*", thin)
        visit.open(name, title=name.title())
        with refused(visit, f"**/{name}?*"):
            visit.page.get_by_role("button", name="Show more").click()
            expect(visit.page.get_by_role("alert")).to_contain_text(FULL.detail)
        visit.page.get_by_role("button", name="Try again").click()
        expect(visit.page.locator("tbody th")).to_have_count(2)
        expect(visit.page.get_by_role("alert")).to_have_count(0)


# Scores -------------------------------------------------------------------------------------------------------------


def origins_taken(visit: Visit) -> dict[str, int]:
    """What the page says that the cut takes of each origin."""
    rows = visit.page.get_by_role("table", name="Rows of each origin that the cut takes").locator("tbody tr")
    cells = [(row.locator("th").inner_text(), row.locator("td").nth(1).inner_text()) for row in rows.all()]
    return {name: int(count.replace(",", "")) for name, count in cells if count != "0"}


def check_cut(visit: Visit, service: Service, step: int) -> None:
    """The page shows the cut after `step` tenths of a percent, with the API's numbers."""
    cuts = answer(service, "/scores/distribution", task="mmlu", steps=1000)["cuts"]
    slider = visit.page.get_by_role("slider")
    expect(slider).to_have_attribute("aria-valuenow", f"{step / 10:g}")
    rows = cuts["rows"][step - 1]
    expect(slider).to_have_attribute("aria-valuetext", re.compile(rf"^{step / 10:g} %: {rows:,} rows with a score of "))
    assert origins_taken(visit) == {name: own[step - 1] for name, own in cuts["origins"].items() if own[step - 1]}
    assert sum(origins_taken(visit).values()) == rows
    expect(visit.page.locator(".told")).to_contain_text(f"{rows:,} of ")


def test_the_cut_is_dragged_by_mouse(visit: Visit, service: Service) -> None:
    visit.open("scores?task=mmlu", title="Scores")
    check_cut(visit, service, 50)
    frame = visit.page.locator(".cut").bounding_box()
    handle = visit.page.get_by_role("slider").bounding_box()
    assert frame is not None
    assert handle is not None
    visit.page.mouse.move(handle["x"] + handle["width"] / 2, frame["y"] + 60)
    visit.page.mouse.down()
    for part in (0.3, 0.5, 0.6):
        visit.page.mouse.move(frame["x"] + part * frame["width"], frame["y"] + 60)
    visit.page.mouse.up()
    visit.page.mouse.move(frame["x"] + 5, frame["y"] + 60)  # the button is up: nothing moves
    found = answer(service, "/scores/distribution", task="mmlu", steps=1000)
    low, high = found["edges"][0], found["edges"][-1]
    step = next(step for step, score in enumerate(found["cuts"]["scores"], 1) if score <= high - 0.6 * (high - low))
    now = float(visit.page.get_by_role("slider").get_attribute("aria-valuenow") or 0)
    assert abs(10 * now - step) <= 8  # a pixel is some rows
    check_cut(visit, service, round(10 * now))


def test_the_cut_is_moved_by_keys_and_by_a_number(visit: Visit, service: Service) -> None:
    visit.open("scores?task=mmlu&pct=10", title="Scores")
    slider = visit.page.get_by_role("slider")
    slider.focus()
    for key, step in (
        *(("ArrowRight", 101), ("ArrowUp", 102), ("ArrowLeft", 101), ("ArrowDown", 100), ("PageUp", 110)),
        *(("PageDown", 100), ("Home", 1), ("ArrowLeft", 1), ("End", 1000)),
    ):
        visit.page.keyboard.press(key)
        check_cut(visit, service, step)
    visit.page.get_by_label("Percent of the pool").fill("12.5")
    visit.page.get_by_label("Percent of the pool").press("Enter")
    check_cut(visit, service, 125)


def test_a_percentage_that_is_none_is_not_asked(visit: Visit, service: Service) -> None:
    visit.open("scores?task=mmlu&pct=abc", title="Scores")
    check_cut(visit, service, 50)
    field = visit.page.get_by_label("Percent of the pool")
    for said in ("", "0", "101"):
        field.fill(said)
        field.press("Enter")
        expect(field).to_have_value("5")
    check_cut(visit, service, 50)
    visit.open("overlaps?pct=abc", title="Overlap")
    expect(visit.page.get_by_label("Percent of the pool")).to_have_value("5")
    expect(visit.page.get_by_role("alert")).to_have_count(0)


def test_the_cut_is_put_by_touch(browser: Browser, service: Service) -> None:
    with visiting(browser, service.url, has_touch=True) as visit:
        visit.open("scores?task=mmlu", title="Scores")
        frame = visit.page.locator(".cut").bounding_box()
        assert frame is not None
        visit.page.touchscreen.tap(frame["x"] + frame["width"] / 2, frame["y"] + 60)
        now = float(visit.page.get_by_role("slider").get_attribute("aria-valuenow") or 0)
        assert now > 5
        check_cut(visit, service, round(10 * now))


def test_the_page_of_scores_says_and_changes_what_they_are(visit: Visit, service: Service) -> None:
    visit.open("scores?task=mmlu&dataset=tulu-sample&method=bm25", title="Scores")
    score, told = (
        visit.page.get_by_label("Score", exact=True),
        visit.page.get_by_role("region", name="Distribution").locator("dl"),
    )
    expect(visit.page.get_by_label("Pool", exact=True)).to_have_value("tulu-sample")
    expect(visit.page.get_by_label("Method")).to_have_value("bm25")
    expect(score).to_have_value("max")
    for part in ("pooltulu-sample", "methodwords in common (BM25)", "scorenearest validation row"):
        expect(told).to_contain_text(part)
    score.select_option("less")
    expect(told).to_contain_text("scorebest subtask mean (LESS)")
    axis = visit.page.locator(".axis")
    edges = answer(service, "/scores/distribution", task="mmlu", method="bm25", aggregate="less")["edges"]
    expect(axis).to_contain_text(f"best {edges[-1]:.2f}")
    visit.page.get_by_label("Method").select_option("random")
    expect(told).to_contain_text("methoddrawn at random")
    expect(score).to_have_count(0)


def test_missing_gradients_are_told_once_with_their_command(visit: Visit, service: Service) -> None:
    visit.page.goto(f"{visit.url}/dashboard/#/scores?task=mmlu&dataset=tulu-sample&dim=99")
    told = visit.page.get_by_role("alert")
    expect(told.locator("code")).to_have_text(re.compile("^gradstore gradients create --dataset .* --run .* --dim 99"))
    expect(told).not_to_contain_text("POST /gradients")
    visit.forgive("409")


def test_what_the_cut_takes_is_selected(visit: Visit, service: Service) -> None:
    visit.open("scores?task=mmlu&pct=7.5", title="Scores")
    visit.page.get_by_role("button", name="Select these rows").click()
    chosen = answer(service, "/select", task="mmlu", pct=0.075, limit=0)
    visit.heading(chosen["id"])
    rows = visit.page.get_by_role("table", name="Chosen rows of each origin").locator("tbody tr")
    shown = {row.locator("th").inner_text(): int(row.locator("td").nth(1).inner_text()) for row in rows.all()}
    assert {name: count for name, count in shown.items() if count} == chosen["origins"]


@pytest.fixture
def unscored(tmp_path: Path) -> Iterator[Service]:
    """A service over the store of the pictures that has no scores yet, and leaves the computing of them to the test."""
    store = shown(tmp_path)
    shutil.rmtree(store.settings.scores)
    store.catalog.close()
    with serving(tmp_path / "store") as running:
        running.backend.scorer.stop()
        yield running


def test_scores_that_cannot_be_computed_are_told_and_computed_again_only_where_that_is_wanted(
    browser: Browser, unscored: Service
) -> None:
    with visiting(browser, unscored.url) as visit:
        visit.page.route("**/scores/distribution?*", lambda route: send(route, "wait=5", "wait=0"))
        visit.page.goto(f"{visit.url}/dashboard/#/scores?task=mmlu")
        computing, told = visit.page.get_by_text("Computing scores: 0 of"), visit.page.get_by_role("alert")
        expect(computing).to_be_visible()
        claim = unscored.backend.jobs.claim("test", kinds=["scoring"])
        assert claim is not None
        assert unscored.backend.jobs.fail(claim, FULL, permanent=True)
        expect(told).to_contain_text(FULL.detail)
        assert answer(unscored, f"/jobs/{claim.job}")["status"] == "failed"
        visit.page.get_by_role("button", name="Try again").click()
        expect(computing).to_be_visible()
        unscored.backend.jobs.cancel(claim.job)
        expect(told).to_contain_text(f"{claim.job}, which computes these scores, was cancelled")
        visit.forgive("409")


# Selections ---------------------------------------------------------------------------------------------------------


def test_chosen_rows_are_shown_with_why_they_were_chosen(visit: Visit, service: Service) -> None:
    opened(visit, service, "selection")
    chosen = answer(service, "/select", task="mmlu", pct=0.05, limit=0)
    first = answer(service, f"/selections/{chosen['id']}/explanations", limit=1)["data"][0]
    shown = visit.page.locator(".row").first
    expect(shown).to_contain_text(first["turns"][0]["content"].splitlines()[0])
    expect(shown).to_contain_text(first["nearest"]["turns"][0]["content"])
    expect(shown).to_contain_text(f"influence {first['nearest']['influence']:.3f}")
    scores = {score["subtask"]: f"{score['score']:.3f}" for score in first["subtasks"]}
    rows = shown.get_by_role("table").locator("tbody tr")
    found = {row.locator("th").inner_text(): row.locator("td").last.inner_text() for row in rows.all()}
    assert found == {f"mmlu / {name}": score for name, score in scores.items()}


def test_chosen_rows_are_filtered_and_paged(visit: Visit, service: Service) -> None:
    opened(visit, service, "selection")
    chosen = answer(service, "/select", task="mmlu", pct=0.05, limit=1000)
    titles = visit.page.locator(".row h3")
    visit.page.get_by_role("button", name="Next").click()
    expect(titles).to_have_text([f"Rank {rank}" for rank in range(11, 21)])
    origin = next(iter(chosen["origins"]))
    visit.page.get_by_label("Origin", exact=True).select_option(origin)
    ranks = [row["rank"] for row in chosen["data"] if row["origin"] == origin][:10]
    expect(titles).to_have_text([f"Rank {rank}" for rank in ranks])
    visit.page.get_by_label("Text", exact=True).fill("nothing has this text")
    visit.page.get_by_role("button", name="Search").click()
    expect(visit.page.get_by_text("No chosen row is like this.")).to_be_visible()


def test_chosen_rows_are_saved_as_they_were_uploaded(visit: Visit, service: Service) -> None:
    opened(visit, service, "selection")
    with visit.page.expect_download() as download:
        visit.page.get_by_role("button", name="Download rows").click()
    chosen = answer(service, "/select", task="mmlu", pct=0.05, limit=0)
    expected = service.http.get(f"/selections/{chosen['id']}/content").content
    assert Path(download.value.path()).read_bytes() == expected
    assert download.value.suggested_filename == f"{chosen['id']}.jsonl"


@pytest.mark.parametrize(
    ("asked", "told"),
    [({"method": "random", "selection_seed": 7}, "random"), ({"method": "bm25", "task": "mmlu"}, "bm25")],
)
def test_rows_chosen_without_features_are_shown_as_they_are(
    visit: Visit, service: Service, asked: dict[str, Any], told: str
) -> None:
    chosen = answer(service, "/select", **asked, k=25, limit=25, wait=30)
    visit.open(f"selections/{chosen['id']}", title=chosen["id"])
    glance = visit.page.get_by_role("region", name="At a glance").locator("dl")
    expect(glance).to_contain_text(f"method{told}")
    expect(glance).to_contain_text("asked for25 rows")
    expect(glance).not_to_contain_text("features")
    titles = visit.page.locator(".row h3")
    expect(titles).to_have_text([f"Rank {rank}" for rank in range(1, 11)])
    for _ in range(2):
        visit.page.get_by_role("button", name="Next").click()
        expect(visit.page.locator(".loading")).to_have_count(0)
    expect(titles).to_have_text([f"Rank {rank}" for rank in range(21, 26)])
    expect(visit.page.get_by_role("button", name="Next")).to_be_disabled()
    last = chosen["data"][-1]
    row = answer(service, f"/datasets/{last['dataset']}/rows", after=last["row"], limit=1)["data"][0]
    expect(visit.page.locator(".row").last).to_contain_text(row["turns"][0]["content"].splitlines()[0])


def test_rows_drawn_to_match_are_as_many_as_those(visit: Visit, service: Service) -> None:
    model = answer(service, "/select", task="mmlu", pct=0.05, limit=0)
    drawn = answer(service, "/select", method="random", match=model["id"], limit=0)
    visit.open(f"selections/{drawn['id']}", title=drawn["id"])
    expect(visit.page.get_by_role("region", name="At a glance").locator("dl")).to_contain_text("as many as matched")


@pytest.mark.parametrize(
    ("name", "value"),
    [("method", "random"), ("converted_from", "none"), ("projection_id", "theirs"), ("selection_seed", "7")],
)
def test_what_a_link_says_about_scores_is_asked(visit: Visit, name: str, value: str) -> None:
    """The links of an ambiguous answer differ in what narrows scores."""
    with visit.page.expect_request(lambda request: "/scores/distribution" in request.url) as asked:
        visit.page.goto(f"{visit.url}/dashboard/#/scores?task=mmlu&{name}={value}")
    assert parse_qs(urlsplit(asked.value.url).query)[name] == [value]
    visit.page.wait_for_load_state("networkidle")
    visit.complaints.clear()  # what the browser writes of an answer that is none


# Overlap and training -----------------------------------------------------------------------------------------------


def test_the_overlap_of_tasks_is_a_table_of_the_apis_numbers(visit: Visit, service: Service) -> None:
    opened(visit, service, "overlap")
    found = answer(service, "/overlaps", task=["gsm8k", "bbh", "mmlu"], pct=0.05)
    by_pair = {frozenset(pair["tasks"]): pair for pair in found["pairs"]}
    ids = {name: answer(service, f"/tasks/{name}")["id"] for name in ("gsm8k", "bbh", "mmlu")}
    shared = visit.page.get_by_role("table", name="Shared rows of each pair of tasks")
    agreement = visit.page.get_by_role("table", name="Rank correlation of each pair of tasks")
    for one, other in (("gsm8k", "bbh"), ("bbh", "mmlu"), ("mmlu", "gsm8k")):
        pair = by_pair[frozenset((ids[one], ids[other]))]
        column = ["gsm8k", "bbh", "mmlu"].index(other)
        for table, text in ((shared, f"{pair['shared']} rows"), (agreement, f"{pair['rank_correlation']:.2f}")):
            row = table.locator("tbody tr").filter(has=visit.page.get_by_role("rowheader", name=one, exact=True))
            expect(row.locator("td").nth(column)).to_contain_text(text)
    visit.page.get_by_label("bbh").uncheck()
    expect(shared.locator("tbody tr")).to_have_count(2)
    visit.page.get_by_label("mmlu").uncheck()
    expect(visit.page.get_by_text("Choose two tasks or more.")).to_be_visible()


def test_a_comparison_is_pictures_and_tables_of_the_apis_numbers(visit: Visit, service: Service) -> None:
    opened(visit, service, "comparisons")
    visit.page.get_by_role("link", name="five ways").press("Enter")
    visit.heading("five ways")
    found = answer(service, "/comparisons/five%20ways")["result"]
    for task in found["tasks"]:
        name, rows = task["task_name"], [row for row in found["rows"] if row["task"] == task["task"]]
        lines = visit.page.get_by_role("table", name=f"Selections for {name}", exact=True).locator("tbody tr")
        expect(lines).to_have_count(len(rows))
        for line, row in zip(lines.all(), rows, strict=True):
            loss = row["loss"]["value"]
            expect(line).to_contain_text(row["contestant"])
            expect(line).to_contain_text(f"{loss:.2f}" if loss >= 1 else f"{loss:.3f}")
        shared = visit.page.get_by_role("table", name=f"Rows that each two selections for {name} share")
        pair = next(pair for pair in found["pairs"] if pair["task"] == task["task"])
        cell = shared.locator("tbody tr").nth(0).locator("td").nth(1)
        expect(cell).to_contain_text(f"{pair['shared']} rows")
        losses = visit.page.get_by_role("img", name=f"Loss on {name} after training on each selection")
        expect(losses.locator("circle")).to_have_count(len(rows))
    differences = visit.page.get_by_role("img", name="Difference of the loss from that of random")
    expect(differences.first.locator("rect")).to_have_count(len(rows) - 1)
    visit.page.get_by_role("link", name=found["rows"][0]["contestant"]).first.press("Enter")
    visit.heading(found["rows"][0]["selection"])


def test_a_comparison_at_work_says_how_far_it_is_until_it_is_cancelled(visit: Visit, service: Service) -> None:
    asked = {"dataset": "tulu-sample", "tasks": ["mmlu"], "k": 3, "contestants": [{"method": "bm25"}]}
    job = service.http.post("/comparisons", json=asked).json()
    visit.open(f"comparisons/{job['id']}", title=job["id"])
    expect(visit.page.get_by_text("Comparing: 0 of 1 parts")).to_be_visible()
    service.http.post(f"/jobs/{job['id']}/cancel")
    expect(visit.page.get_by_text("It was cancelled.")).to_be_visible()
    service.http.delete(f"/comparisons/{job['id']}")


def test_an_answer_that_comes_late_does_not_stand_for_a_newer_question(visit: Visit, service: Service) -> None:
    opened(visit, service, "overlap")
    rows = visit.page.get_by_role("table", name="Shared rows of each pair of tasks").locator("tbody tr")
    expect(rows).to_have_count(3)
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    visit.page.route("**/overlaps?*", hold)
    for tick in ("uncheck", "check"):
        with visit.page.expect_request("**/overlaps?*"):
            getattr(visit.page.get_by_label("bbh"), tick)()
    of_two, of_three = held
    of_three.continue_()
    expect(rows).to_have_count(3)
    send(of_two)
    visit.page.wait_for_timeout(500)
    expect(rows).to_have_count(3)


def attribute(service: Service, job: str) -> None:
    """Do an attribution as a worker would, with a made-up feature of the question."""
    backend = service.backend
    claim = backend.jobs.claim("test", kinds=["attribution"], job=job)
    assert claim is not None
    asked = AttributionRequest.model_validate(claim.request)
    random = np.random.default_rng(3)
    features = [QuestionFeature(random.normal(size=DIM).astype(np.float32), 1.25, 7) for _ in range(2)]
    data, searches = backend.attributions.search(asked, claim.plan, [Answered(features)], on_rows=lambda _: None)
    result = AttributionResult(
        recipe=claim.plan["recipe"], data=data, searches=searches, computed_rows=2, gradient_seconds=0.1, seconds=0.3
    )
    assert backend.jobs.succeed(claim, result=result.model_dump(mode="json"))


def test_a_typed_answer_is_attributed_to_examples(visit: Visit, service: Service) -> None:
    opened(visit, service, "question")
    visit.page.get_by_label("Prompt").fill("How many pieces of fruit are in three boxes of 31 apples and 12 pears?")
    visit.page.get_by_label("Answer of the model").fill("3 × 43 = 129. The answer is 129.")
    visit.page.get_by_label("Examples of each sign").fill("3")
    visit.page.get_by_role("button", name="Find examples").click()
    expect(visit.page.get_by_text("Waiting for a worker …")).to_be_visible()
    job = answer(service, "/attributions")["data"][0]["id"]
    attribute(service, job)
    visit.page.get_by_role("heading", name="Speak against it").wait_for()
    found = answer(service, f"/attributions/{job}")["result"]["data"][0]
    for title, rows in (("Speak for it", found["most"]), ("Speak against it", found["least"])):
        shown = visit.page.get_by_role("region", name=title).locator(".row")
        expect(shown).to_have_count(3)
        for place, row in enumerate(rows):
            expect(shown.nth(place)).to_contain_text(f"influence {row['score']:.3f}")
            expect(shown.nth(place)).to_contain_text(f"row {row['row']}")
            expect(shown.nth(place)).to_contain_text(row["text"].splitlines()[0])
    assert not visit.faults()
    visit.picture("attribution")
    opened(visit, service, "question")
    expect(visit.page.get_by_role("table").locator("tbody tr")).to_contain_text("How many pieces of fruit")


@pytest.fixture
def two_pools(tmp_path: Path) -> Iterator[Service]:
    """A service with two pools that have features."""
    store = Store.at(tmp_path / "store")
    store.checkpoint(0)
    store.catalog.add_run(id="run_1", checkpoints=["ck_0"], name="warmup")
    for number, name in enumerate(["tulu", "other"]):
        store.pool(10 + number, name=name)
        store.features.start(request(dataset=name, run="warmup", dims=[DIM]))
        store.work(numbers)
    store.catalog.close()
    with serving(tmp_path / "store") as running:
        yield running


def test_what_was_typed_stays_while_the_pool_is_chosen_by_its_name(browser: Browser, two_pools: Service) -> None:
    with visiting(browser, two_pools.url) as visit:
        visit.open("attributions", title="Attribution")
        prompt, said = visit.page.get_by_label("Prompt"), visit.page.get_by_label("Answer of the model")
        prompt.fill("How many fish?")
        said.fill("Two.")
        visit.page.get_by_role("button", name="Find examples").click()
        told = visit.page.get_by_role("alert")
        expect(told).to_contain_text("2 sets of features fit: say which one is meant.")
        expect(told).not_to_contain_text("http://")
        expect(told.get_by_role("listitem")).to_have_text(["dataset tulu", "dataset other"])
        told.get_by_role("link", name="dataset other").click()
        expect(visit.page.get_by_label("Pool")).to_have_value("other")
        expect(prompt).to_have_value("How many fish?")
        expect(said).to_have_value("Two.")
        visit.page.get_by_role("button", name="Find examples").click()
        expect(visit.page.get_by_text("Waiting for a worker …")).to_be_visible()
        visit.forgive("409")


def test_an_attribution_that_cannot_be_followed_is_told_and_tried_again(visit: Visit, service: Service) -> None:
    asked = {"rows": [{"prompt": "How many fish?", "completion": "Two."}], "k": 3}
    job = service.http.post("/attributions", json=asked).json()
    told, again = visit.page.get_by_role("alert"), visit.page.get_by_role("button", name="Try again", exact=True)
    with refused(visit, "**/events"):
        visit.page.goto(f"{visit.url}/dashboard/#/attributions/{job['id']}")
        expect(told).to_contain_text(FULL.detail)
        with visit.page.expect_response("**/events"):
            again.click()
        expect(told).to_contain_text(FULL.detail)
    again.click()
    expect(visit.page.get_by_text("Waiting for a worker …")).to_be_visible()
    service.http.post(f"/jobs/{job['id']}/cancel")


def test_trainings_and_evaluations_stand_side_by_side(visit: Visit, service: Service) -> None:
    opened(visit, service, "training")
    curves = visit.page.locator(".curves path")
    finetunes = answer(service, "/finetunes")["data"]
    expect(curves).to_have_count(len(finetunes))
    visit.page.get_by_role("checkbox", name="warm-up on 5 %").uncheck()
    expect(curves).to_have_count(len(finetunes) - 1)
    metric = visit.page.get_by_role("table", name="Metric of each model")
    heads = metric.locator("thead th").all_inner_texts()
    assert heads == ["task", "base", "cat of arc, gsm8k", "random 5 %", "selected 5 %"]
    expect(metric.locator("tbody tr").first.locator("td").nth(1)).to_contain_text("2 unparsed")
    for job in answer(service, "/evaluations")["data"]:
        if job["name"] is None:
            continue
        tuned = next(row for row in job["result"]["rows"] if row["model"] == "tuned" and row["subtask"] is None)
        cell = metric.locator("tbody tr").first.locator("td").nth(heads.index(job["name"]) - 1)
        expect(cell).to_contain_text(f"{tuned['value']:.3f}")


# What is learnt, estimated and placed -------------------------------------------------------------------------------


def lines_of(visit: Visit, table: str) -> Locator:
    """The lines of a table, by its name."""
    return visit.page.get_by_role("table", name=table, exact=True).locator("tbody tr")


def shown_number(number: float | None) -> str:
    """A number as the pages write it: three digits that count, and halves away from zero as JavaScript rounds them."""
    if number is None:
        return "–"
    size = abs(number)
    last = Decimal(1).scaleb(-(3 if size < 1 else 2 if size < 10 else 1))
    return str(Decimal(number).quantize(last, ROUND_HALF_UP))


def test_a_choice_of_adapters_is_the_apis_ranks_sets_and_shots(visit: Visit, service: Service) -> None:
    opened(visit, service, "adapters")
    bank = answer(service, "/adapters")["data"]
    expect(lines_of(visit, "Adapters, the newest first")).to_have_count(len(bank))
    visit.page.get_by_role("link", name="two of six").press("Enter")
    visit.heading("two of six")
    result = answer(service, "/adapters/choices/two%20of%20six")["result"]
    name_of = {one["adapter"]: one["name"] for one in result["adapters"]}
    ranked = lines_of(visit, "Adapters, the best first")
    for line, one in zip(ranked.all(), result["adapters"], strict=True):
        expect(line.locator("th")).to_have_text(f"✓ {one['name']}" if one["chosen"] else one["name"])
        expect(line.locator("td").first).to_have_text(shown_number(one["perplexity"]))
        ranks = (one["perplexity_rank"], one["accuracy_rank"])
        for place, rank in enumerate(ranks, start=2):
            expect(line.locator("td").nth(place)).to_have_text(str(rank))
    picture = visit.page.get_by_role("img", name="Accuracy by perplexity of every adapter")
    expect(picture.locator("circle")).to_have_count(len(result["adapters"]))
    found = answer(service, "/adapters/choices/two%20of%20six/sets")["data"]
    sets = lines_of(visit, "Sets of candidates, the best first")
    expect(sets).to_have_count(result["sets"])
    for number, (line, each) in enumerate(zip(sets.all(), found, strict=True)):
        members = ", ".join(name_of[member] for member in each["members"])
        expect(line.locator("th")).to_have_text(members if number else f"✓ {members}")
        expect(line.locator("td").last).to_have_text(str(each["total"]))
    expect(lines_of(visit, "Shots in the order of the task's rows")).to_have_count(result["shots"])


def test_a_predictor_is_pictures_and_tables_of_the_apis_numbers(visit: Visit, service: Service) -> None:
    opened(visit, service, "predictors")
    visit.page.get_by_role("link", name="from a tenth").press("Enter")
    visit.heading("from a tenth")
    result = answer(service, "/predictors/from%20a%20tenth")["result"]
    glance = visit.page.get_by_role("region", name="At a glance")
    for name, number in (("R²", result["report"]["r2"]), ("Spearman", result["report"]["spearman"])):
        expect(glance.locator("dl > div").filter(has_text=name)).to_have_text(f"{name}{shown_number(number)}")
    recalls = lines_of(visit, "Recall by budget")
    expect(recalls).to_have_count(len(result["report"]["recalls"]))
    for line, each in zip(recalls.all(), result["report"]["recalls"], strict=True):
        expect(line.locator("th, td").last).to_have_text(f"{100 * each['recall']:.1f} %".replace(".0 %", " %"))
    curves = visit.page.get_by_role("img", name="Recall of the true best 5 % by budget")
    expect(curves.locator("path")).to_have_count(2 + len(result["controls"]))
    calibration = visit.page.get_by_role("img", name="Mean truth by mean prediction")
    expect(calibration.locator("circle")).to_have_count(len(result["calibration"]))
    beside = lines_of(visit, "This predictor and its controls")
    for line, each in zip(beside.all()[1:], result["controls"], strict=True):
        expect(line.locator("td").first).to_have_text(shown_number(each["report"]["r2"]))
    visit.page.get_by_role("link", name="tulu-sample").press("Enter")
    visit.heading("tulu-sample")


def test_levels_are_told_with_their_confusion(visit: Visit, service: Service) -> None:
    opened(visit, service, "levels")
    counts = answer(service, "/predictors/three%20levels")["result"]["report"]["confusion"]
    lines = lines_of(visit, "Rows of each true level by predicted level")
    expect(lines.locator("strong")).to_have_text([str(count) for line in counts for count in line])
    expect(lines.first).to_contain_text(f"{100 * counts[0][0] / sum(counts[0]):.1f} %")


def test_a_cascade_says_what_it_computed_in_which_stage(visit: Visit, service: Service) -> None:
    opened(visit, service, "cascade")
    result = answer(service, "/cascades/a%20fifth")["result"]
    for line, stage in zip(lines_of(visit, "Stages").all(), result["stages"], strict=True):
        expect(line).to_contain_text(str(stage["rows"]))
        expect(line.get_by_role("link", name=stage["gradients"])).to_be_visible()
        expect(line).to_contain_text(shown_number(stage["true"]))
    expect(visit.page.get_by_role("img", name="random sample 64")).to_be_visible()
    expect(visit.page.get_by_role("img", name="not computed 512")).to_be_visible()


def test_estimates_list_groups_the_best_first_and_subsets_in_pages(visit: Visit, service: Service) -> None:
    opened(visit, service, "estimates")
    visit.page.get_by_role("link", name="sixty parts").first.press("Enter")
    visit.heading("sixty parts")
    result = answer(service, "/estimates/sixty%20parts")["result"]
    best = sorted(result["groups"], key=lambda group: -group["score"])
    groups = lines_of(visit, "Groups, the best first")
    expect(groups.locator("th")).to_have_text([group["label"] for group in best])
    expect(groups.first).to_contain_text(shown_number(best[0]["mean"]))
    expect(visit.page.get_by_role("region", name="At a glance")).to_contain_text(
        f"{shown_number(result['surrogate']['spearman'])} on {result['surrogate']['held_out']} held-out subsets"
    )
    subsets = answer(service, "/estimates/sixty%20parts/subsets", limit=60)
    whole = next(number for number, target in enumerate(subsets["targets"]) if target["subtask"] is None)
    lines = lines_of(visit, "Subsets in their order")
    for count in (20, 40, 60):
        expect(lines).to_have_count(count)
        each = subsets["data"][count - 1]
        expect(lines.last).to_contain_text(shown_number(each["estimates"][whole]["loss"]))
        if count < 60:
            visit.page.get_by_role("button", name="Show more").click()
    expect(visit.page.get_by_role("button", name="Show more")).to_be_hidden()


def test_a_search_says_which_groups_it_chose(visit: Visit, service: Service) -> None:
    opened(visit, service, "search")
    result = answer(service, "/estimates/step%20by%20step")["result"]
    labels = [result["groups"][group]["label"] for group in result["chosen"]]
    chosen = visit.page.get_by_role("region", name="Chosen groups")
    expect(chosen.locator("strong")).to_have_text(labels)
    expect(chosen).to_contain_text(f"estimated loss {shown_number(result['chosen_value'])}")
    assert set(lines_of(visit, "Groups, the best first").locator(".chosen").all_inner_texts()) == {
        f"✓ {label}" for label in labels
    }
    chosen.get_by_text("12 steps").click()
    expect(lines_of(visit, "Steps of the search").filter(has_text="✓ kept")).to_have_count(len(labels))


def test_a_validation_sets_estimates_against_trainings(visit: Visit, service: Service) -> None:
    opened(visit, service, "estimates")
    visit.page.get_by_role("link", name="ten trainings").press("Enter")
    visit.heading("ten trainings")
    result = answer(service, "/estimates/validations/ten%20trainings")["result"]
    glance = visit.page.get_by_role("region", name="At a glance")
    for text in (
        f"Spearman (95 %){shown_number(result['own']['spearman'])}",
        shown_number(result["own"]["relative_rss"]),
    ):
        expect(glance).to_contain_text(text)
    points = visit.page.get_by_role("img", name="Loss after training by estimated loss")
    expect(points.locator("circle")).to_have_count(2 * len(result["subsets"]))
    for line, each in zip(lines_of(visit, "Subsets that were trained on").all(), result["subsets"], strict=True):
        cells = [shown_number(each[name]) for name in ("estimate", "calibrated", "loss")]
        assert line.locator("td").all_inner_texts()[1:4] == cells
    visit.page.get_by_role("link", name="sixty parts").press("Enter")
    visit.heading("sixty parts")


def test_a_projector_tells_each_capability_and_counts_those_of_a_selection(visit: Visit, service: Service) -> None:
    chosen = [answer(service, "/select", task=task, pct=0.1, limit=0)["id"] for task in ("mmlu", "gsm8k")]
    opened(visit, service, "projectors")
    visit.page.get_by_role("link", name="origins told").press("Enter")
    visit.heading("origins told")
    result = answer(service, "/projectors/origins%20told")["result"]
    lines = lines_of(visit, "Precision, recall and F1 of each capability")
    for line, each in zip(lines.all(), result["capabilities"], strict=True):
        expect(line.locator("th")).to_have_text(each["name"])
        numbers = [shown_number(each[name]) for name in ("precision", "recall", "f1")]
        expect(line.locator(".cell")).to_have_text(numbers)
    gram = visit.page.get_by_role("img", name="Gram error by epoch")
    expect(gram.locator("path")).to_have_count(1)
    for selection in chosen:
        visit.page.get_by_label("Selection", exact=True).select_option(selection)
        found = answer(service, "/projectors/origins%20told/histogram", selection=selection)
        counted = lines_of(visit, "Capabilities of the pool and of the selection")
        for number, each in enumerate(found["capabilities"]):
            expect(counted.nth(number)).to_contain_text(f"{each['selected']} (")
            expect(counted.nth(number)).to_contain_text(f"{shown_number(each['enrichment'])} ×")
    assert f"selection={chosen[-1]}" in visit.page.url


def test_a_projector_at_work_shows_the_epochs_that_have_ended(visit: Visit, service: Service) -> None:
    trained = answer(service, "/projectors/origins%20told")
    job = service.http.post("/projectors", json={**trained["request"], "seed": 7, "name": "at work"}).json()
    visit.open(f"projectors/{job['id']}", title="at work")
    claim = service.backend.jobs.claim("test", kinds=["projector"], job=job["id"])
    assert claim is not None
    epochs = service.backend.projectors.epochs("origins told")
    for done in (1, 2):
        assert service.backend.projectors.note(claim, epochs[:done])
        assert service.backend.jobs.renew(claim, done=done)
        expect(visit.page.get_by_role("status").filter(has_text=f"Training: {done} of")).to_be_visible()
        visit.page.get_by_role("region", name="Training so far").get_by_text(f"{done} epoch", exact=False).click()
        expect(lines_of(visit, "Epochs")).to_have_count(done)
        last = lines_of(visit, "Epochs").last.locator("td").all_text_contents()
        assert shown_number(epochs[done - 1].loss) in last
    service.http.post(f"/jobs/{job['id']}/cancel")
    expect(visit.page.get_by_text("It was cancelled.")).to_be_visible()
    expect(lines_of(visit, "Epochs")).to_have_count(0)


def test_a_streams_numbers_are_saved_from_its_page(visit: Visit, service: Service, tmp_path: Path) -> None:
    opened(visit, service, "streams")
    visit.page.get_by_role("link", name="of the pool").press("Enter")
    visit.heading("of the pool")
    expect(visit.page.get_by_role("region", name="At a glance")).to_contain_text(f"{ROWS - 2} of {ROWS}")
    visit.page.get_by_text("2 absent rows").click()
    expect(lines_of(visit, "Absent rows").locator("th")).to_have_text(["7", "8"])
    for ending in ("npy", "safetensors"):
        with visit.page.expect_download() as download:
            visit.page.get_by_role("button", name=f"Download as {ending}").click()
        assert download.value.suggested_filename == f"of the pool.{ending}"
        download.value.save_as(tmp_path / "saved")
        sent = service.http.get("/streams/of%20the%20pool/content", params={"format": ending})
        assert (tmp_path / "saved").read_bytes() == sent.content


def test_an_annotation_counts_its_capabilities_and_lists_its_rows(visit: Visit, service: Service) -> None:
    opened(visit, service, "annotations")
    visit.page.get_by_role("link", name="origins", exact=True).press("Enter")
    visit.heading("origins")
    result = answer(service, "/annotations/origins")["result"]
    counted = lines_of(visit, "Rows that call for each capability")
    for line, each in zip(counted.all(), result["capabilities"], strict=True):
        expect(line.locator("th")).to_have_text(each["name"])
        expect(line.locator("td").nth(1)).to_have_text(str(each["rows"]))
    visit.page.get_by_role("button", name="Show more").click()
    rows = lines_of(visit, "Rows and their labels")
    expect(rows).to_have_count(40)
    last = answer(service, "/annotations/origins/rows", after=39, limit=1)["data"][0]
    expect(rows.last).to_have_text(f"39{last['id']}{last['categories'][0]}")
    visit.page.get_by_role("link", name="what they are").press("Enter")
    visit.heading(result["taxonomy"])
    opened(visit, service, "taxonomy")
    capabilities = answer(service, "/taxonomies/cods")["capabilities"]
    expect(lines_of(visit, "Capabilities in their order").locator("td")).to_have_text(
        [each["definition"] for each in capabilities]
    )


def test_a_jobs_page_leads_to_what_it_made(visit: Visit, service: Service) -> None:
    opened(visit, service, "projector")
    visit.page.get_by_role("link", name="request and progress").press("Enter")
    visit.page.get_by_role("link", name="Look at it").press("Enter")
    visit.heading("origins told")
    expect(visit.page).to_have_url(re.compile("#/projectors/"))


# Many rows ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("large")
    large(folder, LARGE).catalog.close()
    with serving(folder / "store") as running:
        yield running


@pytest.fixture
def large_visit(browser: Browser, large_service: Service) -> Iterator[Visit]:
    """A visit of the large store: no page may fetch more than a megabyte, or make more than 3,000 elements."""
    with visiting(browser, large_service.url) as found:
        bodies: list[int] = []
        found.page.on("response", lambda response: bodies.append(int(response.headers.get("content-length", 0))))
        yield found
        assert sum(bodies) < 1_000_000
        assert found.page.evaluate("document.querySelectorAll('*').length") < 3_000


def test_two_hundred_thousand_rows_are_read_a_page_at_a_time(large_visit: Visit) -> None:
    large_visit.open("datasets", title="Datasets")
    large_visit.page.get_by_role("link", name="large").click()
    large_visit.heading("large")
    large_visit.page.get_by_role("heading", name="Row 9").wait_for()
    large_visit.page.get_by_label("Go to row").fill("199999")
    large_visit.page.get_by_role("button", name="Go", exact=True).click()
    expect(large_visit.page.locator(".row")).to_have_count(1)
    expect(large_visit.page.locator(".row")).to_contain_text("question 199999")
    large_visit.page.get_by_label("Text", exact=True).fill("question 45000")
    large_visit.page.get_by_role("button", name="Search").click()
    expect(large_visit.page.locator(".row h3")).to_have_text(["Row 45,000"])


def test_two_hundred_thousand_scores_are_cut_and_explained(large_visit: Visit, large_service: Service) -> None:
    large_visit.open("scores?task=mmlu&pct=0.1", title="Scores")
    slider = large_visit.page.get_by_role("slider")
    expect(slider).to_have_attribute("aria-valuetext", re.compile("^0.1 %: 200 rows"))
    slider.press("PageUp")
    expect(slider).to_have_attribute("aria-valuetext", re.compile("^1.1 %: 2,200 rows"))
    assert sum(origins_taken(large_visit).values()) == 2_200
    large_visit.page.get_by_label("Percent of the pool").fill("10")
    large_visit.page.get_by_label("Percent of the pool").press("Enter")
    expect(slider).to_have_attribute("aria-valuetext", re.compile("^10 %: 20,000 rows"))
    large_visit.page.get_by_role("button", name="Select these rows").click()
    large_visit.page.get_by_role("heading", name="Rank 10", exact=True).wait_for()
    large_visit.page.get_by_role("button", name="Next").click()
    large_visit.page.get_by_role("heading", name="Rank 20", exact=True).wait_for()
    expect(large_visit.page.get_by_text("ranks 11 to 20 of 20,000")).to_be_visible()
