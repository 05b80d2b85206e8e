// A text as chips: each token with its experts and its bits; the one under the cursor is explained beside.

import { el, percent, shown } from "./dom.js";

export const MOST_BITS = 10;

// The class that gives an expert its colour. There are eight; the number says the rest.
export const colour = (expert) => `e${expert % 8}`;

// What a stream has told so far: tokens, and where each one went (a token is drawn before it is read).
export class Text {
  constructor() {
    this.tokens = [];
    this.routes = [];
    this.prompt = 0;
    this.finish = "";
  }

  add(told) {
    this.prompt += told.prompt;
    for (const [id, text, bits, likely] of told.tokens) this.tokens.push({ id, text, bits, likely });
    this.routes.push(...told.routes);
  }

  // Bits per token over what the model wrote, or over all that it read.
  bits(from = this.prompt, to = this.tokens.length) {
    const known = this.tokens.slice(from, to).filter((token) => token.bits !== null);
    return known.length ? known.reduce((sum, token) => sum + token.bits, 0) / known.length : NaN;
  }

  // How often each expert of a mixture was chosen.
  counts(nth, experts) {
    const found = new Array(experts).fill(0);
    for (const route of this.routes) for (const [expert] of route[nth] ?? []) found[expert] += 1;
    return found;
  }
}

export class Chips {
  constructor(label, explain) {
    this.box = el("div", { class: "chips", role: "list", "aria-label": label });
    this.explain = explain;
    this.clear();
    this.box.addEventListener("pointerover", (event) => this.pick(event.target.closest(".chip")));
    this.box.addEventListener("focusin", (event) => this.pick(event.target.closest(".chip")));
    this.box.addEventListener("keydown", (event) => this.move(event));
  }

  clear() {
    this.box.replaceChildren();
    this.chips = [];
    this.painted = 0;
    this.text = null;
  }

  // Draw what has come since the last time, or all with another layer.
  draw(text, nth, base = null, anew = false) {
    this.text = text;
    if (anew) this.painted = 0;
    for (let at = this.chips.length; at < text.tokens.length; at++) this.append(text, at);
    for (let at = Math.min(this.painted, this.chips.length); at < this.chips.length; at++) {
      this.paint(this.chips[at], text, at, nth, base);
    }
    this.painted = Math.max(text.routes.length - 1, 0);
  }

  append(text, at) {
    const token = text.tokens[at];
    const label = el("span", { class: "token" }, shown(token.text));
    const chip = el("span", { class: "chip", role: "listitem", tabindex: at ? "-1" : "0" }, label, el("small", {}));
    chip.dataset.at = at;
    if (at === 0 && token.text === "<|endoftext|>") chip.classList.add("start");
    if (at < text.prompt) chip.classList.add("given");
    this.chips.push(chip);
    this.box.append(chip);
    if (token.text.endsWith("\n")) this.box.append(el("br"));
  }

  paint(chip, text, at, nth, base) {
    const route = text.routes[at]?.[nth];
    const token = text.tokens[at];
    chip.className = chip.className.replace(/ ?\b(e\d|f\d|none)\b/g, "");
    const [first, second] = route ?? [];
    if (first) chip.classList.add(colour(first[0]), `f${(second ?? first)[0] % 8}`);
    else if (route) chip.classList.add("none");
    chip.style.setProperty("--part", `${100 * (second ? first[1] : 1)}%`);
    chip.style.setProperty("--bits", Math.min(token.bits ?? 0, MOST_BITS));
    chip.lastChild.textContent = route ? route.map(([expert]) => expert).join(" ") || "–" : "";
    const before = base?.tokens[at];
    const other = base && before?.id !== token.id;
    const more = before && !other && token.bits !== null && before.bits !== null ? token.bits - before.bits : 0;
    const parted = other && text.tokens.slice(0, at).every((one, nth) => one.id === base.tokens[nth]?.id);
    chip.classList.toggle("parted", Boolean(parted));
    chip.classList.toggle("worse", more > 0.5);
    chip.classList.toggle("better", more < -0.5);
    const experts = route?.length ? `experts ${route.map(([expert]) => expert).join(" and ")}` : "no expert";
    const bits = token.bits === null ? "" : `, ${token.bits.toFixed(1)} bits`;
    chip.setAttribute("aria-label", `${shown(token.text)}: ${experts}${bits}`);
  }

  pick(chip) {
    if (!chip) return;
    this.box.querySelector(".picked")?.classList.remove("picked");
    chip.classList.add("picked");
    this.explain(this.text, Number(chip.dataset.at));
  }

  move(event) {
    const at = this.chips.indexOf(event.target.closest(".chip"));
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    const to = this.chips[Math.min(Math.max(at + step, 0), this.chips.length - 1)];
    if (!step || !to) return;
    event.preventDefault();
    this.chips[at].tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  }
}

function bar(share, kind) {
  const meter = el("span", { class: `bar ${kind}` });
  meter.style.setProperty("--share", share);
  return meter;
}

// One token in full: what else was likely, and its experts in every mixture.
export function explained(text, at, layers) {
  const token = text.tokens[at];
  const bits = token.bits === null ? "nothing stands before it" : `${token.bits.toFixed(2)} bits, probability ${percent(2 ** -token.bits, 1)}`;
  const likely = (token.likely ?? []).map(([name, probability]) =>
    el("li", {}, el("code", {}, shown(name)), bar(probability, "plain"), el("span", {}, percent(probability))));
  const route = text.routes[at];
  const ways = layers.map((layer, nth) =>
    el("li", {}, el("span", { class: "where" }, `Layer ${layer}`),
      route ? route[nth].map(([expert, weight]) =>
        el("span", { class: `way ${colour(expert)}` }, el("b", {}, String(expert)), bar(weight, ""), percent(weight)))
        : el("span", { class: "faint" }, "the last token was not read by anybody yet")));
  return [
    el("h3", {}, el("code", { class: "big" }, shown(token.text)), el("span", { class: "faint" }, ` token ${token.id}`)),
    el("p", {}, bits),
    likely.length ? el("h4", {}, "Likely here") : "",
    el("ol", { class: "likely" }, likely),
    el("h4", {}, "Its experts"),
    el("ul", { class: "ways" }, ways),
  ];
}
