// The load of each expert over time: a row for each expert, from left to right the steps; an even share is pale, more is
// orange, less is blue.

import { el, percent, whole } from "./dom.js";

const ROW = 15, LEFT = 30;

export class Heat {
  constructor(title) {
    this.canvas = el("canvas", { tabindex: "0", role: "img" });
    this.read = el("output", { class: "read" });
    this.title = title;
    this.node = el("figure", { class: "chart heat" }, el("figcaption", {}, el("b", {}, title),
      el("span", { class: "faint" }, " share of each expert"), el("span", { class: "scale", "aria-hidden": "true" }, "less", el("i", {}), "more")), this.canvas, this.read);
    this.place = null;
    this.canvas.addEventListener("pointermove", (event) => {
      const box = this.canvas.getBoundingClientRect();
      this.point((event.clientX - box.left - LEFT) / (box.width - LEFT), Math.floor((event.clientY - box.top) / ROW));
    });
    this.canvas.addEventListener("pointerleave", () => (this.read.textContent = ""));
    this.canvas.addEventListener("blur", () => (this.read.textContent = ""));
    this.canvas.addEventListener("keydown", (event) => this.walk(event));
    new ResizeObserver(() => this.draw()).observe(this.node);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  // steps (P), shares (E, P)
  show(steps, shares) {
    Object.assign(this, { steps, shares });
    this.draw();
  }

  draw() {
    const width = Math.round(this.canvas.getBoundingClientRect().width), shares = this.shares;
    if (width < 2 * LEFT || !shares?.length) return;
    const height = ROW * shares.length, scale = devicePixelRatio || 1;
    Object.assign(this.canvas, { width: width * scale, height: height * scale });
    this.canvas.style.height = `${height}px`;
    const paint = this.canvas.getContext("2d");
    const style = getComputedStyle(this.node);
    const [even, more, less, ink] = ["--even", "--more", "--less", "--faint"].map((name) => style.getPropertyValue(name));
    paint.scale(scale, scale);
    paint.font = "11px ui-monospace, monospace";
    const wide = (width - LEFT) / this.steps.length;
    shares.forEach((row, expert) => {
      paint.globalAlpha = 1;
      paint.fillStyle = ink;
      paint.fillText(String(expert), 8, expert * ROW + 11);
      paint.fillStyle = even;
      paint.fillRect(LEFT, expert * ROW, width - LEFT, ROW - 1);
      row.forEach((share, nth) => {
        if (share === null) return;
        const times = Math.log2(Math.max(share * shares.length, 1 / 16)); // 0: an even share
        paint.globalAlpha = Math.min(Math.abs(times) / 1.6, 1);
        paint.fillStyle = times > 0 ? more : less;
        paint.fillRect(LEFT + nth * wide, expert * ROW, Math.ceil(wide), ROW - 1);
      });
    });
    const last = shares.map((row) => row.at(-1) ?? 0);
    const busiest = last.indexOf(Math.max(...last)), idlest = last.indexOf(Math.min(...last));
    this.canvas.setAttribute("aria-label", `${this.title}, step ${whole(this.steps.at(-1))}: most to expert ${busiest}, ${percent(last[busiest])}; least to expert ${idlest}, ${percent(last[idlest])}. Arrow keys read values.`);
  }

  point(share, expert) {
    if (!this.shares?.[expert] || share < 0 || share > 1) return;
    const nth = Math.min(Math.floor(share * this.steps.length), this.steps.length - 1);
    this.place = [nth, expert];
    this.read.textContent = `step ${whole(this.steps[nth])}: expert ${expert} got ${percent(this.shares[expert][nth] ?? 0, 1)} of the choices`;
  }

  walk(event) {
    const way = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (!way || !this.shares?.length) return;
    event.preventDefault();
    const [nth, expert] = this.place ?? [this.steps.length - 1, 0];
    const to = Math.min(Math.max(expert + way[1], 0), this.shares.length - 1);
    this.point((Math.min(Math.max(nth + way[0], 0), this.steps.length - 1) + 0.5) / this.steps.length, to);
  }
}
