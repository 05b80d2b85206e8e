// Write on from a text, or talk, as the run can.

import { stream } from "./api.js";
import { byId, choice, el, field, number, say, sentence, whole } from "./dom.js";

const WHY = {
  length: "as many as it may write",
  stop: "the model ended its document, or wrote the stop text",
};

// Buttons that start and stop one piece of work, and a line that says how it goes. Ctrl+Enter starts, Escape stops.
export function worker(place, name, work) {
  const go = el("button", { class: "strong", type: "button" }, name);
  const halt = el("button", { type: "button", disabled: true }, "Stop");
  const status = el("p", { class: "status", role: "status" });
  let control = null;

  async function run(...what) {
    control?.abort();
    const mine = (control = new AbortController());
    halt.disabled = false;
    status.classList.remove("bad");
    let end = "";
    try {
      end = await work(mine.signal, (text) => mine === control && (status.textContent = text), ...what);
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

// Whether the reader looks at the end of a box that grows; then it stays in sight.
function following(box) {
  const end = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  return () => end && (box.scrollTop = box.scrollHeight);
}

function base(place, model) {
  const prompt = el("textarea", { id: "prompt", rows: 5, spellcheck: "false", placeholder: "Empty: a new document" });
  prompt.value = model.prompt;
  const stops = el("input", { type: "text", placeholder: "none", spellcheck: "false" });
  const settings = sampling(120);
  const text = el("pre", { id: "text", class: "paper", tabindex: "0", "aria-label": "What the model writes" });

  const { row, status, run } = worker(place, "Write", async (signal, tell) => {
    const written = el("span", { class: "new" });
    text.replaceChildren(el("span", { class: "given" }, prompt.value), written);
    place.classList.add("written");
    const stop = stops.value ? [stops.value.replaceAll("\\n", "\n")] : [];
    const body = { ...settings.values(), prompt: prompt.value, stop, stream_options: { include_usage: true } };
    let reason = "", tokens = 0;
    tell("The model reads the prompt …");
    for await (const event of stream("/v1/completions", body, signal)) {
      if (event.usage) tokens = event.usage.completion_tokens;
      for (const one of event.choices) {
        const keep = following(text);
        written.append(one.text);
        keep();
        reason = one.finish_reason ?? reason;
        tell("The model writes …");
      }
    }
    say(written.textContent);
    const full = reason === "length" && tokens < body.max_tokens;
    return `Ended after ${whole(tokens)} tokens: ${full ? "the model sees no more at once" : WHY[reason] ?? reason}.`;
  });
  const again = el("button", { type: "button" }, "Go on");
  again.addEventListener("click", () => {
    prompt.value = text.textContent || prompt.value;
    run();
  });
  row.append(again);
  place.append(
    el("p", { class: "lead" }, "The model continues a text, a token at a time. It knows the kind of text it was trained on, and nothing else."),
    el("div", { class: "desk" },
      el("div", {}, field("Text to begin with", prompt), row, status),
      el("details", { class: "settings" }, el("summary", {}, "Settings"),
        el("div", { class: "fields" }, settings.fields, field("Stop text", stops)))),
    text,
  );
}

function chat(place) {
  const messages = [];
  const said = el("ol", { id: "talk", class: "talk", "aria-label": "Conversation" });
  const input = el("textarea", { id: "message", rows: 3, placeholder: "Say something" });
  const settings = sampling(300);

  const { row, status, run } = worker(place, "Send", async (signal, tell) => {
    const content = input.value.trim();
    if (!content) return "";
    messages.push({ role: "user", content });
    input.value = "";
    const question = el("li", { class: "user" }, content), answer = el("li", { class: "assistant" });
    said.append(question, answer);
    const body = { ...settings.values(), messages };
    let reason = "";
    try {
      tell("The model reads the conversation …");
      for await (const event of stream("/v1/chat/completions", body, signal)) {
        for (const one of event.choices) {
          answer.append(one.delta?.content ?? "");
          reason = one.finish_reason ?? reason;
          tell("The model answers …");
        }
        answer.scrollIntoView({ block: "nearest" });
      }
    } finally {
      if (answer.textContent) messages.push({ role: "assistant", content: answer.textContent });
      else { // what was not answered was not said
        messages.pop();
        question.remove();
        answer.remove();
        input.value ||= content;
      }
    }
    say(answer.textContent);
    return reason === "stop" ? "" : `Ended: ${WHY[reason] ?? reason}.`;
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      run();
    }
  });
  const anew = el("button", { type: "button" }, "Begin anew");
  anew.addEventListener("click", () => {
    messages.length = 0;
    said.replaceChildren();
  });
  row.append(anew);
  place.append(said, field("Your message (Enter sends it)", input), row, status,
    el("details", { class: "settings" }, el("summary", {}, "Settings"), el("div", { class: "fields" }, settings.fields)));
}

export function write(view, first) {
  const waits = el("p", { class: "note" });
  const place = el("div", { class: "write" });
  let made = "";

  function make(kind) {
    made = kind;
    place.replaceChildren();
    (kind === "talk" ? chat : base)(place, first);
  }

  function look(model) {
    waits.hidden = !model.waits_for;
    waits.textContent = sentence(model.waits_for);
    if (model.talks && made === "") {
      view.insertBefore(choice("Kind of writing", [["talk", "Talk"], ["text", "Continue a text"]], "talk", make), place);
      make("talk");
    } else if (made === "") make("text");
    byId("h-write").textContent = made === "talk" ? "Talk" : "Write";
  }

  view.append(waits, place);
  look(first);
  return { look };
}
