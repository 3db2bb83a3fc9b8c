"use strict";

// Tables sort by the heading that is clicked: by the cell's own number where it has one, else by its text.
function sortBy(table, column, descending) {
  const body = table.tBodies[0];
  const key = (row) => {
    const cell = row.cells[column];
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent.trim();
  };
  const compare = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === y) return 0;
    if (x === "") return 1; // what has no value stays below
    if (y === "") return -1;
    const both = typeof x === "number" && typeof y === "number";
    const order = both ? x - y : typeof x === typeof y ? x.localeCompare(y) : typeof x === "number" ? -1 : 1;
    return descending ? -order : order;
  };
  body.append(...[...body.rows].sort(compare));
}

for (const table of document.querySelectorAll("table")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortBy(table, column, descending);
    });
  });
}

const charts = JSON.parse(document.getElementById("charts").textContent);
const colour = (role) => getComputedStyle(document.documentElement).getPropertyValue(`--${role}`).trim();
const SERIES = 10;

function themed(trace) {
  const { role, ...rest } = trace;
  const number = role.match(/^series-(\d+)$/);
  const shade = colour(number ? `series-${number[1] % SERIES}` : role);
  const error = rest.error_y ? { error_y: { ...rest.error_y, color: colour("text") } } : {};
  return { ...rest, ...error, line: { color: shade }, marker: { ...rest.marker, color: shade } };
}

function axis(title) {
  return {
    title: { text: title }, gridcolor: colour("line"), linecolor: colour("line"), zerolinecolor: colour("line"),
    automargin: true, exponentformat: "SI",
  };
}

function draw(chart) {
  const figure = document.getElementById(chart.id);
  const choice = figure.querySelector("select");
  const view = chart.views[choice ? choice.selectedIndex : 0];
  const { line_at: at, log_y: log, ...more } = view.layout;
  const shapes = at === undefined ? [] : [
    { type: "line", xref: "paper", x0: 0, x1: 1, y0: at, y1: at, line: { color: colour("quiet"), dash: "dot" } },
  ];
  const layout = {
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: { color: colour("text"), size: 12 },
    margin: { l: 50, r: 15, t: 15, b: 40 }, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    xaxis: axis(view.x), yaxis: { ...axis(view.y), ...(log ? { type: "log", dtick: "D2" } : {}) }, shapes, showlegend: true, ...more,
  };
  // a double click takes back a zoom; the bar of buttons would lie over the legend
  const shown = { responsive: true, displayModeBar: false };
  const place = figure.querySelector(".plot");
  // on a narrow page each name of a legend takes a line of its own
  const narrow = place.clientWidth < 500 && view.traces.length > 3;
  place.style.height = narrow ? `${300 + 19 * (view.traces.length - 3)}px` : "";
  Plotly.react(place, view.traces.map(themed), layout, shown);
}

// Plotly's script lies in the page packed, which makes the page less than half as large.
async function unpacked(element) {
  const bytes = Uint8Array.from(atob(element.textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

async function drawAll() {
  const library = document.getElementById("library");
  if (!library) return;
  if (!("DecompressionStream" in window)) {
    const places = document.querySelectorAll(".plot");
    places.forEach((place) => { place.textContent = "This browser is too old to unpack the charts."; });
    return;
  }
  await unpacked(library);
  for (const chart of charts) {
    draw(chart);
    document.getElementById(chart.id).querySelector("select")?.addEventListener("change", () => draw(chart));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach(draw));
}
drawAll();
