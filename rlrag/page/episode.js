// One episode: its streams turn by turn, every token with its numbers, and what its searches found.

const COLOURS = {role: "role", region: "region", logp: "log-prob", entropy: "entropy", certainty: "self-certainty", advantage: "advantage"};
const ACTS = ["observed", "sampled", "forced"];
const roles = [...new Set(episodes.flatMap(e => e.streams.flatMap(s => s.spans.map(span => span.role))))].sort();
let colour = "role";

const tint = (n, strength = 0.28) => `rgba(${tone(n)}, ${strength})`;

// Each token's background, as a function of its place in the span.
function painter(span) {
  if (colour === "role") return () => span.act ? tint(roles.indexOf(span.role), span.act === 2 ? 0.55 : 0.28) : "";
  if (colour === "region") return k => span.tags?.[k] ? tint(span.tags[k] - 1, 0.34) : "";
  const values = halves(span[colour]), [low, high] = data.ranges[colour] ?? [0, 1];
  return k => {
    if (!values || Number.isNaN(values[k])) return "";
    if (colour === "advantage") {
      return `rgba(var(${values[k] < 0 ? "--minus" : "--plus"}), ${(0.75 * Math.min(1, Math.abs(values[k]) / high)).toFixed(3)})`;
    }
    const share = Math.min(1, Math.max(0, (values[k] - low) / (high - low || 1)));
    return `rgba(var(--level), ${(0.75 * (colour === "logp" ? 1 - share : share)).toFixed(3)})`;
  };
}

function chip(text, background) {
  const node = make("span", {class: "chip", text});
  node.style.background = background;
  return node;
}

function legend(episode) {
  const spans = episode.streams.flatMap(stream => stream.spans);
  if (colour === "role") {
    const written = [...new Set(spans.filter(span => span.act).map(span => `${span.act} ${span.role}`))].sort();
    return make("div", {class: "legend"}, ...written.map(each => {
      const act = +each[0], role = each.slice(2);
      return chip(`${ACTS[act]} by ${role}`, tint(roles.indexOf(role), act === 2 ? 0.55 : 0.28));
    }), make("span", {text: "plain: observed"}));
  }
  if (colour === "region") {
    const tags = [...new Set(spans.flatMap(span => span.tags ?? []))].filter(Boolean).sort();
    return make("div", {class: "legend"}, ...tags.map(tag => chip(data.regions[tag] ?? `region ${tag}`, tint(tag - 1, 0.34))),
      tags.length ? null : make("span", {text: "no regions in this episode"}));
  }
  if (!spans.some(span => span[colour])) return make("div", {class: "legend", text: `no ${COLOURS[colour]} in this episode`});
  const [low, high] = data.ranges[colour], swatch = make("span", {class: "swatch"});
  const full = "rgba(var(--level), .75)";
  swatch.style.background = `linear-gradient(90deg, ${{
    advantage: "rgba(var(--minus), .75), transparent, rgba(var(--plus), .75)", logp: `${full}, transparent`,
  }[colour] ?? `transparent, ${full}`})`;
  return make("div", {class: "legend"}, make("span", {text: number(low, 3)}), swatch, make("span", {text: number(high, 3)}),
    make("span", {text: colour === "advantage" ? "the run's range" : "nats, the run's range"}));
}

function drawSpan(span, turn) {
  const paint = painter(span);
  const tokens = make("div", {class: span.act ? "tokens" : "tokens observed"}, ...span.tokens.map((token, k) => {
    // A line break is seen, and breaks the line.
    const node = make("span", {"data-k": k, text: textOfToken(token).replaceAll("\n", "↵\n")}), background = paint(k);
    if (background) node.style.background = background;
    return node;
  }));
  tokens.onpointerover = event => event.target.dataset.k && showTip(event.target, span);
  tokens.onpointerleave = hideTip;
  const who = span.act ? `turn ${turn}: ${ACTS[span.act]} by ${span.role}, ` : "observed, ";
  const block = make("div", {class: "turn"}, make("div", {class: "who", text: `${who}${span.tokens.length} tokens`}), tokens);
  if (span.act) block.style.borderColor = `rgb(${tone(roles.indexOf(span.role))})`;
  return block;
}

function drawStream(stream) {
  let turn = 0;
  return [make("h3", {text: `Stream ${stream.name}`}), ...stream.spans.map(span => drawSpan(span, span.act ? ++turn : turn))];
}

function showTip(node, span) {
  const k = +node.dataset.k, [id, text] = data.vocabulary[span.tokens[k]];
  const lines = [`${JSON.stringify(text)}  id ${id}`];
  for (const name of NUMBERS) {
    const value = halves(span[name])?.[k];
    if (value !== undefined && !Number.isNaN(value)) {
      lines.push(COLOURS[name].padEnd(16) + number(value) + (name === "logp" ? `  (${number(100 * Math.exp(value), 3)} %)` : ""));
    }
  }
  if (span.tags?.[k]) lines.push("region".padEnd(16) + (data.regions[span.tags[k]] ?? span.tags[k]));
  const tip = get("tip"), at = node.getBoundingClientRect();
  tip.textContent = lines.join("\n");
  tip.hidden = false;
  tip.style.left = `${Math.max(4, Math.min(at.left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${at.bottom + 6 + tip.offsetHeight > innerHeight ? at.top - tip.offsetHeight - 6 : at.bottom + 6}px`;
}

function hideTip() {
  get("tip").hidden = true;
}

function table(pairs) {
  return make("table", {}, ...pairs.map(([name, ...cells]) =>
    make("tr", {}, make("th", {text: name}), ...cells.map(cell => make("td", {text: cell})))));
}

function drawSearch(search, place) {
  const title = `Search ${place + 1}: ${search.queries.join("  |  ")}  (${number(1000 * search.wait_s, 3)} ms`
    + (search.error ? `, failed: ${search.error})` : ")");
  return [make("h3", {text: title}), ...search.results.flatMap((found, q) => [
    search.queries.length > 1 ? make("div", {text: search.queries[q] ?? ""}) : null,
    found.length ? null : make("div", {text: "nothing found"}),
    ...found.map(([passage, score, gold]) => {
      const [id, name, text] = data.passages[passage];
      return make("div", {class: gold ? "passage gold" : "passage"},
        make("span", {class: "score", text: [gold ? "gold" : "", id, score === null ? "" : number(score)].filter(Boolean).join("  ·  ")}),
        name ? make("div", {class: "title", text: name}) : null, make("div", {text}));
    })]).filter(Boolean)];
}

function facts(episode) {
  const found = new Set(episode.searches.flatMap(s => s.results.flat()).filter(([, , gold]) => gold).map(([passage]) => data.passages[passage][0]));
  return table([
    ["answers", episode.answers.join("  |  ")],
    ["prediction", episode.prediction ?? "none"],
    ["status", episode.status + (episode.error ? `: ${episode.error}` : "")],
    ["from", `${episode.stage} step ${episode.step}, policy ${episode.version}, ${episode.id}`],
    ["searches", `${episode.searches.length}` + (episode.hops === null ? "" : ` for ${episode.hops} hops`) + (found.size ? `, gold passages found: ${found.size}` : "")],
  ]);
}

function payments(episode) {
  const calls = episode.streams.length > 1 ? [["reward by call", ...episode.streams.map(stream => stream.name)]] : [];
  return table([...calls,
    ...Object.entries(episode.rewards).map(([name, paid]) => [`reward: ${name}`, ...paid.map(value => number(value))]),
    ["reward in all", number(episode.reward)],
    ...Object.entries(episode.metrics).map(([name, value]) => [name, number(value)])]);
}

// The other samples of the question in the same step.
function group(episode) {
  const samples = episodes.filter(e => e.id === episode.id && e.step === episode.step && e.stage === episode.stage);
  return samples.length < 2 ? null : make("div", {class: "group"}, make("span", {text: "samples of this question, by reward"}), ...samples.map(each => {
    const button = make("button", {text: number(each.reward, 3), title: `sample ${each.sample}`});
    if (each === episode) button.setAttribute("aria-current", "true");
    button.onclick = () => show(each);
    return button;
  }));
}

// linked: whether the page's address names it from now on.
function show(episode, linked = true) {
  const right = get("right"), again = episode === open, at = right.scrollTop;
  open = episode;
  if (linked) history.replaceState(null, "", `#episode=${episode.order}${colour === "role" ? "" : `&colour=${colour}`}`);
  drawRows();
  hideTip();
  const select = make("select", {id: "colour"}, ...Object.entries(COLOURS).map(([value, text]) => make("option", {value, text})));
  select.value = colour;
  select.oninput = () => { colour = select.value; show(episode); get("colour").focus(); };
  right.replaceChildren(...[
    make("h2", {text: episode.question || episode.id}),
    make("div", {class: "pair"}, facts(episode), payments(episode)),
    group(episode),
    make("div", {class: "toolbar"}, make("label", {for: "colour", text: "Colour tokens by"}), select, legend(episode)),
    ...episode.streams.flatMap(drawStream),
    ...episode.searches.flatMap(drawSearch),
  ].filter(Boolean));
  right.scrollTop = again ? at : 0;
}
