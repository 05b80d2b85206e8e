"""The page in a real browser: it writes, stops, closes doors, follows a training, and asks nobody else."""

import json
import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn

from khanhllm.runs.run import open_run
from khanhllm.schema import MachineConfig
from khanhllm.serve import house as house_module
from khanhllm.serve import listen
from khanhllm.serve.house import House
from khanhllm.serve.server import Server
from khanhllm.training import tensor_files

playwright = pytest.importorskip(
    "playwright.sync_api", reason="no browser can be driven: pip install 'khanhllm[browser]'"
)
expect = playwright.expect
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BROWSER, reason="no Chromium here: apt-get install chromium")]
GOLDEN = Path(__file__).parents[1] / "golden" / "modern"
VIEWS = ("write", "experts", "one", "training", "compare")
WAIT = 30_000
"""milliseconds; only a failing test waits so long"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        expect.set_options(timeout=WAIT)
        opened = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def run(tmp_path):
    """A run whose name, messages and samples are what a stranger may write."""
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(GOLDEN, folder)
    (folder / "training_log.csv").write_text("step,tokens,loss,val_ce,val_bpb\n" + rows(1, 11))
    (folder / "experts.csv").write_text("step,layer,share_0,share_1,share_2,share_3\n5,1,0.1,0.2,0.3,0.4\n")
    (folder / "messages.txt").write_text("2026-01-01 10:00:00  saved <b>bold</b><script>alert(2)</script>\n")
    (folder / "samples.txt").write_text("--- step 5\n<i>once</i>\n--- step 10\ntwice\n")
    return folder


def rows(first, last):
    return "".join(
        f"{step},{64 * step},{9 - step / 100},{5 if step % 5 == 0 else ''},\n" for step in range(first, last)
    )


class Visits:
    """Opens an address in fresh browsers, and writes down what goes wrong there and who else is asked."""

    def __init__(self, browser, address):
        self.browser, self.address, self.faults, self.contexts = browser, address, [], []

    def __call__(self, where="", refused=(), **settings):
        context = self.browser.new_context(**settings)
        context.set_default_timeout(WAIT)
        self.contexts.append(context)
        page = context.new_page()
        page.on("dialog", lambda dialog: (self.faults.append(dialog.message), dialog.dismiss()))
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith(self.address) or self.faults.append(f"asked {asked.url}"))

        def heard(message):
            known = any(f"status of {code}" in message.text for code in refused)
            if message.type in ("error", "warning") and not known:
                self.faults.append(message.text)

        page.on("console", heard)
        page.goto(self.address + where)
        return page


@pytest.fixture
def site(run, browser, monkeypatch):
    """A function that serves the run on a port of its own: its house, and visits of it."""
    monkeypatch.setattr(house_module, "SECONDS", 0.05)

    def load():
        return Server(open_run(run, MachineConfig(device="cpu", threads=1)), run.name, rows=2)

    @contextmanager
    def serving(*others, server=True, key=""):
        house = House([run, *others], load, load() if server else None)
        bound = listen.listen("127.0.0.1", 0)
        config = uvicorn.Config(house.guarded(key=key), http=listen.Protocol, ws="none", log_config=None, lifespan="on")
        listening = uvicorn.Server(config)
        thread = threading.Thread(target=listening.run, args=([bound],), daemon=True)
        thread.start()
        visit = Visits(browser, f"http://127.0.0.1:{bound.getsockname()[1]}/")
        try:
            yield house, visit
        finally:
            for context in visit.contexts:
                context.close()
            listening.should_exit = True
            thread.join(60)
        assert not visit.faults

    return serving


class Gate:
    """Lets an engine write only so many tokens as are released."""

    def __init__(self, engine):
        self.left, self.write = threading.Semaphore(0), engine._write
        engine._write = self

    def __call__(self, rows):
        self.left.acquire(timeout=60)
        self.write(rows)


def button(place, name):
    return place.get_by_role("button", name=name, exact=True)


def test_it_writes_and_says_why_it_ended(site, run):
    with site() as (_, visit):
        page = visit("#write")
        view = page.locator("#view-write")
        prompt = "<script>alert(3)</script>"
        view.get_by_label("Text to begin with").fill(prompt)
        view.get_by_text("Settings").click()
        view.get_by_label("Tokens", exact=True).fill("5")
        button(view, "Write").click()
        expect(view.locator(".status")).to_have_text("Ended after 5 tokens: as many as it may write.")
        text = open_run(run).generate(prompt, tokens=5, seed=1, temperature=0.8)[0]
        assert page.locator("#text").text_content() == prompt + text.replace("\r\n", "\n").replace("\r", "\n")
        expect(page.locator("#run")).to_contain_text(run.name)
        expect(page.locator("img, #text *:not(span)")).to_have_count(0)


def teach(run):
    config = (run / "config.toml").read_text("utf-8")
    (run / "config.toml").write_text(config.replace("[train]\n", '[train]\ntargets = "answers"\n'), "utf-8")


def test_it_talks_if_the_run_was_taught_to(site, run):
    teach(run)
    with site() as (_, visit):
        page = visit(refused=(400,))
        view, said = page.locator("#view-write"), page.locator("#talk li")
        view.get_by_text("Settings").click()
        view.get_by_label("Tokens", exact=True).fill("3")
        for nth, question in enumerate(("a", "<b>b</b>")):
            view.get_by_label("Your message").fill(question)
            view.get_by_label("Your message").press("Enter")
            expect(said).to_have_count(2 * nth + 2)
            expect(said.nth(2 * nth)).to_have_text(question)
            expect(said.nth(2 * nth + 1)).not_to_be_empty()
            expect(button(view, "Stop")).to_be_disabled()
        view.get_by_label("Tokens", exact=True).fill("300")
        view.get_by_label("Temperature").fill("0")
        view.get_by_label("Your message").fill("x" * 20)
        view.get_by_label("Your message").press("Enter")
        expect(said).to_have_count(6)
        expect(view.locator(".status")).to_contain_text("no longer sees your first messages")
        expect(view.locator(".status")).to_contain_text("Ended: the model sees no more at once.")
        view.get_by_label("Your message").fill("too long " * 40)
        button(view, "Send").click()
        expect(view.locator(".status")).to_contain_text("tokens, the model sees")
        expect(said).to_have_count(6)
        view.get_by_text("Continue a text").click()
        button(view, "Write").click()
        expect(view.locator(".status")).to_contain_text("Ended after")


def test_who_does_not_wait_for_an_answer_breaks_no_conversation(site, run):
    """A question sent while an answer came once stood before that answer, and the server refused all that followed."""
    teach(run)
    with site() as (house, visit):
        gate, asked = Gate(house.server.engine), []
        page = visit("#write")
        page.on("request", lambda sent: "/chat/" in sent.url and asked.append(sent.post_data_json["messages"]))
        view, said = page.locator("#view-write"), page.locator("#talk li")
        message = view.get_by_label("Your message")
        message.fill("a")
        message.press("Enter")
        gate.left.release(2)
        expect(said.nth(1)).not_to_be_empty()
        message.fill("b")
        message.press("Enter")
        expect(said).to_have_count(4)
        assert [one["role"] for one in asked[-1]] == ["user", "assistant", "user"]
        button(view, "Begin anew").click()
        gate.left.release(1000)
        message.fill("c")
        message.press("Enter")
        expect(said).to_have_count(2)
        expect(said.nth(1)).not_to_be_empty()
        assert asked[-1] == [{"role": "user", "content": "c"}]


def test_stop_ends_the_work_of_the_server(site):
    with site() as (house, visit):
        engine = house.server.engine
        gate = Gate(engine)
        page = visit("#write")
        view = page.locator("#view-write")
        expect(button(view, "Stop")).to_be_disabled()
        button(view, "Write").click()
        gate.left.release(3)
        expect(page.locator("#text .new")).not_to_be_empty()
        button(view, "Stop").click()
        expect(view.locator(".status")).to_have_text("Ended: you stopped it.")
        gate.left.release(1000)
        end = time.monotonic() + 60
        while engine.busy:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert engine.counts["written"] < 20


def test_a_closed_door_changes_text_and_bits_of_the_second_text_alone(site):
    with site() as (_, visit):
        page = visit("#experts")
        view = page.locator("#view-experts")
        view.get_by_label("Text to begin with").fill("import")
        view.get_by_text("Settings").click()
        view.get_by_label("Tokens", exact=True).fill("12")
        button(view, "Write").click()
        left, right = (
            view.get_by_role("list", name="The text with all experts"),
            view.get_by_role("list", name="closed doors"),
        )
        expect(left.locator(".chip.e0, .chip.e1, .chip.e2, .chip.e3").nth(8)).to_be_visible()
        expect(view.locator(".status")).to_have_text("")
        first = [chip.get_attribute("aria-label") for chip in left.locator(".chip").all()]
        busiest = max(
            range(4), key=lambda e: sum(f"experts {e} " in label or label.endswith(f"and {e}") for label in first)
        )
        door = view.locator(f"[data-door='2:{busiest}']")
        expect(door).to_have_attribute("aria-pressed", "false")
        door.click()
        expect(door).to_have_attribute("aria-pressed", "true")
        lesson = view.locator("#lesson")
        expect(lesson).to_contain_text("bits a token instead of")
        expect(lesson).to_contain_text("Writing with the same seed")
        again = [chip.get_attribute("aria-label") for chip in right.locator(".chip").all()]
        assert again != first and len(again) > 2
        for label in again:
            assert str(busiest) not in label.rpartition(": ")[2].partition(",")[0]
        assert [chip.get_attribute("aria-label") for chip in left.locator(".chip").all()] == first
        view.get_by_text("read the open text").click()
        read = right.locator(".chip")
        expect(read).to_have_count(len(first))
        same = [label.rpartition(": ")[0] for label in first]
        assert [chip.get_attribute("aria-label").rpartition(": ")[0] for chip in read.all()] == same
        view.locator("[data-door='2:all']").click()
        expect(lesson).to_contain_text("the whole mixture of layer 2")
        expect(right.locator(".chip.none").nth(3)).to_be_visible()
        view.get_by_text("open all doors").click()
        expect(lesson).to_be_empty()
        expect(right).to_be_hidden()


def write(view, prompt, tokens):
    view.get_by_label("Text to begin with").fill(prompt)
    view.get_by_label("Tokens", exact=True).fill(str(tokens))
    button(view, "Write").click()
    left = view.get_by_role("list", name="The text with all experts")
    expect(left.locator(".chip:not(.given)").first).to_be_visible()
    expect(view.locator(".status")).to_have_text("")
    return left


def test_the_second_text_begins_as_the_first_whatever_the_fields_say_by_now(site):
    with site() as (_, visit):
        view = visit("#experts").locator("#view-experts")
        view.get_by_text("Settings").click()
        left = write(view, "import", 6)
        view.get_by_label("Text to begin with").fill("something else")
        view.get_by_label("Tokens", exact=True).fill("1")
        view.locator("[data-door='2:0']").click()
        expect(view.locator("#lesson")).to_contain_text("Writing with the same seed")
        right = view.get_by_role("list", name="closed doors")
        given, again = (box.locator(".chip.given .token").all_text_contents() for box in (left, right))
        assert given == again and "".join(given[1:]) == "import"
        assert right.locator(".chip").count() == left.locator(".chip").count()


def test_what_was_written_is_told_from_the_prompt_also_if_all_of_it_comes_at_once(site):
    def at_once(route):
        body = route.request.post_data_json
        answer = route.fetch(post_data={**body, "stream": False}).text()
        route.fulfill(body=f"data: {answer}\n\ndata: [DONE]\n\n", content_type="text/event-stream")

    with site() as (house, visit):
        page = visit("#experts")
        page.route("**/v1/completions", at_once)
        view = page.locator("#view-experts")
        view.get_by_text("Settings").click()
        left = write(view, "import os", 6)
        given = left.locator(".chip.given").count()
        assert given == 1 + len(house.server.tokenizer.encode("import os"))
        assert left.locator(".chip").count() == given + 6


def test_doors_show_what_was_measured_on_these_weights_alone(site, run):
    checkpoint = max(run.glob("checkpoints/step-*"))
    worth = {"share": 0.25, "error": 0.01}
    layers = [{"layer": 2, "experts": [], "off": worth}]
    found = {"version": 1, "step": 10, "checkpoint": tensor_files.identity(checkpoint), "data": "x", "tokens": 9}
    found |= {"bits_per_byte": 1.5, "experts_per_token": 2, "layers": layers}

    def place(found):
        (run / "aside").write_text(json.dumps(found))
        (run / "aside").replace(run / "experts.json")

    with site() as (_, visit):
        door = visit("#experts").locator("[data-door='2:all'] small")
        place(found)
        expect(door).to_have_text("+25.0 %")
        place(found | {"checkpoint": "those of another step"})
        expect(door).to_be_empty()


def test_a_token_tells_its_way_to_the_keyboard_too(site):
    with site() as (_, visit):
        page = visit("#experts")
        view = page.locator("#view-experts")
        prompt = view.get_by_label("Text to begin with")
        prompt.fill("import os")
        prompt.press("Tab")
        expect(button(view, "Write")).to_be_focused()
        page.keyboard.press("Enter")
        expect(view.locator(".chip.e0, .chip.e1, .chip.e2, .chip.e3").nth(5)).to_be_visible()
        expect(view.locator(".status")).to_have_text("")
        door = view.locator("[data-door='1:2']")
        door.focus()
        page.keyboard.press("Enter")
        expect(door).to_have_attribute("aria-pressed", "true")
        page.keyboard.press("Space")
        expect(door).to_have_attribute("aria-pressed", "false")
        for _ in range(40):
            page.keyboard.press("Tab")
            if view.locator(".chip").first.evaluate("node => node === document.activeElement"):
                break
        expect(view.locator(".chip").first).to_be_focused()
        page.keyboard.press("ArrowRight")
        expect(view.locator(".chip").nth(1)).to_be_focused()
        expect(view.locator(".details")).to_contain_text("probability")
        expect(view.locator(".details")).to_contain_text("Layer 1")


def test_it_follows_a_log_that_grows_and_is_cut_back(site, run):
    log = run / "training_log.csv"
    with site() as (_, visit):
        page = visit("#training")
        facts, loss = page.locator("#facts"), page.locator("#view-training svg").first
        expect(facts).to_contain_text("Step10 of")
        expect(loss).to_have_attribute(
            "aria-label",
            "Loss, nats per token: training begins at 8.99, is 8.9 now, at least 8.9; "
            "validation begins at 5, is 5 now, at least 5. Arrow keys read values.",
        )
        whole = log.read_text()
        log.write_text(whole + rows(11, 31) + "31,19")
        expect(facts).to_contain_text("Step30 of")
        log.write_text(whole)
        expect(facts).to_contain_text("Step10 of")
        with (run / "messages.txt").open("a") as file:
            file.write("2026-01-01 11:00:00  went back to step 10\n")
        expect(page.locator(".messages li")).to_have_count(2)
        expect(page.locator(".messages li").first).to_contain_text("saved <b>bold</b><script>alert(2)</script>")
        expect(page.locator(".samples pre").first).to_have_text("twice")
        loss.focus()
        page.keyboard.press("End")
        expect(page.locator("#view-training .read").first).to_have_text("step 10: training 8.9, validation 5")
        expect(page.locator("#view-training canvas").first).to_have_attribute(
            "aria-label",
            "Load of layer 1, step 5: most to expert 3, 40 %; least to expert 0, 10 %. Arrow keys read values.",
        )


def test_a_longer_training_and_a_best_validation_are_told_as_they_are(site, run, tmp_path):
    other, kept = tmp_path / "other", run / "config.toml"
    shutil.copytree(run, other)
    lines = (f"{step},{step},5,5,{1.5 if step == 700 else 2}\n" for step in range(1, 2001))
    (other / "training_log.csv").write_text("step,tokens,loss,val_ce,val_bpb\n" + "".join(lines))
    with site(other) as (_, visit):
        page = visit("#training")
        expect(page.locator("#facts")).to_contain_text("Step10 of 10")
        kept.write_text(kept.read_text("utf-8").replace("\nsteps = 10\n", "\nsteps = 20\n"), "utf-8")
        expect(page.locator("#facts")).to_contain_text("Step10 of 20")
        page.get_by_role("link", name="Compare").click()
        expect(page.locator("#compared tr", has_text="Bits per byte, best")).to_contain_text("1.5")
        page.locator("#view-compare").get_by_text("tokens read", exact=True).click()
        page.locator("#view-compare svg").first.focus()
        page.keyboard.press("End")
        expect(page.locator("#view-compare .read").first).to_contain_text("tokens 640: ")


def test_a_run_without_a_checkpoint_shows_its_training_and_then_writes(site, run, tmp_path):
    (run / "checkpoints").rename(tmp_path / "away")
    (run / "checkpoints").mkdir()
    with site(server=False) as (_, visit):
        page = visit(refused=(503,))
        expect(page.locator("#view-training")).to_contain_text("has no checkpoint yet")
        expect(page.locator("#facts")).to_contain_text("Step10 of")
        page.get_by_role("link", name="Write").click()
        button(page.locator("#view-write"), "Write").click()
        expect(page.locator("#view-write .status")).to_contain_text("has no checkpoint yet")
        for path in (tmp_path / "away").iterdir():
            shutil.copytree(path, run / "checkpoints" / path.name)
        expect(page.locator("#view-write .note")).to_be_hidden()
        button(page.locator("#view-write"), "Write").click()
        expect(page.locator("#view-write .status")).to_contain_text("Ended after")


def test_the_page_asks_for_the_key_and_keeps_it_nowhere(site):
    key = "a-key-of-this-server"
    with site(key=key) as (_, visit):
        page = visit(refused=(401,))
        for wrong in ("wrong", key):
            expect(page.get_by_role("dialog")).to_be_visible()
            page.get_by_label("Key", exact=True).fill(wrong)
            button(page, "Use this key").click()
        expect(page.locator("#view-write")).to_be_visible()
        expect(page.get_by_role("dialog")).to_be_hidden()
        assert key not in page.url and not page.context.cookies() and key not in page.content()
        page.reload()
        expect(page.get_by_role("dialog")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_fits_a_phone(site, run, tmp_path, scheme):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    with site(other) as (_, visit):
        page = visit(viewport={"width": 390, "height": 844}, color_scheme=scheme)
        button(page.locator("#view-write"), "Write").click()
        expect(page.locator("#view-write .status")).to_contain_text("Ended after")
        for view in VIEWS:
            page.locator(f"nav a[href='#{view}']").click()
            shown = page.locator(f"#view-{view}")
            expect(shown).to_be_visible()
            expect(page.locator("main > section:visible")).to_have_count(1)
            if view == "experts":
                button(shown, "Write").click()
                shown.locator("[data-door='1:1']").click()
                expect(shown.locator("#lesson")).to_contain_text("Writing with the same seed")
            expect(shown.locator("p:visible, dl:visible").first).to_be_visible()
            width = page.locator("html").evaluate("node => node.scrollWidth")
            assert width <= 390, view
        expect(page.locator("#compared")).to_contain_text("other")


def test_nothing_in_an_address_acts(site):
    with site() as (house, visit):
        page = visit("?q=hello&prompt=hello#write?prompt=hello")
        expect(page.locator("#view-write")).to_be_visible()
        assert house.server.engine.counts["read"] == 0
