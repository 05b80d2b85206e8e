// Lines over steps, drawn as SVG: axes with round numbers, values under the cursor or the arrow keys, a sentence for
// those who do not see them.

import { el, short, svg, whole } from "./dom.js";

let count = 0;
const HEIGHT = 190, LEFT = 52, RIGHT = 12, TOP = 10, BOTTOM = 26;

// Round numbers between two values.
export function ticks(low, high, about) {
  const rough = (high - low) / about || 1;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * size).find((one) => one >= rough);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(at * step);
  return found;
}

const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

// The span worth drawing: a loss begins so high that the rest would be a flat line.
function span(lines, zero) {
  const values = lines.flatMap((line) => {
    const cut = line.cut ? Math.floor(line.y.length / 20) : 0;
    return [...line.y.slice(cut), ...(line.least ?? []).slice(cut)].filter(known);
  });
  if (!values.length) return null;
  let low = zero ? Math.min(0, ...values) : Math.min(...values), high = Math.max(...values);
  if (high - low < 1e-9 * Math.abs(high) + 1e-12) [low, high] = [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10];
  const room = (high - low) * 0.06;
  return [zero && low === 0 ? 0 : low - room, high + room];
}

export class Chart {
  // zero: the axis begins at 0.
  constructor(title, unit = "", { zero = false } = {}) {
    Object.assign(this, { title, unit, zero, lines: [], at: null });
    this.read = el("output", { class: "read" });
    this.legend = el("span", { class: "legend" });
    this.picture = svg("svg", { role: "img", tabindex: "0" });
    this.node = el("figure", { class: "chart" },
      el("figcaption", {}, el("b", {}, title), unit ? el("span", { class: "faint" }, ` ${unit}`) : "", this.legend), this.picture, this.read);
    this.picture.addEventListener("pointermove", (event) => this.point(this.stepAt(event)));
    this.picture.addEventListener("pointerleave", () => this.point(null));
    this.picture.addEventListener("keydown", (event) => this.walk(event));
    this.picture.addEventListener("blur", () => this.point(null));
    new ResizeObserver(() => this.draw()).observe(this.node);
  }

  // lines: {name, kind, x, y, along, least, most, dots, cut}; kind is the class that gives the colour, along names x.
  show(lines) {
    this.lines = lines.filter((line) => line.y.some(known));
    this.draw();
  }

  draw() {
    const width = Math.round(this.picture.getBoundingClientRect().width);
    if (width < 2 * LEFT) return; // not in sight
    this.picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.picture.setAttribute("height", HEIGHT);
    this.legend.replaceChildren(...(this.lines.length > 1 ? this.lines.map((line) => el("span", { class: `name ${line.kind}` }, line.name)) : []));
    const reach = span(this.lines, this.zero);
    if (!reach) {
      this.picture.replaceChildren(svg("text", { x: width / 2, y: HEIGHT / 2, class: "none" }, "nothing measured yet"));
      this.picture.setAttribute("aria-label", `${this.title}: nothing measured yet`);
      return;
    }
    const steps = this.lines.flatMap((line) => line.x);
    const first = Math.min(...steps), last = Math.max(...steps, first + 1);
    this.x = (step) => LEFT + ((step - first) / (last - first)) * (width - LEFT - RIGHT);
    this.y = (value) => HEIGHT - BOTTOM - ((value - reach[0]) / (reach[1] - reach[0])) * (HEIGHT - TOP - BOTTOM);
    this.back = (place) => first + ((place - LEFT) / (width - LEFT - RIGHT)) * (last - first);
    this.cursor = svg("g", { class: "cursor" });
    this.picture.replaceChildren(...this.axes(reach, first, last, width), this.inside(width), this.cursor);
    this.picture.setAttribute("aria-label", `${this.title}${this.unit ? `, ${this.unit}` : ""}: ${this.lines.map(told).join("; ")}. Arrow keys read values.`);
    if (this.at !== null) this.point(this.at);
  }

  // The lines, cut off where the axes end.
  inside(width) {
    const name = (this.name ??= `inside-${(count += 1)}`);
    const frame = svg("rect", { x: LEFT - 4, y: TOP - 4, width: width - LEFT - RIGHT + 8, height: HEIGHT - TOP - BOTTOM + 8 });
    return svg("g", { "clip-path": `url(#${name})` }, svg("clipPath", { id: name }, frame), this.lines.flatMap((line) => this.line(line)));
  }

  axes(reach, first, last, width) {
    const across = ticks(...reach, 5).map((value) => svg("g", {},
      svg("line", { x1: LEFT, x2: width - RIGHT, y1: this.y(value), y2: this.y(value), class: "grid" }),
      svg("text", { x: LEFT - 8, y: this.y(value) + 4, class: "left" }, short(value))));
    const along = ticks(first, last, Math.max(3, width / 110)).map((step) =>
      svg("text", { x: this.x(step), y: HEIGHT - 8, class: "below" }, short(step)));
    return [...across, ...along];
  }

  line({ kind, x, y, least, most, dots }) {
    const places = y.map((value, nth) => [x[nth], value]).filter(([, value]) => known(value));
    const at = ([step, value]) => `${this.x(step).toFixed(1)},${this.y(value).toFixed(1)}`;
    const parts = [];
    if (least) {
      const band = [...x.map((step, nth) => [step, most[nth]]), ...x.map((step, nth) => [step, least[nth]]).reverse()];
      parts.push(svg("polygon", { points: band.filter(([, value]) => known(value)).map(at).join(" "), class: `band ${kind}` }));
    }
    parts.push(svg("polyline", { points: places.map(at).join(" "), class: `line ${kind}` }));
    if ((dots && places.length < 80) || places.length === 1) {
      parts.push(...places.map(([step, value]) => svg("circle", { cx: this.x(step), cy: this.y(value), r: 2.6, class: `dot ${kind}` })));
    }
    return parts;
  }

  stepAt(event) {
    const box = this.picture.getBoundingClientRect();
    return this.back ? this.back(event.clientX - box.left) : null;
  }

  // Read the values at a step.
  point(step) {
    this.at = step;
    if (!this.cursor) return;
    if (step === null) {
      this.cursor.replaceChildren();
      this.read.textContent = "";
      return;
    }
    const found = this.lines.map((line) => nearest(line, step)).filter(Boolean);
    if (!found.length) return;
    const place = this.x(found[0].step);
    this.cursor.replaceChildren(
      svg("line", { x1: place, x2: place, y1: TOP, y2: HEIGHT - BOTTOM, class: "hair" }),
      ...found.map(({ step: own, value, kind }) => svg("circle", { cx: this.x(own), cy: this.y(value), r: 3.5, class: `dot ${kind}` })));
    this.read.textContent = `${this.lines[0].along ?? "step"} ${whole(found[0].step)}: ${found.map(({ name, value }) => `${name} ${short(value)}`).join(", ")}`;
  }

  walk(event) {
    const steps = this.lines[0]?.x ?? [];
    const way = { ArrowRight: 1, ArrowLeft: -1, PageDown: 20, PageUp: -20, End: steps.length, Home: -steps.length }[event.key];
    if (!way || !steps.length) return;
    event.preventDefault();
    const now = this.at === null ? steps.length - 1 - Math.sign(way) : steps.findIndex((step) => step >= this.at - 1e-9);
    this.point(steps[Math.min(Math.max((now < 0 ? steps.length - 1 : now) + way, 0), steps.length - 1)]);
  }
}

function nearest({ x, y, name, kind }, step) {
  let best = null;
  for (let nth = 0; nth < x.length; nth++) {
    if (known(y[nth]) && (best === null || Math.abs(x[nth] - step) < Math.abs(best.step - step))) best = { step: x[nth], value: y[nth], name, kind };
  }
  return best;
}

function told({ name, y }) {
  const values = y.filter(known);
  return `${name} begins at ${short(values[0])}, is ${short(values.at(-1))} now, at least ${short(Math.min(...values))}`;
}
