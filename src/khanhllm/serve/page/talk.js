// Write on from a text, or talk, as the run can.

import { stream } from "./api.js";
import { byId, choice, el, field, say, sentence, whole } from "./dom.js";
import { sampling, worker } from "./worker.js";

const WHY = {
  length: "as many as it may write",
  stop: "the model ended its document, or wrote the stop text",
};

// Why a text ended. One that was cut before it had its most tokens has filled the context.
const why = (reason, tokens, most) => (reason === "length" && tokens < most ? "the model sees no more at once" : WHY[reason] ?? reason);

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

  const { row, status, run, stop } = worker(place, "Write", async (signal, tell) => {
    const written = el("span", { class: "new" });
    text.replaceChildren(el("span", { class: "given" }, prompt.value), written);
    place.classList.add("written");
    const ends = stops.value ? [stops.value.replaceAll("\\n", "\n")] : [];
    const body = { ...settings.values(), prompt: prompt.value, stop: ends, stream_options: { include_usage: true } };
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
    return `Ended after ${whole(tokens)} tokens: ${why(reason, tokens, body.max_tokens)}.`;
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
  return stop;
}

function chat(place) {
  let messages = [], forgot = false;
  const said = el("ol", { id: "talk", class: "talk", "aria-label": "Conversation" });
  const input = el("textarea", { id: "message", rows: 3, placeholder: "Say something" });
  const settings = sampling(300);

  // The events of an answer. The oldest turns go where the model cannot see all, as in `khanhllm chat`.
  async function* answering(talk, body, signal) {
    for (let from = 0; ; from += 2) {
      try {
        for await (const event of stream("/v1/chat/completions", { ...body, messages: talk.slice(from) }, signal)) {
          forgot ||= from > 0;
          talk.splice(0, from);
          from = 0;
          yield event;
        }
        return;
      } catch (error) {
        if (error.code !== "context_length_exceeded" || from + 3 > talk.length) throw error;
      }
    }
  }

  const { row, status, run, stop } = worker(place, "Send", async (signal, tell) => {
    const content = input.value.trim();
    if (!content) return "";
    const talk = messages; // "Begin anew" puts another in its place
    talk.push({ role: "user", content });
    input.value = "";
    const question = el("li", { class: "user" }, content), answer = el("li", { class: "assistant" });
    said.append(question, answer);
    const body = { ...settings.values(), stream_options: { include_usage: true } };
    let reason = "", tokens = 0;
    try {
      tell("The model reads the conversation …");
      for await (const event of answering(talk, body, signal)) {
        if (event.usage) tokens = event.usage.completion_tokens;
        for (const one of event.choices) {
          answer.append(one.delta?.content ?? "");
          reason = one.finish_reason ?? reason;
          tell("The model answers …");
        }
        answer.scrollIntoView({ block: "nearest" });
      }
    } finally {
      if (answer.textContent.trim()) talk.push({ role: "assistant", content: answer.textContent });
      else { // what was not answered was not said
        talk.pop();
        question.remove();
        answer.remove();
        input.value ||= content;
      }
    }
    say(answer.textContent);
    status.scrollIntoView({ block: "nearest" }); // and the box for the next message with it
    const end = reason === "stop" ? "" : `Ended: ${why(reason, tokens, body.max_tokens)}. `;
    return end + (forgot ? "The model no longer sees your first messages." : "");
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      run();
    }
  });
  const anew = el("button", { type: "button" }, "Begin anew");
  anew.addEventListener("click", () => {
    stop();
    messages = [];
    forgot = false;
    said.replaceChildren();
    status.textContent = "";
  });
  row.append(anew);
  place.append(said, field("Your message (Enter sends it)", input), row, status,
    el("details", { class: "settings" }, el("summary", {}, "Settings"), el("div", { class: "fields" }, settings.fields)));
  return stop;
}

export function write(view, first) {
  const waits = el("p", { class: "note" });
  let place = el("div"), made = "", leave = () => {};

  function make(kind) {
    leave();
    made = kind;
    const fresh = el("div", { class: "write" }); // and with the old one goes what listens to it
    place.replaceWith(fresh);
    place = fresh;
    leave = (kind === "talk" ? chat : base)(place, first);
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
