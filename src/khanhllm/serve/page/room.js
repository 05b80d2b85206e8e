// One expert: which tokens it gets, and what it is worth, as `khanhllm experts` measured it.

import { get } from "./api.js";
import { change, el, percent, shown, whole } from "./dom.js";
import { worth as short } from "./doors.js";
import { live } from "./rooms.js";
import { colour } from "./tokens.js";

const MEASURES = {
  token: "this token tells", previous: "the token before tells", next: "the token after tells", kind: "the kind of token tells",
  part: "the part of the text tells", position: "its position tells", below: "the mixture below tells",
  faithful: "a token's favourite gets", together: "the strongest pair", repetition: "the next token stays", opinion: "the router's entropy",
};

const apart = (cost) => Math.abs(cost.share) > 2 * cost.error;

// Costs as dots with two standard errors, on one scale.
function worth(rows) {
  const most = Math.max(0.001, ...rows.map(([, cost]) => cost.share + 2 * cost.error));
  const least = Math.min(0, ...rows.map(([, cost]) => cost.share - 2 * cost.error));
  const place = (value) => `${(100 * (value - least)) / (most - least)}%`;
  return el("ul", { class: "worth" }, rows.map(([name, cost, kind]) => {
    const line = el("span", { class: "scale" }, el("i", { class: "zero" }), el("i", { class: "reach" }), el("i", { class: `dot ${kind}` }));
    line.style.setProperty("--zero", place(0));
    line.style.setProperty("--at", place(cost.share));
    line.style.setProperty("--from", place(cost.share - 2 * cost.error));
    line.style.setProperty("--to", `${(100 * 4 * cost.error) / (most - least)}%`);
    const number = `${change(cost.share, 2)} ± ${(100 * cost.error).toFixed(2)}`;
    return el("li", {}, el("span", {}, name), line, el("b", { class: apart(cost) ? "" : "faint" }, apart(cost) ? number : `(${number})`));
  }));
}

const list = (texts) => el("div", { class: "likes" }, texts.map((text) => el("code", {}, text)));

function card(found, layer, one, model) {
  const kinds = [...one.parts, ...one.kinds].map(([name, lift]) => `${name} ${lift.toFixed(1)}×`);
  const rows = [["closed: the next best take over", one.closed, colour(one.expert)], ["its answer taken away", one.removed, colour(one.expert)],
    ["the whole mixture off", layer.off, "ink"], ["experts by dice", layer.random, "ink"]].filter(([, cost]) => cost);
  const with_ = (layer.together[one.expert] ?? []).map((share, expert) => [share, expert]).filter(([share]) => share > 0).sort((a, b) => b[0] - a[0]).slice(0, 3);
  const nth = model.layers.indexOf(layer.layer);
  const here = (live.text?.tokens ?? []).filter((_, at) => live.text.routes[at]?.[nth]?.some(([expert]) => expert === one.expert));
  const parts = [
    el("h2", {}, el("span", { class: `plate ${colour(one.expert)}` }, String(one.expert)), ` Expert ${one.expert} of layer ${layer.layer}`),
    el("p", {}, `It gets ${percent(one.share, 1)} of the choices; an even share is ${percent(1 / layer.experts.length, 1)}.`),
    el("h3", {}, "What it likes"),
    one.likes.length ? list(one.likes) : el("p", { class: "faint" }, "no token clearly more than its share"),
    kinds.length ? el("p", { class: "faint" }, kinds.join(" · ")) : "",
    el("h3", {}, "What it is worth"),
    rows.length ? el("p", { class: "faint" }, "How many more bits the held-out text takes without it, ± one standard error; in parentheses what cannot be told from nothing.") : el("p", { class: "faint" }, "not measured"),
    rows.length ? worth(rows) : "",
    one.says.length ? el("h3", {}, "What it says") : "",
    one.says.length ? list(one.says) : "",
    one.says.length ? el("p", { class: "faint" }, "The tokens that its mean answer, put through the head, raises most above those of its neighbours.") : "",
    with_.length ? el("h3", {}, "Who is called with it") : "",
    with_.length ? el("p", {}, with_.map(([share, expert]) => `expert ${expert} for ${percent(share)} of its tokens`).join(", ") + ".") : "",
    el("h3", {}, "In the text that you wrote last"),
    here.length ? list(here.slice(0, 60).map((token) => shown(token.text))) : el("p", { class: "faint" }, live.text ? "It got no token of it." : "Write one under Experts."),
  ];
  return parts.filter(Boolean);
}

function verdict(layer) {
  if (!layer.off) return "What this mixture is worth was not measured.";
  const dice = layer.random && layer.random.share > 0.8 * layer.off.share;
  const word = !apart(layer.off) || layer.off.share < 0.005 ? "It is worth next to nothing" : dice ? "Its worth is the routing" : "Its worth is partly the routing";
  return `${word}: switched off, the mixture costs ${change(layer.off.share, 2)} bits${layer.random ? `, experts by dice cost ${change(layer.random.share, 2)}` : ""}.`;
}

function measured(layer) {
  const rows = Object.entries(MEASURES).filter(([name]) => layer.measures[name]).map(([name, words]) => {
    const { value, chance } = layer.measures[name];
    return el("tr", {}, el("th", { scope: "row" }, words), el("td", {}, percent(value)), el("td", { class: "faint" }, percent(chance)));
  });
  return el("details", {}, el("summary", {}, `How layer ${layer.layer} chooses`),
    el("table", {}, el("thead", {}, el("tr", {}, ["the choice of expert", "is", "by chance"].map((text) => el("th", { scope: "col" }, text)))), el("tbody", {}, rows)));
}

export function one(view, model) {
  const place = el("div", {});
  let seen = "", picked = null;

  function draw(found) {
    if (!model.layers.length) return place.replaceChildren(el("p", { class: "note" }, "This run is dense: it has no experts."));
    if (!found.findings) {
      return place.replaceChildren(el("p", { class: "lead" }, "Nobody has measured the experts of this run yet. This command does, on text that the run held out; the page shows what it finds:"),
        el("pre", { class: "paper" }, "khanhllm experts RUN"));
    }
    const { findings } = found, box = el("article", { class: "card", "aria-live": "polite" });
    picked ??= [findings.layers.length - 1, 0];
    const buttons = [];
    const show = () => {
      const layer = findings.layers[picked[0]];
      box.replaceChildren(...card(findings, layer, layer.experts[picked[1]], model));
      for (const [button, nth, at] of buttons) button.setAttribute("aria-pressed", nth === picked[0] && at === picked[1]);
    };
    const floors = findings.layers.map((layer, nth) => el("section", {},
      el("h3", {}, `Layer ${layer.layer}`), el("p", { class: "faint" }, verdict(layer)),
      el("div", { class: "floor", role: "group", "aria-label": `Experts of layer ${layer.layer}` }, layer.experts.map((expert, at) => {
        const button = el("button", { type: "button", class: `door ${colour(expert.expert)}`, onclick: () => { picked = [nth, at]; show(); } },
          el("b", {}, String(expert.expert)), el("span", { class: "bar" }), el("small", {}, expert.closed ? short(expert.closed) : ""));
        button.children[1].style.setProperty("--share", expert.share);
        button.setAttribute("aria-label", `Expert ${expert.expert} of layer ${layer.layer}, ${percent(expert.share)} of the choices`);
        buttons.push([button, nth, at]);
        return button;
      })), measured(layer)));
    const old = found.current ? "" : el("p", { class: "note" }, `Measured after step ${whole(findings.step)}, and not on the weights that are served now. Measure again: khanhllm experts RUN`);
    place.replaceChildren(old,
      el("p", { class: "lead" }, `Measured on ${whole(findings.tokens)} tokens of ${findings.data}: ${findings.bits_per_byte.toFixed(3)} bits per byte.`),
      el("div", { class: "rooms" }, el("div", { class: "floors" }, floors), box));
    show();
  }

  async function look() {
    const found = await get("/api/experts");
    const now = JSON.stringify(found) + live.text?.tokens.length;
    if (now !== seen) draw(found);
    seen = now;
  }

  view.append(place);
  return { look };
}
