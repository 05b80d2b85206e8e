// Experts at work: a text as it is written, with the experts of each token, and the same without some of them.

import { get, stream } from "./api.js";
import { Doors } from "./doors.js";
import { change, choice, el, field, say, whole } from "./dom.js";
import { sampling, worker } from "./worker.js";
import { Chips, Text, explained } from "./tokens.js";

// The text that was written last, for the view of one expert.
export const live = { text: null };

export function experts(view, model) {
  if (!model.layers.length) {
    view.append(el("p", { class: "note" }, "This run is dense: every token takes the same way, and there are no experts."));
    return {};
  }
  const per = model.experts_per_token;
  let nth = model.layers.length - 1, mode = "again", texts = { open: null, again: null, read: null };
  let asked = {}; // the request of the open text: the fields may say something else by now

  const prompt = el("textarea", { id: "start", rows: 5, spellcheck: "false" });
  prompt.value = model.prompt;
  const settings = sampling(60);
  const details = el("aside", { class: "details", "aria-live": "off" }, el("p", { class: "faint" }, "Point at a token, or walk through the text with the arrow keys, to see where it went."));
  const explain = (text, at) => details.replaceChildren(...explained(text, at, model.layers).filter(Boolean));
  const left = new Chips("The text with all experts", explain);
  const right = new Chips("The text with closed doors", explain);
  const leftHead = el("p", { class: "numbers" }), rightHead = el("p", { class: "numbers", id: "closed-numbers" });
  const rightTitle = el("h2", {}), sum = el("p", { class: "lesson", id: "lesson" });
  const doors = new Doors(model, () => { compared(); if (texts.open) job.run("closed"); });

  async function fill(key, body, signal, prompt = null) {
    const text = (texts[key] = new Text());
    redraw(true);
    for await (const event of stream("/v1/completions", body, signal)) {
      for (const one of event.choices) {
        text.add(one.khanhllm);
        text.prompt = prompt ?? text.prompt;
        text.finish = one.finish_reason ?? text.finish;
        redraw(false);
      }
    }
    return text;
  }

  const job = worker(view, "Write", async (signal, tell, only) => {
    const off = doors.off;
    if (only !== "closed" || !texts.open?.finish) {
      texts.again = texts.read = null;
      tell("The model writes, all doors open …");
      asked = { ...settings.values(), prompt: prompt.value };
      live.text = await fill("open", { ...asked, khanhllm: { routes: true } }, signal);
      say(live.text.tokens.slice(live.text.prompt).map((token) => token.text).join(""));
    }
    texts.again = texts.read = null;
    redraw(true);
    if (off.length) {
      const khanhllm = { routes: true, off };
      const ids = texts.open.tokens.map((token) => token.id).slice(0, model.context);
      tell(`The same text is read without ${doors.words} …`);
      await fill("read", { prompt: ids, max_tokens: 0, khanhllm }, signal, texts.open.prompt);
      tell(`The model writes without ${doors.words} …`);
      await fill("again", { ...asked, khanhllm }, signal);
    }
    return "";
  });

  function redraw(anew) {
    const open = texts.open, other = texts[mode];
    if (open) {
      if (anew) left.clear();
      left.draw(open, nth);
      leftHead.textContent = numbers(open, open.prompt);
      doors.draw(open);
    }
    if (anew) right.clear();
    if (other) {
      right.draw(other, nth, open);
      rightHead.textContent = mode === "read" ? numbers(other, open.prompt) : numbers(other, other.prompt);
    } else rightHead.textContent = "";
    compared();
  }

  function numbers(text, from) {
    const bits = text.bits(from);
    return `${whole(text.tokens.length - from)} tokens` + (Number.isNaN(bits) ? "" : `, ${bits.toFixed(2)} bits each`);
  }

  // What the closed doors changed, in a sentence.
  function compared() {
    const { open, read, again } = texts, words = doors.words;
    view.classList.toggle("two", Boolean(words));
    modes.hidden = reopen.hidden = !words;
    rightTitle.textContent = words ? `Without ${words}` : "";
    const parts = [];
    if (words && open?.finish && read?.finish) {
      const before = open.bits(1, read.tokens.length), after = read.bits(1);
      parts.push(`Reading the open text without ${words} takes ${after.toFixed(2)} bits a token instead of ${before.toFixed(2)} (${change(after / before - 1)}).`);
    }
    if (words && again?.finish) {
      const parted = again.tokens.findIndex((token, at) => token.id !== open.tokens[at]?.id) - open.prompt;
      const when = parted === 0 ? "at the first token" : parted === 1 ? "after one token" : `after ${whole(parted)} tokens`;
      parts.push(parted < 0 ? "Writing with the same seed, it chose the same tokens." : `Writing with the same seed, it went another way ${when}.`);
    }
    sum.textContent = parts.join(" ");
  }

  const modes = choice("What to do without them", [["again", "without them: write again"], ["read", "read the open text"]], mode, (picked) => { mode = picked; redraw(true); });
  const layers = choice("Layer that gives the colours", model.layers.map((layer, at) => [at, `layer ${layer}`]), nth, (picked) => { nth = picked; redraw(true); });
  const reopen = el("button", { type: "button", class: "quiet", onclick: () => doors.openAll() }, "open all doors");

  view.append(
    el("p", { class: "lead" }, `Every mixture layer has ${model.experts} experts, small networks of their own. A router sends each token to ${per} of them. Write something, then close a door: no token enters that expert any more, and the router chooses among the rest.`),
    el("div", { class: "desk" },
      el("div", {}, field("Text to begin with", prompt), job.row, job.status),
      el("details", { class: "settings" }, el("summary", {}, "Settings"), el("div", { class: "fields" }, settings.fields))),
    el("div", { class: "bar-row" }, el("h2", {}, "Doors"), reopen),
    doors.box, sum,
    el("div", { class: "bar-row" }, el("span", { class: "faint" }, "Colours by"), layers, modes,
      el("span", { class: "faint key" }, "A chip has the colours and numbers of its experts; the bar below it is its surprise, in bits.")),
    el("div", { class: "result" },
      el("div", { class: "pair" },
        el("section", {}, el("h2", {}, "All doors open"), leftHead, left.box),
        el("section", { class: "other-side" }, rightTitle, rightHead, right.box)),
      details),
  );
  doors.draw();
  compared();
  async function look() {
    const { findings, current } = await get("/api/experts").catch(() => ({}));
    doors.worth = current ? findings.layers : null; // those of other weights say nothing of these
    doors.draw();
  }
  return { look };
}
