// The frame: which view is shown, what the run is called, and whether there are newer weights.

import { get, post } from "./api.js";
import { byId, say, sentence, short, whole } from "./dom.js";
import { compare } from "./compare.js";
import { experts } from "./rooms.js";
import { one } from "./room.js";
import { training } from "./training.js";
import { write } from "./talk.js";

const VIEWS = { write, experts, one, training, compare };
const EVERY = 2000; // milliseconds between two looks at a run that may train
const opened = {};
let model = null;
let now = "";

function fault(text) {
  const note = byId("fault");
  note.hidden = !text;
  note.textContent = sentence(text);
}

function header() {
  const step = model.step === null ? "no checkpoint yet" : `step ${whole(model.step)}`;
  const sizes = `${short(model.parameters)} parameters, ${short(model.active)} at work on each token`;
  byId("run").replaceChildren(Object.assign(document.createElement("b"), { textContent: model.name }), ` ${step} · ${sizes}`);
  document.title = `${model.name} · KhanhLLM`;
  const button = byId("newest");
  button.hidden = model.step === null || model.newest === null || model.newest <= model.step;
  button.textContent = `Take the newest weights (step ${whole(model.newest ?? 0)})`;
}

async function look() {
  try {
    model = await get("/api/model");
    header();
    fault("");
    await opened[now]?.look?.(model);
  } catch (error) {
    fault(error.message);
  }
}

async function show() {
  const wanted = location.hash.slice(1);
  now = wanted in VIEWS ? wanted : model.step === null ? "training" : "write";
  for (const name of Object.keys(VIEWS)) byId(`view-${name}`).hidden = name !== now;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${now}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  opened[now] ??= VIEWS[now](byId(`view-${now}`), model);
  await look();
}

async function follow() {
  if (!document.hidden) await look();
  setTimeout(follow, EVERY);
}

byId("newest").addEventListener("click", async () => {
  byId("newest").disabled = true;
  try {
    model = await post("/api/newest", {});
    header();
    say(`The model is now that of step ${model.step}.`);
  } catch (error) {
    fault(error.message);
  }
  byId("newest").disabled = false;
});

async function start() {
  try {
    model = await get("/api/model");
  } catch (error) {
    fault(error.message);
    setTimeout(start, EVERY);
    return;
  }
  header();
  addEventListener("hashchange", show);
  await show();
  setTimeout(follow, EVERY);
}

start();
