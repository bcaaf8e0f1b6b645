// Filters the page's table and draws its pictures from the figures under #data, with ECharts.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const asRow = values => Object.fromEntries(data.columns.map((name, i) => [name, values[i]]));
const rows = data.rows.map((values, number) => ({ ...asRow(values), number }));
const lent = data.lent.map(asRow); // of another run: they have no line in the table
const dark = matchMedia("(prefers-color-scheme: dark)");
const FILTERS = ["family", "layout", "L", "N", "method"];
const TIMES = {
  device: { name: "device time", us: "device_us", speedup: "speedup" },
  call: { name: "eager call time", us: "call_us", speedup: "call_speedup" },
  graph: { name: "time in a CUDA graph", us: "graph_us", speedup: "graph_speedup" },
};
// Okabe and Ito's colours, for a light and a dark page.
const COLOURS = [
  ["#0072B2", "#4aa8e8"], ["#D55E00", "#ff8a4c"], ["#CC79A7", "#e79ac6"], ["#B07d00", "#f0b429"],
  ["#3a9bd0", "#9fd3f5"], ["#009E73", "#3ccf9f"], ["#555555", "#cccccc"], ["#8C564B", "#d6a08f"],
  ["#7B3FA0", "#c39bea"], ["#17899b", "#4fd0e0"], ["#111111", "#ffffff"], ["#6b7a00", "#c6d84a"],
];
const SYMBOLS = ["circle", "rect", "triangle", "diamond", "path://M0,3H3V0H6V3H9V6H6V9H3V6H0Z", "path://M0,0H10L5,9Z",
  "path://M3,0H7L10,5L7,9H3L0,5Z"]; // the last three: a plus, a triangle that stands on its tip, a hexagon
// Speed-up from which a cell of the heat map has this colour, and that of the number in it.
const HEAT = [[0, "#b3400c", "#fff"], [1, "#f2b27a", "#000"], [data.needed, "#dcebf5", "#000"],
  [1.5, "#a5cce6", "#000"], [2, "#6aa9d6", "#000"], [3, "#2f76b0", "#fff"], [5, "#14487a", "#fff"]];
const GRADES = { same: ["#8a949c", 4], noise: ["#b9a26a", 6], faster: ["#1f9d55", 8], suspect: ["#e09b00", 10],
  slower: ["#d62f24", 12] };

const methods = [...new Set([...Object.keys(data.labels), ...rows.map(row => row.method)])];
const label = method => data.labels[method] || method;
const colour = number => COLOURS[number % COLOURS.length][dark.matches ? 1 : 0];
const symbol = number => SYMBOLS[number % SYMBOLS.length];
const variable = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const distinct = (list, name) => [...new Set(list.map(row => row[name]))].sort((a, b) => a - b || 0);
const geomean = list => Math.exp(list.reduce((sum, value) => sum + Math.log(value), 0) / list.length);
const short = value => Number(value.toPrecision(3)).toString();
function groups(list, key) {
  const found = new Map();
  for (const item of list) {
    const name = key(item);
    if (!found.has(name)) found.set(name, []);
    found.get(name).push(item);
  }
  return found;
}

// --- what is chosen ---

const selects = {};
const chosen = name => selects[name].value;
const passes = row => FILTERS.every(name => !chosen(name) || String(row[name]) === chosen(name));
const time = () => TIMES[chosen("time")];

function addSelect(name, options) {
  const select = (selects[name] = document.createElement("select"));
  select.id = `choose-${name}`;
  for (const [value, text] of options) select.add(new Option(text, value));
  select.addEventListener("change", update);
  const shown = document.createElement("label");
  shown.append(`${name} `, select);
  document.getElementById("filters").append(shown);
}
for (const name of FILTERS) {
  const values = distinct(rows.filter(row => row[name] !== null), name);
  addSelect(name, [["", "all"], ...values.map(value => [value, name === "method" ? label(value) : value])]);
}
addSelect("time", Object.entries(TIMES).map(([value, { name }]) => [value, name]));

// --- the table ---

const table = document.querySelector("#all table"), body = table.tBodies[0], lines = [...body.rows];
const filter = document.getElementById("filter"), shown = document.getElementById("shown");

function filterTable() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  lines.forEach((line, number) => {
    const text = words.length ? line.textContent.toLowerCase() : "";
    line.hidden = !passes(rows[number]) || !words.every(word => text.includes(word));
    count += !line.hidden;
  });
  shown.textContent = `${count} of ${lines.length} rows`;
}
function sortBy(head) {
  const up = head.getAttribute("aria-sort") !== "ascending", at = head.cellIndex;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = line => line.cells[at].textContent;
  const numbers = lines.every(line => value(line) === "" || !isNaN(value(line)));
  const sorted = [...lines].sort((a, b) => {
    const x = value(a), y = value(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    return (numbers ? x - y : x.localeCompare(y)) * (up ? 1 : -1);
  });
  body.append(...sorted);
}
function find(number) {
  body.querySelector(".found")?.classList.remove("found");
  if (lines[number].hidden) { filter.value = ""; filterTable(); }
  lines[number].classList.add("found");
  lines[number].scrollIntoView({ block: "center" });
}
for (const head of table.tHead.rows[0].cells) {
  head.tabIndex = 0;
  head.addEventListener("click", () => sortBy(head));
  head.addEventListener("keydown", event => { if (event.key === "Enter") sortBy(head); });
}
filter.addEventListener("input", filterTable);

// --- drawing ---

// A point knows its row, and says more where it stands for several.
function point(value, row, ...more) {
  return { value, number: row.number, said: () => [row.case, label(row.method), ...said(row), ...more] };
}
function said(row) {
  const of = Object.values(TIMES).filter(({ us }) => row[us]);
  const text = of.map(({ name, us, speedup }) =>
    `${name}: ${short(row[us])} µs` + (row[speedup] ? `, ${short(row[speedup])}x` : ""));
  return row.tflops ? [...text, `${short(row.tflops)} TFLOP/s`] : text;
}
// The lowest and the geomean of several rows' values, as one point.
function mean(x, list, name, worst, unit) {
  const end = list.reduce((a, b) => ((worst === "lowest" ? a[name] < b[name] : a[name] > b[name]) ? a : b));
  const value = geomean(list.map(row => row[name]));
  const more = list.length > 1 ? [`${worst} of ${list.length} cases, whose geomean is ${short(value)}${unit}`] : [];
  return point([...x, value], end, ...more);
}
function hover({ data: at }) {
  if (!at || !at.said) return "";
  const box = document.createElement("div");
  at.said().forEach((text, i) => {
    const line = box.appendChild(document.createElement(i ? "div" : "strong"));
    line.textContent = text;
  });
  return box;
}
function axis(type, name, more = {}) {
  const line = { lineStyle: { color: variable("--line") } };
  const text = { color: variable("--fg"), fontSize: 11, lineHeight: 14, hideOverlap: true,
    ...(type === "category" ? {} : { formatter: String }), ...more.axisLabel };
  const alone = factor => ({ min, max }) => (min === max ? min * factor : null); // else a lone value has 20 octaves
  if (type === "log") more = { min: alone(0.5), max: alone(2), ...more };
  return { type, name, nameLocation: "middle", nameGap: 28, logBase: 2, nameTextStyle: { color: variable("--soft") },
    axisLine: line, axisTick: line, splitLine: { show: type !== "category", ...line }, ...more, axisLabel: text };
}
function chart(title, series, xAxis, yAxis, more = {}) {
  const fg = variable("--fg");
  return {
    animation: false, backgroundColor: variable("--bg"), textStyle: { fontFamily: "system-ui, sans-serif" },
    aria: { enabled: true, label: { description: title } },
    title: { text: title, left: 0, top: 0, textStyle: { color: fg, fontSize: 13, fontWeight: 600 } },
    legend: { top: 20, left: 0, textStyle: { color: fg, fontSize: 11 }, itemWidth: 16, itemHeight: 9, itemGap: 8 },
    tooltip: { trigger: "item", confine: true, formatter: hover, backgroundColor: variable("--panel"),
      borderColor: variable("--line"), textStyle: { color: fg, fontSize: 12 },
      extraCssText: "max-width: 92vw; white-space: normal; overflow-wrap: anywhere;" },
    grid: { left: 8, right: 16, top: 48, bottom: 8 },
    xAxis, yAxis, series, ...more,
  };
}
const guide = (at, color) => ({ silent: true, symbol: "none", animation: false, label: { show: false },
  data: at, lineStyle: { color, type: "dashed", width: 1.3 } });

// Leaves room for the lines of a legend that does not fit into one.
function withRoom(option, width) {
  if (option.legend.show === false) return option;
  let lines = 1, x = 0;
  for (const name of new Set(option.series.map(one => one.name))) {
    const wide = 30 + 6.5 * name.length;
    if (x && x + wide > width) { lines += 1; x = 0; }
    x += wide;
  }
  return { ...option, grid: { ...option.grid, top: 30 + 17 * lines } };
}

// A panel is drawn when it comes near the window: all of them at once would keep the page from opening.
const watcher = new IntersectionObserver(entries => {
  for (const { target, isIntersecting } of entries) {
    target.near = isIntersecting;
    if (isIntersecting) show(target);
  }
}, { rootMargin: "300px" });
function show(panel) {
  if (!panel.option) return;
  let drawn = echarts.getInstanceByDom(panel);
  if (!drawn) {
    drawn = echarts.init(panel);
    drawn.on("click", ({ data: at }) => { if (at?.number !== undefined) find(at.number); });
  }
  drawn.resize();
  drawn.setOption(withRoom(panel.option, panel.clientWidth), true);
  drawn.getZr().flush(); // now and not in the next frame: a printer does not wait
  panel.option = null;
}
const everyPanel = () => document.querySelectorAll(".panel > div");

function draw() {
  for (const picture of document.querySelectorAll("[data-picture]")) {
    const boxes = picture.querySelector(".panels");
    const wanted = PICTURES[picture.dataset.picture](rows.filter(row => row.L && row.N && passes(row)));
    while (boxes.children.length > wanted.length) {
      echarts.dispose(boxes.lastChild.firstChild);
      boxes.lastChild.remove();
    }
    while (boxes.children.length < wanted.length) { // all of them first: how wide they are follows from their number
      const box = boxes.appendChild(document.createElement("div"));
      box.className = "panel";
      watcher.observe(box.appendChild(document.createElement("div")));
    }
    wanted.forEach(({ option, height, least = 0 }, i) => {
      const panel = boxes.children[i].firstChild;
      panel.style.height = `${height}px`;
      panel.style.minWidth = `${least}px`;
      panel.option = option;
      if (panel.near) show(panel);
    });
    picture.querySelector(".nothing").hidden = wanted.length > 0;
  }
}
addEventListener("beforeprint", () => everyPanel().forEach(show));
function update() {
  filterTable();
  draw();
}
