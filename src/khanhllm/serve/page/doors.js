// The doors of all mixtures. A closed one is an argument of the next requests, and no state of the server.

import { change, el, percent } from "./dom.js";
import { colour } from "./tokens.js";

const numbered = (experts) => (experts.length === 1 ? `expert ${experts[0]}` : `experts ${experts.join(", ")}`);

// A cost that cannot be told from nothing is none.
export const worth = (cost) => (Math.abs(cost.share) > 2 * cost.error ? change(cost.share) : "≈ 0");

// A button for each expert of each mixture, and one for the whole.
export class Doors {
  constructor(model, changed) {
    this.model = model;
    this.closed = new Map(model.layers.map((layer) => [layer, new Set()]));
    this.buttons = new Map();
    this.changed = changed;
    this.box = el("div", { class: "doors" }, model.layers.map((layer) => this.row(layer)));
  }

  row(layer) {
    const experts = [...new Array(this.model.experts).keys()];
    const buttons = experts.map((expert) => {
      const button = el("button", { type: "button", class: `door ${colour(expert)}`, onclick: () => this.toggle(layer, [expert]) },
        el("b", {}, String(expert)), el("span", { class: "bar" }), el("small", {}));
      button.dataset.door = `${layer}:${expert}`;
      return button;
    });
    const all = el("button", { type: "button", class: "door all", onclick: () => this.toggle(layer, experts) },
      el("span", {}, "whole mixture"), el("small", {}));
    all.dataset.door = `${layer}:all`;
    this.buttons.set(layer, [...buttons, all]);
    return el("div", { class: "floor", role: "group", "aria-label": `Doors of layer ${layer}` },
      el("span", { class: "where" }, `Layer ${layer}`), buttons, all);
  }

  toggle(layer, experts) {
    const closed = this.closed.get(layer);
    const open = experts.some((expert) => !closed.has(expert));
    for (const expert of experts) open ? closed.add(expert) : closed.delete(expert);
    this.draw();
    this.changed();
  }

  openAll() {
    for (const closed of this.closed.values()) closed.clear();
    this.draw();
    this.changed();
  }

  // What the buttons say: share of the text, and what the expert is worth by `khanhllm experts`.
  draw(text = this.text) {
    this.text = text;
    this.model.layers.forEach((layer, nth) => {
      const closed = this.closed.get(layer);
      const counts = text?.counts(nth, this.model.experts) ?? [];
      const sum = counts.reduce((one, other) => one + other, 0);
      const known = this.worth?.find((one) => one.layer === layer);
      this.buttons.get(layer).forEach((button, expert) => {
        const all = expert === this.model.experts;
        const shut = all ? closed.size === expert : closed.has(expert);
        const cost = all ? known?.off : known?.experts[expert]?.closed;
        const share = all || !sum ? null : counts[expert] / sum;
        button.setAttribute("aria-pressed", shut);
        button.lastChild.textContent = cost ? worth(cost) : "";
        if (!all) button.children[1].style.setProperty("--share", share ?? 0);
        const words = [all ? `Whole mixture of layer ${layer}` : `Expert ${expert} of layer ${layer}`, shut ? "closed" : "open"];
        if (share !== null) words.push(`has ${percent(share)} of this text`);
        if (cost) words.push(`closing it costs ${worth(cost)} of the bits on held-out text`);
        button.setAttribute("aria-label", words.join(", "));
        button.title = words.join(", ");
      });
    });
  }

  get off() {
    return [...this.closed].flatMap(([layer, experts]) => [...experts].map((expert) => [layer, expert]));
  }

  get words() {
    const parts = [...this.closed].filter(([, experts]) => experts.size).map(([layer, experts]) =>
      experts.size === this.model.experts ? `the whole mixture of layer ${layer}`
        : `${numbered([...experts].sort((one, other) => one - other))} of layer ${layer}`);
    return parts.join(" and ");
  }
}
