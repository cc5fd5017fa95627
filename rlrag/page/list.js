// The list: filter, sort, and only the rows in sight as elements.

const HEIGHT = 48; // of a row, as in style.css
const FILTERS = ["search", "stage", "status", "first", "last", "low", "high", "searches", "sort"];
const SORTED_BY = {
  order: episode => episode.order,
  reward: episode => episode.reward ?? -Infinity,
  searches: episode => episode.searches.length,
  length: episode => episode.length,
};
let chosen = []; // what the filters leave, in order
let open = null; // the episode shown

function options(select, of, all) {
  const values = [...new Set(episodes.map(of))].sort((a, b) => a < b ? -1 : 1);
  select.replaceChildren(make("option", {value: "", text: all}), ...values.map(value => make("option", {value, text: value})));
}

function prepareFilters() {
  options(get("stage"), episode => episode.stage, "all");
  options(get("status"), episode => episode.status, "all");
  options(get("searches"), episode => episode.searches.length, "any");
  for (const id of FILTERS) get(id).oninput = filter;
  get("filters").onsubmit = event => event.preventDefault();
  get("filters").onreset = () => setTimeout(filter); // the fields are empty only after this event
  get("list").onscroll = drawRows;
  get("list").onclick = event => {
    const row = event.target.closest(".row");
    if (row) show(byOrder.get(+row.dataset.order));
  };
}

function filter() {
  const value = id => get(id).value, within = (x, low, high) => x >= (low === "" ? -Infinity : +low) && x <= (high === "" ? Infinity : +high);
  const text = value("search").trim().toLowerCase();
  chosen = episodes.filter(episode =>
    (!value("stage") || episode.stage === value("stage"))
    && (!value("status") || episode.status === value("status"))
    && (!value("searches") || episode.searches.length === +value("searches"))
    && within(episode.step, value("first"), value("last"))
    && within(episode.reward, value("low"), value("high"))
    && (!text || searchable(episode).includes(text)));
  const sign = value("sort").startsWith("-") ? -1 : 1, key = SORTED_BY[value("sort").replace("-", "")];
  chosen.sort((a, b) => sign * Math.sign(key(a) - key(b)) || a.order - b.order);
  get("count").textContent = `${chosen.length} of ${episodes.length} episodes`
    + (data.logged > episodes.length ? `, ${data.logged} logged` : "");
  get("rows").style.height = `${chosen.length * HEIGHT}px`;
  get("list").scrollTop = 0;
  drawRows();
}

function drawRow(episode, place) {
  const count = episode.searches.length;
  const row = make("div", {class: "row", role: "option", "aria-selected": String(episode === open), "data-order": episode.order},
    make("div", {class: "top"},
      make("span", {class: episode.reward > 0 ? "good" : "bad", text: number(episode.reward)}),
      make("span", {text: `${episode.stage} ${episode.step}`}),
      make("span", {text: `${count} search${count === 1 ? "" : "es"}`}),
      make("span", {text: `${episode.length} tokens`}),
      episode.status === "completed" ? null : make("span", {class: "bad", text: episode.status})),
    make("div", {class: "question", text: episode.question || episode.id}));
  row.style.top = `${place * HEIGHT}px`;
  return row;
}

function drawRows() {
  const list = get("list"), first = Math.max(0, Math.floor(list.scrollTop / HEIGHT) - 4);
  const shown = chosen.slice(first, first + Math.ceil(list.clientHeight / HEIGHT) + 8);
  get("rows").replaceChildren(...shown.map((episode, k) => drawRow(episode, first + k)));
}

function reveal(place) {
  const list = get("list"), top = place * HEIGHT;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + HEIGHT - list.clientHeight;
}

function move(by) {
  if (!chosen.length) return;
  const at = chosen.indexOf(open), next = at < 0 ? 0 : Math.max(0, Math.min(chosen.length - 1, at + by));
  reveal(next);
  show(chosen[next]);
}
