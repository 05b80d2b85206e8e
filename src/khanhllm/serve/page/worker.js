// One piece of work that a view starts and stops, and its settings.

import { el, field, number, sentence } from "./dom.js";

// Buttons that start and stop one piece of work, and a line that says how it goes. Ctrl+Enter starts, Escape stops.
export function worker(place, name, work) {
  const go = el("button", { class: "strong", type: "button" }, name);
  const halt = el("button", { type: "button", disabled: true }, "Stop");
  const status = el("p", { class: "status", role: "status" });
  let control = null, going = Promise.resolve();

  async function run(...what) {
    control?.abort();
    const mine = (control = new AbortController());
    halt.disabled = false;
    status.classList.remove("bad");
    let end = "";
    try {
      await going; // what was just ended first puts its things in order
      if (mine !== control) return;
      const working = work(mine.signal, (text) => mine === control && (status.textContent = text), ...what);
      going = working.catch(() => {});
      end = await working;
    } catch (error) {
      if (mine !== control) return;
      end = mine.signal.aborted ? "Ended: you stopped it." : sentence(error.message);
      status.classList.toggle("bad", !mine.signal.aborted);
    }
    if (mine !== control) return;
    control = null;
    halt.disabled = true;
    status.textContent = end;
  }

  const stop = () => control?.abort();
  go.addEventListener("click", () => run());
  halt.addEventListener("click", stop);
  place.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
  });
  return { run, stop, status, row: el("div", { class: "row" }, go, halt), go };
}

export function sampling(tokens) {
  const inputs = {
    max_tokens: number(tokens, 1, 100000),
    temperature: number(0.8, 0, 100, 0.1),
    top_p: number(1, 0.01, 1, 0.01),
    seed: number(1, 0, 2 ** 31),
  };
  const names = { max_tokens: "Tokens", temperature: "Temperature", top_p: "Top p", seed: "Seed" };
  const fields = Object.entries(inputs).map(([key, input]) => field(names[key], input));
  const values = () => Object.fromEntries(Object.entries(inputs).map(([key, input]) => [key, input.valueAsNumber]));
  return { fields, values, inputs };
}
