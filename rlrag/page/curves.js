// Small multiples: one chart for each group of metrics, drawn at the width it has.

const CHART = {height: 100, left: 52, right: 8, top: 6, bottom: 16};
const tone = n => `var(--tone${n % 5})`;

function extent(lines, of) {
  let low = Infinity, high = -Infinity;
  for (const line of lines) for (const value of line[of]) if (value !== null) { low = Math.min(low, value); high = Math.max(high, value); }
  return [low, high];
}

// The nearest point that has a value; the last one for x = Infinity.
function nearest(line, x) {
  let best = -1;
  line.x.forEach((at, k) => {
    if (line.y[k] !== null && (best < 0 || Math.abs(at - x) <= Math.abs(line.x[best] - x))) best = k;
  });
  return best;
}

function caption(curve, x) {
  const parts = curve.lines.map((line, n) => {
    const k = nearest(line, x), part = make("span", {}, make("i", {class: "dot"}));
    part.firstChild.style.background = `rgb(${tone(n)})`;
    part.append((curve.lines.length > 1 ? `${line.name} ` : "") + (k < 0 ? "–" : number(line.y[k])));
    return part;
  });
  return [
    make("div", {}, make("b", {text: curve.title + (curve.log ? " (log)" : "")}), make("span", {text: x === Infinity ? "" : `step ${x}`})),
    make("div", {}, ...parts),
  ];
}

// Draws into the figure what fits its width; called again when that changes.
function plot(curve, figure) {
  const {height, left, right, top, bottom} = CHART, width = figure.clientWidth - 20;
  const scale = curve.log ? y => Math.log10(y) : y => y;
  let [low, high] = extent(curve.lines, "y");
  const [first, last] = extent(curve.lines, "x");
  if (low === high) { low -= Math.abs(low) / 10 || 0.5; high += Math.abs(high) / 10 || 0.5; }
  const px = x => left + (x - first) / Math.max(last - first, 1) * (width - left - right);
  const py = y => top + (scale(high) - scale(y)) / (scale(high) - scale(low)) * (height - top - bottom);
  const svg = draw("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": curve.title});
  for (const y of [low, high]) {
    svg.append(draw("line", {class: "grid", x1: left, x2: width - right, y1: py(y), y2: py(y)}));
    // Three digits, and more where the two ends would read alike.
    const same = number(low, 3) === number(high, 3);
    svg.append(draw("text", {x: left - 4, y: py(y) + 4, "text-anchor": "end"}, number(y, same ? 6 : 3)));
  }
  svg.append(draw("text", {x: left, y: height - 2}, String(first)));
  svg.append(draw("text", {x: width - right, y: height - 2, "text-anchor": "end"}, String(last)));
  curve.lines.forEach((line, n) => {
    let path = "", pen = "M";
    line.y.forEach((y, k) => {
      path += y === null ? "" : `${pen}${px(line.x[k]).toFixed(1)} ${py(y).toFixed(1)}`;
      pen = y === null ? "M" : "L";
    });
    const drawn = draw("path", {d: path});
    drawn.style.stroke = `rgb(${tone(n)})`;
    svg.append(drawn);
  });
  const cursor = draw("line", {class: "cursor", y1: top, y2: height - bottom, visibility: "hidden"});
  svg.append(cursor);
  const head = figure.querySelector("figcaption");
  svg.onpointermove = event => {
    const x = (event.clientX - svg.getBoundingClientRect().left - left) / (width - left - right) * (last - first) + first;
    const longest = curve.lines.reduce((a, b) => a.x.length >= b.x.length ? a : b), at = longest.x[nearest(longest, x)];
    cursor.setAttribute("x1", px(at));
    cursor.setAttribute("x2", px(at));
    cursor.setAttribute("visibility", "visible");
    head.replaceChildren(...caption(curve, at));
  };
  svg.onpointerleave = () => {
    cursor.setAttribute("visibility", "hidden");
    head.replaceChildren(...caption(curve, Infinity));
  };
  figure.replaceChildren(head, svg);
}

function drawCurves() {
  get("curves").replaceChildren(...data.curves.map(curve => make("figure", {}, make("figcaption", {}, ...caption(curve, Infinity)))));
  data.curves.forEach((curve, n) => plot(curve, get("curves").children[n]));
}
