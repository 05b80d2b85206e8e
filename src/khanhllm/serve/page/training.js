// A run that trains, or has trained: its log as curves, the load of its experts, what it said and wrote.

import { get } from "./api.js";
import { Chart } from "./charts.js";
import { el, percent, sentence, short, whole } from "./dom.js";
import { Heat } from "./heat.js";

// The curves of a run, fetched anew only when they have changed.
export class Curves {
  constructor(run = 0) {
    this.run = run;
    this.known = { log: { version: -1 }, loads: { version: -1 } };
  }

  async fetch(what) {
    const found = await get(`/api/${what}?run=${this.run}&version=${this.known[what].version}`);
    const changed = "curves" in found;
    if (changed) this.known[what] = found;
    return changed;
  }

  column(name, kind = "mean") {
    return this.known.log.curves?.["0"]?.[name]?.[kind] ?? [];
  }

  get steps() {
    return this.column("step");
  }

  last(name) {
    return this.known.log.last?.["0"]?.[name] ?? undefined;
  }

  line(name, shown, kind, more = {}) {
    return { name: shown, kind, x: this.steps, y: this.column(name), ...more };
  }
}

const bits = (text) => [...text.matchAll(/^--- step (\d+)\n([^]*?)(?=^--- step \d|$(?![^]))/gm)];

function big(label, value, unit = "") {
  return el("div", {}, el("dt", {}, label), el("dd", {}, value ?? "–", unit ? el("small", {}, ` ${unit}`) : ""));
}

export function training(view, model) {
  const curves = new Curves();
  const waits = el("p", { class: "note", hidden: true });
  const facts = el("dl", { class: "facts", id: "facts" });
  const progress = el("progress", { max: 1, "aria-label": "Progress of the run" });
  const charts = {
    loss: new Chart("Loss", "nats per token"),
    bits: new Chart("Validation", "bits per byte of text held out"),
    balance: new Chart("Balance of the mixtures", "1 is even"),
    norm: new Chart("Gradient norm"),
    speed: new Chart("Speed", "tokens per second", { zero: true }),
    memory: new Chart("Memory", "MB, the most so far", { zero: true }),
  };
  const heats = new Map(model.layers.map((layer) => [layer, new Heat(`Load of layer ${layer}`)]));
  if (!model.layers.length) charts.balance.node.hidden = true;
  const messages = el("ol", { class: "messages", tabindex: "0", "aria-label": "Messages" });
  const samples = el("div", { class: "samples" });
  const loads = el("h2", { hidden: true }, "Load of the experts");
  let texts = "", steps = model.steps;

  function drawLog() {
    const layers = model.layers.filter((layer) => curves.column(`balance_L${layer}`).length);
    const band = (name) => ({ least: curves.column(name, "least"), most: curves.column(name, "most") });
    charts.loss.show([curves.line("loss", "training", "k0", { cut: true, ...band("loss") }), curves.line("val_ce", "validation", "k1", { dots: true })]);
    charts.bits.show([curves.line("val_bpb", "validation", "k1", { dots: true })]);
    charts.balance.show(layers.map((layer, nth) => curves.line(`balance_L${layer}`, `layer ${layer}`, `k${nth % 8}`, { cut: true })));
    charts.norm.show([curves.line("grad_norm", "norm", "k2", { cut: true, ...band("grad_norm") })]);
    charts.speed.show([curves.line("tokens_per_s", "speed", "k4")]);
    charts.memory.show([curves.line("memory_mb", "memory", "k5")]);
    const step = curves.last("step") ?? 0, at = (name) => (curves.last(name) === undefined ? null : short(curves.last(name)));
    progress.hidden = !steps; // a run may end by the clock instead
    progress.value = Math.min(step / Math.max(steps, 1), 1);
    facts.replaceChildren(
      big("Step", whole(step), steps ? `of ${whole(steps)}` : ""), big("Tokens read", at("tokens")), big("Loss", at("loss"), "nats"),
      big("Validation", at("val_bpb"), "bits per byte"), big("Speed", at("tokens_per_s"), "tokens/s"), big("Memory", at("memory_mb"), "MB"),
      ...(model.layers.length ? [big("Idlest expert", curves.last("least_share") === undefined ? null : percent(curves.last("least_share"), 1), "of a layer")] : []));
  }

  function drawLoads() {
    for (const [layer, heat] of heats) {
      const found = curves.known.loads.curves?.[layer];
      heat.node.hidden = !found;
      loads.hidden &&= !found;
      if (found) heat.show(found.step.mean, [...new Array(model.experts).keys()].map((expert) => found[`share_${expert}`].mean));
    }
  }

  function drawTexts(found) {
    if (texts === found.messages + found.samples) return;
    texts = found.messages + found.samples;
    const end = messages.scrollHeight - messages.scrollTop - messages.clientHeight < 40;
    messages.replaceChildren(...found.messages.split("\n").filter(Boolean).map((line) => {
      const [, when, text] = /^\S+ (\S+) {2}([^]*)$/.exec(line) ?? [null, "", line];
      return el("li", {}, el("time", {}, when), text);
    }));
    if (end) messages.scrollTop = messages.scrollHeight;
    samples.replaceChildren(...bits(found.samples).reverse().slice(0, 12).map(([, step, text], nth) =>
      el("details", { open: nth === 0 }, el("summary", {}, `after step ${whole(Number(step))}`), el("pre", { class: "paper" }, text.trimEnd()))));
    if (!samples.childElementCount) samples.append(el("p", { class: "faint" }, "The run has written no samples yet."));
  }

  async function look(now) {
    waits.hidden = !now.waits_for;
    waits.textContent = sentence(now.waits_for);
    const [log, loads, found] = await Promise.all([curves.fetch("log"), model.layers.length && curves.fetch("loads"), get("/api/texts")]);
    const longer = steps !== now.steps; // resumed, with more steps
    steps = now.steps;
    if (log || longer) drawLog();
    if (loads) drawLoads();
    drawTexts(found);
  }

  view.append(waits, progress, facts,
    el("div", { class: "charts" }, Object.values(charts).map((chart) => chart.node)),
    loads,
    el("div", { class: "charts" }, [...heats.values()].map((heat) => heat.node)),
    el("div", { class: "halves" },
      el("section", {}, el("h2", {}, "Messages"), messages),
      el("section", {}, el("h2", {}, "Samples"), samples)));
  return { look };
}
