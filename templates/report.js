"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const K = D.classes.length, SIZE = 28, PAGE = 60;
const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#c9b400", "#7a5cff", "#8a8a8a", "#a0522d"];
let C = D.checkpoints[0];
let shown = [], limit = PAGE, open = 0;

const label = i => +D.labels[i];
const answer = (i, c = C) => +c.predicted[i];
const probability = (i, k, c = C) => c.probabilities[i * K + k] / 1e4;
const confidence = i => probability(i, answer(i));
const wrong = i => answer(i) !== label(i);
const percent = (p, digits = 1) => p === null ? "none" : (100 * p).toFixed(digits) + "%";
const sure = p => p > 0.9999 ? "> 99.99%" : percent(p, 2);
const disagree = i => D.checkpoints.some(c => c.predicted[i] !== D.checkpoints[0].predicted[i]);

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "circle", "rect", "text", "g", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

function select(parent, name, id, choices, change) {
  const box = make("select", { id, onchange: change });
  for (const [value, text] of choices) box.append(make("option", { value }, text));
  parent.append(make("label", {}, name, box));
  return box;
}

// ---- pictures: squares of one large picture each

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
  const context = canvas.getContext("2d", { willReadFrequently: true }); // no trip to a graphics card for so few pixels
  context.imageSmoothingEnabled = false;
  context.drawImage(picture, (number % across) * size, Math.floor(number / across) * size, size, size, 0, 0, canvas.width, canvas.height);
}

function heat(canvas, picture, number) {
  const small = make("canvas", { width: D.map_size, height: D.map_size });
  cut(small, picture, number, D.map_size);
  const values = small.getContext("2d").getImageData(0, 0, D.map_size, D.map_size);
  const any = values.data.some((value, at) => at % 4 !== 3 && value);
  for (let at = 0; at < values.data.length; at += 4) {
    const value = values.data[at];
    values.data.set([255, 190 - 0.6 * value, 0, 0.75 * value], at);
  }
  small.getContext("2d").putImageData(values, 0, 0);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = true;
  context.drawImage(small, 0, 0, SIZE, SIZE);
  return any;
}

// ---- what mistakes are made of

function drawGroups() {
  const bar = make("div", { class: "bar", role: "group", "aria-label": "the groups of the mistakes" });
  const body = make("tbody");
  for (const [key, group] of Object.entries(C.groups)) {
    const told = `${D.groups[key]}: ${group.count} of ${group.n}`;
    if (group.count) bar.append(make("button", { style: `flex: ${group.count}; background: var(--${key})`, title: told, "aria-label": told, "data-group": key, onclick: () => filter({ what: "wrong", group: key }) }));
    const range = group.ci95 ? `${percent(group.ci95[0])} to ${percent(group.ci95[1])}` : "none";
    body.append(make("tr", {},
      make("td", {}, make("span", { class: "swatch", style: `background: var(--${key})` }), D.groups[key]),
      make("td", {}, String(group.count)), make("td", {}, percent(group.share)), make("td", {}, range)));
  }
  const head = make("thead", {}, make("tr", {}, ...["group", "mistakes", "share", "95% interval"].map(text => make("th", {}, text))));
  $("made").replaceChildren(bar, make("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "the groups in numbers" }, make("table", {}, head, body)));
}

// ---- confusion matrix

function drawMatrix() {
  const counts = Array.from({ length: K }, () => new Array(K).fill(0));
  for (let i = 0; i < D.n; i++) counts[label(i)][answer(i)]++;
  const most = Math.max(1, ...counts.flatMap((row, t) => row.filter((_, p) => p !== t)));
  const head = make("tr", {}, make("td"), ...D.classes.map(name => make("th", { scope: "col" }, make("span", {}, name))));
  const rows = counts.map((row, t) => make("tr", {}, make("th", { scope: "row" }, D.classes[t]), ...row.map((count, p) => {
    const button = make("button", {
      "data-true": t, "data-predicted": p, tabindex: t + p ? -1 : 0, class: t === p ? "right" : "",
      "aria-label": `${D.classes[t]} taken for ${D.classes[p]}: ${count} images`,
      onclick: () => filter({ what: "all", true: t, predicted: p }),
    }, String(count));
    if (t !== p && count) button.style.background = `color-mix(in srgb, var(--label) ${Math.round(12 + 40 * Math.sqrt(count / most))}%, var(--panel))`;
    return make("td", {}, button);
  })));
  $("matrix").replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
}

$("matrix").addEventListener("keydown", event => {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  const at = event.target.closest("button");
  if (!step || !at) return;
  event.preventDefault();
  const t = +at.dataset.true + step[0], p = +at.dataset.predicted + step[1];
  const next = $("matrix").querySelector(`[data-true="${t}"][data-predicted="${p}"]`);
  if (!next) return;
  at.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});

// ---- the grid, its filters and orders

const any = ["", "any"];
const classes = [any, ...D.classes.map((name, k) => [k, name])];
const TESTS = {
  what: { name: "images", choices: [["wrong", "mistakes"], ["right", "right answers"], ["all", "all"]], test: (i, v) => v === "all" || wrong(i) === (v === "wrong") },
  true: { name: "label", choices: classes, test: (i, v) => label(i) === +v },
  predicted: { name: "answer", choices: classes, test: (i, v) => answer(i) === +v },
  group: { name: "made of", choices: [any, ...Object.entries(D.groups)], test: (i, v) => groupOf(i) === v },
  confidence: { name: "confidence", choices: [any, ["0.99,1.1", "0.99 to 1"], ["0.9,0.99", "0.9 to 0.99"], ["0.5,0.9", "0.5 to 0.9"], ["0,0.5", "under 0.5"]], test: (i, v) => within(confidence(i), v) },
  ambiguity: { name: "ambiguity", choices: [any, ["0,0.001", "none: all trainings agree"], ["0.001,1", "under 1 bit"], ["1,9", "1 bit or more"]], test: (i, v) => within(D.ambiguity[i] / 100, v), there: D.ambiguity },
  suspect: { name: "label suspect", choices: [any, ["yes", "yes"], ["no", "no"]], test: (i, v) => (i in D.suspects) === (v === "yes"), there: D.suspects },
  duplicate: { name: "near-duplicate", choices: [any, ["yes", "yes"], ["no", "no"]], test: (i, v) => duplicates.has(i) === (v === "yes") },
  agree: { name: "checkpoints", choices: [any, ["no", "disagree"], ["yes", "agree"]], test: (i, v) => disagree(i) === (v === "no"), there: D.checkpoints.length > 1 },
};
const ORDERS = {
  confident: ["most confident first", i => -confidence(i)],
  doubtful: ["least confident first", i => confidence(i)],
  ambiguous: ["most ambiguous first", i => -D.ambiguity[i], D.ambiguity],
  suspect: ["most suspect label first", i => i in D.suspects ? D.suspects[i].rank : D.n, D.suspects],
  near: ["nearest to a training image first", i => D.distance[i]],
  index: ["in the order of the data", i => i],
};
const duplicates = new Set(D.duplicates);
const within = (value, range) => { const [low, high] = range.split(",").map(Number); return value >= low && value < high; };
const groupOf = i => C.group_of[i] || "";

for (const [key, each] of Object.entries(TESTS)) if (each.there !== null && each.there !== false) select($("filters"), each.name, "f-" + key, each.choices, refresh);
select($("filters"), "order", "f-order", Object.entries(ORDERS).filter(([, each]) => each[2] !== null).map(([key, each]) => [key, each[0]]), refresh);
$("filters").append(make("button", { class: "plain", id: "reset", onclick: () => { filter({}, false); } }, "reset"));

function filter(values, move = true) {
  for (const key of Object.keys(TESTS)) if ($("f-" + key)) $("f-" + key).value = values[key] ?? TESTS[key].choices[0][0];
  refresh();
  if (move) $("h-grid").scrollIntoView();
}

function refresh() {
  const active = Object.entries(TESTS).filter(([key]) => $("f-" + key) && $("f-" + key).value !== "");
  const key = ORDERS[$("f-order").value][1];
  shown = [];
  for (let i = 0; i < D.n; i++) if (active.every(([name, each]) => each.test(i, $("f-" + name).value))) shown.push(i);
  const keys = new Map(shown.map(i => [i, key(i)]));
  shown.sort((a, b) => keys.get(a) - keys.get(b) || a - b);
  limit = PAGE;
  $("grid").replaceChildren();
  drawGrid();
}

function drawGrid() {
  for (let at = $("grid").children.length; at < Math.min(limit, shown.length); at++) {
    const i = shown[at], canvas = make("canvas", { width: SIZE, height: SIZE });
    cut(canvas, pictures.test, i, SIZE);
    const told = wrong(i) ? `${D.classes[label(i)]} taken for ${D.classes[answer(i)]}` : D.classes[label(i)];
    $("grid").append(make("li", {}, make("button", { "data-index": i, "aria-label": `image ${i}: ${told}, confidence ${sure(confidence(i))}`, onclick: () => show(at) },
      canvas, make("div", { class: "true" }, D.classes[label(i)]), ...(wrong(i) ? [make("div", { class: "said" }, D.classes[answer(i)])] : []), make("div", {}, sure(confidence(i))))));
  }
  $("count").textContent = `${shown.length} images` + (shown.length > limit ? `, ${limit} of them shown` : "");
  $("more").hidden = shown.length <= limit;
}
$("more").onclick = () => { limit += PAGE; drawGrid(); };

// ---- one image

function show(at) {
  open = at;
  const i = shown[at];
  $("h-image").textContent = `Image ${i}: label ${D.classes[label(i)]}, answer ${D.classes[answer(i)]} (${sure(confidence(i))})`;
  const facts = [wrong(i) ? `a mistake, of the group: ${D.groups[groupOf(i)]}` : "right"];
  if (D.suspects && i in D.suspects) facts.push(`its label is suspect: a model that never saw it says ${D.classes[D.suspects[i].given]} (${percent(D.suspects[i].p)}), and ${percent(D.suspects[i].own)} for the label`);
  if (duplicates.has(i)) facts.push("a near-duplicate of a training image");
  if (D.ambiguity) facts.push(`ambiguity ${(D.ambiguity[i] / 100).toFixed(2)} bits`);
  $("facts").textContent = facts.join("; ") + ".";
  cut($("large"), pictures.test, i, SIZE);
  cut($("heat"), pictures.test, i, SIZE);
  const found = heat($("heat"), pictures.maps[D.checkpoints.indexOf(C)], i);
  $("heatname").textContent = `${C.map_method}: ${found ? "the" : "finds no"} evidence for ${D.classes[answer(i)]}`;
  $("answers").replaceChildren(...D.checkpoints.map(c => {
    const body = make("tbody");
    D.classes.map((name, k) => [name, probability(i, k, c)]).sort((a, b) => b[1] - a[1]).forEach(([name, p]) => body.append(make("tr", {},
      make("td", {}, name), make("td", { class: "meter" }, make("span", { style: `width: ${100 * p}%` })), make("td", {}, sure(p)))));
    return make("table", { class: "answers" }, make("caption", {}, c.name), body);
  }));
  $("near").replaceChildren(...D.neighbours[i].map(number => {
    const canvas = make("canvas", { width: SIZE, height: SIZE, role: "img", "aria-label": `training image ${D.train.index[number]}` });
    cut(canvas, pictures.train, number, SIZE);
    return make("li", { "data-train": D.train.index[number] }, canvas, `${D.classes[+D.train.labels[number]]}, image ${D.train.index[number]}`);
  }));
  const rows = D.votes.map(each => {
    const counts = new Map();
    for (const said of each.predicted) counts.set(said[i], (counts.get(said[i]) || 0) + 1);
    const text = [...counts].sort((a, b) => b[1] - a[1]).map(([k, count]) => `${D.classes[+k]} ${count}`).join(", ");
    return make("tr", {}, make("td", {}, each.name), make("td", { class: "words" }, text));
  });
  $("votes").replaceChildren(rows.length ? make("table", {}, make("tbody", {}, ...rows)) : "None are there yet: analyze_errors.py --deep trains them.");
  $("previous").disabled = at === 0;
  $("next").disabled = at === shown.length - 1;
  if (!$("image").open) $("image").showModal();
}
$("previous").onclick = () => show(open - 1);
$("next").onclick = () => show(open + 1);
$("close").onclick = () => $("image").close();
$("image").addEventListener("keydown", event => {
  if (event.key === "ArrowLeft" && open > 0) show(open - 1);
  if (event.key === "ArrowRight" && open < shown.length - 1) show(open + 1);
});

// ---- charts

function chart(width, height, xs, ys, name, xTold, yTold) {
  const left = 44, right = 8, top = 8, bottom = 34;
  const x = v => left + (v - xs[0]) / (xs[1] - xs[0]) * (width - left - right);
  const y = v => height - bottom - (v - ys[0]) / (ys[1] - ys[0]) * (height - top - bottom);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name });
  svg.append(make("path", { class: "axis", d: `M${left} ${top}V${height - bottom}H${width - right}` }));
  for (let step = 0; step <= 5; step++) {
    const vx = xs[0] + (xs[1] - xs[0]) * step / 5, vy = ys[0] + (ys[1] - ys[0]) * step / 5;
    svg.append(make("text", { x: x(vx), y: height - bottom + 14, "text-anchor": "middle" }, xTold(vx)));
    svg.append(make("text", { x: left - 5, y: y(vy) + 4, "text-anchor": "end" }, yTold(vy)));
  }
  return { svg, x, y, path: (points, attributes) => svg.append(make("path", { fill: "none", "stroke-width": 2, d: "M" + points.map(([a, b]) => `${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("L"), ...attributes })) };
}

function reliability(target, name, diagram) {
  if (!diagram) { $(target).textContent = ""; return; }
  const each = $("calclass").value === "" ? diagram.answer : diagram.classes[$("calclass").value];
  const c = chart(360, 280, [0, 1], [0, 1], `${name}, calibration error ${each.error.toFixed(4)}`, v => v.toFixed(1), v => v.toFixed(1));
  c.path([[0, 0], [1, 1]], { stroke: "var(--line)" });
  const most = Math.max(...each.counts);
  each.counts.forEach((count, bin) => {
    if (!count) return;
    const low = bin / each.counts.length, high = (bin + 1) / each.counts.length;
    c.svg.append(make("rect", { x: c.x(low) + 1, y: c.y(each.accuracy[bin]), width: c.x(high) - c.x(low) - 2, height: c.y(0) - c.y(each.accuracy[bin]), fill: "var(--accent)", "fill-opacity": 0.25 + 0.75 * count / most },
      make("title", {}, `${count} images, confidence ${percent(each.confidence[bin])}, right ${percent(each.accuracy[bin])}`)));
  });
  c.svg.append(make("text", { x: 200, y: 278, "text-anchor": "middle" }, "probability told; bars: how often it is so"));
  $(target).replaceChildren(make("h3", {}, `${name}: calibration error ${each.error.toFixed(4)}`), c.svg);
}

function drawCalibration() {
  $("calnote").textContent = C.temperature_note;
  reliability("before", "Before", C.before);
  reliability("after", "After temperature scaling", C.after);
}
$("calclass").append(...[["", "the answer given"], ...D.classes.map(name => [name, name])].map(([value, text]) => make("option", { value }, text)));
$("calclass").onchange = drawCalibration;

function drawCoverage() {
  const wanted = $("cover").value / 100;
  const point = C.coverage.reduce((best, each) => Math.abs(each.coverage - wanted) < Math.abs(best.coverage - wanted) ? each : best);
  $("covertold").textContent = `${percent(point.coverage, 0)} (${point.n} images, confidence from ${point.threshold.toFixed(3)}): ${percent(point.accuracy, 2)} right`;
  const floor = Math.floor(10 * Math.min(...D.checkpoints.flatMap(each => each.coverage.map(p => p.accuracy)))) / 10;
  const c = chart(480, 240, [0, 1], [Math.min(floor, 0.9), 1], "accuracy against coverage", v => percent(v, 0), v => percent(v, 0));
  D.checkpoints.forEach((each, number) => c.path(each.coverage.map(p => [p.coverage, p.accuracy]), { stroke: D.checkpoints.length > 1 ? COLOURS[number] : "var(--accent)", "stroke-opacity": each === C ? 1 : 0.5 }));
  c.svg.append(make("circle", { cx: c.x(point.coverage), cy: c.y(point.accuracy), r: 5, fill: "var(--label)" }));
  c.svg.append(make("text", { x: 260, y: 237, "text-anchor": "middle" }, "share of the images answered"));
  $("coverage").replaceChildren(c.svg);
}
$("cover").oninput = drawCoverage;

function drawRobustness() {
  if (!D.robustness.rows.length) return;
  $("roblegend").replaceChildren(...D.robustness.rows.map((row, number) => make("li", {}, make("span", { class: "swatch", style: `background: ${COLOURS[number % 10]}` }), row.name)));
  $("robustness").replaceChildren(...D.robustness.kinds.map(kind => {
    const c = chart(340, 230, [0, 5], [0, 1], `accuracy under ${kind}`, v => v.toFixed(0), v => percent(v, 0));
    D.robustness.rows.forEach((row, number) => c.path([[0, row.clean], ...row.curves[kind].map((value, at) => [at + 1, value])], { stroke: COLOURS[number % 10] }));
    return make("div", {}, make("h3", {}, kind), c.svg);
  }));
}

// ---- map

function drawMap() {
  if (!D.map) return;
  const canvas = $("map"), context = canvas.getContext("2d"), scale = canvas.width / 1000;
  const style = getComputedStyle(document.documentElement);
  context.clearRect(0, 0, canvas.width, canvas.height);
  for (const mistakes of [false, true]) for (let i = 0; i < D.n; i++) {
    if (wrong(i) !== mistakes) continue;
    const x = D.map[2 * i] * scale, y = D.map[2 * i + 1] * scale;
    context.fillStyle = context.strokeStyle = COLOURS[label(i)];
    if (!mistakes) context.fillRect(x - 2, y - 2, 4, 4);
    else {
      for (const [width, colour] of [[4.5, style.color || "#000"], [2, COLOURS[label(i)]]]) {
        context.lineWidth = width; context.strokeStyle = colour;
        context.beginPath(); context.moveTo(x - 6, y - 6); context.lineTo(x + 6, y + 6); context.moveTo(x - 6, y + 6); context.lineTo(x + 6, y - 6); context.stroke();
      }
    }
  }
  $("maplegend").replaceChildren(...D.classes.map((name, k) => make("li", {}, make("span", { class: "swatch", style: `background: ${COLOURS[k]}` }), name)));
}
if (D.map) $("map").onclick = event => {
  const box = $("map").getBoundingClientRect();
  const x = (event.clientX - box.left) / box.width * 1000, y = (event.clientY - box.top) / box.height * 1000;
  let best = 0, least = Infinity;
  for (let i = 0; i < D.n; i++) {
    const distance = (D.map[2 * i] - x) ** 2 + (D.map[2 * i + 1] - y) ** 2;
    if (distance < least) { least = distance; best = i; }
  }
  filter({ what: "all" }, false);
  show(shown.indexOf(best));
};

// ---- all of it

function drawAll() {
  drawGroups();
  drawMatrix();
  drawCalibration();
  drawCoverage();
  drawMap();
  refresh();
}
$("theme").onchange = () => { document.documentElement.style.colorScheme = $("theme").value; drawMap(); };
if ($("which")) $("which").onchange = () => { C = D.checkpoints[$("which").value]; drawAll(); };

const pictures = {};
Promise.all([load(D.sprites.test), load(D.sprites.train), ...D.checkpoints.map(c => load(c.maps))]).then(([test, train, ...maps]) => {
  Object.assign(pictures, { test, train, maps });
  drawAll();
  drawRobustness();
  document.body.dataset.ready = "yes";
});
