// Two runs in the same axes.

import { Chart } from "./charts.js";
import { choice, el, short, whole } from "./dom.js";
import { Curves } from "./training.js";

const ROWS = [
  ["step", "Steps", (value) => whole(value)],
  ["tokens", "Tokens read", short],
  ["loss", "Loss, now", short],
  ["val_bpb", "Bits per byte, now", short],
  ["best", "Bits per byte, best", short],
  ["tokens_per_s", "Tokens per second", short],
  ["memory_mb", "Memory (MB)", short],
];

export function compare(view, model) {
  if (model.runs.length < 2) {
    view.append(el("p", { class: "lead" }, "To see two runs side by side, name both when you start the server:"),
      el("pre", { class: "paper" }, `khanhllm serve ${model.name} ANOTHER-RUN`));
    return {};
  }
  const runs = model.runs.map((_, nth) => new Curves(nth));
  let other = 1, along = "step";
  const loss = new Chart("Loss", "nats per token"), bits = new Chart("Validation", "bits per byte of text held out");
  const speed = new Chart("Speed", "tokens per second", { zero: true }), norm = new Chart("Gradient norm");
  const table = el("table", { id: "compared" });

  function draw() {
    const pair = [0, other];
    const lines = (column, more = {}) => pair.map((run, nth) => ({ ...runs[run].line(column, model.runs[run], `k${nth}`, more), x: runs[run].column(along), along }));
    loss.show(lines("loss", { cut: true }));
    bits.show(lines("val_bpb", { dots: true }));
    speed.show(lines("tokens_per_s"));
    norm.show(lines("grad_norm", { cut: true }));
    const value = (run, name) => (name === "best" ? Math.min(...run.column("val_bpb", "least").filter((one) => one !== null)) : run.last(name));
    table.replaceChildren(
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, ""), pair.map((run, nth) => el("th", { scope: "col", class: `name k${nth}` }, model.runs[run])))),
      el("tbody", {}, ROWS.map(([name, label, text]) => el("tr", {}, el("th", { scope: "row" }, label),
        pair.map((run) => el("td", {}, Number.isFinite(value(runs[run], name)) ? text(value(runs[run], name)) : "–"))))));
  }

  async function look() {
    const changed = await Promise.all([runs[0].fetch("log"), runs[other].fetch("log")]);
    if (changed.some(Boolean)) draw();
  }

  const others = model.runs.map((name, nth) => [nth, name]).slice(1);
  view.append(
    el("p", { class: "lead" }, "The same axes for both. Losses of runs with different tokenizers do not compare; bits per byte do, on the same text."),
    el("div", { class: "bar-row" }, el("span", { class: "faint" }, `${model.name} against`),
      choice("Other run", others, 1, (picked) => { other = picked; look().then(draw); }),
      el("span", { class: "faint" }, "along"),
      choice("Axis", [["step", "steps"], ["tokens", "tokens read"]], along, (picked) => { along = picked; draw(); })),
    table, el("div", { class: "charts" }, [loss, bits, norm, speed].map((chart) => chart.node)));
  return { look };
}
