// What the server advises, as commands of a shell: it speaks of requests, whoever reads this of commands.

import { h } from "./dom.js";

const REQUEST = /(POST \/(?:gradients|conversions) \{[^{}]*\}|GET \/\w+(?= lists what there is))/;

/** A text of the server, with commands where it names requests. */
export function inCommands(text) {
  return text.split(REQUEST).map((part, place) => (place % 2 ? h("code", {}, command(part)) : part));
}

function command(request) {
  if (request.startsWith("GET")) return `gradstore ${request.slice("GET /".length)} list`;
  const [, noun, body] = request.match(/^POST \/(\w+) (.*)$/);
  return `gradstore ${noun} create ${Object.entries(JSON.parse(body)).map(options).join(" ")}`;
}

/** A field as options: a list by repeating one whose name is the singular. */
function options([field, value]) {
  const name = (Array.isArray(value) ? field.replace(/s$/, "") : field).replaceAll("_", "-");
  return [value].flat().map((one) => `--${name} ${quoted(String(one))}`).join(" ");
}

const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);
