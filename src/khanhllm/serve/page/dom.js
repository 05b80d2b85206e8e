// Elements, and how numbers and tokens are shown. Text from models and runs only ever becomes text nodes.

export function el(name, properties = {}, ...children) {
  const node = document.createElement(name);
  set(node, properties);
  node.append(...children.flat());
  return node;
}

export function svg(name, properties = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(properties)) node.setAttribute(key, value);
  node.append(...children.flat());
  return node;
}

function set(node, properties) {
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") node.className = value;
    else if (typeof value === "function" || typeof value === "boolean") node[key] = value;
    else node.setAttribute(key, value);
  }
}

export const byId = (id) => document.getElementById(id);

// For screen readers, and for nobody else.
export function say(text) {
  byId("said").textContent = text;
}

// One line of the server's as a sentence.
export const sentence = (text) => text && `${text[0].toUpperCase()}${text.slice(1)}${/[.?!]$/.test(text) ? "" : "."}`;

export const whole = (number) => Math.round(number).toLocaleString("en");

export function short(number) {
  const size = Math.abs(number);
  if (size >= 1e9) return `${(number / 1e9).toPrecision(3)} B`;
  if (size >= 1e6) return `${(number / 1e6).toPrecision(3)} M`;
  if (size >= 1e4) return `${(number / 1e3).toPrecision(3)} k`;
  if (size >= 1000) return whole(number);
  if (size > 0 && size < 0.001) return number.toExponential(1);
  return String(Number(number.toPrecision(4)));
}

export function percent(share, digits = 0) {
  return share > 0 && 100 * share < 0.5 * 10 ** -digits ? `< ${10 ** -digits} %` : `${(100 * share).toFixed(digits)} %`;
}

// A change in percent, with its sign; the minus of typographers.
export function change(share, digits = 1) {
  const text = (100 * Math.abs(share)).toFixed(digits);
  return `${share < 0 ? "−" : "+"}${text} %`;
}

// A token with its blanks and line ends made visible.
export function shown(text) {
  if (text === "<|endoftext|>") return "start";
  if (text.startsWith("bytes:")) return text.slice(6);
  const visible = text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll("\r", "␍");
  return /^[ \u00a0]+$/.test(text) ? "·".repeat(text.length) : visible;
}

export function field(label, input) {
  return el("label", { class: "field" }, el("span", {}, label), input);
}

export function number(value, least, most, step = 1) {
  return el("input", { type: "number", value, min: least, max: most, step, inputmode: "decimal" });
}

// One of several: a row of radio buttons that looks like one button.
export function choice(legend, options, picked, chosen) {
  const name = `choice-${legend}-${Math.random()}`;
  return el(
    "fieldset",
    { class: "choice" },
    el("legend", { class: "hidden" }, legend),
    options.map(([value, text]) => {
      const input = el("input", { type: "radio", name, value, onchange: () => chosen(value) });
      input.checked = value === picked;
      return el("label", {}, input, el("span", {}, text));
    }),
  );
}
