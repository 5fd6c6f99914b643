"use strict";
const $ = id => document.getElementById(id);
const D = JSON.parse($("data").textContent); // everything the page shows; report.py says what is in it
const K = D.classes.length, SIZE = 28, PAGE = 60; // classes, pixels a side, images that "show more" adds
const COLOURS = [
  "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#c9b400", "#7a5cff", "#8a8a8a", "#a0522d",
];
let C = D.checkpoints[0]; // the chosen checkpoint
let shown = [], limit = PAGE; // the images that pass the filters, and how many of them the grid may show
let open = 0; // the place in shown of the image that is open

const label = i => +D.labels[i];
const answer = (i, c = C) => +c.predicted[i];
const probability = (i, k, c = C) => c.probabilities[i * K + k] / 1e4;
const confidence = i => probability(i, answer(i));
const wrong = i => answer(i) !== label(i);
const groupOf = i => C.group_of[i] || "";
const disagree = i => D.checkpoints.some(c => c.predicted[i] !== D.checkpoints[0].predicted[i]);
/** How many people voted for each class. */
function votesOf(i) {
  return D.classes.map((_, k) => D.human.charCodeAt(i * K + k) - D.human_zero);
}

/** Whose class has the most votes of people. */
function side(i) {
  const votes = votesOf(i), most = Math.max(...votes);
  if (votes.filter(count => count === most).length > 1) return "tied";
  const choice = votes.indexOf(most);
  return choice === label(i) ? "label" : choice === answer(i) ? "model" : "other";
}
const duplicates = new Set(D.duplicates);
const colour = number => COLOURS[number % COLOURS.length];
const percent = (p, digits = 1) => p === null ? "none" : (100 * p).toFixed(digits) + "%";
const sure = p => p > 0.9999 ? "> 99.99%" : percent(p, 2); // 100% would claim a certainty that the model does not have

// ---- elements

const SVG = ["svg", "path", "circle", "rect", "text", "title"];

function make(tag, attributes = {}, ...children) {
  const node = SVG.includes(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") node.style.cssText = value; // the page allows no style attribute in its text
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

function row(tag, cells) {
  return make("tr", {}, ...cells.map(cell => cell instanceof HTMLTableCellElement ? cell : make(tag, {}, cell)));
}

function select(parent, name, id, choices, change) {
  const box = make("select", { id, onchange: change });
  for (const [value, text] of choices) box.append(make("option", { value }, text));
  parent.append(make("label", {}, name, box));
}

function swatch(background) {
  return make("span", { class: "swatch", style: `background: ${background}` });
}

function legend(target, names) {
  target.replaceChildren(...names.map((name, number) => make("li", {}, swatch(colour(number)), name)));
}

// ---- pictures: each is a square of a large picture

const pictures = {};

function load(source) {
  return new Promise((resolve, reject) => {
    const picture = new Image();
    picture.onload = () => resolve(picture);
    picture.onerror = reject;
    picture.src = source;
  });
}

function cut(canvas, picture, number, size) {
  const across = picture.width / size;
  const left = (number % across) * size, top = Math.floor(number / across) * size;
  const context = canvas.getContext("2d", { willReadFrequently: true }); // faster than a graphics card for few pixels
  context.imageSmoothingEnabled = false;
  context.drawImage(picture, left, top, size, size, 0, 0, canvas.width, canvas.height);
}

/** Draw a heat map over a canvas; return whether it has any heat. */
function heat(canvas, picture, number) {
  const small = make("canvas", { width: D.map_size, height: D.map_size });
  cut(small, picture, number, D.map_size);
  const context = small.getContext("2d");
  const values = context.getImageData(0, 0, D.map_size, D.map_size);
  const any = values.data.some((value, at) => at % 4 !== 3 && value);
  for (let at = 0; at < values.data.length; at += 4) {
    const value = values.data[at];
    values.data.set([255, 190 - 0.6 * value, 0, 0.75 * value], at);
  }
  context.putImageData(values, 0, 0);
  const target = canvas.getContext("2d");
  target.imageSmoothingEnabled = true;
  target.drawImage(small, 0, 0, SIZE, SIZE);
  return any;
}

// ---- kinds of mistakes

function drawGroups() {
  const bar = make("div", { class: "bar", role: "group", "aria-label": "kinds of mistakes" });
  const body = make("tbody");
  for (const [key, group] of Object.entries(C.groups)) {
    const background = `var(--${key})`, name = D.groups[key], title = `${name}: ${group.count} of ${group.n}`;
    if (group.count) bar.append(make("button", {
      style: `flex: ${group.count}; background: ${background}`, title, "aria-label": title, "data-group": key,
      onclick: () => filter({ what: "wrong", group: key }),
    }));
    const interval = group.ci95 ? `${percent(group.ci95[0])} to ${percent(group.ci95[1])}` : "none";
    const first = make("td", {}, swatch(background), name);
    body.append(row("td", [first, String(group.count), percent(group.share), interval]));
  }
  const head = make("thead", {}, row("th", ["kind", "mistakes", "share", "95% interval"]));
  const table = make("table", { class: "wide" }, head, body);
  const region = { class: "scroll", role: "region", tabindex: "0", "aria-label": "kinds of mistakes in numbers" };
  $("made").replaceChildren(bar, make("div", region, table));
}

// ---- confusion matrix

function drawMatrix() {
  const counts = Array.from({ length: K }, () => new Array(K).fill(0));
  for (let i = 0; i < D.n; i++) counts[label(i)][answer(i)]++;
  const most = Math.max(1, ...counts.flatMap((row, t) => row.filter((_, p) => p !== t)));
  const names = D.classes.map(name => make("th", { scope: "col", title: name }, make("span", {}, name)));
  const rows = counts.map((row, t) => {
    const cells = row.map((count, p) => make("td", {}, matrixCell(t, p, count, most)));
    return make("tr", {}, make("th", { scope: "row", title: D.classes[t] }, D.classes[t]), ...cells);
  });
  $("matrix").replaceChildren(make("thead", {}, make("tr", {}, make("td"), ...names)), make("tbody", {}, ...rows));
}

function matrixCell(t, p, count, most) {
  const button = make("button", {
    "data-true": t, "data-predicted": p, tabindex: t + p ? -1 : 0, class: t === p ? "right" : count ? "" : "zero",
    "aria-label": `label ${D.classes[t]}, answer ${D.classes[p]}: ${count} images`,
    onclick: () => filter({ what: "all", true: t, predicted: p }),
  }, String(count));
  const strength = Math.round(12 + 40 * Math.sqrt(count / most));
  if (t !== p && count) button.style.background = `color-mix(in srgb, var(--label) ${strength}%, var(--panel))`;
  return button;
}

$("matrix").addEventListener("keydown", event => {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  const from = event.target.closest("button");
  if (!step || !from) return;
  event.preventDefault();
  const t = +from.dataset.true + step[0], p = +from.dataset.predicted + step[1];
  const to = $("matrix").querySelector(`[data-true="${t}"][data-predicted="${p}"]`);
  if (!to) return;
  from.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
});

// ---- the grid of images, its filters and orders

const any = ["", "any"], yesNo = [any, ["yes", "yes"], ["no", "no"]];
const classes = [any, ...D.classes.map((name, k) => [k, name])];
const within = (value, range) => {
  const [low, high] = range.split(",").map(Number);
  return value >= low && value < high;
};

// Each filter: its name, its choices, the test of image i for a value; "there" is null or false where data is missing.
const FILTERS = {
  what: {
    name: "images", choices: [["wrong", "mistakes"], ["right", "right answers"], ["all", "all"]],
    test: (i, v) => v === "all" || wrong(i) === (v === "wrong"),
  },
  true: { name: "label", choices: classes, test: (i, v) => label(i) === +v },
  predicted: { name: "answer", choices: classes, test: (i, v) => answer(i) === +v },
  group: { name: "kind of mistake", choices: [any, ...Object.entries(D.groups)], test: (i, v) => groupOf(i) === v },
  confidence: {
    name: "confidence",
    choices: [
      any, ["0.99,1.1", "0.99 to 1"], ["0.9,0.99", "0.9 to 0.99"], ["0.5,0.9", "0.5 to 0.9"], ["0,0.5", "under 0.5"],
    ],
    test: (i, v) => within(confidence(i), v),
  },
  ambiguity: {
    name: "ambiguity",
    choices: [any, ["0,0.001", "none: all runs agree"], ["0.001,1", "under 1 bit"], ["1,9", "1 bit or more"]],
    test: (i, v) => within(D.ambiguity[i] / 100, v), there: D.ambiguity,
  },
  suspect: {
    name: "label suspect", choices: yesNo, test: (i, v) => (i in D.suspects) === (v === "yes"), there: D.suspects,
  },
  duplicate: { name: "near-duplicate", choices: yesNo, test: (i, v) => duplicates.has(i) === (v === "yes") },
  people: {
    name: "people side with", choices: [
      any, ["model", "the model"], ["label", "the label"], ["other", "another class"], ["tied", "several: tied"],
    ],
    test: (i, v) => side(i) === v, there: D.human,
  },
  agree: {
    name: "checkpoints", choices: [any, ["no", "disagree"], ["yes", "agree"]],
    test: (i, v) => disagree(i) === (v === "no"), there: D.checkpoints.length > 1,
  },
};
// Each order: its name, the sort key of image i, and data that may be missing.
const ORDERS = {
  confident: ["most confident first", i => -confidence(i)],
  doubtful: ["least confident first", i => confidence(i)],
  ambiguous: ["most ambiguous first", i => -D.ambiguity[i], D.ambiguity],
  suspect: ["most suspect label first", i => i in D.suspects ? D.suspects[i].rank : D.n, D.suspects],
  near: ["nearest to a training image first", i => D.distance[i]],
  index: ["in the order of the data", i => i],
};

function makeFilters() {
  for (const [key, each] of Object.entries(FILTERS)) {
    if (each.there !== null && each.there !== false) select($("filters"), each.name, "f-" + key, each.choices, refresh);
  }
  const orders = Object.entries(ORDERS).filter(([, each]) => each[2] !== null).map(([key, each]) => [key, each[0]]);
  select($("filters"), "order", "f-order", orders, refresh);
  $("filters").append(make("button", { class: "plain", id: "reset", onclick: () => filter({}, false) }, "reset"));
}

/** Set the filters to these values and all others to their first choice. */
function filter(values, move = true) {
  for (const [key, each] of Object.entries(FILTERS)) {
    if ($("f-" + key)) $("f-" + key).value = values[key] ?? each.choices[0][0];
  }
  refresh();
  if (move) $("h-grid").scrollIntoView();
}

function refresh() {
  const active = Object.keys(FILTERS).filter(key => $("f-" + key) && $("f-" + key).value !== "");
  const passes = i => active.every(key => FILTERS[key].test(i, $("f-" + key).value));
  const key = ORDERS[$("f-order").value][1];
  shown = Array.from({ length: D.n }, (_, i) => i).filter(passes);
  const keys = new Map(shown.map(i => [i, key(i)]));
  shown.sort((a, b) => keys.get(a) - keys.get(b) || a - b);
  limit = PAGE;
  $("grid").replaceChildren();
  drawGrid();
}

/** Add the images to the grid that it may show and does not show yet. */
function drawGrid() {
  for (let at = $("grid").children.length; at < Math.min(limit, shown.length); at++) $("grid").append(gridItem(at));
  $("count").textContent = `${shown.length} images` + (shown.length > limit ? `, the first ${limit} are shown` : "");
  $("more").hidden = shown.length <= limit;
}

function gridItem(at) {
  const i = shown[at], canvas = make("canvas", { width: SIZE, height: SIZE });
  cut(canvas, pictures.test, i, SIZE);
  const lines = [make("div", { class: "true" }, D.classes[label(i)])];
  if (wrong(i)) lines.push(make("div", { class: "said" }, D.classes[answer(i)]));
  lines.push(make("div", {}, sure(confidence(i))));
  const text = `image ${i}: label ${D.classes[label(i)]}, answer ${D.classes[answer(i)]}, ${sure(confidence(i))}`;
  const attributes = { "data-index": i, "aria-label": text, onclick: () => show(at) };
  return make("li", {}, make("button", attributes, canvas, ...lines));
}

$("more").onclick = () => { limit += PAGE; drawGrid(); };

// ---- one image

function show(at) {
  open = at;
  const i = shown[at];
  const name = D.classes[answer(i)];
  $("h-image").textContent = `Image ${i}: label ${D.classes[label(i)]}, answer ${name} (${sure(confidence(i))})`;
  $("facts").textContent = facts(i).join(" ");
  cut($("large"), pictures.test, i, SIZE);
  cut($("heat"), pictures.test, i, SIZE);
  const found = heat($("heat"), pictures.maps[D.checkpoints.indexOf(C)], i);
  $("heatname").textContent = `${C.map_method} ${found ? "marks the" : "finds no"} evidence for ${name}`;
  $("answers").replaceChildren(...D.checkpoints.map(c => answersTable(i, c)));
  if (D.human) $("human").replaceChildren(peopleTable(i));
  $("near").replaceChildren(...D.neighbours[i].map(neighbour));
  $("votes").replaceChildren(votes(i));
  $("previous").disabled = at === 0;
  $("next").disabled = at === shown.length - 1;
  if (!$("image").open) $("image").showModal();
}

function facts(i) {
  const found = [wrong(i) ? `A mistake. Kind: ${D.groups[groupOf(i)]}.` : "A right answer."];
  if (D.suspects && i in D.suspects) {
    const { given, p, own } = D.suspects[i];
    found.push("The label is suspect: a model that was not trained on this image gives " +
      `${D.classes[given]} a probability of ${percent(p)} and the label ${percent(own)}.`);
  }
  if (duplicates.has(i)) found.push("It is a near-duplicate of a training image.");
  if (D.ambiguity) found.push(`Ambiguity: ${(D.ambiguity[i] / 100).toFixed(2)} bits.`);
  return found;
}

function answersTable(i, c) {
  const title = D.checkpoints.length > 1 ? `${c.title} (${c.name})` : c.title;
  return bars(title, D.classes.map((name, k) => [name, probability(i, k, c), sure(probability(i, k, c))]));
}

function peopleTable(i) {
  const counts = votesOf(i), all = counts.reduce((sum, count) => sum + count, 0);
  const role = k => k === label(i) ? " (label)" : k === answer(i) ? " (answer)" : "";
  const voted = D.classes.map((name, k) => [name + role(k), counts[k] / all, String(counts[k])]);
  return bars(`${all} votes of people`, voted.filter(each => each[1]));
}

/** A table of bars, the longest first. rows: [name, share of the full width, text]. */
function bars(title, rows) {
  const body = rows.sort((a, b) => b[1] - a[1]).map(([name, share, text]) => {
    const meter = make("td", { class: "meter" }, make("span", { style: `width: ${100 * share}%` }));
    return row("td", [name, meter, text]);
  });
  return make("table", { class: "answers" }, make("caption", {}, title), make("tbody", {}, ...body));
}

function neighbour(number) {
  const index = D.train.index[number];
  const canvas = make("canvas", { width: SIZE, height: SIZE, role: "img", "aria-label": `training image ${index}` });
  cut(canvas, pictures.train, number, SIZE);
  return make("li", { "data-train": index }, canvas, `${D.classes[+D.train.labels[number]]}, image ${index}`);
}

function votes(i) {
  if (!D.votes.length) return "There are none yet. analyze_errors.py --deep trains them.";
  const rows = D.votes.map(each => {
    const counts = new Map();
    for (const answers of each.predicted) counts.set(answers[i], (counts.get(answers[i]) || 0) + 1);
    const ranked = [...counts].sort((a, b) => b[1] - a[1]);
    const text = ranked.map(([k, count]) => `${D.classes[+k]} ${count}`).join(", ");
    return row("td", [each.name, make("td", { class: "words" }, text)]);
  });
  return make("table", {}, make("tbody", {}, ...rows));
}

$("previous").onclick = () => show(open - 1);
$("next").onclick = () => show(open + 1);
$("close").onclick = () => $("image").close();
$("image").addEventListener("keydown", event => {
  if (event.key === "ArrowLeft" && open > 0) show(open - 1);
  if (event.key === "ArrowRight" && open < shown.length - 1) show(open + 1);
});

// ---- charts

/** Make an empty chart. xs and ys are [lowest, highest]; xTick and yTick turn a value into text. */
function chart({ name, xs, ys, xTitle, yTitle, xTick, yTick }) {
  const width = 420, height = 300, left = 62, right = 24, top = 12, bottom = 48;
  const x = v => left + (v - xs[0]) / (xs[1] - xs[0]) * (width - left - right);
  const y = v => height - bottom - (v - ys[0]) / (ys[1] - ys[0]) * (height - top - bottom);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name });
  const write = (text, attributes) => svg.append(make("text", { "text-anchor": "middle", ...attributes }, text));
  for (let step = 0; step <= 5; step++) {
    const vx = xs[0] + (xs[1] - xs[0]) * step / 5, vy = ys[0] + (ys[1] - ys[0]) * step / 5;
    svg.append(make("path", { class: "grid", d: `M${left} ${y(vy)}H${width - right}` }));
    write(xTick(vx), { x: x(vx), y: height - bottom + 18 });
    write(yTick(vy), { x: left - 7, y: y(vy) + 4, "text-anchor": "end" });
  }
  svg.append(make("path", { class: "axis", d: `M${left} ${top}V${height - bottom}H${width - right}` }));
  write(xTitle, { class: "title", x: x((xs[0] + xs[1]) / 2), y: height - 8 });
  const middle = y((ys[0] + ys[1]) / 2);
  write(yTitle, { class: "title", x: 14, y: middle, transform: `rotate(-90 14 ${middle})` });
  return { svg, x, y };
}

function line({ svg, x, y }, points, attributes) {
  const d = "M" + points.map(([a, b]) => `${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("L");
  svg.append(make("path", { fill: "none", "stroke-width": 2, d, ...attributes }));
}

function drawReliability(target, name, diagrams) {
  if (!diagrams) { $(target).textContent = ""; return; }
  const k = $("calclass").value, diagram = k === "" ? diagrams.answer : diagrams.classes[k];
  const title = `${name}: calibration error ${diagram.error.toFixed(4)}`;
  const c = chart({
    name: title, xs: [0, 1], ys: [0, 1], xTick: v => v.toFixed(1), yTick: v => v.toFixed(1),
    xTitle: "predicted probability", yTitle: k === "" ? "share of right answers" : "share with this label",
  });
  const most = Math.max(...diagram.counts), width = 1 / diagram.counts.length;
  diagram.counts.forEach((count, bin) => {
    if (!count) return;
    const left = c.x(bin * width) + 1, right = c.x((bin + 1) * width) - 1, top = c.y(diagram.accuracy[bin]);
    const score = percent(diagram.confidence[bin]), share = percent(diagram.accuracy[bin]);
    c.svg.append(make("rect", {
      x: left, y: top, width: right - left, height: c.y(0) - top,
      fill: "var(--accent)", "fill-opacity": 0.25 + 0.75 * count / most,
    }, make("title", {}, `${count} images, probability ${score}, share ${share}`)));
  });
  line(c, [[0, 0], [1, 1]], { stroke: "var(--soft)", "stroke-width": 1, "stroke-dasharray": "4 3" });
  $(target).replaceChildren(make("h3", {}, title), c.svg);
}

function drawCalibration() {
  $("calnote").textContent = C.temperature_note;
  drawReliability("before", "Before scaling", C.before);
  drawReliability("after", "After scaling", C.after);
}

function drawCoverage() {
  const wanted = $("cover").value / 100, several = D.checkpoints.length > 1;
  const far = point => Math.abs(point.coverage - wanted);
  const point = C.coverage.reduce((best, each) => far(each) < far(best) ? each : best);
  $("covertold").textContent = `${percent(point.coverage, 0)} answered (${point.n} images, ` +
    `confidence ${point.threshold.toFixed(3)} or more): ${percent(point.accuracy, 2)} right`;
  const lowest = Math.min(...D.checkpoints.flatMap(each => each.coverage.map(p => p.accuracy)));
  const c = chart({
    name: "accuracy by the share of images answered", xs: [0, 1], ys: [Math.min(Math.floor(10 * lowest) / 10, 0.9), 1],
    xTick: v => percent(v, 0), yTick: v => percent(v, 0), xTitle: "share of images answered", yTitle: "accuracy",
  });
  D.checkpoints.forEach((each, number) => line(c, each.coverage.map(p => [p.coverage, p.accuracy]), {
    stroke: several ? colour(number) : "var(--accent)", "stroke-opacity": each === C ? 1 : 0.5,
  }));
  c.svg.append(make("circle", { cx: c.x(point.coverage), cy: c.y(point.accuracy), r: 5, fill: "var(--label)" }));
  $("coverage").replaceChildren(c.svg);
  if (several) legend($("coverlegend"), D.checkpoints.map(each => `${each.title} (${each.name})`));
}

// ---- people

const FEW = 10; // mistakes of a kind that are too few for a bar
const SIDES = {
  model: ["the model's answer", "var(--accent)"], label: ["the label", "var(--label)"],
  other: ["another class", "var(--line)"], tied: ["tied", "var(--faint)"],
};

function drawPeople() {
  if (!D.people) return;
  for (const place of ["peoplebars", "peoplelegend", "peoplechart"]) $(place).replaceChildren();
  const own = D.people.checkpoints[D.checkpoints.indexOf(C)];
  if (!own) $("peoplebars").textContent = "The votes on the mistakes of this checkpoint need --human-votes.";
  if (!own) return;
  const kinds = Object.keys(D.groups).filter(key => own.groups[key]).map(key => [key, own.groups[key]]);
  const rows = [["", own.mistakes], ...kinds].filter(([, each]) => each.n >= FEW);
  $("peoplebars").replaceChildren(...rows.flatMap(([key, each]) => [
    make("h3", {}, `${key ? D.groups[key] : "all mistakes"}: ${each.n.toLocaleString("en")}`), peopleBar(key, each),
    make("p", { class: "soft" }, `by chance: the answer ${percent(each.expected.model)}, the label ${percent(each.expected.label)}`),
  ]));
  const items = Object.values(SIDES).map(([name, background]) => make("li", {}, swatch(background), name));
  $("peoplelegend").replaceChildren(...items);
  drawDisagreement(own.confidence);
}

function peopleBar(group, each) {
  const bar = make("div", { class: "bar" });
  for (const [side, [name, background]] of Object.entries(SIDES)) {
    if (!each[side].count) continue;
    const title = `${name}: ${each[side].count} of ${each.n}, ${percent(each[side].share)}`;
    const attributes = { style: `flex: ${each[side].count}; background: ${background}`, title, "aria-label": title };
    const choose = { onclick: () => filter({ what: "wrong", group, people: side }) };
    const text = each[side].share > 0.08 ? percent(each[side].share, 0) : "";
    bar.append(D.human
      ? make("button", { ...attributes, class: side, ...choose }, text)
      : make("span", { ...attributes, class: side, role: "img" }, text));
  }
  return bar;
}

function drawDisagreement({ tenths, spearman }) {
  const c = chart({
    name: "how far people disagree, by the model's confidence", xs: [1, 11], ys: [0, 2.5], xTick: () => "",
    yTick: v => v.toFixed(1), xTitle: "tenths of the images, least to most confident", yTitle: "bits of entropy",
  });
  line(c, tenths.map((each, at) => [at + 1.5, each.entropy]), { stroke: "var(--accent)" });
  const rho = spearman === null ? "none" : spearman.toFixed(2).replace("-", "\u2212");
  const title = `How far people disagree, by the confidence of the model (Spearman: ${rho})`;
  $("peoplechart").replaceChildren(make("h3", {}, title), c.svg);
}

function drawRobustness() {
  if (!D.robustness.rows.length) return;
  legend($("roblegend"), D.robustness.rows.map(each => each.name));
  $("robustness").replaceChildren(...D.robustness.kinds.map(kind => {
    const c = chart({
      name: `accuracy under ${kind}`, xs: [0, 5], ys: [0, 1], xTick: v => v.toFixed(0), yTick: v => percent(v, 0),
      xTitle: "strength", yTitle: "accuracy",
    });
    D.robustness.rows.forEach((each, number) => {
      const points = [each.clean, ...each.curves[kind]].map((value, strength) => [strength, value]);
      line(c, points, { stroke: colour(number) });
    });
    return make("div", {}, make("h3", {}, kind), c.svg);
  }));
}

// ---- map

/** Draw the map in the screen's own pixels, so that points and crosses are crisp. */
function drawMap() {
  if (!D.map) return;
  const canvas = $("map"), pixel = window.devicePixelRatio || 1;
  canvas.width = canvas.height = Math.round(canvas.clientWidth * pixel);
  const context = canvas.getContext("2d"), scale = canvas.width / 1000;
  const place = i => [D.map[2 * i] * scale, D.map[2 * i + 1] * scale].map(Math.round);
  const all = Array.from({ length: D.n }, (_, i) => i);
  context.globalAlpha = 0.45;
  for (const i of all.filter(i => !wrong(i))) {
    const [x, y] = place(i), size = Math.round(2.5 * pixel);
    context.fillStyle = colour(label(i));
    context.fillRect(x - size / 2, y - size / 2, size, size);
  }
  context.globalAlpha = 1;
  for (const i of all.filter(wrong)) drawCross(context, ...place(i), 3.2 * pixel, 1.6 * pixel, colour(label(i)));
  drawMapLegend();
}

function drawCross(context, x, y, reach, width, stroke) {
  context.strokeStyle = stroke;
  context.lineWidth = width;
  context.beginPath();
  context.moveTo(x - reach, y - reach);
  context.lineTo(x + reach, y + reach);
  context.moveTo(x - reach, y + reach);
  context.lineTo(x + reach, y - reach);
  context.stroke();
}

function drawMapLegend() {
  const images = new Array(K).fill(0), mistakes = new Array(K).fill(0);
  for (let i = 0; i < D.n; i++) {
    images[label(i)]++;
    if (wrong(i)) mistakes[label(i)]++;
  }
  const rows = D.classes.map((name, k) => {
    const first = make("td", {}, swatch(colour(k)), name);
    return row("td", [first, String(images[k]), String(mistakes[k])]);
  });
  const head = make("thead", {}, row("th", ["label", "images", "mistakes"]));
  $("maplegend").replaceChildren(head, make("tbody", {}, ...rows));
}

function openNearest(event) {
  const box = $("map").getBoundingClientRect();
  const x = (event.clientX - box.left) / box.width * 1000, y = (event.clientY - box.top) / box.height * 1000;
  let best = 0, least = Infinity;
  for (let i = 0; i < D.n; i++) {
    const distance = (D.map[2 * i] - x) ** 2 + (D.map[2 * i + 1] - y) ** 2;
    if (distance < least) { least = distance; best = i; }
  }
  filter({ what: "all" }, false);
  show(shown.indexOf(best));
}

// ---- start

function drawAll() {
  drawGroups();
  drawPeople();
  drawMatrix();
  drawCalibration();
  drawCoverage();
  drawMap();
  refresh();
}

makeFilters();
for (const [value, text] of [["", "the answer"], ...D.classes.map(name => [name, name])]) {
  $("calclass").append(make("option", { value }, text));
}
$("calclass").onchange = drawCalibration;
$("cover").oninput = drawCoverage;
$("theme").onchange = () => { document.documentElement.style.colorScheme = $("theme").value; };
if ($("which")) $("which").onchange = () => { C = D.checkpoints[$("which").value]; drawAll(); };
if (D.map) $("map").onclick = openNearest;
window.addEventListener("resize", drawMap);

const sources = [D.sprites.test, D.sprites.train, ...D.checkpoints.map(c => c.maps)];
Promise.all(sources.map(load)).then(([test, train, ...maps]) => {
  Object.assign(pictures, { test, train, maps });
  drawAll();
  drawRobustness();
  document.body.dataset.ready = "yes";
});
