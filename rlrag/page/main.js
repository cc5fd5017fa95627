// Theme, header, keys and deep links; the page begins here.

const system = matchMedia("(prefers-color-scheme: dark)");
let theme = null; // chosen with the switch; null: the system's

function applyTheme() {
  const dark = (theme ?? (system.matches ? "dark" : "light")) === "dark";
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  get("theme").textContent = dark ? "Light" : "Dark";
}

function foldCurves(hidden) {
  get("curves").hidden = hidden;
  get("fold").textContent = hidden ? "Show curves" : "Hide curves";
  get("fold").setAttribute("aria-expanded", String(!hidden));
  if (!hidden) drawCurves();
}

// #episode=N&colour=NAME, where N is the line of episodes.jsonl, from 0. Whoever follows a link wants the episode: the
// curves make room for it.
function follow() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (Object.hasOwn(COLOURS, wanted.get("colour") ?? "")) colour = wanted.get("colour");
  if (!wanted.has("episode")) return false;
  foldCurves(true);
  const episode = byOrder.get(+wanted.get("episode"));
  if (!episode) {
    get("right").replaceChildren(make("p", {text: `Episode ${wanted.get("episode")} is not on this page: write it with a higher --episodes.`}));
    return true;
  }
  reveal(chosen.indexOf(episode));
  show(episode);
  if (get("right").getBoundingClientRect().top > innerHeight / 2) get("right").scrollIntoView(); // below the list
  return true;
}

function begin() {
  document.title = get("name").textContent = data.name;
  get("facts").textContent = data.facts.join("  ·  ");
  applyTheme();
  system.addEventListener("change", applyTheme);
  get("theme").onclick = () => { theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark"; applyTheme(); };
  get("fold").onclick = () => foldCurves(!get("curves").hidden);
  foldCurves(!data.curves.length);
  get("fold").hidden = !data.curves.length;
  prepareFilters();
  filter();
  addEventListener("hashchange", follow);
  addEventListener("resize", () => { drawRows(); if (!get("curves").hidden) drawCurves(); });
  addEventListener("scroll", hideTip, true);
  addEventListener("keydown", event => {
    const by = {ArrowDown: 1, j: 1, ArrowUp: -1, k: -1}[event.key];
    if (!by || event.ctrlKey || event.metaKey || event.altKey || ["INPUT", "SELECT"].includes(event.target.tagName)) return;
    event.preventDefault();
    move(by);
  });
  if (follow()) return;
  if (episodes.length) show(chosen[0], false);
  else get("right").append(make("p", {text: "No episodes are logged: train with --config.log_episodes above 0."}));
}

begin();
