// Requests to this server, and to no other. The key, if there is one, stays in this variable.

import { byId } from "./dom.js";

let key = "";
let asking = null;

export class Fault extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, settings = {}) {
  const headers = { ...(settings.body && { "content-type": "application/json" }) };
  if (key) headers.authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, { ...settings, headers, credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault("The server does not answer. Is it still running?", 0);
  }
  if (answer.ok) return answer;
  if (answer.status === 401) {
    await askKey();
    return ask(path, settings);
  }
  const fault = await answer.json().catch(() => ({}));
  throw new Fault(fault.error?.message ?? `The server answered ${answer.status}.`, answer.status);
}

function askKey() {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key");
    const input = dialog.querySelector("input");
    dialog.addEventListener("close", () => {
      key = input.value.trim();
      input.value = "";
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

export const get = async (path) => (await ask(path)).json();

export const post = async (path, body) => (await ask(path, { method: "POST", body: JSON.stringify(body) })).json();

// The events of a stream, one object each. The server ends its work when `signal` aborts.
export async function* stream(path, body, signal) {
  const answer = await ask(path, { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Fault("The server ended the stream early.", 0);
      const parts = (held + value).split("\n\n");
      held = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue;
        if (part.startsWith("data: [DONE]")) return;
        const event = JSON.parse(part.slice(6));
        if (event.error) throw new Fault(event.error.message, 500);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
