"use strict";
// What the page holds. Text of a run is hostile: it reaches the document through textContent and nothing else.

const data = JSON.parse(document.getElementById("data").textContent);
const episodes = data.episodes;
const NUMBERS = ["logp", "entropy", "certainty", "advantage"];

const get = id => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter(Boolean));
  return node;
}

function draw(tag, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
}

function number(x, digits = 4) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  const size = Math.abs(x);
  return x && (size >= 1e5 || size < 1e-3) ? x.toExponential(Math.max(digits - 2, 1)) : String(+x.toPrecision(digits));
}

const textOfToken = token => data.vocabulary[token][1];
const tokensOf = episode => episode.streams.flatMap(stream => stream.spans).flatMap(span => span.tokens);

// Half-precision numbers, little-endian, in base64; NaN where a number is not known.
function halves(encoded) {
  if (!encoded) return null;
  const bytes = atob(encoded);
  return Float32Array.from({length: bytes.length / 2}, (_, i) => {
    const bits = bytes.charCodeAt(2 * i) | bytes.charCodeAt(2 * i + 1) << 8;
    const sign = bits & 0x8000 ? -1 : 1, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent === 31) return NaN;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : fraction * 2 ** -24);
  });
}

function searchable(episode) {
  episode.text ??= [episode.id, episode.question, ...episode.answers, episode.prediction ?? "",
    tokensOf(episode).map(textOfToken).join("")].join("\n").toLowerCase();
  return episode.text;
}

episodes.forEach(episode => {
  episode.length = episode.streams.reduce((sum, s) => sum + s.spans.reduce((n, span) => n + span.tokens.length, 0), 0);
});
const byOrder = new Map(episodes.map(episode => [episode.order, episode]));
